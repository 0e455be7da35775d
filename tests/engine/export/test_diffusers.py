"""A pipeline folder that the diffusers library loads with the code inside it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("diffusers")

import torch

from msdcli.diffusion.generator import Generator
from msdcli.engine.export import onnx as export_onnx
from msdcli.engine.export import torch as export_torch
from msdcli.engine.export.diffusers import TEMPLATE, pipeline_class
from msdcli.recipe.networks import DiffusersNetworkSettings
from tests.conftest import Msd, environment
from tests.engine.export.test_export import SIGMA, network, of_run, one_step, requests, trained
from tests.nets.diffusers.test_denoiser import DIT, UNET

pytestmark = pytest.mark.filterwarnings("default")

LOAD = """
import sys
sys.modules["msdcli"] = None
import numpy as np
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[1], trust_remote_code=True)
with np.load("asked.npz") as file:
    z, classes = torch.from_numpy(file["z"]), file["classes"].tolist()
images = pipe(class_labels=classes, latents=z, output_type="pt").images
names = [f"digit {c}" for c in classes]
pictures = pipe(class_labels=names, generator=torch.Generator().manual_seed(0)).images
np.savez("answer.npz", images=images, size=pictures[8].size)
"""


def settings(kind: str, prediction: str) -> DiffusersNetworkSettings:
    name, config = {"unet": ("UNet2DModel", UNET), "dit": ("DiTTransformer2DModel", DIT)}[kind]
    return DiffusersNetworkSettings(class_name=name, config=config, prediction=prediction)


@pytest.mark.parametrize(
    ("kind", "prediction"), [("unet", "epsilon"), ("dit", "v_prediction"), ("unet", "sample"), ("dit", "flow")]
)
def test_the_library_loads_the_pipeline(msd: Msd, tmp_path: Path, kind: str, prediction: str) -> None:
    run = trained(tmp_path, settings(kind, prediction))
    done = msd("export", str(run), "--format", "diffusers", "--out", "given", "--no-bench")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "given/student_1/diffusion_pytorch_model.safetensors").is_file()
    if prediction not in ("epsilon", "flow"):
        return  # the export itself has read the folder back and compared
    z, classes = requests((1, 8, 8), 9)
    np.savez(tmp_path / "asked.npz", z=z, classes=classes)
    env = environment(PYTHONPATH="", HF_MODULES_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    words = [sys.executable, "-c", LOAD, str(tmp_path / "given")]
    told = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    with np.load(tmp_path / "answer.npz") as answer:
        images, size = torch.from_numpy(answer["images"]), answer["size"].tolist()
    torch.testing.assert_close(images, of_run(run, z, classes.tolist()), rtol=1e-4, atol=1e-4)
    assert size == [8, 8]


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_the_librarys_networks_as_program_and_graph(tmp_path: Path, kind: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    net: Any = network(settings(kind, "epsilon"))
    traced = export_torch.program(Generator(net, (SIGMA,)))
    export_onnx.write_graph(traced, tmp_path / "m.onnx", "float32")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert export_torch.max_batch(net) == (63 if kind == "unet" else export_torch.MAX_BATCH)
    for count in (1, 63):
        z, c = requests(net.shape, count)
        wanted = one_step(net, z, SIGMA, c)
        torch.testing.assert_close(traced.module()(z, c), wanted, rtol=1e-5, atol=1e-5)
        (images,) = session.run(None, {"z": z.numpy(), "labels": c.numpy()})
        assert np.abs(images - wanted.numpy()).max() < 1e-4 * max(1.0, wanted.abs().max().item())


def test_latents_are_no_pictures(tmp_path: Path) -> None:
    """A pipeline without the autoencoder gives them as they are, and never as noise in colours."""
    (tmp_path / "pipeline.py").write_text(TEMPLATE.read_text())
    finish = pipeline_class(tmp_path).finish
    latents = torch.zeros(2, 4, 8, 8)
    assert finish(None, latents, "pt") is latents
    for output_type in ("pil", "np"):
        with pytest.raises(ValueError, match="4 channels are latents and no pictures"):
            finish(None, latents, output_type)
