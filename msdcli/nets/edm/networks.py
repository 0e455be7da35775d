"""The U-Nets of EDM (Karras et al. 2022, arXiv 2206.00364): DDPM++ and NCSN++ (Song et al. 2021, arXiv 2011.13456)
and ADM (Dhariwal and Nichol 2021, arXiv 2105.05233).

Written from the papers. Constructor arguments and the names of parameters and buffers are those of the published
checkpoints, so that their weights map by name and shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msdcli.nets.edm.layers import (
    Block,
    Conv,
    FourierEmbedding,
    PositionalEmbedding,
    Resample,
    Unused,
    group_norm,
)
from msdcli.nets.edm.unet_taps import (
    Cell,
    TappedUNet,
    attends,
    decoder_cells,
    encoder_cells,
)
from msdcli.nets.layers import Linear


class SongUNet(TappedUNet):
    """DDPM++ (the defaults) and NCSN++ (`fourier`, `residual`, noise multiplier 2, filter 1 3 3 1).

    `augment_dim` only makes room for the weight of EDM's augmentation labels, which sampling never sets;
    `label_dropout` belongs to the original's training and does nothing here.
    """

    def __init__(
        self,
        *,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        noise_channels, emb_channels = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        self.map_noise = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = Unused(augment_dim, noise_channels) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        def block(cell: Cell, attention: bool) -> Block:
            return Block(
                cell,
                emb_channels,
                num_heads=int(attention),  # one head, whatever the width
                dropout=dropout,
                taps=resample_filter,
                eps=1e-6,
                skip_scale=math.sqrt(0.5),
                adaptive_scale=False,
                project_skip=True,
            )

        levels = [(img_resolution >> level, model_channels * mult) for level, mult in enumerate(channel_mult)]
        cells = encoder_cells(levels, num_blocks=num_blocks, first=(in_channels, model_channels))
        self.enc = build_encoder(cells, attn_resolutions, block)
        if encoder_type != "standard":
            self.enc = _with_side_inputs(self.enc, cells, encoder_type, in_channels, resample_filter)
        # The decoder attends only in the last block of a resolution.
        attending = {f"{resolution}x{resolution}_block{num_blocks}" for resolution in attn_resolutions}
        attending.add(f"{levels[-1][0]}x{levels[-1][0]}_in0")
        decoder = decoder_cells(levels, num_blocks=num_blocks, encoder=cells)
        self.dec = nn.ModuleDict({cell.name: block(cell, cell.name in attending) for cell in decoder})
        self._add_outputs(levels, out_channels, decoder_type, resample_filter)
        self._initialise()

    def _add_outputs(
        self, levels: Sequence[tuple[int, int]], out_channels: int, decoder_type: str, taps: Sequence[float]
    ) -> None:
        """The images that the decoder puts out: one, or (`skip`) one at each resolution, coarse to fine, summed."""
        for level, (resolution, channels) in reversed(list(enumerate(levels))):
            prefix = f"{resolution}x{resolution}_aux"
            if decoder_type == "skip" and level < len(levels) - 1:
                self.dec[f"{prefix}_up"] = Resample("up", taps)
            if decoder_type == "skip" or level == 0:
                self.dec[f"{prefix}_norm"] = group_norm(channels, 1e-6)
                self.dec[f"{prefix}_conv"] = Conv(channels, out_channels, 3)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Glorot uniform, with outputs of blocks near zero and queries, keys and values scaled down, as
        EDM trained it."""
        gains = {"conv1": 1e-5, "proj": 1e-5, "aux_conv": 1e-5, "qkv": math.sqrt(0.2)}
        for name, module in self.named_modules():
            if isinstance(module, Linear | Conv):
                gain = next((gain for end, gain in gains.items() if name.endswith(end)), 1.0)
                nn.init.xavier_uniform_(module.weight, gain)
                if module.bias is not None:
                    module.bias.zero_()

    def class_vectors(self) -> Tensor | None:
        return None if self.map_label is None else self.map_label.weight.T

    def embed(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.map_noise(c_noise).unflatten(1, (2, -1)).flip(1).flatten(1)  # sin before cos
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels * math.sqrt(labels.shape[1]))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def encode(self, x: Tensor, emb: Tensor, *, last: str | None = None) -> dict[str, Tensor]:
        skips: dict[str, Tensor] = {}
        side, name = x, ""  # the input image, or what NCSN++ makes of it, going down beside the blocks
        for key, block in self.enc.items():
            if "aux" not in key:
                if last in skips:
                    break
                x = skips[key] = run(block, x, emb)
                name = key
            elif key.endswith("aux_down"):
                side = block(side)
            elif key.endswith("aux_skip"):
                x = skips[name] = x + block(side)
            else:
                x = side = skips[name] = (x + block(side)) * math.sqrt(0.5)
        return skips

    def decode(self, skips: dict[str, Tensor], emb: Tensor) -> Tensor:
        stack = list(skips.values())
        x = stack[-1]
        image: Tensor | None = None
        for resolution in dict.fromkeys(name.split("_")[0] for name in self.dec):
            for name, block in self.dec.items():
                if name.startswith(f"{resolution}_") and "aux" not in name:
                    x = block(torch.cat([x, stack.pop()], dim=1) if "block" in name else x, emb)
            image = self._output(x, image, f"{resolution}_aux")
        assert image is not None
        return image

    def _output(self, x: Tensor, image: Tensor | None, prefix: str) -> Tensor | None:
        """The image so far, brought to this resolution and added to what this resolution puts out."""
        if f"{prefix}_conv" not in self.dec:
            return image
        y: Tensor = self.dec[f"{prefix}_conv"](F.silu(self.dec[f"{prefix}_norm"](x)))
        return y if image is None else y + self.dec[f"{prefix}_up"](image)


