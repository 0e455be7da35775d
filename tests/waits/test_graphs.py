"""What is compiled, counted on the CPU: no graph breaks, as many graphs as a step's networks have variants, and none
more in the step after.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from msdcli import nets
from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine.train import compiling
from msdcli.engine.train.counting import MetaDraws
from msdcli.engine.train.trial import RandomDraws
from msdcli.nets.meta import on_meta
from msdcli.objectives import Objective, objective_class
from msdcli.recipe.networks import DiffusersNetworkSettings, EdmNetworkSettings
from tests.waits.cases import MORE, NETWORKS, STAGES, network, settings_of

# torch looks at .grad of the networks' inputs and hides its own warning, which our tests make an error.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
ALL = STAGES | MORE
FAST = [("mlp", stage) for stage in ("adm", "scd")]
SLOW = [
    *(case for case in itertools.product(("mlp", "unet"), STAGES) if case not in FAST),
    *(("mlp", stage) for stage in MORE),
    *((name, "tsm") for name in NETWORKS if name not in ("mlp", "unet")),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graphs of other tests, torch's own limit of variants, and a failure where it is exceeded."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def objective_of(stage: Any, teacher: Denoiser) -> Objective:
    student = copy.deepcopy(teacher).requires_grad_(True)
    objective = objective_class(stage.objective)(stage, student, teacher)
    for net in objective.nets.values():
        net.train()
    return objective


def cycle(objective: Objective, draws: MetaDraws) -> None:
    """Every turn of a cycle of steps, forward and backward."""
    for step in range(objective.cycle):
        draws.step = step - 1  # which counts on, when it is asked for a level
        compiling.run_turns(objective, lambda turn: draws)


def variants(objective: Objective, draws: MetaDraws) -> int:
    """Count what makes a graph another one: shapes and types, blocks asked for, what has or learns by gradients, and
    where layers drop out, whether they do. Forward-mode derivatives are not compiled.
    """
    found = set()

    def described(value: Any) -> Any:
        return (value.shape, value.dtype, value.requires_grad) if isinstance(value, torch.Tensor) else value

    def note(net: Any, args: Any, kwargs: Any) -> None:
        if forward_ad._current_level < 0:
            drops = any("dropout" in vars(m) or isinstance(m, torch.nn.Dropout) for m in net.modules())
            learns = tuple(p.requires_grad for p in net.parameters())
            found.add((*map(described, args), *kwargs, torch.is_grad_enabled(), learns, drops and net.training))

    hooks = [net.register_forward_pre_hook(note, with_kwargs=True) for net in compiling.raw_networks(objective)]
    cycle(objective, draws)
    for hook in hooks:
        hook.remove()
    return len(found)


def graphs() -> int:
    from torch._dynamo.utils import counters

    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("name", "stage"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_stage_compiles_once_for_each_variant_and_without_breaks(name: str, stage: str) -> None:
    objective = objective_of(settings_of(ALL[stage]), network(name))
    draws = RandomDraws(objective.student, 4, torch.device("cpu"))  # type: ignore[attr-defined]
    expected = variants(objective, draws)
    compiling.compile_networks(objective, backend="eager")
    cycle(objective, draws)
    assert graphs() == expected
    cycle(objective, draws)
    assert graphs() == expected, "compiled again without need"


@pytest.mark.filterwarnings("ignore:Graph break")
def test_a_planted_break_is_found() -> None:
    objective = objective_of(settings_of({"objective": "edm"}), network("mlp"))
    embedding: Any = objective.student.net.embedding  # type: ignore[attr-defined]
    plain = embedding.forward
    embedding.forward = lambda c_noise, condition: (c_noise.sum().item(), plain(c_noise, condition))[1]
    compiling.compile_networks(objective, backend="eager")
    cycle(objective, RandomDraws(objective.student, 4, torch.device("cpu")))  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="item"):
        graphs()


def test_another_size_of_a_batch_is_another_graph() -> None:
    objective = objective_of(settings_of({"objective": "edm"}), network("mlp"))
    compiling.compile_networks(objective, backend="eager")
    for number, batch in enumerate((4, 6, 4, 6), start=1):
        cycle(objective, RandomDraws(objective.student, batch, torch.device("cpu")))  # type: ignore[attr-defined]
        assert graphs() == min(number, 2)


ADM_64 = EdmNetworkSettings(
    arguments={"model_type": "DhariwalUNet", "model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3}
)
SD_15 = DiffusersNetworkSettings(
    class_name="UNet2DConditionModel",
    config={"sample_size": 64, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768},
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("settings", "shape", "classes", "millions"),
    [(ADM_64, (3, 64, 64), 1000, 296), (SD_15, (4, 64, 64), 0, 860)],
    ids=["ADM-64", "SD 1.5"],
)
def test_the_largest_networks_are_one_graph(settings: Any, shape: tuple[int, ...], classes: int, millions: int) -> None:
    """Without memory: their weights are on the meta device, and a graph is traced and not run on numbers."""
    with on_meta():
        net = nets.build(settings, shape=shape, num_classes=classes, sigma_data=0.5).train()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
    net.net.compile(backend="eager", dynamic=False, fullgraph=True)
    draws = MetaDraws(shape, 2)
    for _ in range(2):
        net(draws.normal("x"), draws.uniform("sigma"), draws.labels("data")).square().mean().backward()
    assert graphs() == 1
