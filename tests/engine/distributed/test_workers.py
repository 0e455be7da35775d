"""Several students at once: how many processes, on which devices, with how many threads, and who else may say so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from msdcli.engine.distributed import device, workers
from msdcli.engine.tracking.events import Progress
from msdcli.errors import UserError
from msdcli.recipe import Recipe, load
from msdcli.rundir import RunDir
from tests.conftest import ROOT, TINY, Msd
from tests.engine.train.test_distill import weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def recipe(**keys: object) -> Recipe:
    return load("digits").model_copy(update={"threads": None} | keys)  # 5 students


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_one_process_per_gpu_or_per_share_of_the_cores(monkeypatch: pytest.MonkeyPatch, four_gpus: None) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert device.num_workers(recipe(), CUDA) == 4
    assert device.num_workers(recipe(), torch.device("cuda:1")) == 1, "one was named"
    assert device.num_workers(recipe(threads=2), CPU) == 3
    assert device.num_workers(recipe(threads=1), CPU) == 5, "there are no more students"
    assert device.num_workers(recipe(), CPU) == 1, "one process takes all cores"
    assert device.num_workers(recipe(workers=2), CUDA) == 2


def test_students_per_device_are_that_many_processes_on_each(monkeypatch: pytest.MonkeyPatch, four_gpus: None) -> None:
    assert device.with_students_per_device(recipe(device="cuda"), 2).workers == 8
    assert device.with_students_per_device(recipe(device="cuda:3"), 2).workers == 2
    assert device.with_students_per_device(recipe(device="cpu", workers=7), 2).workers == 2
    given = [workers._environment(i, 8, CUDA)["CUDA_VISIBLE_DEVICES"] for i in range(8)]
    assert given == ["0", "1", "2", "3", "0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [workers._environment(i, 3, CUDA)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["5", "7", "5"]


def test_cores_are_shared_out_where_nothing_says_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert [device.share_of_threads(recipe(), CPU, n) for n in (2, 4, 9)] == [3, 1, 1]
    assert device.share_of_threads(recipe(threads=4), CPU, 2) is None
    assert device.share_of_threads(recipe(), CUDA, 2) is None
    assert "OMP_NUM_THREADS" not in workers._environment(0, 2, CPU)
    assert workers._environment(0, 2, CPU, 3)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert device.share_of_threads(recipe(), CPU, 2) is None, "the user has said it"


def test_students_per_device_train_what_one_after_the_other_does(
    finished: Path, msd: Msd, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the cores shared out: this process has one thread, so each of the two has one, and the bits are the same."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    tiny.write_text(TINY.replace("threads: 1\n", ""))
    done = msd("distill", "tiny.yaml", "--students-per-device", "2")
    assert done.returncode == 0, done.stderr
    assert "2 processes of one thread each share the CPU" in done.stderr
    assert load(tiny.parent / "runs/tiny").workers == 2
    assert weights(tiny.parent / "runs/tiny") == weights(finished)


@pytest.mark.parametrize(
    ("words", "other"),
    [
        (("--student", "1"), "--student"),
        (("--worker",), "--worker"),
        (("workers=3",), "workers=..."),
        ((), "torchrun"),
    ],
)
def test_two_answers_to_who_trains_what_are_refused(
    msd: Msd, tiny: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], other: str
) -> None:
    if other == "torchrun":
        monkeypatch.setenv("WORLD_SIZE", "2")
    done = msd("distill", "tiny.yaml", "--students-per-device", "2", *words)
    assert done.returncode == 2
    assert f"--students-per-device and {other} do not go together" in done.stderr
    assert not (tiny.parent / "runs").exists()


def test_a_plan_says_how_many(msd: Msd, tiny: Path) -> None:
    done = msd("distill", "tiny.yaml", "--students-per-device", "2", "--dry-run", "--recipe")
    assert done.returncode == 0, done.stderr
    assert "workers: 2" in done.stdout
    assert msd("distill", "tiny.yaml", "--students-per-device", "0").returncode == 2


NOISY = """
import json, os, sys
print("a library's banner")
os.write(1, b"onednn_verbose,info\\n{}\\n")
from msdcli.engine.distributed.workers import to_parent
from msdcli.engine.tracking.events import Progress
report = to_parent()
report("a sentence")
os.write(int(sys.argv[1]) if len(sys.argv) > 1 else 1, b"[1]\\n")
report(Progress("student 0", 1, 2))
if os.fork() == 0:  # what a library leaves running
    import time
    time.sleep(60)
sys.stderr.write("warning: something\\nerror: it is yours to fix\\n")
os._exit(2)
"""


def test_what_a_library_prints_is_no_report_and_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "LINGER", 0.2)
    popen = subprocess.Popen
    started = []

    def noisy(words: list[str], **options: Any) -> Any:
        started.append(popen([sys.executable, "-c", NOISY], **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noisy)
    told: list[Any] = []
    environment = {"PYTHONPATH": str(ROOT)}
    monkeypatch.setattr(workers, "_environment", lambda *_: dict(os.environ) | environment)
    try:
        with pytest.raises(UserError, match=r"^it is yours to fix$"):
            workers.run(RunDir(tmp_path), 1, CPU, told.append)
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
    assert told == ["a sentence", Progress("student 0", 1, 2)]


@pytest.mark.parametrize("line", [b"", b"x\n", b"\xff\n", b"[1]\n", b"{}\n", b'{"what": 1, "more": 2}\n', b"null\n"])
def test_a_line_that_is_no_report_is_none(line: bytes) -> None:
    assert workers._decode(line) is None
