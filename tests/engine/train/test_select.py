"""Measuring while a stage trains and keeping its best average: the choice, what it survives, and who is told."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from msdcli.data.base import in_turn
from msdcli.diffusion.generator import Generator
from msdcli.engine.checkpoints.model import load_model
from msdcli.engine.checkpoints.tensors import load_tensors
from msdcli.engine.checkpoints.train_state import TrainState
from msdcli.engine.distributed.group import SINGLE_PROCESS
from msdcli.engine.measure import classifier, feature_metric
from msdcli.engine.measure import part_evaluator as examine
from msdcli.engine.sample import Students
from msdcli.engine.train.loop import TrainOptions
from msdcli.engine.train.selection import AverageSelection, BestAverage, Evaluation
from msdcli.metrics.frechet import frechet_distance
from msdcli.metrics.inception import FeatureNetwork
from msdcli.metrics.moments import Moments
from msdcli.partition import Partition
from msdcli.recipe.stages import DmSettings, EdmSettings, SelectSettings
from msdcli.seeds import derive
from tests.conftest import TINY, Msd, distilled, train_classifier_briefly
from tests.engine.distributed.test_distributed import torchrun
from tests.engine.measure import test_fid
from tests.engine.train.test_training import DIGITS, run

# Of enough samples that a point which another rounding puts into the next cell decides nothing.
CHOOSING = TINY.replace("samples: 200", "samples: 8000").replace(
    "steps: 6, batch: 16, fake_updates: 2, log_every: 2",
    "steps: 10, batch: 16, lr: 0.02, lr_hold: 1.0, fake_updates: 1, log_every: 4, select: {every: 3, samples: 2000}",
)


class Lottery:
    """A distance that has nothing to do with the steps, and everything with the bits of the weights."""

    metric, samples = "lottery", 1

    def record(self) -> dict[str, Any]:
        return {"metric": self.metric, "protocol": "a hash"}

    def value(self, net: nn.Module) -> float | None:
        bits = b"".join(t.numpy().tobytes() for t in net.state_dict().values())
        return int.from_bytes(hashlib.sha256(bits).digest()[:4]) / 2**32


def trained(
    folder: Path, steps: int, *, evaluator: Any = None, every: int = 1, keep: int = 2, seconds: float = 0
) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """Train with a selection; return the weights that come of it, what was selected, and what was said."""
    said: list[str] = []
    stage = DmSettings(steps=max(steps, every + 1), select=SelectSettings(every=every, samples=2))
    evaluator, report = evaluator or Lottery(), lambda event: said.append(str(event))
    choosing = BestAverage(evaluator, stage, folder, keep=keep, what="t", group=SINGLE_PROCESS, report=report)
    settings = EdmSettings(steps=steps, batch=8, log_every=50, lr_hold=1.0)
    state = run(folder, settings, options=TrainOptions(checkpoint_seconds=seconds, keep=keep), selection=choosing)
    tensors, record = choosing.product(state, SINGLE_PROCESS)
    return tensors, record["selected"], said


def curve(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: next(iter(line["measured"].values())) for line in lines if "measured" in line}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_seconds(selected: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in selected.items() if name != "seconds"}


def given(*values: float | None) -> Any:
    """An evaluator that finds these values, whatever it is given."""
    found = iter(values)

    class ExportSource(Lottery):
        def value(self, net: nn.Module) -> float | None:
            return next(found)

    return ExportSource()


def test_the_least_of_the_curve_is_kept(tmp_path: Path) -> None:
    tensors, selected, _ = trained(tmp_path / "whole", 7, every=2, evaluator=given(3.0, 1.0, 2.0, 4.0))
    assert curve(tmp_path / "whole") == {2: 3.0, 4: 1.0, 6: 2.0, 7: 4.0}
    expected = {"step": 4, "metric": "lottery", "protocol": "a hash", "value": 1.0, "samples": 1, "of": 4, "last": 4.0}
    assert without_seconds(selected) == expected
    early, _, _ = trained(tmp_path / "early", 4, every=4)
    assert equal(tensors, early), "the average of that very step"
    last = load_tensors(tmp_path / "whole/state.safetensors")[0]
    assert not equal(tensors, {name: last[f"ema.{name}"] for name in tensors})
    _, numbers = load_tensors(tmp_path / "whole/best-4.safetensors")
    assert numbers == {"step": "4", "metric": "lottery", "value": "1.0", "samples": "1"}


def test_training_does_not_notice_that_it_is_measured(tmp_path: Path) -> None:
    class Rude(Lottery):
        def value(self, net: nn.Module) -> float | None:
            torch.rand(7)
            return super().value(net)

    trained(tmp_path / "measured", 6, evaluator=Rude(), every=2)
    run(tmp_path / "alone", EdmSettings(steps=6, batch=8, log_every=50, lr_hold=1.0))
    mine, theirs = (load_tensors(tmp_path / name / "state.safetensors")[0] for name in ("measured", "alone"))
    assert equal(mine, theirs)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    tensors, selected, _ = trained(folder, 12)
    return tensors, selected, folder


@pytest.mark.parametrize(("begun", "lost"), [(3, 0), (5, 1), (8, 2)])
def test_whatever_checkpoint_a_run_goes_on_from_it_chooses_the_same(
    undisturbed: Any, tmp_path: Path, begun: int, lost: int
) -> None:
    """The last `lost` checkpoints of an interrupted run are damaged: what was best after them is found again."""
    tensors, wanted, folder = undisturbed
    trained(tmp_path, begun, keep=3)
    for age in range(lost):
        path = tmp_path / (f"state.{age}.safetensors" if age else "state.safetensors")
        path.unlink()
        path.write_bytes(b"cut off")
    mine, selected, _ = trained(tmp_path, 12, keep=3)
    assert without_seconds(selected) == without_seconds(wanted)
    assert equal(mine, tensors)
    assert curve(tmp_path) == curve(folder)


@pytest.mark.parametrize("values", [[1.0, 2, 3, 4, 5, 6, 7, 8], [8.0, 7, 6, 5, 4, 3, 2, 1], [8.0, 1, 7, 2, 6, 3, 5, 4]])
def test_what_was_the_best_at_any_kept_checkpoint_is_there(tmp_path: Path, values: list[float]) -> None:
    """And what no checkpoint can bring back is removed; a process that goes on knows no less."""
    trained(tmp_path, 5, evaluator=given(*values[:5]))
    trained(tmp_path, 8, evaluator=given(*values[5:]))
    there = {int(path.stem.removeprefix("best-")) for path in tmp_path.glob("best-*")}
    for step in (7, 8):  # the checkpoints
        assert 1 + values.index(min(values[:step])) in there
    assert len(there) <= 4
    trained(tmp_path / "unsaved", 8, evaluator=given(*values), seconds=1000)
    assert [p.name for p in (tmp_path / "unsaved").glob("best-*")] == [f"best-{1 + values.index(1)}.safetensors"]


def test_of_equal_candidates_the_first_is_kept_and_what_is_not_finite_is_none(tmp_path: Path) -> None:
    _, selected, _ = trained(tmp_path, 5, evaluator=given(None, 2.0, 1.0, None, 1.0))
    assert (selected["step"], selected["of"], selected["last"]) == (3, 5, 1.0)


def test_where_nothing_can_be_measured_the_last_average_is_kept(tmp_path: Path) -> None:
    tensors, selected, said = trained(tmp_path, 3, evaluator=given(*[None] * 4))
    last = load_tensors(tmp_path / "state.safetensors")[0]
    assert equal(tensors, {name: last[f"ema.{name}"] for name in tensors})
    assert (selected["step"], selected["value"]) == (3, None)
    assert "the last one is kept" in said[-1]


def test_weights_of_the_best_that_are_lost_cost_only_themselves(tmp_path: Path) -> None:
    trained(tmp_path, 4, evaluator=given(4.0, 1.0, 3.0, 2.0))
    path = tmp_path / "best-2.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    _, selected, said = trained(tmp_path, 6, evaluator=given(6.0, 5.0))
    assert (selected["step"], selected["value"], selected["of"]) == (1, 4.0, 6), "the best whose weights are there"
    assert sum("the best average so far is lost" in line for line in said) == 1


def test_measuring_with_something_else_begins_anew(tmp_path: Path) -> None:
    class Other(Lottery):
        def record(self) -> dict[str, Any]:
            return super().record() | {"reference": 7}

    trained(tmp_path, 3)
    _, selected, said = trained(tmp_path, 5, evaluator=Other())
    assert selected["of"] == 2 and selected["step"] in (4, 5)
    assert any("what measures has changed" in line for line in said)


def test_measuring_does_not_count_as_training(tmp_path: Path) -> None:
    class Slow(AverageSelection):
        def after_step(self, state: TrainState) -> Evaluation | None:
            return Evaluation({"m": 1.0}, 1e6) if state.step == 2 else None

    state = run(tmp_path, EdmSettings(steps=4, batch=8, log_every=50), selection=Slow())
    assert -1e6 < state.cost["seconds"] < -9e5, "the time that an evaluation says it took is taken off"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4], "a line of its own, with its losses"
    assert "measured" not in lines[1] and lines[0]["measured"] == {"m": 1.0} and lines[0]["losses"]["student"] > 0


# Through the command line.


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that chose. Read it; do not change it."""
    return distilled(tmp_path_factory.mktemp("chosen"), CHOOSING)


