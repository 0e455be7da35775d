"""What goes on beside the teacher: passed on, waited for, stopped, told where it fails, and the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msdcli.data import open_data
from msdcli.data.base import Dataset
from msdcli.diffusion.device_batch import PROCESSES
from msdcli.engine.distributed import workers
from msdcli.engine.distributed.group import SINGLE_PROCESS, ProcessGroup
from msdcli.engine.measure import ahead, fid
from msdcli.engine.tracking.events import Progress, silent
from msdcli.recipe import load
from msdcli.rundir import RunDir
from tests.conftest import Msd

CPU = torch.device("cpu")
DIGITS = """
name: x
threads: 1
data: {name: digits}
teacher: {network: {kind: unet, channels: 4, multipliers: [1], blocks: 1}, training: {steps: 1, batch: 8}}
pairs: {count: 8, shard: 8}
stages: [{objective: dm, steps: 1}]
evaluation: {samples: 40}
"""
SAYS = "import os, signal, sys, time\nsay = lambda b: os.write(int(os.environ['MSD_WORKER_REPORTS']), b)\n"


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start a short program in the place of msd; return a function that says which, and all that was started."""
    popen, started = subprocess.Popen, list[Any]()

    def put(program: str) -> list[Any]:
        def start(words: list[str], **options: Any) -> Any:
            assert words[-2:] == ["RUN", "--ahead"]
            started.append(popen([sys.executable, "-c", SAYS + program], **options))
            return started[-1]

        monkeypatch.setattr(subprocess, "Popen", start)
        return started

    return put


def beside(told: list[Any]) -> Any:
    return workers.beside(RunDir(Path("RUN")), ("--ahead",), CPU, told.append)


def test_it_is_passed_on_and_waited_for(process: Any) -> None:
    started, told = process("say(b'\"begun\"\\n'); time.sleep(0.2); say(b'\"done\"\\n')"), list[Any]()
    with beside(told) as report:
        report(Progress("teacher", 1, 2))
    assert started[0].returncode == 0
    assert told[-1] == "done" and "begun" in told and Progress("teacher", 1, 2) in told


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ("sys.stderr.write('error: it is yours to fix\\n'); os._exit(2)", "it is yours to fix"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "code -9"),
    ],
)
def test_its_failure_is_told_and_ends_nothing(process: Any, ends: str, said: str) -> None:
    process(ends)
    told = list[Any]()
    with beside(told):
        pass
    assert len(told) == 1 and told[0].startswith("made later") and said in told[0]


@pytest.mark.parametrize("obeys", [True, False])
def test_a_block_that_fails_stops_it(process: Any, monkeypatch: pytest.MonkeyPatch, obeys: bool) -> None:
    monkeypatch.setattr(workers, "LINGER", 5.0 if obeys else 0.2)
    does = "lambda *_: os._exit(130)" if obeys else "signal.SIG_IGN"
    started = process(f"signal.signal(signal.SIGINT, {does}); say(b'\"ready\"\\n'); time.sleep(60)")
    told = list[Any]()

    def interrupted() -> None:
        with beside(told) as report:
            while "ready" not in told:
                time.sleep(0.01)
                report("working")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert started[0].wait(5) == (130 if obeys else -signal.SIGKILL)


def test_where_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.yaml").write_text(DIGITS)
    recipe = load(tmp_path / "x.yaml", [f"run={tmp_path}/runs/x"])
    run, data = RunDir(recipe.run_dir), open_data(recipe.data)
    points = open_data(load("toy").data)

    def wanted(data: Dataset = data, on: torch.device = CPU, group: ProcessGroup = SINGLE_PROCESS) -> bool:
        return ahead.beside_teacher(run, recipe, data, on, group) is not nullcontext

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert wanted() and not wanted(points) and not wanted(on=torch.device("meta"))
    assert not wanted(group=SimpleNamespace(size=2))  # type: ignore[arg-type]
    monkeypatch.setattr(ahead, "is_complete", lambda _: True)
    assert not wanted(), "it is there"
    monkeypatch.setattr(ahead, "is_complete", lambda _: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert not wanted(), "there is no core for it"


@pytest.mark.parametrize(
    ("count", "left", "students", "draws"),
    [(2, 1, 5, True), (2, 2, 5, False), (2, 0, 5, False), (2, 1, 4, False), (1, 1, 5, False), (4, 1, 5, True)],
)
def test_a_worker_without_a_student_draws_the_teachers_samples(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int, left: int, students: int, draws: bool
) -> None:
    asked = list[RunDir]()
    monkeypatch.setattr(fid, "prepare_teacher", lambda run, _: asked.append(run))
    monkeypatch.setenv(PROCESSES, str(count))
    recipe = load("digits", [f"partition.students={students}", "device=cpu"])
    ahead.of_teacher(RunDir(tmp_path), recipe, left, silent)
    assert len(asked) == draws


@pytest.mark.slow
def test_the_bits_of_one_process(msd: Msd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher of a step is done long before the classifier, which is waited for and used."""
    found = list[dict[str, bytes]]()
    for cores in ({0}, {0, 1}):
        folder = tmp_path / str(len(cores))
        folder.mkdir()
        monkeypatch.chdir(folder)
        Path("x.yaml").write_text(DIGITS)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        done = msd("distill", "x.yaml", "--teacher")
        assert done.returncode == 0, done.stderr
        shared = Path("runs/.shared")
        files = [*shared.glob("classifier-*/model.safetensors"), *shared.glob("features-*/features.npz")]
        found.append({str(path): path.read_bytes() for path in files})
    assert len(found[0]) == 3 and found[0] == found[1]
