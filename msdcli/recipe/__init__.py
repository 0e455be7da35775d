"""The recipe: everything a run depends on, as one checked YAML file.

`load` reads YAML, applies `key=value` overrides and reports every mistake at once, each with its line. All keys of all
objectives, data sets and networks are in this folder, so that a recipe is checked, completed and documented without
importing torch.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from msdcli import recipe_yaml
from msdcli.errors import MissingFileError, UserError, WrongValueError
from msdcli.recipe.data import Data, NoDataSettings, PromptsSettings
from msdcli.recipe.section import Batch, FilePath, Section, Seed
from msdcli.recipe.solver import STOCHASTIC
from msdcli.recipe.stages import Stages
from msdcli.recipe.student import StudentSettings
from msdcli.recipe.teacher import TeacherSettings

NAME = r"^[\w][\w.-]*$"  # of a run: a folder's name everywhere, and no option of a command


class LatentSettings(Section):
    """The data encoded once, where the teacher is a latent model."""

    posterior: Literal["sample", "mean"] = Field(
        "sample", description="a latent drawn once for every image, as the teacher saw them in training, or its mean"
    )
    seed: Seed = Field(0, description="seed of `sample`")
    dtype: Literal["float16", "float32"] = Field("float16", description="how mean and standard deviation are kept")
    batch: Batch = Field(32, description="images encoded at once")


class PartitionSettings(Section):
    """Which student owns which condition."""

    students: int = Field(1, ge=1, le=100_000, description="number of students, K")
    method: Literal["consecutive", "random", "kmeans", "difficulty", "confusion", "explicit", "extend", "quadrants"] = (
        Field(
            "consecutive",
            description="how the conditions are divided: as numbered, at random, alike ones together (kmeans; "
            "confusion: those that the data's classifier mixes up), by how hard they are (difficulty, as `order` "
            "says), as `parts` says, or as in a finished run whose students are kept (extend); "
            "prompts: quadrants or kmeans (of pooled embeddings), or random",
        )
    )
    run: FilePath | None = Field(
        None,
        min_length=1,
        description="difficulty: a finished run of the same classes, of one student say, whose distance of every class "
        "says how hard it is; extend: the one whose students are kept as they are, beside new ones for classes that it "
        "does not have",
    )
    retrain: list[Annotated[int, Field(ge=0, lt=10**9)]] = Field(
        [], max_length=100_000, description="extend: students of that run that are trained anew, e.g. [2]"
    )
    features: Literal["embedding", "images"] = Field(
        "embedding", description="kmeans: cluster the teacher's class embeddings or the mean image of each class"
    )
    order: Literal["balanced", "sorted"] = Field(
        "balanced",
        description="difficulty: hard and easy classes shared out evenly, or sorted, the easiest to the first student "
        "and the hardest to the last, as for students of different sizes",
    )
    seed: Seed = Field(0, description="seed of `random`, `kmeans` and `confusion`")
    parts: list[list[Annotated[int, Field(ge=0, lt=10**9)]]] | None = Field(
        None, description="explicit: the classes of each student, e.g. [[0, 1], [2, 3]]"
    )

    @model_validator(mode="after")
    def _keys_go_with_methods(self) -> PartitionSettings:
        if (self.method == "explicit") != (self.parts is not None):
            raise ValueError("`parts` and `method: explicit` go together")
        if (self.method in ("difficulty", "extend")) != (self.run is not None):
            raise ValueError("`run` and `method: difficulty` or `extend` go together")
        if self.order != "balanced" and self.method != "difficulty":
            raise ValueError(f"`order: {self.order}` and `method: difficulty` go together")
        if self.retrain and self.method != "extend":
            raise ValueError("`retrain` and `method: extend` go together")
        if self.parts is not None and len(self.parts) != self.students:
            raise ValueError(f"`parts` lists {len(self.parts)} students, `students` says {self.students}")
        return self


class PairSettings(Section):
    """Noise and image pairs of the teacher, for the regression loss."""

    count: int = Field(2048, ge=1, le=10**9, description="number of pairs, made once per teacher")
    seed: Seed = Field(0, description="seed of the noise")
    shard: Batch = Field(1024, description="pairs per file: what an interruption can cost")


class EvaluationSettings(Section):
    """What is measured when a run ends."""

    samples: int = Field(5000, ge=2, le=10**8, description="samples of the students and of the teacher")
    batch: Batch = Field(500, description="images per forward pass")
    seed: Seed = Field(0, description="seed of the measured samples")
    judge: Literal["stop", "tell", "off"] = Field(
        "stop",
        description="the teacher, trained or given, is measured before students start, where there are real images: "
        "stop where it is plainly not fit to be distilled, tell it and go on, or do not measure it",
    )
    solver_error: int | None = Field(
        None,
        ge=1,
        le=10**6,
        description="images of the teacher whose root mean square distance to its ODE's solution is measured too, as "
        "`solver_rms` of the teacher; absent: none",
    )


class Recipe(Section):
    """One run: a teacher, a partition, and the stages that make each student."""

    name: str | None = Field(None, pattern=NAME, max_length=100, description="name of the run")
    run: FilePath | None = Field(None, min_length=1, description="the run directory; runs/NAME if absent")
    seed: Seed = Field(0, description="seed of the students")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:1 or mps")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of a process; a fixed number makes CPU runs repeatable to the bit"
    )
    workers: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="students trained at once on this machine, a process each; absent: one per GPU, or per `threads` "
        "cores of a CPU (without `threads` one, on all cores)",
    )
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto",
        description="what networks compute in while students train; auto: bf16 where a short measurement finds it "
        "faster on this device, float32 for tiny networks",
    )
    compile: Literal["auto"] | bool = Field(
        "auto", description="torch.compile of the networks; auto: on a GPU, where a stage is long enough to pay for it"
    )
    deterministic: bool = Field(
        False, description="on a GPU, the same bits after every resume, by slower kernels; without, up to rounding"
    )
    checkpoint_seconds: float = Field(
        30.0, ge=0, le=10**9, description="time between two checkpoints; 0: after every step"
    )
    keep: int = Field(2, ge=1, le=1000, description="checkpoints kept of each stage: a damaged one costs only itself")
    max_skipped: int = Field(
        10, ge=1, le=10**9, description="updates in a row that may be skipped as not finite before training stops"
    )
    micro_batch: Batch | None = Field(
        None, description="images a device takes at once; larger batches go through in parts. Absent: all at once"
    )
    fsdp: bool = Field(
        False, description="under torchrun, share out the weights too (FSDP2): for networks that fit no single device"
    )
    loggers: list[Literal["tensorboard", "wandb"]] = Field(
        [], max_length=2, description="where else the figures of metrics.jsonl go: tensorboard, wandb (in RUN/logs)"
    )
    data: Data = Field(
        default_factory=NoDataSettings, description="the training data; absent: none, for a teacher that is given"
    )
    teacher: TeacherSettings = Field(default_factory=TeacherSettings, description="the diffusion model to distil")
    latents: LatentSettings = Field(default_factory=LatentSettings, description="the encoded data of a latent teacher")
    partition: PartitionSettings = Field(default_factory=PartitionSettings, description="who owns which condition")
    pairs: PairSettings = Field(default_factory=PairSettings, description="the teacher's noise and image pairs")
    student: StudentSettings = Field(default_factory=StudentSettings, description="the students' network")
    stages: Stages = Field(min_length=1, max_length=16, description="the stages, one after the other")
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings, description="what is measured")

    @model_validator(mode="after")
    def _a_teacher_needs_data(self) -> Recipe:
        if isinstance(self.data, NoDataSettings) and self.teacher.path is None:
            raise ValueError("there is no `data`, and no `teacher.path`: a teacher that is trained here needs images")
        return self

    @model_validator(mode="after")
    def _pairs_need_a_solver_without_noise(self) -> Recipe:
        if self.needs_pairs and self.teacher.solver.stochastic:
            raise ValueError(
                f"`teacher.solver.name` {self.teacher.solver.name} adds noise in every step, so its samples are no "
                "function of the noise they begin with, and a stage here regresses on pairs of both: take a solver of "
                f"the ODE (not {', '.join(STOCHASTIC)}), or `pairs: none` in the stages"
            )
        return self

    @model_validator(mode="after")
    def _an_error_is_of_a_solution(self) -> Recipe:
        if self.evaluation.solver_error is not None and self.teacher.solver.stochastic:
            raise ValueError(
                f"`evaluation.solver_error` is the distance to the ODE's solution, and {self.teacher.solver.name} does "
                "not solve the ODE: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _cfgpp_is_of_samplers(self) -> Recipe:
        guidance = self.teacher.guidance
        asking = [stage.objective for stage in self.stages if stage.asks_teacher]
        if asking and guidance is not None and guidance.schedule == "cfg++":
            raise ValueError(
                f"`teacher.guidance.schedule` cfg++ is of a sampler's steps, and the stage {asking[0]} asks the "
                "teacher at single noise levels: take `constant`, or stages on pairs alone (regress, flow)"
            )
        return self

    @model_validator(mode="after")
    def _adapters_are_not_shared_out(self) -> Recipe:
        if self.student.adapter is not None and self.fsdp:
            raise ValueError(
                "`student.adapter` keeps the base whole on every device, which `fsdp` shares out: take one of them"
            )
        return self

    @model_validator(mode="after")
    def _sharded_stages_can_be(self) -> Recipe:
        for stage in self.stages if self.fsdp else []:
            stage.check_sharded()
        return self

    @model_validator(mode="after")
    def _every_student_has_a_size(self) -> Recipe:
        parts, count = self.student.parts, self.partition.students
        if parts is not None and len(parts) != count:
            raise ValueError(f"`student.parts` is of {len(parts)} students, `partition.students` says {count}")
        return self

    @property
    def sizes(self) -> list[Sequence[int]]:
        """The numbers of the students, those together whose networks are asked for alike."""
        return self.student.sizes(self.partition.students)

    @property
    def needs_pairs(self) -> bool:
        """Whether a stage is trained on the teacher's pairs of noise and image."""
        return any(stage.pairs_used != "none" for stage in self.stages)

    @property
    def has_prompts(self) -> bool:
        """Whether the conditions are texts."""
        return isinstance(self.data, PromptsSettings)

    @property
    def has_measure(self) -> bool:
        """Whether its own data can measure a run: not where they are texts, or none."""
        return not self.has_prompts and not isinstance(self.data, NoDataSettings)

    @property
    def own_metrics(self) -> tuple[str, ...]:
        """What the first figure of the measurement that a run ends with may be called: of images, or of points."""
        return (f"fd_{self.data.label}", f"l1_{self.data.label}") if self.has_measure else ()

    @property
    def run_dir(self) -> Path:
        """Where the run lives."""
        return Path(self.run or f"runs/{self.name}")

    def dump(self) -> dict[str, Any]:
        """Return every key with its value, as plain data."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the complete recipe as YAML."""
        return recipe_yaml.dump(self.dump())


