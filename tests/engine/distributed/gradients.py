"""A program for torchrun: every objective's gradients of a batch that all processes share, written by the first.

torchrun ... tests/engine/distributed/gradients.py FILE
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file
from torch import Tensor

from msdcli.engine.distributed.group import SINGLE_PROCESS, ProcessGroup, join_torchrun
from tests.objectives.test_f_distill import SETTINGS, learned


def of_all(group: ProcessGroup = SINGLE_PROCESS) -> dict[str, Tensor]:
    """The gradients of two steps' turns, by objective and turn: in the second, figures of a whole batch are known."""
    found = {}
    for number, settings in enumerate(SETTINGS):
        turns, _ = learned(settings, 1, steps=2, group=group)
        found |= {f"{number} {settings.objective} {turn}": gradient for turn, gradient in enumerate(turns)}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join_torchrun() as group:
        gradients = of_all(group)
        if group.is_leader:
            save_file(gradients, sys.argv[1])
