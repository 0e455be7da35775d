"""Students that are low-rank adapters of one frozen network, whose memory and file all of them share.

K students are then one network and K small sets of numbers. `merged` makes one of them a network like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import Denoiser
from msdcli.nets import lora

if TYPE_CHECKING:
    from msdcli.recipe.student import AdapterSettings


class AdaptedDenoiser(Denoiser):
    """A denoiser of which only the adapters are its own: its parameters, its state, what copies of it copy.

    The base, of a guided one the plain network, is frozen, and the same memory as that of the network it was made from.
    `twin` is that base with the adapters in it.
    """

    twin: Denoiser  # beside the registered modules: what belongs to others is not listed as this one's

    def __init__(self, base: Denoiser, adapter: AdapterSettings) -> None:
        nn.Module.__init__(self)
        how = {"key": "student.adapter", "cure": "leave student.adapter out for students of their own weights"}
        self._hold(lora.adapted(base, adapter.rank, adapter.scale, **how)[0])
        self.shape, self.num_classes, self.sigma_data = base.shape, base.num_classes, base.sigma_data
        self.settings, self.adapter, self.base_sha256 = base.settings, adapter, base.read_from
        self.anchor = base.anchor

    def _hold(self, twin: Denoiser) -> None:
        vars(self)["twin"] = twin
        self.adapters = lora.Adapters(twin)

    @property
    def net(self) -> nn.Module:  # type: ignore[override]
        """The raw network, with the adapters in it."""
        return self.twin.net

    @property
    def reads_text(self) -> bool:  # type: ignore[override]
        return self.twin.reads_text

    @property
    def prompts(self) -> Any:
        return self.twin.prompts

    @prompts.setter
    def prompts(self, store: Any) -> None:
        self.twin.prompts = store

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.twin(x, sigma, condition)

    @property
    def taps(self) -> list[str]:
        return self.twin.taps

    def features(self, x: Tensor, sigma: Tensor, condition: Tensor | None, taps: Sequence[str]) -> list[Tensor]:
        return self.twin.features(x, sigma, condition, taps)

    def compute_in(self, dtype: torch.dtype | None) -> Self:
        self.twin.compute_in(dtype)
        return self

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.twin.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.twin._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._hold(self.twin)  # torch may have made new parameters
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedDenoiser:
        """Copy the adapters; the base stays the memory that it is."""
        made = type(self).__new__(type(self))
        nn.Module.__init__(made)
        kept = ("shape", "num_classes", "sigma_data", "settings", "adapter", "base_sha256", "anchor", "training")
        vars(made).update({name: vars(self)[name] for name in kept})
        own = {id(p) for p in self.adapters.parameters()}
        memo |= lora.same_memory(p for p in self.twin.parameters() if id(p) not in own)
        memo |= {id(b): b for b in self.twin.buffers()}
        made._hold(copy.deepcopy(self.twin, memo))
        return made


def merged(net: Denoiser) -> Denoiser:
    """Return a network with its adapters added to its weights, in memory of its own; one without adapters as it is."""
    if not isinstance(net, AdaptedDenoiser):
        return net
    whole = copy.deepcopy(net.twin).requires_grad_(False)
    whole.anchor = net.anchor
    for parent in list(whole.modules()):
        for name, child in list(parent.named_children()):
            if lora.is_adapted(child):
                parent.add_module(name, lora.merge(child))
    return whole
