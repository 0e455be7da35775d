"""Gradients of every objective do not depend on how a batch is cut; several processes: tests/engine/distributed."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from msdcli import nets
from msdcli.diffusion.draws import Draws, Source
from msdcli.diffusion.guidance import Guided
from msdcli.engine.distributed.group import SINGLE_PROCESS, ProcessGroup
from msdcli.engine.train.loop import gradients
from msdcli.engine.train.passes import Passes
from msdcli.nets.adapters import AdaptedDenoiser
from msdcli.objectives import Objective, objective_class
from msdcli.recipe.networks import UNetSettings
from msdcli.recipe.stages import (
    AdmSettings,
    CdSettings,
    DdoSettings,
    DmSettings,
    EctSettings,
    EdmSettings,
    FlowSettings,
    ProgressiveSettings,
    RegressSettings,
    ScdSettings,
    SidSettings,
    Stage,
    StageSettings,
    TcmSettings,
    TsmSettings,
)
from msdcli.recipe.student import AdapterSettings
from tests.objectives.test_adm import Pictures


def networks() -> list[nets.Denoiser]:
    torch.manual_seed(0)
    settings = UNetSettings(channels=8, embedding=8, multipliers=[1])
    made = [nets.build(settings, shape=(1, 8, 8), num_classes=10, sigma_data=0.5) for _ in range(2)]
    for parameter in [p for net in made for p in net.parameters()]:
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def made(settings: StageSettings, *, guided: bool = False, adapted: bool = False) -> Objective:
    student, teacher = networks()
    teacher.requires_grad_(False)
    if adapted:
        student = AdaptedDenoiser(student.requires_grad_(False), AdapterSettings(rank=2))
        for parameter in student.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    torch.manual_seed(1)
    asked = Guided(teacher, scale=(1.0, 3.0), interval=(0.1, 50.0)) if guided else teacher
    objective = objective_class(settings.objective)(settings, student, asked)
    torch.manual_seed(3)
    with torch.no_grad():  # networks that are the teacher, or the student, still have nothing to say
        for parameter in own_parameters(objective):
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return objective


def own_parameters(objective: Objective) -> Iterator[Tensor]:
    """The parameters of the fake network, and of what the loop fills with what the stage before made."""
    for net in [objective.nets.get("fake"), *(getattr(objective, name) for name in objective.frozen)]:
        yield from [] if net is None else net.parameters()


class Quiet:
    """A log that nobody reads."""

    def images(self, *_: object) -> None: ...


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 8), torch.arange(16) % 2 + 3


EIGHT = EdmSettings(batch=8)


def learned(
    settings: StageSettings, passes: int, steps: int = 2, *, group: ProcessGroup = SINGLE_PROCESS, **how: bool
) -> tuple[list[Tensor], Objective]:
    """The gradients of every turn of some steps, in so many slices; nothing is updated.

    In the second step figures of a whole batch are known, and a student of two levels leaves the other one.
    """
    objective, found = made(settings, **how), list[Tensor]()
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
    TsmSettings(features=1.0),
    DmSettings(fake_updates=1),
    DmSettings(fake_updates=1, sigmas=[2.5, 0.5], weight="none", fake_sigma="lognormal", pairs="none"),
    DmSettings(fake_updates=1, sigmas=[2.5, 0.5], student_input="data", fake_guidance="same", fake_label_dropout=0.5),
    DmSettings(fake_updates=1, pairs="none", forget={"classes": [3]}),  # type: ignore[arg-type]
    AdmSettings(fake_updates=1, gan_weight=0.1),
    AdmSettings(fake_updates=1, gan_weight=0.1, divergence="js", ratio_rate=0.5, pairs="none"),
    AdmSettings(fake_updates=1, gan_weight=0.1, divergence="kl", features="teacher", sigmas=[2.5, 0.5], pairs="none"),
    AdmSettings(fake_updates=1, gan_weight=1.0, dm_weight=0.0, features="teacher", head_penalty=0.1, pairs="none"),
    SidSettings(alpha=0.5),
    SidSettings(distance="huber", sigmas=[2.5, 0.5]),
    SidSettings(gan_weight=0.1, divergence="kl"),
    SidSettings(gan_weight=0.1, divergence="jeffreys", through_ratio=True),
    CdSettings(),
    EctSettings(sigmas=[80.0, 0.8], first_round=1),
    EctSettings(path="data", huber_c=0.00054, first_round=1),
    TcmSettings(sigmas=[80.0, 2.0], first_round=1),
    ScdSettings(tangent_warmup=2),
    ScdSettings(derivative="central", tangent_warmup=0),
    RegressSettings(),
    RegressSettings(flow_weight=1.0),
    FlowSettings(anneal=1.0),
    ProgressiveSettings(intervals=2),
    ProgressiveSettings(intervals=2, ancestor="before"),
]
STUDENTS = SETTINGS[2:]  # the teacher's own stages are before them
# Of every family its last form, for what objectives have in common.
FEW = [
    next(s for s in reversed(SETTINGS) if s.objective == name and getattr(s, "dm_weight", 1) > 0)
    for name in ("dm", "adm", "sid", "scd", "progressive")
]


def name_of(settings: StageSettings) -> str:
    return f"{settings.objective}-{SETTINGS.index(settings)}"


def alike(whole: list[Tensor], cut: list[Tensor]) -> None:
    """Equal to 1e-5 of the largest number, and not because there is nothing."""
    for a, b in zip(whole, cut, strict=True):
        largest = a.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * largest)


def test_every_objective_is_here() -> None:
    kinds = [*typing.get_args(typing.get_args(Stage)[0]), DdoSettings]
    assert {s.objective for s in SETTINGS} == {kind.model_fields["objective"].default for kind in kinds}


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_gradients_do_not_depend_on_how_a_batch_is_cut(settings: StageSettings) -> None:
    alike(*(learned(settings, passes)[0] for passes in (1, 4)))


@pytest.mark.parametrize("settings", STUDENTS, ids=name_of)
def test_nor_with_a_teacher_that_is_guided(settings: StageSettings) -> None:
    """By a scale of each image's own; who asks the teacher learns something else than without."""
    found = {cut: learned(settings, cut, steps=1, guided=True)[0] for cut in (1, 4)}
    alike(found[1], found[4])
    asks = settings.asks_teacher and getattr(settings, "dm_weight", 1) > 0
    assert torch.equal(found[1][-1], learned(settings, 1, steps=1)[0][-1]) is not asks


@pytest.mark.parametrize("settings", FEW, ids=name_of)
def test_nor_of_students_that_are_adapters(settings: StageSettings) -> None:
    pytest.importorskip("peft")
    alike(*(learned(settings, passes, adapted=True, guided=True)[0] for passes in (1, 4)))
