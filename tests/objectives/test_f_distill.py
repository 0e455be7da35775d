"""f-distill: the weighted gradient is that of its divergence, its means are the whole batch's, and LADD is a switch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from msdcli.diffusion.divergences import WEIGHTS
from msdcli.objectives.adm import AdversarialDistributionMatching, RatioStatistics
from msdcli.recipe.stages import AdmSettings, DmSettings
from tests.objectives.test_batches_cut import learned, made
from tests.objectives.test_sid import (
    BOTH,
    MEAN,
    NODES,
    SIGMAS,
    STUDENT,
    VARIANCE,
    WEIGHT,
    F,
    N,
    Z,
    close,
    denoised,
    differences,
    log_ratio,
)


@pytest.mark.parametrize("s", SIGMAS)
@pytest.mark.parametrize("divergence", F)
def test_the_weighted_gradient_is_that_of_the_divergence(divergence: str, s: float) -> None:
    """E[h(r) (D_f - D_t) / sigma^2 dy] = dD_f(p_sigma || q_sigma), with the exact ratio and fake network."""

    def of(student: Tensor) -> Tensor:
        x = student[0] + (student[1] + s * s).sqrt() * NODES
        return (WEIGHT * F[divergence](log_ratio(x, student, s).exp())).sum()

    student = STUDENT.clone().requires_grad_()
    y = student[0] + student[1].sqrt() * Z
    x = (y + s * N).detach()
    h = WEIGHTS[divergence](log_ratio(x, STUDENT, s).exp())
    g = h * (denoised(x, STUDENT[0], STUDENT[1], s) - denoised(x, MEAN, VARIANCE, s)) / s**2
    (BOTH * g * y).sum().backward()
    assert student.grad is not None
    assert close(student.grad, differences(of, STUDENT), 1e-6)


def test_reverse_kl_is_dm_bit_for_bit() -> None:
    """The student's turn, where the heads have no weight."""
    dm, adm = DmSettings(fake_updates=1), AdmSettings(fake_updates=1, gan_weight=0.0, divergence="rkl")
    plain, named = (learned(settings, 1)[0][1::2] for settings in (dm, adm))
    assert len(plain) == 2 and all(torch.equal(a, b) for a, b in zip(plain, named, strict=True))


def test_means_are_those_of_the_batch_before() -> None:
    _, objective = learned(AdmSettings(fake_updates=1, gan_weight=0.1, divergence="kl", ratio_bins=2), 2, steps=1)
    statistics = objective.statistics
    assert isinstance(statistics, RatioStatistics) and isinstance(objective, AdversarialDistributionMatching)
    assert statistics.ratio.tolist() != [1.0, 1.0] and statistics.h.item() != 1.0
    kept = {name: tensor.clone() for name, tensor in statistics.state_dict().items()}
    statistics.settle({"by_bin": torch.tensor([[math.nan, 0.0], [2.0, 0.0]]), "h": torch.tensor(math.nan)}, 0.5)
    assert all(torch.equal(kept[name], tensor) for name, tensor in statistics.state_dict().items()), "nothing to learn"
    statistics.settle({"by_bin": torch.tensor([[6.0, 0.0], [2.0, 0.0]]), "h": torch.tensor(4.0)}, 0.5)
    assert statistics.ratio[0].item() == pytest.approx((kept["ratio"][0].item() + 3.0) / 2)
    assert torch.equal(statistics.ratio[1], kept["ratio"][1]) and statistics.h.item() == 2.0


def test_the_adversarial_loss_alone_has_no_fake_network() -> None:
    objective = made(AdmSettings(dm_weight=0.0, features="teacher", gan_weight=1.0, pairs="none"))
    assert set(objective.nets) == {"student", "head"}
    assert [names for names, _ in objective.turns(0)][-2:] == [("head",), ("student",)]


def test_a_divergence_needs_heads_and_something_to_weigh() -> None:
    for wrong in ({"gan_weight": 0.0}, {"dm_weight": 0.0}):
        with pytest.raises(ValueError, match="above 0"):
            AdmSettings(divergence="js", **wrong)  # type: ignore[arg-type]
