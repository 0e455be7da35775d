"""Training state in one file and in parts: written while training goes on, verified, read by whoever asks.

Here one process shards its networks with itself; several are in test_distributed.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed

from msdcli import nets
from msdcli.data import open_data
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.draws import Source
from msdcli.diffusion.ema import EMA
from msdcli.engine.checkpoints import disk, storage
from msdcli.engine.checkpoints import files as checkpoint_files
from msdcli.engine.checkpoints.files import DamagedError
from msdcli.engine.checkpoints.manager import CheckpointManager
from msdcli.engine.checkpoints.train_state import TrainState
from msdcli.engine.distributed import sharded_tensors, sharding
from msdcli.engine.distributed.group import SINGLE_PROCESS
from msdcli.engine.train import loop as distill
from msdcli.engine.train.loop import TrainOptions
from msdcli.errors import UserError
from msdcli.nets.edm.edm2 import MPConv
from msdcli.objectives.edm import DenoisingScoreMatching
from msdcli.recipe.data import Toy2dSettings
from msdcli.recipe.networks import MLPSettings
from msdcli.recipe.stages import EdmSettings
from tests.conftest import environment
from tests.engine.distributed import sharded

POINTS = open_data(Toy2dSettings(points=800))


@pytest.fixture(autouse=True)
def sharing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A world of one process, in which networks can be sharded."""
    gpu = request.node.get_closest_marker("gpu") is not None
    if not gpu:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    yield
    sharded_tensors.row_of_processes.cache_clear()
    distributed.destroy_process_group()


def network(channels: int = 16) -> Denoiser:
    torch.manual_seed(0)
    return nets.build(MLPSettings(channels=channels, blocks=1), shape=(2,), num_classes=8, sigma_data=0.5).train()


def run(folder: Path, steps: int, *, fsdp: bool, keep: int = 2, channels: int = 16, device: str = "cpu") -> TrainState:
    settings = EdmSettings(steps=steps, batch=8, lr_hold=1.0)
    objective = DenoisingScoreMatching(settings, network(channels), None)
    options = TrainOptions(checkpoint_seconds=0, fsdp=fsdp, keep=keep)
    source = Source(POINTS, range(8), device=torch.device(device))
    return distill.train(objective, settings, source, folder, key=(0,), what="t", options=options)


def fresh(*, fsdp: bool, net: Denoiser | None = None) -> TrainState:
    """A state that has learnt nothing."""
    net = net or network()
    ema = EMA(net, 0.9)
    for each in [net, ema.net] if fsdp else []:
        sharding.shard(each, SINGLE_PROCESS)
    return TrainState({"student": net}, distill.optimizers({"student": net}, EdmSettings()), ema)


def load(folder: Path, *, fsdp: bool) -> tuple[TrainState, list[str]]:
    """A new state that takes up what is in the folder, and what was said."""
    said: list[str] = []
    state = fresh(fsdp=fsdp)
    CheckpointManager(state, folder, 2, SINGLE_PROCESS).load(lambda event: said.append(str(event)))
    return state, said


