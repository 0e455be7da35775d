"""Write pickles in the published format of EDM and EDM2, as their own programs would, from our networks or by hand."""

from __future__ import annotations

import contextlib
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

CLASS_NAMES = {"EDM": "EDMPrecond", "VP": "VPPrecond", "VE": "VEPrecond", "iDDPM": "iDDPMPrecond", "EDM2": "Precond"}


def _reconstruct_persistent_obj(meta):
    raise AssertionError("this must only ever be named in a pickle")


class EasyDict(dict):
    """Stands for dnnlib's dictionary with attributes."""


@contextlib.contextmanager
def foreign_modules() -> Iterator[None]:
    """Let pickle find the two foreign names under their foreign modules while it writes."""
    homes = {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict}
    for home, thing in homes.items():
        thing.__module__ = home
        for part in (home.split(".")[0], home):
            sys.modules[part] = types.ModuleType(part)
        setattr(sys.modules[home], thing.__name__, thing)
    try:
        yield
    finally:
        for home in homes:
            del sys.modules[home], sys.modules[home.split(".")[0]]


class Persistent:
    """What torch_utils.persistence makes of an object: its class's name, source, constructor arguments and state."""

    def __init__(self, class_name: str, state: dict[str, Any], **meta: Any) -> None:
        self.meta = {"type": "class", "version": 6, "module_src": "# none\n", "class_name": class_name, "state": state}
        self.meta |= meta

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


class Call:
    """Pickles as a call of `function` with `args`; the same object twice is one call and a memo entry."""

    def __init__(self, function, *args) -> None:
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


def module_state(module: nn.Module, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
    """A module's state with its children as persistent objects; `prefix` renames the child `net`."""
    children = {
        (prefix or name) if name == "net" else name: persistent(child) for name, child in module._modules.items()
    }
    return {
        "training": False,
        "_parameters": dict(module._parameters),
        "_buffers": dict(module._buffers),
        "_non_persistent_buffers_set": set(),
        "_forward_hooks": OrderedDict(),
        "_modules": children,
        "_init_args": (),
        "_init_kwargs": kwargs,
    }


def persistent(module: nn.Module | None) -> Any:
    if module is None or isinstance(module, nn.Identity):
        return None
    state = module_state(module)
    if isinstance(module, nn.ModuleDict):
        container = nn.ModuleDict()
        container.__dict__["_modules"] = state["_modules"]
        return container
    return Persistent(type(module).__name__, state)


def snapshot(denoiser: nn.Module, description: dict[str, Any]) -> dict[str, Any]:
    """The dictionary that a training run would have pickled."""
    kind = description["preconditioning"]
    state = module_state(denoiser, "unet" if kind == "EDM2" else "model", use_fp16=True, **description["arguments"])
    return {
        "ema": Persistent(CLASS_NAMES[kind], state),
        "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2, "_init_args": (), "_init_kwargs": {}}),
        "augment_pipe": None,
        "dataset_kwargs": EasyDict(path="x.zip", use_labels=True),
    }


def dumps(content: Any, protocol: int = 4) -> bytes:
    with foreign_modules():
        return pickle.dumps(content, protocol)


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    with foreign_modules(), path.open("wb") as file:
        pickle.dump(content, file, protocol)
    return path


@torch.no_grad()
def shake(module: nn.Module, scale: float = 0.05, seed: int = 0) -> nn.Module:
    """Move all parameters away from their initial zeros, so that every one of them is seen in the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        step = scale if parameter.ndim else 0.5
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=step)
    return module
