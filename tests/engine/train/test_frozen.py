"""What a stage holds frozen is what the stage before made, also where it goes on after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from msdcli import nets
from msdcli.data import open_data
from msdcli.diffusion.draws import Source
from msdcli.engine.checkpoints.model import load_model
from msdcli.engine.tracking.events import silent
from msdcli.engine.train import student as student_module
from msdcli.engine.train.student import Student, distill_student
from msdcli.objectives import Objective
from msdcli.recipe import Recipe, load_any

RECIPE = {
    "name": "frozen",
    "threads": 1,
    "checkpoint_seconds": 0,
    "data": {"name": "toy2d", "points": 64},
    "teacher": {"network": {"kind": "mlp", "channels": 8, "blocks": 1}, "training": {"steps": 1}},
    "stages": [
        {"objective": "flow", "steps": 3, "batch": 8, "lr": 1e-2, "anneal": 0.5},
        {"objective": "regress", "steps": 4, "batch": 8, "lr_hold": 1.0, "flow_weight": 1.0, "sigma_init": 2.5},
    ],
}


def train(folder: Path, recipe: Recipe) -> list[Path]:
    """Take a student through the stages; return their folders."""
    data = open_data(recipe.data)
    torch.manual_seed(0)
    assert recipe.teacher.network is not None
    teacher = nets.build(recipe.teacher.network, shape=(2,), num_classes=len(data.class_names), sigma_data=0.5)
    teacher.requires_grad_(False).eval()
    for parameter in teacher.parameters():
        parameter.normal_(0, 0.3)
    z = torch.randn(32, 2)
    source = Source(data, range(len(data.class_names)), pairs=(z, z.sin(), torch.arange(32) % len(data.class_names)))
    folders = [folder / f"{number}-{stage.objective}" for number, stage in enumerate(recipe.stages)]
    distill_student(Student(0, recipe, teacher, source, folders, torch.device("cpu")), silent)
    return folders


def test_the_flow_of_the_stage_before_is_held_also_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Objective] = []
    kept = student_module.train
    monkeypatch.setattr(student_module, "train", lambda o, *a, **k: (held.append(o), kept(o, *a, **k))[1])
    first, second = train(tmp_path / "whole", load_any(RECIPE, {}))
    flow = load_model(first)[0].state_dict()
    for name, tensor in held[1].flow.state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(tensor, flow[name]), "the average that the stage before wrote"
    assert not any(p.requires_grad for p in held[1].flow.parameters())  # type: ignore[attr-defined]
    train(tmp_path / "parts", load_any(RECIPE, {"stages.1.steps": 2}))
    _, other = train(tmp_path / "parts", load_any(RECIPE, {}))
    a, b = (load_model(path)[0].state_dict() for path in (second, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_truncated_model_with_radam_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    stages = [
        {"objective": "ect", "steps": 2, "batch": 8, "lr": 1e-2},
        {"objective": "tcm", "steps": 9, "batch": 8, "lr": 1e-2, "lr_hold": 1.0, "sigmas": [80.0, 2.0]},
    ]
    recipe = RECIPE | {"stages": stages}
    _, whole = train(tmp_path / "whole", load_any(recipe, {}))
    train(tmp_path / "parts", load_any(recipe, {"stages.1.steps": 7}))
    _, parts = train(tmp_path / "parts", load_any(recipe, {}))
    a, b = (load_model(path)[0].state_dict() for path in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_flow_to_agree_with_is_asked_for(tmp_path: Path) -> None:
    alone = RECIPE | {"stages": RECIPE["stages"][1:]}  # type: ignore[index]
    with pytest.raises(ValueError, match="stage 0, regress: `flow_weight` asks the flow that the stage before made"):
        load_any(alone, {})
