"""Sets of features, one pass each: of real images, of the teacher's samples and of the students', straight from the
generator; what does not change is kept on disk by the hash of what it depends on.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msdcli.data.base import Dataset, user_cache
from msdcli.data.images import to_uint8
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.device_batch import DeviceBatch
from msdcli.engine.checkpoints.tensors import load_tensors
from msdcli.engine.distributed.cores import side_by_side
from msdcli.engine.inputs.autoencoder import Decode
from msdcli.engine.inputs.pairs import Pairs, labels_for
from msdcli.engine.pictures import Drawn, labels_file, save_pngs
from msdcli.engine.tracking.events import Progress, Report
from msdcli.errors import MissingFileError, UserError
from msdcli.metrics.batches import ImageBatch
from msdcli.metrics.evaluate import FeatureSet, cache_key, collect
from msdcli.metrics.inception import FeatureNetwork
from msdcli.metrics.moments import Gaussian
from msdcli.metrics.reference import cleanfid_statistics, read_statistics, takes_statistics
from msdcli.rundir import key, lock, writing

FILE = "features.npz"
FORMAT = 3  # of features: another number where the code makes others of the same images
STEP = 500  # images of a data set, or samples of the teacher, held at once


@dataclass(frozen=True)
class FeatureExtractor:
    """The network that measures, and how: the batch size, and whether single features are kept or only moments."""

    network: FeatureNetwork
    batch: int
    keep: bool = True
    memory: DeviceBatch = field(default_factory=DeviceBatch)

    def collect(self, images: Iterator[ImageBatch]) -> FeatureSet:
        return collect(images, self.network, batch_size=self.batch, keep_features=self.keep, memory=self.memory)

    def as_fed(self, images: Tensor) -> Tensor:
        """Samples in [-1, 1] as the network wants them: with the pixels of a saved PNG, or untouched."""
        return images if self.network.floats else to_uint8(images)

    def key(self, *parts: object) -> str:
        """Name features by all that they depend on: the code (FORMAT), the network (its protocol and weights), whether
        single ones are kept or moments alone, and, in `parts`, the images. Batch, device and the version of torch move
        their last bits alone.
        """
        return key("features", FORMAT, self.network.record(), self.keep, *parts)


def of_data(data: Dataset, numbers: Sequence[int], extractor: FeatureExtractor) -> FeatureSet:
    """Features of the data's images with these numbers."""
    return extractor.collect(
        (extractor.as_fed(data.images(part)), data.labels(part).numpy())
        for part in (numbers[i : i + STEP] for i in range(0, len(numbers), STEP))
    )


def of_teacher(
    source: Pairs, teacher: Denoiser, count: int, extractor: FeatureExtractor, report: Report, decode: Decode
) -> FeatureSet:
    """Features of `count` samples of the teacher: its pairs, and more from the same rule where they are too few."""
    samples, memory = _teacher_samples(source, teacher, count, extractor.batch, report), DeviceBatch(report)
    step = min(STEP, extractor.batch)
    return extractor.collect(
        (extractor.as_fed(memory.map(decode, y)), classes.numpy()) for y, classes in _in_steps(samples, step)
    )


