"""The solvers on teachers known in closed form: order of convergence, evaluations, noise, and what stayed as it was."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from msdcli.diffusion import sampler
from msdcli.diffusion.denoiser import karras_sigmas
from msdcli.diffusion.sampler import evaluated_levels, solve
from msdcli.engine.inputs.pairs import sample_teacher
from msdcli.recipe.solver import STOCHASTIC, SolverSettings
from tests.gaussians import GaussianDenoiser, mixture

NAMES = get_args(SolverSettings.model_fields["name"].annotation)
ENDS = {"sigma_min": 0.02, "sigma_max": 20.0}
Z = torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None]
MEAN, VARIANCE = torch.tensor([0.3]), torch.tensor([0.25])

# Solver, its options, and the orders that it converges with; at the Gaussian's linear D one of them is better.
ORDERS = [
    ("ddim", {}, 1, 1),
    ("heun", {}, 2, 2),
    ("dpm_solver_2", {}, 2, 2),
    ("dpm_solver_3", {}, 3.7, 3),
    ("dpmpp_2m", {}, 2, 2),
    ("dpmpp_3m", {}, 2, 2),
    ("deis", {"order": 1}, 1, 1),
    ("deis", {"order": 2}, 2, 2),
    ("deis", {"order": 3}, 3, 3),
    ("unipc", {"order": 2}, 3, 3),
    ("unipc", {"order": 3}, 4, 3.8),
]


@cache
def exact(what: str) -> Tensor:
    """The ODE's solution at the last level, denoised there."""
    if what == "mixture":
        return solve(mixture, Z, None, name="unipc", steps=3000, **ENDS)
    low, high = ((VARIANCE + ENDS[end] ** 2).double() for end in ("sigma_min", "sigma_max"))
    x = MEAN + (20 * Z - MEAN) * (low / high).sqrt()
    return GaussianDenoiser(MEAN, VARIANCE)(x, torch.full((len(Z),), 0.02, dtype=torch.float64)).detach()


def order(what: str, name: str, steps: int, **options: Any) -> float:
    teacher = mixture if what == "mixture" else GaussianDenoiser(MEAN, VARIANCE)
    errors = [
        (solve(teacher, Z, None, name=name, steps=n + 1, **ENDS, **options) - exact(what)).abs().max().item()
        for n in (steps, 2 * steps)
    ]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(("name", "options", "gaussian", "on_mixture"), ORDERS)
def test_a_solver_has_its_order(name: str, options: dict[str, int], gaussian: float, on_mixture: float) -> None:
    assert order("gaussian", name, 64, **options) == pytest.approx(gaussian, abs=0.25)
    assert order("mixture", name, 128, **options) == pytest.approx(on_mixture, abs=0.25)


def test_dpmpp_3m_as_published_lacks_half_of_a_term_for_order_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "published_3m", sampler.half_difference)
    assert order("mixture", "dpmpp_3m", 128) == pytest.approx(3, abs=0.25)


@pytest.mark.parametrize(
    ("name", "options", "bound"),
    [
        ("dpm_solver_3", {"steps": 9}, 5e-3),  # 25 evaluations
        ("deis", {"steps": 25}, 2e-3),
        ("unipc", {"steps": 25}, 2e-3),
        ("dpmpp_3m", {"steps": 25}, 5e-3),
        ("dpmpp_2m", {"steps": 25}, 1e-2),
    ],
)
def test_errors_at_some_25_evaluations(name: str, options: dict[str, int], bound: float) -> None:
    assert SolverSettings(name=name, **options).evaluations == 25
    assert (solve(mixture, Z, None, name=name, **options, **ENDS) - exact("mixture")).abs().max() < bound


@pytest.mark.parametrize("steps", [2, 3, 18])
@pytest.mark.parametrize("name", NAMES)
def test_evaluations_are_those_that_the_settings_count(name: str, steps: int) -> None:
    settings = SolverSettings(name=name, steps=steps)
    levels = evaluated_levels(**settings.record())
    assert len(levels) == settings.evaluations
    assert max(levels) >= 80 * 0.999 and min(levels) == pytest.approx(0.002)


