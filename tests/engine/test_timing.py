"""A plan says how long a run takes on this machine, by a measured speed, or why it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from msdcli import nets
from msdcli.engine import estimate, pipeline, timing
from msdcli.engine.train.counting import with_memory
from msdcli.recipe import load
from msdcli.recipe.networks import MLPSettings
from tests.conftest import Msd


def test_seconds_are_operations_at_the_measured_speed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "measured_rate", lambda *_: 1e6)
    recipe = load(tiny, ["workers=2", "partition.students=3", "pairs.count=64"])
    data = pipeline.check(recipe, planning=True)
    networks = pipeline.networks_on_meta(recipe, data, planning=True)
    cost = estimate.estimate(recipe, data, *networks)
    found = timing.timing(recipe, data, *networks, cost)
    assert found.seconds["teacher"] == pytest.approx(cost.teacher_flops / 1e6)
    sample = cost.pairs_flops / 64
    assert found.seconds["its samples"] == pytest.approx(200 * sample / 1e6), "136 more than the pairs are measured"
    assert found.seconds["students"] == pytest.approx(2 * cost.student_flops / 1e6), "two at once, then the third"
    assert found.total == sum(found.seconds.values()) and found.seconds["measuring"] > 0


def test_the_speed_is_that_of_passes_forth_and_back() -> None:
    with torch.device("meta"):
        net = nets.build(MLPSettings(channels=16, blocks=1), shape=(2,), num_classes=3, sigma_data=0.5)
    made = with_memory(net)
    before = {name: weight.clone() for name, weight in made.named_parameters()}
    assert timing.measured_rate(made, torch.device("cpu"), 8, 0.0) > 0
    assert all(torch.equal(weight, before[name]) for name, weight in made.named_parameters())


def test_a_plan_says_minutes_or_why_not(tiny: Path, msd: Msd, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = msd("distill", "tiny.yaml", "--dry-run").stdout
    assert "on this machine (cpu): " in plain and "an estimate" in plain
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
    lines = estimate.lines(estimate.Estimate(1e20, 1e11, stages, 1e10, students=12345))
    ends = {line.index(" FLOP") for line in lines if "FLOP  " in line or line.endswith("FLOP")}
    assert len(ends) == 1 and len({line.index(" GiB (") for line in lines if " GiB (" in line}) == 1
    assert "device-hours" in lines[1] and not lines[2].endswith("device-hours"), "no hours that are none"
