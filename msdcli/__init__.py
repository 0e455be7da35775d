"""Multi-student distillation: one conditional diffusion teacher, K one-step students."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msdcli.engine.sample import Students, load

__all__ = ["Students", "load"]


def __getattr__(name: str) -> Any:
    """Import the Python interface when it is used: `import msdcli` alone loads no torch."""
    if name in __all__:
        from msdcli.engine import sample

        return getattr(sample, name)
    raise AttributeError(f"module 'msdcli' has no attribute {name!r}")
