"""The verbs as functions, and a loss without the engine."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch

import msdcli
from msdcli.diffusion.denoiser import Denoiser, one_step
from msdcli.diffusion.draws import Batch
from msdcli.engine.export.format import ExportOptions
from msdcli.engine.measure.feature_metric import FidOptions
from msdcli.engine.measure.rows import Measurement, Row
from msdcli.engine.measure.teacher import Verdict
from msdcli.engine.results import DistillResult, TeachResult
from msdcli.engine.sample import Students
from msdcli.errors import UserError, in_python
from msdcli.objectives import dm, edm
from msdcli.objectives.consistency import cd
from msdcli.recipe import load, load_any
from msdcli.recipe.stages import CdSettings, EdmSettings
from msdcli.rundir import RunDir
from tests.conftest import Msd


def test_from_a_recipe_to_samples_and_figures_in_python(tiny: Path, msd: Msd, capsys: pytest.CaptureFixture) -> None:
    run = msdcli.distill(tiny, seed=3, teacher={"solver": {"steps": 3}}, **{"stages.0.steps": 2})
    assert capsys.readouterr() == ("", "")
    assert run.run.recipe().seed == 3 and run.run.recipe().stages[0].steps == 2
    assert run.run.recipe().teacher.solver.steps == 3 and run.run.recipe().teacher.network.channels == 16
    images = msdcli.sample(run, [3, "moons"], seed=5)
    assert torch.equal(images, msdcli.load(run).sample([3, 2], seed=5))
    measured = msdcli.fid(run, samples=100)
    assert measured.whole("students")["l1_toy2d"] > 0 and measured.record["samples"] == 100
    given = msdcli.export(run, out="given", bench=False)
    assert torch.equal(msdcli.load(given["folder"]).sample([0, 7]), msdcli.load(run).sample([0, 7]))


def test_progress_is_told_when_asked(tiny: Path, msd: Msd, capsys: pytest.CaptureFixture) -> None:
    heard: list[Any] = []
    msdcli.distill(tiny, only=1, report=heard.append)
    assert any(getattr(event, "what", "") == "student 1 dm" for event in heard)
    msdcli.distill(tiny, only=0, report=True)
    assert "student 0 dm: 6/6 steps" in capsys.readouterr().err


def test_a_recipe_is_a_file_a_name_a_dictionary_or_a_recipe(tiny: Path, tmp_path: Path) -> None:
    digits = load("digits")
    assert load_any("digits", {}) == digits == load_any(digits, {})
    tree = {"name": "mine", "data": {"name": "digits"}, "stages": [{"objective": "dm"}]}
    mine = load_any(tree, {"student": {"width": 0.5}, "stages.0.batch": 8})
    assert (mine.student.width, mine.stages[0].batch, mine.name) == (0.5, 8, "mine")
    assert tree["stages"] == [{"objective": "dm"}]
    assert load_any(tiny, {"data": {"points": 900}}).data.points == 900
    for wrong, said in (({"sede": 1}, "sede"), ({"stages.7.steps": 1}, "'7' does not name an item")):
        with pytest.raises(UserError, match=said):
            load_any("digits", wrong)
    with pytest.raises(UserError, match="no name"):
        load_any({k: v for k, v in tree.items() if k != "name"}, {})


def test_options_that_do_not_exist_are_refused(finished: Path) -> None:
    with pytest.raises(TypeError, match="no option 'smples'"):
        msdcli.fid(finished, smples=3)
    with pytest.raises(TypeError, match="no option 'precison'"):
        msdcli.export(finished, precison="int8")
    with pytest.raises(UserError, match="class 'moon' does not exist"):
        msdcli.sample(finished, ["moon"])


def test_pictures_in_files_are_measured_too(fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = fixtures / "fid"
    options = {"weights": folder / "inception-2015-12-05.pt", "samples": 24, "batch": 24}
    found = msdcli.fid(folder / "a.zip", folder / "b.zip", **options)
    row = found.row("images")
    assert (row.samples, row.reference, found.protocol) == (24, 240, "clean")
    assert 0 < row.values["fid"] < 1000 and len(found.record["weights_sha256"]) == 64


def test_a_limit_bounds_what_is_in_memory(finished: Path) -> None:
    students = msdcli.load(finished)
    wanted = students.sample([0, 7, 1, 6])
    students.max_resident = 1
    assert torch.equal(students.sample([0, 7, 1, 6]), wanted) and len(students._loaded) == 1


def test_the_losss_example_runs() -> None:
    result = doctest.testmod(dm)
    assert result.attempted > 10 and result.failed == 0


class Net(torch.nn.Module):
    """Somebody else's network."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(7, 64), torch.nn.Linear(64, 2)

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        h = torch.cat([x, c_noise[:, None], torch.nn.functional.one_hot(c, 4)], dim=1)
        return self.outer(torch.nn.functional.silu(self.inner(h)))


