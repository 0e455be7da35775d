"""`msd bench RECIPE`: every part of an update and of sampling, in each mode, beside plain float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine import pipeline
from msdcli.engine.bench import recipe as bench_recipe
from msdcli.engine.bench import sampling as bench_sampling
from msdcli.engine.bench.recipe import half_batch
from msdcli.engine.inputs import dataset
from msdcli.engine.train import clock as clocks
from msdcli.engine.train.trial import RandomDraws, StageTrainer, resized
from msdcli.recipe import Recipe, load
from tests.conftest import Msd

CPU = torch.device("cpu")

SMALL = ("teacher.network.channels=4", "stages.0.fake_updates=3", "--repeats", "2", "--batch", "4")


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict:
    from typer.testing import CliRunner

    from msdcli.cli import app

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_sampling, "ENOUGH", 0.02)
        done = CliRunner().invoke(app, ["bench", "digits-adm", *SMALL, "--json"])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_parts_add_up_to_an_update(figures: dict) -> None:
    assert [stage["objective"] for stage in figures["stages"]] == ["dm", "adm"]
    for stage, turns in zip(figures["stages"], (["fake", "student"], ["fake+head", "student"]), strict=True):
        for mode in stage["modes"].values():
            assert [*mode["seconds"]] == [*turns, "EMA", "update", "CPU time"]
            wanted = {"student forward", "fake forward", "teacher forward", "backward", "clip, optimizer", "EMA"}
            assert mode["parts"].keys() == wanted | ({"head forward"} if stage["objective"] == "adm" else set())
            assert all(seconds > 0 for seconds in [*mode["seconds"].values(), *mode["parts"].values()])
            assert mode["images_per_second"] == pytest.approx(4 / mode["seconds"]["update"])
            assert mode["flops_per_second"] < figures["peak_flops"]["bf16"] * 2


def test_modes_are_compared_with_plain_float32(figures: dict) -> None:
    for stage in figures["stages"]:
        assert stage["own"] == figures["precision"] == "float32"  # tiny networks
        assert stage["modes"]["float32"]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
        ratio = stage["modes"]["bf16"]["ratio"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert 0 < stage["modes"]["bf16"]["memory_bytes"] < stage["modes"]["float32"]["memory_bytes"]
        assert "peak" in stage["bound_by"]


def test_sampling_is_told_beside_the_bare_network(figures: dict) -> None:
    sampling = figures["sampling"]
    assert sampling["images_per_second"].keys() == {"bare", "routed", "zip", "png"}
    assert all(share["min"] > 0 for share in sampling["share_of_bare"].values())
    assert sampling["latency_seconds"] > 0


def test_what_turns_share_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four updates of the fake network on the same samples: they are generated in the first turn alone."""
    words = ("fake_updates=4", "fake_batch=shared", "pairs=none")
    recipe = load("digits-dm", ["teacher.network.channels=4", *(f"stages.0.{word}" for word in words)])
    clock = [0.0]
    monkeypatch.setattr(clocks, "synchronize", lambda on: None)
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: clock[0])
    trainer = stage_trainer(recipe)
    for net, seconds in ((trainer.objective.student, 100.0), (trainer.objective.fake, 1.0)):  # type: ignore[attr-defined]
        net.net.register_forward_pre_hook(lambda *_, seconds=seconds: clock.__setitem__(0, clock[0] + seconds))
    parts = trainer.parts(RandomDraws(trainer.objective.student, 4, trainer.on))  # type: ignore[attr-defined]
    # The student is asked for the fake network's samples once, and in its own turn; the fake network in each turn.
    assert parts["student forward"] == 100 + 100 and parts["fake forward"] == 4 + 1


def test_passes_and_their_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a pass is compared with a pass; where memory is short, passes are smaller, and it is said."""
    trainer, asked, told = stage_trainer(load("digits", SMALL[:1]), 4), list[int](), list[object]()
    trainer.passes.report = told.append  # type: ignore[assignment]
    forward = Denoiser.forward

    def small(net: Denoiser, x: Tensor, *rest: Any) -> Tensor:
        asked.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(net, x, *rest)

    monkeypatch.setattr(Denoiser, "forward", small)
    trainer.update(RandomDraws(trainer.objective.student, 8, trainer.on))  # type: ignore[attr-defined]
    assert trainer.passes.images == 2 and max(asked) == 4 and len(told) == 1
    asked.clear()
    assert half_batch(trainer, trainer.objective.student, repeats=1) is not None  # type: ignore[attr-defined]
    assert set(asked) == {1, 2}


def stage_trainer(recipe: Recipe, micro_batch: int | None = None) -> StageTrainer:
    data = dataset.look(recipe, planning=True)
    frozen, described = pipeline.networks_on_meta(recipe, data, planning=True)
    teacher, student = (bench_recipe.build(net, CPU) for net in (frozen, *described))
    return StageTrainer(resized(recipe.stages[0], 8), teacher, student, CPU, micro_batch)


def test_the_table_and_both_commands(msd: Msd, tmp_path: Path) -> None:
    done = msd("bench", "toy", "teacher.network.channels=8", "--repeats", "1", "--batch", "4")
    assert done.returncode == 0, done.stderr
    for words in ("one update of the student, batch 4", "times plain float32", "bound by", "one image:"):
        assert words in done.stdout
    assert "png" not in done.stdout  # points are no pictures
    assert not list(tmp_path.iterdir()), "it writes nothing"
    assert "clean-fid" in msd("bench", "fid", "--help").stdout
    assert "msd bench RECIPE" in msd("bench", "--help").stdout.replace("\n", " ")
    missing = msd("bench", "digitz")
    assert missing.returncode == 2 and "did you mean `digits`" in missing.stderr
