"""Training on a card: what is waited for, what memory it takes, what too little of it does, and CUDA graphs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msdcli import nets
from msdcli.diffusion.draws import Source
from msdcli.diffusion.ema import EMA
from msdcli.diffusion.float32 import fast_float32
from msdcli.engine.bench.recipe import counted_bytes
from msdcli.engine.checkpoints.train_state import TrainState
from msdcli.engine.distributed.group import SINGLE_PROCESS
from msdcli.engine.tracking.events import silent
from msdcli.engine.train import compiling
from msdcli.engine.train.log import TrainLog
from msdcli.engine.train.loop import TrainOptions, optimizers, train, update
from msdcli.engine.train.trial import Mode, RandomDraws, StageTrainer
from msdcli.objectives import objective_class
from msdcli.recipe.networks import UNetSettings
from msdcli.recipe.stages import AdmSettings, DmSettings, StageSettings
from tests.engine.train.test_precision import STAGES, build, objective_of
from tests.objectives.test_adm import Pictures

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda")
STAGE = AdmSettings(
    steps=12, batch=8, fake_updates=2, fake_batch="shared", gan_weight=0.1, divergence="js", pairs="none", log_every=100
)


def run(
    folder: Path,
    stage: StageSettings = STAGE,
    *,
    channels: int = 8,
    compiled: bool = False,
    after_step: Callable[[int], None] = lambda _: None,
    monkeypatch: pytest.MonkeyPatch | None = None,
    told: Callable[[Any], None] = silent,
    **options: Any,
) -> TrainState:
    """Train a small network on pictures that are on the card; `after_step` is called with the number of each step."""
    torch.manual_seed(0)
    settings = UNetSettings(channels=channels, embedding=16)
    teacher, student = (nets.build(settings, shape=(1, 8, 8), num_classes=10, sigma_data=0.5) for _ in range(2))
    teacher, student = teacher.to(CARD).requires_grad_(False).eval(), student.to(CARD)
    objective = objective_class(stage.objective)(stage, student, teacher)
    for net in objective.nets.values():
        net.to(CARD).train()
    if objective.statistics is not None:
        objective.statistics.to(CARD)
    source = Source(Pictures(), [3, 4], device=CARD)
    how = TrainOptions(checkpoint_seconds=1000, **options)
    if compiled:
        compiling.compile_networks(objective, images=how.passes(stage, silent).images)
    if monkeypatch is not None:
        follow = EMA.update

        def followed(ema: EMA, net: Any, step: int) -> None:
            follow(ema, net, step)
            after_step(step)

        monkeypatch.setattr(EMA, "update", followed)
    return train(objective, stage, source, folder, key=(0,), what="t", options=how, report=told)


def tensors(state: TrainState) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in state.tensors()}


@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if stage.optimizer != "radam"])
def test_a_step_of_the_loop_does_not_wait_for_the_card(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draws, the losses, the updates and the average of steps 4 to 9: torch fails where the host would wait, as it
    does for RAdam (SkippingRAdam says why).
    """

    def watch(step: int) -> None:
        if step in (3, 9):
            torch.cuda.set_sync_debug_mode("error" if step == 3 else "default")

    stage = STAGES[name]
    none = {"pairs": "none"} if hasattr(stage, "pairs") else {}
    stage = stage.model_copy(update={"steps": 12, "log_every": 100} | none)
    try:
        state = run(tmp_path, stage, after_step=watch, monkeypatch=monkeypatch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.step == 12


def test_an_update_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    objective = objective_of(STAGES["dm"], build("unet").to(CARD))
    stage = STAGES["dm"]
    for net in objective.nets.values():
        net.to(CARD)
    state = TrainState(objective.nets, optimizers(objective.nets, stage), EMA(objective.nets["student"], 0.9), None)
    log = TrainLog(tmp_path / "m.jsonl", state, stage, "t", silent, group=SINGLE_PROCESS, max_skipped=9)

    def step(bad: float) -> dict[str, Tensor]:
        for param in objective.nets["student"].parameters():
            param.grad = torch.ones_like(param)
        next(objective.nets["student"].parameters()).grad.view(-1)[0] = bad  # type: ignore[union-attr]
        update(state, ("student",), torch.zeros((), device=CARD), None, log)
        return {name: tensor.clone() for name, tensor in state.tensors()}

    first, skipped, second = step(1.0), step(torch.nan), step(1.0)
    for name, tensor in first.items():
        assert torch.equal(skipped[name], tensor), name
    assert any(not torch.equal(second[name], tensor) for name, tensor in first.items())


def test_memory_stays_what_it_was_for_two_hundred_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[int, tuple[int, int]] = {}

    def note(step: int) -> None:
        taken[step] = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    stage = STAGE.model_copy(update={"steps": 200, "log_every": 20})
    run(tmp_path, stage, after_step=note, monkeypatch=monkeypatch)
    settled = [taken[step] for step in range(40, 200, 2)]  # each the last of two turns
    assert max(a for a, _ in settled) - min(a for a, _ in settled) < 2**20, [a for a, _ in settled]
    assert len({r for _, r in settled}) == 1


def test_counted_memory_is_what_the_card_gives(tmp_path: Path) -> None:
    """What `--dry-run` says of a stage's peak, against the allocator's: within a fifth, and hardly ever too little."""
    gc.collect()  # of other tests
    before = torch.cuda.memory_allocated()
    settings = UNetSettings(channels=64, multipliers=[1, 2], embedding=128)
    teacher = nets.build(settings, shape=(3, 32, 32), num_classes=10, sigma_data=0.5).to(CARD)
    stage = DmSettings(steps=1, batch=64, fake_updates=1, pairs="none")
    trainer = StageTrainer(stage, teacher.requires_grad_(False).eval(), copy.deepcopy(teacher), CARD)
    trainer.enter(Mode("float32"))
    draws = RandomDraws(teacher, 64, CARD)
    with fast_float32():
        trainer.update(draws)
        torch.cuda.reset_peak_memory_stats()
        trainer.update(draws)
        measured, counted = torch.cuda.max_memory_allocated() - before, counted_bytes(trainer, draws)
    assert 0.85 < counted / measured < 1.2, f"counted {counted / 2**30:.3f} GiB, measured {measured / 2**30:.3f} GiB"


def test_too_little_memory_halves_the_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of the card that half the batch fits in: the run goes on, says so once, and learns the same."""
    stage, peaks = STAGE.model_copy(update={"steps": 2, "batch": 512}), dict[int, tuple[int, int]]()
    for images in (512, 256):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        plenty = run(tmp_path / str(images), stage, channels=32, micro_batch=images)
        peaks[images] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    wanted, said = tensors(plenty), list[object]()
    del plenty
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(CARD).total_memory
    enough, needed = peaks[256][1], peaks[512][0]  # what the cache took of the card, and what tensors had of it
    assert enough < needed, peaks
    torch.cuda.set_per_process_memory_fraction((enough + needed) / 2 / whole)
    try:
        state = run(tmp_path / "little", stage, channels=32, told=said.append)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    notes = [text for text in said if isinstance(text, str) and "too little memory" in text]
    assert state.cut_to == 256 and len(notes) == 1, (peaks, said)
    for name, tensor in tensors(state).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("micro_batch", [8, 4])
def test_cuda_graphs_learn_what_eager_networks_do(tmp_path: Path, micro_batch: int) -> None:
    plain = tensors(run(tmp_path / "plain", micro_batch=micro_batch))
    fast = tensors(run(tmp_path / "fast", micro_batch=micro_batch, compiled=True))
    for name, tensor in fast.items():
        torch.testing.assert_close(tensor, plain[name], rtol=2e-2, atol=2e-3, msg=name)
