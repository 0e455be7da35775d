"""Students as ONNX graphs with an open batch, and their weights in fewer bits."""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msdcli.engine.export import static_int8
from msdcli.engine.export.format import with_router
from msdcli.engine.export.torch import MAX_BATCH, program
from msdcli.errors import UserError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from msdcli.diffusion.generator import Generator
    from msdcli.engine import sample
    from msdcli.engine.export.format import ExportResult, ExportSource

OPSET = 20
# Layers whose weights may be kept in fewer bits, and which input the weight is.
LAYERS = {"Conv": 1, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1}


def check(students: sample.Students) -> None:
    """Raise UserError where the libraries are missing."""
    try:
        for name in ("onnx", "onnxruntime", "onnxscript"):
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"ONNX needs its libraries ({error})", hint="pip install 'msdcli[onnx]'") from None


def write(source: ExportSource) -> ExportResult:
    """Write students/K/model.onnx and the router."""
    files = []
    for k, generator in enumerate(source.each()):
        path = source.folder / "students" / str(k) / "model.onnx"
        write_student(source, k, generator, path)
        files.append(path)
    record = {"opset": OPSET, "precision": source.options.precision, "max_batch": MAX_BATCH}
    return with_router(source, "onnx", files, record)


def write_student(source: ExportSource, number: int, generator: Generator, path: Path) -> None:
    """Write student `number`, in the precision that was asked for."""
    batches = None
    if source.options.precision == "int8-static":
        classes = source.students.partition.parts[number]
        batches = static_int8.calibration(source.shape, generator.steps, classes, number)
    write_graph(program(generator), path, source.options.precision, batches)


def write_graph(
    traced: ExportedProgram, path: Path, precision: str, batches: Sequence[static_int8.Inputs] | None = None
) -> None:
    """Write one student: inputs `z` [n, *shape] float32 and `labels` [n] int64, output `images` float32.

    Of several steps also `noise` [n, steps - 1, *shape] float32, the unit noise between them.

    In float16 the layers' products are float16 and all between them float32. In int8 the weights alone are, each output
    channel with its own scale; products are float32. In int8-static layers compute in int8, with ranges from `batches`.
    """
    import onnx
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = ["z", "labels", "noise"][: len(traced.graph_signature.user_inputs)]
    names = {"input_names": inputs, "output_names": ["images"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own, about themselves
        converted = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            dynamic_shapes=({0: "n"},) * len(inputs),
            **names,  # type: ignore[arg-type]
        )
    assert converted is not None
    _forget_traces(converted.model.graph)
    if precision == "int8-static":
        assert batches is not None, "ranges are measured on inputs"
        with tempfile.TemporaryDirectory() as place:
            whole = Path(place) / path.name
            converted.save(whole)
            static_int8.quantize(whole, path, batches)
    else:
        converted.save(path)
    if precision in ("float16", "int8"):
        model = onnx.load(path)
        for old in path.parent.iterdir():
            old.unlink()
        reduce_weights(model, precision)
        onnx.save(model, path, save_as_external_data=model.ByteSize() > 2**30, location=f"{path.name}.data")
    onnx.checker.check_model(path)


def _forget_traces(graph: Any) -> None:
    """Leave out where in this machine's files every node came from."""
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def reduce_weights(model: Any, precision: str) -> None:
    """Keep the weights of all layers in float16 or int8, in place."""
    from onnx import numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes, made = [], dict[str, list[Any]]()
    for node in graph.node:
        weight = weights.get(node.input[LAYERS[node.op_type]]) if node.op_type in LAYERS else None
        if weight is None or weight.data_type != 1 or len(weight.dims) < 2:  # 1 is float32
            nodes.append(node)
        elif precision == "float16":
            nodes += _in_float16(graph, node, weights, made)
        else:
            name = f"{weight.name}_int8"
            if name not in made:
                axis = _channel_axis(node, len(weight.dims))
                made[name] = [_dequantized(graph, numpy_helper.to_array(weight), name, axis)]
                nodes += made[name]
            node.input[LAYERS[node.op_type]] = name
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _in_float16(graph: Any, node: Any, weights: dict[str, Any], made: dict[str, list[Any]]) -> Iterator[Any]:
    """The layer between two changes of type; its weights become float16 constants."""
    from onnx import TensorProto, helper, numpy_helper

    for i, name in enumerate(node.input):
        if name in weights:
            half = f"{name}_float16"
            if half not in made:
                made[half] = []
                graph.initializer.append(
                    numpy_helper.from_array(numpy_helper.to_array(weights[name]).astype(np.float16), half)
                )
            node.input[i] = half
        elif name:
            half = f"{name}_float16"
            if half not in made:
                made[half] = [helper.make_node("Cast", [name], [half], to=TensorProto.FLOAT16)]
                yield made[half][0]
            node.input[i] = half
    result = node.output[0]
    node.output[0] = f"{result}_in_float16"
    yield node
    yield helper.make_node("Cast", [node.output[0]], [result], to=TensorProto.FLOAT)


def _channel_axis(node: Any, dimensions: int) -> int:
    """The weight's axis of output channels."""
    if node.op_type == "MatMul":
        return dimensions - 1
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1


def _dequantized(graph: Any, w: np.ndarray, name: str, axis: int) -> Any:
    """Add the weight as int8 with a scale per output channel; return the node that undoes it."""
    from onnx import helper, numpy_helper

    others = tuple(i for i in range(w.ndim) if i != axis)
    scale = np.maximum(np.abs(w).max(axis=others), 1e-12).astype(np.float32) / np.float32(127)
    shaped = scale.reshape([-1 if i == axis else 1 for i in range(w.ndim)])
    quantized = np.clip(np.rint(w / shaped), -127, 127).astype(np.int8)
    graph.initializer.extend(
        [numpy_helper.from_array(quantized, f"{name}_values"), numpy_helper.from_array(scale, f"{name}_scale")]
    )
    return helper.make_node("DequantizeLinear", [f"{name}_values", f"{name}_scale"], [name], axis=axis)
