"""Samplers of the teacher in sigma space: its probability-flow ODE solved from unit noise, or its SDE.

With lambda = -ln(sigma) and h = ln(sigma / sigma') the ODE's solution over one step is linear in what the network says:

    data      x' = sigma'/sigma x + sum_k I_k D^(k),     I_0 = 1 - e^-h,  I_k = h^k / k! - I_{k-1}
    noise     x' = x - sigma' sum_k J_k eps^(k),         J_0 = e^h - 1,   J_k = J_{k-1} - h^k / k!

D^(k) and eps^(k) are derivatives in lambda at the step's start, of the polynomial through the last values (exponential
Adams-Bashforth) or, in a corrector, through the step's end too. DDIM, DEIS, DPM-Solver++(3M), UniPC and
DPM-Solver++(2M) SDE are choices of the values and the weights (`exponential_step`); DPM-Solver-2 and -3 are Runge-Kutta
steps by the noise form. Every solver ends with D at the last level, Euler's step to sigma = 0.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdcli.diffusion.denoiser import karras_sigmas
from msdcli.diffusion.guidance import at_level

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]
    Noise = Callable[[int], Tensor]  # unit noise of the step with this number, one per image
    Step = Callable[["Path", Tensor, int], Tensor]  # from level i to the next, which may be 0


def solve(
    denoise: Denoise,
    z: Tensor,
    condition: Tensor | None,
    *,
    name: str = "heun",
    steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    sigmas: Sequence[float] | None = None,
    noise: Noise | None = None,
    **options: float,
) -> Tensor:
    """Sample from unit noise `z` [batch, ...] on Karras' noise levels, or on `sigmas`, by the solver called `name`.

    The state is float64; the network sees `z`'s own type. `options` are the solver's own keys (`order`, `churn`, ...).
    `noise` is what a stochastic solver adds, step by step.
    """
    if sigmas is None:
        levels = karras_sigmas(steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    else:
        levels = torch.tensor(sigmas, dtype=torch.float64)
    return descend(partial(SOLVERS[name], **options), denoise, z, condition, levels, noise)


def evaluated_levels(**options: float | str | Sequence[float] | None) -> list[float]:
    """Return the noise levels that `solve` with these options evaluates the network at, in order."""
    levels: list[float] = []

    def record(x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
        levels.append(sigma.item())
        return x

    nothing = torch.zeros(1, dtype=torch.float64)
    solve(record, nothing, None, noise=lambda step: nothing, **options)  # type: ignore[arg-type]
    return levels


class Path:
    """One batch's way down the noise levels: the network, the levels, and what the network said at the last few."""

    def __init__(
        self, denoise: Denoise, z: Tensor, condition: Tensor | None, sigmas: Tensor, noise: Noise | None
    ) -> None:
        self._denoise, self._condition, self._noise = denoise, condition, noise
        self._like = z
        self.levels = [*sigmas.tolist(), 0.0]  # known here, so that no step waits for the device
        self.sigmas = torch.stack([self.scalar(sigma) for sigma in self.levels[:-1]])  # filled there: nothing is copied
        self._following = dict(itertools.pairwise(self.levels))  # of levels between two, as stages have, nothing
        self.past: list[tuple[float, Tensor]] = []  # (sigma, value), the newest first

    def D(self, x: Tensor, sigma: float) -> Tensor:
        """Ask the network: D(x, sigma), float64."""
        z = self._like
        ask = at_level(self._denoise, torch.tensor(sigma, dtype=z.dtype), self._following.get(sigma, sigma))
        level = torch.full((len(x),), sigma, dtype=z.dtype, device=z.device)
        return ask(x.to(z.dtype), level, self._condition).to(torch.float64)

    def eps(self, x: Tensor, sigma: float) -> Tensor:
        """Return the noise in x as the network sees it, dx/dsigma."""
        return (x - self.D(x, sigma)) / self.scalar(sigma)

    def scalar(self, value: float) -> Tensor:
        """Return a number where the images are (a GPU divides by a number from elsewhere less exactly)."""
        return torch.full((), value, dtype=torch.float64, device=self._like.device)

    def noise(self, step: int) -> Tensor:
        """Return the unit noise that is added in a step."""
        assert self._noise is not None, "a stochastic solver needs noise"
        return self._noise(step).to(self._like.device, torch.float64)

    def keep(self, sigma: float, value: Tensor, count: int) -> list[tuple[float, Tensor]]:
        """Note a value and return the last `count`."""
        self.past = [(sigma, value), *self.past[: count - 1]]
        return self.past


@torch.no_grad()
def descend(
    step: Step, denoise: Denoise, z: Tensor, condition: Tensor | None, sigmas: Tensor, noise: Noise | None = None
) -> Tensor:
    """Take a solver's steps over descending `sigmas` (float64, on the CPU), then to 0."""
    path = Path(denoise, z, condition, sigmas, noise)
    x = z.to(torch.float64) * path.sigmas[0]
    for i in range(len(sigmas)):
        x = step(path, x, i)
    return x.to(z.dtype)


