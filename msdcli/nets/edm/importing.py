"""Bring EDM's and EDM2's published checkpoints in: read, build our own network, map the weights, compare outputs."""

from __future__ import annotations

import inspect
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msdcli.diffusion.denoiser import Denoiser
from msdcli.errors import UserError
from msdcli.foreign import check_file
from msdcli.nets.edm.arguments import checked
from msdcli.nets.edm.edm2 import EDM2, EDM2UNet, round_gains
from msdcli.nets.edm.networks import DhariwalUNet, SongUNet
from msdcli.nets.edm.pickles import Pickle, TensorRecord, read_pickle
from msdcli.nets.edm.preconditioning import IDDPM, VE, VP, Preconditioned
from msdcli.nets.edm.unet_taps import TappedUNet
from msdcli.nets.meta import on_meta
from msdcli.nets.pickle_machine import Record

# 16 GB of float32; the largest published network, EDM2-XXL, has 1.5e9 parameters.
MAX_PARAMETERS = 4_000_000_000
MAX_MODULES = 100_000
MAX_DEPTH = 32

_NETWORKS: Mapping[str, type[TappedUNet]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet, "UNet": EDM2UNet}


@dataclass(frozen=True)
class _Format:
    """A preconditioning: its name in the pickle, its class, its usual network, the attribute that holds it there."""

    class_name: str
    build: type[Preconditioned]
    network: str
    prefix: str = "model."


_FORMATS: Mapping[str, _Format] = {
    "EDM": _Format("EDMPrecond", Preconditioned, "DhariwalUNet"),
    "VP": _Format("VPPrecond", VP, "SongUNet"),
    "VE": _Format("VEPrecond", VE, "SongUNet"),
    "iDDPM": _Format("iDDPMPrecond", IDDPM, "DhariwalUNet"),
    "EDM2": _Format("Precond", EDM2, "UNet", "unet."),
}


def import_edm(path: Path | str) -> tuple[Preconditioned, dict[str, Any]]:
    """Read a checkpoint of EDM or EDM2: the denoiser (on the CPU, float32, evaluation mode) and its description.

    The description is JSON-able, and `build_edm` makes the same network from it. Nothing from the file is run.
    Raises UserError where the file holds something else than such a network, or not exactly its weights.
    """
    denoiser, description, tensors = open_edm(path)
    denoiser = load_weights(denoiser, tensors, description["source"]["file"]).eval()
    if isinstance(denoiser.net, EDM2UNet) and tensors["net.out_gain"].dtype == torch.float16:
        round_gains(denoiser.net)
    return denoiser, description


def open_edm(path: Path | str) -> tuple[Preconditioned, dict[str, Any], dict[str, TensorRecord]]:
    """Read all but the numbers: the denoiser on the meta device, its description, its weights still in the file.

    Raises UserError like `import_edm`.
    """
    source = read_pickle(path)
    record = _averaged_network(source)
    preconditioning = next((name for name, form in _FORMATS.items() if form.class_name == record.class_name), None)
    if preconditioning is None:
        known = ", ".join(form.class_name for form in _FORMATS.values())
        raise UserError(f"{source.file} holds the network {record.class_name[:80]}, not one of {known}")
    description = {
        "kind": "edm",
        "preconditioning": preconditioning,
        "arguments": _constructor_arguments(record, source.file),
        "source": {"file": source.file, "sha256": source.sha256},
    }
    denoiser = build_edm(description, device="meta")
    description["arguments"] = _plan(description).arguments
    tensors = _weights(record, _FORMATS[preconditioning].prefix, source)
    check_weights(denoiser, tensors, source.file)
    return denoiser, description, tensors


