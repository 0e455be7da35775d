"""A fake network of adapters: it begins as the teacher, in the teacher's memory, and learns what a whole one learns."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.draws import Draws, Source
from msdcli.diffusion.guidance import Guided
from msdcli.engine import estimate
from msdcli.engine.train import precision
from msdcli.engine.train.student import Student, distill_student
from msdcli.errors import UserError
from msdcli.nets import lora
from msdcli.nets.meta import on_meta
from msdcli.objectives.dm import DistributionMatching
from msdcli.recipe import Recipe
from msdcli.recipe.networks import DiffusersNetworkSettings, EdmNetworkSettings, MLPSettings, NetworkSettings
from msdcli.recipe.stages import DmSettings, SidSettings
from tests.engine.distributed import sharded
from tests.engine.distributed.sharded import DIFFUSERS, EDM2, UNET
from tests.engine.distributed.test_distributed import state_in
from tests.objectives.test_batches_cut import learned
from tests.objectives.test_dm import Points

pytest.importorskip("peft")
LORA: dict[str, Any] = {"fake": {"kind": "lora", "rank": 2, "alpha": 4.0}}
EDM = {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "model_channels": 8}
NETWORKS: dict[str, NetworkSettings] = {
    "unet": UNET,
    "adm": EdmNetworkSettings(arguments=EDM | {"model_type": "DhariwalUNet"}),
    "ncsn++": EdmNetworkSettings(arguments=EDM | {"model_type": "SongUNet", "resample_filter": [1, 3, 3, 1]}),
    "diffusers": DiffusersNetworkSettings(class_name="UNet2DModel", config=DIFFUSERS, prediction="epsilon"),
}


def places(net: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in [*net.parameters(), *net.buffers()]}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_begins_as_the_teacher_in_the_teachers_memory(name: str) -> None:
    teacher = sharded.plain(NETWORKS[name])
    fake, adapters = lora.adapted(teacher, 2, 4.0)
    x, sigma, c = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0]), torch.arange(3)
    assert torch.equal(fake(x, sigma, c), teacher(x, sigma, c))
    assert places(teacher) <= places(fake) == places(teacher) | places(adapters)
    assert sum(p.numel() for p in adapters.parameters()) < sum(p.numel() for p in teacher.parameters()) / 3
    fake(x, sigma, c).square().sum().backward()
    assert all(p.grad is not None for p in adapters.parameters())
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(0, 0.1)
    assert not torch.allclose(fake(x, sigma, c), teacher(x, sigma, c), rtol=1e-2)
    (one,), (other,) = (net.features(x, sigma, c, net.taps[-1:]) for net in (fake, teacher))
    assert one.shape == other.shape and not torch.equal(one, other)


class Line(nn.Module):
    """F(x) = W x."""

    taps = ()

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None) -> Tensor:
        return self.layer(x)


def test_of_full_rank_it_learns_what_a_whole_one_learns() -> None:
    """W + s B A with A^T A = 1 / s^2: B's step of gradient descent, s B A, is that of W."""
    torch.manual_seed(0)
    teacher = Denoiser(Line(2), shape=(2,), num_classes=1).requires_grad_(False)
    objectives = {}
    for kind in ("full", "lora"):
        settings = DmSettings(pairs="none", fake={"kind": kind, "rank": 2, "alpha": 8.0})  # type: ignore[arg-type]
        objectives[kind] = DistributionMatching(settings, copy.deepcopy(teacher), teacher)
    begun = [p.clone() for p in teacher.parameters()]
    A, B = objectives["lora"].nets["fake"].parameters()
    A.data.copy_(torch.eye(2) / 4)
    for step in range(20):
        draws = Draws(Source(Points(), [0]), 16, ("test", step), 0)
        for objective, learns in zip(objectives.values(), (objectives["full"].fake.parameters(), [B]), strict=True):
            objective.fake.requires_grad_(False)
            params = [p.requires_grad_() for p in learns]
            slopes = torch.autograd.grad(objective.fake_loss(draws).mean(), params)
            with torch.no_grad():
                for param, slope in zip(params, slopes, strict=True):
                    param.sub_(1e-3 * slope)
    x, sigma = torch.randn(5, 2), torch.ones(5)
    whole, adapted = (objectives[kind].fake(x, sigma, None) for kind in ("full", "lora"))
    assert (whole - teacher(x, sigma, None)).abs().max() > 1e-3, "it learnt"
    torch.testing.assert_close(adapted, whole, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), begun, strict=True))


def stages(**keys: Any) -> list[dict[str, Any]]:
    dm = sharded.DM | LORA | {"lr_hold": 1.0, "steps": 2, "sigmas": [2.5, 0.5]}
    return [dm, dm | {"objective": "sid", "alpha": 0.5, "gan_weight": 0.1} | keys]


