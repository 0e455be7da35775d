"""The keys of `teacher.solver`: what goes together, what is refused and how; old recipes stay what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from msdcli.data.digits import Digits
from msdcli.engine.inputs.pairs import FORMAT, Pairs
from msdcli.recipe import Recipe, load, load_any
from msdcli.recipe.changes import differences
from msdcli.recipe.data import DigitsSettings
from msdcli.recipe.solver import STOCHASTIC, SolverSettings
from msdcli.rundir import RunDir, key
from tests.conftest import TINY, Msd
from tests.test_recipe import read, refusal

OLD = {"name": "heun", "steps": 18, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
WITHOUT_PAIRS = TINY.replace("objective: dm,", "objective: dm, pairs: none,")


def solver(text: str) -> SolverSettings:
    return read(TINY, f"teacher.solver={text}").teacher.solver


def test_what_the_first_version_knew_is_keyed_as_it_was() -> None:
    """Its pairs and features are found again; the new keys are in the key where they say something."""
    assert SolverSettings().record() == OLD
    assert solver("{name: dpmpp_2m, steps: 5, rho: 3}").record() == OLD | {"name": "dpmpp_2m", "steps": 5, "rho": 3.0}
    assert (
        solver("{name: unipc}").record()
        == solver("{name: unipc, order: 3}").record()
        == OLD
        | {
            "name": "unipc",
            "order": 3,
        }
    )
    assert solver("{name: heun, sigmas: [80, 5, 0.002]}").record()["sigmas"] == [80, 5, 0.002]
    churn = read(WITHOUT_PAIRS, "teacher.solver={name: edm_churn}").teacher.solver.record()
    assert churn.keys() - OLD.keys() == {"churn", "churn_min", "churn_max", "churn_noise"}


def test_pairs_of_an_old_recipe_are_where_they_were(tmp_path: Path) -> None:
    from msdcli.data.base import fingerprint

    (tmp_path / "r.yaml").write_text(TINY.replace("name: toy2d, points: 800", "name: digits"))
    recipe, data = load(tmp_path / "r.yaml"), Digits(DigitsSettings())
    wanted = key("pairs", FORMAT, "a", fingerprint(data), OLD | {"steps": 4}, 0, 32)
    assert Pairs(RunDir(tmp_path / "x"), recipe, data, "a").folder.name == f"pairs-{wanted}"


def test_a_run_directory_of_before_the_new_keys_compares_equal() -> None:
    new = read(TINY)
    dumped = new.dump()
    dumped["teacher"]["solver"] = {name: dumped["teacher"]["solver"][name] for name in OLD}
    before = Recipe.model_validate(dumped)
    assert before == new
    assert differences(before.dump(), new.dump()) == []
    assert differences(new.dump(), read(TINY, "teacher.solver.name=deis").dump()) == ["teacher.solver.name"]


@pytest.mark.parametrize(
    "text",
    [
        "{name: deis, order: 2, steps: 12}",
        "{name: unipc, sigmas: [80, 20, 5, 1, 0.1, 0.002]}",
        "{sigmas: [14.6, 0.03]}",
    ],
)
def test_a_complete_recipe_reads_back_equal(text: str) -> None:
    recipe = read(TINY, f"teacher.solver={text}")
    assert read(recipe.to_yaml()) == recipe
    assert load_any(recipe, {"seed": 0}) == recipe


def test_given_levels_say_the_rest() -> None:
    found = solver("{name: dpm_solver_3, sigmas: [80, 5, 1, 0.002]}")
    assert (found.steps, found.sigma_max, found.sigma_min, found.evaluations) == (4, 80.0, 0.002, 10)


def test_edms_sampler_of_imagenet_64_can_be_said() -> None:
    """Karras et al. 2022, Table 5: 1.36 by 511 evaluations."""
    found = read(WITHOUT_PAIRS, "teacher.solver={name: edm_churn, steps: 256}").teacher.solver
    assert (found.churn, found.churn_min, found.churn_max, found.churn_noise) == (40.0, 0.05, 50.0, 1.003)
    assert found.evaluations == 511
    assert found == read(WITHOUT_PAIRS, f"teacher.solver={yaml.safe_dump(found.model_dump())}").teacher.solver


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{name: euler}", "is 'euler', not one of ddim, heun, dpm_solver_2"),
        ("{name: unipc, order: 1}", "`order` of unipc is 2 to 3, not 1"),
        ("{name: deis, order: 4}", "teacher.solver.order"),
        ("{name: dpmpp_3m, order: 3}", "`order` is a key of deis and unipc; dpmpp_3m has one order"),
        ("{sigmas: [80, 5, 5]}", "`sigmas` must descend, and its number 3, 5, follows 5"),
        ("{sigmas: [0.002, 80]}", "`sigmas` must descend"),
        ("{sigmas: [80]}", "teacher.solver.sigmas"),
        ("{sigmas: []}", "teacher.solver.sigmas"),
        ("{sigmas: 80}", "teacher.solver.sigmas"),
        ("{sigmas: [80, 0]}", "teacher.solver.sigmas.1"),
        ("{sigmas: [.inf, 1]}", "teacher.solver.sigmas.0"),
        ("{sigmas: [80, five]}", "teacher.solver.sigmas.1"),
        ("{sigmas: [80, 5], steps: 18}", "`sigmas` gives the levels, and `steps` 18 says otherwise"),
        ("{sigmas: [80, 5], sigma_max: 40}", "`sigma_max` 40 says otherwise"),
        ("{sigmas: [80, 5], rho: 5}", "`rho` 5 says otherwise"),
        ("{name: heun, churn: 30}", "`churn` is a key of edm_churn; heun does not read it"),
        ("{name: ancestral, churn_noise: 1}", "`churn_noise` is a key of edm_churn"),
        ("{name: edm_churn, churn_min: 60}", "`churn_min` 60 must not be above `churn_max` 50"),
        ("{name: edm_churn, churn: -1}", "teacher.solver.churn"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(text: str, said: str) -> None:
    message = refusal(WITHOUT_PAIRS, f"teacher.solver={text}")
    assert said in message
    assert message.startswith("1 mistake"), message


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("pairs", ["shared", "filtered"])
def test_noise_in_every_step_makes_no_pairs(name: str, pairs: str) -> None:
    words: Any = (f"teacher.solver.name={name}", f"stages.0.pairs={pairs}")
    message = refusal(TINY, *words)
    assert f"`teacher.solver.name` {name} adds noise in every step" in message and "pairs: none" in message
    assert read(WITHOUT_PAIRS, f"teacher.solver.name={name}").teacher.solver.stochastic


def test_a_baseline_by_a_stochastic_solver_is_measured_and_the_plan_says_evaluations(msd: Msd, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(WITHOUT_PAIRS.replace("solver: {steps: 4}", "solver: {name: dpmpp_2m_sde}"))
    planned = msd("distill", "tiny.yaml", "--dry-run")
    assert "solver:    dpmpp_2m_sde, 18 noise levels from 80 to 0.002, 18 evaluations" in planned.stdout
    done = msd("distill", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    record = next((tmp_path / "runs/tiny/metrics").glob("*.json")).read_text()
    assert '"evaluations": 18' in record
    refused = msd("distill", "tiny.yaml", "stages.0.pairs=shared")
    assert (refused.returncode, "adds noise in every step" in refused.stderr) == (2, True)
