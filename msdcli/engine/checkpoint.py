"""Weights and training state on disk: safetensors and JSON, written in one piece, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from msdcli import nets
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.ema import EMA
from msdcli.engine.distributed import Group
from msdcli.engine.sharding import is_sharded, own_part
from msdcli.engine.states import damaged
from msdcli.errors import UserError
from msdcli.recipe.networks import Network, NetworkSettings
from msdcli.rundir import file_hash, read_json, write_json, writing

if TYPE_CHECKING:
    from msdcli.engine.storage import Stored

WEIGHTS, MODEL = "model.safetensors", "model.json"
FORMAT = 1
HASH = "sha256"  # in a file's metadata
WRONG = "its content does not have its hash"


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, *, hashed: bool = False
) -> None:
    """Write named tensors in one piece; `hashed` with a hash by which `load_tensors` knows them again."""
    with writing(path) as temporary:
        write_tensors(temporary, tensors, metadata or {}, hashed=hashed)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], *, hashed: bool) -> None:
    """Write named tensors to a file that nobody reads yet."""
    if hashed:
        metadata = metadata | {HASH: digest(sorted(tensors.items()), metadata)}
    try:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, path, metadata=metadata or None)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read named tensors and the file's metadata. UserError if the file is missing, DamagedError if it is damaged."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            # Clones: memory of our own, aligned as a fresh tensor's is, so that a resumed run takes the same kernels.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from None
    wanted = metadata.pop(HASH, None)
    if wanted is not None and digest(sorted(tensors.items()), metadata) != wanted:
        raise damaged(path, WRONG)
    return tensors, metadata


def check_hash(path: Path) -> None:
    """Compare a file's content with its hash, one tensor in memory at a time. DamagedError where it differs."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            wanted = metadata.pop(HASH)
            found = digest(((name, file.get_tensor(name)) for name in sorted(file.keys())), metadata)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise damaged(path, error) from None
    if found != wanted:
        raise damaged(path, WRONG)


