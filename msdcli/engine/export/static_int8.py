"""Layers that compute in 8 bits: onnxruntime's static quantisation of weights and of what goes in and out.

A student is only ever asked at its own noise levels, so the ranges of what its layers see are measured there: on its
own classes and fresh noise, through all of its steps, each of which has ranges of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from msdcli.noise import image_noise, step_noise
from msdcli.seeds import derive

IMAGES, BATCH = 256, 64  # that ranges are measured on
LAYERS = ["Conv", "ConvTranspose", "Gemm", "MatMul"]

Inputs = Mapping[str, np.ndarray]


def calibration(shape: tuple[int, ...], steps: int, classes: Sequence[int], number: int) -> list[Inputs]:
    """Return batches of inputs of student `number`, which owns `classes`; none of its noise is that of any sample."""
    seed, found = derive("calibration", number), list[Inputs]()
    for first in range(0, IMAGES, BATCH):
        numbers = range(first, first + BATCH)
        labels = np.asarray([classes[i % len(classes)] for i in numbers], np.int64)
        inputs = {"z": image_noise(seed, numbers, shape).numpy(), "labels": labels}
        if (noise := step_noise(seed, numbers, shape, steps)) is not None:
            inputs["noise"] = noise.numpy()
        found.append(inputs)
    return found


def quantize(source: Path, target: Path, batches: Sequence[Inputs]) -> None:
    """Write the graph at `source` with layers in int8, weights with a scale per output channel, to `target`."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> Any:
            return next(self.left, None)

    with _quietly():
        quantization.quantize_static(
            source,
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=LAYERS,
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the library's advice about itself from the user's screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
