"""The device that a recipe asks for and a process computes on, its random numbers, and the number of CPU threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from msdcli.engine.distributed.launcher import local_rank, share
from msdcli.errors import UserError
from msdcli.recipe import Recipe


def prepare(recipe: Recipe, *, shared: bool = False) -> torch.device:
    """Set the thread count and return the device; of several GPUs, where the machine is `shared` by the processes of a
    group, this one's own. UserError if this machine does not have it.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    return local_device(recipe.device) if shared else resolve(recipe.device)


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


def own_gpu() -> torch.device:
    """Return the GPU of this process: of those that it sees, the one with its number on the machine, counted round.

    Where a launcher lets every process see one GPU only, all numbers lead to that one.
    """
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def local_device(name: str) -> torch.device:
    """Return the device called `name`; of several GPUs each process on a machine takes its own."""
    if name.startswith("cuda:") and share()[1] > 1:
        raise UserError(f"device: {name} is one GPU, and each process needs its own", hint="device=cuda")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return own_gpu()
    return resolve(name)


def name_of(device: torch.device) -> str:
    """Return what a GPU is called, for figures that were measured on it; of others their kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def seeded_apart(device: torch.device) -> Iterator[None]:
    """Give the global generators, the CPU's and the device's, back as they were; other devices are left alone."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def num_devices(device: torch.device) -> int:
    """How many devices of this machine a run may take: all GPUs unless it names one; a CPU counts as one."""
    return torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1


def with_students_per_device(recipe: Recipe, count: int) -> Recipe:
    """Return the recipe with as many `workers` as make `count` students on each device."""
    return recipe.model_copy(update={"workers": count * num_devices(resolve(recipe.device))})


def share_of_threads(recipe: Recipe, device: torch.device, count: int) -> int | None:
    """Return the CPU threads for each of `count` workers that make as many as one process takes; None where the recipe
    or OMP_NUM_THREADS says how many each has, or a GPU computes.
    """
    if device.type != "cpu" or recipe.threads is not None or "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, torch.get_num_threads() // count)


def num_workers(recipe: Recipe, device: torch.device) -> int:
    """How many students to train at once on this machine: one per GPU, or one per core that a process does not use."""
    if recipe.workers is not None:
        wanted = recipe.workers
    elif device.type == "cuda":
        wanted = num_devices(device)
    elif device.type == "cpu":
        wanted = len(os.sched_getaffinity(0)) // (recipe.threads or 2**30) if hasattr(os, "sched_getaffinity") else 1
    else:
        wanted = 1
    return max(1, min(wanted, recipe.partition.students))
