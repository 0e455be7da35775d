"""A student of several noise levels: the same samples whatever it is asked with, and DMD2's backward simulation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import Denoiser, few_step, one_step
from msdcli.diffusion.draws import Draws, Source
from msdcli.diffusion.generator import Generator, levels_of
from msdcli.engine.train.counting import MetaDraws
from msdcli.errors import UserError
from msdcli.noise import image_noise, noises, step_noise
from msdcli.objectives.dm import DistributionMatching
from msdcli.recipe.stages import AdmSettings, CdSettings, DmSettings
from tests.gaussians import GaussianDenoiser

LEVELS = (2.5, 0.8, 0.3)


class Net(nn.Module):
    """A small raw network of points and two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor, c_noise: Tensor, c: Tensor) -> Tensor:
        out: Tensor = self.lines(torch.cat([x, c_noise[:, None], nn.functional.one_hot(c, 2)], dim=1))
        return out


def network() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(Net(), shape=(2,), num_classes=2)


class Points:
    """Sixteen points of two classes."""

    shape = (2,)
    class_names = ("a", "b")

    def __len__(self) -> int:
        return 16

    def images(self, numbers: list[int]) -> Tensor:
        return torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(i)) for i in numbers])

    def labels(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers) % 2


def draws(step: int = 0, turn: int = 0, part: tuple[int, int] = (0, 1), batch: int = 8) -> Draws:
    return Draws(Source(Points(), [0, 1]), batch, (7, 0, 1, step), turn, part)  # type: ignore[arg-type]


def test_one_level_is_the_one_step_generator_bit_for_bit() -> None:
    net, z, c = network(), torch.randn(5, 2), torch.tensor([0, 1, 0, 1, 1])
    assert torch.equal(Generator(net, (2.5,))(z, c), one_step(net, z, 2.5, c))
    with pytest.raises(AssertionError, match="noise"):
        few_step(net, z, LEVELS, c)


def test_moments_of_an_exact_gaussian_denoiser_follow_the_recursion() -> None:
    """v_k = a^2 (v_{k-1} + sigma_k^2), a = v / (v + sigma_k^2); the mean shrinks towards the data's by a."""
    mean, variance, count = 0.3, 0.25, 400_000
    net = GaussianDenoiser(torch.tensor([mean]), torch.tensor([variance]))
    torch.manual_seed(0)
    y = few_step(net, torch.randn(count, 1), LEVELS, None, torch.randn(count, len(LEVELS) - 1, 1))
    m, v = 0.0, 0.0
    for level in LEVELS:
        a = variance / (variance + level**2)
        m, v = mean + a * (m - mean), a**2 * (v + level**2)
    assert y.mean().item() == pytest.approx(m, abs=4 * (v / count) ** 0.5)
    assert y.var().item() == pytest.approx(v, rel=8 / count**0.5)


def test_noise_of_an_image_and_step_depends_on_nothing_else() -> None:
    several = step_noise(3, [4, 9, 2], (2, 3), 3)
    assert several is not None and several.shape == (3, 2, 2, 3)
    alone = step_noise(3, [9], (2, 3), 2)
    assert alone is not None and torch.equal(several[1, 0], alone[0, 0])
    assert step_noise(3, [9], (2, 3), 1) is None
    assert not torch.equal(several[0, 0], several[0, 1])
    assert not torch.equal(several[0, 0], image_noise(3, [4], (2, 3))[0])
    batches = [([4, 9], 3), ([2], 3)]
    for ahead in (False, True):
        drawn = list(noises(3, batches, (2, 3), ahead=ahead))
        assert torch.equal(torch.cat([between for _, between in drawn if between is not None]), several)


def test_fewer_levels_are_the_prefix() -> None:
    net, z, c = network(), torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    noise = torch.randn(4, 2, 2)
    first = Generator(net, LEVELS).first(2)
    assert torch.equal(first(z, c, noise), few_step(net, z, LEVELS[:2], c, noise))
    with pytest.raises(UserError, match="steps 4: these students have 3"):
        Generator(net, LEVELS).first(4)