def content(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: sharded_tensors.whole(tensor).clone() for name, tensor in state.tensors()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("written", [True, False])
def test_either_kind_is_read_by_either_to_the_bit(tmp_path: Path, written: bool) -> None:
    """Adam's moments and steps come along, and a run goes on as if it had not stopped."""
    before = run(tmp_path / "t", 2, fsdp=written)
    newest = checkpoint_files.newest(tmp_path / "t")
    assert newest is not None and newest.name == ("state" if written else "state.safetensors")
    wanted = content(before)
    assert {"optimizer.student.0.step", "optimizer.student.0.exp_avg", "ema.net.norm.weight"} <= wanted.keys()
    for fsdp in (True, False):
        state, said = load(tmp_path / "t", fsdp=fsdp)
        assert same(content(state), wanted) and (state.step, state.cost, said) == (2, before.cost, [])
        kinds = {sharded_tensors.is_sharded(t) for name, t in state.tensors() if name.endswith("exp_avg")}
        assert kinds == {fsdp}
    whole = content(run(tmp_path / "whole", 4, fsdp=written))
    assert same(content(run(tmp_path / "t", 4, fsdp=written)), whole)


def test_as_many_stay_as_are_kept_of_either_kind(tmp_path: Path) -> None:
    for steps, keep, fsdp, names in [
        (4, 3, True, ["state", "state.1", "state.2"]),
        (5, 3, False, ["state.safetensors", "state.1", "state.2"]),
        (6, 1, True, ["state"]),
        (7, 1, False, ["state.safetensors"]),
        (8, 2, True, ["state", "state.1.safetensors"]),
    ]:
        run(tmp_path / "t", steps, fsdp=fsdp, keep=keep)
        assert [path.name for _, path in checkpoint_files.stored(tmp_path / "t")] == names
        assert [int(checkpoint_files.numbers(path)["step"]) for _, path in checkpoint_files.stored(tmp_path / "t")] == [
            steps - age for age in range(len(names))
        ]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_part_costs_only_its_checkpoint(tmp_path: Path) -> None:
    run(tmp_path / "t", 3, fsdp=True)
    (part,) = (tmp_path / "t/state").glob("*.safetensors")
    whole = part.read_bytes()
    record = tmp_path / "t/state/state.json"
    text = record.read_text()
    for path, damage in [
        (part, whole[:-20]),
        (part, whole[:-1] + bytes([whole[-1] ^ 1])),
        (part, None),
        (record, text.replace('"step": 3', '"step": 5').encode()),
        (record, text[:40].encode()),
        (record, None),
    ]:
        part.write_bytes(whole)
        record.write_text(text)
        path.unlink() if damage is None else path.write_bytes(damage)
        for fsdp in (True, False):
            state, said = load(tmp_path / "t", fsdp=fsdp)
            assert state.step == 2
            assert len(said) == 1 and said[0].endswith("going on from the checkpoint before it, of step 2"), said
            assert "t/state" in said[0] and "\n" not in said[0]
    for older in (tmp_path / "t/state.1").iterdir():
        older.write_bytes(b"")
    with pytest.raises(DamagedError, match=r"t/state"):
        load(tmp_path / "t", fsdp=True)


def test_saving_and_loading_parts_puts_no_tensor_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.tensor import DTensor

    before, after = run(tmp_path / "t", 2, fsdp=True), fresh(fsdp=True)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a whole tensor")

    with monkeypatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", never)
        patch.setattr(DTensor, "redistribute", never)
        with CheckpointManager(before, tmp_path / "t", 2, SINGLE_PROCESS) as checkpoints:
            checkpoints.save()
        CheckpointManager(after, tmp_path / "t", 2, SINGLE_PROCESS).load(lambda _: None)
        storage.StoredCheckpoint(tmp_path / "t/state").verify()
    assert same(content(before), content(after))
    for name, tensor in storage.PartsWriter(tmp_path, 2, SINGLE_PROCESS).copy(before.tensors()).wait().items():
        assert sharded_tensors.own_part(tensor).device.type == "cpu", name


def test_what_a_process_meets_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import torch as library

    run(tmp_path / "t", 2, fsdp=True)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "t", 4, fsdp=True)
    monkeypatch.undo()
    assert checkpoint_files.numbers(tmp_path / "t/state")["step"] == 2 and not list(tmp_path.rglob("*.tmp"))
    assert load(tmp_path / "t", fsdp=True)[0].step == 2


@pytest.mark.parametrize(
    "call", ["replace", pytest.param("make_room", marks=pytest.mark.slow), pytest.param("drop", marks=pytest.mark.slow)]
)
def test_a_process_that_dies_while_checkpoints_change_their_names_loses_none(tmp_path: Path, call: str) -> None:
    """Killed before the older ones are renamed, before the new one is, and before the oldest is removed."""
    program = f"""
import os, sys
from pathlib import Path
import torch
from torch import distributed
from tests.engine.checkpoints import test_storage
from msdcli import rundir
from msdcli.engine.checkpoints import files as checkpoint_files
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
torch.set_num_threads(1)
test_storage.run(Path("t"), 3, fsdp=True)
def die(*_, **__): os._exit(9)
if {call!r} == "replace":
    before = checkpoint_files.make_room
    def make_room(*a, **k):
        before(*a, **k)
        rundir._sync_folder = die  # the first thing that is done then
    checkpoint_files.make_room = make_room
else:
    checkpoint_files.{call} = die
test_storage.run(Path("t"), 4, fsdp=True)
"""
    killed = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True
    )
    assert killed.returncode == 9, killed.stderr.decode()
    kept = checkpoint_files.stored(tmp_path / "t")
    steps = [int(checkpoint_files.numbers(path)["step"]) for _, path in kept]
    assert steps == {"make_room": [3, 2], "replace": [3, 2], "drop": [4, 3, 2]}[call]
    state, said = load(tmp_path / "t", fsdp=True)
    assert (state.step, said) == (steps[0], [])
    assert not list((tmp_path / "t").glob(".*.tmp")), "what it left was swept away"
    run(tmp_path / "t", 5, fsdp=True)
    assert [path.name for _, path in checkpoint_files.stored(tmp_path / "t")] == ["state", "state.1"]


