"""ECT, TCM and sCM on Gaussians, whose consistency function is known, and on small networks."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from msdcli import nets
from msdcli.diffusion.denoiser import Denoiser, per_image, pseudo_huber, truncated_lognormal
from msdcli.diffusion.draws import Draws, Source
from msdcli.diffusion.paths import consistency_tangent, derivative_along, layers_draws
from msdcli.engine.train.loop import SkippingRAdam, optimizers
from msdcli.errors import UserError
from msdcli.objectives import objective_class
from msdcli.objectives.consistency.ect import EasyConsistencyTuning
from msdcli.objectives.consistency.scd import ContinuousConsistencyDistillation
from msdcli.objectives.consistency.tcm import TruncatedConsistency, inverse_of_t
from msdcli.recipe import Recipe, load_any
from msdcli.recipe.networks import MLPSettings, UNetSettings
from msdcli.recipe.stages import CdSettings, EctSettings, ScdSettings, TcmSettings
from tests.gaussians import GaussianDenoiser
from tests.objectives.test_adm import REAL, VAR, Cloud
from tests.objectives.test_cd import Consistency

DOUBLE = torch.float64
SQUARES = 30.0  # a Huber constant under which the distance is a square: e^2 / 2c


SOURCE = Source(Cloud(), [0])


def draws_of(batch: int = 512, step: int = 0, part: tuple[int, int] = (0, 1)) -> Draws:
    return Draws(SOURCE, batch, ("test", step), 0, part)


def at(objective: EasyConsistencyTuning, sigma: float) -> EasyConsistencyTuning:
    """Let all images have one noise level."""
    objective.draw_sigma = lambda u: torch.full_like(u, sigma, dtype=DOUBLE)  # type: ignore[method-assign]
    return objective


def test_the_published_steps() -> None:
    """r for the ratio .5 of the first round of ECT's code: 0 for small sigma, then a half of it."""
    objective = EasyConsistencyTuning(EctSettings(), Consistency(REAL, VAR), GaussianDenoiser(REAL, VAR))
    r = objective.lower(torch.tensor([0.01, 0.1, 1.0, 5.0, 20.0], dtype=DOUBLE))
    torch.testing.assert_close(r, torch.tensor([0.0, 0.0, 0.0, 2.3661, 10.0], dtype=DOUBLE), rtol=0, atol=1e-4)


def test_the_schedule_depends_on_the_step_alone() -> None:
    settings = EctSettings(steps=16, rounds=4, ratio_limit=0.9)
    assert [settings.decay(step) for step in (0, 3, 4, 8, 15)] == pytest.approx([0.5, 0.5, 0.25, 0.125, 0.1])
    gone_on = EasyConsistencyTuning(settings, Consistency(REAL, VAR), GaussianDenoiser(REAL, VAR))
    for step in range(9):
        list(gone_on.turns(step))
    resumed = EasyConsistencyTuning(settings, Consistency(REAL, VAR), GaussianDenoiser(REAL, VAR))
    list(resumed.turns(8))
    assert torch.equal(gone_on.loss(draws_of(step=8)), resumed.loss(draws_of(step=8)))


def test_the_consistency_function_has_the_solvers_loss_on_the_teachers_path() -> None:
    """One Euler step is wrong by O((sigma - r)^2), its square by the fourth power."""
    teacher, losses = GaussianDenoiser(REAL, VAR), []
    for k in (3, 4, 5):
        settings = EctSettings(rounds=1, first_round=k, huber_c=SQUARES, weight="c_out", ratio_limit=1.0)
        objective = at(EasyConsistencyTuning(settings, Consistency(REAL, VAR), teacher), 5.0)
        losses.append(objective.loss(draws_of()).mean().item())
    assert [a / b for a, b in itertools.pairwise(losses)] == pytest.approx([16, 16], rel=0.15)


class Nodes:
    """Gauss-Hermite nodes over images and noise in the place of draws: means over them are exact for polynomials."""

    def __init__(self) -> None:
        nodes, weights = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(6))
        self.y = (REAL[0].double() + VAR[0].double().sqrt() * nodes).repeat_interleave(6)[:, None]
        self.n, self.weights = nodes.repeat(6)[:, None], torch.outer(weights, weights).flatten() / (2 * math.pi)

    def real(self) -> tuple[Tensor, Tensor]:
        return self.y, torch.zeros(36, dtype=torch.int64)

    def normal(self, purpose: str) -> Tensor:
        return self.n

    def uniform(self, purpose: str) -> Tensor:
        return torch.zeros(36, dtype=DOUBLE)


