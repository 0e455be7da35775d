"""Students as torch.export programs, or compiled ahead of time: callable where msd is not installed."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.generator import Generator
from msdcli.engine.export.format import with_router
from msdcli.engine.export.given.students import device_record
from msdcli.errors import UserError
from msdcli.nets.edm.edm2 import bake
from msdcli.recipe.networks import DiffusersNetworkSettings

if TYPE_CHECKING:
    from msdcli.engine.export.format import ExportResult, ExportSource

MAX_BATCH = 1024


class Unrolled(nn.Module):
    """images = G(z, labels, noise): a student with its noise levels baked in; its steps share their weights."""

    def __init__(self, net: Denoiser, sigmas: tuple[float, ...]) -> None:
        super().__init__()
        self.net, self.sigmas = net, sigmas

    def forward(self, z: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        return Generator(self.net, self.sigmas)(z, labels, noise)


def program(generator: Generator, device: str = "cpu") -> ExportedProgram:
    """Trace a student on a device: unit noise `z` [n, *shape] float32 and `labels` [n] int64 to images; n is open.

    A student of several steps has one input more, `noise` [n, steps - 1, *shape]: the unit noise between them.
    """
    net = bake(copy.deepcopy(generator.net).cpu()).to(device).eval().requires_grad_(False)
    example: tuple[Tensor, ...] = torch.zeros(3, *net.shape), torch.zeros(3, dtype=torch.int64)
    if generator.steps > 1:
        example = (*example, torch.zeros(3, generator.steps - 1, *net.shape))
    example = tuple(tensor.to(device) for tensor in example)
    n = Dim("n", min=1, max=max_batch(net))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own, about itself
        traced = torch.export.export(Unrolled(net, generator.sigmas), example, dynamic_shapes=({0: n},) * len(example))
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)  # where in this machine's files it came from
    return traced


def max_batch(net: Denoiser) -> int:
    """The largest batch of a program."""
    settings = net.settings
    # The library's upsampling treats batches from 64 on differently, and a program is one path through the code.
    small = isinstance(settings, DiffusersNetworkSettings) and settings.class_name == "UNet2DModel"
    return 63 if small else MAX_BATCH


def write(source: ExportSource) -> ExportResult:
    """Write students/K/model.pt2 (model.aot.pt2 when compiled) and the router."""
    aot, device = source.options.aot, source.options.device
    if aot:
        check_compiler()
    files, largest = [], MAX_BATCH
    for k, generator in enumerate(source.each()):
        largest = min(largest, max_batch(generator.net))
        path = source.folder / "students" / str(k) / ("model.aot.pt2" if aot else "model.pt2")
        path.parent.mkdir(parents=True)
        traced = program(generator, device)
        save_compiled(traced, path) if aot else torch.export.save(traced, path)
        files.append(path)
    built = {"compiled_for": device_record(device)} if aot else {}
    return with_router(source, "torch", files, {"aot": aot, "max_batch": largest} | built)


def check_compiler() -> None:
    """Raise UserError where there is no C++ compiler."""
    from torch._inductor import config

    names = [config.cpp.cxx] if isinstance(config.cpp.cxx, str) else [name for name in config.cpp.cxx if name]
    if not any(shutil.which(name) for name in (*names, "g++", "clang++")):
        raise UserError("aot compiles to machine code and found no C++ compiler", hint="install g++, or leave it out")


def save_compiled(traced: ExportedProgram, path: Path) -> None:
    """Compile for the device that the program was traced on, of this machine, and write one package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._inductor.aoti_compile_and_package(traced, package_path=str(path))
