"""The students' network, as a recipe asks for it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from msdcli.recipe.networks import Network, NetworkSettings
from msdcli.recipe.section import Positive, Section


class AdapterSettings(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) on the teacher's linear layers and convolutions."""

    rank: int = Field(16, ge=1, le=4096, description="rank of an adapter")
    alpha: Positive | None = Field(
        None, description="an adapter is multiplied by alpha / rank; absent: by 1, whatever the rank"
    )

    @property
    def scale(self) -> float:
        """LoRA's alpha."""
        return float(self.rank) if self.alpha is None else self.alpha


class StudentSettings(Section):
    """The students' network; the teacher's own unless told otherwise."""

    width: float = Field(1.0, ge=1e-3, le=16, description="channels, as a multiple of the teacher's")
    depth: float = Field(1.0, ge=1e-3, le=16, description="blocks, as a multiple of the teacher's (at least one stays)")
    network: Network | None = Field(None, description="a full network section instead of `width` and `depth`")
    parameters: float | None = Field(
        None,
        ge=1e-6,
        lt=1,
        description="a target instead: this share of the teacher's parameters, as fast as can be found",
    )
    latency: float | None = Field(
        None, ge=1e-6, lt=1, description="a target instead: this share of the teacher's latency on this device"
    )
    adapter: AdapterSettings | None = Field(
        None,
        description="students that are adapters of the teacher's network, whose weights all of them share: one network "
        "and K small files (needs `pip install 'msdcli[lora]'`)",
    )
    prune: Literal["layers"] | None = Field(
        None,
        description="with `parameters` or `latency`: leave out those of the teacher's blocks that cost the least, and "
        "begin with the weights of the others (LAPTOP-Diff); absent: fewer channels and blocks are searched",
    )
    init: Literal["auto", "teacher", "pruned", "random"] = Field(
        "auto",
        description="first weights: the teacher's, those of its leading channels (for a smaller network), or random; "
        "auto: the teacher's where the networks are equal, else random",
    )

    @model_validator(mode="after")
    def _one_way_only(self) -> StudentSettings:
        scaled = (self.width, self.depth) != (1.0, 1.0)
        others = (self.network, self.parameters, self.latency, self.adapter)
        if sum([scaled, *(way is not None for way in others)]) > 1:
            raise ValueError("give one of `width` and `depth`, `network`, `parameters`, `latency`, `adapter`")
        if self.adapter is not None and self.init not in ("auto", "teacher"):
            raise ValueError(f"`adapter` begins with the teacher's weights, not with `init: {self.init}`")
        if self.prune is not None and (self.parameters is None) == (self.latency is None):
            raise ValueError("`prune` needs a target: `parameters` or `latency`")
        if self.prune is not None and self.init != "auto":
            raise ValueError(f"`prune` begins with the weights of the blocks that stay, not with `init: {self.init}`")
        return self

    @property
    def target(self) -> float | None:
        """The share of the teacher's parameters or latency that a network is searched for when a run starts."""
        return self.parameters or self.latency

    def network_for(self, teacher: NetworkSettings) -> NetworkSettings:
        """Return the student's network, scaled from the teacher's."""
        if self.network is not None:
            return self.network
        return teacher.scaled(self.width, self.depth)
