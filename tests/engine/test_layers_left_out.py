"""Blocks left out: the knapsack is exact, what gives nothing costs nothing, and a target is met."""

from __future__ import annotations

import copy
import itertools
import math
import random
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from msdcli import nets
from msdcli.data import open_data
from msdcli.diffusion.denoiser import Denoiser, edm_weight
from msdcli.engine import layers, search
from msdcli.engine.layers import BlockCost
from msdcli.errors import UserError
from msdcli.nets.prune import keep_blocks
from msdcli.nets.unet import ResidualBlock
from msdcli.recipe.data import DigitsSettings
from msdcli.recipe.networks import PrunedUNetSettings, UNetSettings
from msdcli.recipe.student import StudentSettings

DIGITS = open_data(DigitsSettings())
SETTINGS = UNetSettings(channels=8, multipliers=[1, 2], blocks=2, attention=[4], embedding=8)


@pytest.fixture
def teacher() -> nets.Denoiser:
    torch.manual_seed(0)
    net = nets.build(SETTINGS, shape=(1, 8, 8), num_classes=10, sigma_data=0.5)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net.requires_grad_(False).eval()


def test_the_knapsack_is_exact() -> None:
    numbers = random.Random(0)
    for _ in range(20):
        blocks = [BlockCost(str(i), numbers.random(), numbers.random() / 9) for i in range(9)]
        needed = numbers.random() * sum(b.saved for b in blocks)
        every = [c for n in range(10) for c in itertools.combinations(blocks, n) if sum(b.saved for b in c) >= needed]
        least = min(sum(b.cost for b in chosen) for chosen in every)
        names = layers.cheapest(blocks, needed)
        assert names is not None
        chosen = [b for b in blocks if b.name in names]
        assert sum(b.cost for b in chosen) == pytest.approx(least) and sum(b.saved for b in chosen) >= needed
    assert layers.cheapest([BlockCost("a", 1.0, 0.3)], 0.4) is None
    assert layers.cheapest([BlockCost("a", 1.0, 0.3)], 0.0) == []


def test_a_block_whose_branches_give_zero_costs_nothing(teacher: nets.Denoiser) -> None:
    name = "encoder.4x4_0"
    block = teacher.net.get_submodule(name)
    for layer in (block.conv1, block.attention.out):  # type: ignore[union-attr]
        layer.weight.zero_(), layer.bias.zero_()  # type: ignore[union-attr, operator]
    before = teacher(torch.ones(1, 1, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    found = layers.costs(teacher, DIGITS)
    assert found[name] < 1e-10 and found[name] < 1e-4 * min(found[other] for other in found if other != name)
    assert torch.equal(teacher(torch.ones(1, 1, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.int64)), before)


class Row(ResidualBlock):
    """A linear block: it adds `times` its own row of the image to it."""

    def __init__(self, row: int, times: float) -> None:
        super().__init__((1,), 1, 4, resample="none", attention=False, dropout=0.0)
        self.row, self.times = row, times

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        own = torch.zeros_like(x)
        own[:, :, self.row] = self.times * x[:, :, self.row]
        return (x + own) * math.sqrt(0.5)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"row{i}": Row(i, times) for i, times in enumerate((0.5, -0.3, 1.5, 0.1))})

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None) -> Tensor:
        for block in self.blocks.values():
            x = block(x, c_noise)
        return x


def test_costs_add_up_where_blocks_are_a_linear_chain() -> None:
    """Each block's is E |F - F_without|^2, the weight being that of D; of any of them together the sum, exactly."""
    teacher = Denoiser(Chain(), shape=(1, 8, 8), num_classes=10, sigma_data=0.5).requires_grad_(False)
    found = layers.costs(teacher, DIGITS)
    x, sigma, c = layers.noisy(DIGITS, torch.device("cpu"))
    seen = x / (sigma**2 + 0.25).sqrt()[:, None, None, None] / 4  # four halves of a variance
    for i, times in enumerate((0.5, -0.3, 1.5, 0.1)):
        wanted = (times * seen[:, :, i]).square().sum((1, 2)).mean() / 64
        assert found[f"blocks.row{i}"] == pytest.approx(wanted.item(), rel=1e-4)
    whole, weight = teacher(x, sigma, c), edm_weight(sigma, 0.5)
    for left_out in (["blocks.row0", "blocks.row2"], list(found)):
        with ExitStack() as stack:
            for name in left_out:
                stack.enter_context(layers.without(teacher, name))
            error = (teacher(x, sigma, c) - whole).square().mean((1, 2, 3))
        assert (weight * error).mean().item() == pytest.approx(sum(found[name] for name in left_out), rel=1e-4)


def test_the_student_is_the_teacher_without_its_blocks(teacher: nets.Denoiser) -> None:
    names = ["middle", "decoder.8x8_1"]
    settings = PrunedUNetSettings(**SETTINGS.model_dump(exclude={"kind"}), without=names)
    student = nets.build(settings, shape=(1, 8, 8), num_classes=10, sigma_data=0.5).requires_grad_(False).eval()
    keep_blocks(teacher, student)
    x, sigma, c = layers.noisy(DIGITS, torch.device("cpu"))
    with layers.without(teacher, names[0]), layers.without(teacher, names[1]):
        torch.testing.assert_close(student(x, sigma, c), teacher(x, sigma, c))
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters())
    assert student.taps == teacher.taps and copy.deepcopy(student).settings == settings


def test_a_target_of_parameters_is_met_at_the_least_cost(teacher: nets.Denoiser) -> None:
    chosen, tried = search.prune(StudentSettings(parameters=0.7, prune="layers"), teacher, DIGITS)
    assert isinstance(chosen.network, PrunedUNetSettings) and 0.4 < chosen.parameters <= 0.7 and len(tried) == 1
    blocks = {b.name: b for b in layers.by_parameters(teacher, DIGITS)}
    saved = sum(blocks[name].saved for name in chosen.network.without)
    assert chosen.parameters == pytest.approx(1 - saved)
    with pytest.raises(UserError, match="without any of its blocks"):
        search.prune(StudentSettings(parameters=0.01, prune="layers"), teacher, DIGITS)


def test_a_target_of_latency_is_drawn_in_until_what_is_measured_meets_it(
    teacher: nets.Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = layers.removable(teacher)
    monkeypatch.setattr(layers, "times", lambda net: {"": 1.0} | dict.fromkeys(names, 0.9))  # a tenth for every block
    measured = {3: 0.76, 4: 0.66}  # by blocks left out: a little more than what adds up
    monkeypatch.setattr(search, "latency", lambda found, net: measured[len(found.network.without)])
    chosen, tried = search.prune(StudentSettings(latency=0.71, prune="layers"), teacher, DIGITS)
    assert [one["latency"] for one in tried] == [0.76, 0.66] and chosen.latency == 0.66
    monkeypatch.setattr(search, "latency", lambda found, net: 0.9)  # times that do not add up are not said to
    with pytest.raises(UserError, match=r"the fastest took 0\.90 of the teacher's time, and 0\.71 was"):
        search.prune(StudentSettings(latency=0.71, prune="layers"), teacher, DIGITS)


def test_a_target_goes_with_it() -> None:
    for keys in ({}, {"parameters": 0.5, "init": "random"}):
        with pytest.raises(ValueError, match="`prune`"):
            StudentSettings(prune="layers", **keys)  # type: ignore[arg-type]
    settings = PrunedUNetSettings(without=["encoder.9x9_0"])
    with pytest.raises(ValueError, match="no block"):
        nets.build(settings, shape=(1, 8, 8), num_classes=10, sigma_data=0.5)
