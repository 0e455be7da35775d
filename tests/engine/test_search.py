"""Students by target: what is chosen meets it, and is written down."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from msdcli import nets
from msdcli.engine import search
from msdcli.errors import UserError
from msdcli.recipe import StudentSettings
from msdcli.recipe.networks import UNetSettings
from tests.conftest import Msd


@pytest.fixture(scope="module")
def teacher() -> nets.Denoiser:
    network = UNetSettings(channels=16, multipliers=[1], blocks=2, attention=[8], embedding=32)
    return nets.build(network, shape=(1, 8, 8), num_classes=10, sigma_data=0.5).requires_grad_(False).eval()


def test_candidates_are_shares_of_the_teacher(teacher: nets.Denoiser) -> None:
    found = search.candidates(teacher)
    assert len(found) > 20
    assert all(0 < c.parameters <= 1 and c.flops > 0 for c in found)
    assert any(not c.network.attention for c in found), "attention is searched too"
    half = next(c for c in found if c.network.channels == 8 and c.network.blocks == 2 and c.network.attention)
    net = nets.build(half.network, shape=(1, 8, 8), num_classes=10, sigma_data=0.5)
    count = sum(p.numel() for p in net.parameters())
    assert half.parameters == pytest.approx(count / sum(p.numel() for p in teacher.parameters()))


def test_a_share_of_parameters_is_met_from_below(teacher: nets.Denoiser) -> None:
    best, tried = search.search(StudentSettings(parameters=0.58), teacher)
    assert 0.58 * 0.85 <= best.parameters <= 0.58
    assert best.latency == min(t["latency"] for t in tried)


def test_a_share_of_latency_is_met_by_the_largest_that_does(teacher: nets.Denoiser) -> None:
    best, tried = search.search(StudentSettings(latency=0.7), teacher)
    assert best.latency is not None
    assert best.latency <= 0.7
    assert best.parameters == max(t["parameters"] for t in tried if t["latency"] <= 0.7)


def test_what_cannot_be_met_is_refused(teacher: nets.Denoiser) -> None:
    with pytest.raises(UserError, match="no network of the teacher's kind"):
        search.search(StudentSettings(parameters=0.0001), teacher)


def test_a_latency_that_cannot_be_met_names_the_best_that_can(teacher: nets.Denoiser) -> None:
    with pytest.raises(
        UserError, match=r"has 1e-06 of its latency on this device; the smallest share found is"
    ) as told:
        search.search(StudentSettings(latency=1e-6), teacher)
    assert told.value.hint is not None and "student.width and student.depth by hand" in told.value.hint
    share = float(str(told.value).rpartition(" ")[2])
    if match := re.search(r"latency=([\d.]+)", told.value.hint):  # the fastest may be as slow as the teacher
        assert share <= float(match[1]) < 1


def test_the_choice_is_kept_with_the_run(msd: Msd, tiny: Path) -> None:
    override = "student={parameters: 0.6}"
    done = msd("distill", "tiny.yaml", override, "partition.students=1")
    assert done.returncode == 0, done.stderr
    assert "student: chose" in done.stderr
    kept = json.loads((tiny.parent / "runs/tiny/student.json").read_text())
    assert kept["chosen"]["parameters"] <= 0.6
    model = json.loads((tiny.parent / "runs/tiny/students/0/0-dm/model.json").read_text())
    assert model["network"] == kept["chosen"]["network"]
    assert msd("distill", "tiny.yaml", override, "partition.students=1").returncode == 0
