"""Fewer images at once where memory is short: the same results, said once."""

import pytest
import torch

from msdcli.diffusion.device_batch import DeviceBatch

X = torch.arange(20.0).reshape(10, 2)


class Small:
    """A device that holds so many images."""

    def __init__(self, room: int, error: Exception | None = None) -> None:
        self.room, self.error, self.asked = room, error or torch.OutOfMemoryError("CUDA out of memory."), list[int]()

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(x))
        if len(x) > self.room:
            raise self.error
        return x + y


@pytest.mark.parametrize("room", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("batch", [None, 1, 4, 10, 99])
def test_results_do_not_depend_on_it(room, batch):
    said, device = [], Small(room)
    memory = DeviceBatch(said.append)
    for _ in range(2):
        assert torch.equal(memory.map(device, X, 10 * X, batch=batch), 11 * X)
    assert max(device.asked) <= min(batch or 10, 10)
    assert len(said) == (min(batch or 10, 10) > room), "once"
    first = device.asked.index(1) if room == 1 else None
    assert first is None or set(device.asked[first:]) == {1}, "what did not fit is not tried again"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8.00 GiB for an array"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)."),
    ],
)
def test_every_form_of_too_little_memory(error):
    said = []
    assert torch.equal(DeviceBatch(said.append).map(Small(3, error), X, X), 2 * X)
    assert "going on with 5" in said[0]


def test_one_image_that_does_not_fit_and_other_errors_are_raised():
    with pytest.raises(torch.OutOfMemoryError):
        DeviceBatch(lambda _: None).map(Small(0), X, X)
    device = Small(3, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        DeviceBatch().map(device, X, X)
    assert device.asked == [10]


def test_no_image_is_a_call_of_none():
    assert DeviceBatch().map(Small(3), X[:0], X[:0]).shape == (0, 2)
