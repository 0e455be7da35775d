"""The device a recipe asks for, and the number of CPU threads."""

from __future__ import annotations

import os

import torch

from msdcli.errors import UserError
from msdcli.recipe import Recipe


def prepare(recipe: Recipe) -> torch.device:
    """Set the thread count and return the device. UserError if this machine does not have it."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    return resolve(recipe.device)


def resolve(name: str) -> torch.device:
    """Return the device called `name`; `auto` is CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {name} is not here: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps is not available on this machine", hint="device=cpu")
    return device


def num_workers(recipe: Recipe, device: torch.device) -> int:
    """How many students to train at once on this machine: one per GPU, or one per core that a process does not use."""
    if recipe.workers is not None:
        wanted = recipe.workers
    elif device.type == "cuda":
        wanted = torch.cuda.device_count()
    elif device.type == "cpu":
        wanted = len(os.sched_getaffinity(0)) // (recipe.threads or 2**30) if hasattr(os, "sched_getaffinity") else 1
    else:
        wanted = 1
    return max(1, min(wanted, recipe.partition.students))