def train(objective: Any, batches: int, lr: float, pairs: Any = None) -> list[float]:
    """Somebody else's loop."""
    optimizers = {name: torch.optim.Adam(net.parameters(), lr=lr) for name, net in objective.nets.items()}
    losses = []
    for step in range(batches):
        c = torch.randint(4, (256,))
        y = 0.1 * torch.randn(256, 2) + torch.stack([c % 2, c // 2], dim=1) - 0.5
        for names, loss in objective.turns(step):
            value = loss(Batch(y, c, pairs=pairs)).mean()
            value.backward()
            for name in names:
                optimizers[name].step()
            for optimizer in optimizers.values():
                optimizer.zero_grad()
        losses.append(value.item())
    return losses


def test_losses_learn_in_somebody_elses_loop() -> None:
    """A teacher of four clusters, then a one-step student by consistency: samples land in their cluster."""
    torch.manual_seed(0)
    teacher = Denoiser(Net(), shape=(2,), num_classes=4)
    losses = train(edm.DenoisingScoreMatching(EdmSettings(), teacher, None), 300, 3e-3)
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    student = Denoiser(Net(), shape=(2,), num_classes=4)
    student.load_state_dict(teacher.state_dict())
    settings = CdSettings(sigma_init=5.0, levels=8)
    train(cd.ConsistencyDistillation(settings, student, teacher.requires_grad_(False)), 300, 1e-3)
    c = torch.arange(400) % 4
    with torch.no_grad():
        y = one_step(student, torch.randn(400, 2), settings.sigma_init, c)
    centres = torch.stack([c % 2, c // 2], dim=1) - 0.5
    assert ((y - centres).abs().max(dim=1).values < 0.5).float().mean() > 0.9


def test_hints_are_notes_in_pythons_words(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        msdcli.load(finished).sample(prompts=["a fox"])
    assert refused.value.__notes__ == ["try: classes=[3, 7]"]
    with pytest.raises(ValueError, match=r"does not end in \.html") as named:
        msdcli.report(finished, out=tmp_path / "r.txt")
    assert named.value.__notes__ == [f'try: out="{tmp_path}/r.html"'] and not any(tmp_path.iterdir())
    for hint, said in (
        ("--format torch --aot", 'format="torch" aot=True'),
        ("a new file with --out; or --steps 4.", "a new file with `out`; or steps=4."),
        ("msd fid a --per-class, or --group 'my set=0,2'", 'msd fid a --per-class, or groups=["my set=0,2"]'),
        ("--prompt or --seed", "`prompts` or `seed`"),
    ):
        assert in_python(hint) == said


def test_every_hint_is_one_in_python_too() -> None:
    """An option in a hint is followed by its value or by no word, and is a keyword of a function here."""
    functions = (msdcli.sample, msdcli.load, msdcli.report, msdcli.import_teacher, msdcli.export, Students.sample)
    known = {name for function in functions for name in inspect.signature(function).parameters}
    known |= {*FidOptions.__dataclass_fields__, *ExportOptions.__dataclass_fields__}
    known |= {"to", "nproc_per_node"}  # of `msd push` and of torchrun, which no function is
    found = []
    for path in (Path(msdcli.__file__).parent).rglob("*.py"):
        if "cli" in path.parts[path.parts.index("msdcli") + 1 :]:
            continue
        for keyword in ast.walk(ast.parse(path.read_text())):
            if isinstance(keyword, ast.keyword) and keyword.arg == "hint":
                found += [(path.name, text) for text in _texts(keyword.value) if "--" in text]
    assert len(found) > 25
    for where, text in found:
        said = re.sub(r"\bmsd [^,;()]*", "", in_python(text))
        names = re.findall(r"(\w+)=|`(\w+)`", re.sub(r"\"[^\"]*\"", "...", said))
        assert names or "msd " in text, (where, text)
        assert "--" not in said and {a or b for a, b in names} <= known, (where, text, said)
        values = re.findall(r'="([^"]*)"', said)
        assert not {"names", "another", "of", "if", "takes", "where", "has"} & set(values), (where, text, said)


def _texts(node: ast.expr) -> Iterator[str]:
    """Yield the texts of an expression; what is filled in is a word."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "WORD" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.expr):
                yield from _texts(inner)


def test_what_does_not_exist_is_refused_at_once(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="figure 'curvs' does not exist: there are toy, curves, table, frontier"):
        msdcli.plot("curvs", finished, out=tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="figures are"):
        msdcli.plot("curves", finished, out=tmp_path / "a.txt")
    for steps in (7, 0):
        with pytest.raises(ValueError, match=f"steps {steps}: these students have 1"):
            msdcli.load(finished, steps=steps)
    assert not any(tmp_path.iterdir())


def test_what_is_returned_says_what_it_is_in_a_line(finished: Path) -> None:
    assert repr(msdcli.load(finished)) == "Students(2 for 8 classes, torch on cpu)"
    assert repr(msdcli.partition(finished)).startswith("Partition(2 students by ")
    measured = Measurement("fd", "mine", [Row("students", "whole", 4, 4, {"fd": 0.123456})] * 3, {})
    assert repr(measured) == "Measurement(fd: students 0.1235, students 0.1235, students 0.1235; 3 rows)"
    result = DistillResult(RunDir(Path("runs/a")), measured, None, [1])
    assert repr(result) == f"DistillResult('runs/a', {measured}, unfinished students [1])"
    taught = TeachResult(RunDir(Path("runs/a")), measured, Verdict("fit", "It is."), Path("teacher.png"))
    assert repr(taught) == f"TeachResult('runs/a', fit, {measured})"
    assert Measurement.of_json(measured.to_json()) == measured


def test_the_manuals_other_verbs_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a run on one; a teacher is imported and distilled elsewhere in the tests, here the calls are bound."""
    page = (Path(msdcli.__file__).parent / "docs" / "4-samples.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "import_teacher" in b)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished.parent, tmp_path / "runs")
    (tmp_path / "runs" / finished.name).rename(tmp_path / "runs" / "digits")
    summary = {"folder": "teachers/img64"}
    monkeypatch.setattr(msdcli, "import_teacher", create_autospec(msdcli.import_teacher, return_value=summary))
    monkeypatch.setattr(msdcli, "distill", lambda recipe, **keys: load_any(recipe, keys))
    said: dict[str, Any] = {"msdcli": msdcli}
    exec(block, said)
    assert said["page"].read_text(encoding="utf-8").startswith("<!") and said["figure"].stat().st_size > 1000
    assert said["run"].teacher.path == "teachers/img64"
