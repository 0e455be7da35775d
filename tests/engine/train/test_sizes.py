"""Students of different sizes in one run: each is the one that a run of its size alone would make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import msdcli
from msdcli.engine import estimate, pipeline, sample, search, timing
from msdcli.engine.bench import recipe as bench
from msdcli.engine.bench import students as bench_students
from msdcli.engine.export import runtime
from msdcli.engine.export.export import export
from msdcli.engine.export.format import ExportOptions
from msdcli.engine.report import live
from msdcli.engine.report.facts import load_runs
from msdcli.engine.report.status import status
from msdcli.engine.report.words import summary
from msdcli.engine.tracking.events import silent
from msdcli.engine.tracking.formatting import named_students
from msdcli.engine.train import precision
from msdcli.engine.train.log import TrainLog
from msdcli.errors import UserError
from msdcli.recipe import Recipe, load, load_any
from msdcli.recipe.applies import applicable
from msdcli.recipe.changes import differences
from msdcli.recipe.networks import MLPSettings
from msdcli.recipe.student import StudentSettings
from msdcli.rundir import RunDir
from tests.conftest import TINY, Msd, distilled

PARTS = "student: {parts: [{width: 0.5}, {}]}"
MIXED = TINY + PARTS + "\n"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a small student and one like the teacher. Read it; do not change it."""
    return distilled(tmp_path_factory.mktemp("mixed"), MIXED)


def weights(run: Path, student: int) -> bytes:
    return (run / f"students/{student}/0-dm/model.safetensors").read_bytes()


def models(run: Path) -> list[dict[str, Any]]:
    return [json.loads((run / f"students/{k}/0-dm/model.json").read_text()) for k in (0, 1)]


def of(*parts: dict[str, Any], **shared: Any) -> StudentSettings:
    return StudentSettings.model_validate({"parts": [*parts], **shared})


# What a recipe says.


def test_a_part_has_what_all_share_but_for_its_own() -> None:
    mlp = {"kind": "mlp", "channels": 4}
    entries = [{}, {"width": 1.0}, {"depth": 2.0}, {"latency": 0.5}, {"network": mlp}]
    own = of(*entries, width=0.5, init="pruned")
    assert [(own.of(k).width, own.of(k).depth) for k in range(5)] == [(0.5, 1), (1, 1), (0.5, 2), (1, 1), (1, 1)]
    assert [own.of(k).target for k in range(5)] == [None, None, None, 0.5, None]
    assert own.of(4).network == MLPSettings(channels=4) and {own.of(k).init for k in range(5)} == {"pruned"}
    pruned = of({}, {"latency": 0.3}, {"width": 0.5}, parameters=0.6, prune="layers")
    asked = [(p.parameters, p.latency, p.prune) for p in map(pruned.of, range(3))]
    assert asked == [(0.6, None, "layers"), (None, 0.3, "layers"), (None, None, None)]
    alone = StudentSettings(width=0.5)
    assert alone.of(7) is alone and alone.sizes(3) == [range(3)]
    assert of({"width": 0.5}, {}, {"width": 0.5, "depth": 1.0}).sizes(3) == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ("[{width: 0.5}]", "`student.parts` is of 1 students, `partition.students` says 2"),
        ("[{width: 0.5, latency: 0.5}, {}]", "`parts`, student 0: give one of"),
        ("[{}, {prune: layers}]", "`parts`, student 1: `prune` needs a target"),
        ("[{}, {width: 100}]", "student.parts.1.width"),
        ("[{}, {rank: 4}]", "rank"),
    ],
)
def test_mistakes_in_parts_are_named(tiny: Path, parts: str, said: str) -> None:
    with pytest.raises(UserError) as told:
        load(tiny, [f"student.parts={parts}"])
    assert said in str(told.value)
    with pytest.raises(UserError, match="`adapter` is of the teacher's network"):
        load(tiny, ["student={adapter: {rank: 2}, parts: [{}, {}]}"])


def test_without_parts_recipes_are_what_they_were(tiny: Path) -> None:
    plain, said = load(tiny), load(tiny, [PARTS.replace("student: ", "student=")])
    old = plain.dump()
    del old["student"]["parts"], old["partition"]["order"]  # a run's recipe.yaml of an earlier version
    assert (
        load_any(old, {}) == plain and differences(old | {"partition": plain.dump()["partition"]}, plain.dump()) == []
    )
    assert "parts" not in applicable(plain)["student"]
    assert applicable(said)["student"]["parts"] == [{"width": 0.5}, {}]
    assert load_any(applicable(said), {}) == said
    assert differences(plain.dump(), said.dump()) == ["student.parts"]


