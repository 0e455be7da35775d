"""Several processes on one piece of work, as torchrun starts them."""

from __future__ import annotations

import os

import torch
from torch import distributed

from msdcli.data.images import Share
from msdcli.engine import device
from msdcli.metrics.evaluate import FeatureSet


def share() -> Share:
    """Return this process's number and how many there are: (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(name: str) -> torch.device:
    """Return the device called `name`; of several GPUs each process on a machine takes its own."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device.resolve(name)


def merged(part: FeatureSet, share: Share) -> FeatureSet | None:
    """Merge the parts of all processes in the first one; the others get None."""
    rank, num_ranks = share
    if num_ranks == 1:
        return part
    distributed.init_process_group("gloo")  # arrays on the host, whatever the device
    try:
        gathered = [None] * num_ranks if rank == 0 else None
        distributed.gather_object(part.to_arrays(), gathered)
    finally:
        distributed.destroy_process_group()
    if gathered is None:
        return None
    first, *others = (FeatureSet.from_arrays(arrays) for arrays in gathered if arrays is not None)
    for other in others:
        first.merge(other)
    return first
