"""The teacher: trained once per recipe section and shared by every later run, or loaded from a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from msdcli import nets, records
from msdcli.data.base import Dataset, fingerprint
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.draws import Source
from msdcli.diffusion.guidance import Guided
from msdcli.engine.checkpoints.model import MODEL, described, is_complete, is_whole, load_model, predicts
from msdcli.engine.distributed.group import SINGLE_PROCESS, ProcessGroup
from msdcli.engine.inputs import autoencoder as autoencoders
from msdcli.engine.inputs import dataset, hub, importing, prompts, stitches, teacher_stages
from msdcli.engine.tracking.events import Report, silent
from msdcli.engine.train import precision
from msdcli.engine.train.loop import TrainOptions, train
from msdcli.engine.train.student import accelerate, computed_in, is_finished
from msdcli.errors import MissingFileError, UserError
from msdcli.nets.diffusers.autoencoder import Geometry
from msdcli.nets.meta import on_meta as on_meta_device
from msdcli.objectives.edm import DenoisingScoreMatching
from msdcli.recipe import Recipe
from msdcli.recipe.data import FolderSettings
from msdcli.recipe.networks import DiffusersNetworkSettings, EdmNetworkSettings
from msdcli.recipe.stages import DmSettings, teacher_stage
from msdcli.recipe.teacher import LatentShapeSettings, TeacherSettings
from msdcli.rundir import RunDir, begun_otherwise, discard, key, link, lock, read_json
from msdcli.seeds import generator

FORMAT = 2  # of trained teachers: another number where the code trains another one from the same recipe


def provide(
    run: RunDir,
    recipe: Recipe,
    data: Dataset,
    device: torch.device,
    report: Report,
    *,
    group: ProcessGroup = SINGLE_PROCESS,
    meanwhile: Callable[[Report], AbstractContextManager[Report]] = nullcontext,
    alone: Callable[[], bool] = lambda: True,
) -> tuple[Denoiser, str]:
    """Return the frozen teacher and its weights' hash, after loading, importing, reusing or training it; link it into
    the run. What is to go on `meanwhile` does only where it trains. A run that has made nothing yet gets another
    teacher only where nobody else is at work on it: `alone`, which is asked while the run's lock is held.
    """
    if recipe.teacher.path is not None:
        path = hub.resolve(recipe.teacher.path)
        folder = group.leader_first(lambda: importing.located(run, path, report))
    else:
        place = group.broadcast(_place(run, recipe, data, device, report) if group.is_leader else None)
        assert place is not None, "the leader knows"
        folder, settled = place
        with group.while_leader_holds(lambda: lock(folder, "the teacher", wait=report)):
            if group.broadcast(folder == run.teacher or is_finished(folder, recipe.teacher.training)):
                report(f"teacher: reused from {folder}")
            else:
                trained_as = recipe.model_copy(update={"precision": settled})
                with meanwhile(report) as told:
                    _train(folder, trained_as, data, device, told, group)
    _check_fit(load_model(folder)[0], recipe, data, autoencoders.find(folder))
    folder = teacher_stages.refine(folder, run, recipe, data, device, report, group)
    if folder != run.teacher:
        group.leader_first(lambda: _take(folder, run, recipe, alone, report))
    if recipe.has_prompts:
        group.leader_first(lambda: prompts.provide(run, recipe, data, device, report))
    teacher, sha256 = load(run, recipe)
    return teacher.to(device), sha256


def _take(folder: Path, run: RunDir, recipe: Recipe, alone: Callable[[], bool], report: Report) -> None:
    """Link the teacher in a folder into the run. UserError, and nothing is changed, where the run was begun with
    another; of trained ones the run keeps that which it has: what another machine trained meanwhile is as good.
    """
    with lock(run.root, "the run directory", wait=report):
        known = records.run(run.record_file).get("teacher") if run.record_file.is_file() else None
        if recipe.teacher.path is None:
            if is_whole(run.teacher):
                return
        elif known is not None and dataset.version_of(run) != 1 and run.begun():
            if _hash(folder, run, recipe) != known:
                raise begun_otherwise(run, "teacher")
        elif is_complete(run.teacher) and _hash(run.teacher, run, recipe) != _hash(folder, run, recipe):
            if not alone():
                raise begun_otherwise(run, "teacher")
            discard(run.teacher)
        link(folder, run.teacher)


def load(run: RunDir, recipe: Recipe) -> tuple[Denoiser, str]:
    """Return the run's teacher, guided as the recipe says, and the hash of all that its predictions depend on."""
    teacher, _ = load_model(run.teacher)
    store = prompts.open_store(run.prompts) if teacher.reads_text else None
    prompts.attach_prompts(teacher, store)
    guidance, guide = recipe.teacher.guidance, None
    if guidance is not None and guidance.weaker is not None:
        guide, _ = load_model(_weaker(run, guidance.weaker))
        prompts.attach_prompts(guide, store)
    sha256 = _hash(run.teacher, run, recipe)
    return teacher if guidance is None else _guided(teacher, recipe, guide), sha256


