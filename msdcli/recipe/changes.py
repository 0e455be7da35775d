"""In what two recipes differ, and which of it a run that goes on may."""

from __future__ import annotations

from typing import Any

# Keys that may change when a run resumes: nothing that is trained depends on them.
FREE_KEYS = (
    *("name", "run", "workers", "checkpoint_seconds", "evaluation", "device"),
    *("keep", "max_skipped", "micro_batch", "fsdp", "loggers", "compile", "deterministic"),
)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the dotted keys in which two dumped recipes differ and a resumed run may not.

    It may go on with more steps of its last stage, or with more stages after it.
    """
    before, after = old["stages"], new["stages"]
    if len(after) > len(before):
        begun = after[: len(before)]
        return differences(old, new | {"stages": begun}) if not _bound(before, begun) else ["stages"]
    found = _bound(old, new)
    last = f"stages.{len(after) - 1}.steps"
    if last in found and len(before) == len(after) and value_at(new, last) > value_at(old, last):
        found.remove(last)
    return found


def _bound(old: Any, new: Any) -> list[str]:
    """Return the dotted keys in which two trees differ, without those that may change."""
    found = (key.split(".") for key in differing(old, new))
    return [".".join(words) for words in found if words[0] not in FREE_KEYS and words[-1] != "log_every"]


def differing(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys in which two trees of plain data differ; lists of two lengths differ as a whole."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in differing(old.get(k), new.get(k), f"{prefix}{k}.")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differing(a, b, f"{prefix}{i}.")]
    return [] if old == new else [prefix.rstrip(".")]


def value_at(tree: Any, dotted: str) -> Any:
    """Return the value at a dotted key of plain data."""
    for key in dotted.split("."):
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree
