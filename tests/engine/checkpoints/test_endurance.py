"""Training cannot be killed: SIGKILL at random moments, full disks and damaged checkpoints cost time, never bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, command, environment
from tests.engine.train.test_distill import weights


def endure(folder: Path, kills: int, seed: int, recipe: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.checkpoints.endurance", str(folder), str(kills), str(seed), recipe],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize(("kills", "seed", "recipe"), [(10, 0, "dm"), (100, 1, "dm"), (10, 2, "family")])
def test_a_run_outlives_kills_full_disks_and_truncated_checkpoints(
    tmp_path: Path, kills: int, seed: int, recipe: str
) -> None:
    did = endure(tmp_path, kills, seed, recipe)
    assert did["kills"] == kills and did["finished runs"] >= 1
    if kills > 10:
        assert did["truncated checkpoints"] and did["full disks"] and did["fallbacks said"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_while_training_is_one_sentence_and_costs_nothing(
    small_disk: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY.replace("steps: 6,", "steps: 400,"))
    log = small_disk / "runs/tiny/students/0/0-dm/metrics.jsonl"

    def start(**where: str) -> subprocess.Popen[str]:
        words = command("distill", str(recipe), *(f"{k}={v}" for k, v in where.items()))
        return subprocess.Popen(words, cwd=small_disk, env=environment(), stderr=subprocess.PIPE, text=True)

    process = start()
    while not log.exists() or not log.read_text():
        time.sleep(0.01)
        assert process.poll() is None, process.stderr and process.stderr.read()
    with open(small_disk / "somebody else's", "wb") as file:
        for size in (65536, 512, 1):  # down to the last byte
            try:
                while True:
                    os.write(file.fileno(), b"x" * size)
            except OSError:
                continue
    _, said = process.communicate(timeout=100)
    assert process.returncode == 1, said
    assert said.count("no space left on the disk") == 1 and "the same command continues" in said
    assert "Traceback" not in said
    (small_disk / "somebody else's").unlink()
    again = start()
    _, said = again.communicate(timeout=200)
    assert again.returncode == 0, said
    reference = start(run=str(tmp_path / "whole/tiny"))
    _, said = reference.communicate(timeout=200)
    assert reference.returncode == 0, said
    assert weights(small_disk / "runs/tiny") == weights(tmp_path / "whole/tiny")
    assert not list(small_disk.rglob("*.tmp"))