# The one formula, and its members.


def data_integrals(h: float, count: int) -> list[float]:
    """I_k = integral of e^-(h - u) u^k / k! over [0, h] for k < count."""
    found = [-math.expm1(-h)]
    for k in range(1, count):
        found.append(h**k / math.factorial(k) - found[-1])
    return found


def noise_integrals(h: float, count: int) -> list[float]:
    """J_k = integral of e^(h - u) u^k / k! over [0, h] for k < count."""
    found = [math.expm1(h)]
    for k in range(1, count):
        found.append(found[-1] - h**k / math.factorial(k))
    return found


def half_difference(h: float, count: int) -> list[float]:
    """I_k, but of two values I_0 h / 2 for I_1, as DPM-Solver++(2M) and UniPC have it: the same to second order."""
    found = data_integrals(h, count)
    return found if count != 2 else [found[0], found[0] * h / 2]


def published_3m(h: float, count: int) -> list[float]:
    """The same, but half of I_2, as DPM-Solver++(3M) was published: it multiplies a divided difference, which is half
    of the second derivative, by the coefficient of the whole one. The solver so has order 2; with I_2 it has 3.
    """
    found = half_difference(h, count)
    return found if count < 3 else [*found[:2], found[2] / 2]


def exponential_step(
    x: Tensor, carry: float, integrals: Sequence[float], values: Sequence[tuple[float, Tensor]]
) -> Tensor:
    """Return carry x + sum_k integrals[k] f^(k), with the derivatives in lambda, at the first value's level, of the
    polynomial through `values` (sigma, f).
    """
    start = values[0][0]
    h = [math.log(start / sigma) for sigma, _ in values]
    powers = [[u**k / math.factorial(k) for k in range(len(h))] for u in h]
    # sum_k I_k f^(k) with f^(k) = sum_j inverse[k, j] f_j: one weight per value.
    inverse = torch.linalg.inv(torch.tensor(powers, dtype=torch.float64))
    weights = torch.tensor(integrals, dtype=torch.float64) @ inverse
    x = carry * x
    for weight, (_, f) in zip(weights.tolist(), values, strict=True):
        x = x + weight * f
    return x


def ddim(path: Path, x: Tensor, i: int) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502) without noise: Euler's method in sigma, order 1 of both forms."""
    return deis(path, x, i, order=1)


def deis(path: Path, x: Tensor, i: int, *, order: int = 3) -> Tensor:
    """DEIS (Zhang and Chen 2023, arXiv 2204.13902) in ln(sigma): noise form, through the last `order` values."""
    sigma, sigma_next = path.levels[i : i + 2]
    D = path.D(x, sigma)
    if not sigma_next:
        return D
    values = path.keep(sigma, (x - D) / sigma, order)
    integrals = noise_integrals(math.log(sigma / sigma_next), len(values))
    return exponential_step(x, 1.0, [-sigma_next * J for J in integrals], values)


def dpmpp_3m_step(path: Path, x: Tensor, i: int) -> Tensor:
    """DPM-Solver++(3M) (Lu et al. 2022, arXiv 2211.01095), as published (`published_3m`)."""
    sigma, sigma_next = path.levels[i : i + 2]
    D = path.D(x, sigma)
    if not sigma_next:
        return D
    values = path.keep(sigma, D, 3)
    return exponential_step(x, sigma_next / sigma, published_3m(math.log(sigma / sigma_next), len(values)), values)


def unipc(path: Path, x: Tensor, i: int, *, order: int = 3) -> Tensor:
    """UniPC (Zhao et al. 2023, arXiv 2302.04867) with B_2(h): predict, evaluate, and correct by the same evaluation.

    It corrects the last level too, where the evaluation is the answer: D + x_corrected - x_predicted.
    """
    if i == 0:
        path.keep(path.levels[0], path.D(x, path.levels[0]), order)
    sigma, sigma_next = path.levels[i : i + 2]
    if not sigma_next:  # the step before went on to the answer
        return x
    h, carry, values = math.log(sigma / sigma_next), sigma_next / sigma, path.past
    predicted = exponential_step(x, carry, half_difference(h, len(values)), values)
    D = path.D(predicted, sigma_next)
    values = [*values, (sigma_next, D)]
    corrected = exponential_step(x, carry, half_difference(h, len(values)), values)
    path.keep(sigma_next, D, order)
    return corrected if path.levels[i + 2] else D + corrected - predicted


