"""Denoisers around the diffusers library's networks agree with the library's own formulas."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")

from msdcli.data import open_data
from msdcli.diffusion.guidance import NO_CLASS
from msdcli.engine.checkpoints.model import load_model
from msdcli.engine.inputs import importing
from msdcli.engine.partitioning import making
from msdcli.engine.train import precision
from msdcli.errors import UserError
from msdcli.nets.diffusers.building import build_diffusers
from msdcli.recipe import PartitionSettings, StudentSettings
from msdcli.recipe.data import DigitsSettings
from msdcli.recipe.networks import DiffusersNetworkSettings
from tests.conftest import Msd
from tests.tiny_unet import TINY_UNET

pytestmark = pytest.mark.filterwarnings("default")

UNET = TINY_UNET | {"in_channels": 1, "out_channels": 1, "num_class_embeds": 10}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "in_channels": 1,
    "out_channels": 2,
    "num_layers": 1,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}
KINDS = {"unet": ("UNet2DModel", UNET), "transformer": ("DiTTransformer2DModel", DIT)}


def pipeline(folder: Path, part: str, scheduler: Any) -> torch.nn.Module:
    """Save a tiny random pipeline as the library does; return its network."""
    name, config = KINDS[part]
    torch.manual_seed(0)
    net = getattr(diffusers, name)(**config).eval().requires_grad_(False)
    net.save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    index = {part: ["diffusers", name], "scheduler": ["diffusers", type(scheduler).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return net


@pytest.mark.parametrize("part", KINDS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_agrees_with_the_librarys_formula(tmp_path: Path, part: str, prediction: str, betas: str) -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, beta_schedule=betas, clip_sample=False)
    net = pipeline(tmp_path, part, scheduler)
    denoiser = importing.read(tmp_path).denoiser
    assert (denoiser.shape, denoiser.num_classes) == ((1, 8, 8), 10)
    for t in (0, 7, 500, 990):
        alpha_bar = scheduler.alphas_cumprod[t]
        x_t, c = torch.randn(1, 1, 8, 8), torch.tensor([3])
        out = net(x_t, torch.tensor([t]), class_labels=c).sample[:, :1]
        scheduler.variance_type = "fixed_small"
        theirs = scheduler.step(out, t, x_t).pred_original_sample
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
        ours = denoiser(x_t / alpha_bar.sqrt(), sigma[None], c)
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4 * max(1.0, sigma.item()))


def test_a_flow_agrees_with_its_definition(tmp_path: Path) -> None:
    net = pipeline(tmp_path, "transformer", diffusers.FlowMatchEulerDiscreteScheduler())
    denoiser = importing.read(tmp_path).denoiser
    x_t, c, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 0]), torch.tensor([0.25, 0.9])
    v = net(x_t, 1000 * t, class_labels=c).sample[:, :1]
    t_ = t.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(denoiser(x_t / (1 - t_), t / (1 - t), c), x_t - t_ * v, rtol=1e-4, atol=1e-5)


def test_no_class_is_dits_last_row(tmp_path: Path) -> None:
    net = pipeline(tmp_path, "transformer", diffusers.DDPMScheduler(prediction_type="sample"))
    denoiser = importing.read(tmp_path).denoiser
    x, sigma = torch.randn(1, 1, 8, 8), torch.tensor([1.0])
    t = denoiser.timestep(sigma)
    theirs = net(x / 2**0.5, t, class_labels=torch.tensor([10])).sample[:, :1]
    torch.testing.assert_close(denoiser(x, sigma, torch.tensor([NO_CLASS])), theirs)


@pytest.mark.parametrize("part", KINDS)
@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_features_are_those_of_the_librarys_blocks(tmp_path: Path, part: str, scheduler: str) -> None:
    net = pipeline(tmp_path, part, getattr(diffusers, scheduler)())
    denoiser = importing.read(tmp_path).denoiser
    assert denoiser.taps == (["down_0", "down_1", "middle"] if part == "unet" else ["block_0"])
    blocks = [*net.down_blocks, net.mid_block] if part == "unet" else [*net.transformer_blocks]
    x, sigma, c = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 9.0]), torch.tensor([1, 2])
    seen: list[torch.Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    x_t, t = denoiser.as_trained(x, sigma)
    net(x_t, t, class_labels=c)
    wanted = [f if f.ndim == 4 else f.transpose(1, 2).reshape(2, -1, 4, 4) for f in seen]
    found = denoiser.features(x, sigma, c, denoiser.taps[::-1])
    for ours, theirs in zip(found, wanted[::-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="this network has"):
        denoiser.features(x, sigma, c, ["up_0"])


@pytest.mark.parametrize("part", KINDS)
def test_the_decoder_does_not_run_for_features_and_gradients_arrive(tmp_path: Path, part: str) -> None:
    pipeline(tmp_path, part, diffusers.DDPMScheduler())
    denoiser = importing.read(tmp_path).denoiser.requires_grad_(True)
    late = denoiser.net.conv_out if part == "unet" else denoiser.net.proj_out_2
    late.register_forward_hook(lambda *_: pytest.fail("the output ran"))
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    feature = denoiser.features(x, torch.ones(2), torch.tensor([1, 2]), denoiser.taps[:1])[0]
    assert feature.ndim == 4
    feature.square().sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    assert late.weight.grad is None


def test_written_and_read_again_scaled_and_refused(msd: Msd, tmp_path: Path) -> None:
    pipeline(tmp_path / "p", "unet", diffusers.DDPMScheduler())
    done = msd("import", "p", "out")
    assert done.returncode == 0, done.stderr
    loaded, _ = load_model(tmp_path / "out")
    x, sigma, c = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 9.0]), torch.tensor([1, 2])
    assert torch.equal(loaded(x, sigma, c), importing.read(tmp_path / "p").denoiser(x, sigma, c))
    assert StudentSettings(width=0.5).network_for(loaded.settings).config["block_out_channels"] == [4, 8]
    index = json.loads((tmp_path / "p/model_index.json").read_text())
    for change, said in (
        ({"vae": ["diffusers", "AutoencoderKL"]}, "needs its autoencoder"),
        ({"vqvae": ["diffusers", "VQModel"]}, "VQ"),
        ({"unet": ["os", "system"]}, r"\(unet: system\), which msd does not read; it reads unet: UNet2DModel"),
    ):
        (tmp_path / "p/model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(UserError, match=said):
            importing.read(tmp_path / "p")


def test_a_pipeline_is_a_recipes_teacher(msd: Msd, tmp_path: Path) -> None:
    from tests.engine.inputs.test_importing import RECIPE

    pipeline(tmp_path / "p", "transformer", diffusers.DDPMScheduler())
    (tmp_path / "given.yaml").write_text(RECIPE.replace("teacher.pkl", "p"))
    done = msd("distill", "given.yaml", "--student", "1", "student.depth=1.0")
    assert done.returncode == 0, done.stderr
    student, _ = load_model(tmp_path / "runs/given/students/1/0-dm")
    assert student.settings.class_name == "DiTTransformer2DModel"


@pytest.mark.parametrize("part", KINDS)
def test_computes_in_bfloat16_with_float32_weights_also_after_a_call_without_gradient(part: str) -> None:
    name, config = KINDS[part]
    section = DiffusersNetworkSettings(class_name=name, config=config)  # type: ignore[arg-type]
    torch.manual_seed(0)
    net = build_diffusers(section)
    x, sigma, c = torch.randn(4, 1, 8, 8), torch.full((4,), 1.5), torch.tensor([0, 3, 7, 9])
    plain = net(x, sigma, c)
    net.compute_in(torch.bfloat16)
    with torch.no_grad():
        net(x, sigma, c)
    low = net(x, sigma, c)
    assert low.dtype == torch.float32 and not torch.equal(low, plain)
    torch.testing.assert_close(low, plain, rtol=0, atol=0.05)
    low.square().mean().backward()
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}
    assert sum(p.grad is None for p in net.parameters()) <= 1, "cast weights lost their gradients"
    held = precision.held(net.requires_grad_(False), torch.bfloat16)
    torch.testing.assert_close(held(x, sigma, c), low, rtol=0, atol=0.05)


def test_k_means_divides_the_classes_and_not_the_one_that_stands_for_none(tmp_path: Path) -> None:
    pipeline(tmp_path, "transformer", diffusers.DDPMScheduler(clip_sample=False))
    teacher = importing.read(tmp_path).denoiser
    data = open_data(DigitsSettings())
    parts = making.make(PartitionSettings(method="kmeans", students=2), data, teacher).parts
    assert sorted(c for part in parts for c in part) == list(range(10))