def test_evaluations_are_the_papers() -> None:
    published = {"heun": 35, "dpm_solver_3": 52, "dpmpp_2m": 18, "deis": 18, "unipc": 18, "ddim": 18}
    assert {name: SolverSettings(name=name).evaluations for name in published} == published
    assert SolverSettings(name="edm_churn", steps=256).evaluations == 511, "EDM's on ImageNet-64"


def ours_before(name: str, z: Tensor, steps: int) -> Tensor:
    """The two solvers of msd 0.1.0 as they were written there, operation by operation."""
    sigmas = karras_sigmas(steps)
    x = z.double() * sigmas[0]

    def D(x: Tensor, sigma: Tensor) -> Tensor:
        return network(x.to(z.dtype), sigma.to(z.dtype).expand(len(x)), None).double()

    if name == "heun":
        for sigma, sigma_next in itertools.pairwise([*sigmas, sigmas.new_zeros(())]):
            d = (x - D(x, sigma)) / sigma
            x_next = x + (sigma_next - sigma) * d
            if sigma_next > 0:
                x_next = x + (sigma_next - sigma) * 0.5 * (d + (x_next - D(x_next, sigma_next)) / sigma_next)
            x = x_next
        return x.to(z.dtype)
    lambdas, previous = -sigmas.log(), None
    for i, sigma in enumerate(sigmas[:-1]):
        denoised, h = D(x, sigma), lambdas[i + 1] - lambdas[i]
        ahead = denoised
        if previous is not None:
            ahead = denoised + (denoised - previous) / (2 * ((lambdas[i] - lambdas[i - 1]) / h))
        x, previous = sigmas[i + 1] / sigma * x - torch.expm1(-h) * ahead, denoised
    return D(x, sigmas[-1]).to(z.dtype)


