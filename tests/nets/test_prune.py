"""A pruned student is the teacher where they overlap."""

import pytest
import torch

from msdcli import nets
from msdcli.errors import UserError
from msdcli.nets.prune import prune
from msdcli.recipe.networks import MLPSettings, UNetSettings


def unet(**keys: object) -> nets.Denoiser:
    net = nets.build(UNetSettings(embedding=8, attention=[4], **keys), shape=(1, 8, 8), num_classes=3, sigma_data=0.5)  # type: ignore[arg-type]
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


def test_pruning_to_the_same_size_is_a_copy() -> None:
    teacher, student = unet(channels=8), unet(channels=8)
    assert prune(teacher, student) == sum(p.numel() for p in student.parameters())
    x, sigma, c = torch.randn(2, 1, 8, 8), torch.ones(2), torch.tensor([0, 2])
    torch.testing.assert_close(student(x, sigma, c), teacher(x, sigma, c))


def test_every_group_of_channels_keeps_its_leading_ones() -> None:
    teacher, student = unet(channels=8), unet(channels=4)
    assert prune(teacher, student) == sum(p.numel() for p in student.parameters())
    first, last = "encoder.8x8_0", "decoder.8x8_1"
    t, s = (dict(net.net.named_parameters()) for net in (teacher, student))
    assert torch.equal(s[f"{first}.conv0.weight"], t[f"{first}.conv0.weight"][:4, :4])
    # The decoder's input is [8 of the main path, 8 of the skip]: four of each.
    assert torch.equal(s[f"{last}.conv0.weight"], t[f"{last}.conv0.weight"][:4, [0, 1, 2, 3, 8, 9, 10, 11]])
    # Scale and shift, queries, keys and values.
    assert torch.equal(s[f"{first}.affine.bias"], t[f"{first}.affine.bias"][[0, 1, 2, 3, 8, 9, 10, 11]])
    middle = t["middle.attention.qkv.bias"].reshape(3, 16)[:, :8].flatten()
    assert torch.equal(s["middle.attention.qkv.bias"], middle)


def test_fewer_blocks_keep_those_of_the_same_name() -> None:
    teacher, student = unet(channels=4, blocks=2), unet(channels=4, blocks=1)
    assert prune(teacher, student) > 0.9 * sum(p.numel() for p in student.parameters())


def test_mlps_are_pruned_too() -> None:
    teacher, student = (
        nets.build(MLPSettings(channels=c, blocks=b), shape=(2,), num_classes=3, sigma_data=0.5)
        for c, b in ((16, 3), (8, 2))
    )
    assert prune(teacher, student) == sum(p.numel() for p in student.parameters())


def test_channels_that_mean_other_pixels_and_other_kinds_of_networks_are_refused() -> None:
    teacher = unet(channels=8, patch=2)
    assert prune(teacher, unet(channels=4, patch=2))
    with pytest.raises(UserError, match=r"patch: 1.*teacher's is 2"):
        prune(teacher, unet(channels=4))
    other = nets.build(MLPSettings(channels=8), shape=(2,), num_classes=3, sigma_data=0.5)
    with pytest.raises(UserError, match=r"kind, unet, not of kind mlp"):
        prune(teacher, other)