def load(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe (a file, a run directory's, or a shipped one by name) and apply `key=value` overrides.

    Raises UserError that lists every mistake with file, line, dotted key, value, what is allowed and the nearest name.
    """
    path = find(source)
    document = recipe_yaml.Document.read(path)
    for override in overrides or []:
        document.override(override)
    return _named(validate(document), path, source)


def load_any(source: str | os.PathLike[str] | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """Return the recipe meant by a file, a run, a name, a dictionary or a Recipe, with overrides given as values.

    An override that is a dictionary is merged into its section; keys may be dotted. Errors are those of `load`.
    """
    path: Path | None = None
    if isinstance(source, Recipe):
        document = recipe_yaml.Document(source.dump(), "the recipe", {})
    elif isinstance(source, Mapping):
        document = recipe_yaml.Document(copy.deepcopy(dict(source)), "the recipe", {})
    else:
        source = os.fspath(source)
        path = find(source)
        document = recipe_yaml.Document.read(path)
    for keys, value in _flat(overrides, ()):
        document.set(keys, value, f"override '{'.'.join(keys)}={value}'")
    recipe = validate(document)
    if recipe.name is None and path is None:
        raise WrongValueError("the recipe has no name", hint='a key "name" names the run')
    return recipe if path is None else _named(recipe, path, str(source))


def _flat(overrides: Mapping[str, Any], prefix: tuple[str, ...]) -> Iterator[tuple[list[str], Any]]:
    for key, value in overrides.items():
        keys = (*prefix, *str(key).split("."))
        if isinstance(value, Mapping) and value:
            yield from _flat(value, keys)
        else:
            yield list(keys), copy.deepcopy(value)


def _named(recipe: Recipe, path: Path, source: str | Path) -> Recipe:
    """Fill in what the place of a recipe says: its name, and where a run directory has been moved to."""
    if recipe.name is None:
        recipe = recipe.model_copy(update={"name": check_name(path)})
    if path.name == "recipe.yaml" and Path(source).is_dir():
        recipe = recipe.model_copy(update={"run": str(source)})
    return recipe


def check_name(path: Path) -> str:
    """Return the name that a file gives its run. UserError where no run can be called so."""
    name = path.stem
    if re.fullmatch(NAME, name) and len(name) <= 100:
        return name
    safe = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:100].rstrip("-.") or "run"
    raise UserError(
        f"{path}: a run has the name of its recipe file, and {name!r} is no such name: letters, digits, `_`, `-` and "
        "`.`, at most 100",
        hint=f"name={safe}, here or in the file; or rename the file",
    )


def of_text(text: str, name: str) -> Recipe:
    """Read a recipe called `name` from YAML text. UserError as `load`."""
    return validate(recipe_yaml.Document.parse(text, name)).model_copy(update={"name": name})


def validate(document: recipe_yaml.Document) -> Recipe:
    """Check a parsed recipe; raise one UserError with all that is wrong."""
    try:
        return Recipe.model_validate(document.tree)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise WrongValueError(recipe_yaml.explain_all(document, Recipe, found, "the recipe")) from None


def find(source: str | Path) -> Path:
    """Return the recipe file meant by a path, a run directory or the name of a shipped recipe."""
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return path
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    names = {p.stem: p for p in shipped()}
    if str(source) in names:
        return names[str(source)]
    hint = recipe_yaml.nearest(path.stem, list(names))
    raise MissingFileError(
        f"no recipe at {path}: neither a file, nor a run directory, nor a shipped recipe",
        hint=f"did you mean `{hint}`?" if hint else "`msd recipes` lists what ships",
    )


def recipes_folder() -> Path:
    """Return the folder of the recipes that travel with the package (in a checkout: the one beside it)."""
    package = Path(__file__).parent.parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def shipped() -> list[Path]:
    """Return the recipes that ship with msd."""
    return sorted(recipes_folder().glob("*.yaml"))
