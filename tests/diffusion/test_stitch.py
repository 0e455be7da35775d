"""T-Stitch: the small network above a noise level, the teacher below, each on its own images and nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from msdcli import nets
from msdcli.data.toy2d import Toy2d
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.guidance import Guided
from msdcli.diffusion.sampler import evaluated_levels, solve
from msdcli.diffusion.stitch import TEACHER, Stitch, small_under_guidance
from msdcli.engine import estimate, pipeline
from msdcli.engine.checkpoints.model import load_model, save_model
from msdcli.engine.inputs import stitches
from msdcli.engine.inputs import teacher as teachers
from msdcli.engine.inputs.pairs import Pairs, sample_teacher
from msdcli.engine.plan import plan
from msdcli.engine.tracking.events import silent
from msdcli.errors import UserError
from msdcli.partition import consecutive
from msdcli.recipe import load
from msdcli.recipe.data import Toy2dSettings
from msdcli.recipe.networks import MLPSettings
from msdcli.recipe.solver import SolverSettings
from msdcli.rundir import RunDir
from tests.conftest import TINY
from tests.gaussians import GaussianDenoiser
from tests.nets.edm.edm_format import shake

SOLVER = SolverSettings(name="deis", steps=8)
Z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
C = torch.tensor([0, 1, 2, 3, 1])


class Counted(Denoiser):
    """A Gaussian's denoiser that says how many images it was asked for, at which noise level."""

    def __init__(self, mean: float) -> None:
        super().__init__(torch.nn.Linear(1, 1), shape=(2,), num_classes=4)
        self.exact, self.calls = GaussianDenoiser(torch.tensor([mean]), torch.tensor([0.25])), list[tuple[float, int]]()

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        assert condition is not None
        self.calls.append((sigma[0].item(), len(x)))
        return self.exact(x, sigma) + 0.1 * condition[:, None] / (1 + sigma[:, None])


def by_hand(nets: dict[float, Denoiser], z: Tensor, c: Tensor, name: str = "deis", steps: int = 8) -> Tensor:
    """Sample from networks by the least noise level that each is for."""

    def denoise(x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
        floor = max(low for low in nets if sigma[0].item() > low)
        return nets[floor](x, sigma, condition)

    return solve(denoise, z, c, name=name, steps=steps)


@pytest.mark.parametrize("name", ["deis", "heun", "dpm_solver_3"])
def test_the_small_network_is_asked_above_and_the_teacher_below(name: str) -> None:
    big, small = Counted(0.3), Counted(-0.1)
    found = sample_teacher(big, Z, C, SolverSettings(name=name, steps=8), batch=5, stitch=Stitch([small], 2.0))
    levels = evaluated_levels(name=name, steps=8)
    assert len(small.calls) == sum(level > 2 for level in levels) and min(s for s, _ in small.calls) > 2
    assert len(big.calls) == sum(level <= 2 for level in levels) and max(s for s, _ in big.calls) <= 2
    assert torch.equal(found, by_hand({2.0: Counted(-0.1), 0.0: Counted(0.3)}, Z, C, name))


def test_students_are_each_asked_for_their_own_classes_and_the_teacher_for_the_rest() -> None:
    big, small = Counted(0.3), [Counted(-0.1), Counted(0.7)]
    stitch = Stitch(small, 2.0, [0, 1, TEACHER, 1])
    found = sample_teacher(big, Z, C, SOLVER, batch=5, stitch=stitch)
    high = sum(level > 2 for level in evaluated_levels(**SOLVER.record()))
    assert [n for _, n in small[0].calls] == [1] * high and [n for _, n in small[1].calls] == [3] * high
    assert [n for _, n in big.calls] == [1] * high + [5] * (8 - high)
    for i, mine in enumerate((-0.1, 0.7, 0.3, 0.7, 0.7)):
        alone = by_hand({2.0: Counted(mine), 0.0: Counted(0.3)}, Z[i : i + 1], C[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-6, atol=1e-6)
    in_parts = sample_teacher(big, Z, C, SOLVER, batch=2, stitch=stitch)
    torch.testing.assert_close(in_parts, found, rtol=1e-6, atol=1e-6)


def test_a_range_of_scales_is_each_images_own_also_when_some_are_the_teachers() -> None:
    u = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])
    guided = Guided(Counted(0.3), scale=[1.0, 4.0], interval=[0.0, 1e4])
    stitch = Stitch([Counted(-0.1)], 2.0, [0, TEACHER, TEACHER, TEACHER])
    found = sample_teacher(guided, Z, C, SOLVER, batch=5, u=u, stitch=stitch)
    for i in range(1, 5):
        alone = Guided(Counted(0.3), scale=guided.scales(u[i]).item(), interval=[0.0, 1e4])
        wanted = sample_teacher(alone, Z[i : i + 1], C[i : i + 1], SOLVER, batch=1)
        torch.testing.assert_close(found[i : i + 1], wanted, rtol=1e-5, atol=1e-5)


