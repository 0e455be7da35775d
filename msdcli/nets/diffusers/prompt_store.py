"""Embeddings of prompts by number, where text-conditioned networks look their conditions up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msdcli.diffusion.device_batch import free_share

TOKENS, POOLED = "tokens.bin", "pooled.bin"


class PromptStore:
    """Prompt number i as vectors [length, width] and pooled [pooled width]; number -1 is the empty prompt.

    Rows start with the empty prompt, so number i is row i + 1. The rows may lie in a file, memory-mapped; on a GPU they
    are kept where they fit into a quarter of this process' share of the free memory. A network refers to its store and
    does not contain it: no copy is made with the network, and no weight file holds it.
    """

    def __init__(self, tokens: Tensor, pooled: Tensor) -> None:
        assert tokens.ndim == 3 and pooled.ndim == 2 and len(tokens) == len(pooled) >= 1
        self._tokens, self._pooled = tokens, pooled
        self._resident: dict[torch.device, tuple[Tensor, Tensor] | None] = {}

    def __len__(self) -> int:
        """How many prompts there are, the empty one aside."""
        return len(self._tokens) - 1

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptStore:
        return self

    @property
    def pooled(self) -> np.ndarray:
        """The pooled embeddings of all prompts [prompts, pooled width], as they are stored."""
        return self._pooled[1:].numpy()

    @property
    def dtype(self) -> torch.dtype:
        return self._tokens.dtype

    @property
    def empty(self) -> tuple[Tensor, Tensor]:
        """The empty prompt's rows [1, ...]."""
        return self._tokens[:1], self._pooled[:1]

    def extended(self, tokens: Tensor, pooled: Tensor) -> PromptStore:
        """A store with more prompts after these, as rounded as these are."""
        rows = torch.cat([self._tokens, tokens.to(self._tokens)]), torch.cat([self._pooled, pooled.to(self._pooled)])
        return PromptStore(*rows)

    def look_up(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings of prompt numbers [n] on their device, float32."""
        device, row = condition.device, condition + 1
        kept = self._on(device)
        if kept is None:
            row = row.cpu()
            kept = self._tokens, self._pooled
        tokens, pooled = (rows[row].to(device, non_blocking=True).float() for rows in kept)
        return tokens, pooled

    def leave_devices(self) -> None:
        """Let go of the rows that devices keep; the next look-up decides anew."""
        self._resident.clear()

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        if device.type == "cpu":
            return self._tokens, self._pooled
        if device not in self._resident:
            fits = self._tokens.nbytes + self._pooled.nbytes <= free_share(device) // 4
            self._resident[device] = (self._tokens.to(device), self._pooled.to(device)) if fits else None
        return self._resident[device]


def stand_in(shape: tuple[int, int], pooled: int) -> PromptStore:
    """Return random embeddings of one prompt and the empty one, for networks that are only timed."""
    generator = torch.Generator().manual_seed(0)
    return PromptStore(torch.randn(2, *shape, generator=generator), torch.randn(2, pooled, generator=generator))


def mapped(folder: Path, count: int, shape: tuple[int, int], pooled: int, dtype: str) -> PromptStore:
    """Open the rows of `count` prompts and the empty one in `folder`. ValueError if the files have other sizes."""
    arrays = []
    for name, row in ((TOKENS, shape), (POOLED, (pooled,))):
        size = (count + 1) * math.prod(row) * np.dtype(dtype).itemsize
        if (folder / name).stat().st_size != size:
            raise ValueError(f"{folder / name} has {(folder / name).stat().st_size:,} bytes, not {size:,}")
        # Copy on write: torch wants memory that it may write to, and nobody writes.
        arrays.append(torch.from_numpy(np.memmap(folder / name, dtype, "c", shape=(count + 1, *row))))
    return PromptStore(*arrays)
