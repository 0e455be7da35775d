"""Measure pictures in files: a folder, a zip or an npz against a reference, under a published protocol."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msdcli.data.opening import Images, content_hash, open_images
from msdcli.diffusion.device_batch import DeviceBatch
from msdcli.diffusion.float32 import EXACT
from msdcli.engine.distributed import group as distributed
from msdcli.engine.distributed import launcher
from msdcli.engine.distributed.device import local_device
from msdcli.engine.measure import features, groups
from msdcli.engine.measure.feature_metric import FidOptions
from msdcli.engine.measure.rows import MAX_CLASSES, Measurement, Row, left_out
from msdcli.engine.tracking.events import Progress, Report
from msdcli.errors import MissingFileError, UserError, WrongValueError
from msdcli.metrics.batches import drawn_numbers
from msdcli.metrics.evaluate import FeatureSet, collect
from msdcli.metrics.inception import FeatureNetwork, open_network
from msdcli.metrics.reference import check_protocol, has_images, is_statistics, notes, takes_statistics

BATCH = 64
MAX_LISTED = 1000  # numbers of pictures that a record lists


@dataclass(frozen=True)
class Request:
    """What is compared with what, after all that can be checked cheaply has been."""

    images: Path
    reference: str
    options: FidOptions
    groups: groups.Groups
    count: int
    have: int  # images there are to take `count` of
    network: FeatureNetwork


def check(images: Path, reference: str | None, options: FidOptions) -> Request:
    """Open both sides and the network. UserError for what is missing, empty, or of fewer images than asked for."""
    if not images.exists():
        raise MissingFileError(f"{images} does not exist", hint="a run directory, or a folder, zip or npz of images")
    if is_statistics(images) and not has_images(images):
        raise UserError(f"{images} holds statistics and no images", hint="statistics are the second argument")
    with closing(open_images(images)) as source:
        have, classes = len(source), _classes(source)
    if reference is None:
        raise UserError(f"{images} is compared with what?", hint=f"msd fid {images} REFERENCE")
    if options.protocol == "data" or options.save:
        what = "--protocol data" if options.protocol == "data" else "--save"
        raise UserError(f"{what} is for a run directory; {images} holds pictures")
    if (options.samples or 1) > have:
        raise WrongValueError(
            f"{images} holds {have} images, fewer than the {options.samples} asked for",
            hint="a FID of fewer images is another figure: ask for fewer",
        )
    path, protocol = features.find_reference(reference), options.protocol or "clean"
    theirs: set[int] = set()
    if takes_statistics(path, protocol):
        check_protocol(path, protocol)
    else:
        with closing(open_images(path)) as source:
            theirs = _classes(source)
    if options.groups and not classes & theirs:
        raise UserError("groups: both sides must be images with labels", hint="a dataset.json beside them")
    where = local_device(options.device or "auto")
    network = open_network(protocol, weights=options.weights, device=where)
    asked = groups.parse(options.groups, classes & theirs)
    return Request(images, reference, options, asked, options.samples or have, have, network)


def compare(request: Request, report: Report) -> dict[str, Any] | None:
    """Return every figure as plain data; the key of the distance is `fid`. The reference comes first: it is kept.

    Under torchrun every process takes its share of the images; the first has the result, the others None.
    """
    options, network = request.options, request.network
    batch, workers = options.batch or BATCH, options.workers
    theirs = features.of_reference(request.reference, network, batch=batch, workers=workers, report=report)
    share = launcher.share()
    part = collect(
        request.images,
        network,
        batch_size=batch,
        workers=workers,
        limit=options.samples,
        seed=options.seed or 0,
        keep_features=not options.lean,
        share=share,
        memory=DeviceBatch(report),
    )
    mine = distributed.gather_features(part, share)
    if mine is None:
        return None
    single = _single(mine, theirs)
    if len(single) > MAX_CLASSES and not options.per_class:
        report(left_out(len(single)))
        single = {}
    result = mine.summary(
        theirs,
        groups=request.groups | single,
        replicates=options.bootstrap or 0,
        extrapolate=options.infinity,
        device=network.device,
        progress=lambda done, total: report(Progress("groups and classes", done, total, "lines")),
    )
    path = features.find_reference(request.reference)
    said, more = notes(path, network.protocol)
    warnings = result["warnings"] + more
    for warning in warnings:
        report(warning)
    sides = {
        "images": str(request.images),
        "images_sha256": content_hash(request.images),
        "reference": request.reference,
        "reference_sha256": content_hash(path),
        **_drawn(request),
        "computed_in": {"features": EXACT},
    }
    return result | {
        "protocol": network.protocol,
        "warnings": warnings,
        "record": result["record"] | sides | said,
    }


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """Return the distance under the names that a run's has, for scripts."""
    interval = result["intervals"].get("fid")
    return {"value": result["fid"], "metric": "fid", "interval": interval, "teacher": None, "halves": None}


def _drawn(request: Request) -> dict[str, Any]:
    """Which pictures were taken, where not all were: the seed, and the numbers of the files sorted by name."""
    if request.count == request.have:
        return {}
    seed = request.options.seed or 0
    numbers = drawn_numbers(request.have, request.count, seed)
    sha256 = hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()
    drawn = {"seed": seed, "of": request.have, "numbers_sha256": sha256}
    return {"drawn": drawn | ({"numbers": numbers.tolist()} if len(numbers) <= MAX_LISTED else {})}


def measurement(request: Request, report: Report) -> Measurement:
    """Return the same figures in the form that a run's have; the line of the whole is `images`."""
    result = compare(request, report)
    assert result is not None, "one process alone has the result"
    values = {name: value for name, value in result.items() if isinstance(value, float)}
    counts = result["record"]["count"], result["record"]["reference_count"]
    rows = [Row("images", "whole", *counts, values, result["intervals"])]
    rows += [
        Row("images", name, group["count"], group["reference_count"], {"fid": group["fid"]})
        for name, group in result["groups"].items()
        if group["fid"] is not None
    ]
    return Measurement("fid", result["protocol"], rows, result["record"] | {"warnings": result["warnings"]})


def _classes(source: Images) -> set[int]:
    return set() if source.labels is None else {int(c) for c in source.labels} - {-1}


def _single(mine: FeatureSet, theirs: Any) -> groups.Groups:
    """A group for each class that both sides label."""
    if not isinstance(theirs, FeatureSet):
        return {}
    both = sorted((mine.moments.classes.keys() & theirs.moments.classes.keys()) - {-1})
    return {f"class {c}": [c] for c in both}
