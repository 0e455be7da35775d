"""Text-conditioned networks of the diffusers library: SD 1.5's U-Net and SD3's transformer, as denoisers.

A condition is a prompt's number; what the network sees of it is looked up in the store of prompts that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import per_image
from msdcli.errors import UserError
from msdcli.nets.diffusers.denoiser import DiffusersDenoiser
from msdcli.recipe.networks import DiffusersNetworkSettings

# Keys of a configuration that ask for more than prompts (SDXL, image prompts, class labels).
MORE = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds")


class TextDenoiser(DiffusersDenoiser):
    """D(x, sigma, condition), condition [n] int64 numbers of prompts; a negative one is the empty prompt."""

    reads_text = True

    def __init__(self, net: nn.Module, settings: DiffusersNetworkSettings, log_sigmas: Tensor) -> None:
        super().__init__(net, settings, log_sigmas)
        self.num_classes = 0  # whatever the configuration says
        self.sd3 = settings.class_name == "SD3Transformer2DModel"

    @property
    def embedding_shapes(self) -> tuple[tuple[int, int], tuple[int]]:
        """The shapes of a prompt's vectors and of its pooled embedding."""
        pooled = self.settings.config.get("pooled_projection_dim", 2048) if self.sd3 else 1
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
        more = {"pooled_projections": pooled.to(dtype)} if self.sd3 else {}
        with self._computing():
            y: Tensor = self.net(x_t, timestep=t, encoder_hidden_states=tokens, return_dict=False, **more)[0]
        return y[:, : x_t.shape[1]].to(torch.float32)

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """The encoder's blocks by name: of the U-Net down to the middle, of the transformer all."""
        if self.sd3:
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
        if not self.sd3:
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
        raise UserError(f"network kind 'diffusers': {more[0]} is {config[more[0]]!r}: msd knows SD 1.5's kind of U-Net")
    if not isinstance(config.get("cross_attention_dim", 0), int) or not isinstance(config["sample_size"], int):
        raise UserError("network kind 'diffusers': cross_attention_dim and sample_size must be single numbers")