def test_a_smaller_teacher_is_guided_as_the_teacher_is() -> None:
    small = small_under_guidance(Counted(-0.1), Guided(Counted(0.3), scale=2.0, interval=[0.5, 30.0]))
    assert isinstance(small, Guided) and (small.scale, small.interval) == (2.0, (0.5, 30.0))


def small_run(folder: Path) -> RunDir:
    """A run directory whose two students have finished their first stage."""
    stages = "stages=[{objective: tsm, steps: 2, batch: 8}, {objective: dm, steps: 2, batch: 8, fake_updates: 1}]"
    run = RunDir(folder)
    run.adopt(load(folder.parent.parent / "tiny.yaml", [f"run={folder}", stages]))
    consecutive(8, 2).save(run.partition)
    for k in range(2):
        save_model(run.stage(k, 0, "tsm"), network(8, seed=k), {"steps": 2})
    save_model(run.teacher, network(16, seed=9), {"steps": 2})
    return run


def network(channels: int, *, seed: int) -> Denoiser:
    net = nets.build(MLPSettings(channels=channels, blocks=1), shape=(2,), num_classes=8, sigma_data=0.5)
    return shake(net, 0.1, seed).eval()


def test_a_runs_students_are_stitched_to_its_teacher(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    run = small_run(tmp_path / "runs/small")
    texts = [f"{{path: {run.root}, {rest}}}" for rest in ("above: 1.0", "part: 0, above: 1.0", "above: 3.0")]
    recipes = [
        load(tmp_path / "tiny.yaml", [f"run={run.root}", *more])
        for more in ([], *([f"teacher.stitch={text}"] for text in texts))
    ]
    loaded = [teachers.load(run, recipe) for recipe in recipes]
    assert len({sha256 for _, sha256 in loaded}) == 4
    data = Toy2d(Toy2dSettings(points=800))
    sources = [Pairs(run, r, data, h) for r, (_, h) in zip(recipes, loaded, strict=True)]
    assert len({source.folder for source in sources}) == 4, "other pairs"
    z, y, c = sources[1].provide(loaded[1][0], silent)
    small = [load_model(run.stage(k, 0, "tsm"))[0] for k in range(2)]
    for i in (0, 5, 40):
        nets_ = {1.0: small[int(c[i] >= 4)], 0.0: loaded[0][0]}
        alone = by_hand(nets_, z[i : i + 1], c[i : i + 1], "heun", steps=4)
        torch.testing.assert_close(y[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    plain = sources[0].provide(loaded[0][0], silent)[1]
    assert (plain - y).abs().max() > 1e-3

    big, _ = pipeline.networks_on_meta(recipes[0], data)
    costs = [estimate.sampling_flops(r.teacher.solver, big, stitches.on_meta(r, big)) for r in recipes]
    one, less = costs[0] / 7, estimate.forward_flops(small[0])
    assert costs[1:3] == pytest.approx([4 * one + 3 * less, 4 * one + 3 * (0.5 * less + 0.5 * one)])
    planned = plan(load(tmp_path / "tiny.yaml", [f"teacher.stitch={texts[0]}"]))
    assert planned.cost.pairs_flops == pytest.approx(64 * costs[1])
    assert any("7 evaluations, 3 of them (above 1) by small networks" in line for line in planned.lines())
    other = "teacher.seed=0"
    assert teachers.teacher_key(recipes[1], data) == teachers.teacher_key(load(tmp_path / "tiny.yaml", [other]), data)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path: {}/runs/dm, above: 1", "began with dm"),
        ("path: {}/runs/small, part: 2, above: 1", "has no student 2"),
        ("path: {}/runs/small, part: 1, above: 1", "1/0-tsm: that stage is not finished"),
        ("path: {}/runs/small/teacher, part: 0, above: 1", "is no run directory"),
        ("path: {}/runs/none, above: 1", "no model at"),
        ("path: {}/runs/small/teacher, above: 1", "makes other images or classes than the teacher"),
    ],
)
def test_what_cannot_be_stitched_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    run = small_run(tmp_path / "runs/small")
    (run.stage(1, 0, "tsm") / "model.json").unlink()
    RunDir(tmp_path / "runs/dm").adopt(load(tmp_path / "tiny.yaml", [f"run={tmp_path}/runs/dm"]))
    recipe = load(tmp_path / "tiny.yaml", [f"teacher.stitch={{{text.format(tmp_path)}}}"])
    with pytest.raises(UserError, match=said):
        stitches.on_meta(recipe, Counted(0.3))
