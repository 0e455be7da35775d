"""The recipe: everything a run depends on, as one checked YAML file.

`load` reads YAML, applies `key=value` overrides and reports every mistake at once, each with its line. All keys of all
objectives, data sets and networks are here, so that a recipe is checked, completed and documented without importing
torch.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from msdcli import recipe_yaml
from msdcli.errors import UserError

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Seed = Annotated[int, Field(ge=0, le=2**62)]
NoiseLevel = Annotated[float, Field(gt=0, le=10_000)]
Span = list[Fraction]
Scale = Annotated[float, Field(ge=0, le=100)]


class Section(BaseModel):
    """A part of a recipe: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class UNetSettings(Section):
    """A class-conditional U-Net for images."""

    kind: Literal["unet"] = Field("unet", description="a U-Net with residual blocks")
    channels: int = Field(16, ge=1, le=4096, description="channels of the first level; `multipliers` scale it")
    multipliers: list[Annotated[int, Field(ge=1, le=64)]] = Field(
        [1, 2], min_length=1, max_length=8, description="channels of each level, as multiples of `channels`"
    )
    blocks: int = Field(1, ge=1, le=64, description="residual blocks per level")
    attention: list[Annotated[int, Field(ge=1)]] = Field([], description="resolutions that get self-attention")
    embedding: int | None = Field(None, ge=1, le=65536, description="width of the embedding; 4 x channels if absent")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside residual blocks while training")

    def scaled(self, width: float, depth: float) -> UNetSettings:
        """Return a section with `width` times the channels and `depth` times the blocks."""
        return self.model_copy(update=_scaled(self.channels, width, self.blocks, depth))


class MLPSettings(Section):
    """A residual MLP for points in the plane."""

    kind: Literal["mlp"] = Field("mlp", description="a residual multi-layer perceptron")
    channels: int = Field(128, ge=1, le=65536, description="width of every layer")
    blocks: int = Field(3, ge=1, le=1024, description="residual blocks")
    embedding: int | None = Field(None, ge=1, le=65536, description="width of the embedding; `channels` if absent")

    def scaled(self, width: float, depth: float) -> MLPSettings:
        """Return a section with `width` times the channels and `depth` times the blocks."""
        return self.model_copy(update=_scaled(self.channels, width, self.blocks, depth))


class EdmNetworkSettings(Section):
    """A network of EDM or EDM2 (DDPM++, NCSN++, ADM, EDM2), by the constructor arguments of its authors' code."""

    kind: Literal["edm"] = Field("edm", description="a network of EDM or EDM2")
    preconditioning: Literal["EDM", "VP", "VE", "iDDPM", "EDM2"] = Field("EDM", description="how D is made of it")
    arguments: dict[str, Any] = Field(
        {}, description="constructor arguments, e.g. {model_channels: 192}; size and classes come from the data"
    )

    def scaled(self, width: float, depth: float) -> EdmNetworkSettings:
        """Return a section with `width` times the channels, in whole groups, and `depth` times the blocks.

        The section is that of a network that was built: its arguments are complete.
        """
        channels, blocks = self.arguments["model_channels"], self.arguments["num_blocks"]
        group = 32 if channels * width >= 96 else 4  # what the networks' group norms can divide
        changed = {
            "model_channels": max(1, round(channels * width / group)) * group if width != 1 else channels,
            "num_blocks": max(1, round(blocks * depth)),
        }
        return self.model_copy(update={"arguments": self.arguments | changed})


