"""What a GPU multiplies float32 numbers in: in TF32 (10 bits of mantissa, sums in float32), or in float32 itself.

Networks train, and samples are drawn, in TF32, in products as in convolutions: a sample moves by about 1e-3, less than
a step of 8-bit pixels, and takes a third of the time or less. Features are measured in float32, so that a figure is
that of a CPU. On other devices, and on GPUs before Ampere, float32 is float32 everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

FAST, EXACT = "tf32", "float32"
AMPERE = (8, 0)  # the first compute capability that has TF32


@contextmanager
def fast_float32(*, deterministic: bool = False) -> Iterator[None]:
    """Multiply in TF32 in the block, and let cuDNN try which of its kernels is fastest for the shapes it meets.

    With `deterministic` it tries nothing and takes kernels whose sums have one order, so that the same work gives the
    same bits (cuBLAS too, where it was not used before in this process). All is given back as it was.
    """
    with _set(tf32=True, benchmark=not deterministic, deterministic=deterministic):
        if not deterministic:
            yield
            return
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def exact_float32() -> Iterator[None]:
    """Multiply in float32 in the block; given back as it was."""
    with _set(tf32=False, benchmark=True, deterministic=False):
        yield


@contextmanager
def _set(*, tf32: bool, benchmark: bool, deterministic: bool) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = tf32, tf32, benchmark, deterministic
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before


def fast_name(device: torch.device) -> str:
    """Return what `fast_float32` multiplies in on a device: tf32 or float32."""
    has = device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE
    return FAST if has else EXACT


def record(device: torch.device) -> dict[str, str]:
    """Return what a measurement's samples and features were multiplied in, for its file."""
    return {"samples": fast_name(device), "features": EXACT}
