"""What a person meets at the terminal, and a script in a pipe."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import msdcli
from msdcli import console, errors
from msdcli.cli.docs import find
from msdcli.cli.train import distill
from msdcli.data import digits
from msdcli.engine import estimate, pipeline
from msdcli.engine.measure import fid_files
from msdcli.engine.measure.rows import Measurement, Row
from msdcli.engine.pictures import as_pil, save_grid
from msdcli.engine.report.live import StageProgress, _left
from msdcli.engine.report.words import closing, collapse
from msdcli.engine.tracking.events import Progress
from msdcli.engine.train import counting
from msdcli.engine.train.counting import FlopCounter
from msdcli.nets.meta import on_meta
from msdcli.recipe import load
from msdcli.rundir import RunDir, last_lines, lock
from tests.conftest import ROOT, Msd, command, environment

# A number, for a pipe.


def test_a_measurement_begins_with_its_figure() -> None:
    rows = [
        Row("real halves", "whole", 5, 5, {"fd_digits": 0.5}),
        Row("teacher", "whole", 9, 10, {"fd_digits": 0.2}),
        Row("students", "whole", 9, 10, {"fd_digits": 0.1}, {"fd_digits": {"low": 0.0, "high": 0.3}}),
    ]
    found = Measurement("fd_digits", "data", rows, {"samples": 9}).to_json()
    assert (found["value"], found["teacher"], found["halves"]) == (0.1, 0.2, 0.5)
    assert found["interval"] == {"low": 0.0, "high": 0.3} and len(found["rows"]) == 3
    alone = Measurement("fid", "clean", [Row("images", "whole", 9, 10, {"fid": 4.0})], {}).to_json()
    assert (alone["value"], alone["interval"], alone["teacher"], alone["halves"]) == (4.0, None, None, None)
    of_files = fid_files.headline({"fid": 4.0, "intervals": {}})
    assert of_files == {k: alone[k] for k in ("value", "metric", "interval", "teacher", "halves")}


def test_a_run_gives_a_number(finished: Path, msd: Msd, tmp_path: Path) -> None:
    shutil.copytree(finished.parent, tmp_path / "runs")
    done = msd("fid", "runs/tiny", "--quiet", "--samples", "50")
    assert done.stderr == "" and 0 < float(done.stdout) <= 2
    found = json.loads(msd("fid", "runs/tiny", "--json", "--samples", "50").stdout)
    assert found["value"] == float(done.stdout) and found["metric"] == "l1_toy2d" and found["halves"] > 0
    assert msd("fid", "runs/tiny", "--json", "--quiet").returncode == 2


@pytest.mark.parametrize(
    "words",
    [
        ("distill", "digits", "--dry-run"),
        ("fid", "RUN", "--dry-run"),
        ("sample", "RUN", "--all", "--dry-run"),
        ("export", "RUN", "--dry-run"),
        ("report", "RUN", "--dry-run"),
        ("plot", "curves", "RUN", "--dry-run"),
        ("plot", "curves", "RUN", "--out", "c.svg"),
        ("report", "RUN", "--out", "r.html", "--no-pictures"),
        ("watch", "RUN", "--once"),
        ("watch", "RUN"),
        ("status", "RUN"),
        ("status",),
        ("recipes",),
        ("recipes", "show", "digits"),
        ("recipes", "validate", "digits"),
        ("recipes", "cp", "digits", "my.yaml"),
        ("docs",),
        ("docs", "start"),
        ("sweep", "digits", "--dry-run"),
        ("partition", "digits", "--dry-run"),
    ],
    ids=" ".join,
)
def test_with_json_stdout_is_json(finished: Path, msd: Msd, words: tuple[str, ...]) -> None:
    done = msd(*(str(finished) if word == "RUN" else word for word in words), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) is not None


def test_a_plan_is_short_and_its_json_complete(msd: Msd) -> None:
    done = msd("distill", "toy", "--dry-run")
    assert "students:" in done.stdout and "sigma_min" not in done.stdout
    assert "sigma_min" in msd("distill", "toy", "--dry-run", "--recipe").stdout
    assert msd("distill", "toy", "--recipe").returncode == 2
    found = json.loads(msd("distill", "toy", "--dry-run", "--json").stdout)
    assert found["flops"]["all"] > found["flops"]["teacher"] > 0 and found["recipe"]["name"] == "toy"
    assert found["partition"]["students"] == 8 and found["missing"] == [] and not found["resumes"]


# How it ends.


@pytest.mark.parametrize("words", [("recipes",), ("docs", "numbers"), ("recipes", "schema")])
def test_a_reader_that_goes_away_is_no_error(words: tuple[str, ...]) -> None:
    process = subprocess.Popen(command(*words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), said) == (errors.READER_GONE, b"")


def test_every_end_has_its_code() -> None:
    ends = {
        errors.Preempted("stopped"): 75,
        errors.Interrupted("stopped"): 130,
        BrokenPipeError(): 141,
        errors.WrongValueError("x"): 2,
        errors.MissingFileError("x", hint="y"): 2,
    }
    assert {error: errors.explain(error)[0] for error in ends} == ends
    assert "75" in (ROOT / "recipes/slurm/array.sh").read_text()


def test_another_recipe_is_refused_with_the_command_that_works(finished: Path, msd: Msd, tmp_path: Path) -> None:
    shutil.copytree(finished.parent, tmp_path / "runs")
    done = msd("distill", "runs/tiny", "stages.0.lr=0.5", "partition.students=4")
    assert done.returncode == 2 and "partition.students: 2 there, 4 here" in done.stderr
    line = next(line for line in done.stderr.splitlines() if "try: " in line)
    words = line.partition("try: ")[2].split()
    assert words[:3] == ["msd", "distill", "runs/tiny/recipe.yaml"] and "stages.0.lr=0.5" in words
    recipe = load(words[2], words[3:])
    assert str(recipe.run_dir) == "runs/tiny-2" and recipe.partition.students == 4


# What is told meanwhile.


def test_a_log_has_times_rates_and_no_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Monitor(every=0) as monitor:
        for done in (0, 0, 0, 16, 16, 32, 32):
            monitor(Progress("pairs", done, 32, "pairs"))
        monitor(Progress("teacher", 4, 8, "steps", {"student": 0.5}, 10.0, 200.0))
        monitor(Progress("classifier", 4, 8, "steps", {"student": 0.5}))
        monitor(Progress("student 1 dm", 4, 8, "steps", {"student": 0.5}))
        monitor("a sentence")
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("[0:00:") for line in lines)
    assert [line.split(" ", 1)[1].partition(",")[0] for line in lines[:3]] == [
        *("pairs: 0/32 pairs", "pairs: 16/32 pairs", "pairs: 32/32 pairs")
    ]
    assert "pairs/s" in lines[1] and "3 min left" in lines[3]
    assert [("student loss" in line, " loss 0.5" in line) for line in lines[3:6]] == [
        *((False, True), (False, True), (True, True))
    ]


def test_status_says_who_trains_the_teacher(finished: Path, msd: Msd, tmp_path: Path) -> None:
    shutil.copytree(finished.parent, tmp_path / "runs")
    run = tmp_path / "runs/tiny"
    for folder in ("teacher", "students", "metrics"):
        shutil.rmtree(run / folder)
    shared = next((tmp_path / "runs/.shared").glob("teacher-*"))
    (shared / "model.json").unlink()
    with lock(shared, "the teacher"):
        state = msdcli.status(run)
        shown = msd("status", "runs/tiny").stdout
        watched = msd("watch", "runs/tiny", "--once").stdout
    assert state["teacher"] == "running" and state["state"] == "running" and not state["resumable"]
    for text in (shown, watched):
        assert "running" in next(line for line in text.splitlines() if "teacher" in line)
    assert msdcli.status(run)["teacher"] == "stopped" and "measurement" in shown
    listed = msd("status").stdout
    assert "runs/tiny" in listed and "stopped" in listed


def test_status_loads_no_torch(finished: Path) -> None:
    code = (
        f"import sys, msdcli; msdcli.status({str(finished)!r}); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"], done.stderr


# What is found.


@pytest.mark.parametrize(
    ("asked", "page"),
    [("6", "cluster"), ("6-cluster", "cluster"), ("trouble", "troubleshooting"), ("SIGTERM", "cluster"), ("xyzzy", "")],
)
def test_pages_are_found(asked: str, page: str) -> None:
    assert (find(asked) or [""])[0] == page


def test_recipes_are_a_line_each(msd: Msd) -> None:
    listed = msd("recipes").stdout.splitlines()
    assert sum("│ digits" in line for line in listed) == 5 and len(listed) < 40
    assert any(line.split("│")[1:3] == [f" {'imagenet64-msd4-fdistill':<24} ", " 4  "] for line in listed), (
        "no column is lost"
    )
    assert "# Shows: five one-step students" in msd("recipes", "show", "digits").stdout


# What is fast.


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    for mine, theirs in zip(digits._read(), load_digits(return_X_y=True), strict=True):
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)


def test_planning_digits_imports_nothing_slow_beside_torch() -> None:
    code = (
        "import sys; from msdcli.recipe import load; from msdcli.engine.plan import plan; plan(load('digits')); "
        "print([m for m in ('torch._dynamo', 'sympy', 'scipy', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_operations_are_counted_as_torch_counts_them() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with on_meta():
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.LazyLinear(4))
    with torch.device("meta"):
        x = torch.empty(2, 3, 8, 8)
        counts = []
        for counter in (FlopCounterMode(display=False), FlopCounter()):
            with counter:
                net(x).square().mean().backward()
            counts.append(counter.total if isinstance(counter, FlopCounter) else counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", ["toy", "digits-adm"])
def test_small_networks_are_counted_on_the_cpu_as_on_the_meta_device(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(name)
    data = pipeline.check(recipe, planning=True)
    nets = pipeline.networks_on_meta(recipe, data)
    student = nets[1][0]
    assert counting.for_counting(student, 64) is not student
    found = [estimate.estimate(recipe, data, *nets)]
    monkeypatch.setattr(counting, "COUNTED_ON_CPU", 0)
    assert counting.for_counting(student, 64) is student
    assert [estimate.estimate(recipe, data, *nets)] == found


def test_the_last_lines_of_a_long_file_are_read_alone(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {i}, "losses": {{"a": 1}}}}\n' for i in range(100)))
    assert [line["step"] for line in last_lines(file)] == list(range(100))
    assert [line["step"] for line in last_lines(file, 100)] == [97, 98, 99], "a line that is cut is none"
    assert last_lines(tmp_path / "none.jsonl") == []


# In Python.


def test_errors_are_pythons_too(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        msdcli.distill(tmp_path / "nowhere.yaml")
    with pytest.raises(FileNotFoundError, match="not a run directory"):
        msdcli.status(tmp_path)
    with pytest.raises(ValueError, match="sede: no such key"):
        msdcli.distill("digits", sede=1)
    with pytest.raises(ValueError, match="class 99 does not exist"):
        msdcli.sample(finished, [99])


def test_every_verb_is_a_function(finished: Path, tmp_path: Path) -> None:
    assert msdcli.partition(finished).parts == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert msdcli.plot("curves", finished, out=tmp_path / "c.svg").stat().st_size > 1000
    assert msdcli.report(finished, out=tmp_path / "r.html", pictures=False).stat().st_size > 1000
    assert all(getattr(msdcli, name).__doc__ for name in msdcli.__all__)
    with pytest.raises(FileNotFoundError):
        msdcli.import_teacher(tmp_path / "nowhere.pkl", tmp_path / "out")


def test_typos_are_found_by_a_type_checker() -> None:
    """A `__getattr__` that it saw would let every name pass."""
    body = ast.parse(Path(msdcli.__file__).read_text(encoding="utf-8")).body
    assert not [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__getattr__"]
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        msdcli.distil  # noqa: B018


def test_samples_as_images() -> None:
    grey, colour = as_pil(torch.zeros(2, 1, 4, 6)), as_pil(torch.ones(1, 3, 4, 4))
    assert [(i.mode, i.size) for i in (*grey, *colour)] == [("L", (6, 4)), ("L", (6, 4)), ("RGB", (4, 4))]
    with pytest.raises(errors.UserError, match="points are no pictures"):
        as_pil(torch.zeros(3, 2))


# The end of a run.


def test_a_run_ends_in_the_reports_sentence(finished: Path) -> None:
    (sentence, *_) = closing(RunDir(finished))
    assert "samples of the students are" in sentence and "two random halves of the real data" in sentence
    assert "(Frechet" not in sentence and "((" not in sentence and "))" not in sentence, "the table says what it is"


def test_a_grid_has_captions_names_and_colours(tmp_path: Path) -> None:
    from PIL import Image

    path, rows = tmp_path / "g.png", [torch.zeros(3, 1, 8, 8)] * 2
    captions = ("teacher, 35 network evaluations each", "students, one network evaluation each")
    save_grid(path, rows, beside=rows, class_names=["cat", "a" * 60], captions=captions, owners=[0, 1])
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[0] == 28 + 2 + 2 * 66, "8x8 is shown at eight times its size"
    bars = {tuple(pixels[28 + 33 + 66 * i, 6].tolist()) for i in range(2)}
    assert len(bars) == 2 and (32, 32, 32) not in bars
    assert pixels[:28].max() > 200, "captions"


def test_what_nobody_has_begun_is_weighed_by_its_operations() -> None:
    """Ten steps are left of a stage at 2 s a step, and 100 of one whose steps are three times the work."""
    parts = [
        StageProgress("student 0", 0, "tsm", "running", 10, 20, seconds_left=20.0),
        StageProgress("student 0", 0, "dm", "waiting", 0, 100),
    ]
    assert _left(parts) is None
    weights = {("student 0", "tsm"): 1e9, ("student 0", "dm"): 3e9}
    assert _left(parts, weights) == pytest.approx(20 + 100 * 3 * 2)


def test_a_long_run_says_how_long_all_of_it_takes(msd: Msd, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "TOTAL_EVERY", 0.0)
    done = msd("distill", "tiny.yaml")
    assert done.returncode == 0 and "the whole training: about" in done.stderr
    counted = json.loads(Path("runs/tiny/flops.json").read_text())
    assert counted["teacher"] > 0 and [len(size["stages"]) for size in counted["sizes"]] == [1]


def _collapsed(mine: float, theirs: float) -> list[str]:
    rows = [
        {"who": who, "group": group, "values": {"fd_x": 1.0, "recall": value}, "intervals": {}}
        for who, value in (("teacher", theirs), ("students", mine))
        for group in ("whole", "student 0", "student 1")
    ]
    rows[-1]["values"] = {"fd_x": 1.0, "recall": theirs}  # student 1 is well
    return collapse({"metric": "fd_x", "rows": rows})


def test_collapse_is_called_by_its_name_with_the_cure() -> None:
    (said,) = _collapsed(0.1, 0.7)
    assert said.startswith("The students have collapsed (student 0): recall 0.100 against 0.700")
    assert (
        "msd docs troubleshooting" in said
        and "(mode collapse)" in (ROOT / "msdcli/docs/8-troubleshooting.md").read_text()
    )
    assert _collapsed(0.6, 0.7) == [] == _collapsed(0.0, 0.0)