class DiffusersNetworkSettings(Section):
    """A network of the diffusers library, by its own configuration."""

    kind: Literal["diffusers"] = Field("diffusers", description="a network of the diffusers library")
    class_name: Literal["UNet2DModel", "DiTTransformer2DModel", "UNet2DConditionModel", "SD3Transformer2DModel"] = (
        Field(description="the network's class; the last two are conditioned on text")
    )
    config: dict[str, Any] = Field(description="its config.json")
    prediction: Literal["epsilon", "v_prediction", "sample", "flow"] = Field("epsilon", description="what it predicts")
    schedule: dict[str, Any] = Field({}, description="its scheduler's betas, e.g. {beta_schedule: linear}")
    tokens: int | None = Field(
        None, ge=1, le=100_000, description="text: vectors per prompt; absent: 77 (UNet2DConditionModel) or 333 (SD3)"
    )

    @property
    def reads_text(self) -> bool:
        """Whether its conditions are prompts."""
        return self.class_name in ("UNet2DConditionModel", "SD3Transformer2DModel")

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """Text: vectors per prompt and their width."""
        sd3 = self.class_name == "SD3Transformer2DModel"
        width = self.config.get("joint_attention_dim", 4096) if sd3 else self.config.get("cross_attention_dim", 1280)
        return self.tokens or (333 if sd3 else 77), int(width)

    def scaled(self, width: float, depth: float) -> DiffusersNetworkSettings:
        """Return a section with `width` times the channels (transformers: heads) and `depth` times the blocks."""
        config = dict(self.config)
        if self.class_name == "UNet2DModel":
            group = config.get("norm_num_groups") or 32
            channels = config.get("block_out_channels", [224, 448, 672, 896])  # the library's defaults
            config["block_out_channels"] = [max(1, round(c * width / group)) * group for c in channels]
            config["layers_per_block"] = max(1, round(config.get("layers_per_block", 2) * depth))
        elif self.class_name == "UNet2DConditionModel":
            config |= _scaled_text_unet(config, width, depth)
        elif self.class_name == "SD3Transformer2DModel":
            heads = max(1, round(config.get("num_attention_heads", 18) * width))
            layers = max(1, round(config.get("num_layers", 18) * depth))
            config |= {"num_attention_heads": heads, "num_layers": layers}
            config["caption_projection_dim"] = heads * config.get("attention_head_dim", 64)
            config["dual_attention_layers"] = [i for i in config.get("dual_attention_layers", ()) if i < layers]
        else:
            config["num_attention_heads"] = max(1, round(config.get("num_attention_heads", 16) * width))
            config["num_layers"] = max(1, round(config.get("num_layers", 28) * depth))
        return self if (width, depth) == (1, 1) else self.model_copy(update={"config": config})


def _scaled_text_unet(config: dict[str, Any], width: float, depth: float) -> dict[str, Any]:
    """The keys of a UNet2DConditionModel that change; its `attention_head_dim` is what it has of heads."""
    channels = list(config.get("block_out_channels", [320, 640, 1280, 1280]))  # the library's defaults
    heads = config.get("attention_head_dim", 8)
    group = config.get("norm_num_groups") or 32
    changed: dict[str, Any] = {}
    if isinstance(heads, list):  # as many heads as fit, of the same width
        fewer = [max(1, round(h * width)) for h in heads]
        changed["attention_head_dim"] = fewer
        units = [math.lcm(group, n) for n in fewer]
    else:
        units = [math.lcm(group, heads)] * len(channels)
    changed["block_out_channels"] = [max(1, round(c * width / u)) * u for c, u in zip(channels, units, strict=True)]
    layers = config.get("layers_per_block", 2)
    fewer_layers = [max(1, round(n * depth)) for n in (layers if isinstance(layers, list) else [layers])]
    return changed | {"layers_per_block": fewer_layers if isinstance(layers, list) else fewer_layers[0]}


def _scaled(channels: int, width: float, blocks: int, depth: float) -> dict[str, int]:
    return {"channels": max(1, round(channels * width)), "blocks": max(1, round(blocks * depth))}


NetworkSettings = UNetSettings | MLPSettings | EdmNetworkSettings | DiffusersNetworkSettings
Network = Annotated[NetworkSettings, Field(discriminator="kind")]


# The data: `name` is a file in data/.


