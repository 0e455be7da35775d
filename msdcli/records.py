"""The records of a run as they are read: every file of JSON that msd keeps has its shape here, checked for all verbs.

What is not named here may be in a record too and stays as it is; an older version's records lack what is NotRequired.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # which pydantic needs before Python 3.12, and brings

from msdcli.errors import UserError
from msdcli.rundir import parsed_lines, read_json

_LOOSE = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
Whole = Annotated[int, Field(ge=0, le=2**62)]
Size = Annotated[int, Field(ge=1, le=2**31)]
Figure = Annotated[float, Field(ge=0)]


@with_config(_LOOSE)
class Cost(TypedDict):
    """What a part of a run has taken."""

    seconds: Figure
    images: Figure
    flops: Figure
    peak_bytes: Figure


@with_config(_LOOSE)
class Selected(TypedDict):
    """Which average a student is, where several were measured."""

    step: Whole
    metric: str
    value: float | None
    samples: Whole
    of: Whole
    seconds: Figure


@with_config(_LOOSE)
class Adapter(TypedDict):
    """What adapters are and which network they belong to."""

    rank: Size
    alpha: float | None
    base_sha256: str | None


@with_config(_LOOSE)
class Model(TypedDict):
    """model.json of a teacher or a student."""

    network: dict[str, Any]
    shape: Annotated[list[Size], Field(min_length=1, max_length=4)]
    num_classes: Annotated[int, Field(ge=0, le=2**31)]
    sigma_data: Annotated[float, Field(gt=0, le=1e6)]
    parameters: NotRequired[Whole]
    sha256: NotRequired[str]
    adapter: NotRequired[Adapter]
    anchor: NotRequired[Annotated[float, Field(ge=0, le=10_000)]]
    steps: NotRequired[Whole]
    stage: NotRequired[dict[str, Any]]
    cost: NotRequired[Cost | None]
    selected: NotRequired[Selected]
    text_sha256: NotRequired[str]


@with_config(_LOOSE)
class Trained(TypedDict):
    """What model.json says beside that of what was trained here."""

    parameters: Whole
    sha256: str
    steps: Whole


@with_config(_LOOSE)
class Embedded(TypedDict):
    """The record of embedded prompts."""

    count: Whole
    dtype: Literal["float16", "float32"]
    shapes: list[list[Size]]


@with_config(_LOOSE)
class Decoded(TypedDict):
    """The record of decoded pictures."""

    skipped: dict[str, str]


@with_config(_LOOSE)
class Precision(TypedDict):
    """What was chosen for the whole run."""

    chosen: Literal["float32", "bf16"]


@with_config(_LOOSE)
class Run(TypedDict):
    """run.json."""

    commands: list[Any]
    versions: NotRequired[dict[str, str]]
    class_names: NotRequired[list[str]]
    shape: NotRequired[list[Size]]
    data: NotRequired[str]
    teacher: NotRequired[str]
    precision: NotRequired[Precision]


@with_config(_LOOSE)
class Interval(TypedDict):
    low: float
    high: float


@with_config(_LOOSE)
class Row(TypedDict):
    """One line of a measurement."""

    who: str
    group: Annotated[str, Field(min_length=1)]
    samples: NotRequired[Whole]
    reference: NotRequired[Whole | None]
    values: dict[str, float]
    intervals: NotRequired[dict[str, Interval]]


@with_config(_LOOSE)
class Measured(TypedDict):
    """metrics/NAME.json."""

    metric: str
    protocol: str
    rows: list[Row]
    samples: Whole
    students_sha256: NotRequired[list[str]]
    teacher_sha256: NotRequired[str]
    network: NotRequired[dict[str, Any]]
    warnings: NotRequired[list[Any]]


@with_config(_LOOSE)
class WatchedStudent(TypedDict):
    number: Whole
    step: Whole
    value: float | None


@with_config(_LOOSE)
class Watched(TypedDict):
    """A line of metrics/watch.jsonl."""

    metric: str
    protocol: str
    students: Annotated[dict[Annotated[str, Field(pattern=r"^\d+$")], WatchedStudent], Field(min_length=1)]
    whole: float | None


@with_config(_LOOSE)
class CandidateRecord(TypedDict):
    step: Whole
    value: float | None
    seconds: Figure


@with_config(_LOOSE)
class Candidates(TypedDict):
    """candidates.json of a stage that selects."""

    measured: dict[str, Any]
    candidates: list[CandidateRecord]


@with_config(_LOOSE)
class MixedWith(TypedDict):
    """A class that another is mixed up with, and how much: the mean probability that each gives to the other."""

    number: Whole
    share: Figure


@with_config(_LOOSE)
class Evidence(TypedDict):
    """What placed the classes, in their order; `origins` are the students', where a run was extended."""

    distances: NotRequired[list[Figure]]
    mixed_with: NotRequired[list[list[MixedWith]]]
    origins: NotRequired[list[str]]


@with_config(_LOOSE)
class PartitionRecord(TypedDict):
    """partition.json."""

    method: str
    num_conditions: Whole
    parts: list[list[Whole]]
    rule: NotRequired[dict[str, Any]]
    evidence: NotRequired[Evidence]


@with_config(_LOOSE)
class Bundle(TypedDict):
    """bundle.json."""

    class_names: list[str]
    embeddings: NotRequired[Literal["float16", "float32"]]


@with_config(_LOOSE)
class ChosenNetwork(TypedDict):
    network: dict[str, Any]


