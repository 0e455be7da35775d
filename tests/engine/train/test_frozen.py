"""What a stage holds frozen is what the stage before made, also where it goes on after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from msdcli import nets
from msdcli.data import open_data
from msdcli.diffusion.draws import Source
from msdcli.engine.checkpoints.model import load_model
from msdcli.engine.inputs.teacher import check_fake_guidance
from msdcli.engine.partitioning.making import check_forgetting
from msdcli.engine.tracking.events import silent
from msdcli.engine.train import student as student_module
from msdcli.engine.train.student import Student, distill_student
from msdcli.errors import UserError
from msdcli.nets.adapters import AdaptedDenoiser
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


GUIDED = RECIPE | {
    "student": {"init": "random"},
    "stages": [
        {"objective": "tsm", "steps": 2, "batch": 8, "lr": 1e-2, "becomes": "teacher"},
        {"objective": "dm", "steps": 2, "batch": 8, "fake_updates": 1, "lr_hold": 1.0, "pairs": "none"},
        {"objective": "progressive", "steps": 2, "batch": 8, "repeat": 2},
    ],
}


def test_what_a_stage_made_teaches_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a round of progressive distillation follows the one before, not that teacher."""
    held: list[Objective] = []
    kept = student_module.train
    monkeypatch.setattr(student_module, "train", lambda o, *a, **k: (held.append(o), kept(o, *a, **k))[1])
    folders = train(tmp_path, load_any(GUIDED, {}))
    assert [folder.name for folder in folders] == ["0-tsm", "1-dm", "2-progressive", "3-progressive"]
    made = [load_model(folder)[0].state_dict() for folder in folders]

    def equal(net: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())

    tsm, dm, first, second = held
    assert not equal(tsm.teacher, made[0]) and equal(dm.teacher, made[0])  # type: ignore[attr-defined]
    assert equal(first.ancestor, made[0]) and equal(second.ancestor, made[2])  # type: ignore[attr-defined]
    assert not equal(second.student, made[2])  # type: ignore[attr-defined]


def test_an_adapted_student_that_teaches_is_a_network_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    held: list[Objective] = []
    kept = student_module.train
    monkeypatch.setattr(student_module, "train", lambda o, *a, **k: (held.append(o), kept(o, *a, **k))[1])
    away = {"objective": "edm", "steps": 2, "batch": 8, "lr": 0.1}  # from the teacher, which tsm would stay at
    stages = [away, *GUIDED["stages"][:2]]  # type: ignore[index]
    folders = train(tmp_path, load_any(GUIDED | {"student": {"adapter": {"rank": 2}}, "stages": stages}, {}))
    x, sigma, c = torch.randn(4, 2), torch.ones(4), torch.arange(4)
    _, tsm, dm = held
    made, _ = load_model(folders[1], lambda: tsm.teacher)  # type: ignore[attr-defined]
    teacher = dm.teacher  # type: ignore[attr-defined]
    assert not isinstance(teacher, AdaptedDenoiser) and not any(p.requires_grad for p in teacher.parameters())
    torch.testing.assert_close(teacher(x, sigma, c), made(x, sigma, c), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(teacher(x, sigma, c), tsm.teacher(x, sigma, c))  # type: ignore[attr-defined]


def test_of_what_became_the_teacher_nothing_is_asked_that_it_never_learnt() -> None:
    """It trained with a class every time, and with this student's classes alone."""
    tsm: dict[str, object] = {"objective": "tsm", "becomes": "teacher"}
    dm: dict[str, object] = {"objective": "dm", "pairs": "none"}
    dropout = {"teacher.training.label_dropout": 0.1}
    recipe = RECIPE | {"stages": [tsm, dm | {"fake_guidance": "zero"}]}
    data = open_data(load_any(recipe, {}).data)
    teacher = nets.build(load_any(recipe, {}).teacher.network, shape=(2,), num_classes=8, sigma_data=0.5)
    with pytest.raises(UserError, match="never trained without a class"):
        check_fake_guidance(load_any(recipe, dropout), teacher)
    check_fake_guidance(load_any(recipe, dropout | {"stages.0.becomes": "student"}), teacher)
    check_fake_guidance(load_any(recipe, {"stages.1.fake_label_dropout": 0.1}), teacher)
    recipe = RECIPE | {"stages": [tsm, dm, dm | {"forget": {"classes": [1]}}]}
    with pytest.raises(UserError, match="forget asks the teacher for classes of other students"):
        check_forgetting(load_any(recipe, {}), data)
    check_forgetting(load_any(recipe, {"stages.0.becomes": "student"}), data)


def test_a_flow_to_agree_with_is_asked_for(tmp_path: Path) -> None:
    alone = RECIPE | {"stages": RECIPE["stages"][1:]}  # type: ignore[index]
    with pytest.raises(ValueError, match="stage 0, regress: `flow_weight` asks the flow that the stage before made"):
        load_any(alone, {})
