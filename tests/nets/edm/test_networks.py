"""EDM's and EDM2's networks as teachers and as students: sizes, taps, precision, gradients, preconditionings."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from msdcli.errors import UserError
from msdcli.nets.edm.importing import build_edm
from msdcli.nets.edm.preconditioning import iddpm_levels
from tests.nets.edm.edm_format import shake

TINY = {"img_resolution": 8, "img_channels": 2, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
TINY |= {"attn_resolutions": [4]}
SONG = {"model_type": "SongUNet", "resample_filter": [1, 3, 3, 1]}
CASES = {
    "DDPM++": ("EDM", {"model_type": "SongUNet", "label_dim": 3}),
    "NCSN++": ("VE", SONG | {"embedding_type": "fourier", "encoder_type": "residual", "augment_dim": 9}),
    "skips": ("VP", SONG | {"encoder_type": "skip", "decoder_type": "skip"}),
    "ADM": ("EDM", {"label_dim": 3, "channel_mult": [8, 16]}),
    "iDDPM": ("iDDPM", {"label_dim": 3, "channel_mult": [8, 8]}),
    "EDM2": ("EDM2", {"label_dim": 3, "channels_per_head": 8}),
}


def build(preconditioning: str, arguments: dict, **kwargs):
    description = {"kind": "edm", "preconditioning": preconditioning, "arguments": TINY | arguments}
    return build_edm(description, **kwargs)


@pytest.fixture(params=CASES)
def denoiser(request):
    torch.manual_seed(0)
    return shake(build(*CASES[request.param])).eval()


def batch(denoiser, n: int = 4):
    generator = torch.Generator().manual_seed(2)
    sigma = denoiser.round_sigma(torch.tensor([0.02, 0.4, 3.0, 60.0])[:n])
    x = torch.randn(n, *denoiser.shape, generator=generator) * (0.25 + sigma.square()).sqrt().reshape(-1, 1, 1, 1)
    return x, sigma, torch.arange(n) % denoiser.num_classes if denoiser.num_classes else None


@pytest.mark.parametrize(
    ("preconditioning", "arguments", "millions"),
    [
        # EDM's networks for CIFAR-10 and ImageNet-64, EDM2's sizes XS, S and XL; counted with the original too.
        ("EDM", {"img_resolution": 32, "model_type": "SongUNet", "channel_mult": [2, 2, 2], "augment_dim": 9}, 55.7),
        ("EDM", {"img_resolution": 64, "label_dim": 1000}, 295.9),
        ("EDM2", {"img_resolution": 64, "img_channels": 4, "label_dim": 1000, "model_channels": 128}, 124.7),
        ("EDM2", {"img_resolution": 64, "img_channels": 4, "label_dim": 1000}, 280.2),
        ("EDM2", {"img_resolution": 64, "img_channels": 4, "label_dim": 1000, "model_channels": 384}, 1119.3),
    ],
)
def test_published_sizes(preconditioning, arguments, millions):
    arguments = {"img_channels": 3} | arguments
    description = {"kind": "edm", "preconditioning": preconditioning, "arguments": arguments}
    denoiser = build_edm(description, device="meta")
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


# Taps.


def test_features_are_the_decoders_inputs(denoiser):
    """The features equal what a full pass hands to the decoder."""
    x, sigma, condition = batch(denoiser)
    handed: dict[str, torch.Tensor] = {}
    decode = denoiser.net.decode
    denoiser.net.decode = lambda skips, emb: handed.update(skips) or decode(skips, emb)
    with torch.no_grad():
        denoiser(x, sigma, condition)
        features = denoiser.features(x, sigma, condition, taps=denoiser.taps)
    assert list(handed) == list(denoiser.taps)
    assert denoiser.taps[0] == "8x8_conv"
    for name, feature in zip(denoiser.taps, features, strict=True):
        assert torch.equal(feature, handed[name]), name
        assert feature.shape[-1] == int(name.split("x")[0])


def test_features_run_no_more_than_they_need(denoiser):
    ran: list[str] = []
    for half in ("enc", "dec"):
        for name, block in getattr(denoiser.net, half).items():
            block.register_forward_hook(lambda *_, label=f"{half}.{name}": ran.append(label))
    taps = ["8x8_block0", "8x8_conv"]
    features = denoiser.features(*batch(denoiser), taps=taps)
    assert ran == ["enc.8x8_conv", "enc.8x8_block0"]
    assert len(features) == 2
    assert features[0].requires_grad  # a GAN head's gradient reaches the encoder


@pytest.mark.parametrize("taps", [["8x8_conv", "9x9_block0"], []])
def test_unknown_taps_are_named(denoiser, taps):
    with pytest.raises(UserError, match="8x8_conv, 8x8_block0, 4x4_down, 4x4_block0"):
        denoiser.features(*batch(denoiser), taps=taps)


# Conditions.


def test_conditions_in_all_their_forms(denoiser):
    x, sigma, condition = batch(denoiser)
    with torch.no_grad():
        without = denoiser(x, sigma)
        zeros = denoiser(x, sigma, torch.zeros(4, denoiser.num_classes))
        torch.testing.assert_close(without, zeros, rtol=0, atol=0)
        if condition is None:  # ignored
            assert torch.equal(denoiser(x, sigma, torch.arange(4)), without)
            return
        known = denoiser(x, sigma, condition)
        assert torch.equal(known, denoiser(x, sigma, torch.eye(3)[condition]))
        assert (known - without).abs().amax((1, 2, 3)).min() > 1e-6
        one = denoiser(x, sigma, torch.tensor([2]))  # one class for all
        assert torch.equal(one, denoiser(x, sigma, torch.full((4,), 2)))


def test_images_do_not_see_each_other(denoiser):
    x, sigma, condition = batch(denoiser)
    with torch.no_grad():
        together = denoiser(x, sigma, condition)
        alone = denoiser(x[2:3], sigma[2:3], None if condition is None else condition[2:3])
    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-5)


# Precision.


@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_bfloat16_networks_keep_a_float32_preconditioning(denoiser, how):
    x, sigma, condition = batch(denoiser)
    with torch.no_grad():
        exact = denoiser(x, sigma, condition)
        if how == "cast":
            rough = copy.deepcopy(denoiser).to(torch.bfloat16)
            out = rough(x, sigma, condition)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                out = denoiser(x, sigma, condition)
    assert out.dtype == torch.float32
    # At the lowest noise D is x almost entirely: a bfloat16 preconditioning would be off by 2^-9.
    assert ((out - exact)[0].abs().amax() / exact[0].abs().amax()) < 1e-3
    assert ((out - exact).abs().amax((1, 2, 3)) / exact.abs().amax((1, 2, 3))).max() < 0.05


def test_fixed_frequencies_and_levels_are_never_rounded():
    for case in ("NCSN++", "EDM2", "iDDPM"):
        denoiser = build(*CASES[case])
        fixed = {
            name: b.clone() for name, b in denoiser.named_buffers() if name.split(".")[-1] in ("freqs", "phases", "u")
        }
        assert fixed
        denoiser.to(torch.bfloat16).to("cpu", torch.float16)
        for name, buffer in denoiser.named_buffers():
            if name in fixed:
                assert torch.equal(buffer, fixed[name]), name
        assert next(denoiser.parameters()).dtype == torch.float16


# As students.


def test_every_parameter_learns_and_what_is_unused_is_none(denoiser):
    """DistributedDataParallel fails on a parameter without a gradient, so there are none."""
    denoiser.train()
    denoiser(*batch(denoiser)).square().mean().backward()
    without = [name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [name for name in without if "qkv.bias" not in name]  # a key's bias cancels in the softmax
    names = [name for name, _ in denoiser.named_parameters()]
    assert not [name for name in names if "augment" in name or "logvar" in name]


def test_a_few_steps_of_training_fit_one_image(denoiser):
    torch.manual_seed(0)
    x, sigma, condition = batch(denoiser, 2)
    y = torch.tanh(x / x.abs().amax((1, 2, 3), keepdim=True))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        loss = ((denoiser(x, sigma, condition) - y).square() / (0.25 + sigma.square()).reshape(-1, 1, 1, 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.9 * losses[0]


def test_random_weights_follow_the_seed():
    arguments = CASES["EDM2"]
    torch.manual_seed(3)
    first = build(*arguments)
    torch.manual_seed(3)
    second = build(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_new_network_starts_at_the_skip_connection():
    """D = c_skip x: the output layers start at, or near, zero."""
    for case in ("ADM", "EDM2"):
        denoiser = build(*CASES[case]).eval()
        x, sigma, condition = batch(denoiser)
        with torch.no_grad():
            expected = x * (0.25 / (0.25 + sigma.square())).reshape(-1, 1, 1, 1)
            torch.testing.assert_close(denoiser(x, sigma, condition), expected)


# EDM2.


def test_forced_normalisation_happens_once_per_change_of_the_weights():
    denoiser = shake(build(*CASES["EDM2"])).train()
    weight = denoiser.net.out_conv.weight
    x, sigma, condition = batch(denoiser)
    total = (
        denoiser(x, sigma, condition).square().mean() + denoiser(x, sigma, condition).mean()
    )  # two calls, one backward
    total.backward()
    torch.testing.assert_close(weight.flatten(1).square().mean(1), torch.ones(2), rtol=1e-3, atol=0)
    with torch.no_grad():
        weight.mul_(3)
    denoiser(x, sigma, condition)
    torch.testing.assert_close(weight.flatten(1).square().mean(1), torch.ones(2), rtol=1e-3, atol=0)
    with torch.no_grad():
        weight.mul_(3)
        denoiser.eval()(x, sigma, condition)
    torch.testing.assert_close(weight.flatten(1).square().mean(1), torch.full((2,), 9.0), rtol=1e-2, atol=0)


def test_magnitudes_are_preserved():
    """Every feature of a new network, in training mode, is near unit magnitude (the point of the paper)."""
    torch.manual_seed(0)
    denoiser = build("EDM2", {"model_channels": 32, "label_dim": 10, "num_blocks": 2, "channel_mult": [1, 2]})
    x, sigma, _ = batch(denoiser)
    for feature in denoiser.features(x, sigma, torch.arange(4), taps=denoiser.taps)[1:]:
        assert 0.7 < feature.square().mean().sqrt() < 1.3


def test_logvar_is_one_number_per_sigma():
    denoiser = build(*CASES["EDM2"])
    assert denoiser.logvar(torch.tensor([0.1, 1.0])).shape == (2,)


# Preconditionings.


def test_iddpm_levels_are_those_of_the_paper():
    """EDM's Table 1: u_M = 0, u falls, and its ends are iDDPM's 0.0064 and 20291 at M = 1000."""
    u = iddpm_levels(1000, 0.001, 0.008)
    assert u[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(u))
    assert u[999] == pytest.approx(0.0064, abs=1e-4)
    assert u[0] == pytest.approx(20291, abs=1)


def test_iddpm_rounds_to_its_levels():
    denoiser = build(*CASES["iDDPM"])
    rounded = denoiser.round_sigma(torch.tensor([[0.5], [40.0]]))
    assert rounded.shape == (2, 1)
    assert torch.isin(rounded, denoiser.u).all()
    assert torch.equal(denoiser.round_sigma(rounded), rounded)
    x, _, condition = batch(denoiser, 2)
    with torch.no_grad():
        assert denoiser(x, rounded.flatten(), condition).shape == x.shape


def test_noise_ranges():
    assert build("VP", {}).sigma_max == pytest.approx(152.167, abs=1e-3)
    assert build("VE", {}).sigma_max == 100
    assert build("EDM", {}).sigma_max == math.inf
