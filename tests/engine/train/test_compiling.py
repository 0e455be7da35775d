"""torch.compile of an objective's networks: the same losses and gradients, no breaks, and a way back."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from msdcli import nets
from msdcli.engine.distributed.group import ProcessGroup
from msdcli.engine.train import compiling, precision
from msdcli.engine.train.passes import Passes
from msdcli.errors import UserError
from msdcli.nets.meta import on_meta
from msdcli.recipe.networks import EdmNetworkSettings, UNetSettings
from msdcli.recipe.stages import EdmSettings
from tests.engine.train.test_precision import CPU, STAGES, build, cosine, losses_and_gradients, objective_of


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    """torch's own limit of variants at the beginning, and a failure where it is exceeded."""
    import torch._dynamo

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        yield


# torch looks at .grad of the networks' inputs and hides its own warning, which our tests make an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("mlp", "adm fake"),
        pytest.param("unet", "adm fake", marks=pytest.mark.slow),
        pytest.param("unet", "sid", marks=pytest.mark.slow),
        pytest.param("song", "adm teacher", marks=pytest.mark.slow),
        pytest.param("edm2", "dm", marks=pytest.mark.slow),
    ],
)
def test_compiled_networks_agree_with_eager_ones_without_graph_breaks(name: str, stage: str) -> None:
    from torch._dynamo.utils import counters

    objective = objective_of(STAGES[stage], build(name))
    plain = losses_and_gradients(objective)
    counters.clear()
    compiling.compile_networks(objective, backend="aot_eager")
    fast = losses_and_gradients(objective)
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]
    for key, (loss, gradient) in fast.items():
        torch.testing.assert_close(loss, plain[key][0], rtol=1e-5, atol=1e-7)
        assert cosine(gradient, plain[key][1]) > 0.9999
    known = counters["stats"]["unique_graphs"]
    losses_and_gradients(objective)
    assert counters["stats"]["unique_graphs"] == known, "compiled again without need"


def test_every_variant_of_the_networks_code_is_compiled() -> None:
    """Student, fake and teacher share their code; sizes of a batch, types and what learns make more of it than torch's
    limit of eight, beyond which it would run eagerly and say so once in a log.
    """
    from torch._dynamo.utils import counters

    counters.clear()
    for kind in ("float32", "bf16"):
        objective = objective_of(STAGES["dm"], build("mlp"))
        precision.lower(objective, kind)
        compiling.compile_networks(objective, backend="eager")
        for batch in (8, 4, 2):
            losses_and_gradients(objective, batch=batch)
    assert counters["stats"]["unique_graphs"] > 8 and not counters["graph_break"]


def test_copies_are_plain_and_undoing_leaves_nothing() -> None:
    objective = objective_of(STAGES["dm"], build("unet"))
    compiling.compile_networks(objective, backend="eager")
    copied = copy.deepcopy(objective.nets["student"])
    assert all(module._compiled_call_impl is None for module in copied.modules())
    assert copied.state_dict().keys() == objective.nets["student"].state_dict().keys()
    compiling.undo(objective)
    assert all(net._compiled_call_impl is None for net in compiling.raw_networks(objective)) and "turns" not in vars(
        objective
    )


def test_a_cpu_compiles_only_what_it_is_told_to() -> None:
    objective = objective_of(STAGES["dm"], build("unet"))

    def never() -> None:
        raise AssertionError("a trial was run")

    options = {"steps": 10**9, "passes": Passes(EdmSettings()), "device": CPU, "report": print}
    assert not compiling.prepare(objective, never, wanted="auto", **options)  # type: ignore[arg-type]
    assert not compiling.prepare(objective, never, wanted=False, **options)  # type: ignore[arg-type]


