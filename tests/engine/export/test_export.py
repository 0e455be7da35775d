"""msd export: every format gives the run's own samples, and a folder appears only when it does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import msdcli
from msdcli import nets
from msdcli.diffusion.denoiser import Denoiser, one_step
from msdcli.diffusion.generator import Generator
from msdcli.engine.checkpoints.model import save_model
from msdcli.engine.export import onnx as export_onnx
from msdcli.engine.export import static_int8
from msdcli.engine.export import torch as export_torch
from msdcli.engine.export.export import export
from msdcli.engine.export.format import TOLERANCES, ExportOptions, RunStudents
from msdcli.engine.export.given import students as router
from msdcli.partition import Partition
from msdcli.recipe import load
from msdcli.recipe.networks import EdmNetworkSettings, MLPSettings, UNetSettings
from msdcli.rundir import RunDir, read_json, write_json
from tests.conftest import ROOT, Msd, environment
from tests.nets.edm.edm_format import shake

EDM: dict[str, Any] = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
NCSN = {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual"}
NETWORKS = {
    "unet": UNetSettings(channels=8, attention=[4], embedding=16),
    "unet of patches": UNetSettings(channels=8, attention=[4], embedding=16, patch=2),
    "mlp": MLPSettings(channels=16, blocks=1),
    "ddpmpp": EdmNetworkSettings(preconditioning="VP", arguments=EDM),
    "ncsnpp": EdmNetworkSettings(preconditioning="VE", arguments=EDM | NCSN | {"resample_filter": [1, 3, 3, 1]}),
    "adm": EdmNetworkSettings(
        preconditioning="iDDPM",
        arguments=EDM
        | {"model_type": "DhariwalUNet", "model_channels": 64, "channel_mult": [1], "channel_mult_emb": 1},
    ),
    "edm2": EdmNetworkSettings(preconditioning="EDM2", arguments=EDM | {"channels_per_head": 8}),
}
SMALL = UNetSettings(channels=4, multipliers=[1], embedding=8)
SIGMA = 2.5
RECIPE = """
name: {name}
data: {{name: digits}}
partition: {{students: 2, method: explicit, parts: [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]}}
stages: [{{objective: dm, steps: 1, sigmas: {sigmas}}}]
"""


def network(settings: Any, seed: int = 0) -> Denoiser:
    """A network whose every weight is seen in its output."""
    planar = isinstance(settings, MLPSettings)
    torch.manual_seed(seed)
    net = nets.build(settings, shape=(2,) if planar else (1, 8, 8), num_classes=10, sigma_data=0.5)
    return shake(net, seed=seed).eval().requires_grad_(False)


def trained(folder: Path, settings: Any, sigmas: str = "[2.5]") -> Path:
    """A run directory of two students of digits, as `msd distill` leaves one, with random weights."""
    (folder / "random.yaml").write_text(RECIPE.format(name="random", sigmas=sigmas))
    run, recipe = RunDir(folder / "runs" / "random"), load(folder / "random.yaml")
    run.adopt(recipe)
    write_json(run.record_file, {"commands": [], "class_names": [f"digit {c}" for c in range(10)], "shape": [1, 8, 8]})
    Partition(recipe.partition.parts or [], 10, "explicit").save(run.partition)
    for k in range(2):
        record = {"steps": 1, "stage": recipe.stages[0].model_dump(mode="json")}
        save_model(run.stage(k, 0, "dm"), network(settings, seed=k), record)
    return run.root


def requests(shape: tuple[int, ...], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(count)
    return torch.randn(count, *shape), torch.randint(10, (count,))


def of_run(run: Path, z: torch.Tensor, classes: list[int]) -> torch.Tensor:
    return RunStudents(msdcli.load(run)).generate(z, classes)


@pytest.mark.parametrize(
    "kind", [kind if kind in ("unet", "edm2") else pytest.param(kind, marks=pytest.mark.slow) for kind in NETWORKS]
)
def test_programs_and_graphs_are_the_network_for_any_batch(tmp_path: Path, kind: str) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")

    net = network(NETWORKS[kind])
    traced = export_torch.program(Generator(net, (SIGMA,)))
    export_onnx.write_graph(traced, tmp_path / "model.onnx", "float32")
    model = onnx.load(tmp_path / "model.onnx")
    assert [o.version for o in model.opset_import if o.domain == ""] == [export_onnx.OPSET]
    assert str(ROOT).encode() not in (tmp_path / "model.onnx").read_bytes(), "paths of this machine travel along"
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 7):
        z, c = requests(net.shape, count)
        wanted = one_step(net, z, SIGMA, c)
        assert wanted.std() > 0.01
        torch.testing.assert_close(traced.module()(z, c), wanted, rtol=1e-5, atol=1e-5)
        (images,) = session.run(["images"], {"z": z.numpy(), "labels": c.numpy()})
        assert (torch.from_numpy(images) - wanted).abs().max() < 1e-4 * max(1.0, wanted.abs().max().item())


def test_edm2_baked_is_edm2() -> None:
    from msdcli.nets.edm.edm2 import MPConv, bake

    net, z, c = network(NETWORKS["edm2"]), *requests((1, 8, 8), 5)
    wanted = one_step(net, z, SIGMA, c)
    baked = bake(net)
    assert not any(isinstance(module, MPConv) for module in baked.modules())
    torch.testing.assert_close(one_step(baked, z, SIGMA, c), wanted, rtol=1e-5, atol=1e-5)


WITHOUT_MSD = """
import sys
sys.modules["msdcli"] = None
sys.path.insert(0, sys.argv[1])
import numpy as np
from students import Students
students = Students(max_resident=1)
with np.load(sys.argv[2]) as file:
    images = students.generate(file["z"], file["classes"].tolist())
