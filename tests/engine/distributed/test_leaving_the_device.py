"""The process that starts workers leaves the device to them: nothing of what it prepared there is alive."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import nn

from msdcli.diffusion.stitch import Stitch
from msdcli.engine import pipeline
from msdcli.engine.distributed import device, workers
from msdcli.engine.inputs.pairs import Pairs
from msdcli.engine.tracking.events import silent
from msdcli.errors import UserError
from msdcli.nets.diffusers.prompt_store import PromptStore
from msdcli.recipe import load
from tests.conftest import TINY

THERE = torch.device("cpu", 1)  # what is brought to it computes as on the CPU


class Visitors:
    """The networks that were brought to `THERE` and not taken away."""

    def __init__(self) -> None:
        self.most, self.there = 0, WeakSet[nn.Module]()
        self._plain = nn.Module.to

    def to(self, net: nn.Module, *where: Any, **how: Any) -> nn.Module:
        on = torch.device(where[0]) if where and isinstance(where[0], str | torch.device) else None
        for module in net.modules() if on is not None else []:
            (self.there.add if on == THERE else self.there.discard)(module)
        self.most = max(self.most, len(self.there))
        return self._plain(net, *where, **how)


@contextmanager
def stopped_at_workers(monkeypatch: pytest.MonkeyPatch, look: Any) -> Iterator[None]:
    """Call `look` where the workers would start; then nobody has trained the students."""
    monkeypatch.setattr(workers, "run", lambda *_, **__: look())
    with pytest.raises(UserError, match="not all students are finished"):
        yield


def test_no_network_is_on_the_device_when_workers_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a teacher was trained there."""
    visitors, left = Visitors(), list[int]()
    monkeypatch.setattr(nn.Module, "to", lambda net, *where, **how: visitors.to(net, *where, **how))
    monkeypatch.setattr(device, "prepare", lambda _, **__: THERE)
    monkeypatch.setattr(device, "resolve", lambda _: THERE)
    (tmp_path / "tiny.yaml").write_text(TINY)
    recipe = load(tmp_path / "tiny.yaml", [f"run={tmp_path}/run", "workers=2"])
    with stopped_at_workers(monkeypatch, lambda: left.append(len(visitors.there))):
        pipeline.distill(recipe, silent)
    assert visitors.most > 0 and left == [0]


def test_small_networks_and_prompts_leave_too() -> None:
    store = PromptStore(torch.zeros(2, 1, 4), torch.zeros(2, 2))
    store._resident[THERE] = store.empty
    pairs = object.__new__(Pairs)
    pairs._stitch = Stitch([], 1.0)
    teacher = nn.Linear(1, 1)
    teacher.prompts = store  # type: ignore[assignment]
    training = object.__new__(pipeline.TrainingRun)
    vars(training).update(teacher=teacher, pairs=pairs)
    training.leave_device()
    assert pairs._stitch is None and not store._resident


@pytest.mark.gpu
def test_a_gpu_holds_nothing_of_the_process_that_starts_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.yaml").write_text(
        TINY.replace("channels: 16", "channels: 512").replace("judge: off", "judge: tell")
    )
    recipe = load(tmp_path / "tiny.yaml", [f"run={tmp_path}/run", "workers=2", "device=cuda", "precision=bf16"])
    gc.collect()  # of other tests
    before, most, left = torch.cuda.memory_allocated(), list[int](), list[int]()
    torch.cuda.reset_peak_memory_stats()

    def look() -> None:
        most.append(torch.cuda.max_memory_allocated())
        left.append(torch.cuda.memory_allocated())

    with stopped_at_workers(monkeypatch, look):
        pipeline.distill(recipe, silent)
    assert most[0] > before + 2**20
    assert left[0] <= before + 2**16, "tables of a few numbers"
