"""Triton's model repository: the configurations follow the server's schema and describe the graphs beside them."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import msdcli
from msdcli.engine.export.export import export
from msdcli.engine.export.format import ExportOptions, RunStudents
from msdcli.rundir import RunDir, read_json
from tests.engine.export.test_export import SMALL, of_run, trained

# The part of Triton's model_config.proto that is used: message -> field -> (number, type, repeated).
SCHEMA = {
    "Reshape": {"shape": (1, "int64", True)},
    "Input": {
        "name": (1, "string", False),
        "data_type": (2, "DataType", False),
        "dims": (4, "int64", True),
        "reshape": (5, "Reshape", False),
        "optional": (8, "bool", False),
    },
    "Output": {"name": (1, "string", False), "data_type": (2, "DataType", False), "dims": (3, "int64", True)},
    "Batching": {"max_queue_delay_microseconds": (2, "uint64", False)},
    "Group": {"kind": (4, "Kind", False), "count": (2, "int32", False)},
    "Latest": {"num_versions": (1, "uint32", False)},
    "Policy": {"latest": (1, "Latest", False)},
    "Value": {"string_value": (1, "string", False)},
    "Parameter": {"key": (1, "string", False), "value": (2, "Value", False)},
    "ModelConfig": {
        "name": (1, "string", False),
        "version_policy": (3, "Policy", False),
        "max_batch_size": (4, "int32", False),
        "input": (5, "Input", True),
        "output": (6, "Output", True),
        "instance_group": (7, "Group", True),
        "dynamic_batching": (11, "Batching", False),
        "parameters": (14, "Parameter", True),
        "backend": (17, "string", False),
    },
}
ENUMS = {"DataType": ["TYPE_INVALID", "TYPE_INT64", "TYPE_FP32"], "Kind": ["KIND_AUTO", "KIND_CPU"]}
NUMBERS = {"string": 9, "int32": 5, "int64": 3, "uint32": 13, "uint64": 4, "bool": 8}


def model_config() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="c", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            one = message.field.add(name=field, number=number, label=3 if repeated else 1)
            one.type = NUMBERS.get(kind, 14 if kind in ENUMS else 11)
            if kind not in NUMBERS:
                one.type_name = f".c.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("c.ModelConfig"))()


def parse(path: Path) -> Any:
    from google.protobuf import text_format

    return text_format.Parse(path.read_text(), model_config())


def session_of(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("triton")
    options = ExportOptions(bench=False, max_resident=1)
    export(RunDir(trained(folder, SMALL)), folder / "given", "triton", options=options)
    return folder / "given"


def test_configurations_describe_the_graphs(repository: Path) -> None:
    models = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    assert models == ["random", "random_student_0", "random_student_1"]
    assert {path.name for path in repository.iterdir() if path.is_dir()} == set(models)
    types_ = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
    for name in models[1:]:
        config = parse(repository / name / "config.pbtxt")
        assert (config.name, config.backend, config.max_batch_size) == (name, "onnxruntime", 64)
        assert config.HasField("dynamic_batching") and [p.name for p in (repository / name / "1").iterdir()]
        session = session_of(repository / name / "1/model.onnx")
        for told, found in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
            assert [t.name for t in told] == [f.name for f in found]
            for t, f in zip(told, found, strict=True):
                reshaped = t.reshape.shape if t in config.input and t.HasField("reshape") else t.dims
                assert [f.shape[0], *reshaped] == ["n", *f.shape[1:]]
                assert ENUMS["DataType"][t.data_type] == types_[f.type]
    router = parse(repository / "random/config.pbtxt")
    assert (router.name, router.backend, router.max_batch_size) == ("random", "python", 64)
    assert {i.name: i.optional for i in router.input} == {"labels": False, "z": True, "seed": True}
    assert {p.key: p.value.string_value for p in router.parameters} == {
        "students": "random_student_",
        "max_resident": "1",
        "steps": "1",
    }
    assert router.instance_group[0].count == 1


class Server:
    """What the server gives a python model, on ONNX Runtime."""

    def __init__(self, repository: Path) -> None:
        self.repository, self.loaded = repository, list[str]()

    def module(self) -> types.ModuleType:
        server, module = self, types.ModuleType("triton_python_backend_utils")

        class Tensor:
            def __init__(self, name: str, array: np.ndarray) -> None:
                self.name, self.array = name, array

            def as_numpy(self) -> np.ndarray:
                return self.array

        class Response:
            def __init__(self, output_tensors: Any = (), error: Any = None) -> None:
                self.tensors, self.error_ = list(output_tensors), error

            def has_error(self) -> bool:
                return self.error_ is not None

            def error(self) -> Any:
                return self.error_

        class Request:
            def __init__(self, model_name: str = "", requested_output_names: Any = (), inputs: Any = ()) -> None:
                self.model, self.tensors = model_name, list(inputs)

            def exec(self) -> Response:
                assert self.model in server.loaded
                config = parse(server.repository / self.model / "config.pbtxt")
                given = {}
                for told, tensor in zip(config.input, self.tensors, strict=True):
                    assert tensor.name == told.name and list(tensor.array.shape[1:]) == list(told.dims)
                    shape = told.reshape.shape if told.HasField("reshape") else told.dims
                    given[tensor.name] = tensor.array.reshape(len(tensor.array), *shape)
                path = server.repository / self.model / "1/model.onnx"
                session = session_of(path)
                return Response([Tensor("images", session.run(["images"], given)[0])])

        def by_name(holder: Any, name: str) -> Any:
            return next((tensor for tensor in holder.tensors if tensor.name == name), None)

        module.Tensor, module.InferenceRequest, module.InferenceResponse = Tensor, Request, Response  # type: ignore
        module.get_input_tensor_by_name = module.get_output_tensor_by_name = by_name  # type: ignore
        module.TritonError = type("TritonError", (), {"__init__": lambda self, m: setattr(self, "text", m)})  # type: ignore
        module.load_model, module.unload_model = self.loaded.append, self.loaded.remove  # type: ignore
        return module


def routed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Server, Callable[..., Any]]:
    """Return the server, and what asks its router."""
    import json

    server = Server(repository)
    utilities = server.module()
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utilities)
    spec = importlib.util.spec_from_file_location("router", repository / "random/1/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    router = module.TritonPythonModel()
    config = parse(repository / "random/config.pbtxt")
    told = {
        "output": [{"dims": [str(d) for d in config.output[0].dims]}],
        "parameters": {p.key: {"string_value": p.value.string_value} for p in config.parameters},
    }
    router.initialize(
        {"model_repository": str(repository / "random"), "model_version": "1", "model_config": json.dumps(told)}
    )

    def ask(**arrays: np.ndarray) -> Any:
        tensors = [utilities.Tensor(name, array) for name, array in arrays.items()]
        (answer,) = router.execute([utilities.InferenceRequest(inputs=tensors)])
        return answer

    return server, ask


@pytest.mark.slow
def test_two_steps_are_routed_with_the_noise_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    run = trained(tmp_path, SMALL, "[2.5, 0.5]")
    export(RunDir(run), tmp_path / "given", "triton", options=ExportOptions(bench=False, max_resident=2))
    _, ask = routed(tmp_path / "given", monkeypatch)
    classes, rng = [3, 0, 8], np.random.default_rng(0)
    z, noise = (rng.standard_normal(size, np.float32) for size in ((3, 1, 8, 8), (3, 1, 1, 8, 8)))
    images = ask(labels=np.array(classes)[:, None], z=z, noise=noise).tensors[0].array
    wanted = RunStudents(msdcli.load(run)).generate(z, classes, noise)
    torch.testing.assert_close(torch.from_numpy(images), wanted, rtol=1e-4, atol=1e-4)
    seeded = [ask(labels=np.array(c)[:, None], seed=np.array(c)[:, None]).tensors[0].array for c in ([0, 3], [3])]
    np.testing.assert_allclose(seeded[0][1:], seeded[1], atol=1e-5)


def test_the_router_answers_as_the_run_does(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, ask = routed(repository, monkeypatch)
    classes = [3, 0, 8, 9, 3]
    labels, z = np.array(classes)[:, None], np.random.default_rng(0).standard_normal((5, 1, 8, 8), np.float32)
    images = ask(labels=labels, z=z).tensors[0].array
    run = repository.parent / "runs/random"
    torch.testing.assert_close(
        torch.from_numpy(images), of_run(run, torch.from_numpy(z), classes), rtol=1e-4, atol=1e-4
    )
    assert len(server.loaded) == 1, "one student at a time was asked for"
    seeded = [ask(labels=labels[at], seed=np.array(at)[:, None]).tensors[0].array for at in ([0, 1, 2], [2, 0])]
    np.testing.assert_allclose(seeded[0][[2, 0]], seeded[1], atol=1e-5)
    assert ask(labels=np.array([[4]])).tensors[0].array.shape == (1, 1, 8, 8)
    refused = ask(labels=np.array([[10]]), z=z[:1])
    assert refused.has_error() and "class 10 does not exist" in refused.error().text


def test_the_repository_has_a_card_and_a_record(repository: Path) -> None:
    record = read_json(repository / "export.json")
    assert record["students"][1]["file"] == "random_student_1/1/model.onnx"
    assert (
        msdcli.load(repository.parent / "runs/random").partition.parts
        == read_json(repository / "random/1/partition.json")["parts"]
    )
    assert "--model-control-mode explicit --load-model random" in (repository / "README.md").read_text()
