"""One U-Net for digits and for 64x64 RGB, at any width."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msdcli import nets
from msdcli.errors import UserError
from msdcli.nets.unet import group_norm
from msdcli.recipe import StudentSettings
from msdcli.recipe.networks import MLPSettings, UNetSettings


def unet(**keys: object) -> nets.Denoiser:
    torch.manual_seed(0)
    return nets.build(UNetSettings(**keys), shape=(1, 8, 8), num_classes=3, sigma_data=0.5)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.booleans())
def test_any_width_and_depth_works(channels: int, blocks: int, attention: bool) -> None:
    net = unet(channels=channels, blocks=blocks, attention=[4] if attention else [])
    assert net(torch.randn(2, 1, 8, 8), torch.tensor([0.1, 5.0]), torch.tensor([0, 2])).shape == (2, 1, 8, 8)


@given(st.integers(1, 2000))
def test_groups_divide_the_channels(channels: int) -> None:
    norm = group_norm(channels)
    assert channels % norm.num_groups == 0 and norm.num_groups <= 32


def test_a_new_network_denoises_like_c_skip_alone() -> None:
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    c_skip = (0.25 / (sigma**2 + 0.25)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(unet()(x, sigma, torch.tensor([0, 1])), c_skip * x)


def test_64x64_rgb_of_the_papers_size_builds_without_memory() -> None:
    keys = UNetSettings(channels=192, multipliers=[1, 2, 3, 4], blocks=3, attention=[32, 16, 8])
    with torch.device("meta"):
        net = nets.build(keys, shape=(3, 64, 64), num_classes=1000, sigma_data=0.5)
        out = net(torch.empty(2, 3, 64, 64), torch.ones(2), torch.zeros(2, dtype=torch.int64))
    assert out.shape == (2, 3, 64, 64)
    assert 2e8 < sum(p.numel() for p in net.parameters()) < 4e8


def test_a_network_of_patches_is_one_of_more_channels_over_a_smaller_image() -> None:
    keys: dict[str, object] = {"channels": 8, "multipliers": [1, 2], "attention": [2]}
    patched = unet(patch=2, **keys).net
    torch.manual_seed(0)
    plain = nets.build(UNetSettings(**keys), shape=(4, 4, 4), num_classes=3, sigma_data=0.5).net  # type: ignore[arg-type]
    for net in (patched, plain):
        torch.manual_seed(1)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, 0, 0.1)
    x, noise, classes = torch.randn(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 2])
    squares = x.reshape(2, 4, 2, 4, 2).permute(0, 2, 4, 1, 3).reshape(2, 4, 4, 4)
    expected = plain(squares, noise, classes).reshape(2, 2, 2, 4, 4).permute(0, 3, 1, 4, 2).reshape(2, 1, 8, 8)
    torch.testing.assert_close(patched(x, noise, classes), expected)
    assert patched.taps == ["4x4_0", "2x2_down", "2x2_0", "middle"]
    with pytest.raises(UserError, match="2 levels of patches of 3 need sides divisible by 6"):
        unet(patch=3, multipliers=[1, 2])


def test_taps_are_what_the_encoder_computes_and_the_decoder_does_not_run() -> None:
    net = unet(channels=8, multipliers=[1, 2])
    assert net.net.taps == ["8x8_0", "4x4_down", "4x4_0", "middle"]
    x, sigma, c = torch.randn(2, 1, 8, 8), torch.ones(2), torch.tensor([0, 1])
    seen = {}
    for name, block in net.net.encoder.items():
        block.register_forward_hook(lambda module, inputs, output, name=name: seen.__setitem__(name, output))
    net.net.conv_out.register_forward_hook(lambda *_: seen.__setitem__("decoder", None))
    middle, first = net.features(x, sigma, c, ["middle", "8x8_0"])
    assert torch.equal(first, seen["8x8_0"]) and middle.shape == (2, 16, 4, 4) and "decoder" not in seen
    with pytest.raises(UserError, match="there are 8x8_0"):
        net.features(x, sigma, c, ["block3"])


def test_gradients_reach_every_parameter() -> None:
    net = unet(attention=[4])
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    net(torch.randn(3, 1, 8, 8), torch.ones(3), torch.tensor([0, 1, 2])).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_what_does_not_fit_the_data_is_refused() -> None:
    with pytest.raises(UserError, match="divisible by 16"):
        unet(multipliers=[1, 1, 1, 1, 1])
    with pytest.raises(UserError, match="is for points"):
        nets.build(MLPSettings(), shape=(1, 8, 8), num_classes=3, sigma_data=0.5)
    with pytest.raises(UserError, match="is for images"):
        nets.build(UNetSettings(), shape=(2,), num_classes=3, sigma_data=0.5)


def test_students_scale_from_the_teacher() -> None:
    teacher = UNetSettings(channels=16, blocks=2)
    small = StudentSettings(width=0.5, depth=0.5).network_for(teacher)
    assert (small.channels, small.blocks) == (8, 1)
    assert StudentSettings().network_for(teacher) == teacher