def network(x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
    """Something like a network, float32, neither linear nor smooth to the last bit."""
    s = sigma.reshape(-1, 1)
    return x / (1 + s * s) + s / (1 + s) * torch.tanh(x.flip(1) / (1 + s) + 0.3)


@pytest.mark.parametrize("steps", [2, 7, 18, 40])
@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_the_first_two_solvers_are_what_they_were_bit_for_bit(name: str, steps: int) -> None:
    z = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(solve(network, z, None, name=name, steps=steps), ours_before(name, z, steps))


@pytest.mark.parametrize("name", NAMES)
def test_given_levels_are_the_levels(name: str) -> None:
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    given = SolverSettings(name=name, sigmas=karras_sigmas(9).tolist())
    options = {"noise": lambda step: torch.ones_like(z)}
    by_levels = solve(network, z, None, **options, **given.record())
    assert torch.equal(by_levels, solve(network, z, None, name=name, steps=9, **options))
    assert solve(network, z, None, name=name, sigmas=[5.0, 4.0, 0.1], **options).isfinite().all()


# The stochastic ones.


def spread(name: str, steps: int, **options: float) -> float:
    """The standard deviation of what a solver makes of N(0, 1/4): every step is linear, so that it is the root of the
    sum of squared answers to one unit of noise at a time. No sample is drawn.
    """
    impulses = torch.eye(steps + 1, dtype=torch.float64)
    teacher = GaussianDenoiser(torch.zeros(1), torch.tensor([0.25]))
    found = solve(
        teacher, impulses[:, :1], None, name=name, steps=steps, noise=lambda k: impulses[:, k + 1 :][:, :1], **options
    )
    return found.square().sum().sqrt().item()


@pytest.mark.parametrize(
    ("name", "options", "at_18", "at_64", "at_256"),
    [
        ("heun", {}, 0.528, 0.5018, 0.5001),
        ("edm_churn", {"churn_noise": 1.0}, 0.562, 0.510, 0.5010),
        ("edm_churn", {}, None, None, 0.5025),
        ("ancestral", {}, 0.368, 0.456, 0.488),
        ("dpmpp_2m_sde", {}, 0.566, 0.5051, 0.5003),
    ],
)
def test_spread_of_a_gaussian(
    name: str, options: dict[str, float], at_18: float | None, at_64: float | None, at_256: float
) -> None:
    for steps, value in zip((18, 64, 256), (at_18, at_64, at_256), strict=True):
        assert value is None or spread(name, steps, **options) == pytest.approx(value, abs=6e-4)


def test_heun_leaves_samples_too_wide_where_deis_does_not() -> None:
    """What sets the digits' teacher's figures by `heun` 35 and `dpmpp_2m` 18 apart from those of the exact solution."""
    at = {name: spread(name, steps) for name, steps in (("heun", 18), ("dpmpp_2m", 18), ("deis", 18), ("ddim", 18))}
    assert at == pytest.approx({"heun": 0.5276, "dpmpp_2m": 0.5311, "deis": 0.5017, "ddim": 0.4230}, abs=1e-4)
    assert spread("deis", 12) == pytest.approx(0.5005, abs=1e-4)


def test_ddim_is_the_first_order_of_both_forms() -> None:
    x, D = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s, t = 5.0, 1.7
    h = math.log(s / t)
    euler = x + (t - s) * (x - D) / s
    data = sampler.exponential_step(x, t / s, sampler.data_integrals(h, 1), [(s, D)])
    noise = sampler.exponential_step(x, 1.0, [-t * J for J in sampler.noise_integrals(h, 1)], [(s, (x - D) / s)])
    torch.testing.assert_close(data, euler, rtol=0, atol=1e-12)
    torch.testing.assert_close(noise, euler, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("interval", "least", "most"), [((0.19, 1.61), 0.585, 0.596), ((0.28, 2.9), 0.61, 0.615), ((0.17, 5.4), 0.67, 0.68)]
)
def test_what_guidance_within_edm2s_intervals_costs(interval: tuple[float, float], least: float, most: float) -> None:
    """Of both branches everywhere, with Heun's method."""
    low, high = interval
    for steps in (18, 32, 40):
        levels = evaluated_levels(name="heun", steps=steps)
        assert least < (1 + sum(low < s <= high for s in levels) / len(levels)) / 2 < most


def test_churn_of_nothing_is_heun() -> None:
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    options = {"noise": lambda step: torch.ones_like(z), "steps": 7}
    heun = solve(network, z, None, steps=7)
    assert torch.equal(solve(network, z, None, name="edm_churn", churn=0.0, **options), heun)
    assert torch.equal(solve(network, z, None, name="edm_churn", churn_min=90.0, churn_max=95.0, **options), heun)
    assert not torch.equal(solve(network, z, None, name="edm_churn", **options), heun)


class Net(nn.Module):
    """`network` as a teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
        return network(x, sigma, condition) + self.weight


@pytest.mark.parametrize("name", STOCHASTIC)
def test_added_noise_depends_on_seed_number_and_step_alone(name: str) -> None:
    z, c, solver = torch.ones(5, 3), torch.zeros(5, dtype=torch.int64), SolverSettings(name=name, steps=6)
    numbers = [7, 3, 12, 0, 5]
    together = sample_teacher(Net(), z, c, solver, batch=5, numbers=numbers, seed=1)
    cut = sample_teacher(Net(), z, c, solver, batch=2, numbers=numbers, seed=1)
    torch.testing.assert_close(cut, together, rtol=1e-6, atol=1e-6)
    alone = sample_teacher(Net(), z[:1], c[:1], solver, batch=1, numbers=[12], seed=1)
    torch.testing.assert_close(alone, together[2:3], rtol=1e-6, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3, "the same z, other numbers"
    other = sample_teacher(Net(), z, c, solver, batch=5, numbers=numbers, seed=2)
    assert (other - together).abs().max() > 1e-3