def test_a_checkpoint_of_another_network_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    run(tmp_path / "t", 1, fsdp=True, channels=32)
    state = fresh(fsdp=True)
    before = content(state)
    with pytest.raises(UserError, match=r"is of another network: student"):
        CheckpointManager(state, tmp_path / "t", 2, SINGLE_PROCESS).load(lambda _: None)
    assert same(content(state), before)


def test_the_next_stage_and_watchers_read_parts(tmp_path: Path) -> None:
    wanted = content(run(tmp_path / "t", 2, fsdp=True))
    student, average = network(), network()
    assert storage.inherit({"student": student, "head": torch.nn.Linear(1, 1)}, tmp_path / "t", SINGLE_PROCESS) == [
        "student"
    ]
    assert all(torch.equal(tensor, wanted[f"student.{name}"]) for name, tensor in student.state_dict().items())
    assert storage.read_average(tmp_path / "t", average) == 2
    assert all(torch.equal(tensor, wanted[f"ema.{name}"]) for name, tensor in average.state_dict().items())
    with pytest.raises(UserError, match="is missing"):
        storage.inherit({"student": student}, tmp_path / "nowhere", SINGLE_PROCESS)


def test_parts_take_what_the_estimate_says(tmp_path: Path) -> None:
    state = run(tmp_path / "t", 1, fsdp=True, channels=128)
    written = checkpoint_files.size(tmp_path / "t/state")
    objective = DenoisingScoreMatching(EdmSettings(), state.nets["student"], None)  # type: ignore[arg-type]
    assert disk.state_bytes(objective) == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize("written", [True, False])
def test_single_numbers_stay_whole_and_keep_their_places(tmp_path: Path, written: bool) -> None:
    """EDM2's gains are not sharded and make a group of their own in the optimizer; a checkpoint does not show it."""
    make = sharded.CASES["edm2"][0]
    state = fresh(fsdp=written, net=make().requires_grad_(True))
    net, optimizer = state.nets["student"], state.optimizers["student"]
    assert len(optimizer.param_groups) == 1 + written
    for i, param in enumerate(net.parameters()):
        param.grad = torch.full_like(param, 0.01 * i)
    count = sum((0.01 * i) ** 2 * param.numel() for i, param in enumerate(net.parameters()))
    assert sharded_tensors.norm_of([p.grad for p in net.parameters()]).item() == pytest.approx(count**0.5)
    optimizer.step()
    with CheckpointManager(state, tmp_path, 2, SINGLE_PROCESS) as checkpoints:
        checkpoints.save()
    for fsdp in (True, False):
        other = fresh(fsdp=fsdp, net=make().requires_grad_(True))
        CheckpointManager(other, tmp_path, 2, SINGLE_PROCESS).load(lambda _: None)
        assert same(content(other), content(state))
        for param in other.nets["student"].parameters():
            moments = other.optimizers["student"].state[param]
            assert moments["exp_avg"].shape == param.shape and moments["step"].item() == 1


@pytest.mark.parametrize("fsdp", [False, True])
def test_filters_of_edm2_are_normalised_after_every_update(fsdp: bool) -> None:
    """The optimizers' fused kernels change weights without counting it; on parts of weights as on whole ones."""
    net = sharded.CASES["edm2"][0]().train().requires_grad_(True)
    if fsdp:
        sharding.shard(net, SINGLE_PROCESS)
    optimizer = distill.optimizers({"student": net}, EdmSettings())["student"]
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    x, sigma, c = torch.randn(4, 1, 8, 8), torch.ones(4), torch.arange(4)

    @torch.no_grad()
    def furthest() -> float:
        """How far a filter's magnitude is from 1."""
        weights = [sharded_tensors.own_part(m.weight) for m in net.net.modules() if isinstance(m, MPConv)]
        return max((w.flatten(1).square().mean(1).sqrt() - 1).abs().max().item() for w in weights)

    for _ in range(3):
        net(x, sigma, c).square().mean().backward()
        assert furthest() < 3e-4
        optimizer.step()
        optimizer.zero_grad()
        assert furthest() > 1e-3


@pytest.mark.gpu
def test_parts_of_what_is_on_a_gpu_are_read_anywhere(tmp_path: Path) -> None:
    wanted = content(run(tmp_path / "t", 2, fsdp=True, device="cuda"))
    assert all(tensor.is_cuda for tensor in wanted.values())
    for fsdp in (True, False):
        state, said = load(tmp_path / "t", fsdp=fsdp)
        assert said == [] and state.step == 2
        assert same({k: t.cpu() for k, t in content(state).items()}, {k: t.cpu() for k, t in wanted.items()})
    whole = content(run(tmp_path / "whole", 4, fsdp=True, device="cuda"))
    assert same(content(run(tmp_path / "t", 4, fsdp=True, device="cuda")), whole)
