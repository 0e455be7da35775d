"""torch.compile of an objective's networks, where a stage is long enough to pay for it.

The raw networks are compiled, not the losses: preconditioning, draws and the loop stay as they are written. Compiled
code is kept by torch between processes, in the folder that TORCHINDUCTOR_CACHE_DIR names.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine.tracking.events import Report
from msdcli.engine.train.counting import PEAK_FLOPS, UTILISATION, evaluation_cost
from msdcli.engine.train.passes import Passes
from msdcli.engine.train.precision import parts, timed
from msdcli.errors import UserError, is_out_of_memory
from msdcli.objectives import Objective
from msdcli.objectives.base import Turn

# A stage that will take less than this on a GPU is not compiled: compiling takes minutes for a large network.
PAYS_SECONDS = 1200.0
# What the host needs to launch one of a network's kernels; a GPU that is done sooner with one waits for the next.
LAUNCH_SECONDS = 8e-6
# Variants of one network's code that may be compiled: each network that shares it (student, fake, teacher, guide), in
# each size of a batch, each type, and each set of what learns, is one. torch's own limit is 8; what goes beyond it runs
# eagerly.
VARIANTS = 128

Trial = Callable[[], None]


def prepare(
    objective: Objective,
    trial: Trial,
    *,
    wanted: str | bool,
    steps: int,
    passes: Passes,
    device: torch.device,
    report: Report,
) -> bool:
    """Compile what the objective evaluates if `wanted` (auto, true, false) and the device make it pay; say so.

    `trial` runs every turn of a step, forward and backward, for one of the `passes`, and leaves no trace. The processes
    of a group do alike: the leader decides, and where one of them cannot, none does. UserError if it was asked for and
    cannot be had here; under `auto` the networks then stay as they are.
    """
    if wanted is False or (wanted == "auto" and not _pays(trial, steps, passes, device)):
        return False
    compile_networks(objective, images=passes.images)
    begun, reason = time.monotonic(), None
    try:
        trial()
    except Exception as error:  # whatever a compiler can raise
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    reasons = [why for why in passes.group.gather(reason) if why is not None]
    if not reasons:
        report(f"compiled in {time.monotonic() - begun:.0f} s")
        return True
    undo(objective)
    if wanted is True:
        raise UserError(f"compile: the networks cannot be compiled here ({reasons[0]})", hint="compile=false")
    report(f"not compiled, goes on without ({reasons[0]})")
    return False


def _pays(trial: Trial, steps: int, passes: Passes, device: torch.device) -> bool:
    """Whether the stage takes so long that compiling pays: every step makes all passes. The leader says so."""
    if device.type != "cuda":  # measured on CPUs: nothing gained
        return False
    trial()  # warms up
    return passes.group.broadcast(timed(trial, device) * len(passes.parts) * steps > PAYS_SECONDS)


def compile_networks(
    objective: Objective, *, images: int = 1, backend: str = "inductor", graphs: bool | None = None
) -> None:
    """Compile the raw networks in place, to be asked for `images` at once. Every batch size and every set of what
    learns becomes its own code; on a GPU it runs in CUDA `graphs` where they pay, unless it is said.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for net in denoisers(objective):
        on_gpu = backend == "inductor" and next(net.parameters()).is_cuda
        recorded = on_gpu and (waits_for_launches(net, images) if graphs is None else graphs)
        net.net.compile(backend=backend, dynamic=False, mode="reduce-overhead" if recorded else None)
    turns = objective.turns

    def marked(step: int) -> Iterator[Turn]:
        for names, loss in turns(step):
            torch.compiler.cudagraph_mark_step_begin()  # what graphs gave in the turn before may be overwritten
            yield names, loss

    objective.turns = marked  # type: ignore[method-assign]


@contextmanager
def never_eagerly() -> Iterator[None]:
    """Fail, rather than run eagerly, where networks have more variants than may be compiled."""
    import torch._dynamo

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def waits_for_launches(net: Denoiser, images: int) -> bool:
    """Whether a GPU multiplies faster than the host launches, for so many images at once: then CUDA graphs, which
    launch all of a network's kernels at once, are worth their memory.
    """
    kernels, flops = evaluation_cost(net)
    rate = PEAK_FLOPS * UTILISATION * (2 if getattr(net.net, "compute", None) is torch.bfloat16 else 1)
    return kernels * LAUNCH_SECONDS > images * flops / rate


def undo(objective: Objective) -> None:
    """Take back `compile_networks`."""
    for net in raw_networks(objective):
        net._compiled_call_impl = None
    vars(objective).pop("turns", None)


def forget() -> None:
    """Let go of all compiled code, and of the memory in which CUDA graphs run."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def eagerly() -> AbstractContextManager[object]:
    """Run compiled networks as they are written, so that their operations can be counted."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def denoisers(objective: Objective) -> list[Denoiser]:
    """Return all plain denoisers that the objective evaluates, one for each raw network."""
    plain = [part for net in vars(objective).values() if isinstance(net, Denoiser) for part in parts(net)]
    return list({id(net.net): net for net in plain}.values())


def raw_networks(objective: Objective) -> list[nn.Module]:
    """Return the raw networks of all denoisers that the objective evaluates, each once."""
    return [net.net for net in denoisers(objective)]


def run_turns(objective: Objective, draws: Callable[[int], object]) -> None:
    """Run every turn of a first step, forward and backward, without learning anything."""
    for turn, (names, loss) in enumerate(objective.turns(0)):
        for net in objective.nets.values():  # an attempt that failed may have left gradients
            net.zero_grad(set_to_none=True)
        learn(objective, names)
        per_image: Tensor = loss(draws(turn))  # type: ignore[arg-type]
        per_image.mean().backward()
        for net in objective.nets.values():
            net.zero_grad(set_to_none=True)


def learn(objective: Objective, names: tuple[str, ...]) -> None:
    """Let these networks of the objective have gradients, and no others."""
    for name, net in objective.nets.items():
        net.requires_grad_(name in names)
