"""T-Stitch (Pan et al. 2024, arXiv 2402.14167): a small network at high noise levels, the teacher at the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.guidance import DenoiserCall, Guided, at_level, drawn, of_rows

TEACHER = -1  # the owner of conditions that no small network is for


@dataclass(frozen=True)
class Stitch:
    """D = D_small for noise levels above `above`, else the teacher's: of samples, whose levels a sampler knows.

    `owners[c]` is the number of the network of condition c in `networks`, or TEACHER; None: the one network is for all.
    """

    networks: Sequence[Denoiser]
    above: float
    owners: Sequence[int] | None = None

    def to(self, device: torch.device) -> Self:
        """Bring the networks to a device."""
        for network in self.networks:
            network.to(device)
        return self

    def call(self, teacher: Denoiser, condition: Tensor, uniform: Callable[[str], Tensor]) -> DenoiserCall:
        """Return the teacher, stitched, for images of these conditions (`uniform` as in `drawn`)."""
        if self.owners is None:
            rows = {0: None}
        else:
            owner = torch.tensor(self.owners, device=condition.device)[condition]
            rows = {k: (owner == k).nonzero().squeeze(1) for k in owner.unique().tolist()}
        calls = [
            (of_rows(drawn(teacher if k == TEACHER else self.networks[k], uniform), at), at) for k, at in rows.items()
        ]
        return StitchedCall(drawn(teacher, uniform), calls, self.above)

    def shares(self, teacher: Denoiser) -> list[tuple[Denoiser, float]]:
        """Return the networks that are asked above, and of how many of all conditions each."""
        if self.owners is None:
            return [(self.networks[0], 1.0)]
        nets = {TEACHER: teacher} | dict(enumerate(self.networks))
        owners = list(self.owners)
        return [(net, owners.count(k) / len(owners)) for k, net in nets.items() if k in owners]


class StitchedCall:
    """A stitched teacher for one set of images; `high` are calls above and the rows that each is for (None: all)."""

    def __init__(self, low: DenoiserCall, high: Sequence[tuple[DenoiserCall, Tensor | None]], above: float) -> None:
        self.low, self.high, self.above = low, high, above

    def __call__(self, x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
        raise AssertionError("a stitched teacher is for a sampler, which says its levels: ask by way of `at_level`")

    def at_level(self, sigma: Tensor, following: float) -> DenoiserCall:
        """Return the call for images at one noise level."""
        if not sigma > self.above:
            return at_level(self.low, sigma, following)
        high = [(at_level(ask, sigma, following), rows) for ask, rows in self.high]

        def ask_all(x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
            D = torch.empty_like(x)
            for ask, rows in high:
                if rows is None:
                    return ask(x, sigma, condition)
                D[rows] = ask(x[rows], sigma[rows], None if condition is None else condition[rows]).to(x.dtype)
            return D

        return ask_all


def small_under_guidance(small: Denoiser, teacher: Denoiser) -> Denoiser:
    """Return a small teacher guided as the teacher is."""
    return teacher.over(small, teacher.guide) if isinstance(teacher, Guided) else small
