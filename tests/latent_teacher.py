"""A tiny latent teacher, built and saved by the diffusers library: a DiT and a KL autoencoder, random weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")

from tests.nets.edm.edm_format import shake

DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 4,
    "patch_size": 2,
    "num_embeds_ada_norm": 4,
    "norm_num_groups": 4,
}
VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 8,
    "scaling_factor": 0.6,
}


def latent_pipeline(folder: Path, **vae: Any) -> tuple[Any, Any]:
    """Save a DiTPipeline of 4 classes on 8x8 pictures, latents [4, 4, 4]; return transformer and autoencoder."""
    torch.manual_seed(0)
    transformer = shake(diffusers.DiTTransformer2DModel(**DIT)).eval().requires_grad_(False)
    autoencoder = shake(diffusers.AutoencoderKL(**VAE | vae)).eval().requires_grad_(False)
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    pipeline = diffusers.DiTPipeline(transformer=transformer, vae=autoencoder, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    assert "vae" in json.loads((folder / "model_index.json").read_text())
    return transformer, autoencoder


def picture_folder(root: Path, *, per_class: int = 6, size: int = 8) -> Path:
    """Four classes of random pictures."""
    for c, name in enumerate(("ant", "bee", "cow", "doe")):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.random.default_rng([c, i]).integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


RECIPE = """
name: latent
threads: 1
workers: 1
data: {name: folder, path: pictures}
teacher: {path: pipeline, solver: {steps: 2}}
latents: {batch: 5, dtype: float32}
partition: {students: 2}
pairs: {count: 16, shard: 8}
stages:
  - {objective: dm, steps: 2, batch: 4, fake_updates: 1, log_every: 1}
evaluation: {samples: 40, judge: off}
"""
