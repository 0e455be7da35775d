"""What a student is: a network and the noise levels that it is evaluated at, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from msdcli.diffusion.denoiser import Denoiser, few_step
from msdcli.errors import WrongValueError


@dataclass(frozen=True)
class Generator:
    """Images from unit noise in `len(sigmas)` evaluations of `net`."""

    net: Denoiser
    sigmas: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Evaluations of the network per image."""
        return len(self.sigmas)

    def __call__(self, z: Tensor, condition: Tensor | None, noise: Tensor | None = None) -> Tensor:
        """Return images [batch, *shape] of unit noise z [batch, *shape], float32.

        `noise` [batch, steps - 1, *shape] is unit noise too, None where there is one step.
        """
        return few_step(self.net, z, self.sigmas, condition, noise).float()

    def first(self, steps: int | None) -> Generator:
        """Return the generator that stops after its first `steps` levels. WrongValueError if it has fewer."""
        if steps is None or steps == self.steps:
            return self
        check_steps(steps, self.steps)
        return replace(self, sigmas=self.sigmas[:steps])


def check_steps(wanted: int, present: int) -> None:
    """Raise WrongValueError unless a student with `present` steps has that many."""
    if not 1 <= wanted <= present:
        raise WrongValueError(f"steps {wanted}: these students have {present}", hint=f"--steps {present}")


def levels_of(stage: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the noise levels that a stage's record names, in the form of today or of before (one `sigma_init`).

    Raises KeyError, TypeError or ValueError where it names none.
    """
    found = stage["sigmas"] if "sigmas" in stage else [stage["sigma_init"]]
    levels = tuple(float(sigma) for sigma in found)
    if not levels:
        raise ValueError("no noise level")
    return levels
