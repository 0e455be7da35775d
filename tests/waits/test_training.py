"""No step of training waits for its device, and its line in the log costs one or two reads: every objective, network,
guidance and student, in the real loop, without a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from msdcli.engine.measure.classifier import TRAINING, Classification
from msdcli.engine.train import precision
from msdcli.nets.classifier import Classifier
from tests.device import DOWN, READ, HostWaitError
from tests.waits.cases import GUIDANCE, MORE, NETWORKS, STAGES, device, objective_of, product, settings_of, trained

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")
ALL = STAGES | MORE
# Every objective, network and guidance once; their product is slow.
ONCE = [
    *((name, "unet", "none") for name in STAGES),
    *((name, "mlp", "none") for name in MORE),
    *(("edm", name, "none") for name in NETWORKS if name not in ("unet", "sdxl")),  # which is sd15 with more of it
    *(("tsm", "unet", how) for how in GUIDANCE[1:]),
]
EVERYTHING = [case for case in product() if case not in ONCE]
NEEDS_PEFT = "dm with a fake of adapters"


def check(stage: str, name: str, how: str, folder: Path, **more: Any) -> None:
    if stage == NEEDS_PEFT:
        pytest.importorskip("peft")
    with device() as on:
        settings = settings_of(ALL[stage])
        objective = objective_of(settings, name, how, **more)
        inside, logged = trained(on, objective, settings, folder)
    assert inside == [], (stage, name, how)
    # What the turns left behind, in one piece, and what the objective offers to be looked at, in another.
    assert {what for what, _, _ in logged} <= {READ, DOWN} and 1 <= len(logged) <= 2, logged


@pytest.mark.parametrize(("stage", "name", "how"), ONCE)
def test_no_step_waits_for_the_device(stage: str, name: str, how: str, tmp_path: Path) -> None:
    check(stage, name, how, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_objective_waits_with_any_guidance(name: str, tmp_path: Path) -> None:
    for stage, _, how in (case for case in EVERYTHING if case[1] == name):
        check(stage, name, how, tmp_path / f"{stage}-{how}")


def test_radam_reads_once_per_update_and_nothing_else_does(tmp_path: Path) -> None:
    with device() as on:
        settings = settings_of({"objective": "ect", "optimizer": "radam"})
        inside, _ = trained(on, objective_of(settings, "mlp"), settings, tmp_path)
    assert [what for what, _, _ in inside] == [READ] and inside[0][2].startswith("msdcli/engine/train/loop.py"), inside


def test_students_that_are_adapters_do_not_wait(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    check("dm", "mlp", "classifier-free", tmp_path, adapted=True)


def test_networks_in_bfloat16_do_not_wait(tmp_path: Path) -> None:
    with device() as on:
        settings = settings_of(STAGES["tsm"])
        objective = objective_of(settings, "unet", "guide")
        precision.lower(objective, "bf16")
        inside, _ = trained(on, objective, settings, tmp_path)
    assert inside == []


def test_the_classifier_that_measures_does_not_wait(tmp_path: Path) -> None:
    settings = TRAINING.model_copy(update={"steps": 3, "log_every": 3, "batch": 8})
    with device() as on:
        objective = Classification(settings, Classifier((3, 8, 8), 3).to("meta").train())
        inside, logged = trained(on, objective, settings, tmp_path)
    assert inside == [] and len(logged) == 1


PLANTED = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "a boolean mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.ones(4).to(x.device),
    "numbers from the host": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "bool": lambda x: bool((x > 0).any()),
    "places from the host": lambda x: x[torch.arange(2)],
}
# What cannot be done at all: of both devices, and by numbers that the host alone knows.
REFUSED = {"both": lambda x: x + torch.ones(4), "a list": lambda x: x[[0, 1]]}


@pytest.mark.parametrize("how", PLANTED)
def test_a_planted_wait_is_found(how: str, tmp_path: Path) -> None:
    with device() as on:
        settings = settings_of({"objective": "tsm"})
        objective: Any = objective_of(settings, "mlp")
        loss = objective.loss

        def waits(draws: Any) -> Any:
            per_image = loss(draws)
            PLANTED[how](per_image.detach())
            return per_image

        objective.loss = waits
        inside, _ = trained(on, objective, settings, tmp_path)
    assert len(inside) == 1, inside


@pytest.mark.parametrize("how", REFUSED)
def test_what_mixes_host_and_device_is_refused(how: str) -> None:
    with device(), pytest.raises(HostWaitError):
        REFUSED[how](torch.ones(4, device="meta"))


def test_a_read_of_every_step_is_found_in_the_loop_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msdcli.engine.train import loop

    update = loop.update
    monkeypatch.setattr(
        loop, "update", lambda state, names, loss, *more: (loss.item(), update(state, names, loss, *more))
    )
    with device() as on:
        settings = settings_of({"objective": "tsm"})
        inside, _ = trained(on, objective_of(settings, "mlp"), settings, tmp_path)
    assert [what for what, _, _ in inside] == [READ]
