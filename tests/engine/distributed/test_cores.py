"""Calls side by side on idle cores: in order, as many as were asked for, with the bits that they have alone."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from msdcli import nets
from msdcli.data.digits import Digits
from msdcli.diffusion.guidance import Guided
from msdcli.engine.distributed import cores
from msdcli.engine.distributed.cores import side_by_side
from msdcli.engine.inputs import pairs
from msdcli.engine.inputs.pairs import Pairs
from msdcli.engine.measure import features
from msdcli.engine.tracking.events import silent
from msdcli.recipe import load
from msdcli.recipe.data import DigitsSettings
from msdcli.recipe.networks import UNetSettings
from msdcli.rundir import RunDir
from tests.nets.edm.edm_format import shake

RECIPE = """
name: x
run: runs/{name}
data: {{name: digits}}
pairs: {{count: 24, shard: 8}}
teacher: {{solver: {{name: deis, steps: 3}}}}
stages: [{{objective: dm, steps: 1}}]
evaluation: {{batch: 5}}
"""


def test_two_at_a_time_in_order() -> None:
    together, seen = threading.Barrier(2, timeout=10), list[int]()

    def call(item: int) -> int:
        together.wait()  # ends only where another one is at work
        seen.append(torch.get_num_threads())
        return -item

    assert list(side_by_side(call, range(6), 2)) == [0, -1, -2, -3, -4, -5]
    assert set(seen) == {torch.get_num_threads()}


@pytest.mark.parametrize("count", [1, 3])
def test_a_call_that_fails_ends_it(count: int) -> None:
    called = list[int]()

    def call(item: int) -> int:
        called.append(item)
        if item == 2:
            raise ValueError("two")
        return item

    done = side_by_side(call, range(100), count)
    assert [next(done), next(done)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(done)
    assert len(called) < 10, "what had not begun was called all the same"


def test_cores_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert cores.spare(torch.device("cpu")) == 3
    assert cores.spare(torch.device("meta")) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert cores.spare(torch.device("cpu")) == cores.MOST
    monkeypatch.setenv(cores.WORKER, "1")
    assert cores.spare(torch.device("cpu")) == 1


def test_pairs_and_samples_have_the_bits_of_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = UNetSettings(channels=4, multipliers=[1], embedding=8)
    net = shake(nets.build(settings, shape=(1, 8, 8), num_classes=10, sigma_data=0.5), seed=0).eval()
    monkeypatch.setattr(features, "STEP", 7)
    given: list[Any] = []
    for count in (1, 3):
        monkeypatch.setattr(pairs, "spare", lambda _, count=count: count)
        (tmp_path / "r.yaml").write_text(RECIPE.format(name=f"{count}/x"))
        recipe = load(tmp_path / "r.yaml")
        run = RunDir(tmp_path / f"runs/{count}/x")
        made = Pairs(run, recipe, Digits(DigitsSettings()), "teacher")
        assert made.at_once(net) == count and made.at_once(Guided(net, scale=2.0, interval=(0.0, 80.0))) == 1
        made.prepare(net, 100, silent)
        drawn = [y for y, _ in features._teacher_samples(made, net, 50, 5, silent)]
        given.append([path.read_bytes() for path, _ in made.shards()] + [torch.cat(drawn).numpy().tobytes()])
    assert given[0] == given[1] and len(given[0]) == 4
