"""Too little memory, in one sentence whatever the library says."""

import errno

import pytest
import torch

from msdcli.errors import FAILED, explain, is_out_of_memory

CUDA = (
    "CUDA out of memory. Tried to allocate 42.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 5.30 GiB is "
    "free. Including non-PyTorch memory, this process has 73.80 GiB memory in use."
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError(CUDA), "out of memory: 42.00 GiB more were asked for, 5.30 GiB of 79.11 GiB are free"),
        (torch.AcceleratorError("CUDA error: out of memory", 2), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1099511627776 bytes."),
            "out of memory: 1,024.00 GiB more were asked for",
        ),
        (
            MemoryError("Unable to allocate 8.00 GiB for an array with shape (2, 3)"),
            "out of memory: 8.00 GiB more were asked for",
        ),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
    ],
)
def test_too_little_memory(error: BaseException, said: str) -> None:
    code, sentence, hint = explain(error)
    assert is_out_of_memory(error) and (code, sentence) == (FAILED, said)
    assert hint is not None and "micro_batch" in hint and "evaluation.batch" in hint
    assert "stages.0.batch" not in hint, "that would change what is learnt"


def test_other_errors_are_not_of_memory() -> None:
    for error in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of range"),
        OSError(2, "x"),
    ):
        assert not is_out_of_memory(error)