def dpm_solver(path: Path, x: Tensor, i: int, *, order: int) -> Tensor:
    """DPM-Solver-2 and -3 (Lu et al. 2022, arXiv 2206.00927, Algorithms 4 and 5): Runge-Kutta, noise form."""
    s, t = path.levels[i : i + 2]
    if not t:
        return path.D(x, s)
    h, eps = math.log(s / t), path.eps(x, s)

    def stage(r: float, share: float, slope: Tensor | float) -> Tensor:
        """Return x at lambda + r h: sigma' J_0 eps and `share` of J_1, as if `slope` were eps' h."""
        u = s * math.exp(-r * h)
        J_0, J_1 = noise_integrals(r * h, 2)
        return x - u * (J_0 * eps + share * J_1 / (r * h) * slope)

    if order == 2:  # r_1 = 1/2, and J_0 / 2 for J_1 / h
        middle = path.eps(stage(1 / 2, 0.0, 0.0), math.sqrt(s * t)) - eps
        return x - t * math.expm1(h) * (eps + middle)
    third, two_thirds = (s * math.exp(-r * h) for r in (1 / 3, 2 / 3))
    first = path.eps(stage(1 / 3, 0.0, 0.0), third) - eps
    second = path.eps(stage(2 / 3, 2.0, first), two_thirds) - eps  # first is eps' h / 3, a half of eps' 2h/3
    return stage(1.0, 1.5, second)  # second is eps' 2h/3


# The two of msd 0.1.0, whose order of operations stays: pairs that were made are what they are to the last bit.


def heun_step(path: Path, x: Tensor, i: int) -> Tensor:
    """Heun's method (Karras et al. 2022, arXiv 2206.00364, Algorithm 1); the last step, to 0, is Euler's."""
    return _trapezoid(path, x, path.levels[i], path.levels[i + 1])


def _trapezoid(path: Path, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    d, length = path.eps(x, sigma), path.scalar(sigma_next) - path.scalar(sigma)
    x_next = x + length * d
    if not sigma_next:  # there is no slope at sigma = 0
        return x_next
    return x + length * 0.5 * (d + path.eps(x_next, sigma_next))


def dpmpp_2m_step(path: Path, x: Tensor, i: int) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2).

    The first step and the last are of first order: the first has no step before it, the last is infinitely long.
    """
    sigmas, lambdas = path.sigmas, -path.sigmas.log()
    denoised = path.D(x, path.levels[i])
    if i + 1 == len(sigmas):
        return denoised
    h, D = lambdas[i + 1] - lambdas[i], denoised
    if path.past:
        r = (lambdas[i] - lambdas[i - 1]) / h
        D = denoised + (denoised - path.past[0][1]) / (2 * r)
    path.keep(path.levels[i], denoised, 1)
    return sigmas[i + 1] / sigmas[i] * x - torch.expm1(-h) * D


# With noise in every step: many steps, no pairs.


def edm_churn(
    path: Path,
    x: Tensor,
    i: int,
    *,
    churn: float = 40.0,
    churn_min: float = 0.05,
    churn_max: float = 50.0,
    churn_noise: float = 1.003,
) -> Tensor:
    """EDM's stochastic sampler (Karras et al. 2022, arXiv 2206.00364, Algorithm 2): up by noise, then Heun's step."""
    sigma, raised = path.levels[i], path.levels[i]
    if churn_min <= sigma <= churn_max:
        raised = sigma * (1 + min(churn / len(path.sigmas), math.sqrt(2) - 1))
        x = x + math.sqrt(raised**2 - sigma**2) * churn_noise * path.noise(i)
    return _trapezoid(path, x, raised, path.levels[i + 1])


def ancestral(path: Path, x: Tensor, i: int) -> Tensor:
    """Euler's method to sigma_down, then noise up to the next level: sampling as DDPM does (arXiv 2006.11239)."""
    sigma, sigma_next = path.levels[i : i + 2]
    D = path.D(x, sigma)
    if not sigma_next:
        return D
    up = sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
    down = sigma_next**2 / sigma
    return D + down / sigma * (x - D) + up * path.noise(i)


def dpmpp_2m_sde(path: Path, x: Tensor, i: int) -> Tensor:
    """DPM-Solver++(2M) SDE (arXiv 2211.01095, Section 4.3, by its midpoint rule)."""
    sigma, sigma_next = path.levels[i : i + 2]
    D = path.D(x, sigma)
    if not sigma_next:
        return D
    values, h = path.keep(sigma, D, 2), math.log(sigma / sigma_next)
    gain = -math.expm1(-2 * h)
    x = exponential_step(x, sigma_next / sigma * math.exp(-h), [gain, gain * h / 2][: len(values)], values)
    return x + sigma_next * math.sqrt(gain) * path.noise(i)


SOLVERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
    "heun": heun_step,
    "dpm_solver_2": partial(dpm_solver, order=2),
    "dpm_solver_3": partial(dpm_solver, order=3),
    "dpmpp_2m": dpmpp_2m_step,
    "dpmpp_3m": dpmpp_3m_step,
    "deis": deis,
    "unipc": unipc,
    "edm_churn": edm_churn,
    "ancestral": ancestral,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}
