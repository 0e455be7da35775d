"""bfloat16 in the networks: close to float32, float32 where it counts, and decided once per run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from msdcli import nets
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.guidance import Guided
from msdcli.engine.train import compiling, precision
from msdcli.engine.train.trial import RandomDraws
from msdcli.objectives import Objective, objective_class
from msdcli.recipe.networks import EdmNetworkSettings, MLPSettings
from msdcli.recipe.networks import UNetSettings as Net
from msdcli.recipe.stages import (
    AdmSettings,
    CdSettings,
    DmSettings,
    EctSettings,
    ScdSettings,
    SidSettings,
    StageSettings,
    TsmSettings,
)
from tests.conftest import Msd

CPU = torch.device("cpu")
ADM = {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0, "model_channels": 32}
NETWORKS = {
    "unet": Net(channels=8, attention=[4]),
    "song": EdmNetworkSettings(arguments=ADM | {"model_type": "SongUNet"}),
    "adm": EdmNetworkSettings(arguments=ADM | {"model_type": "DhariwalUNet"}),
    "edm2": EdmNetworkSettings(preconditioning="EDM2", arguments={k: v for k, v in ADM.items() if k != "dropout"}),
    "mlp": MLPSettings(channels=32, blocks=2),
}
STAGES = {
    "dm": DmSettings(batch=8, fake_updates=1),
    "adm fake": AdmSettings(batch=8, fake_updates=1, features="fake", head_weight=1.0),
    "adm teacher": AdmSettings(batch=8, fake_updates=1, features="teacher", head_weight=1.0),
    "sid": SidSettings(batch=8, gan_weight=0.1, divergence="kl"),
    "tsm": TsmSettings(batch=8),
    "cd": CdSettings(batch=8),
    "ect": EctSettings(batch=8),
    "scd": ScdSettings(batch=8, tangent_warmup=0),
}


def build(name: str) -> Denoiser:
    """A network whose every weight matters: none is zero."""
    torch.manual_seed(0)
    shape = (2,) if name == "mlp" else (3, 8, 8)
    net = nets.build(NETWORKS[name], shape=shape, num_classes=3, sigma_data=0.5)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_(0, 0.05)
    return net.requires_grad_(False).eval()


def objective_of(stage: StageSettings, teacher: Denoiser) -> Objective:
    torch.manual_seed(1)
    student = copy.deepcopy(teacher).requires_grad_(True)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * parameter.abs().mean() * torch.randn_like(parameter))
    objective = objective_class(stage.objective)(stage, student, teacher)
    for net in objective.nets.values():
        net.train()
    return objective


def losses_and_gradients(
    objective: Objective, *, batch: int = 8, on: torch.device = CPU
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every turn's losses, and the gradients of what learns in it."""
    found = {}
    for names, loss in objective.turns(0):
        compiling.learn(objective, names)
        torch.manual_seed(2)
        per_image = loss(RandomDraws(objective.student, batch, on))  # type: ignore[attr-defined]
        per_image.mean().backward()
        for name in names:
            gradients = [p.grad.flatten() for p in objective.nets[name].parameters() if p.grad is not None]
            found[name] = per_image.detach(), torch.cat(gradients)
        for net in objective.nets.values():
            net.zero_grad(set_to_none=True)
    return found


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.double(), b.double(), dim=0).item()


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_is_close_to_float32_in_every_objective(stage: str) -> None:
    teacher = build("unet")
    objective = objective_of(STAGES[stage], teacher)
    plain = losses_and_gradients(objective)
    precision.lower(objective, "bf16")
    low = losses_and_gradients(objective)
    assert plain.keys() == low.keys() == objective.nets.keys()
    for name, (loss, gradient) in low.items():
        assert loss.dtype == gradient.dtype == torch.float32
        assert loss.mean().item() == pytest.approx(plain[name][0].mean().item(), rel=2e-2)
        assert cosine(gradient, plain[name][1]) > 0.98
        assert not torch.equal(gradient, plain[name][1]), "nothing ran in bfloat16"


