"""Text-conditioned networks of the diffusers library as denoisers: the U-Nets of SD 1.5 and SDXL, SD3's transformer.

A condition is a prompt's number; what the network sees of it is looked up in the store of prompts that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import per_image
from msdcli.errors import UserError
from msdcli.nets.diffusers.denoiser import DiffusersDenoiser
from msdcli.recipe.networks import DiffusersNetworkSettings

# Keys of a configuration that ask for more than prompts (image prompts, class labels).
MORE = ("class_embed_type", "encoder_hid_dim_type", "num_class_embeds")
PIXELS_PER_LATENT = 8  # of SDXL's autoencoder
SIZES = 6  # numbers that SDXL is told of a picture: size as it was, corner of the cut, size as it is


class TextDenoiser(DiffusersDenoiser):
    """D(x, sigma, condition), condition [n] int64 numbers of prompts; a negative one is the empty prompt."""

    reads_text = True
    sizes: Tensor | None  # what SDXL is told of a picture [1, 6]

    def __init__(self, net: nn.Module, settings: DiffusersNetworkSettings, log_sigmas: Tensor) -> None:
        super().__init__(net, settings, log_sigmas)
        self.num_classes = 0  # whatever the configuration says
        self.form = settings.text_form
        side = PIXELS_PER_LATENT * settings.config["sample_size"]
        sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)  # neither scaled nor cut
        self.register_buffer("sizes", sizes if self.form == "sdxl" else None, persistent=False)

    @property
    def embedding_shapes(self) -> tuple[tuple[int, int], tuple[int]]:
        """The shapes of a prompt's vectors and of its pooled embedding."""
        config, pooled = self.settings.config, 1
        if self.form == "sd3":
            pooled = config.get("pooled_projection_dim", 2048)
        elif self.form == "sdxl":
            pooled = pooled_width(config)
        return self.settings.prompt_shape, (pooled,)

    def look_up(self, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the prompts' vectors [n, length, width] and pooled embeddings."""
        assert condition is not None, "a text-conditioned network was called without prompts"
        if condition.is_meta:  # a plan knows shapes only
            tokens, pooled = (torch.empty(len(condition), *size, device="meta") for size in self.embedding_shapes)
            return tokens, pooled
        assert self.prompts is not None, "a text-conditioned network was called before it was given its prompts"
        tokens, pooled = self.prompts.look_up(condition)
        if tokens.shape[1:] != self.settings.prompt_shape:
            raise UserError(
                f"the prompts are embedded as {list(tokens.shape[1:])}, the network wants "
                f"{list(self.settings.prompt_shape)}: they are of another text encoder"
            )
        return tokens, pooled

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """The network's own prediction."""
        tokens, pooled = self.look_up(condition)
        dtype = next(self.net.parameters()).dtype
        x_t, tokens = x_t.to(dtype), tokens.to(dtype)
        more: dict[str, Any] = {}
        if self.form == "sd3":
            more["pooled_projections"] = pooled.to(dtype)
        elif self.form == "sdxl":
            assert self.sizes is not None
            sizes = self.sizes.to(dtype).expand(len(x_t), -1)
            more["added_cond_kwargs"] = {"text_embeds": pooled.to(dtype), "time_ids": sizes}
        with self._computing():
            y: Tensor = self.net(x_t, timestep=t, encoder_hidden_states=tokens, return_dict=False, **more)[0]
        return y[:, : x_t.shape[1]].to(torch.float32)

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """The encoder's blocks by name: of the U-Net down to the middle, of the transformer all."""
        if self.form == "sd3":
            return {
                f"block{i}": block for i, block in enumerate(self.net.get_submodule("transformer_blocks").children())
            }
        down = {f"down{i}": block for i, block in enumerate(self.net.get_submodule("down_blocks").children())}
        middle = getattr(self.net, "mid_block", None)
        return down if middle is None else down | {"mid": middle}

    @property
    def taps(self) -> list[str]:
        return [*self.blocks]

    def features(self, x: Tensor, sigma: Tensor, condition: Tensor | None, taps: Sequence[str]) -> list[Tensor]:
        """Features of the named blocks [n, channels, height, width]; nothing after the last of them runs."""
        x, sigma = x.to(torch.float32), sigma.to(torch.float32)
        found = outputs(self.blocks, taps, lambda: self.predict(*self.inputs(x, sigma), condition))
        return [self._as_map(feature, x) for feature in found]

    def inputs(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """What the network itself is given: scaled images and steps."""
        s = per_image(sigma, x)
        if self.prediction == "flow":
            return x / (1 + s), self.steps * sigma / (1 + sigma)
        return x / (1 + s.square()).sqrt(), self.timestep(sigma)

    def _as_map(self, output: Any, x: Tensor) -> Tensor:
        """A block's output as a map of channels: U-Nets give it (with their skips), transformers give patches."""
        if self.form != "sd3":
            feature: Tensor = output[0] if isinstance(output, tuple) else output
            return feature.float()
        patch = self.settings.config.get("patch_size", 2)
        return output[1].float().transpose(1, 2).unflatten(2, (x.shape[2] // patch, x.shape[3] // patch))


class _Reached(Exception):  # noqa: N818
    """The last block that was asked for has run."""


def outputs(blocks: dict[str, nn.Module], taps: Sequence[str], run: Any) -> list[Any]:
    """Return what the named blocks give during `run`, which ends at the last of them. UserError for unknown names."""
    unknown = [tap for tap in taps if tap not in blocks]
    if unknown or not taps:
        raise UserError(f"taps {unknown or 'missing'}: this network has {', '.join(blocks)}")
    last = max(taps, key=[*blocks].index)
    found: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = output
            if name == last:
                raise _Reached

        return hook

    handles = [blocks[tap].register_forward_hook(keep(tap)) for tap in set(taps)]
    try:
        run()
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [found[tap] for tap in taps]


def check_section(settings: DiffusersNetworkSettings) -> None:
    """Raise UserError for configurations that want more than prompts."""
    config = settings.config
    if more := [key for key in MORE if config.get(key) not in (None, 0)]:
        raise UserError(
            f"network kind 'diffusers': {more[0]} is {config[more[0]]!r}: msd knows the U-Nets of SD 1.5 and SDXL"
        )
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise UserError(
            f"network kind 'diffusers': addition_embed_type is {config['addition_embed_type']!r}: msd knows SDXL's "
            "text_time"
        )
    if not isinstance(config.get("cross_attention_dim", 0), int) or not isinstance(config["sample_size"], int):
        raise UserError("network kind 'diffusers': cross_attention_dim and sample_size must be single numbers")
    if settings.text_form == "sdxl" and pooled_width(config) < 1:
        raise UserError(
            "network kind 'diffusers': projection_class_embeddings_input_dim must be above "
            f"{SIZES} addition_time_embed_dim: the rest of it is the pooled embedding"
        )


def pooled_width(config: Mapping[str, Any]) -> int:
    """Return the width of the pooled embedding that SDXL's U-Net is given, beside what it is told of sizes."""
    wanted, of_a_size = (config.get(k) for k in ("projection_class_embeddings_input_dim", "addition_time_embed_dim"))
    if not isinstance(wanted, int) or not isinstance(of_a_size, int):
        raise UserError(
            "network kind 'diffusers': text_time needs projection_class_embeddings_input_dim and "
            "addition_time_embed_dim, whole numbers"
        )
    return wanted - SIZES * of_a_size