class DigitsSettings(Section):
    """scikit-learn's handwritten digits: 1,797 grey 8x8 images, 10 classes, no download."""

    name: Literal["digits"] = Field("digits", description="handwritten digits")


class Toy2dSettings(Section):
    """Eight awkward shapes in the plane, one class each, drawn from code."""

    name: Literal["toy2d"] = Field("toy2d", description="shapes in the plane")
    points: int = Field(65536, ge=8, le=2**40, description="number of points")
    seed: Seed = Field(0, description="seed of the points")


class GlyphsSettings(Section):
    """Characters in many typefaces, drawn from code: procedural, 62 classes (0-9, A-Z, a-z), endless."""

    name: Literal["glyphs"] = Field("glyphs", description="characters in many typefaces")
    size: int = Field(16, ge=8, le=64, description="side in pixels")
    channels: Literal[1, 3] = Field(1, description="1: grey, 3: colour")
    count: int = Field(20_000, ge=62, le=2**40, description="number of images")
    seed: Seed = Field(0, description="seed of the images")


class FolderSettings(Section):
    """Pictures of your own: a folder (class/...), EDM's zip or folder with dataset.json, an .npz of arrays, or
    WebDataset shards with .cls files."""

    name: Literal["folder"] = Field("folder", description="pictures from a folder, a zip, an .npz or tar shards")
    path: str = Field(description="the folder or file; shards: a .tar, a folder of them, or shards-{000..010}.tar")
    size: int | None = Field(None, ge=1, le=4096, description="side of the square images; absent: the first picture's")
    channels: Literal[1, 3] = Field(3, description="3: colour; 1: grey, and colour pictures are made grey")
    crop: bool = Field(False, description="cut the central square out of pictures that are not square")
    resize: Literal["none", "box", "bicubic", "lanczos"] = Field(
        "none", description="how pictures of another size are scaled; none: they are bad"
    )
    on_bad: Literal["refuse", "skip"] = Field(
        "refuse", description="pictures that are damaged or of another size: stop and list them, or leave them out"
    )
    labels: bool = Field(True, description="false: one class for all")
    classes: Count | None = Field(None, description="how many classes there must be")
    count: Count | None = Field(None, description="how many pictures there must be")
    source: str | None = Field(None, description="where the data come from: for whoever reads or plans the run")


class PromptsSettings(Section):
    """Texts, for a teacher with a text encoder: lines, JSONL or COCO captions; with pictures where there are any."""

    name: Literal["prompts"] = Field("prompts", description="texts, alone or with their pictures")
    path: str = Field(description="a .txt (one a line), a .jsonl, or a .json of COCO captions or of a list")
    column: str | None = Field(None, description="JSON key of the text; absent: caption, text or prompt")
    images: str | None = Field(None, description="folder or zip with the pictures that the rows name")
    image_column: str | None = Field(None, description="JSON key of a picture's name; absent: file_name, image or file")
    size: int | None = Field(None, ge=1, le=4096, description="side of the square images; absent: the first picture's")
    channels: Literal[1, 3] = Field(3, description="3: colour; 1: grey, and colour pictures are made grey")
    crop: bool = Field(False, description="cut the central square out of pictures that are not square")
    resize: Literal["none", "box", "bicubic", "lanczos"] = Field(
        "none", description="how pictures of another size are scaled; none: they are bad"
    )
    on_bad: Literal["refuse", "skip"] = Field(
        "refuse", description="pictures that are damaged, missing or of another size: stop, or leave the rows out"
    )
    embeddings: Literal["float16", "float32"] = Field("float16", description="how the prompts' embeddings are kept")
    count: Count | None = Field(None, description="how many different prompts there must be")
    source: str | None = Field(None, description="where the data come from: for whoever reads or plans the run")

    @property
    def pictures(self) -> FolderSettings | None:
        """The section of the pictures alone."""
        if self.images is None:
            return None
        keys = ("size", "channels", "crop", "resize", "on_bad")
        return FolderSettings(path=self.images, labels=False, **{key: getattr(self, key) for key in keys})