@with_config(_LOOSE)
class Searched(TypedDict):
    """student.json: the network that was found."""

    chosen: ChosenNetwork


@with_config(_LOOSE)
class CountedSize(TypedDict):
    students: NotRequired[list[Whole]]
    stages: list[Figure]


@with_config(_LOOSE)
class Counted(TypedDict):
    """flops.json; `stages` are those of a run whose students had no sizes yet."""

    teacher: Figure
    sizes: NotRequired[Annotated[list[CountedSize], Field(min_length=1)]]
    stages: NotRequired[list[Figure]]


@with_config(_LOOSE)
class Latency(TypedDict):
    """Seconds of a request of one image, and of each image of a batch of 64."""

    request: Annotated[float, Field(gt=0)]
    image: Annotated[float, Field(gt=0)]


@with_config(_LOOSE)
class FrontierSize(TypedDict):
    """A size of network in a frontier."""

    label: str
    parameters: Whole
    share: Annotated[float, Field(gt=0)]
    latency: Latency
    saturated: Whole | None
    set: dict[str, Any]
    recipe: str


@with_config(_LOOSE)
class FrontierLine(TypedDict):
    """A line of a frontier: what was trained, what it took, and the distance of every seed."""

    size: str
    students: Size
    devices: Size
    doubling: Whole
    budget: Annotated[float, Field(gt=0)]
    memory: Whole
    seconds: Annotated[list[Figure], Field(min_length=1)]
    reduced_bytes: Figure
    seeds: Annotated[list[Whole], Field(min_length=1)]
    distances: Annotated[list[Figure], Field(min_length=1)]
    keys: dict[str, Any]


@with_config(_LOOSE)
class FrontierMachine(TypedDict):
    name: str
    threads: Size
    torch: str


@with_config(_LOOSE)
class FrontierTeacher(TypedDict):
    network: dict[str, Any]
    latency: Latency
    evaluations: Size
    distance: Figure


@with_config(_LOOSE)
class Frontier(TypedDict):
    """frontier.json: what a sweep found of distance against latency, budget and memory."""

    sweep: str
    data: dict[str, Any]
    metric: str
    samples: Whole
    machine: FrontierMachine
    teacher: FrontierTeacher
    floor: dict[str, Figure]
    sizes: Annotated[list[FrontierSize], Field(min_length=1)]
    lines: Annotated[list[FrontierLine], Field(min_length=1)]
    open: list[str]


def frontier(path: Path) -> dict[str, Any]:
    """Read frontier.json; every line is of a size that it describes."""
    found = read(path, Frontier, "frontier")
    sizes = {size["label"] for size in found["sizes"]}
    if other := next((line["size"] for line in found["lines"] if line["size"] not in sizes), None):
        raise UserError(f"{path} is no frontier that msd wrote: no size is called {other[:80]!r}")
    return found


@functools.cache
def _adapter(shape: type) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def read(path: Path, shape: type, what: str) -> dict[str, Any]:
    """Return a record as it is. UserError, which names the file and the place in it, where it has another shape."""
    found = read_json(path)
    try:
        _adapter(shape).validate_python(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        said = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(
            f"{path} is no {what} that msd wrote: {where[:80]}: {said}", hint="was it edited? bring it back as it was"
        ) from None
    return dict(found)


def model(path: Path) -> dict[str, Any]:
    """Read the model.json of a teacher or a student."""
    return read(path, Model, "description of a network")


def trained(path: Path) -> dict[str, Any]:
    """Read the model.json of a teacher or a student that was trained here."""
    return model(path) | read(path, Trained, "description of a trained network")


def text_hash(path: Path) -> str:
    """Return the hash of a teacher's text encoder, from its model.json. UserError where it reads no text."""
    found: str | None = model(path).get("text_sha256")
    if found is None:
        raise UserError(f"{path} names no text_sha256: the teacher reads no prompts")
    return found


def run(path: Path) -> dict[str, Any]:
    """Read run.json."""
    return read(path, Run, "record of a run")


def class_names(path: Path, count: int) -> list[str]:
    """Read the names of a run's or a bundle's `count` classes."""
    found = run(path) if path.name == "run.json" else read(path, Bundle, "bundle")
    names: list[str] = found.get("class_names", [])
    if len(names) != count:
        raise UserError(f"{path} names {len(names)} classes, partition.json divides {count}")
    return names


HEADLINE = ("value", "metric", "interval", "teacher", "halves")  # the figure of a measurement, at the top of its JSON


def measurement(path: Path) -> dict[str, Any]:
    """Read a measurement; rows of the first versions of msd have no intervals."""
    found = read(path, Measured, "measurement")
    for row in found["rows"]:
        if row["group"] == "whole" and row["who"] in ("students", "teacher") and found["metric"] not in row["values"]:
            raise UserError(f"{path} is no measurement that msd wrote: the {row['who']} have no {found['metric']}")
    known = {"intervals": {}, "reference": None, "samples": found["samples"]}
    return found | {"rows": [known | row for row in found["rows"]]}


def watched(path: Path) -> list[dict[str, Any]]:
    """Return the lines of watch.jsonl; what is damaged is left out."""
    return [line for line in parsed_lines(path) if line is not None and _fits(line, Watched)]


def _fits(value: Any, shape: type) -> bool:
    try:
        _adapter(shape).validate_python(value)
    except ValidationError:
        return False
    return True