def _hash(folder: Path, run: RunDir, recipe: Recipe) -> str:
    """Return the hash of all that the predictions of the teacher in a folder depend on in a run.

    That is, of the teacher and of its guide: weights, and the network and units that they are put into; the
    autoencoder; the text encoder, and how its embeddings are rounded; what guidance is. The solver is for
    whoever draws samples to add.
    """
    description, guidance = described(folder), recipe.teacher.guidance
    weaker = None if guidance is None else guidance.weaker
    text = description.get("text_sha256")
    said = [
        predicts(description),
        _autoencoder(folder, description),
        None if text is None else [text, getattr(recipe.data, "embeddings", None)],
        None if guidance is None else guidance.record(),
        None if weaker is None else predicts(described(_weaker(run, weaker))),
    ]
    if recipe.teacher.stitch is not None:
        said.append(stitches.identity(run, recipe))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _weaker(run: RunDir, path: str) -> Path:
    """Return the folder of the weaker teacher that guides this one."""
    return importing.located(run, hub.resolve(path), silent)


def _autoencoder(model: Path, description: dict[str, Any]) -> str | None:
    folder = autoencoders.find(model)
    return None if folder is None else description.get("autoencoder") or autoencoders.identity(folder)


def hash_of_version_1(run: RunDir, recipe: Recipe) -> str:
    """Return what msd 0.1.0 wrote into run.json. For resuming its runs, and for nothing new."""
    description, guidance = read_json(run.teacher / MODEL), recipe.teacher.guidance
    sha256: str = description["sha256"]
    if autoencoder := _autoencoder(run.teacher, description):
        sha256 = key(sha256, autoencoder)
    if "text_sha256" in description:
        sha256 = key(sha256, description["text_sha256"])
    if guidance is None:
        return sha256
    guides = [] if guidance.weaker is None else [_weaker(run, guidance.weaker)]
    said = [[sha256, *(read_json(guide / MODEL)["sha256"] for guide in guides)], guidance.scale, guidance.interval]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def on_meta(recipe: Recipe, data: Dataset, *, planning: bool = False) -> Denoiser:
    """Return the teacher without memory: it is checked as far as it exists, and its parameters can be counted.

    UserError where it cannot be had or does not fit; with `planning`, a file that is missing is taken on trust.
    """
    settings = recipe.teacher
    path = None if settings.path is None else (hub.cached if planning else hub.resolve)(settings.path)
    if path is None:
        shape = data.shape if settings.latent is None or recipe.has_prompts else _planned(settings.latent, data)
        num_classes = 0 if recipe.has_prompts else len(data.class_names)
        options: dict[str, Any] = {"shape": shape, "num_classes": num_classes, "sigma_data": settings.sigma_data}
        with on_meta_device():
            teacher = nets.build(settings.network, **options)
    else:
        teacher = _given_on_meta(path, settings.source)
        _check_fit(teacher, recipe, data, importing.find_autoencoder(path))
    if settings.guidance is None:
        return teacher
    guide = settings.guidance.weaker
    return _guided(teacher, recipe, None if guide is None else _given_on_meta(hub.resolve(guide), None))


def _given_on_meta(path: Path, source: str | None) -> Denoiser:
    if not path.exists():
        raise MissingFileError(f"no model at {path}", hint=f"get it from {source}" if source else None)
    return importing.inspect(path)


def _guided(teacher: Denoiser, recipe: Recipe, guide: Denoiser | None) -> Denoiser:
    """Wrap the teacher in the recipe's guidance. UserError where there is nothing to move away from."""
    guidance = recipe.teacher.guidance
    assert guidance is not None
    if guide is not None and _makes(guide) != _makes(teacher):
        raise UserError(f"the guide at {guidance.weaker} makes other images or classes than the teacher")
    if guide is None and not guidance.perturbs:
        _check_without_class(teacher, recipe)
    options: dict[str, Any] = {"scale": guidance.scale, "interval": guidance.interval, "schedule": guidance.schedule}
    return Guided(teacher, guide=guide, layers=(guidance.layers or []) if guidance.perturbs else None, **options)


def _check_without_class(teacher: Denoiser, recipe: Recipe) -> None:
    """Raise UserError for a teacher that cannot be asked for no class."""
    if teacher.num_classes == 0 and not teacher.reads_text:
        raise UserError(
            "teacher.guidance: this teacher knows no classes",
            hint="guidance.guide names a weaker teacher; guidance.guide=perturbed needs only attention",
        )
    if _label_dropout(teacher, recipe) == 0:
        raise UserError(
            "teacher.guidance: this teacher never trained without a class (its label_dropout is 0)",
            hint="guidance.guide names a weaker teacher; teacher.training.label_dropout=0.1 trains one that can",
        )


