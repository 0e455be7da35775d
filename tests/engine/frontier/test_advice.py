"""Advice comes from lines that were measured, and from nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from msdcli.engine.frontier.advice import Limits, advise
from msdcli.errors import UserError
from msdcli.recipe import Recipe, load
from tests.conftest import Msd
from tests.engine.frontier import example


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(), ("large", 1, 2)),  # 0.06, beyond the spread of 0.01 from all others
        (Limits(latency=3e-4), ("small", 4, 2)),
        (Limits(latency=3e-4, budget=1e9), ("small", 1, 0)),  # four are behind at the smallest budget
        (Limits(memory=400, budget=1e9), ("small", 1, 0)),
        (Limits(budget=2.5e9), ("large", 1, 1)),
    ],
)
def test_the_closest_line_within_the_limits(tiny: Path, limits: Limits, expected: tuple[str, int, int]) -> None:
    found = advise(example.record(), load(str(tiny)), limits)
    assert (found.line["size"], found.line["students"], found.line["doubling"]) == expected
    assert f"partition.students={expected[1]}" in found.keys
    assert ('student.network={"kind": "mlp", "channels": 8, "blocks": 1}' in found.keys) == (expected[0] == "small")


def test_a_latency_is_kept_by_the_slowest_student(tiny: Path) -> None:
    record = example.record()
    record["sizes"][1]["latency"]["worst"] = 5e-4  # of the small ones: 0.2 ms on average over classes
    with pytest.raises(UserError, match=r"the least that was measured is 0\.4 ms"):
        advise(record, load(str(tiny)), Limits(latency=3e-4))
    found = advise(record, load(str(tiny)), Limits(memory=400, budget=1e9))
    assert any("latency 0.5 ms" in line for line in found.said)
    assert any("over classes a request takes 0.2 ms" in line for line in found.said)


def test_of_lines_that_are_as_close_the_cheapest(tiny: Path) -> None:
    record = example.record()
    for line in record["lines"]:
        line["distances"] = [0.1, 0.2, 0.3]
    found = advise(record, load(str(tiny)), Limits())
    assert (found.line["size"], found.line["students"], found.line["doubling"]) == ("small", 1, 0)
    assert len(found.as_close) == len(record["lines"])


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(latency=1e-5), "the least that was measured is 0.2 ms"),
        (Limits(memory=10), "memory: the least"),
        (Limits(budget=1e6), "budget: the least that was measured is 1 GFLOP"),
    ],
)
def test_nothing_is_said_outside_of_what_was_measured(tiny: Path, limits: Limits, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        advise(example.record(), load(str(tiny)), limits)
    beyond = advise(example.record(), load(str(tiny)), Limits(budget=1e15))
    assert any("no budget above 4 GFLOP was measured" in line for line in beyond.said)


def test_other_data_and_other_teachers_get_no_advice(tiny: Path) -> None:
    for override, said in (("data.points=900", "no frontier of these data"), ("teacher.network.channels=8", "another")):
        other: Recipe = load(str(tiny), [override])
        with pytest.raises(UserError, match=said):
            advise(example.record(), other, Limits())


def test_nothing_is_said_of_the_network_of_a_given_teacher(tiny: Path) -> None:
    """`teacher.network` is what msd would train: of a teacher from elsewhere it says nothing."""
    given = load(str(tiny), [f"teacher.path={tiny.parent}", "teacher.network.channels=8"])
    assert advise(example.record(), given, Limits()).line["size"] == "large"


def test_advice_ends_with_the_command(tiny: Path, msd: Msd) -> None:
    (tiny.parent / "frontier.json").write_text(json.dumps(example.record()))
    done = msd("advise", "tiny.yaml", ".", "--latency", "0.3")
    assert done.returncode == 0 and "msd distill tiny.yaml" in done.stdout and "Example CPU" in done.stdout, done.stderr
    assert json.loads(msd("advise", "tiny.yaml", ".", "--json").stdout)["line"]["size"] == "large"
    assert msd("advise", "tiny.yaml", "nowhere").returncode == 2
