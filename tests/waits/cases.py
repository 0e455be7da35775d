"""What is run on a device that is not here: the networks, guidances, objectives and students that msd knows."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch
from pydantic import TypeAdapter
from torch import Tensor

from msdcli import nets
from msdcli.diffusion import draws as draws_module
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.draws import Source
from msdcli.diffusion.guidance import Guided
from msdcli.engine.checkpoints.manager import CheckpointManager
from msdcli.engine.train import log as log_module
from msdcli.engine.train import loop
from msdcli.nets.adapters import AdaptedDenoiser
from msdcli.nets.diffusers.prompt_store import PromptStore
from msdcli.objectives import Objective, objective_class
from msdcli.recipe.networks import DiffusersNetworkSettings, EdmNetworkSettings, MLPSettings, PrunedUNetSettings
from msdcli.recipe.networks import UNetSettings as Net
from msdcli.recipe.stages import DdoSettings, Stage
from msdcli.recipe.student import AdapterSettings
from msdcli.seeds import generator
from tests import latent_teacher, text_teacher
from tests.device import FakeDevice
from tests.tiny_unet import TINY_UNET

CLASSES, PROMPTS, SIDE = 3, 3, 8
ADM = {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0, "model_channels": 32}
ATTENTION = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
DIT = latent_teacher.DIT | {"in_channels": 3, "out_channels": 6, "sample_size": SIDE, "num_embeds_ada_norm": CLASSES}
SDXL = text_teacher.UNET | text_teacher.SDXL | {"cross_attention_dim": 16}
SD3 = text_teacher.SD3 | {"in_channels": 3, "out_channels": 3}


def _diffusers(class_name: str, config: dict[str, Any], **more: Any) -> DiffusersNetworkSettings:
    return DiffusersNetworkSettings(class_name=class_name, config=config, **more)  # type: ignore[arg-type]


NETWORKS: dict[str, Any] = {
    "mlp": MLPSettings(channels=16, blocks=2),
    "unet": Net(channels=8, multipliers=[1], embedding=8, attention=[8]),
    "pruned_unet": PrunedUNetSettings(channels=8, embedding=8, without=["decoder.8x8_1"]),
    "song": EdmNetworkSettings(arguments=ADM | {"model_type": "SongUNet"}),
    "adm": EdmNetworkSettings(arguments=ADM | {"model_type": "DhariwalUNet"}),
    "edm2": EdmNetworkSettings(preconditioning="EDM2", arguments={k: v for k, v in ADM.items() if k != "dropout"}),
    "unet2d": _diffusers("UNet2DModel", TINY_UNET | ATTENTION | {"attention_head_dim": 4, "num_class_embeds": CLASSES}),
    "dit": _diffusers("DiTTransformer2DModel", DIT),
    "sd15": _diffusers("UNet2DConditionModel", text_teacher.UNET, tokens=5),
    "sdxl": _diffusers("UNet2DConditionModel", SDXL, tokens=5),
    "sd3": _diffusers("SD3Transformer2DModel", SD3, tokens=5, prediction="flow"),
}
TEXT = [name for name, settings in NETWORKS.items() if getattr(settings, "reads_text", False)]
GUIDANCE = ("none", "classifier-free", "range", "guide", "perturbed")
# The stages of the registry, the teacher's among them: a new objective is covered when it is in the schema.
STAGES: dict[str, dict[str, Any]] = {
    (kind := get_args(cls.model_fields["objective"].annotation)[0]): {"objective": kind}
    for cls in (*get_args(get_args(Stage)[0]), DdoSettings)
}
# Beside their defaults, what has more parts: several levels, heads, other divergences, clipping, forgetting, adapters.
MORE: dict[str, dict[str, Any]] = {
    "dm of two levels": {"objective": "dm", "sigmas": [80.0, 2.5], "clip": 1.0, "fake_batch": "shared"},
    "dm with a fake of adapters": {"objective": "dm", "fake": {"kind": "lora", "rank": 2}, "lr_hold": 1.0},
    "dm that forgets": {"objective": "dm", "forget": {"classes": [1]}},
    "adm with an f-divergence": {"objective": "adm", "divergence": "kl", "gan_weight": 0.1, "head_penalty": 0.1},
    "sid with a discriminator": {"objective": "sid", "divergence": "kl", "gan_weight": 0.1, "through_ratio": True},
    "cd of two levels": {"objective": "cd", "sigmas": [80.0, 2.5], "anchor": 0.002},
    "tsm on features": {"objective": "tsm", "features": 1.0},
}


# What is left out, and why.
EXCLUDED = {
    "optimizer: radam": "torch has no kernel of it that skips a step; one read per update, which is counted",
    "checkpoints": "copies to the host on purpose, at the pace that checkpoint_seconds sets",
    "the stitch of several small networks": "asks once per batch of samples which network owns which rows",
    "prompts that do not fit on the device": "every look-up is then a copy from the host, on purpose",
    "bfloat16 of the diffusers library's networks": "torch.autocast knows no such device",
    "FID's Gaussians, bootstrap and extrapolation": "float64 of LAPACK on the host, from moments that were read once",
    "the published Inception in TorchScript, CLIP and DINOv2": "weights that need a download; their resizing is here",
    "ONNX, Triton and AOT packages": "run by other programs, compiled from the exported program, which is here",
    "sharded networks": "their collectives need processes",
}


def settings_of(given: dict[str, Any], cycles: int = 2) -> Any:
    """Return a stage's settings, for so many cycles of its steps, logged at the last step."""
    kind: Any = DdoSettings if given["objective"] == "ddo" else TypeAdapter(Stage)
    make = kind.model_validate if given["objective"] == "ddo" else kind.validate_python
    steps = cycles * len(given.get("sigmas", [0]))
    # Adam, whatever the objective's own is: radam waits once per update (EXCLUDED).
    stage = make({"optimizer": "adam"} | given | {"batch": 4, "steps": steps, "log_every": steps, "lr_hold": 1.0})
    return stage.model_copy(update={"fake_updates": 1}) if hasattr(stage, "fake_updates") else stage


