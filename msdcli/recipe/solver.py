"""Keys of the teacher's solver, and what follows from them: evaluations, the levels, what decides its samples."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from msdcli.recipe.section import NoiseLevel, Section

# Evaluations from one level to the next; all take one more, at the last level.
PER_STEP = {"heun": 2, "dpm_solver_2": 2, "dpm_solver_3": 3, "edm_churn": 2}
STOCHASTIC = ("edm_churn", "ancestral", "dpmpp_2m_sde")
ORDERS = {"deis": (1, 3), "unipc": (2, 3)}  # least and most; the most is the default
CHURN = ("churn", "churn_min", "churn_max", "churn_noise")

ChurnLevel = Annotated[float, Field(ge=0, le=10_000)]


class SolverSettings(Section):
    """How the teacher is sampled: a solver of its ODE, or (for baselines) of its SDE, and the noise levels."""

    name: Literal[
        "ddim",
        "heun",
        "dpm_solver_2",
        "dpm_solver_3",
        "dpmpp_2m",
        "dpmpp_3m",
        "deis",
        "unipc",
        "edm_churn",
        "ancestral",
        "dpmpp_2m_sde",
    ] = Field(
        "heun",
        description="ddim (Euler), heun (EDM's Algorithm 1), dpm_solver_2 and _3 (single-step, arXiv 2206.00927), "
        "dpmpp_2m and dpmpp_3m (DPM-Solver++, arXiv 2211.01095), deis (in ln sigma, arXiv 2204.13902), unipc (bh2, "
        "arXiv 2302.04867); with noise in every step, for baselines and not for pairs: edm_churn (EDM's Algorithm 2), "
        "ancestral (Euler's method), dpmpp_2m_sde",
    )
    steps: int = Field(
        18,
        ge=2,
        le=10_000,
        description="noise levels; heun, edm_churn and dpm_solver_2 take 2 x steps - 1 evaluations, dpm_solver_3 "
        "3 x steps - 2, all others steps",
    )
    sigma_min: NoiseLevel = Field(0.002, description="last noise level")
    sigma_max: NoiseLevel = Field(80.0, description="first noise level")
    rho: float = Field(7.0, ge=0.1, le=100, description="spacing of the levels")
    sigmas: Annotated[list[NoiseLevel], Field(min_length=2, max_length=10_000)] | None = Field(
        None, description="the noise levels themselves, descending, in the place of steps, sigma_min, sigma_max and rho"
    )
    order: int | None = Field(None, ge=1, le=3, description="deis: 1 to 3, unipc: 2 or 3; absent: 3")
    churn: float = Field(
        40.0, ge=0, le=10_000, description="edm_churn: S_churn, noise added over all levels (EDM's for ImageNet-64)"
    )
    churn_min: ChurnLevel = Field(0.05, description="edm_churn: S_min, the lowest level with noise added")
    churn_max: ChurnLevel = Field(50.0, description="edm_churn: S_max, the highest level with noise added")
    churn_noise: float = Field(
        1.003, ge=0, le=2, description="edm_churn: S_noise, the standard deviation of what is added"
    )

    @model_validator(mode="before")
    @classmethod
    def _a_given_schedule_says_the_rest(cls, value: Any) -> Any:
        """Fill in what follows from `sigmas`, so that a complete recipe can be read again."""
        given = value.get("sigmas") if isinstance(value, dict) else None
        good = isinstance(given, list) and all(type(s) in (int, float) and 1e-6 <= s <= 10_000 for s in given)
        if not isinstance(given, list) or len(given) < 2 or not good:
            return value  # the fields' own checks say what is wrong
        return {"steps": len(given), "sigma_max": given[0], "sigma_min": given[-1]} | value

    @model_validator(mode="after")
    def _noise_falls(self) -> SolverSettings:
        if self.sigmas is not None:
            self._check_schedule(self.sigmas)
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"`sigma_min` {self.sigma_min:g} must be below `sigma_max` {self.sigma_max:g}")
        return self

    @model_validator(mode="after")
    def _keys_go_with_the_solver(self) -> SolverSettings:
        low, high = ORDERS.get(self.name, (0, 0))
        if self.order is not None and not high:
            raise ValueError(f"`order` is a key of {' and '.join(ORDERS)}; {self.name} has one order: leave it out")
        if self.order is not None and not low <= self.order <= high:
            raise ValueError(f"`order` of {self.name} is {low} to {high}, not {self.order}")
        fields = type(self).model_fields
        changed = [name for name in CHURN if getattr(self, name) != fields[name].default]
        if changed and self.name != "edm_churn":
            raise ValueError(f"`{changed[0]}` is a key of edm_churn; {self.name} does not read it: leave it out")
        if not self.churn_min <= self.churn_max:
            raise ValueError(f"`churn_min` {self.churn_min:g} must not be above `churn_max` {self.churn_max:g}")
        return self

    def _check_schedule(self, sigmas: list[float]) -> None:
        for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
            if not sigma > sigma_next:
                raise ValueError(f"`sigmas` must descend, and its number {i + 2}, {sigma_next:g}, follows {sigma:g}")
        implied = {"steps": len(sigmas), "sigma_max": sigmas[0], "sigma_min": sigmas[-1], "rho": 7.0}
        for name, wanted in implied.items():
            if getattr(self, name) != wanted:
                raise ValueError(
                    f"`sigmas` gives the levels, and `{name}` {getattr(self, name):g} says otherwise: leave it out "
                    "(an override `teacher.solver={name: ..., sigmas: [...]}` replaces the whole section)"
                )

    @property
    def evaluations(self) -> int:
        """Network evaluations for one image; under guidance one is of both branches where the level is guided."""
        return PER_STEP.get(self.name, 1) * (self.steps - 1) + 1

    @property
    def stochastic(self) -> bool:
        """Whether every step adds noise, so that a sample is no function of the noise that it began with."""
        return self.name in STOCHASTIC

    def record(self) -> dict[str, Any]:
        """Return the keys that decide samples, without those that this solver does not read.

        What is cached is keyed by it: of the solvers and keys that msd 0.1.0 had it is what it was then.
        """
        keys = ["name", "steps", "sigma_min", "sigma_max", "rho"]
        found = self.model_dump(include={*keys})
        if self.name in ORDERS:
            found["order"] = self.order or ORDERS[self.name][1]
        if self.name == "edm_churn":
            found |= self.model_dump(include={*CHURN})
        return found if self.sigmas is None else found | {"sigmas": self.sigmas}
