"""Guidance of the teacher: away from a worse prediction, which is its own without the class (classifier-free guidance,
Ho and Salimans 2022, arXiv 2207.12598), a weaker network's (autoguidance, Karras et al. 2024, arXiv 2406.02507), or its
own without attention in some layers (perturbed-attention guidance, Ahn et al. 2024, arXiv 2403.17377).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from msdcli.diffusion.denoiser import Denoiser, per_image
from msdcli.diffusion.perturbed_attention import attention_layers, perturbed

NO_CLASS = -1  # a class number that stands for no class

DenoiserCall = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # D(x, sigma, condition)


Schedule = Literal["constant", "cfg++"]


class Guided(Denoiser):
    """D_worse + scale (D - D_worse) for noise levels in the half-open interval (low, high], else D (arXiv 2404.07724).

    `scale` is a number, or the ends of a range: then every image has one of its own, and `drawn` says which before the
    teacher is asked. With the `schedule` cfg++ it is lambda, and a sampler's step from sigma to sigma' has the scale
    lambda / (1 - sigma'/sigma): under DDIM that is CFG++ (Chung et al. 2024, arXiv 2406.08070), x' = D_lambda + sigma'
    eps_worse. The sampler tells sigma' by way of `at_level`; who asks without it is answered as for a step to 0.

    The worse prediction is `guide`'s for the same class; or, with `layers`, the teacher's own where these layers'
    attention maps are the identity (no names: the layers in its middle); or the teacher's own for no class, both
    branches in one call. Features and everything else are the teacher's. A deep copy is one of the plain teacher:
    students and fake networks start from the network, not from its guidance.
    """

    def __init__(
        self,
        teacher: Denoiser,
        *,
        scale: float | Sequence[float],
        interval: Sequence[float],
        schedule: Schedule = "constant",
        guide: Denoiser | None = None,
        layers: Sequence[str] | None = None,
    ) -> None:
        super().__init__(teacher, shape=teacher.shape, num_classes=teacher.num_classes, sigma_data=teacher.sigma_data)
        self.scale, self.interval, self.guide = scale, (interval[0], interval[1]), guide
        self.schedule, self.layers = schedule, layers
        self._attention = [] if layers is None else [*attention_layers(teacher.net, layers).values()]
        self.settings, self.reads_text, self.prompts = teacher.settings, teacher.reads_text, teacher.prompts

    def over(self, teacher: Denoiser, guide: Denoiser | None) -> Guided:
        """Return the same guidance of other networks."""
        options: dict[str, Any] = {"scale": self.scale, "interval": self.interval, "schedule": self.schedule}
        return Guided(teacher, guide=guide, layers=self.layers, **options)

    @property
    def plain(self) -> Denoiser:
        """The teacher without guidance."""
        teacher: Denoiser = self.net  # type: ignore[assignment]
        return teacher

    def scales(self, u: Tensor) -> Tensor:
        """Map uniform numbers `u` in [0, 1), one per image, to scales."""
        low, high = (self.scale, self.scale) if isinstance(self.scale, int | float) else self.scale
        return low + u * (high - low)

    @property
    def one_scale(self) -> float:
        """The scale of all images: a number of the host, which no step copies to a device."""
        assert isinstance(self.scale, int | float), "a range of scales: ask by way of `drawn`"
        return self.scale

    def inside(self, sigma: Tensor) -> Tensor:
        """Whether noise levels are guided."""
        return (sigma > self.interval[0]) & (sigma <= self.interval[1])

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        condition: Tensor | None = None,
        scales: Tensor | float | None = None,
        *,
        inside: bool | None = None,
    ) -> Tensor:
        """Return D(x, sigma, condition), guided where the level is inside the interval, by one scale or one per image.

        `inside` says so of the whole batch, where it has one level that the caller knows: one branch is enough outside.
        None: levels are mixed, both branches are evaluated and each image takes its own.
        """
        if inside is False:
            plain: Tensor = self.net(x, sigma, condition)
            return plain
        if scales is None:
            scales = self.one_scale
        scale = per_image(scales.to(x), x) if isinstance(scales, Tensor) else scales
        D, D_worse = self._branches(x, sigma, condition)
        guided = D_worse + scale * (D - D_worse)
        return guided if inside else torch.where(per_image(self.inside(sigma), x), guided, D)

    def _branches(self, x: Tensor, sigma: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return D and D_worse."""
        if self.guide is not None:
            return self.net(x, sigma, condition), self.guide(x, sigma, condition)
        if self.layers is not None:
            D = self.net(x, sigma, condition)
            with perturbed(self._attention):
                return D, self.net(x, sigma, condition)
        assert condition is not None and not condition.is_floating_point(), "guidance needs class numbers"
        both = torch.cat([condition, torch.full_like(condition, NO_CLASS)])
        D, D_worse = self.net(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return D, D_worse

    def features(self, x: Tensor, sigma: Tensor, condition: Tensor | None, taps: Sequence[str]) -> list[Tensor]:
        return self.plain.features(x, sigma, condition, taps)

    def __deepcopy__(self, memo: dict[int, Any]) -> Denoiser:
        return copy.deepcopy(self.plain, memo)


def unguided(teacher: Denoiser) -> Denoiser:
    """Return a teacher without its guidance, in the same memory."""
    return teacher.plain if isinstance(teacher, Guided) else teacher


def copied(teacher: Denoiser) -> Denoiser:
    """Return a copy of a teacher with its guidance, if it has any."""
    if not isinstance(teacher, Guided):
        return copy.deepcopy(teacher)
    return teacher.over(copy.deepcopy(teacher.plain), copy.deepcopy(teacher.guide))


class GuidedCall:
    """A guided teacher for one set of images, which have their scales, or one (None: the teacher's)."""

    def __init__(self, teacher: Guided, scales: Tensor | float | None, *, inside: bool | None = None) -> None:
        self.teacher, self.scales, self.inside = teacher, scales, inside

    def __call__(self, x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
        D: Tensor = self.teacher(x, sigma, condition, self.scales, inside=self.inside)
        return D

    def of_rows(self, rows: Tensor) -> GuidedCall:
        """Return the call for some of the images."""
        scales = self.scales[rows.to(self.scales.device)] if isinstance(self.scales, Tensor) else self.scales
        return GuidedCall(self.teacher, scales, inside=self.inside)

    def at_level(self, sigma: Tensor, following: float) -> GuidedCall:
        """Return the call for images at one noise level, from which a sampler goes on to `following`."""
        teacher, scales, inside = self.teacher, self.scales, bool(self.teacher.inside(sigma))
        if teacher.schedule == "cfg++" and inside:
            assert following < sigma, f"cfg++ is of steps down, not from {sigma} to {following}"
            scales = (teacher.one_scale if scales is None else scales) / (1 - following / float(sigma))
        return GuidedCall(teacher, scales, inside=inside)


def drawn(teacher: Any, uniform: Callable[[str], Tensor]) -> DenoiserCall:
    """Return the teacher for one set of images: where it is guided by a range, with a scale of each image's own.

    `uniform(purpose)` gives one number in [0, 1) per image, such as `Draws.uniform`.
    """
    if not isinstance(teacher, Guided) or isinstance(teacher.scale, int | float):
        ask: DenoiserCall = teacher
        return ask
    return GuidedCall(teacher, teacher.scales(uniform("guidance")))


def of_rows(ask: DenoiserCall, rows: Tensor | None) -> DenoiserCall:
    """Return the call for some of the images that `ask` is for; None: for all."""
    return ask.of_rows(rows) if isinstance(ask, GuidedCall) and rows is not None else ask


@runtime_checkable
class LevelledCall(Protocol):
    """What is asked otherwise where all images have one noise level, which is known."""

    def at_level(self, sigma: Tensor, following: float) -> DenoiserCall: ...


def at_level(ask: DenoiserCall, sigma: Tensor, following: float) -> DenoiserCall:
    """Return the call for images that all have the noise level `sigma` (a number on the CPU: nothing waits for it).

    `following` is the noise level that the sampler's step leads to. Guidance then evaluates no branch that its interval
    leaves out, and has the scale of its schedule; a stitched teacher asks its small network where that is its turn.
    """
    if isinstance(ask, Guided):
        ask = GuidedCall(ask, None)
    return ask.at_level(sigma, following) if isinstance(ask, LevelledCall) else ask
