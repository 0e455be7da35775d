"""How long measuring a recipe's students takes on this device: samples that are drawn, seen and compared.

Weights are random, of the students' and of the published Inception network's sizes; the samples of the students are
compared with themselves, so that their distance, which is nothing, is checked on the way.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from msdcli.diffusion.generator import Generator
from msdcli.engine import pipeline
from msdcli.engine.bench.fid import save_inception
from msdcli.engine.bench.recipe import build
from msdcli.engine.distributed import device
from msdcli.engine.inputs import dataset
from msdcli.engine.measure.feature_metric import FeatureMetric, by_frechet
from msdcli.engine.measure.features import FeatureExtractor, of_students
from msdcli.engine.measure.rows import MeasurementRows
from msdcli.engine.sample import Students
from msdcli.engine.tracking.events import Report
from msdcli.engine.train.clock import adding
from msdcli.errors import UserError
from msdcli.metrics.inception import TORCHSCRIPT, open_network
from msdcli.partition import Partition
from msdcli.recipe import Recipe
from msdcli.recipe.stages import GeneratorSettings

CLASS_LINES = 10  # of how many single classes a line is timed


def measure(recipe: Recipe, report: Report, *, images: int) -> dict[str, Any]:
    """Return the seconds of each part for so many images, and the device's peak of memory in bytes (None on a CPU)."""
    on, data = device.prepare(recipe), dataset.look(recipe, planning=True)
    _, described = pipeline.networks_on_meta(recipe, data, planning=True)
    student = described[0]
    if len(student.shape) != 3 or student.shape[0] not in (1, 3):
        raise UserError(f"the students of {recipe.name} make {list(student.shape)}, and Inception looks at pictures")
    last, num_classes = recipe.stages[-1], max(student.num_classes, 1)
    assert isinstance(last, GeneratorSettings), "checked with the recipe"
    batch, count = recipe.evaluation.batch, recipe.partition.students
    partition = Partition([list(range(k, num_classes, count)) for k in range(count)], num_classes, "interleaved")
    students = Students([], partition, [str(c) for c in range(num_classes)], on, batch=batch)
    for numbers, net in zip(recipe.sizes, described, strict=True):
        generator = Generator(build(net, on), tuple(last.sigmas))
        for number in numbers:
            students.put(number, generator)
    seconds = dict[str, float]()
    classes = [i % num_classes for i in range(images)]

    with tempfile.TemporaryDirectory() as folder:
        save_inception(Path(folder) / TORCHSCRIPT)
        network = open_network("clean", weights=Path(folder) / TORCHSCRIPT, device=on)
    extractor = FeatureExtractor(network, batch)
    warm = classes[: 2 * batch]
    of_students(students.stream(warm), warm, extractor, report, what="warming up")
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats(on)
    with adding(seconds, "drawn", on):
        for _, drawn in students.stream(classes):
            extractor.as_fed(drawn)
    with adding(seconds, "drawn and seen", on):
        found = of_students(students.stream(classes), classes, extractor, report, what="samples")
    metric = FeatureMetric(network, "fid", network.protocol, by_frechet("fid", on, knows=False))
    asked = {f"class {c}": [c] for c in range(min(CLASS_LINES, num_classes))}
    rows = MeasurementRows(metric, partition, 0, asked=asked, single=False, report=report).of("students", found, found)
    with adding(seconds, "whole line", on):
        distance = next(rows).values["fid"]
    with adding(seconds, "lines of students and classes", on):
        lines = len(list(rows))
    return {
        "recipe": recipe.name,
        "device": device.name_of(on),
        "torch": torch.__version__,
        "images": images,
        "classes": num_classes,
        "students": count,
        "batch": min(batch, students.memory.largest),
        "seconds": seconds,
        "lines": lines,
        "distance_to_itself": distance,
        "peak_bytes": torch.cuda.max_memory_allocated(on) if on.type == "cuda" else None,
    }