DataSettings = DigitsSettings | Toy2dSettings | GlyphsSettings | FolderSettings | PromptsSettings
Data = Annotated[DataSettings, Field(discriminator="name")]


# The stages: `objective` is a file in objectives/.


class StageSettings(Section):
    """One stage of training: what every objective has in common."""

    needs_images: ClassVar[bool] = True  # of the data, beside their conditions

    objective: str = Field(description="what is minimised")
    steps: int = Field(1000, ge=1, le=10**9, description="training steps (updates of the student)")
    batch: int = Field(64, ge=1, le=10**6, description="images per update")
    lr: Positive = Field(1e-3, description="learning rate, for every network that `lr_of` does not name")
    lr_of: dict[str, Positive] = Field({}, description="learning rates of single networks, e.g. {fake: 1e-3}")
    lr_hold: Fraction = Field(0.5, description="part of the steps at full learning rate; then linear to `lr_end`")
    lr_end: Fraction = Field(0.02, description="last learning rate, as a part of the first")
    warmup: int = Field(0, ge=0, description="steps over which the learning rate rises from zero")
    optimizer: Literal["adam", "adamw"] = Field("adam", description="the optimizer")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="Adam's betas"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay (adamw)")
    clip: Positive | None = Field(None, description="largest norm of a network's gradient; absent: no clipping")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.99, description="decay of the average that samples are drawn from"
    )
    log_every: Count = Field(20, description="steps between two lines of metrics.jsonl")


class EdmSettings(StageSettings):
    """Denoising score matching on the data: how a teacher is trained (Karras et al. 2022, arXiv 2206.00364)."""

    objective: Literal["edm"] = Field("edm", description="denoising score matching")
    P_mean: float = Field(-1.2, description="mean of ln(sigma)")
    P_std: Positive = Field(1.2, description="standard deviation of ln(sigma)")
    label_dropout: Fraction = Field(0.0, description="part of the images trained without their class, for guidance")


class TsmSettings(StageSettings):
    """Teacher score matching: a student with another network learns the teacher's denoiser (MSD, arXiv 2410.23274)."""

    objective: Literal["tsm"] = Field("tsm", description="teacher score matching")
    P_mean: float = Field(-1.2, description="mean of ln(sigma)")
    P_std: Positive = Field(1.2, description="standard deviation of ln(sigma)")


class DmSettings(StageSettings):
    """Distribution matching (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867)."""

    needs_images: ClassVar[bool] = False

    objective: Literal["dm"] = Field("dm", description="distribution matching")
    sigma_init: NoiseLevel = Field(2.5, description="noise level at which the student is evaluated, once")
    fake_updates: int = Field(5, ge=1, le=1000, description="updates of the fake network per update of the student")
    fake_batch: Literal["fresh", "shared"] = Field(
        "fresh", description="new samples for every update, or one batch for all updates of a step (cheaper)"
    )
    sigma_span: Span = Field(
        [0.0, 0.5], min_length=2, max_length=2, description="noise levels of the loss, as parts of the Karras schedule"
    )
    fake_weight: Literal["dmd2", "epsilon", "none"] = Field(
        "dmd2",
        description="weight of the fake network's loss: sigma^-2 + sigma_data^-2 (DMD2), sigma^-2, which is the error "
        "of the predicted noise (DMD2 on SD 1.5), or none (FastGen)",
    )
    labels: Literal["uniform", "data"] = Field("uniform", description="how the student's conditions are drawn")
    pairs: Literal["shared", "filtered", "none"] = Field(
        "shared",
        description="regression on the teacher's pairs: on all of them, on those of the student's part, or none",
    )
    pair_weight: float = Field(0.25, ge=0, description="weight of the regression loss (DMD)")
    pair_batch: Count | None = Field(None, description="pairs per update; `batch` if absent")