def test_compiling_pays_by_all_passes_and_the_leader_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a second: 1,000 of them do not pay, in two passes each they do, unless the leader was faster."""
    monkeypatch.setattr(compiling, "timed", lambda trial, device: trial() or 1.0)
    trials, gpu, stage = list[int](), torch.device("cuda"), EdmSettings(batch=8)

    def pays(passes: Passes) -> bool:
        return compiling._pays(lambda: trials.append(1), 1000, passes, gpu)

    assert not pays(Passes(stage)) and pays(Passes(stage, micro_batch=4))
    assert len(trials) == 4, "one warms up"
    follower = ProcessGroup(1, 2)
    monkeypatch.setattr(follower, "broadcast", lambda value: not value)
    assert not pays(Passes(stage, group=follower, micro_batch=2))


def test_a_neighbour_that_cannot_compile_leaves_all_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, told, group = objective_of(STAGES["dm"], build("mlp")), list[object](), ProcessGroup(0, 2)
    monkeypatch.setattr(group, "gather", lambda value: [value, "RuntimeError: no compiler"])
    monkeypatch.setattr(compiling, "_pays", lambda *_: True)
    options = {"wanted": "auto", "steps": 1, "passes": Passes(EdmSettings(), group=group), "device": CPU}
    assert not compiling.prepare(objective, lambda: None, report=told.append, **options)  # type: ignore[arg-type]
    assert told == ["not compiled, goes on without (RuntimeError: no compiler)"]
    assert all(net._compiled_call_impl is None for net in compiling.raw_networks(objective))


def test_graphs_are_for_networks_that_wait_for_launches() -> None:
    """A small network at any batch of a recipe, a large one at a batch of one or two: by kernels, not by parameters."""
    small = nets.build(UNetSettings(), shape=(1, 8, 8), num_classes=10, sigma_data=0.5)
    assert compiling.waits_for_launches(small, 1) and compiling.waits_for_launches(small, 512)
    assert not compiling.waits_for_launches(small, 10**6)
    arguments = {"model_type": "DhariwalUNet", "model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3}
    with on_meta():
        large = nets.build(EdmNetworkSettings(arguments=arguments), shape=(3, 64, 64), num_classes=1000, sigma_data=0.5)
    assert not compiling.waits_for_launches(large, 2)
    assert compiling.waits_for_launches(large.compute_in(torch.bfloat16), 2), "half the time per image, as many kernels"


@pytest.mark.parametrize("wanted", ["auto", True])
def test_a_compiler_that_fails_stops_nobody_who_did_not_ask_for_it(
    wanted: str | bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, told = objective_of(STAGES["dm"], build("unet")), list[object]()

    def broken() -> None:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(compiling, "_pays", lambda *_: True)
    options = {"wanted": wanted, "steps": 1, "passes": Passes(EdmSettings()), "device": CPU, "report": told.append}
    if wanted is True:
        with pytest.raises(UserError, match="no C"):
            compiling.prepare(objective, broken, **options)  # type: ignore[arg-type]
    else:
        assert not compiling.prepare(objective, broken, **options)  # type: ignore[arg-type]
        assert told == ["not compiled, goes on without (RuntimeError: no C++ compiler)"]
    assert losses_and_gradients(objective).keys() == {"student", "fake"}
    assert all(net._compiled_call_impl is None for net in compiling.raw_networks(objective))


@pytest.mark.gpu
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["float32", "bf16"])
def test_cuda_graphs_of_small_networks_agree_with_eager_ones(stage: str, kind: str) -> None:
    objective = objective_of(STAGES[stage], build("unet").to("cuda"))
    for net in objective.nets.values():
        net.to("cuda")
    precision.lower(objective, kind)
    plain = losses_and_gradients(objective, on=torch.device("cuda"))
    compiling.compile_networks(objective)
    for _ in range(4):  # eager, recorded, replayed
        fast = losses_and_gradients(objective, on=torch.device("cuda"))
    for key, (loss, gradient) in fast.items():
        torch.testing.assert_close(loss, plain[key][0], rtol=1e-4 if kind == "float32" else 5e-2, atol=1e-6)
        assert cosine(gradient, plain[key][1]) > (0.9999 if kind == "float32" else 0.98)
