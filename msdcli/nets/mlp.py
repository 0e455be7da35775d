"""A residual MLP for points in the plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from msdcli.nets.embedding import Embedding, tap_number, zeroed
from msdcli.nets.layers import LayerNorm, Linear, computing_in

if TYPE_CHECKING:
    from msdcli.recipe.networks import MLPSettings


class Block(nn.Module):
    """x + out(SiLU(in(norm(x)) + affine(embedding))), the branch starting at zero."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.inner = Linear(width, width)
        self.affine = Linear(embedding, width)
        self.outer = zeroed(Linear(width, width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return x + self.outer(F.silu(self.inner(self.norm(x)) + self.affine(embedding).to(x.dtype)))


class MLP(nn.Module):
    """The raw network F(x, c_noise, condition) for x [batch, numbers]."""

    def __init__(self, settings: MLPSettings, *, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.embedding = Embedding(settings.embedding or settings.channels, num_classes)
        self.inlet = Linear(shape[0], settings.channels)
        self.blocks = nn.ModuleList(Block(settings.channels, self.embedding.width) for _ in range(settings.blocks))
        self.norm = LayerNorm(settings.channels)
        self.outlet = zeroed(Linear(settings.channels, shape[0]))

    @property
    def taps(self) -> list[str]:
        """The names of the blocks, in order."""
        return [f"block{i}" for i in range(len(self.blocks))]

    def features(self, x: Tensor, c_noise: Tensor, condition: Tensor | None, taps: Sequence[str]) -> list[Tensor]:
        """Return what the named blocks give, in the order asked for; blocks after the last of them do not run."""
        numbers = [tap_number(self.taps, tap) for tap in taps]
        embedding = self.embedding(c_noise, condition)
        found: list[Tensor] = []
        h = self.inlet(x.to(computing_in(self)))
        for block in self.blocks[: max(numbers) + 1]:
            h = block(h, embedding)
            found.append(h)
        return [found[i] for i in numbers]

    def forward(
        self, x: Tensor, c_noise: Tensor, condition: Tensor | None, taps: Sequence[str] | None = None
    ) -> Tensor | list[Tensor]:
        """Return the raw output, or with `taps` the features of these blocks."""
        if taps is not None:
            return self.features(x, c_noise, condition, taps)
        embedding = self.embedding(c_noise, condition)
        h = self.inlet(x.to(computing_in(self)))
        for block in self.blocks:
            h = block(h, embedding)
        return self.outlet(F.silu(self.norm(h)))
