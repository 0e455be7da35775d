"""What consistency along a path needs of a network: several evaluations with one dropout mask, and a derivative."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from msdcli.diffusion.denoiser import Denoiser, per_image
from msdcli.diffusion.draws import Draws
from msdcli.diffusion.guidance import drawn
from msdcli.errors import UserError


def path_end(
    path: Literal["teacher", "data"], teacher: Denoiser, x: Tensor, sigma: Tensor, c: Tensor, y: Tensor, draws: Draws
) -> Tensor:
    """Return where the path through x is headed: for the teacher's answer, or for the image y that x was made from."""
    return drawn(teacher, draws.uniform)(x, sigma, c) if path == "teacher" else y


def layers_draws(like: Tensor) -> Callable[[], None]:
    """Return what makes layers draw again, on the device of `like`, what they draw from here on: one dropout mask."""
    if like.is_cuda:
        on_device = torch.cuda.get_rng_state(like.device)
        return lambda: torch.cuda.set_rng_state(on_device, like.device)
    state = torch.get_rng_state()
    return lambda: torch.set_rng_state(state)


@torch.no_grad()
def derivative_along(
    net: nn.Module,
    x: Tensor,
    sigma: Tensor,
    condition: Tensor | None,
    D_ode: Tensor,
    *,
    how: Literal["forward", "central"],
    step: float = 1e-3,
) -> Tensor:
    """Return dD / d ln(sigma) along the path of slope (x - D_ode) / sigma, [batch, *shape], without gradient.

    That is the derivative of D(x + h (x - D_ode), sigma (1 + h)) at h = 0: by forward-mode differentiation, exactly,
    or by central differences of size `step`. The network computes in float32 and as it is written, not compiled; its
    layers draw in every evaluation what they draw in the first. UserError where the network has no forward mode.
    """
    with in_float32(net), ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # something may be compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if how == "forward":
            return _forward(net, x, sigma, condition, x - D_ode)
        repeat = layers_draws(x)
        ends = []
        for h in (step, -step):
            repeat()
            there = (x.double() + h * (x.double() - D_ode.double())).to(x.dtype)
            ends.append(net(there, (sigma.double() * (1 + h)).to(sigma.dtype), condition).double())
        return ((ends[0] - ends[1]) / (2 * step)).to(x.dtype)


def _forward(net: nn.Module, x: Tensor, sigma: Tensor, condition: Tensor | None, dx: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with warnings.catch_warnings():  # what torch scripts as it first differentiates forward, and deprecates itself
        warnings.simplefilter("ignore", FutureWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")
    try:  # of the kernels of attention only the written-out one has a forward mode
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            D = net(forward_ad.make_dual(x, dx), forward_ad.make_dual(sigma, sigma), condition)
            tangent = forward_ad.unpack_dual(D).tangent
    except (NotImplementedError, RuntimeError) as error:
        if "forward" not in str(error).lower():
            raise
        raise UserError(
            f"the student's network has no forward-mode derivative ({str(error).splitlines()[0][:200]})",
            hint="derivative: central",
        ) from error
    assert tangent is not None, "D depends on x"
    return tangent


@contextmanager
def in_float32(net: nn.Module) -> Iterator[None]:
    """Let a network whose weights are float32 compute in it, whatever it computes in else."""
    raw: Any = getattr(net, "net", None)
    compute = getattr(raw, "compute", None)
    if compute is None:
        yield
        return
    raw.compute = None
    try:
        yield
    finally:
        raw.compute = compute


def consistency_tangent(D: Tensor, D_ode: Tensor, dD: Tensor, sigma: Tensor, sigma_data: float, w: float) -> Tensor:
    """Return sCM's tangent g of TrigFlow (Lu and Song 2024, arXiv 2410.11081, Eq. 6 and Sec. 4.1) in sigma space.

    With t = atan(sigma / sd), x' = cos(t) x and F, F' the raw network and its derivative along the path it is
    -cos^2(t) (sd F - dx'/dt) - w cos(t) sin(t) (x' + sd F'): here, with H = sqrt(sigma^2 + sd^2),

        g = g_1 + w (H / sigma dD - g_1),  g_1 = sd^2 / (sigma H) (D - D_ode),  dD = dD / d ln(sigma) along the path.
    """
    s = per_image(sigma, D)
    H = (s.square() + sigma_data**2).sqrt()
    first = sigma_data**2 / (s * H) * (D - D_ode)
    return first + w * (H / s * dD - first)
