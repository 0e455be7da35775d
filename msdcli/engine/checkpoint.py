"""Weights and training state on disk: safetensors and JSON, written in one piece, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from msdcli import nets
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.ema import EMA
from msdcli.engine.distributed import like, own_part, whole
from msdcli.errors import UserError
from msdcli.recipe.networks import Network, NetworkSettings
from msdcli.rundir import file_hash, read_json, write_json, writing

WEIGHTS, MODEL, STATE = "model.safetensors", "model.json", "state.safetensors"
FORMAT = 1
HASH = "sha256"  # in a file's metadata


class DamagedError(UserError):
    """A file is not what was written."""


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, *, hashed: bool = False
) -> None:
    """Write named tensors in one piece; `hashed` with a hash by which `load_tensors` knows them again."""
    with writing(path) as temporary:
        write_tensors(temporary, tensors, metadata or {}, hashed=hashed)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], *, hashed: bool) -> None:
    """Write named tensors to a file that nobody reads yet."""
    if hashed:
        metadata = metadata | {HASH: digest(tensors, metadata)}
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
    again = f"remove {path.parent}, and the same command makes it again"
    try:
        with safe_open(path, framework="pt") as file:
            # Clones: memory of our own, aligned as a fresh tensor's is, so that a resumed run takes the same kernels.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedError(f"{path} is damaged or truncated: {error}", hint=again) from None
    wanted = metadata.pop(HASH, None)
    if wanted is not None and digest(tensors, metadata) != wanted:
        raise DamagedError(f"{path} is damaged or truncated: its content does not have its hash", hint=again)
    return tensors, metadata


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a hash of tensors and metadata."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def load_weights(net: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into a network: every name and shape must fit."""
    own = net.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        names = "; ".join(f"{what} {', '.join(n[:3])}" for what, n in (("missing", missing), ("unknown", extra)) if n)
        raise UserError(f"{path} does not fit the network: {names}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise UserError(f"{path}: {name} has shape {[*tensors[name].shape]}, the network wants {[*tensor.shape]}")
        tensor.copy_(tensors[name])


def whole_state(net: nn.Module) -> dict[str, Tensor]:
    """Return a network's tensors; where they are sharded, all processes must ask for them."""
    return {name: whole(tensor) for name, tensor in net.state_dict().items()}


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


def step_of(folder: Path) -> int:
    """Return the step of the training state in `folder`, without reading its tensors."""
    try:
        with safe_open(folder / STATE, framework="pt") as file:
            return int((file.metadata() or {})["step"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{folder / STATE} is damaged or truncated: {error}") from None


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

    def check_finite(self) -> None:
        """Raise UserError if a weight is not finite: then the checkpoint before is kept."""
        for name, net in self.nets.items():
            own = [part for p in net.parameters() if (part := own_part(p.detach())).numel()]
            largest = torch._foreach_norm(own, torch.inf) or [torch.zeros(())]
            if not torch.stack(largest).isfinite().all():
                raise UserError(
                    f"the weights of {name} are not finite any more at step {self.step}; the checkpoint before is kept",
                    hint="a lower learning rate is the usual cure (in a run of another name)",
                )

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return copies of all tensors in host memory, and the numbers, as a checkpoint holds them."""
        tensors = {name: whole(tensor.detach()).to("cpu", copy=True) for name, tensor in self._tensors()}
        return tensors, {k: repr(v) for k, v in ({"step": self.step} | self.cost).items()}

    def load(self, path: Path) -> None:
        """Take up the state in a file. DamagedError, or UserError if it is another network's; then nothing changes."""
        tensors, numbers = load_tensors(path)
        for name, net in [*self.nets.items(), ("ema", self.ema.net)]:
            for key, tensor in net.state_dict().items():
                if f"{name}.{key}" not in tensors or tensors[f"{name}.{key}"].shape != tensor.shape:
                    raise UserError(f"{path} is of another network: {name}.{key} does not fit")
        for name, optimizer in self.optimizers.items():
            self._load_moments(name, optimizer, tensors)
        for name, tensor in self._tensors():
            own_part(tensor).copy_(own_part(like(tensors[name], tensor)))
        self.step = int(numbers["step"])
        self.cost = {k: float(numbers[k]) for k in self.cost}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, net in [*self.nets.items(), ("ema", self.ema.net)]:
            for key, tensor in net.state_dict().items():
                yield f"{name}.{key}", tensor
        for name, optimizer in self.optimizers.items():
            for i, moments in optimizer.state_dict()["state"].items():
                for key, value in moments.items():
                    yield f"optimizer.{name}.{i}.{key}", value

    def _load_moments(self, name: str, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for key, tensor in tensors.items():
            if key.startswith(f"optimizer.{name}."):
                i, moment = key.rsplit(".", 2)[-2:]
                state.setdefault(int(i), {})[moment] = tensor if tensor.ndim == 0 else like(tensor, params[int(i)])
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def inherit(nets: dict[str, nn.Module], folder: Path) -> list[str]:
    """Give `nets` the weights of the networks of the same name that the stage in `folder` ended with; return the
    names.
    """
    tensors, _ = load_tensors(folder / STATE)
    names = sorted({key.split(".", 1)[0] for key in tensors} & nets.keys())
    for name in names:
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        load_weights(nets[name], own, folder / STATE)
    return names
