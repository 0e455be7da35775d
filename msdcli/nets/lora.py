"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on a frozen network, by the library peft: extra `lora`.

A layer W x + b becomes W x + b + (alpha / rank) B A x, with B zero at first, so that the network begins as it was. Of
the two only A and B learn; everything else is the frozen network's own memory. Without its adapters it is that network.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from msdcli.diffusion.denoiser import Denoiser
from msdcli.errors import UserError

ADAPTER = "lora_"  # how peft begins the names of what learns, below a layer's own


class Adapters(nn.Module):
    """What learns of a network with adapters, by the network's own names; it computes nothing itself."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        for name, parameter in net.named_parameters():
            if f".{ADAPTER}" in name:
                self.register_parameter(name.replace(".", "/"), parameter)


def adapted(
    net: Denoiser, rank: int, alpha: float, *, key: str = "fake.kind: lora", cure: str = "fake.kind=full"
) -> tuple[Denoiser, Adapters]:
    """Return a denoiser of the same weights with adapters on every linear layer and convolution, and the adapters.

    Of a guided one: the plain network's. The weights are those of `net` in memory, and nothing changes them. UserError,
    which names the recipe's `key` and its `cure`, where peft is not installed, or where the network has no such layers
    (EDM2 normalises its own).
    """
    peft = import_peft(key, cure)
    twin = sharing(net)
    if not (layers := [*adaptable(twin.net)]):
        raise UserError(
            f"{key} needs linear layers or convolutions, and this network has none of torch's (EDM2 has layers of its "
            "own, which are normalised in every call)",
            hint=cure,
        )
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers)
    peft.inject_adapter_in_model(config, twin.net)
    return twin, Adapters(twin)


def sharing(net: Denoiser) -> Denoiser:
    """Return a copy of a denoiser (of a guided one: of its network) whose weights are the same memory, and frozen."""
    return copy.deepcopy(net, same_memory(net.parameters()) | {id(b): b.detach() for b in net.buffers()})


def same_memory(parameters: Iterable[nn.Parameter]) -> dict[int, Any]:
    """Return a memo for `copy.deepcopy` by which these parameters are frozen ones in the same memory."""
    return {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in parameters}


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer with adapters."""
    return any(name.startswith(ADAPTER) for name, _ in module.named_children())


def merge(layer: Any) -> nn.Module:
    """Add a layer's adapters to its weights, in place, and return it without them."""
    layer.merge()
    plain: nn.Module = layer.get_base_layer()
    return plain


def adaptable(net: nn.Module) -> Iterator[str]:
    """Yield the names of the layers that are a linear map of what they are given: not those that also resample it."""
    for name, module in net.named_modules():
        linear = isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, "groups", 1) == 1
        if linear and getattr(module, "mode", "keep") == "keep":
            yield name


def import_peft(key: str, cure: str) -> Any:
    """Return the library. UserError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"{key} needs the library peft ({error})", hint=f"pip install 'msdcli[lora]', or {cure}"
        ) from None
    return peft