def digest(tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]) -> str:
    """Return a hash of metadata and of tensors in the order of their names."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def load_weights(net: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into a network: every name and shape must fit."""
    check_fit(net, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
    for name, tensor in net.state_dict().items():
        tensor.copy_(tensors[name])


def check_fit(net: nn.Module, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise UserError unless tensors of these names and shapes are a network's."""
    own = net.state_dict()
    missing, extra = sorted(own.keys() - shapes.keys()), sorted(shapes.keys() - own.keys())
    if missing or extra:
        names = "; ".join(f"{what} {', '.join(n[:3])}" for what, n in (("missing", missing), ("unknown", extra)) if n)
        raise UserError(f"{path} does not fit the network: {names}")
    for name, tensor in own.items():
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(f"{path}: {name} has shape {[*shapes[name]]}, the network wants {[*tensor.shape]}")


def save_model(
    folder: Path, net: Denoiser, record: dict[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write a denoiser as model.safetensors and model.json; the JSON comes last and makes the folder complete.

    `tensors` are its whole ones, where the network is sharded.
    """
    save_tensors(folder / WEIGHTS, net.state_dict() if tensors is None else tensors)
    description = {
        "format": FORMAT,
        "network": net.settings.model_dump(mode="json"),
        "shape": list(net.shape),
        "num_classes": net.num_classes,
        "sigma_data": net.sigma_data,
        "parameters": sum(p.numel() for p in net.parameters()),
        "sha256": file_hash(folder / WEIGHTS),
    }
    write_json(folder / MODEL, description | record)


def load_model(folder: Path) -> tuple[Denoiser, dict[str, Any]]:
    """Read a denoiser and its description. UserError if a file is missing, damaged, or another than was written."""
    if not (folder / MODEL).is_file():
        raise UserError(f"no model at {folder}: {MODEL} is missing")
    description = read_json(folder / MODEL)
    try:
        network = TypeAdapter[NetworkSettings](Network).validate_python(description["network"])
        shape, classes = tuple(description["shape"]), description["num_classes"]
        net = nets.build(network, shape=shape, num_classes=classes, sigma_data=description["sigma_data"])
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{folder / MODEL} does not describe a network msd knows: {error}") from None
    tensors, _ = load_tensors(folder / WEIGHTS)
    if description.get("sha256") not in (None, file_hash(folder / WEIGHTS)):
        raise UserError(f"{folder / WEIGHTS} is not the file that {MODEL} describes: its hash differs")
    load_weights(net, tensors, folder / WEIGHTS)
    return net.requires_grad_(False).eval(), description


def is_complete(folder: Path) -> bool:
    """Whether a model was written here and finished."""
    return (folder / MODEL).is_file() and (folder / WEIGHTS).is_file()


class TrainState:
    """All that a stage must remember: networks, optimizers, the average, the step, and the cost so far.

    Nothing else is saved, because nothing else is needed: draws derive from the step.
    """

    def __init__(self, nets: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], ema: EMA) -> None:
        self.nets = nets
        self.optimizers = optimizers
        self.ema = ema
        self.step = 0
        self.cost = {"seconds": 0.0, "images": 0.0, "flops": 0.0}

    @property
    def is_sharded(self) -> bool:
        """Whether every process has its part only."""
        return any(is_sharded(p) for net in self.nets.values() for p in net.parameters())

    def check_finite(self, group: Group) -> None:
        """Raise UserError, everywhere, if a weight is not finite: then the checkpoint before is kept."""
        for name in filter(None, group.gather(self._not_finite())):
            raise UserError(
                f"the weights of {name} are not finite any more at step {self.step}; the checkpoint before is kept",
                hint="a lower learning rate is the usual cure (in a run of another name)",
            )

    def _not_finite(self) -> str | None:
        for name, net in self.nets.items():
            own = [part for p in net.parameters() if (part := own_part(p.detach())).numel()]
            largest = torch._foreach_norm(own, torch.inf) or [torch.zeros(())]
            if not torch.stack(largest).isfinite().all():
                return name
        return None

    def numbers(self) -> dict[str, float]:
        """Return the step and the cost, as a checkpoint holds them."""
        return {"step": self.step} | self.cost

    def load(self, stored: Stored) -> None:
        """Take up a checkpoint. DamagedError, or UserError if it is another network's; then nothing changes."""
        shapes, numbers = stored.shapes(), stored.numbers()
        for name, net in self._all_nets():
            for key, tensor in net.state_dict().items():
                if shapes.get(f"{name}.{key}") != tuple(tensor.shape):
                    raise UserError(f"{stored.path} is of another network: {name}.{key} does not fit")
        self._make_moments(shapes)
        stored.read(dict(self.tensors()))
        self.step = int(numbers["step"])
        self.cost = {name: numbers[name] for name in self.cost}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors by name; of an optimizer's, the number is that of the parameter in its network."""
        for name, net in self._all_nets():
            for key, tensor in net.state_dict().items():
                yield f"{name}.{key}", tensor
        for name, optimizer in self.optimizers.items():
            for i, param in enumerate(self.nets[name].parameters()):
                for key, value in optimizer.state.get(param, {}).items():
                    yield f"optimizer.{name}.{i}.{key}", value

    def _all_nets(self) -> list[tuple[str, nn.Module]]:
        return [*self.nets.items(), ("ema", self.ema.net)]

    def _make_moments(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Give the optimizers the tensors that a checkpoint has, sharded as their parameters are, to be filled."""
        params = {name: [*net.parameters()] for name, net in self.nets.items()}
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        for key, shape in shapes.items():
            kind, _, rest = key.partition(".")
            name, i, moment = rest.rsplit(".", 2) if kind == "optimizer" else ("", "", "")
            if name in params:
                param = params[name][int(i)]
                alike = shape == tuple(param.shape)
                made = torch.zeros_like(param) if alike else torch.zeros(shape, device=own_part(param.detach()).device)
                self.optimizers[name].state[param][moment] = made
