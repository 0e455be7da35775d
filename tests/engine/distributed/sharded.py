"""A program for torchrun: train one student in each of several ways, alone or by all processes together, sharded.

torchrun ... tests/engine/sharded.py FOLDER CASE...
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from msdcli import nets
from msdcli.data import open_data
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.draws import Source
from msdcli.diffusion.guidance import Guided
from msdcli.engine.distributed.group import ProcessGroup, join_torchrun
from msdcli.engine.train.student import Student, distill_student
from msdcli.recipe import Recipe
from msdcli.recipe.data import DigitsSettings
from msdcli.recipe.networks import DiffusersNetworkSettings, EdmNetworkSettings, NetworkSettings, UNetSettings

EDM2 = {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "model_channels": 8, "channels_per_head": 8}
DIFFUSERS = {
    **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "layers_per_block": 1},
    **{"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]},
    **{"norm_num_groups": 4, "attention_head_dim": 4, "num_class_embeds": 10},
}
UNET = UNetSettings(channels=8, embedding=8)
DM = {"objective": "dm", "steps": 3, "batch": 8, "fake_updates": 1, "pairs": "none", "log_every": 1, "clip": 1.0}
ADM = DM | {"objective": "adm", "head_weight": 1.0, "gan_weight": 0.1}
# A gradient that passes through the frozen teacher and the fake network.
SID = DM | {"objective": "sid", "alpha": 0.5}


def plain(settings: NetworkSettings) -> Denoiser:
    """A network whose every weight matters: none is zero."""
    torch.manual_seed(0)
    net = nets.build(settings, shape=(1, 8, 8), num_classes=10, sigma_data=0.5)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_(0, 0.05)
    return net.requires_grad_(False).eval()


def guided(guide: bool) -> Denoiser:
    teacher = plain(UNET)
    other = copy.deepcopy(teacher) if guide else None
    for parameter in other.parameters() if other else []:
        parameter.mul_(0.9)
    return Guided(teacher, scale=(1.0, 3.0), interval=(0.1, 50.0), guide=other)


# Teacher and stages by name.
CASES: dict[str, tuple[Callable[[], Denoiser], list[dict[str, Any]]]] = {
    # Large steps: without forced normalisation the weights would grow visibly.
    "edm2": (lambda: plain(EdmNetworkSettings(preconditioning="EDM2", arguments=EDM2)), [DM | {"lr": 0.05}, ADM]),
    "guided": (lambda: guided(False), [DM]),
    "sid": (lambda: plain(UNET), [DM, SID | {"sigmas": [2.5, 0.5], "gan_weight": 0.1, "divergence": "kl"}]),
    # Small steps: Adam takes a whole one in the direction of a gradient that is nothing but rounding.
    "sid-guided": (lambda: guided(False), [SID, ADM | {"features": "teacher", "divergence": "js", "lr": 1e-4}]),
    "autoguided": (lambda: guided(True), [ADM | {"features": "teacher"}]),
    "diffusers": (
        lambda: plain(DiffusersNetworkSettings(class_name="UNet2DModel", config=DIFFUSERS, prediction="epsilon")),
        [ADM],
    ),
}


def train(folder: Path, case: str, group: ProcessGroup, **changes: Any) -> None:
    """Take a student through the stages of a case."""
    make, stages = CASES[case]
    sections = {
        "name": case,
        "threads": 1,
        "precision": "float32",
        "fsdp": True,
        "checkpoint_seconds": 0,
        "stages": stages,
    }
    recipe = Recipe.model_validate(sections | {"data": {"name": "digits"}, "partition": {"students": 1}} | changes)
    folders = [folder / case / f"{i}-{stage['objective']}" for i, stage in enumerate(stages)]
    source = Source(open_data(DigitsSettings()), range(10))
    distill_student(Student(0, recipe, make(), source, folders, torch.device("cpu"), group), lambda _: None)


def main(folder: str, *names: str) -> None:
    with join_torchrun() as group:
        for name in names:
            train(Path(folder), name, group)


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    main(*sys.argv[1:])
