"""U-Nets in two halves, encoder and decoder, whose encoder's features can be had by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msdcli.errors import UserError
from msdcli.nets.layers import computing_in

Mode = Literal["keep", "down", "up"]


@dataclass(frozen=True)
class Cell:
    """One block of a U-Net before it is built: its name, its channels and the resolution it works at."""

    name: str
    in_channels: int
    out_channels: int
    resolution: int
    mode: Mode = "keep"


def encoder_cells(levels: Sequence[tuple[int, int]], *, num_blocks: int, first: tuple[int, int]) -> list[Cell]:
    """Blocks of the encoder for `levels` of (resolution, channels), the finest first; `first` is the first
    convolution's (in, out). The output of every cell is a skip connection."""
    cells = [Cell(f"{levels[0][0]}x{levels[0][0]}_conv", *first, levels[0][0])]
    for number, (resolution, channels) in enumerate(levels):
        if number:
            width = cells[-1].out_channels
            cells.append(Cell(f"{resolution}x{resolution}_down", width, width, resolution, "down"))
        for index in range(num_blocks):
            name = f"{resolution}x{resolution}_block{index}"
            cells.append(Cell(name, cells[-1].out_channels, channels, resolution))
    return cells


def decoder_cells(levels: Sequence[tuple[int, int]], *, num_blocks: int, encoder: Sequence[Cell]) -> list[Cell]:
    """Blocks of the decoder, the coarsest first: each `block` takes one skip connection, the last one first."""
    skips = [cell.out_channels for cell in encoder]
    width, cells = skips[-1], []
    for number, (resolution, channels) in reversed(list(enumerate(levels))):
        prefix = f"{resolution}x{resolution}"
        if number == len(levels) - 1:
            cells += [Cell(f"{prefix}_in{index}", width, width, resolution) for index in range(2)]
        else:
            cells.append(Cell(f"{prefix}_up", width, width, resolution, "up"))
        for index in range(num_blocks + 1):
            cells.append(Cell(f"{prefix}_block{index}", width + skips.pop(), channels, resolution))
            width = channels
    return cells


def attends(cell: Cell, resolutions: Sequence[int]) -> bool:
    """Self-attention is in the first block of the decoder and in all blocks proper at these resolutions."""
    return cell.name.endswith("in0") or ("block" in cell.name and cell.resolution in resolutions)


class TappedUNet(nn.Module):
    """F(x, c_noise, labels): `x` [n, C, H, W] scaled, `c_noise` [n], `labels` [n, label_dim] one-hot or None.

    Computes in `compute`, or in the type of its weights, or under autocast; the embedding's maths is float32 where
    autocast allows.
    """

    compute: torch.dtype | None = None
    enc: nn.ModuleDict
    dec: nn.ModuleDict

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the encoder's blocks, in order; a feature is what the decoder gets from that block."""
        return tuple(name for name in self.enc if "aux" not in name)

    def class_vectors(self) -> Tensor | None:
        """The learned vector of every class [label_dim, width], or None where there are no classes."""
        raise NotImplementedError

    def embed(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """Embedding of noise level and class [n, emb_channels]."""
        raise NotImplementedError

    def encode(self, x: Tensor, emb: Tensor, *, last: str | None = None) -> dict[str, Tensor]:
        """Skip connections by block name, up to block `last`."""
        raise NotImplementedError

    def decode(self, skips: dict[str, Tensor], emb: Tensor) -> Tensor:
        raise NotImplementedError

    def settle(self) -> None:
        """Do in place what the weights need before a call from outside, which makes it: nothing here."""

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, taps: Sequence[str] | None = None
    ) -> Tensor | list[Tensor]:
        """Return the raw output, or with `taps` the features of these blocks."""
        if taps is not None:
            return self.features(x, c_noise, labels, taps)
        emb = self.embed(c_noise, labels)
        return self.decode(self.encode(x.to(self.dtype), emb), emb)

    def features(self, x: Tensor, c_noise: Tensor, labels: Tensor | None, taps: Sequence[str]) -> list[Tensor]:
        """Features of the named encoder blocks, without running what comes after the last of them."""
        known = self.taps
        unknown = [tap for tap in taps if tap not in known]
        if unknown or not taps:
            raise UserError(f"taps {unknown or 'missing'}: this network has {', '.join(known)}")
        last = known[max(known.index(tap) for tap in taps)]
        skips = self.encode(x.to(self.dtype), self.embed(c_noise, labels), last=last)
        return [skips[tap] for tap in taps]

    @property
    def dtype(self) -> torch.dtype:
        return computing_in(self)


class ExactBuffers(nn.Module):
    """Keep this module's own buffers as they are when the network is cast: a rounded frequency is another teacher."""

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        exact = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in exact.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


def resample(x: Tensor, f: Tensor | None, mode: Mode, *, padding: int | None = None) -> Tensor:
    """Halve or double the resolution with the filter `f` [k, k] of sum 1, zeros outside; None is the 2 x 2 box."""
    if f is None:
        return F.avg_pool2d(x, 2) if mode == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")
    channels, size = x.shape[1], f.shape[-1]
    padding = (size - 1) // 2 if padding is None else padding
    f = f.to(x.dtype).expand(channels, 1, size, size)
    if mode == "down":
        return F.conv2d(x, f, stride=2, padding=padding, groups=channels)
    return F.conv_transpose2d(x, 4 * f, stride=2, padding=padding, groups=channels)


def fir(taps: Sequence[float]) -> Tensor:
    """The separable filter of these taps, [k, k] with sum 1."""
    f = torch.tensor(taps, dtype=torch.float32)
    return f.outer(f) / f.sum().square()


def is_box(taps: Sequence[float]) -> bool:
    return len(taps) == 2 and taps[0] == taps[1]