def _in_steps(samples: Iterator[tuple[Tensor, Tensor]], step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut batches down to what is held at once: decoded, a shard of latents may not fit."""
    for y, classes in samples:
        yield from zip(y.split(step), classes.split(step), strict=True)


def _teacher_samples(
    source: Pairs, teacher: Denoiser, count: int, batch: int, report: Report
) -> Iterator[tuple[Tensor, Tensor]]:
    done, memory = 0, DeviceBatch(report)
    report(Progress("teacher samples", 0, count, "images"))
    for path, _ in source.shards():
        if done >= count or not path.exists():
            break
        stored, _ = load_tensors(path)
        y, classes = stored["y"][: count - done], stored["c"][: count - done]
        done += len(y)
        yield y, classes

    def draw(numbers: range) -> tuple[Tensor, Tensor]:
        classes = labels_for(source.data, numbers)
        z, u = source.noise(numbers), source.uniform(numbers)
        return source.sample(teacher, z, classes, u, numbers, batch=batch, memory=memory), classes

    left = [range(start, min(start + STEP, count)) for start in range(done, count, STEP)]
    for numbers, drawn in zip(left, side_by_side(draw, left, source.at_once(teacher)), strict=True):
        yield drawn
        report(Progress("teacher samples", numbers.stop, count, "images"))


def of_students(
    drawn: Drawn, classes: Sequence[int], extractor: FeatureExtractor, report: Report, *, what: str
) -> FeatureSet:
    """Features of samples as they are drawn; no more than a batch of images is held."""
    labels = np.asarray(classes)

    def batches() -> Iterator[ImageBatch]:
        done = 0
        report(Progress(what, 0, len(labels), "images"))
        for positions, images in drawn:
            yield extractor.as_fed(images), labels[positions]
            done += len(positions)
            report(Progress(what, done, len(labels), "images"))

    return extractor.collect(batches())


def saving(drawn: Drawn, classes: Sequence[int], first: int, folder: Path) -> Drawn:
    """Pass samples on, and at the end write the first so many as PNGs."""
    kept: dict[int, Tensor] = {}
    for positions, images in drawn:
        kept |= {i: image.cpu() for i, image in zip(positions, images, strict=True) if i < first}
        yield positions, images
    order = sorted(kept)
    if order:
        images = torch.stack([kept[i] for i in order])
        save_pngs(folder, [(range(len(order)), images)], labels_file([classes[i] for i in order]))


# What is kept on disk.


def cached(folder: Path, make: Callable[[], FeatureSet], report: Report, *, of: str) -> FeatureSet:
    """Read the features `of` something in `folder`, or make and keep them; one process makes them, others wait."""
    path = folder / FILE
    with lock(folder, f"the features of the {of}", wait=report):
        if path.is_file():
            try:
                with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                    return FeatureSet.from_arrays(arrays)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                report(f"{path} is damaged: it is made again")
        arrays = make().to_arrays()
        with writing(path) as temporary, open(temporary, "wb") as target:
            np.savez(target, **arrays)  # type: ignore[arg-type]  # names of arrays, none of them an option
    return FeatureSet.from_arrays(arrays)  # as it will be read, so that the second figure has the first one's bits


def of_reference(
    name: str, network: FeatureNetwork, *, batch: int, workers: int, report: Report
) -> FeatureSet | Gaussian:
    """Statistics of a reference: published ones as they are, images by one pass that is kept in the user's cache.

    UserError, before anything is sampled, for what cannot be read or is of other features.
    """
    path = find_reference(name)
    if takes_statistics(path, network.protocol):
        statistics = read_statistics(path, network.protocol)
        _refuse_other_features(path, statistics, network)
        return statistics

    named = cache_key(path, network)

    def make() -> FeatureSet:
        found = collect(path, network, batch_size=batch, workers=workers, memory=DeviceBatch(report))
        if cache_key(path, network) != named:
            raise UserError(f"{path} changed while it was measured", hint="the same command again")
        return found

    folder = user_cache() / f"features-{named[:32]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        report(f"the reference's features are not kept: {folder} cannot be made ({error.strerror})")
        return make()
    return cached(folder, make, report, of="reference")


def find_reference(name: str) -> Path:
    """Return the file or folder called `name`, or clean-fid's statistics of that name."""
    path = Path(name)
    if path.exists():
        return path
    if path.suffix or len(path.parts) != 1:
        raise MissingFileError(
            f"The reference {name} does not exist.", hint="A folder, zip or npz of images, or statistics."
        )
    return cleanfid_statistics(name)


@torch.no_grad()
def _refuse_other_features(path: Path, statistics: Gaussian, network: FeatureNetwork) -> None:
    probe = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=network.device)
    dimension = network.features(probe).shape[1]
    if dimension != len(statistics.mean):
        raise UserError(
            f"{path} has {len(statistics.mean)} dimensions, the features of {network.protocol} have {dimension}.",
            hint="Take the statistics of this protocol, or the protocol of these statistics.",
        )
