"""Adversarial distribution matching: `dm` continued with a GAN loss (MSD, arXiv 2410.23274; DMD2, arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.divergences import WEIGHTS
from msdcli.diffusion.draws import Draws
from msdcli.nets.discriminator import Discriminator
from msdcli.objectives.dm import DistributionMatching
from msdcli.recipe.stages import AdmSettings


class RatioStatistics(nn.Module):
    """The mean density ratio by noise level (`bins` equal parts of its draw), and the mean of h; both begin at 1."""

    ratio: Tensor
    h: Tensor

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.register_buffer("ratio", torch.ones(bins))
        self.register_buffer("h", torch.ones(()))

    def sums(self, ratio: Tensor, bins: Tensor, h: Tensor) -> dict[str, Tensor]:
        """Return the sums of a slice of a batch: of ratios and images by bin, and of h."""
        empty = torch.zeros_like(self.ratio)
        by_bin = torch.stack([empty.index_add(0, bins, ratio), empty.index_add(0, bins, torch.ones_like(ratio))])
        return {"by_bin": by_bin, "h": h.sum()}

    def settle(self, sums: Mapping[str, Tensor], rate: float) -> None:
        """Move to the means of a batch, of which `rate` stays behind; what is not finite or empty changes nothing."""
        total, images = sums["by_bin"]
        mean = rate * self.ratio + (1 - rate) * total / images
        self.ratio.copy_(torch.where((images > 0) & mean.isfinite(), mean, self.ratio))
        mean_h = sums["h"] / images.sum()
        self.h.copy_(torch.where(mean_h.isfinite() & (mean_h > 0), mean_h, self.h))


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
        self.followers = ("fake", "head")
        if self.adversarial_alone:
            self.followers = ("head",)
            del self.fake, self.nets["fake"]
        if settings.divergence != "rkl":
            self.statistics = RatioStatistics(settings.ratio_bins)

    def matching_loss(self, y: Tensor, c: Tensor, draws: Draws) -> Tensor:
        weight = self.settings.dm_weight
        if weight == 0:
            return d.image_mean(y) * 0
        loss = super().matching_loss(y, c, draws)
        return loss if weight == 1 else weight * loss

    @property
    def adversarial_alone(self) -> bool:
        """Whether the heads are all that the student learns from (LADD)."""
        return self.settings.dm_weight == 0 and self.settings.features == "teacher"

    def fake_loss(self, draws: Draws) -> Tensor:
        """DM's loss of the fake network, and the heads' on as many real as generated images, in one call."""
        y, c = self.fake_batch(draws)
        x, sigma = self.diffuse_for_fake(y, draws)
        loss = d.image_mean(y) * 0 if self.adversarial_alone else self.denoising_loss(x, sigma, c, y, draws)
        y_real, c_real = draws.real()
        x_real, sigma_real = self.see(y_real, draws, "real")
        if self.settings.gan_noise == "own":
            x, sigma = self.see(y, draws, "generated")
        if self.settings.head_penalty > 0:
            loss = loss + self.settings.head_weight * self.settings.head_penalty * self.penalty(
                x_real, sigma_real, c_real
            )
        x, sigma, c = torch.cat([x_real, x]), torch.cat([sigma_real, sigma]), torch.cat([c_real, c])
        real, generated = self.decisions(x, sigma, c).chunk(2, dim=1)
        seen = torch.cat([real, -generated], dim=1).detach().mean(0)
        self.health = {**self.health, "discriminator_accuracy": lambda: (seen > 0).float().mean()}
        return loss + self.settings.head_weight * (softplus(-real) + softplus(generated)).mean(0)

    def student_loss(self, draws: Draws) -> Tensor:
        """DM's loss of the student, and softplus(-logit) of its samples (the non-saturating GAN loss)."""
        y, c = self.generate(self.shared(draws))
        loss = self.with_pairs(self.matching_loss(y, c, draws), draws)
        x, sigma = self.see(y, draws, "generated") if self.settings.gan_noise == "own" else self.diffuse(y, draws)
        return loss + self.settings.gan_weight * softplus(-self.decisions(x, sigma, c)).mean(0)

    def penalty(self, x: Tensor, sigma: Tensor, c: Tensor) -> Tensor:
        """R1 (Mescheder et al. 2018, arXiv 1801.04406): half the squared gradient of the logits at real images."""
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.logits(x, sigma, c).sum(), x, create_graph=True)
        return slope.square().flatten(1).sum(1) / 2

    def divergence_weight(self, x: Tensor, sigma: Tensor, c: Tensor, draws: Draws) -> Tensor | None:
        """h(r) of f-distill, the density ratio r from the heads, over its mean: of the batches before, so that it does
        not depend on how this one is cut (Xu et al. 2025, arXiv 2502.15681, Section 3.3).
        """
        if self.settings.divergence == "rkl":
            return None
        assert isinstance(self.statistics, RatioStatistics)
        low, high = self.settings.ratio_clip
        ratio = self.logits(x, sigma, c).clamp(-10, 10).exp().clamp(low, high)
        bins = (draws.uniform("sigma") * self.settings.ratio_bins).long()
        h = WEIGHTS[self.settings.divergence](ratio / self.statistics.ratio[bins])
        self.tally = self.statistics.sums(ratio, bins, h)
        weight = h / self.statistics.h
        self.health = {**self.health, "largest_divergence_weight": lambda: weight.max()}
        return weight

    def settle(self, sums: Mapping[str, Tensor]) -> None:
        assert isinstance(self.statistics, RatioStatistics)
        self.statistics.settle(sums, self.settings.ratio_rate)

    def see(self, y: Tensor, draws: Draws, what: str) -> tuple[Tensor, Tensor]:
        """Return noisy images for the heads, and their noise levels."""
        sigma = d.karras_draw(draws.uniform(f"gan sigma {what}"), self.settings.gan_span)
        return y + d.per_image(sigma, y) * draws.normal(f"gan noise {what}"), sigma

    def heads(self, x: Tensor, sigma: Tensor, c: Tensor) -> Tensor:
        """Return every head's logit of each noisy image [taps, batch]."""
        found: Tensor = self.head(self.feature_network.features(x, sigma, c, self.taps))
        return found

    def logits(self, x: Tensor, sigma: Tensor, c: Tensor) -> Tensor:
        """Return the discriminator's logit of each noisy image [batch]: the mean of the heads'."""
        return self.heads(x, sigma, c).mean(0)

    def decisions(self, x: Tensor, sigma: Tensor, c: Tensor) -> Tensor:
        """Return the logits whose losses are averaged [decisions, batch]: every head's own, or their mean alone."""
        if self.settings.tap_loss == "mean_logit":
            return self.logits(x, sigma, c)[None]
        return self.heads(x, sigma, c)