def network(name: str) -> Denoiser:
    """A network of random weights, none of them zero, on the host."""
    shape = (2,) if name == "mlp" else (3, SIDE, SIDE)
    classes = 0 if name in TEXT else CLASSES
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nets.build(NETWORKS[name], shape=shape, num_classes=classes, sigma_data=0.5)
        for parameter in net.parameters():
            if parameter.abs().max() < 1e-3:
                torch.nn.init.normal_(parameter, 0, 0.05)
        if name in TEXT:
            tokens, (pooled,) = net.embedding_shapes  # type: ignore[misc, operator]
            net.prompts = PromptStore(torch.randn(PROMPTS + 1, *tokens), torch.randn(PROMPTS + 1, pooled))
    return net.requires_grad_(False).eval()


def guided(teacher: Denoiser, how: str) -> Denoiser:
    """Return the teacher with a guidance."""
    if how == "none":
        return teacher
    guide = copy.deepcopy(teacher) if how == "guide" else None
    scale = [1.0, 3.0] if how == "range" else 2.0
    return Guided(teacher, scale=scale, interval=(0.5, 5.0), guide=guide, layers=[] if how == "perturbed" else None)


def applies(name: str, how: str) -> bool:
    """Whether a network can be guided so: the library's class-conditional U-Net knows no row for no class, and what
    has no self-attention of its own (SD3 looks at images and prompts together) cannot be perturbed. msd refuses both.
    """
    if how == "perturbed":
        return name not in ("mlp", "pruned_unet", "sd3")
    return name != "unet2d" or how in ("none", "guide")


def takes(stage: str, name: str, how: str) -> bool:
    """Whether msd takes an objective of a network and a guidance; what it does not, it refuses before training.

    The reference of ddo, a stage of teachers, has no guidance; prompts are no classes to forget; EDM2's layers, which
    are its own, take no adapters.
    """
    if stage == "ddo" and how != "none":
        return False
    if (stage == "dm that forgets" and name in TEXT) or (stage == "dm with a fake of adapters" and name == "edm2"):
        return False
    return applies(name, how)


def product() -> list[tuple[str, str, str]]:
    """Every objective, network and guidance that msd takes."""
    return [case for case in itertools.product(STAGES | MORE, NETWORKS, GUIDANCE) if takes(*case)]