@pytest.mark.parametrize("name", NETWORKS)
def test_every_own_network_computes_in_bfloat16_with_float32_weights(name: str) -> None:
    teacher = build(name)
    objective = objective_of(STAGES["dm"], teacher)
    plain = losses_and_gradients(objective)
    precision.lower(objective, "bf16")
    for key, (loss, gradient) in losses_and_gradients(objective).items():
        assert loss.mean().item() == pytest.approx(plain[key][0].mean().item(), rel=2e-2)
        assert cosine(gradient, plain[key][1]) > 0.98
    outputs = set()
    for module in objective.student.net.modules():  # type: ignore[attr-defined]
        module.register_forward_hook(lambda module, inputs, output: outputs.add(getattr(output, "dtype", None)))
    losses_and_gradients(objective)
    assert torch.bfloat16 in outputs
    assert {p.dtype for net in objective.nets.values() for p in net.parameters()} == {torch.float32}


def test_what_is_frozen_is_held_in_bfloat16_once_and_the_teacher_stays() -> None:
    teacher = build("song")
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    first, second = (objective_of(STAGES["adm teacher"], teacher) for _ in range(2))
    for objective in (first, second):
        precision.lower(objective, "bf16")
    assert first.teacher is second.teacher is first.feature_network is not teacher  # type: ignore[attr-defined]
    held = first.teacher.net  # type: ignore[attr-defined]
    assert held.enc["8x8_conv"].weight.dtype == torch.bfloat16
    assert held.map_layer0.weight.dtype == torch.float32
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in teacher.state_dict().items())
    assert losses_and_gradients(first).keys() == {"fake", "head", "student"}


def test_guidance_stays_guidance_in_bfloat16() -> None:
    guided = Guided(build("unet"), scale=2.0, interval=(0.0, 100.0))
    held = precision.held(guided, torch.bfloat16)
    x, sigma, c = torch.randn(4, 3, 8, 8), torch.full((4,), 1.5), torch.tensor([0, 1, 2, 0])
    wanted, plain = guided(x, sigma, c), guided.plain(x, sigma, c)
    assert (held(x, sigma, c) - wanted).norm() < 0.1 * (wanted - plain).norm()


def test_float32_changes_nothing() -> None:
    objective = objective_of(STAGES["adm teacher"], build("song"))
    before = losses_and_gradients(objective)
    networks = dict(vars(objective))
    precision.lower(objective, "float32")
    assert vars(objective) == networks
    after = losses_and_gradients(objective)
    assert all(torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True))


# What `auto` decides.


def test_tiny_networks_are_float32_without_being_measured(finished: Path) -> None:
    choice = json.loads((finished / "run.json").read_text())["precision"]
    assert choice["chosen"] == "float32" and choice["flops_per_image"] < precision.TINY_FLOPS and "ratio" not in choice


@pytest.mark.parametrize(("bf16_seconds", "chosen"), [(0.5, "bf16"), (0.95, "float32"), (3.0, "float32")])
def test_larger_networks_are_what_was_faster_when_the_run_began(
    bf16_seconds: float, chosen: str, msd: Msd, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "TINY_FLOPS", 0.0)
    monkeypatch.setattr(precision, "measure", lambda *_: {"float32": 1.0, "bf16": bf16_seconds})
    assert msd("distill", "tiny.yaml", "--student", "0").returncode == 0
    record = tmp_path / "runs/tiny/run.json"
    assert json.loads(record.read_text())["precision"]["chosen"] == chosen

    def again(*_: Any) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(precision, "measure", again)
    assert msd("distill", "runs/tiny", "--student", "1").returncode == 0
    assert json.loads(record.read_text())["precision"]["chosen"] == chosen


def test_the_measurement_times_both_types_of_the_network_it_was_given() -> None:
    net, seen = build("unet").train(), []
    net.register_forward_pre_hook(lambda module, inputs: seen.append(module.net.compute))
    seconds = precision.measure(net.requires_grad_(True), 2, CPU, repeats=2)
    assert seen == [None, torch.bfloat16] * 3 and all(s > 0 for s in seconds.values())
    assert all(p.grad is None for p in net.parameters())