def test_numbers_of_students_are_said_in_spans() -> None:
    assert [named_students(n) for n in ([3], range(4), [0, 1, 2, 5])] == [
        "student 3",
        "students 0 to 3",
        "students 0 to 2, 5",
    ]


# A run.


def test_each_student_is_that_of_a_run_of_its_size(mixed: Path, finished: Path, msd: Msd, tiny: Path) -> None:
    assert msd("distill", "tiny.yaml", "student.width=0.5", "--student", "0").returncode == 0
    assert weights(mixed, 0) == weights(tiny.parent / "runs/tiny", 0), "small as among small ones"
    assert weights(mixed, 1) == weights(finished, 1), "large as among large ones"
    (small, large) = models(mixed)
    assert small["network"]["channels"] == 8 and large["network"]["channels"] == 16
    assert small["cost"]["flops"] < large["cost"]["flops"]


def test_a_killed_run_of_two_sizes_ends_with_the_same_bits(
    mixed: Path, msd: Msd, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_text(MIXED)
    count = TrainLog._count

    def killed(log: TrainLog, flops: list[int], elsewhere: float) -> None:
        if log.what == "student 0 dm" and log.state.step == 3:
            raise KeyboardInterrupt
        count(log, flops, elsewhere)

    monkeypatch.setattr(TrainLog, "_count", killed)
    assert msd("distill", "tiny.yaml", "--student", "0").returncode == 130
    monkeypatch.setattr(TrainLog, "_count", count)
    assert msd("distill", "tiny.yaml", "--student", "1").returncode == 0
    assert msd("distill", "tiny.yaml", "--student", "0").returncode == 0
    for k in (0, 1):
        assert weights(tiny.parent / "runs/tiny", k) == weights(mixed, k)
    other = msd("distill", "tiny.yaml", "student.parts=[{width: 0.25}, {}]")
    assert (other.returncode, "student.parts.0.width differ" in other.stderr) == (2, True)


def test_samples_and_exports_have_both_sizes(mixed: Path, tmp_path: Path) -> None:
    students = msdcli.load(mixed)
    images = students.sample([0, 1, 2, 3] * 4, seed=1)
    sizes = [sum(p.numel() for p in students.student(k).net.parameters()) for k in (0, 1)]
    assert sizes == [model["parameters"] for model in models(mixed)] and sizes[0] < sizes[1]
    options = ExportOptions(bench=False)
    assert export(RunDir(mixed), tmp_path / "bundle", options=options)["max_difference"] == 0
    assert torch.equal(sample.load(tmp_path / "bundle").sample([0, 1, 2, 3] * 4, seed=1), images)
    card = (tmp_path / "bundle/README.md").read_text()
    assert all(f"| {size:,} |" in card for size in sizes)


@pytest.mark.slow
def test_programs_have_both_sizes(mixed: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    given = export(RunDir(mixed), tmp_path / "torch", "torch", options=ExportOptions(bench=False))
    assert given["max_difference"] < 1e-4 and given["students"][0]["bytes"] < given["students"][1]["bytes"]
    shutil.copytree(mixed.parent, tmp_path / "runs")
    run = tmp_path / "runs/tiny"
    assert export(RunDir(run), tmp_path / "onnx", "onnx", options=ExportOptions(bench=False))["max_difference"] < 1e-4
    asked = [0, 1, 2, 3]
    drawn = [runtime.load(run, runtime=name).sample(asked) for name in ("torch", "onnx")]
    assert torch.allclose(*drawn, atol=1e-4)


def test_everybody_is_told_the_sizes(mixed: Path) -> None:
    sizes = [model["parameters"] for model in models(mixed)]
    assert [student["parameters"] for student in status(RunDir(mixed))["students"]] == sizes
    assert "They are of two sizes" in summary(load_runs([mixed])[0])[0]


# What it costs.


def counted(tiny: Path, *overrides: str) -> tuple[Recipe, estimate.Estimate]:
    recipe = load(tiny, [*overrides])
    data = pipeline.check(recipe, planning=True)
    return recipe, estimate.estimate(recipe, data, *pipeline.networks_on_meta(recipe, data, planning=True))


def test_a_mixed_run_costs_what_its_students_cost_alone(tiny: Path) -> None:
    _, large = counted(tiny)
    _, small = counted(tiny, "student.width=0.5")
    recipe, both = counted(tiny, "student.parts=[{}, {width: 0.5}, {}]", "partition.students=3")
    assert both.students_flops == pytest.approx(large.students_flops + small.students_flops / 2)
    assert [[*size.trained] for size in both.sizes] == [[0, 2], [1]]
    drawn = [cost.evaluation_flops - cost.more_flops for cost in (large, small, both)]
    assert drawn[2] == pytest.approx(2 / 3 * drawn[0] + 1 / 3 * drawn[1]), "parts are of one size"
    said = "\n".join(estimate.lines(both))
    assert "each of students 0, 2, dm" in said and "student 1, dm" in said
    assert precision.choose(recipe, pipeline.networks_on_meta(recipe, pipeline.check(recipe))[0], torch.device("cpu"))[
        "flops_per_image"
    ] == pytest.approx(large.sizes[0].evaluation), "the largest one decides"


def test_students_of_different_times_go_side_by_side() -> None:
    assert timing._side_by_side([3.0, 1, 1, 1], 2) == 3
    assert timing._side_by_side([1.0, 1, 1, 3], 2) == 4, "the long one is the last to begin"
    assert timing._side_by_side([2.0] * 5, 2) == 6


def test_a_plan_and_its_operations_tell_the_sizes_apart(msd: Msd, tiny: Path) -> None:
    tiny.write_text(MIXED)
    said = msd("distill", "tiny.yaml", "--dry-run").stdout
    assert "student 0: " in said and "student 1: " in said, said
    told = json.loads(msd("distill", "tiny.yaml", "--dry-run", "--json").stdout)
    small, large = told["sizes"]
    assert (small["students"], large["students"]) == ([0], [1]) and small["parameters"] < large["parameters"]
    assert told["flops"]["students"] == small["flops"] + large["flops"]
    run = RunDir(tiny.parent / "run")
    run.adopt(load(tiny))
    (run.root / "flops.json").write_text(
        json.dumps({"teacher": 1.0, "sizes": [{"students": [0], "stages": [6.0]}, {"students": [1], "stages": [12.0]}]})
    )
    weighed = live._weights(run, live.history(run))
    assert (weighed["student 0", "dm"], weighed["student 1", "dm"]) == (1.0, 2.0)
    (run.root / "flops.json").write_text(json.dumps({"teacher": 1.0, "stages": [6.0]}))
    assert live._weights(run, live.history(run))["student 1", "dm"] == 1.0, "as an earlier version left it"


def test_bench_measures_every_size(tiny: Path) -> None:
    recipe = load(tiny, ["student.parts=[{width: 0.5}, {}]"])
    found = bench.bench(recipe, silent, repeats=1, batch=4)
    assert [stage["students"] for stage in found["stages"]] == [[0], [1]]
    each = [size["sampling"]["latency_seconds"] for size in found["sizes"]]
    assert found["latency_seconds"] == {"mean": pytest.approx(sum(each) / 2), "worst": max(each)}
    assert found["sizes"][0]["parameters"] < found["sizes"][1]["parameters"]
    assert [bench_students.size_of(recipe, number) for number in range(4)] == [0, 1, 0, 1]


# Networks that are searched.


def test_each_target_is_searched_once_and_kept(tiny: Path) -> None:
    parts = "[{parameters: 0.3}, {}, {parameters: 0.3}, {parameters: 0.7}]"
    recipe = load(tiny, ["partition.students=4", f"student.parts={parts}", "teacher.network.channels=32"])
    frozen, _ = pipeline.networks_on_meta(recipe, pipeline.check(recipe))
    teacher = msdcli.nets.build(frozen.settings, shape=(2,), num_classes=frozen.num_classes, sigma_data=0.5)
    run, said = RunDir(tiny.parent / "run"), list[str]()
    run.root.mkdir()
    assert search.settled(run, recipe) is None
    stood = search.stand_in(recipe, teacher)
    assert [settings.network is None for settings in map(stood.student.of, range(4))] == [False, True, False, False]
    found = search.resolve(run, recipe, teacher, lambda line: said.append(str(line)))
    assert [line.split(":")[0] for line in said] == ["students 0, 2", "student 3"]
    assert sorted(p.name for p in run.root.glob("student*")) == ["student-0.json", "student-3.json"]
    networks = [found.student.of(k).network_for(teacher.settings) for k in range(4)]
    assert networks[0] == networks[2] and networks[1] == teacher.settings and len({*map(repr, networks)}) == 3
    assert search.resolve(run, recipe, teacher, silent) == found == search.settled(run, recipe)
    wanted = load(tiny, ["student.parts=[{parameters: 1e-5}, {}]"])
    with pytest.raises(UserError, match=r"student\.parts\.0: no network") as told:
        search.resolve(RunDir(tiny.parent / "other"), wanted, teacher, silent)
    assert told.value.hint is not None and "student.parts.0.width" in told.value.hint
