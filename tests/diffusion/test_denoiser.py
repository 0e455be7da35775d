"""Sigma space: preconditioning, schedules and the one-step generator against their formulas."""

import pytest
import torch
from torch import Tensor, nn

from msdcli.diffusion import denoiser as d


class Echo(nn.Module):
    """A raw network that returns its input and remembers what it was asked."""

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None) -> Tensor:
        self.asked = (x, c_noise, condition)
        return x


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8)])
def test_preconditioning_is_table_1_of_edm(shape: tuple[int, ...]) -> None:
    net = d.Denoiser(Echo(), shape=shape, num_classes=0, sigma_data=0.5)
    x, sigma = torch.randn(3, *shape), torch.tensor([0.1, 1.0, 20.0])
    s = sigma.reshape(-1, *[1] * len(shape))
    c_in = 1 / (s**2 + 0.25).sqrt()
    wanted = 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25).sqrt() * (c_in * x)
    torch.testing.assert_close(net(x, sigma), wanted)
    torch.testing.assert_close(net.net.asked[1], sigma.log() / 4)


def test_edm_weight_makes_the_raw_networks_loss_even() -> None:
    """lambda(sigma) c_out(sigma)^2 = 1 (EDM, Eq. 8)."""
    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    torch.testing.assert_close(d.edm_weight(sigma, 0.5) * c_out**2, torch.ones_like(sigma))


def test_karras_schedule_has_the_papers_ends_and_curvature() -> None:
    sigmas = d.karras_sigmas(18)
    assert sigmas[0] == pytest.approx(80) and sigmas[-1] == pytest.approx(0.002)
    torch.testing.assert_close((sigmas ** (1 / 7)).diff(), ((sigmas ** (1 / 7)).diff()[:1]).expand(17))


def test_drawn_levels_stay_in_their_span() -> None:
    u = torch.linspace(0, 1, 1001)[:-1]
    schedule = d.karras_sigmas(1000).flip(0).float()
    drawn = d.karras_draw(u, [0.02, 0.98])
    assert drawn.min() == schedule[20] and drawn.max() == schedule[979]
    assert d.karras_draw(torch.tensor([0.999999]), [0.0, 1.0]) == schedule[-1]


def test_one_step_is_one_call_at_sigma_init() -> None:
    net = d.Denoiser(Echo(), shape=(2,), num_classes=3)
    z, c = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(d.one_step(net, z, 2.5, c), net(2.5 * z, torch.full((4,), 2.5), c))