def test_a_bf16_run_resumes_to_the_same_bits_and_saves_float32(
    finished: Path, msd: Msd, tiny: Path, tmp_path: Path
) -> None:
    words = ("distill", "tiny.yaml", "precision=bf16", "stages.0.lr_hold=1.0", "--student", "0")
    assert msd(*words).returncode == 0
    assert msd(*words, "run=runs/parts", "stages.0.steps=3").returncode == 0
    assert msd(*words, "run=runs/parts").returncode == 0
    whole, parts, plain = (
        load_file(run / "students/0/0-dm/model.safetensors")
        for run in (tmp_path / "runs/tiny", tmp_path / "runs/parts", finished)
    )
    assert all(torch.equal(whole[k], parts[k]) and whole[k].dtype == plain[k].dtype for k in plain)
    assert any(not torch.equal(whole[k], plain[k]) for k in plain)
    refused = msd("distill", "tiny.yaml", "precision=float32")
    assert refused.returncode == 2 and "precision" in refused.stderr


# The teacher, and too little memory for the measurement.


@pytest.mark.parametrize(("words", "chosen"), [((), "bf16"), (("precision=float32",), "float32")])
def test_the_teacher_trains_in_the_precision_of_the_students(
    words: tuple[str, ...], chosen: str, msd: Msd, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "TINY_FLOPS", 0.0)
    monkeypatch.setattr(precision, "measure", lambda *_: {"float32": 1.0, "bf16": 0.5})
    seen, lower = list[str](), precision.lower
    monkeypatch.setattr(precision, "lower", lambda o, kind, **keys: (seen.append(kind), lower(o, kind, **keys))[1])
    tried, prepare = list[str](), compiling.prepare
    monkeypatch.setattr(
        compiling, "prepare", lambda o, *rest, **keys: (tried.append(type(o).__name__), prepare(o, *rest, **keys))[1]
    )
    assert msd("distill", "tiny.yaml", "--student", "0", *words).returncode == 0
    assert seen == [chosen, chosen] and tried == ["DenoisingScoreMatching", "DistributionMatching"]
    record = json.loads((tmp_path / "runs/tiny/teacher/model.json").read_text())
    assert record["computed_in"] == chosen
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "runs/tiny/teacher/model.safetensors").values())


def test_teachers_of_both_precisions_are_kept_apart_and_auto_takes_what_is_there(
    msd: Msd, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "TINY_FLOPS", 0.0)
    fast = {"float32": 1.0, "bf16": 0.5}
    monkeypatch.setattr(precision, "measure", lambda *_: fast)

    def teacher(run: str, *words: str) -> bytes:
        assert msd("distill", "tiny.yaml", "--student", "0", f"run=runs/{run}", *words).returncode == 0
        return (tmp_path / "runs" / run / "teacher/model.safetensors").read_bytes()

    plain, low = teacher("a", "precision=float32"), teacher("b", "precision=bf16")
    assert plain != low
    assert len([*(tmp_path / "runs/.shared").glob("teacher-*")]) == 2
    measured, compare = list[Any](), precision.compare
    monkeypatch.setattr(precision, "compare", lambda *given: (measured.append(given), compare(*given))[1])
    assert teacher("c", "pairs.seed=3") == plain
    assert len(measured) == 1, "for the students alone: a teacher is there"


def test_half_as_many_images_are_measured_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "TINY_FLOPS", 0.0)
    asked, told = list[int](), list[object]()

    def measure(net: Denoiser, batch: int, device: torch.device) -> dict[str, float]:
        asked.append(batch)
        if batch > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34.00 GiB.")
        return {"float32": 1.0, "bf16": 2.0}

    monkeypatch.setattr(precision, "measure", measure)
    net = build("unet")
    found = precision.compare(net.settings, net, 48, None, CPU, told.append)
    assert (asked, found["batch"], found["chosen"], len(told)) == ([48, 24, 12, 6], 6, "float32", 1)
    assert precision.compare(net.settings, net, 48, 4, CPU)["batch"] == 4, "never more than micro_batch"
