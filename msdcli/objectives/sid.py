"""Score identity distillation (SiD, Zhou et al. 2024, arXiv 2404.04057) and what grew from it.

With e = D_t - D_f at x = y + sigma n, the student y = G(z, c) minimises

    e . ((D_t - y) - alpha e) / w = (e . (D_f - y) + (1 - alpha) |e|^2) / w,    w = mean|y - D_t|,

differentiated through y, through x and through both networks. With the exact fake network, alpha = 1 is half the
gradient of E_sg(q)|e|^2 (the sampling density frozen) and alpha = 1/2 that of the whole Fisher divergence E_q|e|^2.
SiM (arXiv 2410.16794): the pseudo-Huber distance, e . (D_f - y) / sqrt(|e|^2 + c^2). SiDA (arXiv 2410.14919): a GAN
loss whose discriminator is the fake network's encoder. Uni-Instruct (arXiv 2505.20755): the loss times h(r), where
r = p_t / q.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.divergences import SECOND, WEIGHTS
from msdcli.diffusion.draws import Draws
from msdcli.diffusion.guidance import drawn
from msdcli.objectives.dm import DistributionMatching
from msdcli.recipe.stages import SidSettings


class ScoreIdentity(DistributionMatching):
    """`dm`'s two turns with a loss whose gradient passes through teacher and fake network."""

    def __init__(self, settings: SidSettings, student: d.Denoiser, teacher: d.Denoiser) -> None:
        super().__init__(settings, student, teacher)
        self.settings: SidSettings = settings
        self.taps = (settings.taps or self.fake.taps[-1:]) if settings.gan_weight > 0 else []

    def fake_loss(self, draws: Draws) -> Tensor:
        """The fake network's denoising loss, and, with a GAN, its encoder's: real against generated, at one noise."""
        y, c = self.fake_batch(draws)
        x, sigma = self.diffuse_for_fake(y, draws)
        loss = self.denoising_loss(x, sigma, c, y, draws)
        if self.settings.gan_weight == 0:
            return loss
        y_real, c_real = draws.real()
        x_real = y_real + d.per_image(sigma, y) * draws.normal("noise")
        real, generated = self.logits(x_real, sigma, c_real), self.logits(x, sigma, c)
        cross_entropy = d.image_mean(softplus(-real)) + d.image_mean(softplus(generated))
        seen = torch.cat([d.image_mean(real), -d.image_mean(generated)]).detach()
        self.health = {**self.health, "discriminator_accuracy": lambda: (seen > 0).float().mean()}
        weight = d.edm_weight(sigma, self.teacher.sigma_data)
        return loss + self.settings.head_weight * weight * cross_entropy / 2

    def matching_loss(self, y: Tensor, c: Tensor, draws: Draws) -> Tensor:
        sigma = self.sigma = d.continuous_karras(draws.uniform("sigma"), self.settings.sigma_span)
        x = y + d.per_image(sigma, y) * draws.normal("noise")
        D_t = drawn(self.teacher, draws.uniform)(x, sigma, self.taught(c, draws))
        D_f = self.guided_fake(draws)(x, sigma, c)
        logit = self.logits(x, sigma, c) if self.settings.gan_weight > 0 else None
        loss = identity_loss(y, D_t, D_f, self.settings, logit)
        if logit is not None:
            gan = d.image_mean(softplus(-logit)) / scale(y, D_t, self.settings)
            loss = loss + self.settings.gan_weight * gan
        return self.weighed(loss, c)

    def logits(self, x: Tensor, sigma: Tensor, c: Tensor) -> Tensor:
        """Return the discriminator's logits [batch, places]: the channels' mean of the fake network's features."""
        (features,) = self.fake.features(x, sigma, c, self.taps)
        return features.float().mean(1, keepdim=True).flatten(1)


def scale(y: Tensor, D_t: Tensor, settings: SidSettings) -> Tensor:
    """Return what an image's loss is divided by: mean|y - D_t|, or 1 without that weight."""
    return d.distance_to_teacher(y, D_t) if settings.weight == "dmd" else torch.ones(len(y), device=y.device)


def identity_loss(y: Tensor, D_t: Tensor, D_f: Tensor, settings: SidSettings, logit: Tensor | None = None) -> Tensor:
    """Return the loss of every image; `logit` [batch, places] is that of the density ratio at x, where there is one."""
    e = D_t - D_f
    first = d.image_mean(e * (D_f - y))
    if settings.distance == "huber":
        norm = (e.square().flatten(1).sum(1) + settings.huber_c**2).sqrt()
        loss = first * y[0].numel() / norm
    else:
        loss = (first + (1 - settings.alpha) * d.image_mean(e.square())) / scale(y, D_t, settings)
    if settings.divergence == "rkl" and not settings.through_ratio:
        return loss
    assert logit is not None, "a divergence looks at the discriminator"
    low, high = settings.ratio_clip
    ratio = d.image_mean(logit).clamp(-10, 10).exp().clamp(low, high)
    if not settings.through_ratio:
        return loss * WEIGHTS[settings.divergence](ratio.detach())
    # Half the gradient of E_q[h |e|^2]: h e.(D_f - y) + A |e|^2 / 2, everything differentiated through x.
    second = SECOND[settings.divergence](ratio) * d.image_mean(e.square()) / 2
    return (WEIGHTS[settings.divergence](ratio) * first + second) / scale(y, D_t, settings)
