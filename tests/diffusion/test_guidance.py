"""Guidance: the formula, its interval, one batched call, and that copies are plain."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msdcli import nets
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.guidance import NO_CLASS, Guided
from msdcli.recipe import EdmNetworkSettings, MLPSettings, UNetSettings
from tests.conftest import TINY, Msd
from tests.nets.edm_format import shake

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
