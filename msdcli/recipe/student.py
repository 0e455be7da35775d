"""The students' network, as a recipe asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

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


class PartNetworkSettings(Section):
    """What one student's network has otherwise than all students'; what is absent is as they have it."""

    width: float | None = Field(None, ge=1e-3, le=16, description="channels, as a multiple of the teacher's")
    depth: float | None = Field(None, ge=1e-3, le=16, description="blocks, as a multiple of the teacher's")
    network: Network | None = Field(None, description="a full network section")
    parameters: float | None = Field(None, ge=1e-6, lt=1, description="a target: a share of the teacher's parameters")
    latency: float | None = Field(None, ge=1e-6, lt=1, description="a target: a share of the teacher's latency")
    prune: Literal["layers"] | None = Field(None, description="with a target: leave out whole blocks")

    @property
    def said(self) -> dict[str, Any]:
        """The keys that are given, with their values."""
        return {name: value for name, value in self if value is not None}


# How a network's size is said: a student that says its own in one way has nothing of what all say in another.
WAYS = {"width": "scaled", "depth": "scaled", "network": "named", "parameters": "searched", "latency": "timed"}


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

    parts: list[PartNetworkSettings] | None = Field(
        None,
        max_length=100_000,
        description="students of different sizes: an entry for each part of the partition, with what its student's "
        "network has otherwise than these keys say, e.g. [{width: 0.5}, {width: 1.0}]; {} is as they say",
    )

    @model_validator(mode="after")
    def _one_way_only(self) -> StudentSettings:
        scaled = (self.width, self.depth) != (1.0, 1.0)
        others = (self.network, self.parameters, self.latency, self.adapter)
        if sum([scaled, *(way is not None for way in others)]) > 1:
            raise ValueError("give one of `width` and `depth`, `network`, `parameters`, `latency`, `adapter`")
        if self.adapter is not None and self.init not in ("auto", "teacher"):
            raise ValueError(f"`adapter` begins with the teacher's weights, not with `init: {self.init}`")
        if self.init == "teacher" and (self.parameters, self.latency) != (None, None):
            raise ValueError("`init: teacher` is for the teacher's network, and a target finds another: `init: pruned`")
        if self.prune is not None and (self.parameters is None) == (self.latency is None):
            raise ValueError("`prune` needs a target: `parameters` or `latency`")
        if self.prune is not None and self.init != "auto":
            raise ValueError(f"`prune` begins with the weights of the blocks that stay, not with `init: {self.init}`")
        return self

    @model_validator(mode="after")
    def _every_part_has_a_network(self) -> StudentSettings:
        if self.parts is not None and self.adapter is not None:
            raise ValueError("`adapter` is of the teacher's network in every student: leave `parts` out")
        for number in range(len(self.parts or ())):
            try:
                self.of(number)
            except ValidationError as error:
                said = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"`parts`, student {number}: {said}") from None
        return self

    def of(self, number: int) -> StudentSettings:
        """Return the settings of one student: what all share, and over it what its entry of `parts` says."""
        if self.parts is None:
            return self
        own = self.parts[number].said
        ways = {WAYS[name] for name in own.keys() & WAYS.keys()}
        left = {name for name, way in WAYS.items() if ways and way not in ways}
        if ways & {"scaled", "named"}:
            left.add("prune")  # which needs a target
        return StudentSettings(**{name: v for name, v in self if name not in left | {"parts"}} | own)

    def sizes(self, count: int) -> list[Sequence[int]]:
        """Return the numbers of `count` students, those together whose networks are asked for alike, in the order of
        each group's first.
        """
        if self.parts is None:
            return [range(count)]
        found: list[tuple[StudentSettings, list[int]]] = []
        for number in range(count):
            settings = self.of(number)
            numbers = next((numbers for known, numbers in found if known == settings), None)
            if numbers is None:
                found.append((settings, [number]))
            else:
                numbers.append(number)
        return [numbers for _, numbers in found]

    def with_network(self, numbers: Sequence[int], network: NetworkSettings) -> StudentSettings:
        """Return the settings with the network that some students' target led to."""
        if self.parts is None:
            return StudentSettings(network=network, init=self.init)
        found, own = set(numbers), PartNetworkSettings(network=network)
        return self.model_copy(update={"parts": [own if k in found else part for k, part in enumerate(self.parts)]})

    @property
    def target(self) -> float | None:
        """The share of the teacher's parameters or latency that a network is searched for when a run starts."""
        return self.parameters or self.latency

    def network_for(self, teacher: NetworkSettings) -> NetworkSettings:
        """Return the student's network, scaled from the teacher's."""
        if self.network is not None:
            return self.network
        return teacher.scaled(self.width, self.depth)
