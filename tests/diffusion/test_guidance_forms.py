"""CFG++'s schedule of the scale and perturbed-attention guidance, each against its own definition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from msdcli import nets
from msdcli.diffusion.denoiser import Denoiser, karras_sigmas
from msdcli.diffusion.guidance import NO_CLASS, Guided, copied, drawn
from msdcli.diffusion.perturbed_attention import attention_layers
from msdcli.diffusion.sampler import solve
from msdcli.engine.train import precision
from msdcli.engine.train.counting import forward_flops
from msdcli.errors import UserError
from msdcli.recipe import load
from msdcli.recipe.networks import DiffusersNetworkSettings, EdmNetworkSettings, MLPSettings, UNetSettings
from tests.conftest import TINY
from tests.nets.edm.edm_format import shake

EVERYWHERE = [0.0, 1e4]
ADM = {"model_type": "DhariwalUNet", "model_channels": 64, "channel_mult": [1, 1], "num_blocks": 1}
EDM2 = {"model_channels": 64, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [8]}
TRANSFORMER = {
    **{"sample_size": 8, "in_channels": 1, "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 4},
    **{"num_layers": 3, "num_embeds_ada_norm": 4},
}
LIBRARY_UNET = {
    **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [8, 8]},
    **{"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]},
    **{"norm_num_groups": 4, "attention_head_dim": 4, "num_class_embeds": 4},
}
# Networks with attention: the section, the layers in the middle, parts that have all layers, and how many those are.
NETWORKS = [
    (UNetSettings(channels=8, attention=[8, 4]), ["middle.attention"], ["encoder", "middle", "decoder"], 9),
    (EdmNetworkSettings(arguments=ADM | {"attn_resolutions": [8]}), ["dec.4x4_in0"], ["enc", "dec"], 4),
    (EdmNetworkSettings(preconditioning="EDM2", arguments=EDM2), ["dec.4x4_in0"], ["enc", "dec"], 4),
    (
        DiffusersNetworkSettings(class_name="UNet2DModel", config=LIBRARY_UNET),
        ["mid_block.attentions.0"],
        ["down_blocks", "mid_block", "up_blocks"],
        4,
    ),
    (
        DiffusersNetworkSettings(class_name="DiTTransformer2DModel", config=TRANSFORMER),
        ["transformer_blocks.1.attn1"],
        ["transformer_blocks"],
        3,
    ),
]
IDS = ["unet", "adm", "edm2", "library-unet", "dit"]


def network(section: Any, shape: tuple[int, ...] = (1, 8, 8)) -> Denoiser:
    net = nets.build(section, shape=shape, num_classes=4, sigma_data=0.5)
    return shake(net, 0.1, 1).eval().requires_grad_(False)


def inputs(shape: tuple[int, ...] = (1, 8, 8)) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0.1, 1.0, 9.0]), torch.tensor([0, 3, 1])


# CFG++.


def cfgpp(D: Any, z: Tensor, c: Tensor, lam: Tensor | float, steps: int) -> Tensor:
    """CFG++ as its paper has it (Algorithm 2), in sigma space: the noise of the step is that without a class."""
    levels = [*karras_sigmas(steps).tolist(), 0.0]
    x = z.double() * levels[0]
    for i in range(steps):
        sigma = torch.full((len(z),), levels[i], dtype=torch.float64)
        D_0, D_c = D(x, sigma, torch.full_like(c, NO_CLASS)), D(x, sigma, c)
        x = D_0 + lam * (D_c - D_0) + levels[i + 1] * (x - D_0) / levels[i]
    return x


class Two(Denoiser):
    """Two closed forms, one for the classes and one for no class."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(1, 1), shape=(2,), num_classes=4)

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        assert condition is not None
        mean = torch.where(condition == NO_CLASS, 0.0, 0.3 * condition - 0.2)[:, None].to(x)
        variance = torch.where(condition == NO_CLASS, 0.5, 0.1)[:, None].to(x)
        s = sigma[:, None] ** 2
        return (variance * torch.tanh(x) + s * mean) / (variance + s)


@pytest.mark.parametrize("lam", [0.6, [0.2, 1.0]])
def test_cfgpp_is_cfg_with_a_schedule_of_the_scale(lam: Any) -> None:
    z, c = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 3, 1])
    u = torch.tensor([0.0, 0.5, 1.0]).double()
    guided = Guided(Two(), scale=lam, interval=EVERYWHERE, schedule="cfg++")
    found = solve(drawn(guided, lambda purpose: u), z, c, name="ddim", steps=9)
    each = lam if isinstance(lam, float) else (0.2 + 0.8 * u)[:, None]
    torch.testing.assert_close(found, cfgpp(guided.plain, z, c, each, 9), rtol=0, atol=1e-12)
    constant = Guided(Two(), scale=lam, interval=EVERYWHERE)
    assert (found - solve(drawn(constant, lambda purpose: u), z, c, name="ddim", steps=9)).abs().max() > 0.01


