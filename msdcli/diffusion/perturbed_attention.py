"""Self-attention with the identity in the place of its map, as perturbed-attention guidance needs it (Ahn et al. 2024,
arXiv 2403.17377): every position keeps its own value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from msdcli.errors import UserError

MIDDLE = ("middle", "mid_block")  # of U-Nets; EDM's begin their decoders with it


def attention(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return a layer's attention, q, k and v [n, heads, positions, channels]; where it is perturbed, the values."""
    return v if layer.perturbed else F.scaled_dot_product_attention(q, k, v)


def attention_layers(net: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return a raw network's layers of self-attention that `names` mean, by their own names.

    A name means the layer that is called so and all inside what is called so. No names: the layer in the middle, or,
    of a U-Net without attention there, all. UserError for a network without self-attention, or without these layers.
    """
    known = {name: layer for name, layer in net.named_modules() if _attends(layer)}
    if not known:
        raise UserError(
            "guide: perturbed: the teacher's network has no self-attention to perturb",
            hint="leave the guide out, or name a weaker teacher",
        )
    if not names:
        return {name: known[name] for name in _middle([*known])}
    found: dict[str, nn.Module] = {}
    for wanted in names:
        meant = {name: layer for name, layer in known.items() if f"{name}.".startswith(f"{wanted}.")}
        if not meant:
            raise UserError(f"teacher.guidance.layers: no self-attention in {wanted!r}; it is in {', '.join(known)}")
        found |= meant
    return found


@contextmanager
def perturbed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let these layers' attention maps be the identity."""
    before = [_switch(layer, True) for layer in layers]
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            _switch(layer, was)


def _attends(layer: nn.Module) -> bool:
    if hasattr(layer, "perturbed"):  # of our networks
        return bool(layer.has_attention)
    is_library = type(layer).__module__.startswith("diffusers.") and type(layer).__name__ == "Attention"
    # Of a text network those that look at the prompt are no self-attention, and those that look at both are neither.
    return is_library and not layer.is_cross_attention and getattr(layer, "add_k_proj", None) is None


def _middle(names: list[str]) -> list[str]:
    middle = [name for name in names if name.split(".")[0] in MIDDLE or name.endswith("_in0")]
    if middle or not names[0].startswith("transformer_blocks"):
        return middle or names
    return [names[len(names) // 2]]


def _switch(layer: Any, to: Any) -> Any:
    """Perturb a layer, or let it be as it was; return what it was."""
    name = "perturbed" if hasattr(layer, "perturbed") else "processor"
    was = getattr(layer, name)
    setattr(layer, name, IdentityProcessor() if to is True and name == "processor" else to)
    return was


class IdentityProcessor:
    """What diffusers' `Attention` does around its attention, and the values in the place of it."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, *args: Any, temb: Tensor | None = None, **more: Any
    ) -> Tensor:  # `temb` by name: the library warns of what it finds no name for, and leaves it out
        residual, shape = hidden_states, hidden_states.shape
        h = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        if h.ndim == 4:
            h = h.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            h = attn.group_norm(h.transpose(1, 2)).transpose(1, 2)
        for layer in (attn.to_v, *attn.to_out):  # a projection and dropout
            h = layer(h)
        if len(shape) == 4:
            h = h.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            h = h + residual
        out: Tensor = h / attn.rescale_output_factor
        return out
