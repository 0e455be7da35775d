"""Eight awkward shapes in the plane, one class each: thin, broken, curved or nested."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from msdcli.recipe.data import Toy2dSettings
from msdcli.seeds import generator

Shape = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (u, v, side) uniform -> x, y in about [-1, 1]


def _ring(u: Tensor, v: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    return 0.9 * torch.cos(2 * math.pi * u), 0.9 * torch.sin(2 * math.pi * u)


def _two_rings(u: Tensor, v: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.where(side < 0.3, 0.35, 0.9)
    return radius * torch.cos(2 * math.pi * u), radius * torch.sin(2 * math.pi * u)


def _moons(u: Tensor, v: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    flip = torch.where(side < 0.5, 1.0, -1.0)
    return flip * (0.6 * torch.cos(math.pi * u) - 0.3), flip * (0.6 * torch.sin(math.pi * u) - 0.15)


def _spiral(u: Tensor, v: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    angle = 3.5 * math.pi * u.sqrt()
    radius = 0.95 * angle / (3.5 * math.pi)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _checkerboard(u: Tensor, v: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    column = (4 * u).floor()
    row = 2 * (2 * v).floor() + column.remainder(2)
    return 2 * u - 1, (row + 2 * (2 * v).frac() * 0.5) / 2 - 1


def _cross(u: Tensor, v: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    long, short = 1.9 * (u - 0.5), 0.12 * (v - 0.5)
    upright = side < 0.5
    return torch.where(upright, short, long), torch.where(upright, long, short)


def _grid(u: Tensor, v: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    return 0.45 * ((5 * u).floor() - 2), 0.45 * ((5 * v).floor() - 2)


def _wave(u: Tensor, v: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    x = 2 * u - 1
    return x, 0.6 * torch.sin(3 * math.pi * x) * torch.where(side < 0.5, 1.0, 0.4)


SHAPES: dict[str, Shape] = {
    "ring": _ring,
    "two rings": _two_rings,
    "moons": _moons,
    "spiral": _spiral,
    "checkerboard": _checkerboard,
    "cross": _cross,
    "grid": _grid,
    "wave": _wave,
}


class Toy2d:
    """Points [2] with standard deviation about 0.5; point i has class i mod 8."""

    shape = (2,)
    mixed = True
    thickness = 0.015

    def __init__(self, settings: Toy2dSettings) -> None:
        self.class_names = list(SHAPES)
        points = [self._draw(shape, settings, k) for k, shape in enumerate(SHAPES.values())]
        self._points = torch.stack(points, dim=1).reshape(-1, 2)[: settings.points]

    def _draw(self, shape: Shape, settings: Toy2dSettings, k: int) -> Tensor:
        rng: Generator = generator("toy2d", settings.seed, k)
        # Fixed-size blocks: point i stays the same however many points are asked for.
        blocks = []
        for _ in range(0, math.ceil(settings.points / len(SHAPES)), 1024):
            u, v, side = torch.rand(3, 1024, generator=rng)
            x, y = shape(u, v, side)
            blocks.append(torch.stack([x, y], dim=1) + self.thickness * torch.randn(1024, 2, generator=rng))
        return torch.cat(blocks)

    def __len__(self) -> int:
        return len(self._points)

    def images(self, numbers: Sequence[int]) -> Tensor:
        return self._points[list(numbers)]

    def labels(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor([n % len(SHAPES) for n in numbers], dtype=torch.int64)
