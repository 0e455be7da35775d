"""The teacher's solvers give the diffusers library's samples: same network, same noise, same noise levels."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")

from msdcli import nets
from msdcli.diffusion.denoiser import karras_sigmas
from msdcli.diffusion.sampler import solve
from msdcli.engine.inputs import importing
from msdcli.recipe.networks import UNetSettings
from tests.gaussians import mixture
from tests.nets.edm.edm_format import shake
from tests.tiny_unet import TINY_UNET

pytestmark = pytest.mark.filterwarnings("default")

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def pipeline(folder: Path, prediction: str) -> Any:
    """Save a tiny random DDPM pipeline as the library does; return its network."""
    torch.manual_seed(0)
    net = shake(diffusers.UNet2DModel(**TINY_UNET)).eval().requires_grad_(False)
    net.save_pretrained(folder / "unet")
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, **BETAS)
    scheduler.save_pretrained(folder / "scheduler")
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return net


@torch.no_grad()
def theirs(scheduler: Any, net: Any, x: Tensor) -> Tensor:
    """The library's own sampling loop."""
    for t in scheduler.timesteps:
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("karras", [False, True])
def test_heun_is_the_librarys(tmp_path: Path, prediction: str, karras: bool) -> None:
    net = pipeline(tmp_path, prediction)
    scheduler = diffusers.HeunDiscreteScheduler(prediction_type=prediction, use_karras_sigmas=karras, **BETAS)
    scheduler.set_timesteps(12)
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2]]).double()
    z = torch.randn(2, 3, 8, 8)
    wanted = theirs(scheduler, net, z * sigmas[0].float())
    denoiser = importing.read(tmp_path).denoiser
    found = solve(denoiser, z, None, sigmas=sigmas.tolist())
    if karras:  # the same levels by our own formula
        ends = {"sigma_min": sigmas[-1].item(), "sigma_max": sigmas[0].item()}
        torch.testing.assert_close(solve(denoiser, z, None, steps=12, **ends), found, rtol=1e-4, atol=1e-4)
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [6, 20])
def test_dpmpp_2m_is_the_librarys(tmp_path: Path, prediction: str, steps: int) -> None:
    net = pipeline(tmp_path, prediction)
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type=prediction, lower_order_final=False, **BETAS)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas[:-1].double()
    z = torch.randn(2, 3, 8, 8)
    # The library's state is x / sqrt(1 + sigma^2).
    start = z * (sigmas[0] / (1 + sigmas[0].square()).sqrt()).float()
    wanted = theirs(scheduler, net, start)
    found = solve(importing.read(tmp_path).denoiser, z, None, name="dpmpp_2m", sigmas=sigmas.tolist())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_dpmpp_2m_is_the_librarys_for_edms_preconditioning() -> None:
    """One network inside our preconditioning and inside the library's, on EDM's own noise levels."""
    torch.manual_seed(0)
    settings = UNetSettings(channels=8)
    denoiser = shake(nets.build(settings, shape=(1, 8, 8), num_classes=0, sigma_data=0.5), 0.05).eval()
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, lower_order_final=False)
    scheduler.set_timesteps(18)
    z = torch.randn(2, 1, 8, 8)
    x = z * scheduler.sigmas[0]
    for t in scheduler.timesteps:
        with torch.no_grad():
            F_x = denoiser.net(scheduler.scale_model_input(x, t), t.reshape(1).expand(2), None)
        x = scheduler.step(F_x, t, x).prev_sample
    torch.testing.assert_close(solve(denoiser, z, None, name="dpmpp_2m", steps=18), x, rtol=1e-4, atol=1e-4)


# In float64, on a mixture whose denoiser is exact: the library's schedulers with our noise levels put in.

SIGMAS = karras_sigmas(13, sigma_min=0.02, sigma_max=20.0)
START = torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None]


def with_our_levels(scheduler: Any) -> Any:
    scheduler.set_timesteps(len(SIGMAS))
    scheduler.sigmas = torch.cat([SIGMAS, SIGMAS[-1:]])
    return scheduler


def one(sigma: Tensor) -> Tensor:
    return sigma.reshape(1).expand(len(START))