def complete_arguments(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description's arguments with the network's defaults for those that it leaves out."""
    plan = _plan(description)
    defaults = {n: p.default for n, p in inspect.signature(plan.network).parameters.items() if p.default is not p.empty}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in (defaults | plan.arguments).items()}


def build_edm(description: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Preconditioned:
    """Build the network of a description, with random weights.

    It is built on the meta device first and tried there, so that arguments which fit no network, or a network of more
    than MAX_PARAMETERS, raise UserError before memory is allocated.
    """
    plan = _plan(description)
    try:
        with on_meta(), torch.no_grad():
            denoiser = plan.build()
            denoiser(torch.empty(1, *denoiser.shape), torch.ones(1))
    except (RuntimeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{plan.owner}: no network fits these arguments ({str(error).splitlines()[0][:200]})") from None
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    if count > MAX_PARAMETERS:
        raise UserError(f"{plan.owner}: a network of {count:,} parameters is refused, the limit is {MAX_PARAMETERS:,}")
    if torch.device(device).type == "meta":
        return denoiser
    with torch.device(device):
        return plan.build()


def load_weights(denoiser: Preconditioned, tensors: Mapping[str, Tensor | TensorRecord], source: str) -> Preconditioned:
    """Copy all of `tensors` into all of the denoiser's parameters and buffers, by name and shape.

    A denoiser on the meta device is given memory on the CPU once everything has been found to match.
    Raises UserError naming what is missing, too much or of another shape.
    """
    check_weights(denoiser, tensors, source)
    if any(tensor.is_meta for tensor in denoiser.state_dict().values()):
        denoiser = denoiser.to_empty(device="cpu")
    with torch.no_grad():
        for name, target in denoiser.state_dict().items():
            tensor = tensors[name]
            target.copy_(tensor.read() if isinstance(tensor, TensorRecord) else tensor)
    return denoiser


def check_weights(denoiser: Preconditioned, tensors: Mapping[str, Tensor | TensorRecord], source: str) -> None:
    """Raise UserError unless names and shapes are the denoiser's, naming what is not."""
    expected = {name: tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    held = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"missing {name}" for name in expected if name not in held]
    problems += [f"unknown {name}" for name in held if name not in expected]
    problems += [
        f"{name} is {list(held[name])}, the network's is {list(shape)}"
        for name, shape in expected.items()
        if held.get(name, shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{source} does not hold this network's weights: {'; '.join(problems[:5])}{more}")


@torch.no_grad()
def check_against(denoiser: Denoiser, npz_path: Path | str, *, batch_size: int = 16) -> float:
    """Largest relative difference between our denoised images and a reference's.

    The file holds `x` [n, C, H, W], `sigma` [n], `class_labels` [n, num_classes] one-hot and `denoised`, what the
    reference returned. Per image the difference is max |ours - theirs| / max |theirs|, so that images at high noise
    do not hide those at low noise; the result is the largest of all images, and infinite where a number is not finite.
    Meant for the CPU, where `import_edm` leaves the network: a GPU's TF32 convolutions differ by 1e-3.
    """
    x, sigma, labels, theirs = _reference(Path(npz_path), denoiser)
    device = next(denoiser.parameters()).device
    training = denoiser.training
    denoiser.eval()
    worst = 0.0
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        ours = denoiser(x[part].to(device), sigma[part].to(device), labels[part].to(device)).cpu()
        difference = (ours - theirs[part]).abs().flatten(1).amax(1) / theirs[part].abs().flatten(1).amax(1)
        worst = max(worst, difference.nan_to_num(nan=math.inf).max().item())
    denoiser.train(training)
    return worst


def _averaged_network(source: Pickle) -> Record:
    """The exponential moving average, which is what a snapshot is published for."""
    if not isinstance(source.content, dict) or not isinstance(source.content.get("ema"), Record):
        held = ", ".join(list(source.content)[:10]) if isinstance(source.content, dict) else "no dictionary"
        raise UserError(f"{source.file} holds no network under 'ema' (it holds: {held[:200]})")
    record: Record = source.content["ema"]
    return record


def _constructor_arguments(record: Record, file: str) -> dict[str, Any]:
    positional, named = record.state.get("_init_args"), record.state.get("_init_kwargs")
    if not isinstance(positional, tuple) or len(positional) > 3 or not isinstance(named, dict):
        raise UserError(f"{file} does not say how its network was made (_init_args, _init_kwargs)")
    arguments = dict(zip(("img_resolution", "img_channels", "label_dim"), positional, strict=False)) | named
    # How the original was run, and a bound that is none: neither is part of the network.
    arguments.pop("use_fp16", None)
    if arguments.get("sigma_max") == math.inf:
        del arguments["sigma_max"]
    return arguments


def _weights(record: Record, prefix: str, source: Pickle) -> dict[str, TensorRecord]:
    """The file's tensors under our names: the raw network is `net` here, `model` or `unet` there."""
    found: dict[str, TensorRecord] = {}
    nbytes = 0
    for name, tensor in _tensors(record, source.file):
        ours = f"net.{name.removeprefix(prefix)}" if name.startswith(prefix) else name
        if ours in found or not tensor.dtype.is_floating_point:
            raise UserError(f"{source.file}: {name[:200]} is there twice, or holds whole numbers")
        found[ours] = tensor
        nbytes += tensor.nbytes
    if nbytes > source.size:
        raise UserError(f"{source.file} was refused: its tensors claim {nbytes:,} bytes, the file has {source.size:,}")
    return found


def _tensors(record: Record, file: str) -> Iterator[tuple[str, TensorRecord]]:
    """Parameters and buffers of a module and all modules inside it. Bounded: modules may contain each other."""
    waiting, seen = [("", record, 0)], 0
    while waiting:
        prefix, module, depth = waiting.pop()
        seen += 1
        if depth > MAX_DEPTH or seen > MAX_MODULES:
            raise UserError(f"{file} was refused: more than {MAX_DEPTH} levels or {MAX_MODULES:,} modules")
        for group, kind in (("_parameters", TensorRecord), ("_buffers", TensorRecord), ("_modules", Record)):
            for name, value in _members(module, group, file):
                if not isinstance(value, kind):
                    raise UserError(f"{file} was refused: {prefix}{name[:80]} in {group} is no {kind.__name__}")
                if isinstance(value, Record):
                    waiting.append((f"{prefix}{name}.", value, depth + 1))
                else:
                    yield prefix + name, value


def _members(module: Record, group: str, file: str) -> list[tuple[str, Any]]:
    members = module.state.get(group, {})
    if not isinstance(members, dict):
        raise UserError(f"{file} was refused: {group} of {module.class_name[:80]} is no dictionary")
    return [(name, value) for name, value in members.items() if value is not None]


@dataclass(frozen=True)
class _Plan:
    """A description taken apart: what to build and with what."""

    owner: str
    arguments: dict[str, Any]
    form: _Format
    network: type[TappedUNet]

    def build(self) -> Preconditioned:
        given = self.arguments
        channels, resolution, classes = given["img_channels"], given["img_resolution"], given.get("label_dim", 0)
        outputs = 2 * channels if self.form.build is IDDPM else channels
        net = self.network(
            img_resolution=resolution,
            in_channels=channels,
            out_channels=outputs,
            label_dim=classes,
            **_among(given, self.network, "img_resolution", "label_dim"),
        )
        shape = (channels, resolution, resolution)
        return self.form.build(net, shape=shape, num_classes=classes, **_among(given, self.form.build))


def _plan(description: Mapping[str, Any]) -> _Plan:
    name, arguments = str(description.get("preconditioning")), description.get("arguments")
    if description.get("kind") != "edm" or name not in _FORMATS or not isinstance(arguments, Mapping):
        raise UserError(
            f"this describes no EDM network: kind and preconditioning must be edm and {' or '.join(_FORMATS)}"
        )
    form = _FORMATS[name]
    choice = arguments.get("model_type", form.network) if form.network != "UNet" else "UNet"
    network = _NETWORKS.get(choice, SongUNet) if isinstance(choice, str) else SongUNet
    own = {"img_resolution", "img_channels", "label_dim"} | ({"model_type"} if form.network != "UNet" else set())
    allowed = own | _keywords(network) | _keywords(form.build)
    return _Plan(f"{name} {choice}", checked(arguments, sorted(allowed), f"{name} {choice}"), form, network)


def _keywords(made: Callable[..., Any]) -> set[str]:
    """The arguments that can be set from outside: a class's keyword arguments are its schema."""
    return set(inspect.signature(made).parameters) - {"net", "shape", "num_classes", "in_channels", "out_channels"}


def _among(arguments: Mapping[str, Any], made: Callable[..., Any], *taken: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name in _keywords(made) and name not in taken}


def _reference(path: Path, denoiser: Denoiser) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_file(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            arrays = [torch.from_numpy(held[key]).float() for key in ("x", "sigma", "class_labels", "denoised")]
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no reference (.npz with x, sigma, class_labels, denoised): {error}") from None
    x, sigma, labels, theirs = arrays
    n = len(x)
    wanted = [(n, *denoiser.shape), (n,), (n, denoiser.num_classes), (n, *denoiser.shape)]
    for name, array, shape in zip(("x", "sigma", "class_labels", "denoised"), arrays, wanted, strict=True):
        if tuple(array.shape) != shape or not n:
            raise UserError(f"{path}: {name} is {list(array.shape)}, this network needs {list(shape)}")
    return x, sigma, labels, theirs