def test_the_datas_path_pulls_at_the_consistency_function_by_the_step() -> None:
    """E grad = O(sigma - r): the data's path is the teacher's on average, to first order."""
    pulls, nodes = [], Nodes()
    for k in (5, 6, 7):
        student = Consistency(REAL[:1], VAR[:1])
        settings = EctSettings(rounds=1, first_round=k, path="data", huber_c=SQUARES, ratio_limit=1.0)
        objective = at(EasyConsistencyTuning(settings, student, GaussianDenoiser(REAL[:1], VAR[:1])), 5.0)
        (objective.loss(nodes) * nodes.weights).sum().backward()  # type: ignore[arg-type]
        pulls.append(student.log_variance.grad)
    assert pulls[0].abs() > 0
    assert [float(a / b) for a, b in itertools.pairwise(pulls)] == pytest.approx([2, 2], rel=0.1)


def test_where_no_noise_is_left_the_target_is_the_image() -> None:
    student = GaussianDenoiser(REAL, VAR)
    objective = at(EasyConsistencyTuning(EctSettings(path="data", q=2), student, GaussianDenoiser(REAL, VAR)), 0.5)
    draws = draws_of(64)
    y, c = draws.real()
    x = y + 0.5 * draws.normal("noise")
    expected = (student(x, torch.full((64,), 0.5), c) - y).norm(dim=1) / 0.5
    torch.testing.assert_close(objective.loss(draws), expected)
    student.mean.data += 100.0  # a student that answers nothing sensible at 0
    assert objective.loss(draws).isfinite().all()


def test_the_norm_has_a_gradient_where_both_ends_agree() -> None:
    error = torch.zeros(2, 3, requires_grad=True)
    pseudo_huber(error, 0.0).sum().backward()
    assert error.grad is not None and (error.grad == 0).all()