def last_of_vp(scheduler: Any) -> Tensor:
    """Return the library's x at the last level; its state is x / sqrt(1 + sigma^2)."""
    with_our_levels(scheduler)
    x = START * SIGMAS[0] / (1 + SIGMAS[0] ** 2).sqrt()
    for i, sigma in enumerate(SIGMAS[:-1]):
        scheduler._step_index = i
        asked = x * (1 + sigma**2).sqrt()
        x = scheduler.step((asked - mixture(asked, one(sigma))) / sigma, scheduler.timesteps[i], x).prev_sample
    return x * (1 + SIGMAS[-1] ** 2).sqrt()


def last_of_edm(scheduler: Any) -> Tensor:
    with_our_levels(scheduler)
    scheduler.precondition_outputs = lambda sample, output, sigma: output
    x = START * SIGMAS[0]
    for i, sigma in enumerate(SIGMAS[:-1]):
        scheduler._step_index = i
        x = scheduler.step(mixture(x, one(sigma)), scheduler.timesteps[i], x).prev_sample
    return x


def last_of_ours(**options: Any) -> Tensor:
    """Return the x that our solver asks for at the last level."""
    seen: list[Tensor] = []

    def asked(x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
        seen.append(x)
        return mixture(x, sigma, condition)

    solve(asked, START, None, sigmas=SIGMAS.tolist(), **options)
    return seen[-1]


VP = {"prediction_type": "epsilon", "lower_order_final": False}
EDM = {"solver_order": 3, "prediction_type": "epsilon", "final_sigmas_type": "sigma_min", "lower_order_final": False}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"name": "ddim"}, lambda: last_of_vp(diffusers.DPMSolverMultistepScheduler(solver_order=1, **VP))),
        ({"name": "dpmpp_2m"}, lambda: last_of_vp(diffusers.DPMSolverMultistepScheduler(solver_order=2, **VP))),
        ({"name": "dpmpp_3m"}, lambda: last_of_vp(diffusers.DPMSolverMultistepScheduler(solver_order=3, **VP))),
        ({"name": "dpmpp_3m"}, lambda: last_of_edm(diffusers.EDMDPMSolverMultistepScheduler(**EDM))),
        *(
            (
                {"name": "deis", "order": order},
                lambda order=order: last_of_vp(diffusers.DEISMultistepScheduler(solver_order=order, **VP)),
            )
            for order in (1, 2, 3)
        ),
        *(
            (
                {"name": "unipc", "order": order},
                lambda order=order: last_of_vp(diffusers.UniPCMultistepScheduler(solver_order=order, **VP)),
            )
            for order in (2, 3)
        ),
    ],
)
def test_multistep_solvers_are_the_librarys(options: dict[str, Any], wanted: Callable[[], Tensor]) -> None:
    torch.testing.assert_close(last_of_ours(**options), wanted(), rtol=1e-6, atol=1e-6)


def test_dpm_solver_2_is_the_librarys() -> None:
    """Its levels are ours with the middle of every step between them. (Its third order is not the paper's: the second
    inner point is by the rule of the second order.)
    """
    few = karras_sigmas(7, sigma_min=0.02, sigma_max=20.0)
    fine = torch.cat([*(torch.stack([a, (a * b).sqrt()]) for a, b in itertools.pairwise(few)), few[-1:]])
    options = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", **VP}
    scheduler = diffusers.DPMSolverSinglestepScheduler(solver_order=2, **options)
    scheduler.set_timesteps(len(fine))
    scheduler.sigmas, scheduler.order_list = torch.cat([fine, fine[-1:]]), [1, 2] * len(few)
    x = START * fine[0] / (1 + fine[0] ** 2).sqrt()
    for i, sigma in enumerate(fine[:-1]):
        scheduler._step_index = i
        asked = x * (1 + sigma**2).sqrt()
        x = scheduler.step((asked - mixture(asked, one(sigma))) / sigma, scheduler.timesteps[i], x).prev_sample
    found = solve(mixture, START, None, name="dpm_solver_2", sigmas=few.tolist())
    wanted = mixture(x * (1 + few[-1] ** 2).sqrt(), one(few[-1]))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