def train(folder: Path, teacher: Denoiser, made: list[dict[str, Any]]) -> None:
    sections = {"name": "lora", "data": {"name": "toy2d"}, "checkpoint_seconds": 0, "precision": "float32"}
    recipe = Recipe.model_validate(sections | {"stages": made})
    folders = [folder / f"{i}-{stage['objective']}" for i, stage in enumerate(made)]
    student = Student(0, recipe, teacher, Source(Points(), [0]), folders, torch.device("cpu"))
    distill_student(student, lambda _: None)


def test_training_leaves_the_teacher_alone_and_resumes_to_the_bit(tmp_path: Path) -> None:
    """Of a guided teacher; a checkpoint holds the adapters and nothing of the teacher."""
    torch.manual_seed(0)
    plain = sharded.nets.build(MLPSettings(channels=8, blocks=1), shape=(2,), num_classes=1, sigma_data=0.5)
    for parameter in plain.requires_grad_(False).eval().parameters():
        parameter.normal_(0, 0.3)
    teacher = Guided(plain, scale=(1.0, 3.0), interval=(0.1, 50.0))
    before = [p.clone() for p in teacher.parameters()]
    train(tmp_path / "whole", teacher, stages())
    train(tmp_path / "cut", teacher, stages(steps=1))
    train(tmp_path / "cut", teacher, stages())
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), before, strict=True))
    whole, cut = (state_in(tmp_path / f"{name}/1-sid") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)
    held = [key for key in whole if key.startswith("fake.")]
    assert held and all("lora_" in key for key in held)
    assert all(whole[key].abs().max() > 0 for key in held if "lora_B" in key and "outlet" in key), "they learnt"


def test_its_gradients_do_not_depend_on_how_a_batch_is_cut() -> None:
    settings = SidSettings(**LORA, sigmas=[2.5, 0.5], fake_guidance="same", fake_label_dropout=0.5)
    whole, cut = (learned(settings, passes, steps=1, guided=True)[0] for passes in (1, 4))
    for a, b in zip(whole, cut, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())


def test_its_memory_and_operations_are_counted() -> None:
    with on_meta():
        teacher = sharded.nets.build(UNET, shape=(1, 8, 8), num_classes=10, sigma_data=0.5).requires_grad_(False)
    student = copy.deepcopy(teacher)
    costs = {
        kind: estimate.stage_cost(DmSettings(pairs="none", fake={"kind": kind, "rank": 2}), student, teacher)  # type: ignore[arg-type]
        for kind in ("full", "lora")
    }
    size = sum(p.numel() for p in teacher.parameters())
    adapters = sum(p.numel() for p in lora.adapted(teacher, 2, 4.0)[1].parameters())
    assert costs["full"].state_bytes - costs["lora"].state_bytes == estimate.LEARNING_BYTES * (size - adapters)
    assert costs["lora"].flops < costs["full"].flops, "no gradient of the teacher's weights"


def test_in_bfloat16_it_stays_on_the_teachers_weights() -> None:
    teacher = sharded.plain(UNET)
    objective = DistributionMatching(DmSettings(pairs="none", **LORA), copy.deepcopy(teacher), teacher)
    fake = objective.fake
    precision.lower(objective, "bf16")
    assert objective.fake is fake and objective.teacher is not teacher
    x, sigma, c = torch.randn(3, 1, 8, 8), torch.ones(3), torch.arange(3)
    wanted = teacher(x, sigma, c)
    assert 0 < (fake(x, sigma, c) - wanted).norm() < 0.02 * wanted.norm()


def test_what_cannot_have_adapters_is_refused_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    edm2 = EdmNetworkSettings(preconditioning="EDM2", arguments=EDM2)
    with pytest.raises(UserError, match="EDM2") as refused:
        lora.adapted(sharded.plain(edm2), 2, 4.0)
    assert refused.value.hint == "fake.kind=full"
    recipe: dict[str, Any] = {"name": "a", "data": {"name": "digits"}, "stages": stages()}
    Recipe.model_validate(recipe)
    with pytest.raises(ValueError, match=r"`fsdp`: stage dm .* keeps its network whole"):
        Recipe.model_validate(recipe | {"fsdp": True})
    with pytest.raises(ValueError, match=r"stage 1, sid: `fake` differs"):
        Recipe.model_validate(recipe | {"stages": stages(fake={"kind": "full"})})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="needs the library peft") as refused:
        DistributionMatching(DmSettings(**LORA), sharded.plain(UNET), sharded.plain(UNET))
    assert refused.value.hint is not None and "msdcli[lora]" in refused.value.hint
    assert SidSettings().fake.kind == "full"
