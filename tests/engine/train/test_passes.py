"""Too little memory while training: the turn begins again with half the images, and what is learnt stays the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msdcli import nets
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.draws import Source
from msdcli.engine.checkpoints.train_state import TrainState
from msdcli.engine.distributed.group import ProcessGroup
from msdcli.engine.train.loop import TrainOptions, train
from msdcli.engine.train.passes import Passes
from msdcli.errors import WorkerError
from msdcli.objectives import objective_class
from msdcli.recipe.networks import UNetSettings
from msdcli.recipe.stages import AdmSettings, DmSettings, EdmSettings
from tests.engine.train.test_precision import CPU
from tests.objectives.test_adm import Pictures

STAGE = AdmSettings(
    steps=2, batch=8, fake_updates=2, fake_batch="shared", gan_weight=0.1, divergence="js", pairs="none", log_every=1
)


def run(
    folder: Path,
    *,
    micro_batch: int | None = None,
    dropout: float = 0.0,
    steps: int = 2,
    told: Callable[[Any], None] = lambda _: None,
    **options: Any,
) -> TrainState:
    torch.manual_seed(0)
    settings = UNetSettings(channels=4, embedding=8, dropout=dropout)
    teacher, student = (nets.build(settings, shape=(1, 8, 8), num_classes=10, sigma_data=0.5) for _ in range(2))
    objective = objective_class("adm")(STAGE, student, teacher.requires_grad_(False).eval())
    for net in objective.nets.values():
        net.train()
    how = TrainOptions(checkpoint_seconds=1000, micro_batch=micro_batch, **options)
    stage = STAGE.model_copy(update={"steps": steps, "lr_hold": 1.0})
    return train(objective, stage, Source(Pictures(), [3, 4]), folder, key=(0,), what="t", options=how, report=told)


def limit(monkeypatch: pytest.MonkeyPatch, room: int, *, after: int = 0, error: Exception | None = None) -> None:
    """From call number `after` on, too little memory for more images than `room`, in the forward pass."""
    forward, calls = Denoiser.forward, [0]

    def small(net: Denoiser, x: Tensor, *rest: Any) -> Tensor:
        calls[0] += 1
        if calls[0] > after and len(x) > room:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 42.00 GiB.")
        return forward(net, x, *rest)

    monkeypatch.setattr(Denoiser, "forward", small)


def tensors(state: TrainState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.tensors()}


@pytest.fixture(scope="module")
def plenty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What a run in passes of four images ends with."""
    return tensors(run(tmp_path_factory.mktemp("plenty"), micro_batch=4))


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "seconds")} for line in found]


def test_from_the_first_turn_on_it_is_a_run_of_smaller_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with dropout: weights, moments, statistics, log and cost; said once."""
    wanted, said = run(tmp_path / "wanted", micro_batch=2, dropout=0.2), list[Any]()
    limit(monkeypatch, 3)
    got = run(tmp_path / "got", dropout=0.2, told=said.append)
    assert all(torch.equal(a, b) for a, b in zip(tensors(wanted).values(), tensors(got).values(), strict=True))
    assert lines(tmp_path / "wanted") == lines(tmp_path / "got")
    assert {k: v for k, v in wanted.cost.items() if k != "seconds"} == {
        k: v for k, v in got.cost.items() if k != "seconds"
    }
    notes = [text for text in said if isinstance(text, str)]
    assert len(notes) == 1 and "too little memory for 8 images at once" in notes[0] and "micro_batch=4" in notes[0]


@pytest.mark.parametrize("after", [13, 17])
def test_in_the_middle_of_a_step_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plenty: dict[str, Tensor], after: int
) -> None:
    """In the fake network's turn, or in the second pass of the student's: the numbers of a run with memory enough."""
    limit(monkeypatch, 3, after=after, error=RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    got = run(tmp_path, micro_batch=4)
    assert got.cut_to == 2
    for name, tensor in tensors(got).items():
        torch.testing.assert_close(tensor, plenty[name], rtol=1e-3, atol=2e-5, msg=name)


def test_a_failed_backward_pass_leaves_no_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plenty: dict[str, Tensor]
) -> None:
    backward, calls = Tensor.backward, [0]

    def small(tensor: Tensor, *rest: Any) -> None:
        calls[0] += 1
        backward(tensor, *rest)
        if calls[0] == 2:  # the last pass of the first turn: all gradients are there
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Tensor, "backward", small)
    got = run(tmp_path, micro_batch=4)
    for name, tensor in got.tensors():
        torch.testing.assert_close(tensor, plenty[name], rtol=1e-3, atol=2e-5, msg=name)


def test_a_resumed_run_goes_on_with_passes_as_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        limit(patch, 3, after=3)
        whole = tensors(run(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        limit(patch, 3, after=3)
        run(tmp_path / "parts", steps=1)
    resumed = run(tmp_path / "parts")
    assert resumed.cut_to == 2
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.tensors())


def test_one_image_that_does_not_fit_and_sharded_networks_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path / "t")
    passes, calls = Passes(EdmSettings(batch=8), retries=False), list[int]()
    with pytest.raises(torch.OutOfMemoryError):
        passes.attempt(fails_on(calls, 8), CPU)
    assert calls == [8]


def fails_on(calls: list[int], *sizes: int) -> Callable[[Sequence[tuple[int, int]]], int]:
    def call(parts: Sequence[tuple[int, int]]) -> int:
        calls.append(8 // len(parts))
        if calls[-1] in sizes:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return calls[-1]

    return call


def test_passes_that_cannot_be_halved_are_not() -> None:
    passes, calls = Passes(DmSettings(batch=9, pair_batch=3)), list[int]()
    assert (passes.images, passes.parts) == (9, [(0, 1)])
    with pytest.raises(torch.OutOfMemoryError):
        passes.attempt(fails_on(calls, 8, 2), CPU)  # 9 images in 3 passes, no further: there are 3 pairs
    assert calls == [8, 8 // 3] and passes.images == 3


class Two(ProcessGroup):
    """The first of two processes; what the other one says in each call of `gather` is known."""

    def __init__(self, others: Sequence[Any]) -> None:
        super().__init__(0, 2)
        self.others = iter(others)

    def gather(self, value: Any) -> list[Any]:
        return [value, next(self.others)]

    def averaging_gradients(self, params: Any, figures: Any) -> Any:
        return nullcontext()


def test_processes_begin_again_together() -> None:
    group, calls, said = Two([(False, None), (True, None), (True, None)]), list[int](), list[Any]()
    passes = Passes(EdmSettings(batch=16), group=group, report=said.append)
    assert passes.attempt(fails_on(calls, 4), CPU) == 2, "the other one did not fit first, then this one"
    assert calls == [8, 4, 2] and passes.images == 2 and len(said) == 1
    passes.agreeing = False  # later nobody asks
    assert passes.attempt(fails_on(calls), CPU) == 2
    with pytest.raises(torch.OutOfMemoryError):
        passes.attempt(fails_on(calls, 2), CPU)


def test_a_process_whose_neighbour_ends_says_so() -> None:
    passes = Passes(EdmSettings(batch=16), group=Two([(False, "ValueError: broken")]))
    with pytest.raises(WorkerError, match="ValueError: broken"):
        passes.attempt(fails_on([]), CPU)
