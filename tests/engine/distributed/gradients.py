"""A program for torchrun: every objective's gradients of a batch that all processes share, written by the first.

torchrun ... tests/engine/distributed/gradients.py FILE
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from msdcli.engine.distributed.group import SINGLE_PROCESS, ProcessGroup, join_torchrun
from msdcli.recipe.stages import StageSettings
from tests.objectives.test_batches_cut import FEW, SETTINGS, STUDENTS, learned, name_of


def of_all(group: ProcessGroup = SINGLE_PROCESS) -> dict[str, Tensor]:
    """The gradients of two steps' turns, by objective and turn: in the second, figures of a whole batch are known.

    Of students of their own weights; of a teacher that is guided, in one step; of adapters, where peft is.
    """
    kinds: dict[str, tuple[Sequence[StageSettings], dict[str, Any]]] = {
        "plain": (SETTINGS, {}),
        "guided": (STUDENTS, {"guided": True, "steps": 1}),
        "adapters": (FEW if find_spec("peft") else [], {"guided": True, "adapted": True}),
    }
    found = {}
    for kind, (settings, how) in kinds.items():
        for one in settings:
            turns, _ = learned(one, 1, group=group, **how)
            found |= {f"{kind} {name_of(one)} {turn}": gradient for turn, gradient in enumerate(turns)}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join_torchrun() as group:
        gradients = of_all(group)
        if group.is_leader:
            save_file(gradients, sys.argv[1])
