"""The manual's table of solvers on the digits teacher, printed by `pytest -m slow -s` of this file.

Error is the root mean square distance of a sample's pixels to the ODE's solution, over 128 images and of the median
image: a few images near a parting of ways (this digit or that one) decide the former.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msdcli.engine.inputs import dataset, teacher
from msdcli.engine.inputs.pairs import labels_for, sample_teacher
from msdcli.engine.tracking.events import silent
from msdcli.noise import image_noise
from msdcli.recipe import load
from msdcli.recipe.solver import SolverSettings
from msdcli.rundir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

IMAGES = 128
STEPS = {"heun": (6, 9, 12, 18), "dpm_solver_2": (6, 9, 12, 18), "dpm_solver_3": (4, 6, 8, 12)}
ROWS = [
    *(("ddim", None), ("heun", None), ("dpm_solver_2", None), ("dpm_solver_3", None), ("dpmpp_2m", None)),
    *(("dpmpp_3m", None), ("deis", 2), ("deis", 3), ("unipc", 2), ("unipc", 3)),
]


def test_deis_needs_half_of_heuns_evaluations(tmp_path: Path) -> None:
    recipe = load("digits", [f"run={tmp_path}/runs/digits"])
    run = RunDir(recipe.run_dir)
    data = dataset.provide(run, recipe, silent)
    torch.set_num_threads(1)
    net, _ = teacher.provide(run, recipe, data, torch.device("cpu"), silent)
    z, c = image_noise(0, range(IMAGES), data.shape), labels_for(data, range(IMAGES))

    def sample(**keys: object) -> tuple[Tensor, SolverSettings, float]:
        solver, begun = SolverSettings.model_validate(keys), time.perf_counter()
        return sample_teacher(net, z, c, solver, batch=IMAGES), solver, time.perf_counter() - begun

    def error(found: Tensor) -> tuple[float, float]:
        each = (found - truth).square().flatten(1).mean(1)
        return each.mean().sqrt().item(), each.median().sqrt().item()

    truth = sample(name="unipc", steps=120)[0]
    assert error(sample(name="heun", steps=70)[0])[0] < 2e-3, "the reference is converged"
    mean, median = dict[tuple[str, int | None, int], float](), dict[tuple[str, int | None, int], float]()
    for name, order in ROWS:
        for steps in STEPS.get(name, (8, 12, 18, 24, 35)):
            found, solver, seconds = sample(name=name, steps=steps, order=order)
            key = name, order, solver.evaluations
            mean[key], median[key] = error(found)
            print(f"{name} {order or ''} {key[2]} evaluations: {mean[key]:.4f} {median[key]:.4f} {seconds:.2f} s")
    assert mean["deis", 3, 18] < mean["heun", None, 35] and median["deis", 3, 12] < median["heun", None, 35]
    assert mean["deis", 3, 18] < mean["dpmpp_2m", None, 18] / 2
    assert mean["unipc", 3, 35] < mean["heun", None, 35] / 5
