"""Networks without memory: built on the meta device, where shapes are checked and parameters counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def on_meta() -> Iterator[None]:
    """Build what is built in the block without memory, and without first weights, which it could not hold.

    Drawing them there would make torch import its compiler, which takes more than a second of every process.
    """
    with without_first_weights("meta"):
        yield


@contextmanager
def without_first_weights(device: torch.device | str) -> Iterator[None]:
    """Build what is built in the block on a device, with whatever stands in its memory for weights."""
    with torch.device(device), _WithoutFirstWeights():
        yield


class _WithoutFirstWeights(TorchFunctionMode):
    """Leaves out what `torch.nn.init` would do."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
