"""`msd bench RECIPE`: every part of an update and of sampling, in each mode, beside plain float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Msd

SMALL = ("teacher.network.channels=4", "stages.0.fake_updates=3", "--repeats", "2", "--batch", "4")


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict:
    from typer.testing import CliRunner

    from msdcli.cli import app

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
