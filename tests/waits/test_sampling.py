"""No sampler waits for its device: the teacher by every solver and guidance, students by their routes, and latents; a
batch costs the copies of its inputs, and nothing is read before whoever asked for it does.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msdcli.data.latents import LATENTS
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.device_batch import DeviceBatch
from msdcli.diffusion.generator import Generator
from msdcli.diffusion.guidance import Guided, drawn
from msdcli.diffusion.sampler import SOLVERS, solve
from msdcli.engine.inputs import pairs
from msdcli.engine.inputs.latents import LatentEncoder
from msdcli.engine.sample import Students
from msdcli.engine.tracking.events import silent
from msdcli.nets.diffusers.autoencoder import Autoencoder, build_autoencoder
from msdcli.partition import consecutive
from msdcli.recipe import LatentSettings
from msdcli.recipe.solver import SolverSettings
from tests.device import DOWN, READ, UP, HostWaitError, Remote
from tests.latent_teacher import VAE
from tests.waits.cases import CLASSES, GUIDANCE, NETWORKS, SIDE, TEXT, applies, device, guided, network, there

GUIDED = [how for how in GUIDANCE if how != "perturbed"]


def inputs(net: Denoiser, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, *net.shape, device="meta"), torch.arange(count, device="meta") % CLASSES


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("how", [*GUIDED[:2], *(pytest.param(how, marks=pytest.mark.slow) for how in GUIDED[2:])])
def test_no_solver_waits(solver: str, how: str) -> None:
    """But for the noise of the stochastic ones, which is drawn on the host: one copy per step."""
    with device() as on:
        teacher = there(guided(network("mlp"), how))
        z, c = inputs(teacher)
        ask = drawn(teacher, lambda purpose: torch.rand(4, device="meta"))
        with torch.no_grad(), on.watched():
            found = solve(ask, z, c, name=solver, steps=4, noise=lambda step: torch.randn(4, 2, device="meta"))
    assert isinstance(found, Remote) and found.numbers.isfinite().all() and found.shape == z.shape


FAST = ["unet", "dit", *TEXT]


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in NETWORKS
        if applies(name, "classifier-free")
    ],
)
def test_no_network_waits_under_a_schedule_of_guidance(name: str) -> None:
    with device() as on:
        teacher = there(Guided(network(name), scale=0.6, interval=(0.0, 100.0), schedule="cfg++"))
        z, c = inputs(teacher, 2)
        with torch.no_grad(), on.watched():
            found = solve(teacher, z, c, name="ddim", steps=2)
    assert found.numbers.isfinite().all()  # type: ignore[attr-defined]


def test_the_teachers_samples_cost_their_way_there_and_back() -> None:
    with device() as on:
        teacher = there(guided(network("mlp"), "range"))
        before = len(on.waits)
        found = pairs.sample_teacher(
            teacher, torch.randn(10, 2), torch.arange(10) % CLASSES, SolverSettings(steps=3), batch=4
        )
    assert not isinstance(found, Remote) and found.shape == (10, 2)
    assert Counter(what for what, _, _ in on.waits[before:]) == {UP: 3 * 3, DOWN: 3}, "z, classes and scales; samples"


def students(*sigmas: float, autoencoder: Path | None = None) -> Students:
    """Two students of a run, in memory."""
    found = Students([Path(), Path()], consecutive(CLASSES, 2), ["a", "b", "c"], torch.device("meta"), autoencoder)
    for number in range(2):
        found.put(number, Generator(network("unet"), sigmas))
    return found


@pytest.mark.parametrize("sigmas", [(2.5,), (80.0, 2.5)])
def test_students_answer_by_their_routes_without_waiting(sigmas: tuple[float, ...]) -> None:
    asked = [0, 2, 1, 1, 2, 0, 2]
    with device() as on:
        routed = students(*sigmas)
        before, parts = len(on.waits), list(routed.stream(asked, batch=2))
    assert sorted(i for at, _ in parts for i in at) == list(range(len(asked)))
    assert all(isinstance(y, Remote) for _, y in parts)
    # Noise, classes, and, of several steps, the noise between them.
    assert Counter(what for what, _, _ in on.waits[before:]) == {UP: len(parts) * (1 + len(sigmas))}


def test_samples_that_are_asked_for_are_read_once_per_batch() -> None:
    with device() as on:
        routed = students(2.5)
        before, found = len(on.waits), routed.sample([0, 1, 2, 1], batch=2)
    assert found.shape == (4, 3, SIDE, SIDE)
    assert Counter(what for what, _, _ in on.waits[before:])[DOWN] == 3 and READ not in on.counted()


def test_a_planted_wait_in_a_student_is_found() -> None:
    with device() as on:
        routed = students(2.5)
        net = routed.student(0).net
        net.register_forward_hook(lambda module, given, y: y.mean().item() and None)
        before, _ = len(on.waits), list(routed.stream([0, 1]))
        with pytest.raises(HostWaitError, match="read"), on.watched():
            net(*inputs(net)[:1], torch.ones(4, device="meta"), inputs(net)[1])
    assert READ in {what for what, _, _ in on.waits[before:]}


def autoencoder() -> Autoencoder:
    pytest.importorskip("diffusers")
    return build_autoencoder(VAE)


def test_an_autoencoder_does_not_wait() -> None:
    with device() as on:
        network = autoencoder().to("meta")
        x = torch.randn(2, 3, SIDE, SIDE, device="meta")
        with on.watched():
            mean, std = network.encode(x)
            pictures = network.decode(mean + std)
    assert pictures.shape == x.shape and isinstance(pictures, Remote)


def test_latents_cost_their_way_there_and_back(tmp_path: Path) -> None:
    """`msd latents`, a shard of it: a copy there and one back for every batch of pictures."""
    encoder: Any = LatentEncoder.__new__(LatentEncoder)
    encoder.data = Pictures(10)
    encoder.settings, encoder.shape, encoder.memory = LatentSettings(batch=4), (4, 4, 4), DeviceBatch(silent)
    encoder.folder, encoder.dtype = tmp_path, np.dtype("float32")
    (tmp_path / LATENTS).write_bytes(bytes(10 * encoder.one))
    with device() as on:
        network = autoencoder().to("meta")
        before = len(on.waits)
        encoder._make(range(10), network, silent, 0, 0.0)
    assert Counter(what for what, _, _ in on.waits[before:]) == {UP: 3, DOWN: 3}


class Pictures:
    """Pictures of one colour."""

    shape, class_names = (3, SIDE, SIDE), ["a"]

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def images(self, numbers: Any) -> torch.Tensor:
        return torch.zeros(len(numbers), *self.shape)
