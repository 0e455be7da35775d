"""Guidance: the formula, its interval, one batched call, and that copies are plain."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msdcli import nets
from msdcli.data.toy2d import Toy2d
from msdcli.diffusion.denoiser import Denoiser, karras_sigmas
from msdcli.diffusion.guidance import NO_CLASS, Guided, drawn
from msdcli.diffusion.sampler import evaluated_levels, solve
from msdcli.engine import estimate, pipeline
from msdcli.engine.plan import plan
from msdcli.recipe import load
from msdcli.recipe.data import Toy2dSettings
from msdcli.recipe.networks import EdmNetworkSettings, MLPSettings, UNetSettings
from msdcli.rundir import RunDir
from tests.conftest import TINY, Msd
from tests.nets.edm.edm_format import shake

STAGES = ("0-tsm", "1-dm")
KINDS = [
    (UNetSettings(channels=8), (1, 8, 8)),
    (MLPSettings(channels=16, blocks=1), (2,)),
    (EdmNetworkSettings(arguments={"model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1}), (1, 8, 8)),
]


def teacher(settings: UNetSettings | MLPSettings | EdmNetworkSettings, shape: tuple[int, ...], seed: int) -> Denoiser:
    net = nets.build(settings, shape=shape, num_classes=4, sigma_data=0.5)
    return shake(net, 0.1, seed).eval().requires_grad_(False)


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0.1, 1.0, 9.0]), torch.tensor([0, 3, 1])


@pytest.mark.parametrize(("settings", "shape"), KINDS, ids=lambda v: getattr(v, "kind", ""))
def test_classifier_free_guidance_is_one_call_of_both_branches(settings, shape) -> None:
    plain = teacher(settings, shape, 1)
    x, sigma, c = inputs(shape)
    calls: list[int] = []
    plain.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    guided = Guided(plain, scale=3.0, interval=[0.5, 9.0])(x, sigma, c)
    assert calls == [6]
    with_class, without = plain(x, sigma, c), plain(x, sigma, torch.full_like(c, NO_CLASS))
    assert (with_class - without).abs().max() > 1e-4
    wanted = without + 3 * (with_class - without)
    torch.testing.assert_close(guided[1:], wanted[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided[0], with_class[0], rtol=1e-5, atol=1e-6)  # below the interval


def test_no_class_is_a_row_of_zeros_for_edms_networks() -> None:
    plain = teacher(*KINDS[2], 1)
    x, sigma, _ = inputs((1, 8, 8))
    assert torch.equal(plain(x, sigma, torch.full((3,), NO_CLASS)), plain(x, sigma, None))


def test_autoguidance_moves_away_from_the_guide() -> None:
    good, weak = teacher(*KINDS[0], 1), teacher(*KINDS[0], 2)
    x, sigma, c = inputs((1, 8, 8))
    guided = Guided(good, scale=2.0, interval=[0.0, 1e4], guide=weak)(x, sigma, c)
    torch.testing.assert_close(guided, 2 * good(x, sigma, c) - weak(x, sigma, c), rtol=1e-4, atol=1e-5)


def test_a_copy_is_the_plain_teacher_and_features_are_its_own() -> None:
    plain = teacher(*KINDS[0], 1)
    guided = Guided(plain, scale=2.0, interval=[0.0, 1e4])
    assert type(copy.deepcopy(guided)) is Denoiser
    assert guided.settings == plain.settings and guided.taps == plain.taps
    x, sigma, c = inputs((1, 8, 8))
    assert torch.equal(guided.features(x, sigma, c, ["middle"])[0], plain.features(x, sigma, c, ["middle"])[0])


def test_a_range_gives_every_image_a_scale_of_its_own() -> None:
    plain = teacher(*KINDS[0], 1)
    x, sigma, c = inputs((1, 8, 8))
    u = torch.tensor([0.0, 0.5, 1.0])
    guided = Guided(plain, scale=[1.0, 4.0], interval=[0.0, 1e4])
    together = drawn(guided, lambda purpose: u)(x, sigma, c)
    for i, scale in enumerate((1.0, 2.5, 4.0)):
        alone = Guided(plain, scale=scale, interval=[0.0, 1e4])(x[i : i + 1], sigma[i : i + 1], c[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert drawn(plain, lambda purpose: u) is plain
    with pytest.raises(AssertionError, match="drawn"):
        guided(x, sigma, c)


def test_a_pair_has_one_scale_by_its_seed_and_number(tmp_path: Path) -> None:
    from msdcli.engine.inputs.pairs import Pairs, sample_teacher

    (tmp_path / "tiny.yaml").write_text(TINY)
    recipe = load(tmp_path / "tiny.yaml", ["pairs.seed=3"])
    points = Toy2d(Toy2dSettings(points=80))
    source = Pairs(RunDir(tmp_path / "runs/x"), recipe, points, "0" * 64)
    u = source.uniform(range(100))
    assert torch.equal(source.uniform(range(40, 42)), u[40:42])
    assert 0 <= u.min() < 0.1 and 0.9 < u.max() < 1
    plain = shake(nets.build(MLPSettings(channels=16, blocks=1), shape=(2,), num_classes=8, sigma_data=0.5), 0.1).eval()
    guided = Guided(plain, scale=[1.0, 4.0], interval=[0.0, 1e4])
    c = torch.arange(4)
    z = source.noise(range(4))
    together = sample_teacher(guided, z, c, recipe.teacher.solver, u=u[:4], batch=3)
    for i in range(4):
        own = Guided(plain, scale=guided.scales(u[i : i + 1]).item(), interval=[0.0, 1e4])
        alone = sample_teacher(own, z[i : i + 1], c[i : i + 1], recipe.teacher.solver, batch=1)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_range_distils_resumes_the_same_and_a_wrong_one_is_refused(msd: Msd, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    trained = ("teacher.training.label_dropout=0.2", "partition.students=1")
    for wrong in ("[4.0, 1.0]", "[1.0]", "[-1.0, 2.0]"):
        refused = msd("distill", "tiny.yaml", f"teacher.guidance={{scale: {wrong}}}", *trained)
        assert (refused.returncode, "scale" in refused.stderr) == (2, True), refused.stderr
    stages = "stages=[{objective: tsm, steps: 2, batch: 8}, {objective: dm, steps: 2, batch: 8, fake_updates: 1}]"
    losses = {}
    for run, scale in (("a", "[1.0, 4.0]"), ("b", "[1.0, 4.0]"), ("c", "2.5")):
        done = msd("distill", "tiny.yaml", f"teacher.guidance={{scale: {scale}}}", stages, *trained, f"run=runs/{run}")
        assert done.returncode == 0, done.stderr
        losses[run] = [(tmp_path / f"runs/{run}/students/0/{s}/model.safetensors").read_bytes() for s in STAGES]
    assert losses["a"] == losses["b"]
    assert all(a != c for a, c in zip(losses["a"], losses["c"], strict=True))


def test_a_guided_teacher_distils_and_one_that_cannot_be_is_refused(msd: Msd, tmp_path: Path, finished: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    refused = msd("distill", "tiny.yaml", "teacher.guidance={scale: 2.0}")
    assert (refused.returncode, "label_dropout" in refused.stderr, (tmp_path / "runs").exists()) == (2, True, False)
    trained = ("teacher.guidance={scale: 2.0, interval: [0.1, 20]}", "teacher.training.label_dropout=0.2")
    done = msd("distill", "tiny.yaml", *trained)
    assert done.returncode == 0, done.stderr
    weaker = f"teacher.guidance={{scale: 1.5, guide: {finished / 'teacher'}}}"
    other = msd("distill", "tiny.yaml", weaker, "run=runs/auto")
    assert other.returncode == 0, other.stderr
    assert len(list((tmp_path / "runs/.shared").glob("pairs-*"))) == 2, "other guidance, other pairs"


def counted(net: Denoiser) -> list[int]:
    """Return a list that grows by the images of every call of a network."""
    calls: list[int] = []
    net.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    return calls


@pytest.mark.parametrize("guide", [False, True])
@pytest.mark.parametrize("scale", [3.0, [1.0, 4.0]])
@pytest.mark.parametrize("name", ["heun", "deis"])
def test_a_sampler_evaluates_no_branch_that_the_interval_leaves_out(name: str, scale, guide: bool) -> None:
    """The samples are those of both branches everywhere and a mask."""
    plain = teacher(*KINDS[1], 1)
    weak = teacher(*KINDS[1], 2) if guide else None
    low, high = 0.3, karras_sigmas(8)[2].to(torch.float32).item()  # the upper end is a level, and is inside
    guided = Guided(plain, scale=scale, interval=[low, high], guide=weak)
    z, u = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 0.9])
    c = torch.tensor([0, 3, 1])
    ask = drawn(guided, lambda purpose: u)
    masked = solve(lambda *asked: ask(*asked), z, c, name=name, steps=8)
    calls = counted(plain)
    found = solve(ask, z, c, name=name, steps=8)
    torch.testing.assert_close(found, masked, rtol=1e-5, atol=1e-5)
    levels = evaluated_levels(name=name, steps=8)
    inside = [low < torch.tensor(sigma).to(torch.float32).item() <= high for sigma in levels]
    assert 0 < sum(inside) < len(inside)
    assert calls == [6 if both and not guide else 3 for both in inside]
    unguided = solve(plain, z, c, name=name, steps=8)
    assert (found - unguided).abs().max() > 1e-3


def test_training_keeps_the_mask() -> None:
    plain = teacher(*KINDS[1], 1)
    calls = counted(plain)
    x, sigma, c = inputs((2,))
    Guided(plain, scale=3.0, interval=[0.5, 0.6])(x, sigma, c)
    assert calls == [6], "levels are mixed: whether one is inside would have to be asked of the device"


def test_the_plan_counts_one_branch_outside_the_interval(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = ["teacher.training.label_dropout=0.2", "teacher.solver.steps=18", "partition.students=1"]
    costs = {}
    for ends in ("[0, 10000]", "[0.2, 2.0]", "[1000, 10000]"):
        recipe = load(tmp_path / "tiny.yaml", [*options, f"teacher.guidance={{scale: 2.0, interval: {ends}}}"])
        data = pipeline.check(recipe, planning=True)
        costs[ends] = estimate.estimate(recipe, data, *pipeline.networks_on_meta(recipe, data)).pairs_flops
    everywhere, within, nowhere = costs.values()
    assert everywhere == pytest.approx(2 * nowhere, rel=1e-6)
    share = sum(0.2 < sigma <= 2.0 for sigma in evaluated_levels(steps=18)) / 35
    assert within == pytest.approx((1 + share) * nowhere, rel=1e-6)
    (line,) = [line for line in plan(recipe).lines() if line.startswith("solver:")]
    assert "heun, 18 noise levels from 80 to 0.002, 35 evaluations, 0 of them guided" in line
