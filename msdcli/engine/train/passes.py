"""How a batch is cut into passes through the networks, and into smaller ones where a device's memory is too small."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from msdcli.diffusion.device_batch import release
from msdcli.engine.distributed.group import SINGLE_PROCESS, ProcessGroup, slices
from msdcli.engine.tracking.events import Report, silent
from msdcli.errors import UserError, WorkerError, is_out_of_memory
from msdcli.recipe.stages import StageSettings

Part = tuple[int, int]  # the i-th of n equal slices of the whole batch
Result = TypeVar("Result")


class Passes:
    """The slices (`parts`) of a stage's batch that this process takes on, one pass through the networks each.

    No pass has more than `micro_batch` images; where memory is too small for one, no later pass has more than half as
    many. What is learnt does not depend on it but for rounding. While `agreeing`, the processes of a group tell each
    other after every attempt, and all begin again where one has to; later, and where a network is sharded (`retries`
    is false: its passes talk to each other), too little memory ends them all.
    """

    def __init__(
        self,
        stage: StageSettings,
        *,
        group: ProcessGroup = SINGLE_PROCESS,
        micro_batch: int | None = None,
        retries: bool = True,
        report: Report = silent,
    ) -> None:
        self.group, self.report, self.retries = group, report, retries
        self.batch, self.pair_batch = stage.batch, getattr(stage, "pair_batch", None)
        self.agreeing = retries and group.size > 1
        self.cut_to: int | None = None  # where memory was too small for more
        self.parts = self._slices(micro_batch)
        self._said = False

    @property
    def images(self) -> int:
        """The images of a pass."""
        return max(self.batch, self.pair_batch or 0) // self.parts[0][1]

    def resume(self, cut_to: int | None) -> None:
        """Go on with passes as small as those that a checkpoint tells of, where processes can still share them so."""
        if cut_to is not None and cut_to < self.images:
            with contextlib.suppress(UserError):
                self.parts, self.cut_to = self._slices(cut_to), cut_to

    def attempt(self, call: Callable[[Sequence[Part]], Result], device: torch.device) -> Result:
        """Return `call` of the parts; where memory is too small for them, of smaller ones, until they fit.

        Layers draw the same numbers in every attempt. All else that a failed one leaves behind is the caller's.
        """
        while True:
            random, found = _random_states(device), list[Result]()
            try:
                found.append(call(self.parts))
            except Exception as error:
                again = is_out_of_memory(error) and self._smaller() is not None
                self._everyone_fits(False, ends=None if again else f"{type(error).__name__}: {error}")
                if not again:
                    raise
            else:
                if self._everyone_fits(True):
                    return found[0]
            # Not inside `except`: while the error lives, so does all that the failed call had allocated.
            found.clear()
            release()
            _restore(random, device)
            self._halve()

    def _everyone_fits(self, own: bool, *, ends: str | None = None) -> bool:
        """Tell the group how this process's attempt went, or that it `ends` here and why; return whether all went well.

        WorkerError in a process that could go on, where another one ends.
        """
        if not self.agreeing:
            return own
        told = self.group.gather((own, ends))
        if ends is None and (reasons := [why for _, why in told if why is not None]):
            raise WorkerError(f"another process of this run has ended: {reasons[0]}")
        return all(fits for fits, _ in told)

    def _smaller(self) -> list[Part] | None:
        """Return parts of at most half the images; None where there are none."""
        if not self.retries or self.images < 2 or (self.group.size > 1 and not self.agreeing):
            return None
        try:
            return self._slices(self.images // 2)
        except UserError:  # a batch and a number of pairs that cannot be cut so
            return None

    def _halve(self) -> None:
        before = self.images
        self.cut_to = before // 2
        self.parts = self._slices(self.cut_to)
        if not self._said:
            self._said = True
            self.report(
                f"too little memory for {before:,} images at once: training goes on with {self.images:,} or fewer "
                f"(micro_batch={self.images} begins with them)"
            )

    def _slices(self, most: int | None) -> list[Part]:
        return slices(self.batch, self.pair_batch, self.group, most)


def _random_states(device: torch.device) -> list[torch.Tensor]:
    used = device.type == "cuda" and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if used else [])]


def _restore(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)
