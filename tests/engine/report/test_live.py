"""`msd watch` shows a run from its files alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msdcli.engine.report.live import ProgressTracker
from msdcli.rundir import RunDir, lock
from tests.conftest import ROOT, Msd, command, environment


@pytest.fixture
def begun(finished: Path, tmp_path: Path) -> Path:
    """A run whose student 1 is at step 2 of 6 and held by nobody."""
    run = tmp_path / "runs" / "begun"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "metrics")
    stage = run / "students/1/0-dm"
    for file in (stage / "model.json", *stage.glob("state*")):
        file.unlink()
    line = {"step": 2, "losses": {"fake": 2.5, "student": None}, "images_per_second": 80.0, "skipped": {"fake": 3}}
    (stage / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 4, "los')
    long_ago = time.time() - 3600
    os.utime(stage / "metrics.jsonl", (long_ago, long_ago))
    return run


def test_a_finished_run_is_shown_and_ends_the_watch(finished: Path, msd: Msd) -> None:
    done = msd("watch", str(finished))
    assert done.returncode == 0, done.stderr
    assert "24 of 24 steps (100%)" in done.stdout and "the run has ended" in done.stdout
    result = json.loads((finished / "metrics/l1_toy2d.json").read_text())
    whole = next(r for r in result["rows"] if (r["who"], r["group"]) == ("students", "whole"))
    assert f"students {whole['values']['l1_toy2d']:.4g}" in done.stdout


def test_once_shows_what_runs_and_what_stands_still(begun: Path, msd: Msd) -> None:
    shown = msd("watch", str(begun), "--once").stdout
    row = next(line for line in shown.splitlines() if line.startswith("student 1"))
    assert "stopped" in row and "2/6" in row and "80" in row and "fake 2.5" in row and "3 skipped" in row
    assert "nobody is at work on it now" in shown
    with lock(begun / "students/1", "student 1"):
        row = next(r for r in msd("watch", str(begun), "--once").stdout.splitlines() if r.startswith("student 1"))
    assert "running" in row
    with lock(begun.parent / ".shared/pairs-x", "the pairs"):
        assert "somebody is at what runs share" in msd("watch", str(begun), "--once").stdout


def test_the_pace_is_what_was_seen(begun: Path) -> None:
    """Two steps in 20 seconds between two looks: two more are 20 seconds away."""
    path = begun / "students/1/0-dm/metrics.jsonl"
    watcher, now = ProgressTracker(RunDir(begun)), time.time()
    with lock(begun / "students/1", "student 1"):
        for step, at in ((2, now - 20), (4, now)):
            path.write_text(json.dumps({"step": step, "losses": {}}) + "\n")
            os.utime(path, (at, at))
            progress = watcher.progress()
    (part,) = progress.running
    assert part.seconds_left == pytest.approx(20, abs=0.1) and progress.seconds_left == part.seconds_left
    assert (part.step, progress.done) == (4, False)


def test_ctrl_c_leaves_quietly(begun: Path, tmp_path: Path) -> None:
    words = command("watch", str(begun), "--every", "0.1")
    env = environment(PYTHONUNBUFFERED="1")
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stdout is not None
    assert "steps" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, said) == (0, "")


def test_watching_loads_no_torch(finished: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from msdcli.cli.observe.watch import watch; "
        f"watch(Path({str(finished)!r}), once=True); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split()[-1] == "False", done.stderr


def test_what_is_no_run_is_refused(msd: Msd) -> None:
    assert msd("watch", "nowhere", "--once").returncode == 2