def there(net: Denoiser) -> Denoiser:
    """Bring a network to the device, with its prompts, which fit there."""
    net.to("meta")
    if net.prompts is not None:
        store = net.prompts
        store._resident[torch.device("meta")] = store._tokens.to("meta"), store._pooled.to("meta")
    return net


@contextlib.contextmanager
def device() -> Iterator[FakeDevice]:
    """The device, and what of torch and msd asks for a real one: generators, fused optimizers, tables made once."""
    fused = ["cpu", "cuda", "meta"]
    _forget_tables()
    with contextlib.ExitStack() as stack:
        for module in ("torch.optim.adam", "torch.optim.adamw", "torch.optim.optimizer", "torch.utils._foreach_utils"):
            with contextlib.suppress(AttributeError):
                stack.enter_context(mock.patch(f"{module}._get_fused_kernels_supported_devices", return_value=fused))
        stack.enter_context(
            mock.patch.object(draws_module, "generator", lambda *key, **_: generator(*key))  # torch has none there
        )
        try:
            yield stack.enter_context(FakeDevice())
        finally:
            _forget_tables()


def _forget_tables() -> None:
    """Let what msd makes once and keeps on a device be made again: this device is another one in every test."""
    for name, module in list(sys.modules.items()):
        for table in vars(module).values() if name.startswith("msdcli.") else ():
            if isinstance(table, functools._lru_cache_wrapper) and table.__module__ == name:
                table.cache_clear()


class Numbers:
    """A data set of random images, in memory."""

    mixed = True

    def __init__(self, shape: tuple[int, ...], classes: int = CLASSES, count: int = 24) -> None:
        self.shape, self.class_names = shape, [f"class {i}" for i in range(classes)]
        self._images = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)

    def __len__(self) -> int:
        return len(self._images)

    def images(self, numbers: Sequence[int]) -> Tensor:
        return self._images[list(numbers)]

    def labels(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor([n % len(self.class_names) for n in numbers])


def source_for(shape: tuple[int, ...]) -> Source:
    """What a student on the device draws from."""
    data = Numbers(shape)
    z = data.images(range(12))
    return Source(data, range(CLASSES), pairs=(z, z.sin(), data.labels(range(12))), device="meta")


def objective_of(stage: Any, name: str, how: str = "none", *, adapted: bool = False) -> Objective:
    """Build a stage's objective, and bring all of it to the device."""
    teacher = there(guided(network(name), how))
    student: Denoiser = copy.deepcopy(teacher).requires_grad_(True)
    if adapted:
        student = AdaptedDenoiser(student.requires_grad_(False), AdapterSettings(rank=2))
    objective = objective_class(stage.objective)(stage, student, teacher)
    for net in objective.nets.values():
        net.to("meta").train()
    if objective.statistics is not None:
        objective.statistics.to("meta")
    return objective


Waits = list[tuple[str, str, str]]


def trained(on: FakeDevice, objective: Objective, stage: Any, folder: Path) -> tuple[Waits, Waits]:
    """Take an objective's steps in the real loop; return the waits of its steps, and those of the line it logs.

    The first cycle of steps is not counted: tables are made in it, and its operations are. Checkpoints are not
    written: they are copies to the host on purpose.
    """
    inside, logged, began = Waits(), Waits(), [0]
    turns, tick = objective.turns, log_module.TrainLog.tick

    def begun(step: int) -> Any:
        began[0] = len(on.waits) if step >= objective.cycle else -1
        return turns(step)

    def ticked(log: Any, *given: Any) -> None:
        before = len(on.waits)
        if began[0] >= 0:
            inside.extend(on.waits[began[0] : before])
        tick(log, *given)
        logged.extend(on.waits[before:])

    objective.turns = begun  # type: ignore[method-assign]
    options = loop.TrainOptions(checkpoint_seconds=1e9)
    shape: tuple[int, ...] = getattr(objective.nets[objective.product], "shape", (3, SIDE, SIDE))
    with mock.patch.object(log_module.TrainLog, "tick", ticked), mock.patch.object(CheckpointManager, "save"):
        loop.train(objective, stage, source_for(shape), folder, key=(0, 0, 0), what="test", options=options)
    return inside, logged
