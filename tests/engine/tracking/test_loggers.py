"""Loggers hold the figures that metrics.jsonl holds."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from msdcli.engine.tracking import loggers
from msdcli.engine.tracking.history import figures
from tests.conftest import Msd

SHORT = ("partition.students=2", "evaluation.samples=40")


def lines(folder: Path) -> dict[int, dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: figures(line) for line in found}


def test_tensorboard_has_the_figures_and_the_picture(msd: Msd, tiny: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = msd("distill", str(tiny), *SHORT, "loggers=[tensorboard]")
    assert done.returncode == 0, done.stderr
    run = tiny.parent / "runs/tiny"
    for name, objective, folder in (
        ("teacher", "edm", run / "teacher"),
        ("student-1", "dm", run / "students/1/0-dm"),
    ):
        events = EventAccumulator(str(run / "logs/tensorboard" / name), size_guidance={"scalars": 0})
        events.Reload()
        expected = lines(folder)
        for figure in ("losses.student", "images_per_second"):
            read = {e.step: e.value for e in events.Scalars(f"{objective}/{figure.replace('.', '/')}")}
            assert read == pytest.approx({step: values[figure] for step, values in expected.items()}, rel=1e-6)
    events = EventAccumulator(str(run / "logs/tensorboard/results"))
    events.Reload()
    stored = json.loads((run / "metrics/l1_toy2d.json").read_text())["rows"]
    whole = next(r["values"]["l1_toy2d"] for r in stored if (r["who"], r["group"]) == ("students", "whole"))
    assert events.Scalars("students/whole/l1_toy2d")[0].value == pytest.approx(whole)
    assert events.Images("samples")[0].encoded_image_string.startswith(b"\x89PNG")


class FakeWandB(types.ModuleType):
    """The documented calls of wandb, remembered."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", None)
        self.runs: list[FakeRun] = []

    def init(self, **options: Any) -> FakeRun:
        self.runs.append(FakeRun(options))
        return self.runs[-1]

    @staticmethod
    def Image(path: str) -> tuple[str, bytes]:
        return "image", Path(path).read_bytes()[:4]


class FakeRun:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.rows, self.axes, self.finished = options, list[dict[str, Any]](), dict[str, str](), False
        self.summary: dict[str, Any] = {}

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        if step_metric:
            self.axes[name] = step_metric

    def log(self, row: dict[str, Any]) -> None:
        assert not self.finished
        self.rows.append(row)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    module = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def test_wandb_is_offline_and_resumes_its_run(msd: Msd, tiny: Path, wandb: FakeWandB) -> None:
    """Every line once, over two commands on one run; a student has an axis of its own."""
    words = ("distill", str(tiny), *SHORT, "loggers=[wandb]")
    assert msd(*words, "--student", "0").returncode == 0
    assert msd(*words).returncode == 0
    first, second = wandb.runs
    assert first.options["mode"] == "offline" and first.options["config"]["name"] == "tiny"
    assert first.options["id"] == second.options["id"] and second.options["resume"] == "allow"
    assert first.finished and second.finished
    run = tiny.parent / "runs/tiny"
    rows = [*first.rows, *second.rows]
    for k in range(2):
        part = f"student-{k}/dm"
        mine = [row for row in rows if f"{part}/step" in row]
        read = {r[f"{part}/step"]: r[f"{part}/losses.fake"] for r in mine}
        assert read == {step: values["losses.fake"] for step, values in lines(run / f"students/{k}/0-dm").items()}
        assert len(read) == len(mine)
    assert second.axes["student-1/dm/*"] == "student-1/dm/step"
    assert rows[-1]["samples"] == ("image", b"\x89PNG")
    assert second.summary["students/whole/l1_toy2d"] > 0
    assert len(wandb.runs) == 2 and msd(*words).returncode == 0


def test_a_missing_library_is_said_before_anything_is_done(msd: Msd, tiny: Path, monkeypatch: Any) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None if name == "wandb" else there(name))
    done = msd("distill", str(tiny), "loggers=[wandb]")
    assert done.returncode == 2 and "wandb is not installed" in done.stderr and "msdcli[wandb]" in done.stderr
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny.yaml"]
