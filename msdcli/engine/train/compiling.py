"""torch.compile of an objective's networks, where a stage is long enough to pay for it.

The raw networks are compiled, not the losses: preconditioning, draws and the loop stay as they are written. Compiled
code is kept by torch between processes, in the folder that TORCHINDUCTOR_CACHE_DIR names.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine.tracking.events import Report
from msdcli.engine.train.precision import parts, timed
from msdcli.errors import UserError
from msdcli.objectives import Objective
from msdcli.objectives.base import Turn

# A stage that will take less than this on a GPU is not compiled: compiling takes minutes for a large network.
PAYS_SECONDS = 1200.0
# Networks up to this size wait for launches more than for arithmetic: CUDA graphs launch all of one at once.
SMALL_PARAMETERS = 16e6

Trial = Callable[[], None]


def prepare(
    objective: Objective, trial: Trial, *, wanted: str | bool, steps: int, device: torch.device, report: Report
) -> bool:
    """Compile what the objective evaluates if `wanted` (auto, true, false) and the device make it pay; say so.

    `trial` runs every turn of a step, forward and backward, and leaves no trace. UserError if it was asked for and
    cannot be had here; under `auto` the networks then stay as they are.
    """
    if wanted is False or (wanted == "auto" and not _pays(trial, steps, device)):
        return False
    compile_networks(objective)
    begun = time.monotonic()
    try:
        trial()
    except Exception as error:  # whatever a compiler can raise
        undo(objective)
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        if wanted is True:
            raise UserError(
                f"compile: the networks cannot be compiled here ({reason})", hint="compile=false"
            ) from error
        report(f"not compiled, goes on without ({reason})")
        return False
    report(f"compiled in {time.monotonic() - begun:.0f} s")
    return True


def _pays(trial: Trial, steps: int, device: torch.device) -> bool:
    if device.type != "cuda":  # measured on CPUs: nothing gained
        return False
    trial()  # warms up
    return timed(trial, device) * steps > PAYS_SECONDS


def compile_networks(objective: Objective, *, backend: str = "inductor") -> None:
    """Compile the raw networks in place. Every batch size and every set of what learns becomes its own code."""
    for net in raw_networks(objective):
        small = sum(p.numel() for p in net.parameters()) < SMALL_PARAMETERS
        graphs = backend == "inductor" and small and next(net.parameters()).is_cuda
        net.compile(backend=backend, dynamic=False, mode="reduce-overhead" if graphs else None)
    turns = objective.turns

    def marked(step: int) -> Iterator[Turn]:
        for names, loss in turns(step):
            torch.compiler.cudagraph_mark_step_begin()  # what graphs gave in the turn before may be overwritten
            yield names, loss

    objective.turns = marked  # type: ignore[method-assign]


def undo(objective: Objective) -> None:
    """Take back `compile_networks`."""
    for net in raw_networks(objective):
        net._compiled_call_impl = None
    vars(objective).pop("turns", None)


def eagerly() -> AbstractContextManager[object]:
    """Run compiled networks as they are written, so that their operations can be counted."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def raw_networks(objective: Objective) -> list[nn.Module]:
    """Return the raw networks of all denoisers that the objective evaluates, each once."""
    plain = [part for net in vars(objective).values() if isinstance(net, Denoiser) for part in parts(net)]
    return list({id(net): net.net for net in plain}.values())


def run_turns(objective: Objective, draws: Callable[[int], object]) -> None:
    """Run every turn of a first step, forward and backward, without learning anything."""
    for turn, (names, loss) in enumerate(objective.turns(0)):
        learn(objective, names)
        per_image: Tensor = loss(draws(turn))  # type: ignore[arg-type]
        per_image.mean().backward()
        for net in objective.nets.values():
            net.zero_grad(set_to_none=True)


def learn(objective: Objective, names: tuple[str, ...]) -> None:
    """Let these networks of the objective have gradients, and no others."""
    for name, net in objective.nets.items():
        net.requires_grad_(name in names)
