"""Adapters on a frozen network: they begin as nothing, merge into its weights, and share its memory."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch

import msdcli
from msdcli import nets
from msdcli.engine.checkpoints.model import load_model, save_model
from msdcli.errors import UserError
from msdcli.nets.adapters import AdaptedDenoiser, merged
from msdcli.nets.prune import prune
from msdcli.recipe.networks import MLPSettings, UNetSettings
from msdcli.recipe.student import AdapterSettings
from tests.conftest import TINY, Msd

pytest.importorskip("peft")
ADAPTED = TINY.replace("stages:", "student: {adapter: {rank: 2}}\nstages:").replace(
    "steps: 6,", "steps: 6, lr_hold: 1,"
)


def unet() -> nets.Denoiser:
    torch.manual_seed(0)
    settings = UNetSettings(channels=8, embedding=8, attention=[4])
    net = nets.build(settings, shape=(1, 8, 8), num_classes=3, sigma_data=0.5)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    net.read_from = "some file"
    return net.requires_grad_(False).eval()


def trained(base: nets.Denoiser, **keys: float) -> AdaptedDenoiser:
    net = AdaptedDenoiser(base, AdapterSettings(rank=2, **keys))  # type: ignore[arg-type]
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net.requires_grad_(False).eval()


def asked(net: nets.Denoiser) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 8, 8, generator=generator)
    return net(x, torch.tensor([0.1, 1.0, 9.0]), torch.tensor([0, 2, 1]))


def test_it_begins_as_its_base_and_shares_its_memory() -> None:
    base = unet()
    net = AdaptedDenoiser(base, AdapterSettings(rank=2)).eval()
    assert torch.equal(asked(net), asked(base))
    weight = base.net.encoder["8x8_0"].conv0.weight  # type: ignore[union-attr]
    inside = net.net.encoder["8x8_0"].conv0.base_layer.weight  # type: ignore[union-attr]
    copied = copy.deepcopy(net).net.encoder["8x8_0"].conv0.base_layer.weight  # type: ignore[union-attr]
    assert weight.data_ptr() == inside.data_ptr() == copied.data_ptr()
    assert not inside.requires_grad and all(p.requires_grad for p in net.parameters())
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}


def test_a_copy_has_adapters_of_its_own() -> None:
    base = unet()
    net = trained(base)
    before, twin = asked(net), copy.deepcopy(net)
    assert torch.equal(asked(twin), before)
    for p in twin.parameters():
        p.zero_()
    assert torch.equal(asked(twin), asked(base)) and torch.equal(asked(net), before)
    assert (before - asked(base)).abs().max() > 1e-3


def test_only_the_adapters_have_gradients() -> None:
    base = unet()
    net = AdaptedDenoiser(base, AdapterSettings(rank=2))
    asked(net).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert all(p.grad is None for p in base.parameters())
    learnt = {name for name, p in net.twin.named_parameters() if p.grad is not None}
    assert learnt and all("lora_" in name for name in learnt)


def test_merging_adds_the_product_of_the_two_matrices() -> None:
    """W' = W + (alpha / r) B A, of a convolution at every place of its kernel; the base stays what it was."""
    base = unet()
    net, kept = trained(base, alpha=6.0), copy.deepcopy(base.state_dict())
    whole = merged(net)
    torch.testing.assert_close(asked(whole), asked(net), rtol=1e-5, atol=1e-5)
    layer, plain = net.net.encoder["8x8_0"].conv0, base.net.encoder["8x8_0"].conv0  # type: ignore[union-attr]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    added = 3.0 * torch.einsum("or,ri...->oi...", B[:, :, 0, 0], A)
    torch.testing.assert_close(whole.net.encoder["8x8_0"].conv0.weight, plain.weight + added)  # type: ignore[union-attr]
    assert whole.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in base.state_dict().items())
    assert merged(base) is base


