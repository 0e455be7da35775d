"""Features of the diffusers library's networks, for discriminator heads: what named blocks of the encoder give.

The library's own forward runs up to the last block that is asked for and is left there, so that features are the
network's own whatever its options, and neither decoder nor output runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from msdcli.errors import UserError


class _EnoughError(Exception):
    """The last block that is asked for has run."""


def blocks(net: nn.Module) -> dict[str, nn.Module]:
    """Return the encoder's blocks by name: of a U-Net `down_0` ... and `middle`, of a DiT `block_0` ..."""
    if hasattr(net, "transformer_blocks"):
        return {f"block_{i}": block for i, block in enumerate(net.get_submodule("transformer_blocks").children())}
    found = {f"down_{i}": block for i, block in enumerate(net.get_submodule("down_blocks").children())}
    middle = getattr(net, "mid_block", None)
    return found if middle is None else found | {"middle": middle}


def features(net: nn.Module, run: Callable[[], Any], taps: Sequence[str], *, grid: tuple[int, int]) -> list[Tensor]:
    """Return the outputs of the blocks `taps` while `run` calls the network, [n, channels, h, w] each.

    The tokens of a transformer are laid out on `grid`, its rows and columns. UserError for names it does not have.
    """
    known = blocks(net)
    unknown = [tap for tap in taps if tap not in known]
    if unknown or not taps:
        raise UserError(f"taps {unknown or 'missing'}: this network has {', '.join(known)}")
    found: dict[str, Tensor] = {}
    last = max(taps, key=[*known].index)

    def keep(name: str, output: Any) -> None:
        found[name] = output[0] if isinstance(output, tuple) else output  # a U-Net's block gives its skips too
        if name == last:
            raise _EnoughError

    hooks = [known[t].register_forward_hook(lambda _, __, output, t=t: keep(t, output)) for t in {*taps}]
    try:
        run()
    except _EnoughError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [_on_grid(found[tap], grid) for tap in taps]


def _on_grid(feature: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay tokens [n, rows x columns, channels] out as [n, channels, rows, columns]; others stay as they are."""
    return feature if feature.ndim == 4 else feature.transpose(1, 2).unflatten(2, grid)
