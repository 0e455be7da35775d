"""Frontiers: budgets are equal, saturation decides what follows, workers share it, and a stopped sweep goes on."""

from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from msdcli import records, sweep
from msdcli.engine import estimate
from msdcli.engine.frontier import latency, lines, measured, record, run
from msdcli.engine.frontier.fitting import CellFactory, Costs, fitted
from msdcli.engine.frontier.lines import Line, saturation, wanted
from msdcli.engine.pipeline import check, networks_on_meta
from msdcli.engine.report import frontier
from msdcli.errors import UserError
from msdcli.recipe import Recipe
from msdcli.sweep import FrontierSettings, SizeSettings, Sweep
from tests.conftest import Msd
from tests.engine.frontier import example

SWEEP = """
recipe: tiny.yaml
base: {workers: 1}
seeds: [0, 1]
frontier:
  sizes:
    - {label: own}
    - {label: small, set: {student.network: {kind: mlp, channels: 8, blocks: 1}}}
  students: [2]
  budget: 2e7
  doublings: 2
  large_batch: [2]
"""
OWN, SMALL = SWEEP.splitlines(keepends=True)[6:8]
OWN_LAST = SWEEP.replace(OWN + SMALL, SMALL + OWN)


@pytest.fixture
def mini(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.chdir(tiny.parent)
    (tiny.parent / "mini.yaml").write_text(SWEEP)
    return sweep.load(tiny.parent / "mini.yaml")


# What follows from what.


def test_saturation_is_where_a_doubling_gains_less_than_the_spread() -> None:
    """Of distances 1 + 0.8 / 2^d the gain is 0.4 / 2^d, and the spread of {-s, 0, s} is s."""

    def at(spread: float, most: int = 8) -> int | None:
        means = [1 + 0.8 / 2**d for d in range(most)]
        return saturation([[m - spread, m, m + spread] for m in means])

    assert [at(0.41), at(0.21), at(0.11), at(0.051)] == [0, 1, 2, 3]
    assert at(0.051, most=3) is None
    assert saturation([[2.0], [1.0], [1.5]]) == 1, "one seed has no spread: until it gains nothing"
    assert saturation([[2.0, 3.0]]) is None


@pytest.mark.parametrize(("spread", "expected"), [(0.41, 0), (0.11, 2), (0.001, None)])
def test_the_lines_follow_saturation(spread: float, expected: int | None) -> None:
    settings = FrontierSettings(
        sizes=[SizeSettings(label="a"), SizeSettings(label="b")],
        students=[5, 2],
        budget=1e9,
        doublings=4,
        large_batch=[5],
    )

    def formula(line: Line) -> Sequence[float] | None:
        mean = 1 + 0.8 / 2**line.doubling
        return None if line.size == "b" else [mean - spread, mean, mean + spread]

    found = wanted(settings, formula)
    assert (found.saturated, found.open) == ({"a": expected}, ["b"])
    mine = [line for line in found.lines if line.size == "a"]
    alone = [line.doubling for line in mine if line.devices == 1]
    assert alone == list(range(5 if expected is None else expected + 2))
    budgets = alone[-2:]
    assert [(x.students, x.devices, x.doubling) for x in mine if x.devices > 1] == [
        (k, n, d) for pairs in (((2, 2), (5, 5)), ((1, 5),)) for d in budgets for k, n in pairs
    ]
    assert [line for line in found.lines if line.size == "b"] == [Line("b", 1, 1, 0)], "the first decides the second"
    everything = list(lines.every(settings))
    assert set(found.lines) <= set(everything) and len(set(everything)) == len(everything)


def test_all_budgets_wait_for_nothing() -> None:
    settings = FrontierSettings(
        sizes=[SizeSettings(label="a")], students=[2], budget=1e9, doublings=2, large_batch=[2], all_budgets=True
    )
    found = wanted(settings, lambda line: None)
    assert found.lines == list(lines.every(settings)) and len(found.lines) == 9 and found.open == []
    assert found.saturated == {"a": None}
    assert wanted(settings, lambda line: [2.0 ** -min(line.doubling, 1)]).saturated == {"a": 1}


@pytest.mark.parametrize("all_budgets", [True, False])
def test_a_size_has_as_many_doublings_as_it_says(all_budgets: bool) -> None:
    sizes = [SizeSettings(label="a", doublings=3), SizeSettings(label="b")]
    settings = FrontierSettings(sizes=sizes, students=[2], budget=1e9, doublings=1, all_budgets=all_budgets)
    found = wanted(settings, lambda line: [2.0**-line.doubling])
    for size, most in (("a", 3), ("b", 1)):
        assert [x.doubling for x in found.lines if (x.size, x.students) == (size, 1)] == list(range(most + 1))
        assert max(x.doubling for x in found.lines if (x.size, x.students) == (size, 2)) == most
    assert set(found.lines) <= set(lines.every(settings))
    assert run._most(settings) == len(found.lines)


# Equal budgets.


@pytest.mark.parametrize("students", [1, 3])
def test_fitted_steps_spend_the_budget_to_half_a_step(students: int) -> None:
    known = Costs(pairs=1000.0, step=[3.0, 70.0], steps=[400, 60], gradient_bytes=[4, 4], parameters=(9, 9))
    steps = fitted(known, 50_000.0, students)
    spent = known.pairs + students * (3 * steps[0] + 70 * steps[1])
    assert abs(spent - 50_000) <= students * 70 / 2
    assert steps[0] / steps[1] == pytest.approx(400 / 60, rel=0.03)
    with pytest.raises(UserError, match="no step of every stage") as told:
        fitted(known, 1020.0, students)
    enough = re.search(r"budget of ([\d.]+) (k?)FLOP", str(told.value.hint))
    assert enough and min(fitted(known, float(enough[1]) * (1000 if enough[2] else 1), students)) >= 1


def test_every_line_of_a_budget_costs_what_a_plan_counts(mini: Sweep) -> None:
    factory = CellFactory(mini)
    for line in (Line("own", 1, 1, 1), Line("own", 2, 2, 1), Line("own", 1, 2, 1), Line("small", 2, 2, 1)):
        recipe, step = factory.cells(line)[0].recipe, factory.costs(line).step[-1]
        assert recipe.partition.students == line.students
        assert recipe.stages[0].batch == 16 * line.batch_factor
        assert abs(_training_flops(recipe) - 4e7) <= 0.5001 * step * line.students, line
    own = factory.costs(Line("own", 1, 2, 0))
    assert own.gradient_bytes == [4 * own.parameters[1] * 3], "two updates of the fake, one of the student"


def test_lines_of_a_size_do_not_change_each_other(tiny: Path) -> None:
    stages = "stages: [{objective: dm, steps: 6, batch: 16, fake_updates: 2}]"
    text = SWEEP.replace("{label: own}", f"{{label: own, set: {{{stages}}}}}")
    (tiny.parent / "mini.yaml").write_text(text)
    factory = CellFactory(sweep.load(tiny.parent / "mini.yaml", folder=str(tiny.parent / "runs")))
    before = factory.settings.sizes[0].model_dump_json()
    assert factory.cells(Line("own", 1, 2, 0))[0].recipe.stages[0].batch == 32
    assert factory.cells(Line("own", 1, 1, 0))[0].recipe.stages[0].batch == 16
    assert factory.settings.sizes[0].model_dump_json() == before


def _training_flops(recipe: Recipe) -> float:
    data = check(recipe, planning=True)
    cost = estimate.estimate(recipe, data, *networks_on_meta(recipe, data, planning=True))
    return cost.pairs_flops + cost.students_flops


# Running.


class Finished:
    """Stands for training: a finished run's distance is a formula of its line."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[str] = []
        for module in (run, record):
            monkeypatch.setattr(module, "result_of", self.result)
        monkeypatch.setattr("msdcli.engine.frontier.measured.result_of", self.result)
        monkeypatch.setattr(run.pipeline, "distill", lambda recipe, report: self.order.append(str(recipe.name)))

    def result(self, cell: sweep.Cell) -> dict[str, Any] | None:
        if cell.recipe.name not in self.order:
            return None
        values = {"l1": 1.0 + 0.1 * cell.seed}  # no budget helps: saturated at the first
        return {"metric": "l1", "samples": 9, "rows": [{"who": "students", "group": "whole", "values": values}]}


def test_a_frontier_that_lacks_runs_says_so(mini: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sizes are saturated, and of the small one K students are still to come."""
    finished = Finished(monkeypatch)
    run.run(mini, lambda event: None)
    finished.order = [name for name in finished.order if not name.startswith("small-k-2-")]
    known = measured.plan(CellFactory(mini))
    assert known.open == [] and known.saturated == {"own": 0, "small": 0}
    assert {line.label for _, line, _ in measured.unfinished(CellFactory(mini), known)} == {
        "small, K = 2, budget x 1",
        "small, K = 2, budget x 2",
    }


def test_workers_share_a_frontier_and_nothing_is_done_twice(mini: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = Finished(monkeypatch)
    first = run.known(mini, (0, 2))
    assert len(first.left) == 2 and first.open == ["own", "small"] and first.most == 28
    run.run(mini, lambda event: None, worker=(1, 2))  # helps where nobody is, so one alone comes to the end
    assert len(finished.order) == len(set(finished.order)) == 2 * 2 * (2 + 2 + 2)
    assert finished.order[0] == "own-k-1-budget-x-1-seed1", "its own first"
    assert run.known(mini).left == []
    run.run(mini, lambda event: None)
    assert len(finished.order) == 24


def test_a_worker_waits_for_those_that_decide(mini: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    finished, told = Finished(monkeypatch), list[str]()
    held = [cell.recipe.name for _, cell in run.known(mini).left]
    holders = dict.fromkeys(held, "process 7")
    monkeypatch.setattr(run, "holder_of", lambda folder: holders.get(folder.name))

    def pause(seconds: float) -> None:
        holders.clear()
        finished.order.extend(map(str, held))

    run.run(mini, lambda event: told.append(str(event)), pause=pause)
    assert told[0].startswith("waiting for other workers") and len(finished.order) == 24


@pytest.mark.slow
def test_a_frontier_from_the_command_line(mini: Sweep, msd: Msd, tiny: Path) -> None:
    monkeyed = SWEEP.replace("seeds: [0, 1]", "seeds: [3]").replace("doublings: 2", "doublings: 1")
    (tiny.parent / "mini.yaml").write_text(monkeyed)
    assert "more follow" in msd("sweep", "mini.yaml", "--dry-run").stdout
    done = msd("sweep", "mini.yaml", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["frontier"]
    assert found == records.frontier(Path("runs/mini/frontier.json"))
    assert found["open"] == [] and found["floor"].keys() == {"halves", "teacher"}
    assert min(found["floor"].values()) > 0, "other noise gives other samples"
    for line in found["lines"]:
        assert line["flops"] == pytest.approx(line["budget"], rel=0.1)
        assert line["devices"] == line["students"] or line["reduced_bytes"] > 0
    with open("runs/mini/table.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(found["lines"])
    assert Path("runs/mini/frontier.png").read_bytes().startswith(b"\x89PNG")
    again = msd("sweep", "mini.yaml", "--table")
    assert again.returncode == 0 and "one student saturates at" in again.stdout, again.stderr
    Path("runs/mini/frontier.json").write_text("{}")
    assert msd("sweep", "mini.yaml").returncode == 2, "what is not a frontier stays"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SWEEP + "rows: [{label: a}]\n", "makes its own lines"),
        (SWEEP.replace("students: [2]", "students: [2, 2]"), "names a number twice"),
        (SWEEP.replace("label: small", "label: Own"), "the same label"),
        (SWEEP.replace("seeds: [0, 1]", "seeds: [1, 1]"), "names a seed twice"),
        (SWEEP.replace("budget: 2e7", "budget: 1e3"), "no step of every stage"),
        (
            OWN_LAST.replace("budget: 2e7", "budget: 4e6").replace("students: [2]", "students: [8]"),
            "buys 8 students no step",
        ),
        (SWEEP.replace("label: own", "label: own, runs: {partition.run: small}"), "sizes.0.runs"),
        (SWEEP.replace("student.network: {kind: mlp, channels: 8, blocks: 1}", "student.latency: 0.5"), "is a target"),
        (SWEEP.replace("students: [2]", "students: [9]"), "students"),
    ],
)
def test_mistakes_in_a_frontier_are_named(tiny: Path, text: str, said: str) -> None:
    path = tiny.parent / "mini.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        run.known(sweep.load(path, folder=str(tiny.parent / "runs")))


# Latency, table, pictures.


def test_latency_is_measured_in_turn_per_image(mini: Sweep) -> None:
    recipe = CellFactory(mini).cells(Line("own", 1, 1, 0))[0].recipe
    frozen, _ = networks_on_meta(recipe, check(recipe, planning=True))
    found = latency.measure({"a": frozen.settings}, frozen, latency.torch.device("cpu"), repeats=2)
    assert found.keys() == {"a"} and 0 < found["a"]["image"] < found["a"]["request"]
    assert latency.machine(latency.torch.device("cpu"))["name"]


def test_the_table_and_the_picture_say_what_the_record_does(tmp_path: Path, msd: Msd) -> None:
    (tmp_path / "frontier.json").write_text(json.dumps(example.record()))
    found = frontier.load(tmp_path)
    columns, rows = frontier.table(found)
    assert [*columns[:3], columns[-1]] == ["size", "students", "FLOP", "l1_toy2d"]
    assert [*rows[0][:3], rows[0][-1]] == ["large", "K = 1", "1 G", "0.1000 ± 0.0100"]
    saturated = [row[-1] for row in frontier.sizes(found)[1]]
    assert saturated == ["none measured", "2 G"]
    assert msd("plot", "frontier", ".", "--out", "f.svg").returncode == 0
    texts = set(re.findall(r"<text[^>]*>([^<]*)</text>", Path("f.svg").read_text()))
    assert {"K = 1", "K = 4", "TFLOP of training", "ms of a request (batch 1)"} <= texts
    assert len(list(csv.reader(frontier.as_csv(found).splitlines()))) == 1 + 3 * len(found["lines"])


@pytest.mark.parametrize("factor", [2, 30, 10_000])
def test_marks_of_a_wide_axis_are_few(factor: int) -> None:
    record = example.record()
    record["lines"][0]["memory"] = factor * max(line["memory"] for line in record["lines"])
    memory = frontier.draw(record).axes[1]
    low, high = memory.get_xlim()
    assert 1 <= sum(low <= mark <= high for mark in memory.get_xticks()) <= frontier.MARKS


def test_a_damaged_frontier_is_refused(tmp_path: Path, msd: Msd) -> None:
    broken = example.record()
    broken["lines"][0]["size"] = "other"
    (tmp_path / "frontier.json").write_text(json.dumps(broken))
    assert "no size is called" in msd("plot", "frontier", ".", "--out", "f.svg").stderr
    (tmp_path / "frontier.json").write_text("[1]")
    assert msd("plot", "frontier", ".", "--out", "f.svg").returncode == 2
    assert "holds no frontier" in msd("plot", "frontier", "elsewhere", "--out", "f.svg").stderr


def test_sizes_are_compared_at_a_budget_that_they_share() -> None:
    """A number of students that one size alone has does not keep the others from being compared."""
    found = example.record()
    found["lines"].append(example.line("small", 10, 0, [0.3, 0.31]))
    compared, title = frontier._compared(found)
    assert title == "sizes, 0.004 TFLOP" and {line["doubling"] for line in compared} == {2}
    found["lines"] = [line for line in found["lines"] if (line["size"], line["doubling"]) != ("large", 2)]
    assert frontier._compared(found)[1] == "sizes, 0.002 TFLOP"


def test_a_report_shows_a_sweeps_frontier(tmp_path: Path, msd: Msd) -> None:
    hostile = "<script>1</script>"
    (tmp_path / "frontier.json").write_text(json.dumps(example.record() | {"sweep": hostile}))
    assert hostile in msd("report", ".", "--dry-run").stdout
    done = msd("report", ".")
    assert done.returncode == 0, done.stderr
    page = Path("report.html").read_text()
    assert hostile not in page and page.count("<table>") == 2 and "0.1000 ± 0.0100" in page
    drawn = base64.b64decode(re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)[0]).decode()
    assert {"K = 1", "K = 4"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", drawn))
    assert msd("report", ".").returncode == 0, "its own file is written anew"


# Students of different sizes.


def test_a_size_of_several_networks_has_its_own_number_of_students(mini: Sweep) -> None:
    path = mini.file.with_name("mixed.yaml")
    size = "    - {label: mixed, set: {student.parts: [{width: 0.5}, {}]}}\n"
    path.write_text(SWEEP.replace("  students: [2]", f"{size}  students: [2]"))
    factory = CellFactory(sweep.load(path))
    factory.check()
    assert [(line.students, line.devices) for line in lines.every(factory.settings) if line.size == "mixed"] == [
        (2, 2)
    ] * 4
    mixed, own = Line("mixed", 2, 2, 0), Line("own", 1, 1, 0)
    recipe = factory.cells(mixed)[0].recipe
    assert recipe.partition.students == 2 and recipe.student.of(0).width == 0.5
    assert abs(_training_flops(recipe) - 2e7) <= 0.5001 * factory.costs(mixed).step[-1] * 2
    assert factory.costs(mixed).step[0] < factory.costs(own).step[0]
    small, large = 1e-3, 3e-3
    timed = [{"request": small, "image": small / 9}, {"request": large, "image": large / 9}]
    found = record._latency(recipe, timed)
    assert found["request"] == pytest.approx(2e-3) and found["worst"] == large
