"""Adversarial distribution matching: `dm` continued with a GAN loss (MSD, arXiv 2410.23274; DMD2, arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws
from msdcli.nets.discriminator import Discriminator
from msdcli.objectives.base import Turn
from msdcli.objectives.dm import DistributionMatching
from msdcli.recipe.stages import AdmSettings


class AdversarialDistributionMatching(DistributionMatching):
    """Heads on noisy features tell the part's real images from samples; the student also learns to pass for real.

    With `features: fake` (DMD2) the features come from the trainable fake network, whose encoder the heads train too;
    with `features: teacher` (FastGen) from the frozen teacher. Real images are of the student's part only.
    """

    def __init__(self, settings: AdmSettings, student: d.Denoiser, teacher: d.Denoiser) -> None:
        super().__init__(settings, student, teacher)
        self.settings: AdmSettings = settings
        self.feature_network = self.fake if settings.features == "fake" else teacher
        self.taps = settings.taps or self.feature_network.taps[-1:]
        self.head = Discriminator(self.feature_network, self.taps, norm=settings.head_norm)
        self.nets["head"] = self.head

    def turns(self, step: int) -> Iterator[Turn]:
        self._batches = {}
        for _ in range(self.settings.fake_updates):
            yield ("fake", "head"), self.fake_loss
        yield ("student",), self.student_loss

    def fake_loss(self, draws: Draws) -> Tensor:
        """DM's loss of the fake network, and the heads' on as many real as generated images, in one call."""
        y, c = self.fake_batch(draws)
        x, sigma = self.diffuse_for_fake(y, draws)
        loss = self.denoising_loss(x, sigma, c, y)
        y_real, c_real = draws.real()
        x_real, sigma_real = self.see(y_real, draws, "real")
        if self.settings.gan_noise == "own":
            x, sigma = self.see(y, draws, "generated")
        x, sigma, c = torch.cat([x_real, x]), torch.cat([sigma_real, sigma]), torch.cat([c_real, c])
        real, generated = self.decisions(x, sigma, c).chunk(2, dim=1)
        seen = torch.cat([real, -generated], dim=1).detach().mean(0)
        self.health = {**self.health, "discriminator_accuracy": lambda: (seen > 0).float().mean()}
        return loss + self.settings.head_weight * (softplus(-real) + softplus(generated)).mean(0)

    def student_loss(self, draws: Draws) -> Tensor:
        """DM's loss of the student, and softplus(-logit) of its samples (the non-saturating GAN loss)."""
        y, c = self.generate(self.shared(draws))
        loss = self.matching_loss(y, c, draws)
        x, sigma = self.see(y, draws, "generated") if self.settings.gan_noise == "own" else self.diffuse(y, draws)
        return loss + self.settings.gan_weight * softplus(-self.decisions(x, sigma, c)).mean(0)

    def see(self, y: Tensor, draws: Draws, what: str) -> tuple[Tensor, Tensor]:
        """Return noisy images for the heads, and their noise levels."""
        sigma = d.karras_draw(draws.uniform(f"gan sigma {what}"), self.settings.gan_span)
        return y + d.per_image(sigma, y) * draws.normal(f"gan noise {what}"), sigma

    def logits(self, x: Tensor, sigma: Tensor, c: Tensor) -> Tensor:
        """Return the discriminator's logit of each noisy image [batch]: the mean of the heads'."""
        heads: Tensor = self.head(self.feature_network.features(x, sigma, c, self.taps))
        return heads.mean(0)

    def decisions(self, x: Tensor, sigma: Tensor, c: Tensor) -> Tensor:
        """Return the logits whose losses are averaged [decisions, batch]: every head's own, or their mean alone."""
        if self.settings.tap_loss == "mean_logit":
            return self.logits(x, sigma, c)[None]
        heads: Tensor = self.head(self.feature_network.features(x, sigma, c, self.taps))
        return heads
