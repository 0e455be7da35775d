"""The solvers on a Gaussian teacher, whose probability-flow ODE has an exact solution."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from msdcli.data.toy2d import Toy2d
from msdcli.diffusion.draws import Draws, Source
from msdcli.diffusion.ema import EMA
from msdcli.diffusion.sampler import solve
from msdcli.noise import image_noise, noises
from msdcli.recipe.data import Toy2dSettings
from msdcli.seeds import generator
from tests.gaussians import GaussianDenoiser

MEAN, VARIANCE = torch.tensor([0.3, -0.2]), torch.tensor([0.25, 0.5])


def error(name: str, steps: int) -> float:
    """dx/dsigma = (x - D) / sigma takes x(sigma) to m + (x - m) sqrt(v / (v + sigma^2)) at sigma = 0."""
    z = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = MEAN + (80 * z - MEAN) * (VARIANCE / (VARIANCE + 80.0**2)).sqrt()
    return (solve(GaussianDenoiser(MEAN, VARIANCE), z, None, name=name, steps=steps) - exact).abs().max().item()


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_a_solver_converges_at_second_order(name: str) -> None:
    ratios = [error(name, n) / error(name, 2 * n) for n in (40, 80)]
    assert all(3.3 < ratio < 4.7 for ratio in ratios), ratios
    assert error(name, 160) < 1e-3


def test_noise_of_an_image_depends_on_seed_and_number_alone() -> None:
    together = image_noise(0, range(10), (1, 4, 4))
    torch.testing.assert_close(image_noise(0, [7], (1, 4, 4))[0], together[7], rtol=0, atol=0)
    assert not torch.equal(image_noise(1, [7], (1, 4, 4))[0], together[7])


@pytest.mark.parametrize(("threads", "ahead"), [(1, False), (3, True)])
def test_noise_is_that_of_one_generator_per_image_in_any_number_of_threads(threads: int, ahead: bool) -> None:
    shape, batches = (3, 256, 256), [[4, 0, 9, 9], [2], [7, 1, 3]]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = torch.cat([z for z, _ in noises(5, [(batch, 1) for batch in batches], shape, ahead=ahead)])
    finally:
        torch.set_num_threads(before)
    wanted = [torch.randn(shape, generator=generator("image", 5, i)) for batch in batches for i in batch]
    assert torch.equal(found, torch.stack(wanted))


def test_draws_do_not_depend_on_the_order_they_are_asked_in() -> None:
    source = Source(Toy2d(Toy2dSettings(points=80)), [0, 1, 2])
    a, b = (Draws(source, 5, ("seed", 3), 1) for _ in range(2))
    first = (a.normal("z"), a.uniform("sigma"), a.real())
    second = (b.real(), b.uniform("sigma"), b.normal("z"))
    assert torch.equal(first[0], second[2]) and torch.equal(first[2][0], second[0][0])
    assert not torch.equal(first[0], Draws(source, 5, ("seed", 3), 2).normal("z"))
    assert not torch.equal(first[0], a.normal("noise"))


def test_ema_is_the_recursion_it_says() -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    ema, wanted = EMA(net, 0.9), net.weight.detach().clone()
    for t in range(30):
        with torch.no_grad():
            net.weight.fill_(float(t))
        ema.update(net, t)
        decay = min(0.9, (1 + t) / (10 + t))
        wanted = decay * wanted + (1 - decay) * t
    torch.testing.assert_close(ema.net.weight, wanted)


class Buffered(torch.nn.Module):
    """A network with many buffers: numbers of two types, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        for i in range(20):
            self.register_buffer(f"mean{i}", torch.randn(i + 1))
            self.register_buffer(f"half{i}", torch.randn(2).bfloat16(), persistent=False)
            self.register_buffer(f"count{i}", torch.tensor(i))


class Counting(TorchDispatchMode):
    """Notes what is done to tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def test_an_average_takes_over_all_buffers_of_a_type_at_once() -> None:
    torch.manual_seed(0)
    ema, net = EMA(Buffered(), 0.9), Buffered()
    ema.update(net, 0)
    for average, buffer in zip(ema.net.buffers(), net.buffers(), strict=True):
        assert average is not buffer and average.dtype == buffer.dtype and torch.equal(average, buffer)
    with torch.device("meta"):
        ema, net = EMA(Buffered(), 0.9), Buffered()
    with Counting() as counter:
        ema.update(net, 0)
    changes = [name for name in counter.seen if "detach" not in name]
    assert sorted(changes) == ["aten._foreach_copy_"] * 3 + ["aten._foreach_lerp_"], "60 buffers of three types"
