"""Start a smaller student from the teacher's own weights: the leading channels of every layer that both have."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import Denoiser
from msdcli.errors import UserError
from msdcli.nets.edm.unet_taps import TappedUNet
from msdcli.nets.unet import Attention, ResidualBlock

Parts = dict[str, list[tuple[int, ...]]]  # parameter -> for each of its dimensions the sizes it is put together from


@torch.no_grad()
def prune(teacher: Denoiser, student: Denoiser) -> int:
    """Copy into `student` what fits of `teacher`; return how many of the student's numbers were copied.

    Where a layer's channels are several groups side by side (a skip beside the main path, scale beside shift, queries
    beside keys), the leading channels of each group are taken. Layers that the teacher lacks keep their weights.
    UserError where networks are of other kinds, or their channels mean other pixels.
    """
    if isinstance(teacher.net, TappedUNet):
        raise UserError(
            "student.init: pruned is not for networks of kind edm", hint="student.init=random, and stage tsm"
        )
    if type(teacher.net) is not type(student.net):
        raise UserError(
            "student.init: pruned is for a smaller network of the teacher's kind, "
            f"{teacher.settings.kind}, not of kind {student.settings.kind}",
            hint="student.init=random",
        )
    patches = [getattr(net.settings, "patch", 1) for net in (teacher, student)]
    if patches[0] != patches[1]:
        raise UserError(
            f"student.init: pruned takes the teacher's leading channels, and with `patch: {patches[1]}` (the teacher's "
            f"is {patches[0]}) the student's first ones are other pixels",
            hint=f"student.init=random, or patch: {patches[0]} in student.network",
        )
    theirs, mine = _parts(teacher), _parts(student)
    source, copied = teacher.state_dict(), 0
    for name, target in student.state_dict().items():
        if name not in source or source[name].ndim != target.ndim:
            continue
        here, there = mine.get(name, _plain(target)), theirs.get(name, _plain(source[name]))
        if all(_fits(a, b) for a, b in zip(here, there, strict=True)):
            tensor = source[name]
            for dim, (small, large) in enumerate(zip(here, there, strict=True)):
                tensor = tensor.index_select(dim, _leading(small, large).to(tensor.device))
            target.copy_(tensor)
            copied += target.numel()
    return copied


@torch.no_grad()
def keep_blocks(teacher: Denoiser, student: Denoiser) -> None:
    """Give a student that is the teacher without some blocks the weights of the others."""
    source = teacher.state_dict()
    for name, target in student.state_dict().items():
        target.copy_(source[name])


def _plain(tensor: Tensor) -> list[tuple[int, ...]]:
    return [(size,) for size in tensor.shape]


def _fits(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    return len(small) == len(large) and all(a <= b for a, b in zip(small, large, strict=True))


def _leading(small: tuple[int, ...], large: tuple[int, ...]) -> Tensor:
    starts = [0, *accumulate(large)]
    return torch.cat([torch.arange(start, start + size) for start, size in zip(starts, small, strict=False)])


def _parts(net: nn.Module) -> Parts:
    """Return the parameters whose channels are groups side by side."""
    parts: Parts = {}
    for name, module in net.named_modules():
        if isinstance(module, Attention):
            c = module.out.out_channels
            parts[f"{name}.qkv.weight"], parts[f"{name}.qkv.bias"] = [(c,) * 3, (c,), (1,), (1,)], [(c,) * 3]
        if isinstance(module, ResidualBlock):
            c, width = module.conv1.out_channels, module.affine.in_features
            parts[f"{name}.affine.weight"], parts[f"{name}.affine.bias"] = [(c, c), (width,)], [(c, c)]
            parts[f"{name}.norm0.weight"] = parts[f"{name}.norm0.bias"] = [module.inputs]
            parts[f"{name}.conv0.weight"] = [(c,), module.inputs, (3,), (3,)]
            parts[f"{name}.skip.weight"] = [(c,), module.inputs, (1,), (1,)]
    return parts