np.savez(sys.argv[3], images=images, sampled=students.sample(["digit 3", 8, 8], seed=7))
assert len(students.resident) == 1
try:
    students.generate(images, [10] * len(images))
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_an_export_runs_where_msd_is_not(small: Path, msd: Msd, tmp_path: Path, kind: str) -> None:
    given = small.parent.parent / "given"
    if kind == "torch":
        given = tmp_path / "given"
        done = msd("export", str(small), "--format", "torch", "--out", "given", "--no-bench")
        assert done.returncode == 0, done.stderr
    record = read_json(given / "export.json")
    assert record["max_difference"] <= record["tolerance"] < 1e-3 and record["compared"] == 64
    z, classes = requests((1, 8, 8), 9)
    np.savez(tmp_path / "asked.npz", z=z, classes=classes)
    words = [sys.executable, "-c", WITHOUT_MSD, str(given), "asked.npz", "answer.npz"]
    told = subprocess.run(words, cwd=tmp_path, env=environment(PYTHONPATH=""), capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == "class 10 does not exist: there are 0 to 9"
    with np.load(tmp_path / "answer.npz") as answer:
        images, sampled = torch.from_numpy(answer["images"]), torch.from_numpy(answer["sampled"])
    torch.testing.assert_close(images, of_run(small, z, classes.tolist()), rtol=1e-4, atol=1e-4)
    if kind == "torch":
        torch.testing.assert_close(sampled, msdcli.sample(small, [3, 8, 8], seed=7), rtol=1e-4, atol=1e-4)
    assert not torch.equal(sampled[1], sampled[2])


def test_the_router_keeps_within_its_memory(small: Path) -> None:
    from msdcli.engine.export.given.students import Students

    given = small.parent.parent / "given"
    size = read_json(given / "export.json")["students"][0]["bytes"]
    assert size == (given / "students/0/model.onnx").stat().st_size
    for limits, held in (
        ({}, [0, 1]),
        ({"max_resident": 1}, [1]),
        ({"memory": 3 * size}, [0, 1]),
        ({"memory": 9}, [1]),
    ):
        students = Students(given, **limits)
        students.sample([0, 1])
        assert list(students.resident) == held
    names = [students.class_names[c] for c in (0, 1)]
    assert np.array_equal(students.sample(names, seed=2), students.sample([0, 1], seed=2))


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_weights_in_fewer_bits_and_what_they_cost(finished: Path, msd: Msd, tmp_path: Path, precision: str) -> None:
    pytest.importorskip("onnxscript")
    shutil.copytree(finished.parent, tmp_path / "runs")
    other = read_json(finished / "metrics/l1_toy2d.json") | {"metric": "sliced_wasserstein", "samples": 50}
    (tmp_path / "runs/tiny/metrics/fd_clip.json").write_text(json.dumps(other))  # no figure of the run's own end
    words = ["export", "runs/tiny", "--format", "onnx", "--precision", precision, "--no-bench", "--json"]
    done = msd(*words, "--out", "given")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert 0 < record["max_difference"] <= record["tolerance"]
    stored = read_json(finished / "metrics/l1_toy2d.json")
    whole = next(r for r in stored["rows"] if (r["who"], r["group"]) == ("students", "whole"))
    distance = record["distance"]
    assert distance["float32"] == pytest.approx(whole["values"]["l1_toy2d"]) and distance["samples"] == 200
    assert distance["change"] == distance[precision] - distance["float32"]
    assert f"{distance[precision]:.4g} in {precision}" in (tmp_path / "given/README.md").read_text()


def test_convolutions_are_kept_in_fewer_bits(tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")

    net, path = network(NETWORKS["edm2"]), tmp_path / "m.onnx"
    z, c = requests(net.shape, 6)
    wanted = one_step(net, z, SIGMA, c)
    export_onnx.write_graph(export_torch.program(Generator(net, (SIGMA,))), path, "float32")
    for precision, kind in (("float16", onnx.TensorProto.FLOAT16), ("int8", onnx.TensorProto.INT8)):
        model = onnx.load(path)
        export_onnx.reduce_weights(model, precision)
        convolutions = [t for t in model.graph.initializer if len(t.dims) == 4 and t.dims[-1] == 3]
        assert len(convolutions) >= 10 and {t.data_type for t in convolutions} == {kind}
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (images,) = session.run(None, {"z": z.numpy(), "labels": c.numpy()})
        difference = (torch.from_numpy(images) - wanted).abs().max()
        assert 0 < difference < TOLERANCES[precision] * max(1.0, wanted.abs().max().item())


@pytest.mark.slow
def test_layers_that_compute_in_8_bits(finished: Path, msd: Msd, tmp_path: Path) -> None:
    """Every layer takes and gives int8, with ranges from its own student's inputs; the effect is measured as ever."""
    onnx = pytest.importorskip("onnx")
    words = ["export", str(finished), "--format", "onnx", "--precision", "int8-static", "--no-bench", "--json"]
    done = msd(*words, "--out", "given")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert 0 < record["max_difference"] <= record["tolerance"] and record["distance"]["int8-static"] > 0
    assert " in int8-static" in (tmp_path / "given/README.md").read_text()
    scales = []
    for k in range(2):
        graph = onnx.load(tmp_path / f"given/students/{k}/model.onnx").graph
        made = {name: node.op_type for node in graph.node for name in node.output}
        layers = [node for node in graph.node if node.op_type in static_int8.LAYERS]
        assert len(layers) > 3
        assert all({made[name] for name in node.input[:2]} == {"DequantizeLinear"} for node in layers)
        scales.append({t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith("_scale")})
    first = next(name for name in scales[0] if scales[0][name].size == 1)
    assert any(not np.array_equal(scales[0][name], scales[1].get(name)) for name in scales[0]) and scales[0][first] > 0


def test_ranges_are_measured_on_a_students_own_classes_and_steps() -> None:
    one, two = (static_int8.calibration((1, 8, 8), steps, [3, 7], 0) for steps in (1, 3))
    assert {int(c) for batch in one for c in batch["labels"]} == {3, 7} and "noise" not in one[0]
    assert two[0]["noise"].shape == (64, 2, 1, 8, 8) and two[0]["z"].dtype == np.float32
    again = static_int8.calibration((1, 8, 8), 1, [3, 7], 0)
    assert all(np.array_equal(a["z"], b["z"]) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one[0]["z"], one[1]["z"])
    assert not np.array_equal(static_int8.calibration((1, 8, 8), 1, [3, 7], 1)[0]["z"], one[0]["z"])


# A folder that is there is good.


def test_samples_that_differ_are_exit_1_and_leave_what_was_there(
    msd: Msd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path, SMALL)
    assert msd("export", str(run), "--out", "given", "--no-bench").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "given").rglob("*")}
    whole = export_torch.program

    def slightly_off(generator: Generator, device: str) -> Any:
        return whole(Generator(generator.net, tuple(sigma * 1.001 for sigma in generator.sigmas)), device)

    monkeypatch.setattr(export_torch, "program", slightly_off)
    done = msd("export", str(run), "--format", "torch", "--out", "given")
    assert (done.returncode, "differ from the run's by" in done.stderr) == (1, True), done.stderr
    fresh = msd("export", str(run), "--format", "torch", "--out", "fresh")
    assert (fresh.returncode, sorted(p.name for p in tmp_path.iterdir())) == (1, ["given", "random.yaml", "runs"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "given").rglob("*")} == before


