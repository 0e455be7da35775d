"""Whole runs on a card, through the command line: workers, a signal in the middle, samples, exports and distances."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from msdcli.metrics.evaluate import collect
from msdcli.metrics.frechet import frechet_distance
from msdcli.metrics.inception import TORCHSCRIPT, open_network
from tests.conftest import command, environment
from tests.engine.train.test_distill import weights

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda")
RECIPE = """
name: small
deterministic: true
checkpoint_seconds: 0
data: {name: digits}
teacher:
  network: {kind: unet, channels: 16, embedding: 32}
  training: {steps: 60, batch: 64, log_every: 20}
  solver: {steps: 4}
partition: {students: 2}
pairs: {count: 256, shard: 128}
stages:
  - {objective: dm, steps: 60, batch: 32, fake_updates: 2, pairs: shared, log_every: 20}
evaluation: {samples: 400, judge: off}
"""


def msd(*words: str, expect: int = 0) -> str:
    done = subprocess.run(command(*words), capture_output=True, text=True, env=environment(), timeout=280)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    """A run of two students, one after the other."""
    msd("distill", str(recipe), f"run={recipe.parent / 'one'}", "workers=1")
    return recipe.parent / "one"


def test_students_side_by_side_are_those_that_came_one_after_the_other(recipe: Path, run: Path) -> None:
    other = recipe.parent / "two"
    said = msd("distill", str(recipe), f"run={other}", "--students-per-device", "2")
    assert weights(other) == weights(run), said
    assert len(weights(run)) >= 3


def test_a_run_that_was_stopped_ends_with_the_same_bits(recipe: Path, run: Path) -> None:
    other, stopped = recipe.parent / "stopped", 0
    words = command("distill", str(recipe), f"run={other}", "workers=1")
    for wait in ("teacher", "students/0", "students/1"):
        process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        until = time.monotonic() + 120
        while not list((other / wait).rglob("metrics.jsonl")) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        stopped += process.returncode == 75
    msd("distill", str(recipe), f"run={other}", "workers=1")
    assert stopped, "no signal came in the middle"
    assert weights(other) == weights(run)


def test_samples_of_the_card_are_those_of_the_cpu(run: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        msd(
            "sample",
            str(run),
            "--all",
            "-n",
            "64",
            "--format",
            "npz",
            "--device",
            device,
            "--out",
            str(tmp_path / f"{device}.npz"),
        )
    found = [np.load(tmp_path / f"{d}.npz")["images"] for d in ("cpu", "cuda")]
    apart = np.abs(found[0].astype(int) - found[1].astype(int))
    assert apart.max() <= 3 and (apart > 1).mean() < 0.01, (apart.max(), (apart > 0).mean())


def test_a_compiled_export_runs_on_the_card(run: Path, tmp_path: Path) -> None:
    msd("export", str(run), "--format", "torch", "--aot", "--device", "cuda", "--out", str(tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["compiled_for"]["device"].startswith("cuda")
    assert record["max_difference"] <= record["tolerance"]


def test_a_distance_says_what_it_was_computed_in(run: Path) -> None:
    found = json.loads(msd("fid", str(run), "--json"))
    assert found["value"] > 0
    saved = json.loads(next((run / "metrics").glob("*.json")).read_text())
    wanted = "tf32" if torch.cuda.get_device_capability() >= (8, 0) else "float32"
    assert saved["computed_in"] == {"samples": wanted, "features": "float32"}


def test_a_card_that_is_not_here_is_refused(recipe: Path) -> None:
    count = torch.cuda.device_count()
    msd("distill", str(recipe), f"run={recipe.parent / 'none'}", f"device=cuda:{count}", expect=2)
    assert not (recipe.parent / "none").exists()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one card here")
def test_the_second_card_is_the_one_that_computes(recipe: Path, run: Path) -> None:
    other = recipe.parent / "second"
    msd("distill", str(recipe), f"run={other}", "device=cuda:1", "workers=1")
    assert weights(other) == weights(run)


def test_features_and_distances_of_the_card_are_those_of_the_cpu(tmp_path: Path) -> None:
    from msdcli.engine.bench.fid import save_inception

    save_inception(tmp_path / TORCHSCRIPT)
    rng = np.random.default_rng(0)
    pictures = [torch.from_numpy(rng.integers(0, high, (32, 3, 32, 32), dtype=np.uint8)) for high in (256, 200)]
    labels, distances, first = np.arange(32) % 3, [], []
    for device in ("cpu", "cuda"):
        network = open_network("clean", weights=tmp_path / TORCHSCRIPT, device=device)
        sides = [collect([(x.to(device), labels)], network, batch_size=32) for x in pictures]
        first.append(network.features(pictures[0][:16].to(device)).cpu())
        distances.append(frechet_distance(*(side.moments.whole() for side in sides)))
    assert float((first[0] - first[1]).norm() / first[0].norm()) < 1e-4
    assert distances[1] == pytest.approx(distances[0], rel=1e-3)
