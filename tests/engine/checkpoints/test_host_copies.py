"""Checkpoints of a GPU's state: pinned memory that is kept, written when it has arrived, seldom enough to be cheap."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from msdcli.engine.checkpoints import host_copies, manager, storage
from msdcli.engine.checkpoints.host_copies import HostCopies, HostCopy
from msdcli.engine.checkpoints.manager import SHARE, CheckpointManager
from msdcli.engine.checkpoints.tensors import load_tensors
from msdcli.engine.distributed.group import SINGLE_PROCESS, ProcessGroup
from msdcli.recipe.stages import EdmSettings
from tests.engine.checkpoints import test_storage
from tests.engine.train.test_training import run


class LateCopies(HostCopies):
    """What a GPU would do: nothing has arrived until the event is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[tuple[Tensor, Tensor]] = []

    def copy(self, state: Any) -> HostCopy:
        assert not self.queue, "the copy before is still on its way"
        found = super().copy(state)
        if found.arrived is not None:
            found.arrived.queue = self.queue  # type: ignore[attr-defined]
        return found

    def _copied(self, name: str, part: Tensor) -> Tensor:
        place = (self._places or {}).get(name)
        if place is None:
            return super()._copied(name, part)
        self.queue.append((place, part.clone()))  # what the stream will find: the step after comes later there, too
        return place.fill_(torch.nan)


class Event:
    def __init__(self, blocking: bool) -> None:
        self.queue: list[tuple[Tensor, Tensor]] = []
        self.by: list[str] = []

    def record(self, stream: Any) -> None:
        assert stream == "the stream that trains"

    def synchronize(self) -> None:
        self.by.append(threading.current_thread().name)
        assert self.by == ["checkpoint"], "the thread that trains waits for nothing"
        for place, part in self.queue:
            place.copy_(part)
        self.queue.clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As if what is no single number lay on a GPU; the sizes of what is pinned."""
    pinned = list[int]()

    def plain(count: int) -> Tensor:
        pinned.append(count)
        return torch.empty(count, dtype=torch.uint8)

    monkeypatch.setattr(host_copies, "_on_gpu", lambda part: part.dim() > 0)
    monkeypatch.setattr(host_copies, "_pinned", plain)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "the stream that trains")
    return pinned


def test_a_checkpoint_is_written_when_it_has_arrived_and_has_the_bits_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: list[int]
) -> None:
    settings = EdmSettings(steps=3, batch=8, lr_hold=1.0)
    monkeypatch.setattr(storage, "HostCopies", LateCopies)
    run(tmp_path / "gpu", settings)
    assert len(gpu) == 1, "every later copy takes the same memory"
    run(tmp_path / "gpu", EdmSettings(steps=5, batch=8, lr_hold=1.0))
    monkeypatch.undo()
    run(tmp_path / "cpu", EdmSettings(steps=5, batch=8, lr_hold=1.0))
    for name in ("state.safetensors", "state.1.safetensors"):
        (mine, told), (theirs, wanted) = (load_tensors(tmp_path / where / name) for where in ("gpu", "cpu"))
        assert told["step"] == wanted["step"] and mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_places_are_packed_and_laid_out_as_the_tensors_are(monkeypatch: pytest.MonkeyPatch, gpu: list[int]) -> None:
    monkeypatch.setattr(host_copies, "CHUNK", 4096)
    state = {
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "gaps": torch.randn(4, 6)[:, ::2],
        "half": torch.randn(7).bfloat16(),
        "none": torch.empty(0),
        "flag": torch.tensor([True, False]),
        "large": torch.randn(3000),
        "count": torch.tensor(3),
        "more": torch.arange(5),
    }
    copies = HostCopies()
    first = {name: tensor.clone() for name, tensor in copies.copy(state.items()).tensors.items()}
    assert gpu == [4096, 12288, 512], "another where the rest of one is too small, of no more than is left"
    again = copies.copy(state.items()).tensors
    assert len(gpu) == 3
    for name, tensor in state.items():
        assert torch.equal(first[name], tensor) and torch.equal(again[name], tensor)
        assert (again[name].dtype == tensor.dtype and again[name].data_ptr() != tensor.data_ptr()) or not tensor.numel()
    assert again["last"].is_contiguous(memory_format=torch.channels_last)
    copies.copy((state | {"more": torch.arange(6)}).items())
    assert len(gpu) == 6, "other tensors"


def test_where_no_memory_can_be_pinned_the_host_waits(monkeypatch: pytest.MonkeyPatch, gpu: list[int]) -> None:
    def short(count: int) -> Tensor:
        gpu.append(count)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(host_copies, "_pinned", short)
    copies, x = HostCopies(), torch.randn(5)
    for _ in range(2):
        copied = copies.copy([("x", x)])
        assert copied.arrived is None and torch.equal(copied.wait()["x"], x)
    assert len(gpu) == 1, "it is tried once"


def test_copies_take_a_fiftieth_of_the_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [0.0], threading.Event()
    monkeypatch.setattr(manager, "time", SimpleNamespace(monotonic=lambda: now[0]))
    checkpoints = CheckpointManager(test_storage.fresh(fsdp=False), tmp_path, 2, SINGLE_PROCESS)

    class Slow:
        def copy(self, state: Any) -> HostCopy:
            now[0] += 2.0
            return HostCopy()

        def write(self, copied: Any, numbers: Any) -> None:
            written.wait()

    checkpoints.writer = Slow()
    assert not checkpoints.due(30)
    now[0] = 31.0
    assert checkpoints.due(30) and not checkpoints.due(40)
    checkpoints.save()
    now[0] += 10_000
    assert not checkpoints.due(30) and checkpoints.due(0), "it is still being written"
    written.set()
    checkpoints.close()
    now[0] = 33.0 + 2.0 / SHARE - 1
    assert SHARE == 1 / 50 and not checkpoints.due(30) and checkpoints.due(0)
    now[0] += 2
    assert checkpoints.due(30) and not checkpoints.due(101)
    checkpoints.group = ProcessGroup(1, 2)
    assert not checkpoints.due(0) and not checkpoints.due(30), "the leader says when"


@pytest.mark.gpu
def test_a_gpu_copies_what_was_there_before_the_next_step(tmp_path: Path) -> None:
    x, copies = torch.empty(2**24, device="cuda"), HostCopies()
    for value in range(3):
        x.fill_(value)
        copied = copies.copy([("x", x), ("step", torch.tensor(1.0))])
        x.fill_(-1)
        found = copied.wait()
        assert found["x"].is_pinned() and found["x"].unique().tolist() == [value]


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 4])
def test_a_gpus_checkpoint_is_the_state_to_the_bit(tmp_path: Path, steps: int) -> None:
    state = run(tmp_path / "t", EdmSettings(steps=steps, batch=8, lr_hold=1.0), device="cuda")
    mine, _ = load_tensors(tmp_path / "t/state.safetensors")
    theirs = dict(state.tensors())
    assert mine.keys() == theirs.keys()
    assert all(theirs[name].is_cuda or theirs[name].dim() == 0 for name in theirs)
    assert all(torch.equal(mine[name], theirs[name].detach().cpu()) for name in theirs)
