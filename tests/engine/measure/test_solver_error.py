"""The error of a solver, of a teacher whose ODE has a solution in closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from msdcli.data.toy2d import Toy2d
from msdcli.engine.inputs.pairs import Pairs
from msdcli.engine.measure.solver_error import solver_error
from msdcli.errors import UserError
from msdcli.recipe import load
from msdcli.recipe.data import Toy2dSettings
from msdcli.rundir import RunDir
from tests.conftest import TINY
from tests.gaussians import GaussianDenoiser

MEAN, VARIANCE = torch.tensor([0.3, -0.2]), torch.tensor([0.25, 0.04])
# x keeps its place among standard deviations, and D takes it there: the solution of sigma 80 to 0.002.
HIGH, LOW = (VARIANCE + 80.0**2).sqrt(), VARIANCE / (VARIANCE + 0.002**2).sqrt()


@pytest.mark.parametrize(("name", "steps"), [("ddim", 18), ("heun", 18), ("deis", 18), ("unipc", 120)])
def test_it_is_the_distance_to_the_solution(tmp_path: Path, name: str, steps: int) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    recipe = load(tmp_path / "tiny.yaml", [f"teacher.solver={{name: {name}, steps: {steps}}}"])
    source = Pairs(RunDir(tmp_path / "runs/x"), recipe, Toy2d(Toy2dSettings(points=80)), "0" * 64)
    teacher = GaussianDenoiser(MEAN, VARIANCE)
    numbers = range(64)
    z, c = source.noise(numbers), torch.zeros(64, dtype=torch.int64)
    exact = MEAN + LOW * (80 * z - MEAN) / HIGH
    wanted = (source.sample(teacher, z, c, source.uniform(numbers), numbers) - exact).square().mean().sqrt().item()
    assert solver_error(source, teacher, 64) == pytest.approx(wanted, abs=2e-5)
    assert (wanted > 1e-3) == (steps == 18)


def test_an_sde_has_no_such_error(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    sde = ["teacher.solver.name=ancestral", "stages.0.pairs=none", "evaluation.solver_error=8"]
    with pytest.raises(UserError, match="ancestral does not solve the ODE"):
        load(tmp_path / "tiny.yaml", sde)
