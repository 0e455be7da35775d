"""The networks a recipe can name."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from msdcli.recipe.section import Foreign, Section


class UNetSettings(Section):
    """A class-conditional U-Net for images."""

    kind: Literal["unet"] = Field("unet", description="a U-Net with residual blocks")
    channels: int = Field(16, ge=1, le=4096, description="channels of the first level; `multipliers` scale it")
    multipliers: list[Annotated[int, Field(ge=1, le=64)]] = Field(
        [1, 2], min_length=1, max_length=8, description="channels of each level, as multiples of `channels`"
    )
    blocks: int = Field(1, ge=1, le=64, description="residual blocks per level")
    patch: int = Field(1, ge=1, le=64, description="side of the squares of pixels that are channels of a smaller image")
    attention: list[Annotated[int, Field(ge=1, le=4096)]] = Field(
        [], max_length=16, description="resolutions that get self-attention (with `patch`, those of the smaller image)"
    )
    embedding: int | None = Field(None, ge=1, le=65536, description="width of the embedding; 4 x channels if absent")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside residual blocks while training")

    @property
    def left_out(self) -> list[str]:
        """The blocks that it is without."""
        return []

    def scaled(self, width: float, depth: float) -> UNetSettings:
        """Return a section with `width` times the channels and `depth` times the blocks."""
        return self.model_copy(update=_scaled(self.channels, width, self.blocks, depth))


class PrunedUNetSettings(UNetSettings):
    """A U-Net without some of its blocks; their inputs go on at the size and with the channels of their outputs."""

    kind: Literal["pruned_unet"] = Field("pruned_unet", description="a U-Net without some blocks")  # type: ignore[assignment]
    without: list[str] = Field([], max_length=4096, description="the blocks that are left out, e.g. decoder.8x8_1")

    @property
    def left_out(self) -> list[str]:
        return self.without


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


TextForm = Literal["sd", "sdxl", "sd3"]


class DiffusersNetworkSettings(Section):
    """A network of the diffusers library, by its own configuration."""

    kind: Literal["diffusers"] = Field("diffusers", description="a network of the diffusers library")
    class_name: Literal["UNet2DModel", "DiTTransformer2DModel", "UNet2DConditionModel", "SD3Transformer2DModel"] = (
        Field(description="the network's class; the last two are conditioned on text")
    )
    config: Foreign = Field(description="its config.json")
    prediction: Literal["epsilon", "v_prediction", "sample", "flow"] = Field("epsilon", description="what it predicts")
    schedule: Foreign = Field({}, description="its scheduler's betas, e.g. {beta_schedule: linear}")
    tokens: int | None = Field(
        None, ge=1, le=100_000, description="text: vectors per prompt; absent: 77 (UNet2DConditionModel) or 333 (SD3)"
    )

    @property
    def reads_text(self) -> bool:
        """Whether its conditions are prompts."""
        return self.class_name in ("UNet2DConditionModel", "SD3Transformer2DModel")

    @property
    def text_form(self) -> TextForm:
        """How it is told its prompts: as Stable Diffusion 1.5, SDXL or SD3."""
        if self.class_name == "SD3Transformer2DModel":
            return "sd3"
        return "sdxl" if self.config.get("addition_embed_type") == "text_time" else "sd"

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """Text: vectors per prompt and their width."""
        sd3 = self.text_form == "sd3"
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
    changed["layers_per_block"] = fewer_layers if isinstance(layers, list) else fewer_layers[0]
    if isinstance(deep := config.get("transformer_layers_per_block"), list):  # SDXL
        changed["transformer_layers_per_block"] = [max(1, round(n * depth)) for n in deep]
    return changed


def _scaled(channels: int, width: float, blocks: int, depth: float) -> dict[str, int]:
    return {"channels": max(1, round(channels * width)), "blocks": max(1, round(blocks * depth))}


NetworkSettings = UNetSettings | PrunedUNetSettings | MLPSettings | EdmNetworkSettings | DiffusersNetworkSettings
Network = Annotated[NetworkSettings, Field(discriminator="kind")]
