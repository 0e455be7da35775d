"""A model repository of NVIDIA's Triton Inference Server: the students as ONNX models, and a router among them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from msdcli.engine.export import onnx as export_onnx
from msdcli.engine.export.format import ExportResult, with_router
from msdcli.rundir import write_json, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from msdcli.engine.export.format import ExportResult, ExportSource

MAX_BATCH = 64
TEMPLATE = Path(__file__).parent / "given" / "triton_model.py"
STUDENT = """name: "{name}"
backend: "onnxruntime"
max_batch_size: {batch}
input [
  {{ name: "z" data_type: TYPE_FP32 dims: [ {dims} ] }},
  {{ name: "labels" data_type: TYPE_INT64 dims: [ 1 ] reshape: {{ shape: [ ] }} }}{noise}
]
output [ {{ name: "images" data_type: TYPE_FP32 dims: [ {dims} ] }} ]
dynamic_batching {{ max_queue_delay_microseconds: 1000 }}
version_policy: {{ latest {{ num_versions: 1 }} }}
"""
ROUTER = """name: "{name}"
backend: "python"
max_batch_size: {batch}
input [
  {{ name: "labels" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "z" data_type: TYPE_FP32 dims: [ {dims} ] optional: true }},{noise}
  {{ name: "seed" data_type: TYPE_INT64 dims: [ 1 ] optional: true }}
]
output [ {{ name: "images" data_type: TYPE_FP32 dims: [ {dims} ] }} ]
instance_group [ {{ kind: KIND_CPU count: {instances} }} ]
parameters: [
  {{ key: "students" value: {{ string_value: "{name}_student_" }} }},
  {{ key: "max_resident" value: {{ string_value: "{resident}" }} }},
  {{ key: "steps" value: {{ string_value: "{steps}" }} }}
]
version_policy: {{ latest {{ num_versions: 1 }} }}
"""
NOISE = """{{ name: "noise" data_type: TYPE_FP32 dims: [ {between}, {dims} ]{optional} }}"""  # of several steps
USAGE = """import numpy as np
import tritonclient.http as triton  # the server: tritonserver --model-repository {folder}{mode}

labels = triton.InferInput("labels", [2, 1], "INT64")
labels.set_data_from_numpy(np.array([[0], [LAST]]))
images = triton.InferenceServerClient("localhost:8000").infer("NAME", [labels]).as_numpy("images")
print(images.shape)
"""

check = export_onnx.check


def write(source: ExportSource) -> ExportResult:
    """Write NAME_student_K/1/model.onnx and NAME/1/model.py, each with its config.pbtxt; NAME is the run's."""
    router = re.sub(r"[^A-Za-z0-9_-]", "_", source.run.root.resolve().name)
    dims, files = ", ".join(map(str, source.shape)), []
    noise = f",\n  {_noise(source, dims)}" if source.steps > 1 else ""
    for k, generator in enumerate(source.each()):
        name = f"{router}_student_{k}"
        path = source.folder / name / "1" / "model.onnx"
        export_onnx.write_student(source, k, generator, path)
        write_text(
            source.folder / name / "config.pbtxt", STUDENT.format(name=name, batch=MAX_BATCH, dims=dims, noise=noise)
        )
        files.append(path)
    _write_router(source, router, dims)
    record = {"opset": export_onnx.OPSET, "precision": source.options.precision, "max_batch": MAX_BATCH}
    exported = with_router(source, "onnx", files, record)
    explicit = source.options.max_resident is not None
    mode = " --model-control-mode explicit --load-model NAME" if explicit else ""
    usage = USAGE.replace("{mode}", mode).replace("NAME", router)
    usage = usage.replace("LAST", str(len(source.students.class_names) - 1))
    return ExportResult(exported.open, usage, record=exported.record, tolerance=exported.tolerance, library="triton")


def _noise(source: ExportSource, dims: str, *, optional: bool = False) -> str:
    """Return the input of the noise between several steps."""
    return NOISE.format(between=source.steps - 1, dims=dims, optional=" optional: true" if optional else "")


def _write_router(source: ExportSource, name: str, dims: str) -> None:
    folder = source.folder / name
    resident = source.options.max_resident or 0
    # A router that loads and unloads must be the only one that does.
    noise = f"\n  {_noise(source, dims, optional=True)}," if source.steps > 1 else ""
    known = {
        "batch": MAX_BATCH,
        "dims": dims,
        "name": name,
        "resident": resident,
        "noise": noise,
        "steps": source.steps,
    }
    text = ROUTER.format(instances=1 if resident else 2, **known)
    write_text(folder / "config.pbtxt", text)
    (folder / "1").mkdir()
    shutil.copyfile(TEMPLATE, folder / "1" / "model.py")
    parts: Sequence[Sequence[int]] = source.students.partition.parts
    write_json(folder / "1" / "partition.json", {"parts": parts})