class DhariwalUNet(TappedUNet):
    """ADM. `augment_dim` and `label_dropout` as in SongUNet."""

    def __init__(
        self,
        *,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        emb_channels = model_channels * channel_mult_emb
        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = Unused(augment_dim, model_channels) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)
        self.map_label = Linear(label_dim, emb_channels, bias=False) if label_dim else None

        def block(cell: Cell, attention: bool) -> Block:
            heads = cell.out_channels // 64 if attention else 0
            return Block(cell, emb_channels, num_heads=heads, dropout=dropout)

        levels = [(img_resolution >> level, model_channels * mult) for level, mult in enumerate(channel_mult)]
        cells = encoder_cells(levels, num_blocks=num_blocks, first=(in_channels, levels[0][1]))
        self.enc = build_encoder(cells, attn_resolutions, block)
        decoder = decoder_cells(levels, num_blocks=num_blocks, encoder=cells)
        self.dec = nn.ModuleDict({cell.name: block(cell, attends(cell, attn_resolutions)) for cell in decoder})
        self.out_norm = group_norm(levels[0][1], 1e-5)
        self.out_conv = Conv(levels[0][1], out_channels, 3)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """torch's own initialisation, with the outputs of the blocks and of the network zero; labels unit normal."""
        for name, module in self.named_modules():
            if isinstance(module, Conv) and name.endswith(("conv1", "proj", "out_conv")):
                module.weight.zero_()
                if module.bias is not None:
                    module.bias.zero_()
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

    def class_vectors(self) -> Tensor | None:
        return None if self.map_label is None else self.map_label.weight.T

    def embed(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.map_layer1(F.silu(self.map_layer0(self.map_noise(c_noise))))
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels)
        return F.silu(emb)

    def encode(self, x: Tensor, emb: Tensor, *, last: str | None = None) -> dict[str, Tensor]:
        skips: dict[str, Tensor] = {}
        for name, block in self.enc.items():
            x = skips[name] = run(block, x, emb)
            if name == last:
                break
        return skips

    def decode(self, skips: dict[str, Tensor], emb: Tensor) -> Tensor:
        stack = list(skips.values())
        x = stack[-1]
        for name, block in self.dec.items():
            x = block(torch.cat([x, stack.pop()], dim=1) if "block" in name else x, emb)
        y: Tensor = self.out_conv(F.silu(self.out_norm(x)))
        return y


def build_encoder(
    cells: Sequence[Cell], resolutions: Sequence[int], block: Callable[[Cell, bool], nn.Module]
) -> nn.ModuleDict:
    first = Conv(cells[0].in_channels, cells[0].out_channels, 3)
    return nn.ModuleDict({cells[0].name: first} | {c.name: block(c, attends(c, resolutions)) for c in cells[1:]})


def run(block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
    y: Tensor = block(x, emb) if isinstance(block, Block) else block(x)
    return y


def _with_side_inputs(
    enc: nn.ModuleDict, cells: Sequence[Cell], encoder_type: str, channels: int, taps: Sequence[float]
) -> nn.ModuleDict:
    """Put the layers that bring the input image to each lower resolution behind the blocks that go there."""
    result = nn.ModuleDict()
    for cell in cells:
        result[cell.name] = enc[cell.name]
        prefix = f"{cell.resolution}x{cell.resolution}_aux"
        if cell.mode == "down" and encoder_type == "skip":
            result[f"{prefix}_down"] = Resample("down", taps)
            result[f"{prefix}_skip"] = Conv(channels, cell.out_channels, 1)
        elif cell.mode == "down":
            conv = Conv(channels, cell.out_channels, 3, mode="down", taps=taps, filter_last=True)
            result[f"{prefix}_residual"] = conv
            channels = cell.out_channels
    return result