def test_cfgpp_outside_the_interval_is_the_teacher() -> None:
    z, c = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 3, 1])
    guided = Guided(Two(), scale=0.6, interval=[1e3, 1e4], schedule="cfg++")
    assert torch.equal(solve(guided, z, c, name="ddim", steps=5), solve(guided.plain, z, c, name="ddim", steps=5))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher.guidance={scale: 0.6, schedule: cfg++}"], "`solver.name` is heun: take ddim"),
        (["teacher.guidance={scale: 3.0, schedule: cfg++}"], "lambda, 0 to 1"),
        (["teacher.guidance={scale: 3.0, schedule: cosine}"], "'cosine', not one of constant, cfg++"),
        (
            ["teacher.guidance={scale: 0.6, schedule: cfg++}", "teacher.solver.name=ddim"],
            "the stage dm asks the teacher",
        ),
        (["teacher.guidance={scale: 2, layers: [middle]}"], "`layers` is a key of `guide: perturbed`"),
        (["teacher.guidance={scale: 2, guide: perturbed, layers: []}"], "teacher.guidance.layers"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    with pytest.raises(UserError, match=said.replace("+", r"\+")):
        load(tmp_path / "tiny.yaml", overrides)


# Perturbed attention.


class Identity(TorchFunctionMode):
    """Every attention map is the identity, whoever asks for attention: the oracle."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[2] if func is F.scaled_dot_product_attention else func(*args, **(kwargs or {}))


@contextmanager
def identity_inside(layers: Iterable[torch.nn.Module]) -> Iterator[None]:
    mode = Identity()
    hooks = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(lambda *_: mode.__enter__() and None))
        hooks.append(layer.register_forward_hook(lambda *_: mode.__exit__(None, None, None)))
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("section", "middle", "parts", "count"), NETWORKS, ids=IDS)
def test_perturbed_guidance_is_away_from_attention_without_maps(
    section: Any, middle: list[str], parts: list[str], count: int
) -> None:
    plain = network(section)
    x, sigma, c = inputs()
    known = attention_layers(plain.net, parts)
    assert list(attention_layers(plain.net, [])) == middle and len(known) == count
    D = plain(x, sigma, c)
    for layers, meant in (([], [known[name] for name in middle]), (parts, [*known.values()])):
        guided = Guided(plain, scale=2.8, interval=[0.5, 1e4], layers=layers)
        with identity_inside(meant):
            D_worse = plain(x, sigma, c)
        assert (D - D_worse)[1:].abs().max() > 1e-5
        wanted = torch.cat([D[:1], (D_worse + 2.8 * (D - D_worse))[1:]])
        torch.testing.assert_close(guided(x, sigma, c), wanted, rtol=1e-4, atol=1e-6)
        assert torch.equal(plain(x, sigma, c), D), "attention is as it was"


def test_of_one_position_attention_is_the_identity_already() -> None:
    plain = network(UNetSettings(channels=8, multipliers=[1, 1, 1, 1], attention=[1]))
    x, sigma, c = inputs()
    guided = Guided(plain, scale=5.0, interval=EVERYWHERE, layers=["encoder", "middle", "decoder.1x1_0"])
    torch.testing.assert_close(guided(x, sigma, c), plain(x, sigma, c), rtol=1e-5, atol=1e-6)


def test_a_perturbed_teacher_needs_no_class_and_attention_that_is_there() -> None:
    section = UNetSettings(channels=8, attention=[4])
    plain = nets.build(section, shape=(1, 8, 8), num_classes=0, sigma_data=0.5)
    x, sigma, _ = inputs()
    assert Guided(shake(plain, 0.1, 1), scale=2.0, interval=EVERYWHERE, layers=[])(x, sigma, None).isfinite().all()
    with pytest.raises(
        UserError, match=r"no self-attention in .encoder\.8x8_0.; it is in encoder\.4x4_down\.attention"
    ):
        Guided(plain, scale=2.0, interval=EVERYWHERE, layers=["encoder.8x8_0"])
    for without, shape in ((UNetSettings(channels=8), (1, 8, 8)), (MLPSettings(channels=8), (2,))):
        with pytest.raises(UserError, match="has no self-attention to perturb"):
            Guided(network(without, shape), scale=2.0, interval=EVERYWHERE, layers=[])


def test_it_costs_two_evaluations_and_stays_in_copies_for_other_precisions() -> None:
    plain = network(NETWORKS[0][0])
    guided = Guided(plain, scale=2.0, interval=EVERYWHERE, layers=["middle"])
    x, sigma, c = inputs()
    attended = 2 * 2 * 16 * 16 * 16  # operations of the map in the middle: 16 positions, 16 channels
    assert forward_flops(guided) == 2 * forward_flops(plain) - attended
    low = precision.held(guided, torch.bfloat16)
    assert isinstance(low, Guided) and low.layers == ["middle"]
    torch.testing.assert_close(low(x, sigma, c), guided(x, sigma, c), rtol=0, atol=0.1)
    assert torch.equal(copied(guided)(x, sigma, c), guided(x, sigma, c))
