"""Students as a pipeline folder of the diffusers library, for networks that came from there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msdcli import records
from msdcli.engine.checkpoints.model import MODEL
from msdcli.engine.export.format import ExportResult, described
from msdcli.errors import UserError
from msdcli.nets.diffusers.sections import WEIGHTS
from msdcli.rundir import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from msdcli.engine import sample
    from msdcli.engine.export.format import ExportResult, ExportSource

TEMPLATE = Path(__file__).parent / "given" / "pipeline.py"
USAGE = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}", custom_pipeline="{folder}", trust_remote_code=True)
"""


def check(students: sample.Students) -> None:
    """Raise UserError where the networks are not the library's, or the library is missing."""
    kinds = {records.model(folder / MODEL)["network"].get("kind") for folder in students.folders}
    if other := sorted(kinds - {"diffusers"}):
        raise UserError(
            f"these students have networks of kind {other[0]}, which are not the diffusers library's",
            hint="any network goes with --format bundle or --format onnx",
        )
    if any(records.model(folder / MODEL).get("anchor") for folder in students.folders):
        raise UserError(
            "these students are anchored (stage cd, `anchor`), which a pipeline of the library does not know",
            hint="any network goes with --format bundle or --format onnx",
        )
    if len({students.levels(k, records.model(f / MODEL)) for k, f in enumerate(students.folders)}) > 1:
        raise UserError(
            "these students begin at different noise levels, which a pipeline of the library has once for all",
            hint="any network goes with --format bundle or --format onnx",
        )
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"this format needs the library diffusers ({error})", hint="pip install 'msdcli[diffusers]'"
        ) from None


def write(source: ExportSource) -> ExportResult:
    """Write the pipeline's code, and let the library save its students."""
    names = [f"student_{k}" for k in range(len(source.students.folders))]
    code = TEMPLATE.read_text(encoding="utf-8")
    arguments = "".join(f"        {name}: Any,\n" for name in names)
    write_text(source.folder / "pipeline.py", code.replace("        student_0: Any,\n", arguments))
    networks = list(source.each())
    net, sigmas = networks[0].net, networks[0].sigmas
    assert hasattr(net, "prediction"), "checked before"
    pipeline = pipeline_class(source.folder)(
        **{name: one.net.net for name, one in zip(names, networks, strict=True)},
        parts=dict(zip(names, source.students.partition.parts, strict=True)),
        class_names={str(number): name for number, name in enumerate(source.students.class_names)},
        sigmas=list(sigmas),
        timesteps=[timestep(net, sigma) for sigma in sigmas],
        prediction=net.prediction,
        num_classes=net.num_classes,
    )
    pipeline.save_pretrained(source.folder)
    last = len(source.students.class_names) - 1
    latent = source.students.autoencoder is not None  # which is in a bundle, and not here
    how = ', output_type="pt"' if latent else ""
    what = "latents" if latent else "images"
    usage = USAGE + f"{what} = pipe(class_labels=[0, {last}]{how}).images\nprint({what})\n"
    files = [source.folder / name / WEIGHTS for name in names]
    record = {"students": described(source, files)}
    return ExportResult(
        open=lambda most, memory: Loaded(source.folder), usage=usage, record=record, library="diffusers", limited=False
    )


def timestep(net: Any, sigma: float) -> float:
    """What the network's schedule calls this noise level."""
    if net.prediction == "flow":
        return float(net.steps * sigma / (1 + sigma))
    return float(net.timestep(torch.tensor([sigma])).item())


def pipeline_class(folder: Path) -> Any:
    """Import the pipeline that was just written."""
    spec = importlib.util.spec_from_file_location("msd_exported_pipeline", folder / "pipeline.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.StudentsPipeline


class Loaded:
    """The pipeline as the library reads it back."""

    def __init__(self, folder: Path) -> None:
        from diffusers.utils import logging

        logging.disable_progress_bar()  # the library's own; the command has its progress already
        try:
            self.pipeline = pipeline_class(folder).from_pretrained(folder)
        finally:
            logging.enable_progress_bar()

    def generate(self, z: Any, classes: Sequence[int], noise: Any = None) -> Tensor:
        between = None if noise is None else torch.as_tensor(noise)
        images: Tensor = self.pipeline(classes, latents=torch.as_tensor(z), noise=between, output_type="pt").images
        return images

    def sample(self, classes: Sequence[int]) -> Tensor:
        images: Tensor = self.pipeline(classes, output_type="pt").images
        return images