class AdmSettings(DmSettings):
    """Adversarial distribution matching: `dm` continued with a GAN loss (DMD2, arXiv 2405.14867)."""

    needs_images: ClassVar[bool] = True

    objective: Literal["adm"] = Field("adm", description="adversarial distribution matching")  # type: ignore[assignment]
    features: Literal["fake", "teacher"] = Field(
        "fake", description="where the heads look: the trainable fake network (DMD2) or the frozen teacher (FastGen)"
    )
    taps: list[str] | None = Field(
        None, min_length=1, description="encoder blocks that get a head each, by name; the last one if absent"
    )
    gan_weight: float = Field(3e-3, ge=0, description="weight of the student's GAN loss (DMD2: 3e-3)")
    head_weight: float = Field(1e-2, ge=0, description="weight of the heads' loss (DMD2: 1e-2; FastGen: 1)")
    gan_noise: Literal["own", "shared"] = Field(
        "own", description="noise of the samples the heads see: their own draw (DMD2) or that of the dm loss (FastGen)"
    )
    gan_span: Span = Field(
        [0.0, 1.0],
        min_length=2,
        max_length=2,
        description="noise levels the heads see, as parts of the Karras schedule",
    )


class CdSettings(StageSettings):
    """Consistency distillation (Song et al. 2023, arXiv 2303.01469; improved as in arXiv 2310.14189)."""

    objective: Literal["cd"] = Field("cd", description="consistency distillation")
    sigma_init: NoiseLevel = Field(80.0, description="noise level at which the student is evaluated, once")
    levels: int = Field(18, ge=2, le=10_000, description="noise levels of the schedule")


Stage = Annotated[EdmSettings | TsmSettings | DmSettings | AdmSettings | CdSettings, Field(discriminator="objective")]


class SolverSettings(Section):
    """The teacher's deterministic sampler."""

    name: Literal["heun", "dpmpp_2m"] = Field(
        "heun", description="heun (EDM's Algorithm 1), or dpmpp_2m (DPM-Solver++(2M), arXiv 2211.01095)"
    )
    steps: int = Field(
        18, ge=2, le=10_000, description="noise levels; heun takes 2 x steps - 1 evaluations, dpmpp_2m takes steps"
    )
    sigma_min: NoiseLevel = Field(0.002, description="last noise level")
    sigma_max: NoiseLevel = Field(80.0, description="first noise level")
    rho: Positive = Field(7.0, description="spacing of the levels")


class GuidanceSettings(Section):
    """Guidance of the teacher wherever it is asked: in pairs, samples and losses."""

    scale: Scale | list[Scale] = Field(
        description="1 is no guidance; more moves away from the worse prediction; [low, high]: drawn for every image"
    )
    interval: list[Annotated[float, Field(ge=0, le=10_000)]] = Field(
        [0.0, 10_000.0], min_length=2, max_length=2, description="noise levels that are guided: above, and up to"
    )
    guide: str | None = Field(
        None, description="a weaker teacher (folder or pickle) to move away from; absent: the teacher without class"
    )

    @model_validator(mode="after")
    def _a_range_ascends(self) -> GuidanceSettings:
        if isinstance(self.scale, list) and (len(self.scale) != 2 or self.scale[0] > self.scale[1]):
            raise ValueError(f"`scale` is a number or two, [low, high], not {self.scale}")
        return self


class LatentShapeSettings(Section):
    """What the autoencoder of a latent teacher makes of pictures."""

    channels: int = Field(4, ge=1, le=4096, description="channels of the latents")
    factor: int = Field(8, ge=1, le=1024, description="pixels, in each direction, that become one position")


