"""The seam between the training loop and the maths: an objective says whose turn it is and what its loss is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from msdcli.diffusion.draws import Draws

Turn = tuple[tuple[str, ...], Callable[[Draws], Tensor]]


class Objective:
    """What one stage minimises: built with its settings, the student to train and the frozen teacher.

    `nets` are the networks that learn, by name; the loop owns their optimizers. `product` names the one that the stage
    is for: its moving average is what is saved. `turns` is the paper's algorithm box: for every step it yields, in
    order, the names of the networks that learn and a loss. A loss takes the turn's random draws and returns one
    number per image; the loop reduces, clips and steps.

    Two things a loss may leave behind, which cost nothing until somebody asks: `sigma`, the noise levels of the images
    it returned numbers for (said when a loss is not finite), and `health`, figures by name, computed when logged.

    A figure of the whole batch must not depend on how the batch is cut into slices and processes. A loss that needs one
    leaves sums over its images in `tally`; the loop adds them over slices and processes and hands the sums to `settle`
    after the turn, for the turns that follow. What is remembered of them is in `statistics`, whose buffers are saved,
    inherited and resumed with the networks.

    `frozen` names attributes that are networks of the student's kind which do not learn: the loop fills them with what
    the stage before made (its average), also when it resumes, and treats them as it does the teacher.
    """

    product: ClassVar[str] = "student"
    cycle: int = 1  # steps after which the same operations come again: what is counted to know the cost of all
    nets: dict[str, nn.Module]
    sigma: Tensor | None = None
    health: Mapping[str, Callable[[], Tensor]] = MappingProxyType({})
    tally: Mapping[str, Tensor] = MappingProxyType({})
    statistics: nn.Module | None = None
    frozen: tuple[str, ...] = ()

    def __init__(self, settings: Any, student: Any, teacher: Any) -> None:
        raise NotImplementedError

    def turns(self, step: int) -> Iterator[Turn]:
        raise NotImplementedError

    def settle(self, sums: Mapping[str, Tensor]) -> None:
        """Take up the sums of a whole batch."""