def test_the_input_of_a_step_in_training_is_the_prefix_of_sampling() -> None:
    settings = DmSettings(sigmas=list(LEVELS), pairs="none")
    student = network()
    objective = DistributionMatching(settings, student, copy.deepcopy(student))
    seen: list[Tensor] = []
    student.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for step in range(3):
        seen.clear()
        own = draws(step)
        last = own.one_of("exit", 3)
        y, c = objective.generate(own)
        training = list(seen)
        assert len(training) == last + 1
        noise = torch.stack([own.normal(f"step {k}") for k in range(1, last + 1)] or [torch.zeros(8, 2)], dim=1)
        seen.clear()
        sampled = few_step(student, own.normal("z"), LEVELS[: last + 1], c, noise)
        assert all(torch.equal(a, b) for a, b in zip(training, seen, strict=True))
        assert torch.equal(y, sampled)
        y.sum().backward()  # only the exit has a gradient
        assert (y.grad_fn is not None) and not training[-1].requires_grad


def test_the_exit_is_one_for_all_slices_and_every_level_comes_once_in_a_cycle() -> None:
    for turn in range(4):
        exits = [draws(step, turn).one_of("exit", 3) for step in range(9)]
        assert [sorted(exits[i : i + 3]) for i in (0, 3, 6)] == [[0, 1, 2]] * 3
        assert exits == [draws(step, turn, (1, 4)).one_of("exit", 3) for step in range(9)]
    orders = {tuple(draws(step, turn).one_of("exit", 3) for step in range(3)) for turn in range(30)}
    assert len(orders) == 6, "every order comes"


@pytest.mark.parametrize("how", ["simulation", "data"])
def test_gradients_are_the_same_in_one_and_four_slices(how: str) -> None:
    settings = DmSettings(sigmas=list(LEVELS), pairs="none", student_input=how)  # type: ignore[arg-type]

    def gradient(passes: int, step: int) -> Tensor:
        student = network()
        objective = DistributionMatching(settings, student, network().requires_grad_(False))
        for part in range(passes):
            loss = objective.student_loss(draws(step, 0, (part, passes)))
            (loss.mean() / passes).backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    for step in range(3):
        assert torch.allclose(gradient(1, step), gradient(4, step), rtol=1e-5, atol=1e-8)


def test_later_levels_may_start_from_data() -> None:
    settings = DmSettings(sigmas=[2.5, 0.5], pairs="none", student_input="data")
    objective = DistributionMatching(settings, network(), network())
    step = next(s for s in range(2) if draws(s).one_of("exit", 2) == 1)
    y, c = objective.generate(draws(step))
    real, classes = draws(step).real()
    assert torch.equal(c, classes)
    wanted = objective.student(real + 0.5 * draws(step).normal("z"), torch.full((8,), 0.5), c)
    assert torch.equal(y, wanted)
    assert settings.needs_images and not DmSettings(sigmas=[2.5], student_input="data").needs_images
    assert not DmSettings(sigmas=[2.5, 0.5]).needs_images and AdmSettings().needs_images


def test_levels_in_a_recipe_and_in_records_of_before() -> None:
    assert DmSettings(sigma_init=1.5).sigmas == [1.5] and DmSettings(sigmas=[3.0, 1.0]).sigma_init == 3.0
    assert CdSettings().sigmas == [80.0]
    assert "sigma_init" not in DmSettings().model_dump()
    with pytest.raises(ValueError, match="must fall"):
        DmSettings(sigmas=[0.5, 2.5])
    with pytest.raises(ValueError, match="give one of them"):
        DmSettings(sigmas=[2.5, 0.5], sigma_init=2.5)
    assert levels_of({"sigma_init": 2.5}) == levels_of({"sigmas": [2.5]}) == (2.5,)


def test_what_is_counted_is_the_mean_exit() -> None:
    from msdcli.engine.estimate import stage_cost

    with torch.device("meta"):
        student, teacher = network(), network()

    def flops(sigmas: list[float]) -> float:
        return stage_cost(DmSettings(sigmas=sigmas, pairs="none", steps=6, batch=8), student, teacher).flops

    one, three = flops([2.5]), flops(list(LEVELS))
    forward = 2 * (5 * 16 + 16 * 2) * 8
    assert three - one == pytest.approx(6 * 6 * forward)  # in each of six turns, one evaluation more on average
    assert MetaDraws((2,), 8).one_of("exit", 3) == 0


@pytest.mark.usefixtures("tmp_path")
def test_overrides_replace_the_other_spelling(tmp_path: Path) -> None:
    from msdcli.recipe import load
    from tests.conftest import TINY

    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.replace("fake_updates: 2", "fake_updates: 2, sigma_init: 1.0"))
    assert load(file, ["stages.0.sigmas=[2.0,0.5]"]).stages[0].model_dump()["sigmas"] == [2.0, 0.5]
