"""A plan says how long a run takes on this machine, by a measured speed, or why it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from msdcli.engine import estimate, pipeline, timing
from msdcli.engine.train import precision
from msdcli.engine.train.counting import with_memory
from msdcli.recipe import load
from tests.conftest import Msd


def test_seconds_are_steps_and_evaluations_times_their_number(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "stage_seconds", lambda stage, *_: 2.0 * stage.steps)
    monkeypatch.setattr(timing, "evaluation_rate", lambda *_: 1e6)
    recipe = load(tiny, ["workers=2", "partition.students=3", "pairs.count=64"])
    data = pipeline.check(recipe, planning=True)
    networks = pipeline.networks_on_meta(recipe, data, planning=True)
    cost = estimate.estimate(recipe, data, *networks)
    found = timing.timing(recipe, data, *networks, cost)
    assert found.seconds["teacher"] == 2 * recipe.teacher.training.steps
    sample = cost.pairs_flops / 64
    assert found.seconds["its samples"] == pytest.approx(200 * sample / 1e6), "136 more than the pairs are measured"
    each = sum(2 * stage.steps for stage in recipe.stages)
    assert found.seconds["students"] == pytest.approx(2 * each), "two at once, then the third"
    assert found.total == sum(found.seconds.values()) and found.seconds["measuring"] > 0


def test_a_step_of_a_stage_is_timed_as_it_runs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every turn once, the same ones as often as they come; whatever is learnt is a copy's, and nobody needs an
    optimizer, for which torch would import its compiler.
    """
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(precision, "timed", lambda call, _: (call(), 1.0)[1])
    recipe = load(tiny, ["stages.0.steps=7", "stages.0.fake_updates=4", "stages.0.batch=8"])
    data = pipeline.check(recipe, planning=True)
    meta = pipeline.networks_on_meta(recipe, data, planning=True)
    cost = estimate.estimate(recipe, data, *meta).sizes[0].stages[0]
    teacher, student = (with_memory(net) for net in (meta[0], meta[1][0]))
    before = {name: weight.clone() for name, weight in student.named_parameters()}
    seconds = timing.stage_seconds(recipe.stages[0], student, teacher, cost, torch.device("cpu"), recipe)
    assert seconds == 7 * (4 + 1 + 1), "four of the fake network, one of the student, the average"
    assert all(torch.equal(weight, before[name]) for name, weight in student.named_parameters())
    monkeypatch.setattr(timing, "PASS", cost.flops / 7 / 8)
    half = timing.stage_seconds(recipe.stages[0], student, teacher, cost, torch.device("cpu"), recipe)
    assert half == 4 * seconds, "what fits into a moment is a quarter of the batch: of all of it four times as much"


def test_a_plan_says_minutes_or_why_not(tiny: Path, msd: Msd, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = msd("distill", "tiny.yaml", "--dry-run").stdout
    assert "on this machine (cpu): " in plain and "an estimate, from one step of each kind" in plain
    here = json.loads(msd("distill", "tiny.yaml", "--dry-run", "--json").stdout)["here"]
    parts = dict(here["minutes"])
    assert parts.pop("all") == pytest.approx(sum(parts.values())) and set(parts) >= {"teacher", "students"}
    if not torch.cuda.is_available():
        elsewhere = msd("distill", "tiny.yaml", "--dry-run", "device=cuda").stdout
        assert "no minutes: device: cuda is not here" in elsewhere, "a plan for another machine is a plan"
        assert msd("distill", "tiny.yaml", "device=cuda").returncode == 2
    monkeypatch.setattr(timing, "PASS", 1.0)
    assert "no minutes: the networks are for a GPU" in msd("distill", "tiny.yaml", "--dry-run", "device=cpu").stdout


def test_rows_of_costs_stand_in_columns() -> None:
    stages = [estimate.StageCost(name, 1e12, 2**20, 2**20) for name in ("dm", "progressive")]
    lines = estimate.lines(estimate.Estimate(1e20, 1e11, [estimate.StudentCost(stages, range(12345))], 1e10))
    ends = {line.index(" FLOP") for line in lines if "FLOP  " in line or line.endswith("FLOP")}
    assert len(ends) == 1 and len({line.index(" MiB (") for line in lines if " MiB (" in line}) == 1
    assert "device-hours" in lines[1] and not lines[2].endswith("device-hours"), "no hours that are none"
