"""How much of a device's memory is asked for: by a process that keeps data there, and by a batch of samples."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from msdcli.errors import is_out_of_memory

Result = TypeVar("Result")
PROCESSES = "MSD_PROCESSES_ON_DEVICE"  # the variable by which workers know how many they are on one device


def to_stderr(text: str) -> None:
    """Say it where it does not mix with results."""
    print(text, file=sys.stderr)


def free_share(device: torch.device) -> int:
    """Return the bytes that are free on a GPU, divided by the processes of this run that share it; elsewhere 0.

    They begin together, and each sees as free what the others are about to take.
    """
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free // int(os.environ.get(PROCESSES, "1"))


def release() -> None:
    """Give back what torch keeps of the device's memory for later, cuBLAS's workspaces (65 MiB on an H200) among it:
    blocks of other sizes may fit into it.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


class DeviceBatch:
    """Calls a network piece by piece; where the device's memory is too small, with half as many images from then on.

    Results do not depend on it but for rounding: no call mixes its images. It is said once.
    """

    def __init__(self, say: Callable[[str], object] = to_stderr) -> None:
        self.say, self.largest = say, sys.maxsize
        self._said = False

    def map(self, call: Callable[..., Tensor], *tensors: Tensor, batch: int | None = None) -> Tensor:
        """Return `call` of the tensors' rows, at most `batch` of them at once, in order."""
        count, done, start = len(tensors[0]), list[Tensor](), 0
        while start < count or not done:
            size = min(batch or max(count, 1), self.largest)
            pieces = [t[start : start + size] for t in tensors]
            found = self._attempt(call, pieces, len(pieces[0]))
            if found is None:
                continue  # with fewer
            done.append(found)
            start += size
        return done[0] if len(done) == 1 else torch.cat(done)

    def most(self, call: Callable[[int], Result], wanted: int) -> tuple[int, Result]:
        """Return how many images, `wanted` or as many as memory has room for, and `call` of that number."""
        while True:
            size = min(wanted, self.largest)
            if (found := self._attempt(call, [size], size)) is not None:
                return size, found

    def _attempt(self, call: Callable[..., Result], given: list[Any], size: int) -> Result | None:
        """Return the result, or None where there is too little memory for so many, but fewer can be tried."""
        try:
            return call(*given)
        except Exception as error:
            if size <= 1 or not is_out_of_memory(error):
                raise
        # Not inside `except`: while the error lives, so does all that the failed call had allocated.
        self.largest = size // 2
        release()
        if not self._said:
            self._said = True
            self.say(f"too little memory for {size:,} images at once: going on with {self.largest:,} or fewer")
        return None