class TeacherSettings(Section):
    """The diffusion model to distil: trained here, or loaded."""

    path: str | None = Field(
        None,
        description="folder with model.safetensors and model.json, EDM or EDM2 pickle, folder of diffusers, or "
        "hub:owner/name[@revision]; absent: train one",
    )
    source: str | None = Field(None, description="where `path` can be downloaded: for whoever reads or plans the run")
    network: Network = Field(
        default_factory=UNetSettings,
        description="the network to train; with `path`: what is expected there (kind edm is checked)",
    )
    latent: LatentShapeSettings | None = Field(
        None,
        description="of a latent teacher at `path`: what its autoencoder is expected to make of pictures; a run can "
        "then be planned before the teacher is here",
    )
    sigma_data: NoiseLevel = Field(0.5, description="standard deviation of the data (EDM)")
    seed: Seed = Field(0, description="seed of the teacher's training")
    training: EdmSettings = Field(default_factory=EdmSettings, description="how it is trained: objective `edm`")
    solver: SolverSettings = Field(default_factory=SolverSettings, description="how it is sampled")
    guidance: GuidanceSettings | None = Field(None, description="how it is guided; absent: not at all")

    @model_validator(mode="after")
    def _latents_come_with_a_teacher(self) -> TeacherSettings:
        if self.latent is not None and self.path is None:
            raise ValueError("`latent` describes a teacher at `path`; the teachers trained here work on pictures")
        return self


class LatentSettings(Section):
    """The data encoded once, where the teacher is a latent model."""

    posterior: Literal["sample", "mean"] = Field(
        "sample", description="a latent drawn once for every image, as the teacher saw them in training, or its mean"
    )
    seed: Seed = Field(0, description="seed of `sample`")
    dtype: Literal["float16", "float32"] = Field("float16", description="how mean and standard deviation are kept")
    batch: Count = Field(32, description="images encoded at once")


class PartitionSettings(Section):
    """Which student owns which condition."""

    students: int = Field(1, ge=1, le=100_000, description="number of students, K")
    method: Literal["consecutive", "random", "kmeans", "explicit", "quadrants"] = Field(
        "consecutive",
        description="how the conditions are divided; prompts: quadrants or kmeans (of pooled embeddings), or random",
    )
    features: Literal["embedding", "images"] = Field(
        "embedding", description="kmeans: cluster the teacher's class embeddings or the mean image of each class"
    )
    seed: Seed = Field(0, description="seed of `random` and `kmeans`")
    parts: list[list[Annotated[int, Field(ge=0)]]] | None = Field(
        None, description="explicit: the classes of each student, e.g. [[0, 1], [2, 3]]"
    )

    @model_validator(mode="after")
    def _parts_go_with_explicit(self) -> PartitionSettings:
        if (self.method == "explicit") != (self.parts is not None):
            raise ValueError("`parts` and `method: explicit` go together")
        if self.parts is not None and len(self.parts) != self.students:
            raise ValueError(f"`parts` lists {len(self.parts)} students, `students` says {self.students}")
        return self


class PairSettings(Section):
    """Noise and image pairs of the teacher, for the regression loss."""

    count: Count = Field(2048, description="number of pairs, made once per teacher")
    seed: Seed = Field(0, description="seed of the noise")
    shard: Count = Field(1024, description="pairs per file: what an interruption can cost")


class StudentSettings(Section):
    """The students' network; the teacher's own unless told otherwise."""

    width: float = Field(1.0, gt=0, le=16, description="channels, as a multiple of the teacher's")
    depth: float = Field(1.0, gt=0, le=16, description="blocks, as a multiple of the teacher's (at least one stays)")
    network: Network | None = Field(None, description="a full network section instead of `width` and `depth`")
    parameters: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="a target instead: this share of the teacher's parameters, as fast as can be found",
    )
    latency: float | None = Field(
        None, gt=0, lt=1, description="a target instead: this share of the teacher's latency on this device"
    )
    init: Literal["auto", "teacher", "pruned", "random"] = Field(
        "auto",
        description="first weights: the teacher's, those of its leading channels (for a smaller network), or random; "
        "auto: the teacher's where the networks are equal, else random",
    )

    @model_validator(mode="after")
    def _one_way_only(self) -> StudentSettings:
        scaled = (self.width, self.depth) != (1.0, 1.0)
        ways = [scaled, self.network is not None, self.parameters is not None, self.latency is not None]
        if sum(ways) > 1:
            raise ValueError("give one of `width` and `depth`, `network`, `parameters`, `latency`")
        return self

    def network_for(self, teacher: NetworkSettings) -> NetworkSettings:
        """Return the student's network, scaled from the teacher's."""
        if self.network is not None:
            return self.network
        return teacher.scaled(self.width, self.depth)