@pytest.mark.parametrize("name", ["ect", "tcm", "scd"])
def test_training_finds_the_consistency_function_whatever_the_slices(name: str) -> None:
    teacher, student = GaussianDenoiser(REAL, VAR), Consistency(torch.zeros(2), torch.tensor([1.0, 0.1]))
    settings: Any = {
        "ect": EctSettings(steps=150, sigma_init=10.0, rounds=4),
        "tcm": TcmSettings(steps=150, sigma_init=10.0, first_round=4),
        "scd": ScdSettings(steps=150, sigma_init=10.0, tangent_warmup=50),
    }[name]
    objective: Any = objective_class(name)(settings, student, teacher)
    if name == "tcm":
        objective.first = Consistency(REAL, VAR)
    whole = objective.loss(draws_of(64))
    parts = torch.cat([objective.loss(draws_of(64, part=(i, 4))) for i in range(4)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    for step in range(150):
        for _, loss in objective.turns(step):
            loss(draws_of(128, step)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(student.mean.detach(), REAL.double(), atol=0.1, rtol=0)
    torch.testing.assert_close(student.log_variance.detach().exp(), VAR.double(), atol=0.1, rtol=0)


def test_noise_levels_of_a_cut_normal_distribution() -> None:
    u = torch.linspace(0.01, 0.99, 99, dtype=DOUBLE)
    low, high = ((math.log(s) + 1.1) / 2 for s in (0.002, 10.0))
    expected = np.exp(stats.truncnorm.ppf(u.numpy(), low, high, loc=-1.1, scale=2.0))
    torch.testing.assert_close(truncated_lognormal(u, -1.1, 2.0, (0.002, 10.0)), torch.tensor(expected))
    ends = truncated_lognormal(torch.tensor([0.0, 1 - 2**-24]), -1.1, 2.0, (0.002, 10.0))
    torch.testing.assert_close(ends, torch.tensor([0.002, 10.0]))


def test_above_the_boundary_levels_are_students() -> None:
    """Against scipy's own Student's t, where that is exact, and in the published heavy tail."""
    for scale, df, low, high in ((0.2, 3.0, -0.1, 1.0), (0.2, 0.01, 0.0, math.log(80))):
        ends = stats.t.cdf([low, high], df, 0.0, scale)
        table = inverse_of_t(0.0, scale, df, low, high)
        at = stats.t.cdf(table[:: len(table) // 8].numpy(), df, 0.0, scale)
        np.testing.assert_allclose((at - ends[0]) / (ends[1] - ends[0]), np.linspace(0, 1, 9), atol=2e-4)


def test_a_truncated_model_asks_the_frozen_one_below_the_boundary() -> None:
    class Said(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value, self.asked = nn.Parameter(torch.tensor(value, dtype=DOUBLE)), torch.tensor([])

        def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
            self.asked = sigma
            return self.value.expand_as(x)

    student = Said(1.0)
    objective = TruncatedConsistency(TcmSettings(sigma_init=10.0, rounds=1), student, GaussianDenoiser(REAL, VAR))
    assert objective.frozen == ("first",)
    objective.first = Said(2.0)  # type: ignore[assignment]
    r = torch.tensor([0.0, 0.5, 1.0, 3.0])
    x = torch.zeros(4, 2, dtype=DOUBLE)
    assert objective.target(x, r, torch.zeros(4)).mean(1).tolist() == [0.0, 2.0, 1.0, 1.0]
    assert (student.asked >= 1).all(), "the student is asked for nothing below the boundary"
    u = torch.rand(4096, generator=torch.Generator().manual_seed(0))
    sigma = objective.draw_sigma(u)
    assert ((sigma == 1.0) == (u < 0.25)).all() and sigma.max() <= 10 and sigma.min() == 1.0
    whole = EasyConsistencyTuning.loss(objective, draws_of(4096))
    given, there = objective.loss(draws_of(4096)), objective.sigma == 1.0
    torch.testing.assert_close(given[there], whole[there] * 0.4)  # a quarter of the images, weight .1
    torch.testing.assert_close(given[~there], whole[~there] / 0.75)


class Smooth(nn.Module):
    """Some network: F of TrigFlow's own variables, and the D that it stands for."""

    sigma_data = 0.5

    def raw(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(2 * x + per_image(t, x)) + x.flip(1) * torch.cos(per_image(t, x))

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        t = torch.atan(sigma / self.sigma_data)
        cos, sin = per_image(t.cos(), x), per_image(t.sin(), x)
        return cos * (cos * x) - sin * self.sigma_data * self.raw(cos * x, t)


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_the_tangent_is_trigflows(w: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, D_ode = (torch.randn(6, 2, generator=generator, dtype=DOUBLE) for _ in range(2))
    sigma, net, sd = torch.tensor([0.01, 0.1, 0.5, 1.0, 5.0, 40.0], dtype=DOUBLE), Smooth(), 0.5
    t = torch.atan(sigma / sd)
    cos, sin = per_image(t.cos(), x), per_image(t.sin(), x)
    slope = (cos * (cos * x) - D_ode) / sin  # dx'/dt of the path, for D = cos x' - sin dx'/dt
    F, dF = torch.func.jvp(net.raw, (cos * x, t), (slope, torch.ones_like(t)))
    published = -(cos**2) * (sd * F - slope) - w * cos * sin * (cos * x + sd * dF)
    dD = derivative_along(net, x, sigma, None, D_ode, how="forward")
    torch.testing.assert_close(
        consistency_tangent(net(x, sigma), D_ode, dD, sigma, sd, w), published, rtol=1e-12, atol=1e-12
    )


def test_the_consistency_function_does_not_change_along_the_path() -> None:
    teacher, f = GaussianDenoiser(REAL, VAR), Consistency(REAL, VAR)
    x, sigma = torch.randn(64, 2, dtype=DOUBLE), torch.linspace(-3, 3, 64, dtype=DOUBLE).exp()
    x, D_ode = x * per_image(sigma, x), teacher(x * per_image(sigma, x), sigma)
    assert derivative_along(f, x, sigma, None, D_ode, how="forward").abs().max() < 1e-13
    assert derivative_along(f, x, sigma, None, D_ode, how="central").abs().max() < 1e-5
    assert derivative_along(teacher, x, sigma, None, D_ode, how="forward").abs().max() > 1e-2


def test_scd_has_no_loss_at_the_consistency_function_and_pulls_towards_it() -> None:
    student = Consistency(REAL, VAR)
    settings = ScdSettings(sigma_init=10.0, tangent_warmup=0)
    objective = ContinuousConsistencyDistillation(settings, student, GaussianDenoiser(REAL, VAR))
    draws = draws_of(256)
    exact = objective.loss(draws)
    g = consistency_tangent(
        torch.ones(1, 2), torch.zeros(1, 2), torch.full((1, 2), 2.0), torch.ones(1), sigma_data=0.5, w=1.0
    )
    torch.testing.assert_close(g, torch.full((1, 2), 2.0 * 1.25**0.5))
    student.log_variance.data += 0.2
    away = objective.loss(draws)
    assert away.mean() > exact.mean() + 0.1
    away.mean().backward()
    assert student.log_variance.grad is not None and (student.log_variance.grad > 0).all(), "the variance is too large"


def network(kind: str, dropout: float = 0.0) -> Denoiser:
    """A small network whose every weight matters."""
    torch.manual_seed(0)
    shape = (2,) if kind == "mlp" else (1, 8, 8)
    settings: Any = (
        MLPSettings(channels=16, blocks=2)
        if kind == "mlp"
        else UNetSettings(channels=8, multipliers=[1, 2], blocks=1, embedding=16, attention=[4], dropout=dropout)
    )
    net = nets.build(settings, shape=shape, num_classes=2, sigma_data=0.5)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_(0, 0.05)
    return net


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_both_derivatives_agree_also_with_attention_and_dropout(kind: str) -> None:
    net = network(kind, dropout=0.3).train()
    x, c = torch.randn(3, *net.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 0])
    found = []
    for how, step in (("forward", 1e-3), ("central", 1e-2)):
        torch.manual_seed(5)
        found.append(derivative_along(net, x, torch.tensor([0.2, 1.0, 5.0]), c, 0.3 * x, how=how, step=step))  # type: ignore[arg-type]
    assert (found[0] - found[1]).norm() < 5e-3 * found[0].norm()
    net.compute_in(torch.bfloat16)
    torch.manual_seed(5)
    again = derivative_along(net, x, torch.tensor([0.2, 1.0, 5.0]), c, 0.3 * x, how="forward")
    assert torch.equal(again, found[0]), "the derivative is float32 whatever the network computes in"
    assert net.net.compute == torch.bfloat16


def test_a_network_without_a_forward_mode_is_told_of_central_differences() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0] * 2

    class Net(nn.Module):
        def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
            return Opaque.apply(x)  # type: ignore[no-any-return,no-untyped-call]

    x = torch.ones(1, 2, requires_grad=True)
    with pytest.raises(UserError, match="no forward-mode derivative") as refused:
        derivative_along(Net(), x, torch.ones(1), None, 0 * x, how="forward")
    assert refused.value.hint == "derivative: central"


class Masks(nn.Module):
    """A network that remembers which dropout masks it drew."""

    sigma_data, anchor = 0.5, 0.0

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.drawn = nn.Parameter(torch.tensor(0.3, dtype=DOUBLE)), list[Tensor]()

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        self.drawn.append(mask := torch.nn.functional.dropout(torch.ones_like(x)))
        return self.weight * mask * x


@pytest.mark.parametrize(
    "settings",
    [EctSettings(), ScdSettings(), ScdSettings(derivative="central"), CdSettings()],
    ids=["ect", "forward", "central", "cd"],
)
def test_all_evaluations_of_a_loss_have_one_dropout_mask(settings: Any) -> None:
    student = Masks()
    objective: Any = objective_class(settings.objective)(settings, student, GaussianDenoiser(REAL, VAR))
    for _ in range(2):
        objective.loss(draws_of(16))
    half = len(student.drawn) // 2
    assert half >= 2
    for masks in (student.drawn[:half], student.drawn[half:]):
        assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert not torch.equal(student.drawn[0], student.drawn[half]), "the next loss has another"


def test_layers_draw_again() -> None:
    repeat = layers_draws(torch.zeros(1))
    first = torch.rand(3)
    repeat()
    assert torch.equal(torch.rand(3), first)


def test_radam_is_torchs_and_takes_no_step_that_is_not_finite() -> None:
    nets = [nn.Linear(3, 2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours: Any = optimizers({"student": nets[0]}, EctSettings(lr=0.1))["student"]
    assert isinstance(ours, SkippingRAdam)
    theirs = torch.optim.RAdam(nets[1].parameters(), 0.1)
    for group in ours.param_groups:
        group["lr"] = 0.1
    for step in range(8):
        for net, optimizer in zip(nets, (ours, theirs), strict=True):
            net(torch.arange(3.0) + step).square().sum().backward()
            optimizer.found_inf = torch.tensor(0.0)
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(nets[0].weight, nets[1].weight)
    before = copy.deepcopy(nets[0].state_dict())
    nets[0](torch.full((3,), math.inf)).sum().backward()
    ours.found_inf = torch.tensor(1.0)
    ours.step()
    assert all(torch.equal(value, before[name]) for name, value in nets[0].state_dict().items())


BASE = {"data": {"name": "toy2d"}, "name": "x", "teacher": {"network": {"kind": "mlp"}}}


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"objective": "tcm"}], "put cd, ect or scd before it"),
        ([{"objective": "cd", "anchor": 0.002}, {"objective": "tcm"}], "no `anchor`"),
        ([{"objective": "ect"}, {"objective": "tcm", "sigmas": [80.0, 0.8]}], "above `boundary` 1.0"),
        ([{"objective": "ect", "rounds": 40, "ratio_limit": 1.0}], "fewer `rounds`"),
        ([{"objective": "ect", "optimizer": "sgd"}], "optimizer"),
    ],
)
def test_stages_that_cannot_be_are_refused(stages: list[Any], said: str) -> None:
    with pytest.raises((UserError, ValueError), match=said):
        load_any(BASE | {"stages": stages}, {})


def test_sharded_training_has_no_forward_mode() -> None:
    stages = [{"objective": "scd"}]
    with pytest.raises((UserError, ValueError), match="derivative: central"):
        load_any(BASE | {"stages": stages, "fsdp": True}, {})
    recipe: Recipe = load_any(BASE | {"stages": [{"objective": "scd", "derivative": "central"}], "fsdp": True}, {})
    assert recipe.fsdp
