"""No stage of training and no sampler waits for its device: every objective, network and guidance, without a GPU."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter

from msdcli import nets
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.ema import EMA
from msdcli.diffusion.generator import Generator
from msdcli.diffusion.guidance import Guided, drawn
from msdcli.diffusion.sampler import SOLVERS, solve
from msdcli.engine.checkpoints.train_state import TrainState
from msdcli.engine.distributed.group import SINGLE_PROCESS
from msdcli.engine.tracking.events import silent
from msdcli.engine.train import compiling, loop
from msdcli.engine.train.counting import MetaDraws
from msdcli.engine.train.log import TrainLog
from msdcli.nets.meta import on_meta
from msdcli.objectives import Objective, objective_class
from msdcli.recipe.networks import DiffusersNetworkSettings
from msdcli.recipe.stages import Stage
from tests.device import HostWaitError, NoWaiting
from tests.engine.train.test_precision import NETWORKS
from tests.tiny_unet import TINY_UNET

UNET2D = TINY_UNET | {
    "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "num_class_embeds": 3,
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 3,
    "norm_num_groups": 4,
}
MANY: dict[str, Any] = NETWORKS | {
    "unet2d": DiffusersNetworkSettings(class_name="UNet2DModel", config=UNET2D),
    "dit": DiffusersNetworkSettings(class_name="DiTTransformer2DModel", config=DIT),
}
GUIDANCE = ("none", "classifier-free", "range", "guide")
CLASSES = 3
# The stages of the registry: a new objective is covered when it is in the schema. Beside their defaults, what has more
# parts: several levels, heads, other divergences, clipping.
STAGES = {
    (kind := get_args(cls.model_fields["objective"].annotation)[0]): {"objective": kind}
    for cls in get_args(get_args(Stage)[0])
}
MORE: dict[str, dict[str, Any]] = {
    "dm of two levels": {"objective": "dm", "sigmas": [80.0, 2.5], "clip": 1.0, "fake_batch": "shared"},
    "adm with an f-divergence": {"objective": "adm", "divergence": "kl", "gan_weight": 0.1, "head_penalty": 0.1},
    "sid with a discriminator": {"objective": "sid", "divergence": "kl", "gan_weight": 0.1, "through_ratio": True},
    "cd of two levels": {"objective": "cd", "sigmas": [80.0, 2.5], "anchor": 0.002},
}


def network(name: str) -> Denoiser:
    """A network on the device that is not here."""
    settings = MANY[name]
    shape = (2,) if name == "mlp" else (3, 8, 8)
    with on_meta():
        return nets.build(settings, shape=shape, num_classes=CLASSES, sigma_data=0.5).requires_grad_(False).eval()


def guided(teacher: Denoiser, how: str) -> Denoiser:
    if how == "none":
        return teacher
    guide = copy.deepcopy(teacher) if how == "guide" else None
    return Guided(teacher, scale=[1.0, 3.0] if how == "range" else 2.0, interval=(0.5, 5.0), guide=guide)


def stage_of(given: dict[str, Any]) -> Any:
    stage: Any = TypeAdapter(Stage).validate_python(given | {"batch": 4, "steps": 100, "log_every": 50})
    return stage.model_copy(update={"fake_updates": 1}) if hasattr(stage, "fake_updates") else stage


def steps(objective: Objective, stage: Any, folder: Path) -> int:
    """Take whole steps, as the loop does: gradients, update, average, log; return how many operations."""
    ema = EMA(objective.nets[objective.product], stage.ema)
    optimizers: dict[str, Any] = {
        name: OneLaunch(net.parameters(), {"lr": 1e-3}) for name, net in objective.nets.items()
    }
    state = TrainState(objective.nets, optimizers, ema, objective.statistics)
    log = TrainLog(folder / "m.jsonl", state, stage, "test", silent, group=SINGLE_PROCESS, max_skipped=9)
    draws = MetaDraws(network_shape(objective), stage.batch)
    for _ in range(objective.cycle):  # tables that are made once, of noise levels say, come to the device here
        step(objective, stage, state, draws, log)
    with NoWaiting() as watched:
        for _ in range(objective.cycle):
            step(objective, stage, state, draws, log)
    return watched.operations


def step(objective: Objective, stage: Any, state: TrainState, draws: MetaDraws, log: TrainLog) -> None:
    draws.step = state.step
    loop.set_learning_rates(state, stage)
    for names, loss in objective.turns(state.step):
        compiling.learn(objective, names)
        objective.tally = {}
        per_image = loss(draws)
        log.images(names[0], per_image.detach(), objective.sigma)
        mean = per_image.mean()
        mean.backward()
        if objective.tally:
            objective.settle(objective.tally)
        assert any(p.grad is not None for name in names for p in objective.nets[name].parameters())
        loop.update(state, names, mean.detach(), stage.clip, log)
    state.ema.update(objective.nets[objective.product], state.step)
    state.step += 1
    log.tick([], objective)


class OneLaunch(torch.optim.Optimizer):
    """In the place of fused Adam, whose kernels do not exist on the meta device: a list of weights at once."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            if learning:
                with torch.no_grad():
                    torch._foreach_add_(learning, [p.grad for p in learning], alpha=-group["lr"])