def check_fake_guidance(recipe: Recipe, teacher: Denoiser) -> None:
    """Raise UserError where a stage asks its fake network without a class, and it would not know what to say."""
    guidance = recipe.teacher.guidance
    for number, stage in enumerate(recipe.stages):
        if not isinstance(stage, DmSettings):
            continue
        made = teacher_stage(recipe.stages, number) is not None
        # `same` of a teacher that is not guided is none; of one with a guide it asks nobody without a class.
        unguided = made or guidance is None or guidance.guide is not None
        if not stage.fake_label_dropout and stage.fake_guidance in ({"none", "same"} if unguided else {"none"}):
            continue
        if teacher.num_classes == 0 and not teacher.reads_text:
            raise UserError(f"stage {stage.objective}: fake_guidance: this teacher knows no classes")
        if stage.fake_label_dropout:
            continue
        if made or _label_dropout(teacher, recipe) == 0:  # a student that became the teacher had a class every time
            raise UserError(
                f"stage {stage.objective}: fake_guidance: this teacher never trained without a class, and neither does "
                "the fake network",
                hint="fake_label_dropout=0.1 in the stage"
                + ("" if made else ", or teacher.training.label_dropout=0.1"),
            )


def _makes(net: Denoiser) -> tuple[tuple[int, ...], int, bool]:
    return net.shape, net.num_classes, net.reads_text


def _label_dropout(teacher: Denoiser, recipe: Recipe) -> float | None:
    """How often the teacher trained without a class; None where nobody says."""
    if recipe.teacher.path is None:
        return recipe.teacher.training.label_dropout
    if isinstance(teacher.settings, DiffusersNetworkSettings):
        return 0.0 if teacher.settings.class_name == "UNet2DModel" else None
    return getattr(teacher.settings, "arguments", {}).get("label_dropout")


def _own(run: RunDir, recipe: Recipe) -> Path | None:
    """Return the teacher that the run was begun with, whatever it is called elsewhere; None where it has none yet, or
    where its files are damaged.
    """
    begun = run.record_file.is_file() and "teacher" in read_json(run.record_file)
    last, stages = recipe.teacher.training, recipe.teacher.stages
    if not begun or not is_finished(run.teacher, stages[-1] if stages else last):
        return None
    return run.teacher if teacher_stages.has_been_through(run.teacher, stages) and is_whole(run.teacher) else None


def _place(run: RunDir, recipe: Recipe, data: Dataset, device: torch.device, report: Report) -> tuple[Path, str]:
    """Return the folder of the teacher that the recipe asks for, and the precision that it trains in.

    Under `precision: auto` either is as good, as for students: one that is begun is taken up, whichever that is; else
    what this device is faster at is measured.
    """
    if (own := _own(run, recipe)) is not None:
        return own, recipe.precision  # it is trained
    folders = {kind: run.shared / f"teacher-{teacher_key(recipe, data, kind)}" for kind in ("float32", "bf16")}
    if recipe.precision != "auto":
        return folders[recipe.precision], recipe.precision
    training = recipe.teacher.training
    for begun in (lambda folder: is_finished(folder, training), Path.is_dir):
        for kind, folder in folders.items():
            if begun(folder):
                return folder, kind
    with on_meta_device():
        like = new_network(recipe.teacher, data)
    choice = precision.compare(recipe.teacher.network, like, training.batch, recipe.micro_batch, device, report)
    if "ratio" in choice:
        report(f"teacher: {precision.said(choice)}")
    return folders[choice["chosen"]], choice["chosen"]


def teacher_key(recipe: Recipe, data: Dataset, settled: str = "float32") -> str:
    """Name the teacher by everything that its weights depend on: the data, whether they are mirrored, its section, the
    code that trains (FORMAT), the precision that it trains in, and the threads, which move the last bits that training
    amplifies.

    Device and processes move such bits too; they are no part of what a recipe asks for, and a teacher that another
    machine trained is as good. The path, source, latents, stages, solver, guidance and stitch come after
    training, or instead of it.
    """
    low = [] if settled == "float32" else [settled]
    after = {"path", "source", "latent", "stages", "solver", "guidance", "stitch"}
    section = recipe.teacher.model_dump(mode="json", exclude=after) | {"training": recipe.teacher.training.keyed()}
    mirrored = ["mirror"] if recipe.data.mirrors else []
    return key("teacher", FORMAT, fingerprint(data), section, recipe.threads, *mirrored, *low)


