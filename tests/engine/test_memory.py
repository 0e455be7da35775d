"""No device is asked for more images than `micro_batch`, where it trains, or `evaluation.batch`, where it samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine import pipeline, sample
from msdcli.engine.bench import recipe as bench
from msdcli.engine.measure import fid
from msdcli.engine.measure.feature_metric import FidOptions
from msdcli.engine.report import report as reports
from msdcli.engine.tracking.events import silent
from msdcli.engine.train import loop, precision
from msdcli.recipe import load
from msdcli.rundir import RunDir

RECIPE = """
name: small
threads: 1
data: {name: toy2d, points: 400}
teacher: {network: {kind: mlp, channels: 4, blocks: 1}, training: {steps: 2, batch: 6}, solver: {steps: 2}}
partition: {students: 2}
pairs: {count: 250, shard: 250}
stages: [{objective: dm, steps: 2, batch: 6, fake_updates: 1, pairs: shared, select: {every: 1, samples: 250}}]
evaluation: {samples: 250, batch: 200}
micro_batch: 3
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The images of every call of a denoiser, those of a training step apart; calls on the meta device cost nothing."""
    sizes: dict[str, list[int]] = {"training": [], "sampling": []}
    kind, forward, gradients = ["sampling"], Denoiser.forward, loop.gradients

    def noted(net: Denoiser, x: Tensor, *rest: Any) -> Tensor:
        if not x.is_meta:
            sizes[kind[-1]].append(len(x))
        return forward(net, x, *rest)

    def training(*args: Any) -> Tensor:
        kind.append("training")
        try:
            return gradients(*args)
        finally:
            kind.pop()

    monkeypatch.setattr(Denoiser, "forward", noted)
    monkeypatch.setattr(loop, "gradients", training)
    return sizes


def recipe(tmp_path: Path, *words: str) -> Any:
    (tmp_path / "small.yaml").write_text(RECIPE)
    return load(tmp_path / "small.yaml", [f"run={tmp_path / 'runs' / 'small'}", *words])


def test_a_run_from_training_to_its_report(tmp_path: Path, asked: dict[str, list[int]]) -> None:
    run = pipeline.distill(recipe(tmp_path), silent).run
    assert max(asked["training"]) == 3
    assert max(asked["sampling"]) == 200, "pairs, references, candidates, samples and the preview"
    asked["sampling"].clear()
    reports.write([run.root], tmp_path / "report.html", silent)
    sample.load(run.root).sample([0] * 250)
    fid.measure(RunDir(run.root), silent, FidOptions(batch=150))
    assert max(asked["sampling"]) == 200


def test_measurements_of_speed(tmp_path: Path, asked: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "TINY_FLOPS", 0)
    monkeypatch.setattr(precision, "SECONDS", {"cpu": 0.05})
    figures = bench.bench(recipe(tmp_path, "evaluation.batch=2"), silent, repeats=1)
    assert (figures["stages"][0]["batch"], figures["sampling"]["batch"]) == (6, 2)
    assert max(asked["sampling"]) == 3, "networks are timed with what a device takes at once"


def test_samples_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as many are drawn at once; it is said once, and every figure stays."""
    made = pipeline.distill(recipe(tmp_path), silent)
    plenty = made.measurement
    assert plenty is not None
    forward, said = Denoiser.forward, list[str]()

    def small(net: Denoiser, x: Tensor, *rest: Any) -> Tensor:
        if len(x) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 42.00 GiB.")
        return forward(net, x, *rest)

    monkeypatch.setattr(Denoiser, "forward", small)
    for kept in (made.run.root.parent / ".shared").glob("features-*"):
        (kept / "features.npz").unlink(missing_ok=True)
    short = fid.measure(made.run, lambda event: said.append(event) if isinstance(event, str) else None)
    for a, b in zip(plenty.rows, short.rows, strict=True):
        assert a.values == pytest.approx(b.values, rel=1e-4, abs=1e-6)
    notes = sorted(line for line in said if "too little memory" in line)
    assert len(notes) == 1 and "too little memory for 126 images at once" in notes[0], "the teacher's are its pairs"
