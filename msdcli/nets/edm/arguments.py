"""Constructor arguments of EDM's and EDM2's networks: which there are, and which values can be built."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msdcli.errors import UserError

Check = Callable[[Any], str | None]  # what is allowed, if the value is not


def whole(low: int, high: int) -> Check:
    def check(value: Any) -> str | None:
        allowed = type(value) is int and low <= value <= high
        return None if allowed else f"a whole number from {low} to {high}"

    return check


def number(low: float, high: float) -> Check:
    def check(value: Any) -> str | None:
        allowed = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
        return None if allowed else f"a number from {low:g} to {high:g}"

    return check


def several(item: Check, least: int, most: int) -> Check:
    def check(value: Any) -> str | None:
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            return f"a list of {least} to {most} values"
        problem = next((problem for one in value if (problem := item(one))), None)
        return problem and f"a list, each {problem}"

    return check


def one_of(*names: str) -> Check:
    return lambda value: None if isinstance(value, str) and value in names else f"one of {', '.join(names)}"


def or_none(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


# Wide enough for every published network and its likely successors. What passes is still counted before it is built.
CHECKS: Mapping[str, Check] = {
    "img_resolution": whole(1, 4096),
    "img_channels": whole(1, 1024),
    "label_dim": whole(0, 1_000_000),
    "augment_dim": whole(0, 1024),
    "model_type": one_of("SongUNet", "DhariwalUNet"),
    "model_channels": whole(4, 4096),
    "channel_mult": several(whole(1, 64), 1, 10),
    "channel_mult_emb": or_none(whole(1, 64)),
    "channel_mult_noise": or_none(whole(1, 64)),
    "num_blocks": whole(1, 32),
    "attn_resolutions": several(whole(1, 4096), 0, 16),
    "dropout": number(0, 0.99),
    "label_dropout": number(0, 1),
    "embedding_type": one_of("positional", "fourier"),
    "encoder_type": one_of("standard", "skip", "residual"),
    "decoder_type": one_of("standard", "skip"),
    "resample_filter": several(number(0.001, 1000), 2, 16),
    "label_balance": number(0, 1),
    "concat_balance": number(0, 1),
    "res_balance": number(0, 1),
    "attn_balance": number(0, 1),
    "channels_per_head": whole(1, 4096),
    "clip_act": or_none(number(0.001, 1e9)),
    "logvar_channels": whole(1, 65536),
    "sigma_data": number(1e-6, 1e6),
    "sigma_min": number(0, 1e9),
    "sigma_max": number(0, 1e9),
    "beta_d": number(1e-6, 1e3),
    "beta_min": number(0, 1e3),
    "epsilon_t": number(0, 1),
    "C_1": number(1e-9, 1),
    "C_2": number(0, 1),
    "M": whole(2, 100_000),
}


def checked(arguments: Mapping[str, Any], allowed: Iterable[str], owner: str) -> dict[str, Any]:
    """The arguments with lists as lists. Raises UserError naming the first that is unknown, missing or impossible."""
    allowed = list(allowed)
    for name in ("img_resolution", "img_channels"):
        if name not in arguments:
            raise UserError(f"{owner} needs the argument {name}")
    for name, value in arguments.items():
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, n=1)
            raise UserError(
                f"{owner} has no argument {str(name)[:80]!r}", hint=f"did you mean {near[0]}?" if near else None
            )
        if problem := CHECKS[name](value):
            raise UserError(f"{owner}: {name} is {_short(value)}, it must be {problem}")
    _check_together(arguments, owner)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}


def _check_together(arguments: Mapping[str, Any], owner: str) -> None:
    """Every level halves the resolution, and a filter is centred between two pixels."""
    resolution, levels = arguments["img_resolution"], len(arguments.get("channel_mult", ()))
    if levels and resolution % 2 ** (levels - 1):
        raise UserError(f"{owner}: img_resolution {resolution} cannot be halved {levels - 1} times (channel_mult)")
    if len(arguments.get("resample_filter", ())) % 2:
        raise UserError(f"{owner}: resample_filter has an odd number of taps, it must be even")


def _short(value: Any) -> str:
    """A value from a file, fit to print; containers are not opened, they may be nested without end."""
    return repr(value)[:40] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