def test_an_export_takes_the_place_of_an_older_one(small: Path, msd: Msd, tmp_path: Path) -> None:
    shutil.copytree(small.parent.parent / "given", tmp_path / "given")
    assert msd("export", str(small), "--out", "given", "--no-bench").returncode == 0
    assert sorted(p.name for p in (tmp_path / "given").iterdir()) == [
        *("README.md", "bundle.json", "partition.json", "students"),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["given"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "torch", "--precision", "int8"], "format torch is float32"),
        (["--format", "onnx", "--aot"], "aot is for format torch"),
        (["--format", "torch", "--device", "cuda"], "only what is compiled ahead of time is for one device"),
        (["--format", "torch", "--aot", "--device", "gpu"], "device 'gpu' does not exist"),
        (["--format", "torch", "--aot", "--device", "cuda:9"], "cuda:9 is not here"),
        (["--format", "diffusers"], "any network goes with --format bundle or --format onnx"),
        (["--memory", "much"], "'much' is no amount of memory"),
    ],
)
def test_what_does_not_go_together_is_refused(msd: Msd, tmp_path: Path, words: list[str], said: str) -> None:
    run = trained(tmp_path, SMALL)
    before = sorted(tmp_path.rglob("*"))
    done = msd("export", str(run), *words)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_ahead_of_time_needs_a_compiler(msd: Msd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path, SMALL)
    monkeypatch.setattr("shutil.which", lambda name: None)
    done = msd("export", str(run), "--format", "torch", "--aot", "--out", "given")
    assert (done.returncode, "no C++ compiler" in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "given").exists()