def network_shape(objective: Objective) -> tuple[int, ...]:
    shape: tuple[int, ...] = objective.nets[objective.product].shape  # type: ignore[assignment]
    return shape


def made(given: dict[str, Any], name: str, how: str = "none") -> tuple[Objective, Any]:
    stage, teacher = stage_of(given), network(name)
    with torch.device("meta"):
        student = copy.deepcopy(teacher).requires_grad_(True)
        objective = objective_class(stage.objective)(stage, student, guided(teacher, how))
    for net in objective.nets.values():
        net.to("meta").train()
    if objective.statistics is not None:
        objective.statistics.to("meta")
    return objective, stage


# Every objective, network and guidance once; their product is slow.
DEFAULT = [
    *((name, "unet", "none") for name in STAGES),
    *(("tsm", name, "none") for name in MANY if name != "unet"),
    *(("tsm", "unet", how) for how in GUIDANCE[1:]),
]
EVERYTHING = [case for case in itertools.product((*STAGES, *MORE), MANY, GUIDANCE) if case not in DEFAULT]


@pytest.mark.parametrize(("stage", "name", "how"), DEFAULT)
def test_a_whole_step_never_waits_for_the_device(stage: str, name: str, how: str, tmp_path: Path) -> None:
    objective, settings = made((STAGES | MORE)[stage], name, how)
    assert steps(objective, settings, tmp_path) > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_no_objective_waits_with_any_guidance(name: str, tmp_path: Path) -> None:
    for stage, _, how in (case for case in EVERYTHING if case[1] == name):
        objective, settings = made((STAGES | MORE)[stage], name, how)
        assert steps(objective, settings, tmp_path / f"{stage}-{how}") > 100, (stage, how)


@pytest.mark.parametrize("how", [*GUIDANCE[:2], *(pytest.param(how, marks=pytest.mark.slow) for how in GUIDANCE[2:])])
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_solver_waits_for_the_device(solver: str, how: str) -> None:
    teacher, draws = guided(network("mlp"), how), MetaDraws((2,), 4)
    z, c = draws.normal("z"), draws.labels("data")
    ask = drawn(teacher, draws.uniform)
    with torch.no_grad(), NoWaiting() as watched:
        found = solve(ask, z, c, name=solver, steps=4, noise=lambda step: draws.normal("noise"))
    assert found.is_meta and found.shape == z.shape and watched.operations > 100


@pytest.mark.parametrize("sigmas", [(2.5,), (80.0, 2.5)])
def test_no_generator_waits_for_the_device(sigmas: tuple[float, ...]) -> None:
    net, draws = network("unet"), MetaDraws((3, 8, 8), 4)
    noise = draws.normal("noise", (len(sigmas) - 1, 3, 8, 8)) if len(sigmas) > 1 else None
    with torch.no_grad(), NoWaiting():
        assert Generator(net, sigmas)(draws.normal("z"), draws.labels("data"), noise).is_meta


# The harness itself: what it is there to find.


@pytest.mark.parametrize(
    "planted",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.ones(4),
        lambda x: x.cpu(),
        lambda x: torch.ones(4).to(x.device),
        lambda x: bool((x > 0).any()),
        lambda x: x[torch.arange(2)],
    ],
)
def test_a_planted_wait_is_found(planted: Any, tmp_path: Path) -> None:
    objective, settings = made({"objective": "tsm"}, "mlp")
    loss = objective.loss  # type: ignore[attr-defined]

    def waits(draws: Any) -> Any:
        per_image = loss(draws)
        if draws.step:  # not in the first step, which is not watched
            planted(per_image.detach())
        return per_image

    objective.turns = lambda step: iter([(("student",), waits)])  # type: ignore[method-assign]
    with pytest.raises(HostWaitError):
        steps(objective, settings, tmp_path)
