"""f-distill: the weighted gradient is that of its divergence, its means are the whole batch's, and LADD is a switch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from msdcli import nets
from msdcli.diffusion.divergences import WEIGHTS
from msdcli.diffusion.draws import Draws, Source
from msdcli.diffusion.guidance import Guided
from msdcli.engine.distributed.group import SINGLE_PROCESS, ProcessGroup
from msdcli.engine.train.loop import gradients
from msdcli.engine.train.passes import Passes
from msdcli.objectives import Objective, objective_class
from msdcli.objectives.adm import AdversarialDistributionMatching, RatioStatistics
from msdcli.recipe.networks import UNetSettings
from msdcli.recipe.stages import (
    AdmSettings,
    CdSettings,
    DdoSettings,
    DmSettings,
    EdmSettings,
    FlowSettings,
    ProgressiveSettings,
    RegressSettings,
    SidSettings,
    StageSettings,
    TsmSettings,
)
from tests.objectives.test_adm import Pictures
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


def networks() -> list[nets.Denoiser]:
    torch.manual_seed(0)
    settings = UNetSettings(channels=8, embedding=8, multipliers=[1])
    made = [nets.build(settings, shape=(1, 8, 8), num_classes=10, sigma_data=0.5) for _ in range(2)]
    for parameter in [p for net in made for p in net.parameters()]:
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def made(settings: StageSettings, *, guided: bool = False) -> Objective:
    student, teacher = networks()
    teacher.requires_grad_(False)
    torch.manual_seed(1)
    asked = Guided(teacher, scale=(1.0, 3.0), interval=(0.1, 50.0)) if guided else teacher
    objective = objective_class(settings.objective)(settings, student, asked)
    with torch.no_grad():  # a fake network that is the teacher still has nothing to say
        for parameter in objective.nets.get("fake", torch.nn.Module()).parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return objective


class Quiet:
    """A log that nobody reads."""

    def images(self, *_: object) -> None: ...


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 8), torch.arange(16) % 2 + 3


EIGHT = EdmSettings(batch=8)


def learned(
    settings: StageSettings,
    passes: int,
    steps: int = 3,
    *,
    guided: bool = False,
    group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[list[Tensor], Objective]:
    """The gradients of every turn of some steps, in so many slices; nothing is updated."""
    objective, found = made(settings, guided=guided), list[Tensor]()
    source = Source(Pictures(), [3, 4], pairs=pairs())
    for step in range(steps):
        for turn, (names, loss) in enumerate(objective.turns(step)):
            for name, net in objective.nets.items():
                net.requires_grad_(name in names)
                net.zero_grad()
            draws, cut = (
                partial(Draws, source, 8, (0, 0, 0, step), turn),
                Passes(EIGHT, group=group, micro_batch=8 // passes),
            )
            gradients(objective, names, loss, draws, cut, source.device, Quiet())  # type: ignore[arg-type]
            params = [p.grad for name in names for p in objective.nets[name].parameters()]
            found.append(torch.cat([g.flatten() for g in params if g is not None]))
    return found, objective


SETTINGS: Sequence[StageSettings] = [
    EdmSettings(label_dropout=0.5),
    DdoSettings(label_dropout=0.5),
    TsmSettings(),
    DmSettings(fake_updates=1),
    DmSettings(fake_updates=1, sigmas=[2.5, 0.5], weight="none", fake_sigma="lognormal", pairs="none"),
    AdmSettings(fake_updates=1, gan_weight=0.1),
    AdmSettings(fake_updates=1, gan_weight=0.1, divergence="js", ratio_rate=0.5, pairs="none"),
    AdmSettings(fake_updates=1, gan_weight=0.1, divergence="kl", features="teacher", sigmas=[2.5, 0.5], pairs="none"),
    AdmSettings(fake_updates=1, gan_weight=1.0, dm_weight=0.0, features="teacher", head_penalty=0.1, pairs="none"),
    SidSettings(alpha=0.5),
    SidSettings(distance="huber", sigmas=[2.5, 0.5]),
    SidSettings(gan_weight=0.1, divergence="kl"),
    SidSettings(gan_weight=0.1, divergence="jeffreys", through_ratio=True),
    CdSettings(),
    RegressSettings(),
    RegressSettings(flow_weight=1.0),
    FlowSettings(anneal=1.0),
    ProgressiveSettings(intervals=2),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.objective}-{len(repr(s)) % 1000}")
def test_gradients_do_not_depend_on_how_a_batch_is_cut(settings: StageSettings) -> None:
    (whole, _), (cut, _) = learned(settings, 1), learned(settings, 4)
    for a, b in zip(whole, cut, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())


@pytest.mark.parametrize("settings", SETTINGS[2:], ids=lambda s: f"{s.objective}-{len(repr(s)) % 1000}")
def test_nor_with_a_teacher_that_is_guided(settings: StageSettings) -> None:
    """By a scale of each image's own; who asks the teacher learns something else than without."""
    found = {cut: learned(settings, cut, steps=1, guided=True)[0] for cut in (1, 4)}
    for a, b in zip(found[1], found[4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())
    asks = settings.asks_teacher and getattr(settings, "dm_weight", 1) > 0
    assert torch.equal(found[1][-1], learned(settings, 1, steps=1)[0][-1]) is not asks


def test_reverse_kl_is_adm_bit_for_bit() -> None:
    plain, named = (learned(AdmSettings(fake_updates=1, **how), 1)[0] for how in ({}, {"divergence": "rkl"}))
    assert all(torch.equal(a, b) for a, b in zip(plain, named, strict=True))


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