def test_what_is_compiled_says_for_which_device_and_refuses_others(
    msd: Msd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that compiles nothing: the record, and who may open it."""
    run, place = trained(tmp_path, SMALL), tmp_path / "given"
    monkeypatch.setattr(export_torch, "save_compiled", torch.export.save)
    monkeypatch.setattr(
        torch._inductor, "aoti_load_package", lambda path: torch.export.load(path).module(), raising=False
    )
    done = msd("export", str(run), "--format", "torch", "--aot", "--out", "given", "--no-bench")
    assert done.returncode == 0, done.stderr
    record = read_json(place / "export.json")
    assert record["compiled_for"] == router.device_record("cpu") and record["compiled_for"]["device"] == "cpu"
    assert router.Students(place).sample([0]).shape[0] == 1
    with pytest.raises(ValueError, match="compiled ahead of time for cpu, not for cuda:1"):
        router.Students(place, device="cuda:1")
    built = {"device": "cuda", "name": "NVIDIA A100", "capability": "8.0"}
    write_json(place / "export.json", record | {"compiled_for": built})
    with pytest.raises(ValueError, match="compiled ahead of time for cuda, and there is none here"):
        router.Students(place)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match=r"NVIDIA A100 \(8\.0\); here is NVIDIA H100 \(9\.0\)"):
        router.Students(place)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert router.Students(place).device == "cuda"


@pytest.mark.parametrize(("built", "here", "runs"), [("AVX2", "AVX512", True), ("AVX512", "AVX2", False)])
def test_compiled_for_a_cpu_of_fewer_instructions(
    built: str, here: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = router.device_record("cpu") | {"capability": built}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: here)
    with nullcontext() if runs else pytest.raises(ValueError, match=f"{built}.*here is .*{here}"):
        router.refuse_other_device(record, "cpu")
    with pytest.raises(ValueError, match="here is"):
        router.refuse_other_device(record | {"name": "another machine"}, "cpu")


@pytest.mark.slow
def test_compiled_ahead_of_time(msd: Msd, tmp_path: Path) -> None:
    run = trained(tmp_path, SMALL)
    done = msd("export", str(run), "--format", "torch", "--aot", "--out", "given", "--no-bench")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "given/students/1/model.aot.pt2").is_file()


def test_speed_is_that_of_requests_that_are_routed(msd: Msd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msdcli.engine.export import speed as export_bench

    monkeypatch.setattr(export_bench, "SECONDS", 0.0)
    run = trained(tmp_path, SMALL)
    done = msd("export", str(run), "--out", "given", "--memory", "1MiB")
    assert done.returncode == 0 and "students in memory" in done.stdout, done.stderr
    speed = read_json(tmp_path / "given/bundle.json")["speed"]
    assert [(r["batch"], r["resident"]) for r in speed] == [(1, "all"), (64, "all"), (1, "1 MiB"), (64, "1 MiB")]
    assert all(r["images_per_second"] > 0 and r["milliseconds_95"] >= r["milliseconds"] > 0 for r in speed)
    asked = export_bench._requests([[0, 2], [1]], 3)
    assert [next(asked), next(asked)] == [[0, 1, 2], [1, 0, 1]]


# Cards, and the Hub.


def test_the_card_says_what_was_measured_and_how(finished: Path, msd: Msd, tmp_path: Path) -> None:
    words = ("export", str(finished), "--out", "given", "--no-bench", "--license", "apache-2.0")
    assert msd(*words).returncode == 0
    _, header, text = (tmp_path / "given/README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["license"] == "apache-2.0" and card["library_name"] == "msdcli"
    (metric,) = card["model-index"][0]["results"][0]["metrics"]
    stored = read_json(finished / "metrics/l1_toy2d.json")
    whole = next(r for r in stored["rows"] if (r["who"], r["group"]) == ("students", "whole"))
    assert metric["value"] == pytest.approx(whole["values"]["l1_toy2d"], abs=1e-6)
    assert metric["args"]["samples"] == 200 and metric["args"]["protocol"] == stored["protocol"]
    assert metric["args"]["students_sha256"] == stored["students_sha256"]
    assert "| l1_toy2d |" in text and f"`{stored['students_sha256'][1][:16]}`" in text


def test_figures_of_other_weights_are_not_on_the_card(msd: Msd, tmp_path: Path) -> None:
    run = trained(tmp_path, SMALL)
    row = {"who": "students", "group": "whole", "values": {"fd_digits": 0.1}, "reference": 5}
    result = {"metric": "fd_digits", "protocol": "p", "samples": 5, "rows": [row], "network": {}}
    write_json(run / "metrics/fd_digits.json", result | {"students_sha256": ["0" * 64, "1" * 64]})
    assert msd("export", str(run), "--out", "given", "--no-bench").returncode == 0
    assert "fd_digits" not in (tmp_path / "given/README.md").read_text()


def test_push_lays_out_a_repository(finished: Path, msd: Msd, tmp_path: Path) -> None:
    assert msd("export", str(finished), "--out", "given", "--no-bench").returncode == 0
    (tmp_path / "given/programs").mkdir()  # as `msd sample --runtime onnx` leaves it
    (tmp_path / "given/programs/.lock").write_text("host")
    before = sorted(tmp_path.rglob("*"))
    for words in ((), ("--to", "repository", "--dry-run")):
        listed = msd("push", "given", *words)
        assert listed.returncode == 0 and "students/1/model.safetensors" in listed.stdout
    assert sorted(tmp_path.rglob("*")) == before
    for _ in range(2):
        done = msd("push", "given", "--to", "repository", "--json")
        assert done.returncode == 0, done.stderr
    repository = tmp_path / "repository"
    assert "*.safetensors filter=lfs" in (repository / ".gitattributes").read_text()
    assert torch.equal(msdcli.load(repository).sample([0, 7]), msdcli.load(finished).sample([0, 7]))
    named = {f["name"] for f in json.loads(done.stdout)["files"]}
    assert not any("programs" in name for name in named)
    assert named == {str(p.relative_to(repository)) for p in repository.rglob("*") if p.is_file()} - {".gitattributes"}


def test_push_uploads_where_it_is_told_to(
    finished: Path, msd: Msd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    calls: list[tuple[str, Any]] = []

    class HfApi:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
    assert msd("export", str(finished), "--out", "given", "--no-bench").returncode == 0
    assert msd("push", "given", "--to", "hub:me/toy", "--dry-run").returncode == 0
    assert calls == []
    done = msd("push", "given", "--to", "hub:me/toy", "--private")
    assert done.returncode == 0 and "me/toy" in done.stdout, done.stderr
    assert calls[0][0] == "me/toy" and calls[0][1]["private"] and calls[1][1]["repo_id"] == "me/toy"
    assert "students/0/model.safetensors" in calls[1][1]["allow_patterns"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere",), "nowhere is no export"),
        (("given", "--to", "hub:me"), "'me' is no repository"),
        (("given", "--to", "mine"), "exists and is no export"),
        (("given", "--to", "given/inside"), "inside what is pushed"),
    ],
)
def test_push_refuses(finished: Path, msd: Msd, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    assert msd("export", str(finished), "--out", "given", "--no-bench").returncode == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    done = msd("push", *words)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_amounts_of_memory() -> None:
    from msdcli.cli.options import parse_bytes
    from msdcli.errors import UserError

    found = [parse_bytes(text) for text in ("1000", "2GB", "1.5 MiB", "3k")]
    assert found == [1000, 2 * 10**9, 3 * 2**19, 3000]
    for wrong in ("", "GB", "-1", "0", "2 parsecs", "1e9"):
        with pytest.raises(UserError, match="no amount of memory"):
            parse_bytes(wrong)


@pytest.mark.parametrize("kind", ["bundle", "torch", "onnx", "triton"])
def test_two_steps_are_unrolled_and_checked_against_the_run(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("onnxscript")
    run = trained(tmp_path, SMALL, "[2.5, 0.5]")
    record = export(RunDir(run), tmp_path / "given", kind, options=ExportOptions(bench=False))
    assert record["steps"] == 2 and record["max_difference"] <= record["tolerance"]
    z, classes = requests((1, 8, 8), 6)
    noise = torch.randn(6, 1, 1, 8, 8)
    wanted = RunStudents(msdcli.load(run)).generate(z, classes.tolist(), noise)
    one = RunStudents(msdcli.load(run, steps=1)).generate(z, classes.tolist())
    assert (wanted - one).abs().max() > 0.1, "the second step matters"
    if kind == "bundle":
        got = RunStudents(msdcli.load(tmp_path / "given")).generate(z, classes.tolist(), noise)
    elif kind == "triton":
        text = (tmp_path / "given/random_student_0/config.pbtxt").read_text()
        assert '"noise" data_type: TYPE_FP32 dims: [ 1, 1, 8, 8 ]' in text
        return
    else:
        from msdcli.engine.export.given.students import Students as Travelling

        students = Travelling(tmp_path / "given")
        got = torch.from_numpy(students.generate(z.numpy(), classes.tolist(), noise.numpy()))
        assert np.array_equal(students.sample([3, 7], seed=1), students.sample([3, 7], seed=1))
        if kind == "torch":  # its noise is msd's own
            mine = msdcli.sample(run, [3, 7], seed=1, device="cpu")
            np.testing.assert_allclose(students.sample([3, 7], seed=1), mine.numpy(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_size_of_a_graph_does_not_grow_with_its_steps(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    net = network(UNetSettings(channels=64, multipliers=[1], blocks=1, attention=[], embedding=32))
    sizes = []
    for levels in ((2.5,), (2.5, 1.0)):
        path = tmp_path / f"{len(levels)}" / "model.onnx"
        path.parent.mkdir()
        export_onnx.write_graph(export_torch.program(Generator(net, levels)), path, "float32")
        sizes.append(sum(file.stat().st_size for file in path.parent.iterdir()))
    assert sizes[1] < 1.3 * sizes[0], "the steps share their weights"