def selected(run: Path, student: int = 0, stage: str = "0-dm") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / f"students/{student}/{stage}/model.json").read_text())
    return found["selected"]


def test_students_are_the_best_of_their_curves(chosen: Path) -> None:
    for k in (0, 1):
        folder = chosen / f"students/{k}/0-dm"
        values = curve(folder)
        assert list(values) == [3, 6, 9, 10]
        found = selected(chosen, k)
        assert (found["value"], found["last"], found["of"]) == (min(values.values()), values[10], 4)
        assert found["value"] == values[found["step"]] and found["metric"] == "l1_toy2d"
        weights = load_file(folder / "model.safetensors")
        assert equal(weights, load_file(folder / f"best-{found['step']}.safetensors"))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 10] and all(line["losses"] for line in lines)


def test_an_interrupted_run_chooses_the_same(chosen: Path, msd: Msd, tmp_path: Path) -> None:
    """The end of a stage is gone and the checkpoint before it is cut off: the run goes on from an older one."""
    shutil.copytree(chosen.parent, tmp_path / "runs")
    folder = tmp_path / "runs/tiny/students/0/0-dm"
    for name in ("model.json", "model.safetensors", "state.safetensors"):
        (folder / name).unlink()
    (folder / "state.safetensors").write_bytes(b"cut off")
    done = msd("distill", "runs/tiny", "--student", "0")
    assert done.returncode == 0, done.stderr
    assert "going on from the checkpoint before it, of step 9" in done.stderr
    assert without_seconds(selected(tmp_path / "runs/tiny")) == without_seconds(selected(chosen))
    assert (folder / "model.safetensors").read_bytes() == (chosen / "students/0/0-dm/model.safetensors").read_bytes()


