"""Files and folders that are no teacher say what they are, and what to give in their place."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from msdcli import nets
from msdcli.engine.checkpoints.model import save_model
from msdcli.engine.inputs import importing
from msdcli.errors import UserError
from msdcli.recipe.networks import MLPSettings
from tests.conftest import Msd


def tensors(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(2) for name in names}, path)


def config(folder: Path, **content: object) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content))


def make(place: Path) -> None:
    """Write what people have at hand."""
    (place / "page.pkl").write_text("<!DOCTYPE html><html>404</html>")
    with zipfile.ZipFile(place / "model.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    tensors(place / "lora.safetensors", "unet.down_blocks.0.to_q.lora_A.weight")
    tensors(place / "peft/adapter_model.safetensors", "base_model.model.x.lora_B.weight")
    tensors(place / "single.safetensors", "model.diffusion_model.input_blocks.0.0.weight")
    tensors(place / "alone.safetensors", "x")
    config(place / "vae", _class_name="AutoencoderKL")
    config(place / "control", _class_name="ControlNetModel")
    config(place / "pipeline/unet", _class_name="UNet2DModel")
    (place / "pipeline/model_index.json").write_text("{}")
    tensors(place / "pipeline/unet/diffusion_pytorch_model.safetensors", "x")
    config(place / "unet", _class_name="UNet2DModel\x1b[2J")
    config(place / "text", architectures=["CLIPTextModel"])
    (place / "empty").mkdir()
    (place / "pictures/cat").mkdir(parents=True)


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("page.pkl", "is a web page", "download it again"),
        ("model.ckpt", "is a file of torch.save", "from_single_file"),
        ("lora.safetensors", "holds LoRA weights", "fuse_lora"),
        ("peft", "holds LoRA weights", "fuse_lora"),
        ("single.safetensors", "is a single-file checkpoint", "from_single_file"),
        ("alone.safetensors", "holds tensors alone", "model_index.json"),
        ("vae", "is AutoencoderKL: an autoencoder", "--autoencoder"),
        ("control", "is ControlNetModel, which steers", "whole pipeline"),
        ("pipeline/unet", "is UNet2DModel alone", "pipeline: "),
        ("pipeline/unet/diffusion_pytorch_model.safetensors", "is a file of a pipeline", "give the folder: "),
        ("unet", "is UNet2DModel\ufffd[2J alone", "whole pipeline"),
        ("text", "is CLIPTextModel of the transformers library", "whole pipeline"),
        ("empty", "is an empty folder", "msd docs teacher"),
        ("pictures", "no teacher that msd wrote: it holds cat", "msd docs teacher"),
    ],
)
def test_what_is_no_teacher_is_named(tmp_path: Path, name: str, what: str, hint: str) -> None:
    make(tmp_path)
    for ask in (importing.read, importing.inspect):
        with pytest.raises(UserError) as refused:
            ask(tmp_path / name)
        assert what in refused.value.message and hint in (refused.value.hint or "")


def test_a_damaged_teacher_that_somebody_brought_is_not_to_be_removed(tmp_path: Path) -> None:
    save_model(tmp_path, nets.build(MLPSettings(), shape=(2,), num_classes=3, sigma_data=0.5), {})
    with pytest.raises(UserError, match="in msd's format already"):
        importing.read(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or truncated") as refused:
        importing.inspect(tmp_path)
    assert refused.value.hint == "it did not arrive whole: download or copy it again"


def test_a_run_is_no_teacher_and_has_one(finished: Path, msd: Msd, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"teacher: {{path: {finished}}}\nstages: [{{objective: dm, pairs: none}}]\npartition: {{students: 2}}\n"
    )
    refused = msd("distill", "r.yaml")
    assert refused.returncode == 2 and f"give the folder of its teacher: {finished / 'teacher'}" in refused.stderr
    refused = msd("recipes", "new", str(finished), "new.yaml")
    assert refused.returncode == 2 and f"msd recipes new --teacher {finished}/teacher" in refused.stderr
