"""Distribution matching (DMD, Yin et al. 2024, arXiv 2311.18828; DMD2, arXiv 2405.14867).

In a loop of your own, with your network (called as `net(c_in * x, c_noise, condition)`), optimizers and batches:

>>> import copy
>>> import torch
>>> from msdcli.diffusion.denoiser import Denoiser, one_step
>>> from msdcli.diffusion.draws import Batch
>>> from msdcli.objectives.dm import DistributionMatching
>>> from msdcli.recipe.stages import DmSettings
>>> class Net(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.inner, self.outer = torch.nn.Linear(2 + 1 + 4, 64), torch.nn.Linear(64, 2)
...     def forward(self, x, c_noise, c):
...         h = torch.cat([x, c_noise[:, None], torch.nn.functional.one_hot(c, 4)], dim=1)
...         return self.outer(torch.nn.functional.silu(self.inner(h)))
>>> loader = [(torch.randn(32, 2), torch.randint(4, (32,))) for _ in range(3)]
>>> teacher = Denoiser(Net(), shape=(2,), num_classes=4)  # trained, one hopes
>>> objective = DistributionMatching(DmSettings(pairs="none"), copy.deepcopy(teacher), teacher)
>>> optimizers = {name: torch.optim.AdamW(net.parameters(), lr=1e-3) for name, net in objective.nets.items()}
>>> for step, (y, c) in enumerate(loader):
...     for names, loss in objective.turns(step):
...         loss(Batch(y, c)).mean().backward()
...         for name in names:
...             optimizers[name].step()
...         for optimizer in optimizers.values():
...             optimizer.zero_grad()
>>> one_step(objective.student, torch.randn(5, 2), objective.settings.sigma_init, torch.arange(5) % 4).shape
torch.Size([5, 2])
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws
from msdcli.diffusion.guidance import NO_CLASS, DenoiserCall, Guided, drawn
from msdcli.nets import lora
from msdcli.objectives.base import Objective, Turn
from msdcli.recipe.stages import DmSettings, FakeSettings


class DistributionMatching(Objective):
    """The fake network follows the student's samples; the student follows the difference of the two scores.

    A student of several levels is trained by backward simulation (DMD2, Section 4.5): every batch leaves it at one
    level, drawn for the whole batch; the levels before run without gradient, from pure noise, as in sampling.
    """

    def __init__(self, settings: DmSettings, student: d.Denoiser, teacher: d.Denoiser) -> None:
        self.settings = settings
        self.student = student
        self.teacher = teacher
        self.fake, learns = fake_network(teacher, settings.fake)
        self.nets = {"student": student, "fake": learns}
        self.followers: tuple[str, ...] = ("fake",)  # what learns from the student's samples, before it takes its turn
        self.cycle = len(settings.sigmas)
        self._batches: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by slice

    def turns(self, step: int) -> Iterator[Turn]:
        self._batches = {}
        for _ in range(self.settings.fake_updates):
            yield self.followers, self.fake_loss
        yield ("student",), self.student_loss

    def fake_loss(self, draws: Draws) -> Tensor:
        y, c = self.fake_batch(draws)
        x, sigma = self.diffuse_for_fake(y, draws)
        return self.denoising_loss(x, sigma, c, y, draws)

    def denoising_loss(self, x: Tensor, sigma: Tensor, c: Tensor, y: Tensor, draws: Draws) -> Tensor:
        """The fake network's denoising score matching on the student's samples y."""
        if self.settings.fake_label_dropout:
            c = c.masked_fill(draws.uniform("fake label dropout") < self.settings.fake_label_dropout, NO_CLASS)
        fake = self.guided_fake(draws) if self.settings.fake_guidance_trained else self.fake
        error = d.image_mean((fake(x, sigma, c) - y).square())
        if self.settings.fake_weight == "none":
            return error
        if self.settings.fake_weight == "epsilon":
            return sigma**-2 * error
        # EDM's own weight is DMD2's: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
        return (sigma**-2 + self.teacher.sigma_data**-2) * error

    def student_loss(self, draws: Draws) -> Tensor:
        y, c = self.generate(self.shared(draws))
        return self.with_pairs(self.matching_loss(y, c, draws), draws)

    def matching_loss(self, y: Tensor, c: Tensor, draws: Draws) -> Tensor:
        """A loss with the gradient of KL(student || teacher), averaged over noise levels."""
        with torch.no_grad():
            x, sigma = self.diffuse(y, draws)
            teacher = drawn(self.teacher, draws.uniform)
            fake, target = self.guided_fake(draws)(x, sigma, c), teacher(x, sigma, self.taught(c, draws))
            gradient = d.matching_gradient(fake, target, y) if self.settings.weight == "dmd" else fake - target
            if (weight := self.divergence_weight(x, sigma, c, draws)) is not None:
                gradient = gradient * d.per_image(weight, gradient)
        return self.weighed(d.surrogate(y, gradient), c)

    def taught(self, c: Tensor, draws: Draws) -> Tensor:
        """Return what the teacher is asked for where the student is asked for c: other classes than those to forget
        (SFD, Chen et al. 2024, arXiv 2409.11219).
        """
        if (forget := self.settings.forget) is None:
            return c
        kept = tuple(k for k in range(self.teacher.num_classes) if k not in forget.classes)
        others = d.whole_numbers(kept if forget.instead == "random" else (forget.instead,), c.device)
        chosen = others[(draws.uniform("instead") * len(others)).long().to(c.device)]
        return torch.where(self.forgotten(c), chosen, c)

    def weighed(self, loss: Tensor, c: Tensor) -> Tensor:
        """Return the losses of images, those of classes to forget by their weight."""
        forget = self.settings.forget
        return loss if forget is None else torch.where(self.forgotten(c), forget.weight * loss, loss)

    def forgotten(self, c: Tensor) -> Tensor:
        """Whether conditions are of classes to forget."""
        assert self.settings.forget is not None
        return torch.isin(c, d.whole_numbers(tuple(self.settings.forget.classes), c.device))

    def guided_fake(self, draws: Draws) -> DenoiserCall:
        """Return the fake network as the student looks at it: with the guidance that `fake_guidance` says."""
        how = self.settings.fake_guidance
        if how == "none":
            return self.fake
        if how == "zero":
            return lambda x, sigma, c: self.fake(x, sigma, None if c is None else torch.full_like(c, NO_CLASS))
        guided = self.teacher if isinstance(self.teacher, Guided) else None
        if how == "same":
            return self.fake if guided is None else drawn(guided.over(self.fake, guided.guide), draws.uniform)
        interval = (0.0, torch.inf) if guided is None else guided.interval
        return Guided(self.fake, scale=float(how), interval=interval)

    def divergence_weight(self, x: Tensor, sigma: Tensor, c: Tensor, draws: Draws) -> Tensor | None:
        """Return what the gradient of every image is multiplied by; None: the divergence is KL(student || teacher)."""
        return None

    def with_pairs(self, loss: Tensor, draws: Draws) -> Tensor:
        """Add the regression on pairs, if the recipe asks for it."""
        if self.settings.pairs == "none":
            return loss
        return loss + self.settings.pair_weight * self.pair_loss(draws)

    def pair_loss(self, draws: Draws) -> Tensor:
        """DMD's regression on the teacher's samples from the same noise: one mean over the pairs."""
        z, y, c = draws.pairs(self.settings.pairs == "filtered", self.settings.pair_batch)
        return d.image_mean((d.one_step(self.student, z, self.settings.sigmas[0], c) - y).square()).mean()

    def fake_batch(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Samples for the fake network: fresh ones, or those of this step, made once."""
        if draws.part not in self._batches or self.settings.fake_batch == "fresh":
            with torch.no_grad():
                self._batches[draws.part] = self.generate(self.shared(draws))
        return self._batches[draws.part]

    def shared(self, draws: Draws) -> Draws:
        """The draws that samples are made from: the turn's own, or those that all turns of the step share."""
        return draws if self.settings.fake_batch == "fresh" else draws.of_step()

    def generate(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return samples y of the student, as it leaves one of its levels, and their conditions c."""
        levels = self.settings.sigmas
        last = draws.one_of("exit", len(levels)) if len(levels) > 1 else 0
        if last > 0 and self.settings.student_input == "data":
            y, c = self.leave_from_data(levels[last], draws)
        else:
            c = draws.labels(self.settings.labels)
            y = self.leave(levels[: last + 1], c, draws)
        samples = y.detach()
        self.health = {**self.health, "saturation": lambda: (samples.abs() > 1).float().mean()}
        return y, c

    def leave(self, sigmas: Sequence[float], c: Tensor, draws: Draws) -> Tensor:
        """Run the student from pure noise through its first levels; only the last of them has a gradient."""
        z = draws.normal("z")
        if len(sigmas) == 1:
            return d.one_step(self.student, z, sigmas[0], c)
        noise = torch.stack([draws.normal(f"step {k}") for k in range(1, len(sigmas))], dim=1)
        with torch.no_grad():
            y = d.few_step(self.student, z, sigmas[:-1], c, noise)
        return d.denoise(self.student, y + sigmas[-1] * noise[:, -1], sigmas[-1], c)

    def leave_from_data(self, sigma: float, draws: Draws) -> tuple[Tensor, Tensor]:
        """Run the student once, on noisy images of the data (FastGen's input of later levels)."""
        y, c = draws.real()
        return d.denoise(self.student, y + sigma * draws.normal("z"), sigma, c), c

    def diffuse_for_fake(self, y: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return x = y + sigma n and sigma for the fake network: drawn as for the student, or as EDM trains."""
        if self.settings.fake_sigma == "span":
            return self.diffuse(y, draws, self.fake_span)
        sigma = self.sigma = d.lognormal(draws.normal("fake sigma", ()), P_mean=-1.2, P_std=1.2)
        return y + d.per_image(sigma, y) * draws.normal("noise"), sigma

    @property
    def fake_span(self) -> Sequence[float]:
        """The part of the schedule that the fake network learns."""
        return self.settings.sigma_span if self.settings.fake_span is None else self.settings.fake_span

    def diffuse(self, y: Tensor, draws: Draws, span: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
        """Return x = y + sigma n and sigma, drawn from a span of the Karras schedule, `sigma_span` if None."""
        sigma = self.sigma = d.karras_draw(draws.uniform("sigma"), self.settings.sigma_span if span is None else span)
        return y + d.per_image(sigma, y) * draws.normal("noise"), sigma


def fake_network(teacher: d.Denoiser, settings: FakeSettings) -> tuple[d.Denoiser, nn.Module]:
    """Return a fake network that begins as the teacher, and what of it learns: all of a copy, or adapters on the
    teacher's own weights (VSD, arXiv 2305.16213; SwiftBrush, arXiv 2312.05239).
    """
    if settings.kind == "lora":
        return lora.adapted(teacher, settings.rank, settings.alpha)
    fake = copy.deepcopy(teacher)
    return fake, fake
