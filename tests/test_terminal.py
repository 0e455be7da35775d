"""A terminal of any width, a log, a second terminal beside a run, and signals at any time."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Group

import msdcli
from msdcli import console, errors
from msdcli.cli.docs import find
from msdcli.cli.observe.watch import render
from msdcli.engine.distributed.interrupt import _answer
from msdcli.engine.report.live import ProgressTracker
from msdcli.engine.tracking.events import Progress, answering
from msdcli.engine.tracking.presence import attending, who_attends
from msdcli.metrics.planar import sliced_wasserstein
from msdcli.recipe import load
from msdcli.rundir import RunDir
from tests.conftest import ROOT, environment


def a_terminal(width: int, height: int = 25) -> console._Console:
    settings = {"highlight": False, "soft_wrap": True, "force_terminal": True, "color_system": None}
    return console._Console(file=io.StringIO(), width=width, height=height, **settings)  # type: ignore[arg-type]


def text_of(of: console._Console) -> str:
    assert isinstance(of.file, io.StringIO)
    return of.file.getvalue()


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunDir:
    shutil.copytree(finished.parent, tmp_path / "runs")
    return RunDir(tmp_path / "runs" / "tiny")


# Widths.


@pytest.mark.parametrize("width", [50, 100])
def test_a_narrow_terminal_cuts_what_comes_last(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(width)
    monkeypatch.setattr(console, "out", terminal)
    console.table("t", ["name", "K", "costs"], [["imagenet64-msd4-fdistill", "4", "very long " * 20]], whole=2)
    lines = text_of(terminal).splitlines()
    assert len(lines) == 6 and max(map(len, lines)) <= width
    assert "│ imagenet64-msd4-fdistill │ 4 │" in lines[4].replace("  ", " ").replace("  ", " ") and "…" in lines[4]


def test_on_paper_nothing_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("t", ["name", "costs"], [["a", "long " * 60 + "end"]], whole=1)
    assert "long end" in capsys.readouterr().out


def test_sentences_break_between_words_and_commands_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = a_terminal(40), a_terminal(40)
    monkeypatch.setattr(console, "out", out)
    monkeypatch.setattr(console, "err", err)
    words = " ".join(f"word{i:02d}" for i in range(30))
    console.say_prose(words)
    console.fail(words, f"msd {words}")
    assert max(len(line) for line in text_of(out).splitlines()) <= 40 and text_of(out).split() == words.split()
    assert f"msd {words}" in text_of(err)


# Live lines.


def test_live_lines_have_room_a_total_and_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(100, height=9)
    monkeypatch.setattr(console, "err", terminal)
    with console.Monitor() as monitor:
        for k in range(8):
            monitor(Progress(f"student {k} dm", 2, 4 if k == 7 else 2, "steps", {"fake": 0.5}, 10.0, 200.0))
        monitor.total(600.0)
        _answer("stopping after this step")
        assert monitor._live is not None
        page = a_terminal(100)
        page.print(Group(*monitor._live.get_renderables()))
    assert not answering
    lines = [line.rstrip() for line in text_of(page).splitlines()]
    assert [line[:12] for line in lines[:-2]] == [f"student {k} dm" for k in range(3, 8)]
    assert "took" in lines[3] and lines[4].endswith("3 min left fake loss 0.5, 10 images/s")
    assert lines[-2:] == ["the whole training: about 10 min left", "stopping after this step"]


def test_the_same_work_of_the_next_run_begins_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    monitor = console.Monitor(every=0.0)
    for done in (0, 50, 100, 0, 50):  # the second run of a sweep begins an hour later
        monitor(Progress("student 0 dm", done, 100, "steps"))
        now += 3600.0 if done == 100 else 10.0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("5 steps/s, ")[2] for line in lines if "50/100" in line] == ["10 s left"] * 2

    monkeypatch.setattr(console, "err", a_terminal(100))
    with console.Monitor() as live:
        for done in (0, 100, 0):
            live(Progress("student 0 dm", done, 100, "steps"))
        assert live._live is not None and not live._live.tasks[0].finished


def test_a_log_says_less_the_longer_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    monitor = console.Monitor()
    assert monitor._pause(5.0) == 5.0
    monitor._begun -= 36_000
    assert monitor._pause(5.0) == pytest.approx(600, abs=1)
    for _ in range(3):
        monitor.total(100.0)
    assert capsys.readouterr().err.count("whole training") == 1
    assert [console._rate(x) for x in (0.0123456, 12.345, 17_000.4)] == ["0.0123", "12.3", "17,000"]


# A second terminal.


def test_who_is_at_work_between_the_parts_is_seen(run: RunDir) -> None:
    for folder in (run.students, run.metrics):
        shutil.rmtree(folder)
    assert who_attends(run) == [] and msdcli.status(run.root)["state"] == "stopped"
    with attending(run) as presence:
        assert presence.alone()
        state, progress = msdcli.status(run.root), ProgressTracker(run).progress()
    assert state["state"] == "running" and not state["resumable"] and state["at_work"][0].startswith("process ")
    shown = a_terminal(120)
    shown.print(render(progress, height=40, width=120))
    assert f"{state['at_work'][0]} is at what students share" in text_of(shown)
    assert who_attends(run) == []


def test_who_measures_finished_students_is_seen(run: RunDir) -> None:
    shutil.rmtree(run.metrics)
    assert msdcli.status(run.root)["shared"][-1]["state"] == "waiting"
    with attending(run):
        assert msdcli.status(run.root)["shared"][-1]["state"] == "running"
        assert not ProgressTracker(run).progress().done


def test_a_checkpoint_without_a_line_is_a_stopped_part(run: RunDir) -> None:
    stage = run.stage(1, 0, "dm")
    for name in ("model.json", "metrics.jsonl"):
        (stage / name).unlink()
    found = msdcli.status(run.root)["students"][1]["stages"][0]
    assert (found["state"], found["step"]) == ("stopped", 6)
    (part,) = [p for p in ProgressTracker(run).progress().parts if p.student == 1]
    assert (part.state, part.step) == ("stopped", 6)


def test_the_pace_is_that_of_training(run: RunDir) -> None:
    stage = run.stage(1, 0, "dm")
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    (stage / "metrics.jsonl").write_text(json.dumps(lines[0] | {"step": 2, "seconds": 60.0}) + "\n")
    (training,) = [t for t in ProgressTracker(run).progress().parts if t.student == 1]
    assert training.seconds_left is None  # done


# Refusals.


def test_the_ready_command_has_all_that_was_asked_for(run: RunDir) -> None:
    there = run.recipe()
    words = ["stages.0.lr=0.5", "stages.0.steps=9", "evaluation.samples=123", "keep=3"]
    wanted = load(run.recipe_file, words)
    with pytest.raises(errors.UserError) as refused:
        run.check(wanted)
    given = (refused.value.hint or "").split()
    assert given[:2] == ["msd", "distill"]
    made = load(given[2], given[3:])
    ours, theirs = wanted.dump(), made.dump()
    assert made.name == "tiny-2" and there.name == "tiny"
    assert {k for k in ours if ours[k] != theirs[k]} <= {"name", "run"}


def test_no_word_is_about_no_page() -> None:
    assert find("") == [] == find("  ")


# Signals.


def test_a_scheduler_is_met_from_the_start_and_only_once() -> None:
    code = (
        "import os, signal, msdcli.cli as c\n"
        "@c.app.command('work')\n"
        "def work(): os.kill(os.getpid(), signal.SIGTERM)\n"
        "tell = c.console.tell\n"
        "c.console.tell = lambda text: (os.kill(os.getpid(), signal.SIGTERM), tell(text))\n"
        "c.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "work"], env=environment(), capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (75, "stopped; the same command continues\n")


# What is fast.


@pytest.mark.parametrize("sizes", [(10, 7), (300, 300), (40, 1000)])
def test_sorting_by_directions_changes_no_bit(sizes: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(n, 2, generator=generator) for n in sizes)
    angles = torch.arange(128, dtype=torch.float64) * (torch.pi / 128)
    directions = torch.stack([angles.cos(), angles.sin()])
    pa, pb = ((points.double() @ directions).sort(dim=0).values for points in (a, b))
    ranks = (torch.arange(max(sizes), dtype=torch.float64) + 0.5) / max(sizes)
    qa, qb = (p[(ranks * len(p)).long().clamp(max=len(p) - 1)] for p in (pa, pb))
    assert sliced_wasserstein(a, b) == float((qa - qb).square().mean().sqrt())


# A notebook.


def test_a_notebook_has_one_output_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ipykernel's `display` with an identity gives a handle whose `update` replaces what stands there."""
    outputs: list[dict[str, str]] = []

    class Handle:
        def update(self, shown: dict[str, str], *, raw: bool) -> None:
            assert raw
            outputs[0] = shown

    def display(shown: dict[str, str], *, raw: bool, display_id: bool) -> Handle:
        assert raw and display_id
        outputs.append(shown)
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr(console, "err", console._Console(file=io.StringIO(), force_jupyter=True))
    monkeypatch.setattr(console._NotebookBars, "PAUSE", 0.0)
    with console.Monitor() as monitor:
        assert outputs == []  # nothing to show yet
        monitor("[bold]precision[/]: float32 <tiny>")
        for k in range(9):
            for done in range(3):
                monitor(Progress(f"student {k} dm", done, 2, "steps", {"fake": 0.5}))
                assert f"{done}/2" in outputs[0]["text/plain"]
        monitor.total(600.0)
        _answer("stopping after this step")
        monitor(Progress("student 8 dm", 2, 2))
        assert "about 10 min left" in outputs[0]["text/plain"]
    assert len(outputs) == 1 and not answering
    lines = outputs[0]["text/plain"].splitlines()
    assert lines[0] == "[bold]precision[/]: float32 <tiny>" and lines[-1] == "stopping after this step"
    assert [line[:12] for line in lines[1:-1]] == [f"student {k} dm" for k in range(3, 9)]
    assert "&lt;tiny&gt;" in outputs[0]["text/html"] and "color: #" in outputs[0]["text/html"]