class EvaluationSettings(Section):
    """What is measured when a run ends."""

    samples: int = Field(5000, ge=2, le=10**8, description="samples of the students and of the teacher")
    batch: Count = Field(500, description="images per forward pass")
    seed: Seed = Field(0, description="seed of the measured samples")


class Recipe(Section):
    """One run: a teacher, a partition, and the stages that make each student."""

    name: str | None = Field(None, pattern=r"^[\w][\w.-]*$", max_length=100, description="name of the run")
    run: str | None = Field(None, description="the run directory; runs/NAME if absent")
    seed: Seed = Field(0, description="seed of the students")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:1 or mps")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of a process; a fixed number makes CPU runs repeatable to the bit"
    )
    workers: int | None = Field(
        None, ge=1, le=1024, description="students trained at once on this machine; absent: one per core (CPU) or GPU"
    )
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto",
        description="what networks compute in while students train; auto: bf16 where a short measurement finds it "
        "faster on this device, float32 for tiny networks",
    )
    compile: Literal["auto"] | bool = Field(
        "auto", description="torch.compile of the networks; auto: on a GPU, where a stage is long enough to pay for it"
    )
    checkpoint_seconds: float = Field(30.0, ge=0, description="time between two checkpoints")
    keep: int = Field(2, ge=1, le=1000, description="checkpoints kept of each stage: a damaged one costs only itself")
    max_skipped: int = Field(
        10, ge=1, le=10**9, description="updates in a row that may be skipped as not finite before training stops"
    )
    micro_batch: Count | None = Field(
        None, description="images a device takes at once; larger batches go through in parts. Absent: all at once"
    )
    fsdp: bool = Field(
        False, description="under torchrun, share out the weights too (FSDP2): for networks that fit no single device"
    )
    loggers: list[Literal["tensorboard", "wandb"]] = Field(
        [], max_length=2, description="where else the figures of metrics.jsonl go: tensorboard, wandb (in RUN/logs)"
    )
    data: Data = Field(description="the training data")
    teacher: TeacherSettings = Field(default_factory=TeacherSettings, description="the diffusion model to distil")
    latents: LatentSettings = Field(default_factory=LatentSettings, description="the encoded data of a latent teacher")
    partition: PartitionSettings = Field(default_factory=PartitionSettings, description="who owns which condition")
    pairs: PairSettings = Field(default_factory=PairSettings, description="the teacher's noise and image pairs")
    student: StudentSettings = Field(default_factory=StudentSettings, description="the students' network")
    stages: list[Stage] = Field(min_length=1, max_length=16, description="the stages, one after the other")
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings, description="what is measured")

    @property
    def has_prompts(self) -> bool:
        """Whether the conditions are texts."""
        return isinstance(self.data, PromptsSettings)

    @property
    def run_dir(self) -> Path:
        """Where the run lives."""
        return Path(self.run or f"runs/{self.name}")

    def dump(self) -> dict[str, Any]:
        """Return every key with its value, as plain data."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the complete recipe as YAML."""
        text: str = yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True, width=120)
        return text