def test_a_file_holds_the_adapters_alone(tmp_path: Path) -> None:
    base = unet()
    net = trained(base)
    save_model(tmp_path / "student", net, {})
    size = os.path.getsize(tmp_path / "student" / "model.safetensors")
    assert size < 0.6 * sum(p.numel() * 4 for p in base.parameters())
    found, description = load_model(tmp_path / "student", lambda: base)
    assert torch.equal(asked(found), asked(net)) and description["adapter"]["base_sha256"] == "some file"
    with pytest.raises(UserError, match="without the one that they were trained on"):
        load_model(tmp_path / "student")
    other = copy.deepcopy(base)
    other.read_from = "another file"
    with pytest.raises(UserError, match="adapters of another network"):
        load_model(tmp_path / "student", lambda: other)


def test_points_are_adapted_too() -> None:
    base = nets.build(MLPSettings(channels=8, blocks=2), shape=(2,), num_classes=3, sigma_data=0.5)
    net = AdaptedDenoiser(base, AdapterSettings())
    x, sigma, c = torch.randn(4, 2), torch.ones(4), torch.zeros(4, dtype=torch.int64)
    assert torch.equal(net(x, sigma, c), base(x, sigma, c))
    assert prune(base, copy.deepcopy(base)) == sum(p.numel() for p in base.parameters()), "it is as it was"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["student.width=0.5"], "give one of"),
        (["student.init=pruned"], "begins with the teacher's weights"),
        (["fsdp=true"], "shares out"),
        (["student.adapter.rank=0"], "student.adapter.rank"),
    ],
)
def test_what_does_not_go_together_is_refused(msd: Msd, tmp_path: Path, keys: list[str], said: str) -> None:
    (tmp_path / "a.yaml").write_text(ADAPTED)
    done = msd("distill", "a.yaml", "--dry-run", *keys)
    assert done.returncode == 2 and said in done.stderr


def test_a_run_of_adapters_from_start_to_bundle(msd: Msd, tmp_path: Path) -> None:
    """Trained in two parts it has the bits of one; a bundle is one base and small files."""
    (tmp_path / "a.yaml").write_text(ADAPTED)
    planned = msd("distill", "a.yaml", "--dry-run")
    assert "adapters of rank 2 on the teacher's own weights" in planned.stdout, planned.stderr
    run = Path(msdcli.distill("a.yaml", run="runs/whole"))
    msdcli.distill("a.yaml", run="runs/parts", **{"stages.0.steps": 3})
    parts = Path(msdcli.distill("a.yaml", run="runs/parts"))
    names = [f"students/{k}/0-dm/model.safetensors" for k in range(2)]
    assert all((run / name).read_bytes() == (parts / name).read_bytes() for name in names)
    assert (run / names[0]).read_bytes() != (run / names[1]).read_bytes()

    students = msdcli.load(run)
    images = students.sample([0, 1, 2])
    weights = [students.student(k).net.twin.net.state_dict() for k in range(2)]  # type: ignore[operator, union-attr]
    shared = [name for name in weights[0] if "lora_" not in name]
    assert all(weights[0][name].data_ptr() == weights[1][name].data_ptr() for name in shared)
    bundle = msdcli.export(run, "bundle", out="bundle", bench=False)
    assert bundle["max_difference"] == 0 and bundle["base"]["file"] == "base/model.safetensors"
    assert "adapters of one network" in (tmp_path / "bundle" / "README.md").read_text()
    again = msdcli.load("bundle")
    again.max_resident = 1
    assert torch.equal(again.sample([0, 1, 2]), images)


@pytest.mark.slow
def test_every_verb_and_format_knows_adapters(msd: Msd, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(ADAPTED)
    run = Path(msdcli.distill("a.yaml", run="runs/a"))
    for kind in ("torch", "onnx"):
        assert msdcli.export(run, kind, out=kind, bench=False)["max_difference"] < 1e-4
    for verb in (["status"], ["report", "--no-pictures"], ["watch"], ["bench", "--repeats", "1"]):
        done = msd(*verb, "a.yaml" if verb[0] == "bench" else str(run))
        assert done.returncode == 0, done.stderr
