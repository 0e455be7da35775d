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
        (torch.AcceleratorError("an asynchronous failure of another wording", 2), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`"), "out of memory"),
        (RuntimeError("GET was unable to find an engine to execute this computation"), "out of memory"),
        (RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory."), "out of memory"),
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


def test_what_is_free_is_asked_of_the_device_where_the_error_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries name neither number; on a CPU nothing is asked."""
    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**28, 24 * 2**30))
    assert explain(error)[1] == "out of memory: 0.75 GiB of 24.00 GiB are free"

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert explain(error)[1] == "out of memory"


def test_other_errors_are_not_of_memory() -> None:
    for error in (
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of range"),
        OSError(2, "x"),
    ):
        assert not is_out_of_memory(error)