# Keys that may change when a run resumes: nothing that is trained depends on them.
FREE_KEYS = (
    *("name", "run", "workers", "checkpoint_seconds", "evaluation", "device"),
    *("keep", "max_skipped", "micro_batch", "fsdp", "loggers", "compile"),
)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the dotted keys in which two dumped recipes differ and a resumed run may not."""
    found = [key for key in _differing(old, new) if key.split(".")[0] not in FREE_KEYS]
    last = f"stages.{len(new['stages']) - 1}.steps"
    if last in found and len(old["stages"]) == len(new["stages"]) and _at(new, last) > _at(old, last):
        found.remove(last)
    return found


def _differing(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in _differing(old.get(k), new.get(k), f"{prefix}{k}.")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in _differing(a, b, f"{prefix}{i}.")]
    return [] if old == new else [prefix.rstrip(".")]


def _at(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree


def load(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe (a file, a run directory's, or a shipped one by name) and apply `key=value` overrides.

    Raises UserError that lists every mistake with file, line, dotted key, value, what is allowed and the nearest name.
    """
    path = find(source)
    document = recipe_yaml.Document.read(path)
    for override in overrides or []:
        document.override(override)
    return _named(validate(document), path, source)


def load_any(source: str | os.PathLike[str] | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """Return the recipe meant by a file, a run, a name, a dictionary or a Recipe, with overrides given as values.

    An override that is a dictionary is merged into its section; keys may be dotted. Errors are those of `load`.
    """
    path: Path | None = None
    if isinstance(source, Recipe):
        document = recipe_yaml.Document(source.dump(), "the recipe", {})
    elif isinstance(source, Mapping):
        document = recipe_yaml.Document(copy.deepcopy(dict(source)), "the recipe", {})
    else:
        source = os.fspath(source)
        path = find(source)
        document = recipe_yaml.Document.read(path)
    for keys, value in _flat(overrides, ()):
        document.set(keys, value, f"override '{'.'.join(keys)}={value}'")
    recipe = validate(document)
    if recipe.name is None and path is None:
        raise UserError("the recipe has no name", hint='a key "name" names the run')
    return recipe if path is None else _named(recipe, path, str(source))


def _flat(overrides: Mapping[str, Any], prefix: tuple[str, ...]) -> Iterator[tuple[list[str], Any]]:
    for key, value in overrides.items():
        keys = (*prefix, *str(key).split("."))
        if isinstance(value, Mapping) and value:
            yield from _flat(value, keys)
        else:
            yield list(keys), copy.deepcopy(value)


def _named(recipe: Recipe, path: Path, source: str | Path) -> Recipe:
    """Fill in what the place of a recipe says: its name, and where a run directory has been moved to."""
    if recipe.name is None:
        recipe = recipe.model_copy(update={"name": path.stem})
    if path.name == "recipe.yaml" and Path(source).is_dir():
        recipe = recipe.model_copy(update={"run": str(source)})
    return recipe


def validate(document: recipe_yaml.Document) -> Recipe:
    """Check a parsed recipe; raise one UserError with all that is wrong."""
    try:
        return Recipe.model_validate(document.tree)
    except ValidationError as error:
        lines = [recipe_yaml.explain(document, Recipe, dict(e)) for e in error.errors(include_url=False)]
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise UserError(f"{count} in the recipe\n" + "\n".join(lines)) from None


def find(source: str | Path) -> Path:
    """Return the recipe file meant by a path, a run directory or the name of a shipped recipe."""
    path = Path(source)
    if path.is_file():
        return path
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    names = {p.stem: p for p in shipped()}
    if str(source) in names:
        return names[str(source)]
    hint = recipe_yaml.nearest(path.stem, list(names))
    raise UserError(
        f"no recipe at {path}: neither a file, nor a run directory, nor a shipped recipe",
        hint=f"did you mean `{hint}`?" if hint else "`msd recipes` lists what ships",
    )


def recipes_folder() -> Path:
    """Return the folder of the recipes that travel with the package (in a checkout: the one beside it)."""
    package = Path(__file__).parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def shipped() -> list[Path]:
    """Return the recipes that ship with msd."""
    return sorted(recipes_folder().glob("*.yaml"))
