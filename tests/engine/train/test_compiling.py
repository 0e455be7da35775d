"""torch.compile of an objective's networks: the same losses and gradients, no breaks, and a way back."""

from __future__ import annotations

import copy

import pytest
import torch

from msdcli.engine.train import compiling, precision
from msdcli.engine.train.passes import Passes
from msdcli.errors import UserError
from msdcli.recipe.stages import EdmSettings
from tests.engine.train.test_precision import CPU, STAGES, build, cosine, losses_and_gradients, objective_of


# torch looks at .grad of the networks' inputs and hides its own warning, which our tests make an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("mlp", "adm fake"),
        pytest.param("unet", "adm fake", marks=pytest.mark.slow),
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
        torch.testing.assert_close(loss, plain[key][0], rtol=1e-5 if kind == "float32" else 2e-2, atol=1e-6)
        assert cosine(gradient, plain[key][1]) > (0.9999 if kind == "float32" else 0.98)