def new_network(settings: TeacherSettings, data: Dataset) -> Denoiser:
    """Build the teacher's network with the random weights of its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator("network", "teacher", settings.seed).initial_seed())
        num_classes = len(data.class_names)
        return nets.build(settings.network, shape=data.shape, num_classes=num_classes, sigma_data=settings.sigma_data)


def _train(
    folder: Path, recipe: Recipe, data: Dataset, device: torch.device, report: Report, group: ProcessGroup
) -> None:
    settings = recipe.teacher
    options = TrainOptions.of(recipe, group)
    network = new_network(settings, data).train()
    if not options.fsdp:  # sharding moves it
        network.to(device)
    source = Source(data, range(len(data.class_names)), mirror=recipe.data.mirrors, device=device)
    objective = DenoisingScoreMatching(settings.training, network, None)
    passes = options.passes(settings.training, report)
    accelerate(objective, settings.training, source, recipe, options, passes, report)
    how: dict[str, Any] = {"key": ("teacher", settings.seed), "what": "teacher", "options": options, "passes": passes}
    state = train(objective, settings.training, source, folder, **how, report=report)
    record = {"steps": settings.training.steps, "computed_in": computed_in(recipe.precision, device)}
    teacher_stages.save(folder, state, record, device, group)


def _planned(settings: LatentShapeSettings, data: Dataset) -> tuple[int, ...]:
    """The shape of latents whose autoencoder is not here yet."""
    return Geometry(data.shape[0], settings.channels, settings.factor).latent_shape(tuple(data.shape))


def _check_fit(teacher: Denoiser, recipe: Recipe, data: Dataset, autoencoder: Path | None) -> None:
    """Raise UserError unless a teacher from elsewhere makes what the data hold, and is what the recipe expects."""
    where, num_classes = recipe.teacher.path, len(data.class_names)
    if teacher.reads_text != recipe.has_prompts:
        kinds = ("prompts, and the data have classes", "classes, and the data are prompts")
        raise UserError(f"the teacher at {where} is conditioned on {kinds[not teacher.reads_text]}")
    if teacher.reads_text:
        num_classes = 1
    shape = autoencoders.shape_seen(data, autoencoder)
    if where is not None and recipe.teacher.latent is not None:
        _check_latent(recipe.teacher.latent, autoencoder, where)
    if teacher.num_classes == 0 and num_classes > 1:
        raise UserError(
            f"the teacher at {where} knows no classes, the data have {num_classes}",
            hint="data.labels=false (data folder) makes them one class, for one student",
        )
    if teacher.shape != shape or max(teacher.num_classes, 1) != num_classes:
        made = "images" if autoencoder is None else "latents"
        seen = "" if shape == tuple(data.shape) else f", as latents {list(shape)},"
        raise UserError(
            f"the teacher at {where} makes {made} of shape {list(teacher.shape)} in {teacher.num_classes} classes; "
            f"the data have shape {list(data.shape)}{seen} and {num_classes} classes",
            hint=_cure(teacher.shape, shape, recipe) if autoencoder is None else None,
        )
    expected = recipe.teacher.network
    if where is not None and isinstance(expected, EdmNetworkSettings):
        _check_expected(teacher, expected, where)


def _cure(wanted: tuple[int, ...], found: tuple[int, ...], recipe: Recipe) -> str | None:
    """How pictures from files get the shape that a teacher makes."""
    if not isinstance(recipe.data, FolderSettings) or len(wanted) != 3 or wanted == found:
        return None
    if wanted[0] != found[0]:
        return f"data.channels={wanted[0]} makes them {'grey' if wanted[0] == 1 else 'colour'}"
    return f"data.size={wanted[1]} with data.resize=box (and data.crop=true) scales them"


def _check_latent(expected: LatentShapeSettings, autoencoder: Path | None, where: str) -> None:
    found = None if autoencoder is None else autoencoders.read_geometry(autoencoder)
    if found is None or (found.channels, found.factor) != (expected.channels, expected.factor):
        what = "no latent model" if found is None else f"one of {found.channels} channels and factor {found.factor}"
        raise UserError(
            f"the recipe expects a latent teacher of {expected.channels} channels and factor {expected.factor}; "
            f"the one at {where} is {what}",
            hint="teacher.latent must describe it, or be left out",
        )


def _check_expected(teacher: Denoiser, expected: EdmNetworkSettings, where: str) -> None:
    found = teacher.settings
    if not isinstance(found, EdmNetworkSettings) or found.preconditioning != expected.preconditioning:
        raise UserError(f"the teacher at {where} is no {expected.preconditioning} network of kind edm")
    for name, value in expected.arguments.items():
        if name != "dropout" and found.arguments.get(name) != value:
            raise UserError(
                f"the teacher at {where} has {name} {found.arguments.get(name)}, the recipe expects {value}",
                hint="teacher.network must describe that file, or be left out",
            )