def test_more_steps_choose_among_all(chosen: Path, msd: Msd, tmp_path: Path) -> None:
    shutil.copytree(chosen.parent, tmp_path / "runs")
    assert msd("distill", "runs/tiny", "stages.0.steps=14", "--student", "1").returncode == 0
    values = curve(tmp_path / "runs/tiny/students/1/0-dm")
    assert list(values) == [3, 6, 9, 10, 12, 14]
    found = selected(tmp_path / "runs/tiny", 1)
    assert (found["value"], found["of"], found["last"]) == (min(values.values()), 6, values[14])


def test_the_next_stage_goes_on_from_the_last_networks(msd: Msd, tmp_path: Path, tiny: Path) -> None:
    """A learning rate that leads astray: the first average is the best of that stage."""
    first = "{objective: dm, steps: 4, batch: 16, lr: 1.0, fake_updates: 1, ema: 0%s}"
    second = "{objective: cd, steps: 2, batch: 16}"
    for name, choice in (("with", ", select: {every: 1, samples: 500}"), ("without", "")):
        stages = f"stages=[{first % choice}, {second}]"
        assert msd("distill", "tiny.yaml", stages, "--student", "0", f"run=runs/{name}").returncode == 0
    runs = tmp_path / "runs"
    assert selected(runs / "with")["step"] < 4
    one, other = (runs / f"{name}/students/0/1-cd/model.safetensors" for name in ("with", "without"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", ["true", "false"])
def test_two_processes_choose_as_one(chosen: Path, tmp_path: Path, fsdp: str) -> None:
    (tmp_path / "tiny.yaml").write_text(CHOOSING)
    done = torchrun(tmp_path, "distill", "tiny.yaml", f"fsdp={fsdp}", "--student", "0")
    assert done.returncode == 0, done.stderr
    mine, theirs = (curve(run / "students/0/0-dm") for run in (tmp_path / "runs/tiny", chosen))
    assert mine == pytest.approx(theirs, abs=3e-3)  # a point at the border of a cell weighs 1e-3
    found, wanted = selected(tmp_path / "runs/tiny"), selected(chosen)
    assert (found["step"], found["of"], found["samples"]) == (wanted["step"], wanted["of"], wanted["samples"])
    model, other = (load_file(run / "students/0/0-dm/model.safetensors") for run in (tmp_path / "runs/tiny", chosen))
    assert all((model[name] - other[name]).abs().max() < 1e-4 for name in other)


def test_pictures_are_measured_as_the_run_is(msd: Msd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value of the student that came out is the distance of its samples, drawn and measured by hand."""
    train_classifier_briefly(monkeypatch, test_fid.SHORT)
    (tmp_path / "digits.yaml").write_text(test_fid.DIGITS)
    words = ("stages.0.steps=3", "stages.0.select.every=1", "stages.0.select.samples=130", "evaluation.batch=50")
    done = msd("distill", "digits.yaml", *words, "partition.parts=[[3, 5], [0, 1, 2, 4, 6, 7, 8, 9]]",
               "partition.method=explicit", "precision=bf16", "--student", "0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "student 0 dm: the average of step" in done.stderr
    folder = tmp_path / "runs/digits/students/0/0-dm"
    net, _ = load_model(folder)
    labels = DIGITS.labels(in_turn(DIGITS, range(len(DIGITS)))).tolist()
    classes = [c for c in labels if c in (3, 5)][:130]
    students = Students([folder], Partition([list(range(10))], 10, "explicit"), DIGITS.class_names, torch.device("cpu"))
    students.put(0, Generator(net, (2.5,)))
    samples = students.sample(classes, seed=derive("selection", 0))
    metric = classifier.Classifier((1, 8, 8), 10)
    metric.load_state_dict(load_file(tmp_path / "runs/digits/classifier/model.safetensors"))
    real = DIGITS.images([i for i in range(len(DIGITS)) if DIGITS.labels([i]).item() in (3, 5)])
    with torch.no_grad():
        mine, theirs = (moments(metric.eval().features(x)).gaussian() for x in (samples, real))
    found = selected(tmp_path / "runs/digits")
    assert found["metric"] == "fd_digits" and found["samples"] == 130
    assert found["value"] == pytest.approx(frechet_distance(mine, theirs), rel=1e-4)


def moments(features: torch.Tensor) -> Moments:
    found = Moments(features.shape[1])
    found.add(features)
    return found


def test_a_published_protocol_measures_pixels(msd: Msd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another network in the place of Inception: it sees what a saved picture would hold."""
    seen: list[torch.Tensor] = []

    def features(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.float().mean(1).flatten(1)[:, :9]

    network = FeatureNetwork("clean", features, device=torch.device("cpu"))
    monkeypatch.setattr(feature_metric, "open_network", lambda *_, **__: network)
    monkeypatch.setattr(examine, "open_network", lambda *_, **__: network)
    (tmp_path / "digits.yaml").write_text(test_fid.DIGITS)
    choice = "stages.0.select={every: 1, samples: 40, protocol: clean}"
    assert msd("distill", "digits.yaml", choice, "--student", "1").returncode == 0
    found = selected(tmp_path / "runs/digits", 1)
    assert (found["metric"], found["protocol"], found["of"]) == ("fid_clean", "clean", 2)
    assert all(x.dtype == torch.uint8 and x.shape[1:] == (3, 8, 8) for x in seen)
    assert sum(map(len, seen)) == len(DIGITS) + 2 * 40, "the reference once"


def test_a_protocol_without_its_weights_is_refused_at_the_start(
    msd: Msd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    (tmp_path / "digits.yaml").write_text(test_fid.DIGITS)
    done = msd("distill", "digits.yaml", "stages.0.select={every: 1, protocol: legacy-pytorch}")
    assert (done.returncode, "select: The weights pt_inception-2015-12-05" in done.stderr) == (2, True), done.stderr
    assert "--weights" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_everyone_is_told(chosen: Path, msd: Msd, tmp_path: Path) -> None:
    """The report, the terminal, a figure for papers and the model card."""
    shutil.copytree(chosen.parent, tmp_path / "runs")
    assert msd("report", "runs/tiny", "--no-pictures").returncode == 0
    page = (tmp_path / "runs/tiny/report.html").read_text()
    sentence = "Every student is the best of four averages that were measured while it trained, by l1_toy2d on 2,000"
    assert sentence in page and "dm: l1_toy2d while it trains" in page
    assert "l1 toy2d" in msd("watch", "runs/tiny", "--once").stdout
    assert msd("plot", "curves", "runs/tiny", "--out", "c.svg").returncode == 0
    assert "dm: l1_toy2d while it trains" in (tmp_path / "c.svg").read_text()
    assert msd("export", "runs/tiny").returncode == 0
    assert sentence in (tmp_path / "runs/tiny/export/bundle/README.md").read_text()
    planned = msd("distill", "runs/tiny", "--dry-run")
    assert "one student, select" in planned.stdout + planned.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stages.0.select.evry=2"], "stages.0.select.evry: no such key; did you mean `every`?"),
        (["stages.0.select.every=10"], "`select.every` 10 must be below `steps` 10"),
        (["stages.0.select.protocol=fid"], "stages.0.select.protocol"),
        (["stages.0.select.protocol=clean"], "points have no clean features"),
        (["stages=[{objective: tsm, select: {every: 1}}, {objective: dm}]"], "stages.0.select: no such key"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused(msd: Msd, tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "tiny.yaml").write_text(CHOOSING)
    done = msd("distill", "tiny.yaml", *words)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]


def test_prompts_have_no_measure(msd: Msd) -> None:
    done = msd("distill", "sd15-msd4", "--dry-run", "stages.0.select.every=10")
    assert (done.returncode, "select: prompts have no measure to choose by" in done.stderr) == (2, True), done.stderr


def test_another_way_to_choose_is_another_recipe(chosen: Path, msd: Msd, tmp_path: Path) -> None:
    shutil.copytree(chosen.parent, tmp_path / "runs")
    done = msd("distill", "runs/tiny", "stages.0.select.every=2")
    assert (done.returncode, "stages.0.select.every differ" in done.stderr) == (2, True)
