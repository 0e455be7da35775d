"""Keys of the teacher: where it is from, how it is trained, sampled, guided and stitched."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from msdcli.recipe.networks import Network, UNetSettings
from msdcli.recipe.section import FilePath, NoiseLevel, Scale, Section, Seed, ascending
from msdcli.recipe.solver import SolverSettings
from msdcli.recipe.stages import DdoSettings, EdmSettings


class GuidanceSettings(Section):
    """Guidance of the teacher wherever it is asked: in pairs, samples and losses."""

    scale: Scale | list[Scale] = Field(
        description="1 is no guidance; more moves away from the worse prediction; [low, high]: drawn for every image"
    )
    interval: Annotated[list[Annotated[float, Field(ge=0, le=10_000)]], AfterValidator(ascending)] = Field(
        [0.0, 10_000.0], min_length=2, max_length=2, description="noise levels that are guided: above, and up to"
    )
    schedule: Literal["constant", "cfg++"] = Field(
        "constant",
        description="cfg++: a sampler's step from sigma to sigma' has `scale` / (1 - sigma'/sigma), which is CFG++ of "
        "lambda = `scale`, 0 to 1 (arXiv 2406.08070); of ddim alone, and not of stages that ask the teacher themselves",
    )
    guide: FilePath | Literal["perturbed"] | None = Field(
        None,
        description="what is moved away from: a weaker teacher (folder or pickle); perturbed: the teacher with the "
        "identity in the place of attention maps (arXiv 2403.17377); absent: the teacher without class",
    )
    layers: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(min_length=1, max_length=1000)]
        | None
    ) = Field(
        None,
        description="perturbed: layers of self-attention, or parts of the network that have some, such as middle or "
        "transformer_blocks.14; absent: the one in the middle",
    )

    @model_validator(mode="after")
    def _a_range_ascends(self) -> GuidanceSettings:
        if isinstance(self.scale, list) and (len(self.scale) != 2 or self.scale[0] > self.scale[1]):
            raise ValueError(f"`scale` is a number or two, [low, high], not {self.scale}")
        return self

    @model_validator(mode="after")
    def _keys_go_together(self) -> GuidanceSettings:
        if self.layers is not None and not self.perturbs:
            raise ValueError("`layers` is a key of `guide: perturbed`: leave it out")
        highest = self.scale[-1] if isinstance(self.scale, list) else self.scale
        if self.schedule == "cfg++" and highest > 1:
            raise ValueError(f"`scale` of cfg++ is its lambda, 0 to 1 (about 0.6), not {highest:g}")
        return self

    @property
    def perturbs(self) -> bool:
        """Whether the teacher moves away from itself without attention."""
        return self.guide == "perturbed"

    @property
    def weaker(self) -> str | None:
        """Where the weaker teacher is."""
        return None if self.perturbs else self.guide

    def record(self) -> list[Any]:
        """Return what decides predictions, beside networks; as it was before there were schedules and perturbation."""
        found: list[Any] = [self.scale, self.interval]
        if self.schedule != "constant":
            found.append({"schedule": self.schedule})
        if self.perturbs:
            found.append({"perturbed": self.layers or []})
        return found


class StitchSettings(Section):
    """A small network in the teacher's place at high noise levels, in its samples (T-Stitch, arXiv 2402.14167)."""

    path: FilePath = Field(
        description="a smaller teacher (folder or pickle), or a run directory whose students began with tsm: each is "
        "such a network for its own classes"
    )
    part: int | None = Field(
        None, ge=0, lt=100_000, description="of a run directory: this student alone; other classes are the teacher's"
    )
    above: NoiseLevel = Field(description="noise levels above this one are the small network's")


class LatentShapeSettings(Section):
    """What the autoencoder of a latent teacher makes of pictures."""

    channels: int = Field(4, ge=1, le=4096, description="channels of the latents")
    factor: int = Field(8, ge=1, le=1024, description="pixels, in each direction, that become one position")


class TeacherSettings(Section):
    """The diffusion model to distil: trained here, or loaded."""

    path: FilePath | None = Field(
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
    stages: list[DdoSettings] = Field(
        [], max_length=16, description="what makes a trained or given teacher better, one after the other: `ddo`"
    )
    solver: SolverSettings = Field(default_factory=SolverSettings, description="how it is sampled")
    guidance: GuidanceSettings | None = Field(None, description="how it is guided; absent: not at all")
    stitch: StitchSettings | None = Field(
        None, description="a small network that pairs and samples ask at high noise levels; absent: none"
    )

    @model_validator(mode="after")
    def _cfgpp_is_of_ddim(self) -> TeacherSettings:
        if self.guidance is not None and self.guidance.schedule == "cfg++" and self.solver.name != "ddim":
            raise ValueError(
                f"`guidance.schedule` cfg++ belongs to DDIM's step, and `solver.name` is {self.solver.name}: take ddim"
            )
        return self

    @model_validator(mode="after")
    def _latents_come_with_a_teacher(self) -> TeacherSettings:
        if self.latent is not None and self.path is None:
            raise ValueError("`latent` describes a teacher at `path`; the teachers trained here work on pictures")
        return self
