"""The loop: every draw derives from the step, so any interruption and any neighbour leave the bits alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from msdcli import nets
from msdcli.data import open_data
from msdcli.diffusion.draws import Source
from msdcli.engine.checkpoints.manager import CheckpointManager
from msdcli.engine.checkpoints.tensors import load_tensors
from msdcli.engine.checkpoints.train_state import TrainState
from msdcli.engine.distributed.group import ProcessGroup
from msdcli.engine.train.loop import TrainOptions, set_learning_rates, train
from msdcli.engine.train.selection import LAST_AVERAGE, AverageSelection
from msdcli.errors import UserError
from msdcli.objectives.edm import DenoisingScoreMatching
from msdcli.recipe.data import DigitsSettings
from msdcli.recipe.networks import UNetSettings
from msdcli.recipe.stages import EdmSettings

DIGITS = open_data(DigitsSettings())
EVERY_STEP = TrainOptions(checkpoint_seconds=0)


def run(
    folder: Path,
    settings: EdmSettings,
    *,
    dropout: float = 0.2,
    options: TrainOptions = EVERY_STEP,
    selection: AverageSelection = LAST_AVERAGE,
    device: str = "cpu",
) -> TrainState:
    torch.manual_seed(0)
    network = UNetSettings(channels=4, embedding=8, dropout=dropout)
    net = nets.build(network, shape=(1, 8, 8), num_classes=10, sigma_data=0.5).train().to(device)
    objective = DenoisingScoreMatching(settings, net, None)
    source = Source(DIGITS, range(10), device=device)
    return train(objective, settings, source, folder, key=(0, "t"), what="t", options=options, selection=selection)


def same(a: TrainState, b: TrainState) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.ema.net.state_dict().values(), b.ema.net.state_dict().values(), strict=True)
    )


def test_resumed_training_is_bit_equal_also_with_dropout(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", EdmSettings(steps=6, batch=8, log_every=2, lr_hold=1.0))
    run(tmp_path / "parts", EdmSettings(steps=3, batch=8, log_every=2, lr_hold=1.0))
    torch.rand(17)  # whatever the process did in between
    parts = run(tmp_path / "parts", EdmSettings(steps=6, batch=8, log_every=2, lr_hold=1.0))
    assert same(whole, parts)
    assert parts.cost["flops"] == whole.cost["flops"] > 0
    assert parts.cost["images"] == 48


def test_flops_are_counted_as_the_networks_are(tmp_path: Path) -> None:
    """A step of denoising score matching is one forward and one backward pass: three times the forward's operations."""
    from torch.utils.flop_counter import FlopCounterMode

    state = run(tmp_path, EdmSettings(steps=2, batch=8), dropout=0.0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        state.ema.net(torch.zeros(8, 1, 8, 8), torch.ones(8), torch.zeros(8, dtype=torch.int64))
    assert state.cost["flops"] / 2 == pytest.approx(3 * counter.get_total_flops(), rel=0.03)


def test_learning_rate_holds_then_falls_to_its_end(tmp_path: Path) -> None:
    settings = EdmSettings(steps=100, lr=1.0, lr_hold=0.5, lr_end=0.1, warmup=10)
    state = TrainState({}, {"student": torch.optim.SGD([torch.zeros(1)], 1.0)}, None)  # type: ignore[arg-type]
    seen = []
    for state.step in range(100):
        set_learning_rates(state, settings)
        seen.append(state.optimizers["student"].param_groups[0]["lr"])
    assert seen[0] == pytest.approx(0.1)
    assert seen[9:51] == pytest.approx([1.0] * 42)
    assert seen[75] == pytest.approx(0.1 + 0.9 * 0.5)
    assert seen[99] == pytest.approx(0.1 + 0.9 * 0.02)


@pytest.mark.parametrize("log_every", [1, 100])
def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path, log_every: int) -> None:
    """The first update (of size 1e30) is finite, everything after it is not: ten are skipped, then it is enough."""
    with pytest.raises(UserError, match=r"updates of student in a row were not finite, first its loss at step 2 at no"):
        run(tmp_path, EdmSettings(steps=40, batch=8, lr=1e30, log_every=log_every))
    tensors, numbers = load_tensors(tmp_path / "state.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    assert numbers["step"] == "1", "no state is saved while updates are being skipped"


def test_lines_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    run(tmp_path, EdmSettings(steps=4, batch=8, log_every=2))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "losses": {}}\n{"step": 8, "lo')
    run(tmp_path, EdmSettings(steps=6, batch=8, log_every=2))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2, 4, 6]


def test_processes_that_agree_a_step_later_save_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that was asked for in a step is written in the next, and no second one after it."""
    saved, before = list[int](), [0]

    def vote(group: ProcessGroup, wish: int, *, last: bool = False) -> int:
        found, before[0] = before[0], wish
        return max(found, wish) if last else found

    monkeypatch.setattr(ProcessGroup, "vote", vote)
    monkeypatch.setattr(CheckpointManager, "due", lambda self, seconds: seconds > 0 and not saved)
    monkeypatch.setattr(CheckpointManager, "save", lambda self: saved.append(self.state.step))
    run(tmp_path, EdmSettings(steps=6, batch=8), options=TrainOptions(checkpoint_seconds=30.0))
    assert saved == [2, 6], "the last is the end's"
