"""The stages of a recipe: `objective` is a file in objectives/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from msdcli.recipe.consistency_stages import CdSettings, EctSettings, ScdSettings, TcmSettings
from msdcli.recipe.pair_stages import FlowSettings, RegressSettings
from msdcli.recipe.section import Batch, Fraction, LogLevel, Positive, Section, Span, Weight
from msdcli.recipe.stage_base import GeneratorSettings, PairsOf, SelectSettings, StageSettings
from msdcli.recipe.trajectory_stages import ProgressiveSettings

__all__ = [
    "CdSettings",
    "EctSettings",
    "FlowSettings",
    "GeneratorSettings",
    "ProgressiveSettings",
    "RegressSettings",
    "ScdSettings",
    "SelectSettings",
    "Stage",
    "StageSettings",
    "Stages",
    "TcmSettings",
]


class EdmSettings(StageSettings):
    """Denoising score matching on the data: how a teacher is trained (Karras et al. 2022, arXiv 2206.00364)."""

    objective: Literal["edm"] = Field("edm", description="denoising score matching")
    P_mean: LogLevel = Field(-1.2, description="mean of ln(sigma)")
    P_std: float = Field(1.2, ge=1e-6, le=20, description="standard deviation of ln(sigma)")
    label_dropout: Fraction = Field(0.0, description="part of the images trained without their class, for guidance")


class DdoSettings(StageSettings):
    """Direct discriminative optimization: a teacher against its own samples (Zheng et al. 2025, arXiv 2503.01103)."""

    objective: Literal["ddo"] = Field("ddo", description="direct discriminative optimization")
    P_mean: LogLevel = Field(-1.2, description="mean of ln(sigma)")
    P_std: float = Field(1.2, ge=1e-6, le=20, description="standard deviation of ln(sigma)")
    beta: Positive = Field(
        1.0, description="scale of the log-ratio -beta lambda(sigma) (|D - y|^2 - |D_reference - y|^2), a number's mean"
    )
    alpha: Weight = Field(1.0, description="weight of the reference's samples beside the data")
    label_dropout: Fraction = Field(0.0, description="part of the images trained without their class, for guidance")


class TsmSettings(StageSettings):
    """Teacher score matching: a student with another network learns the teacher's denoiser (MSD, arXiv 2410.23274)."""

    objective: Literal["tsm"] = Field("tsm", description="teacher score matching")
    P_mean: LogLevel = Field(-1.2, description="mean of ln(sigma)")
    P_std: float = Field(1.2, ge=1e-6, le=20, description="standard deviation of ln(sigma)")
    features: Weight = Field(
        0.0,
        description="weight of a second loss, on the features of the blocks that student and teacher both have, as "
        "shares of the teacher's (LAPTOP-Diff): for students of fewer blocks but as many channels; 0: none",
    )
    becomes: Literal["student", "teacher"] = Field(
        "student",
        description="what its product is to later stages; teacher: the student's average is their teacher too, in the "
        "place of the recipe's. Of a guided one this is guided distillation (arXiv 2210.03142), at half its cost",
    )

    @property
    def is_teacher(self) -> bool:
        return self.becomes == "teacher"

    def check_before(self, after: StageSettings | None) -> None:
        if self.is_teacher and after is None:
            raise ValueError("`becomes: teacher` needs a stage after it, to teach")


Divergence = Literal["rkl", "kl", "js", "hellinger", "jeffreys", "softened_rkl", "neyman"]
FakeWeight = Literal["dmd2", "epsilon", "edm", "none"]
FakeSigma = Literal["span", "lognormal"]
FakeScale = Annotated[float, Field(ge=-100, le=100)]
ClipRange = Annotated[list[Positive], Field(min_length=2, max_length=2)]


class FakeSettings(Section):
    """What the fake network is."""

    kind: Literal["full", "lora"] = Field(
        "full",
        description="a copy of the teacher that learns whole, or low-rank adapters on the teacher's own weights "
        "(VSD, SwiftBrush), which take a fraction of the memory; lora needs `pip install 'msdcli[lora]'`",
    )
    rank: int = Field(8, ge=1, le=4096, description="lora: rank of an adapter (SwiftBrush: 8)")
    alpha: Positive = Field(32.0, description="lora: an adapter is multiplied by alpha / rank (SwiftBrush: 32)")


class ForgetSettings(Section):
    """What students are to forget: asked for it, they learn something else (SFD, arXiv 2409.11219)."""

    classes: list[Annotated[int, Field(ge=0, lt=10**9)]] = Field(
        min_length=1, description="numbers of the classes to forget, as `msd partition` lists them"
    )
    instead: Literal["random"] | Annotated[int, Field(ge=0, lt=10**9)] = Field(
        "random", description="what the teacher is asked for instead: one other class, or any of those that are kept"
    )
    weight: Weight = Field(0.01, description="weight of the loss of an image of a class to forget (SFD: 0.01)")

    @model_validator(mode="after")
    def _something_else(self) -> Self:
        if self.instead in self.classes:
            raise ValueError(f"`instead` {self.instead} is one of the classes to forget")
        return self


class DmSettings(GeneratorSettings):
    """Distribution matching (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867)."""

    objective: Literal["dm"] = Field("dm", description="distribution matching")
    forget: ForgetSettings | None = Field(
        None,
        description="classes to forget, without images or pairs: only the students that own them learn; all others "
        "end the stage as they began it",
    )
    fake: FakeSettings = Field(default_factory=FakeSettings, description="what the fake network is")
    fake_guidance: Literal["none", "same", "zero"] | FakeScale = Field(
        "none",
        description="guidance of the fake network where the student looks at it; same: as the teacher's, of a range of "
        "scales by the same draw (SiD-LSG, SNOOPI); a number: by that scale away from its own prediction without a "
        "class, negative ones too (Anti-CFG); zero: the prediction without a class alone (Zero-CFG)",
    )
    fake_guidance_trained: bool = Field(
        False, description="the fake network's own loss, too, is of its guided prediction (SiD-LSG)"
    )
    fake_label_dropout: Fraction = Field(
        0.0, description="part of the samples that the fake network learns without their class (SiD-LSG: 0.1)"
    )
    fake_updates: int = Field(5, ge=1, le=1000, description="updates of the fake network per update of the student")
    fake_batch: Literal["fresh", "shared"] = Field(
        "fresh", description="new samples for every update, or one batch for all updates of a step (cheaper)"
    )
    sigma_span: Span = Field(
        [0.0, 0.5],
        min_length=2,
        max_length=2,
        description="noise levels of the loss, as parts of the Karras schedule, without the end: [0.02, 0.981] draws "
        "numbers 20 to 980 of its 1000 (DMD2)",
    )
    fake_span: Span | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="noise levels that the fake network learns; those of `sigma_span` if absent, [0, 1] is DMD2's",
    )
    weight: Literal["dmd", "none"] = Field(
        "dmd", description="weight of the score difference: 1 / mean|y - D_teacher| (DMD), or none (Diff-Instruct, VSD)"
    )
    fake_weight: FakeWeight = Field(
        "dmd2",
        description="weight of the fake network's loss: sigma^-2 + sigma_data^-2 (DMD2), sigma^-2, which is the error "
        "of the predicted noise (DMD2 on SD 1.5), EDM's own (SiD, Diff-Instruct; the same as dmd2), or none (FastGen)",
    )
    fake_sigma: FakeSigma = Field(
        "span",
        description="noise levels of the fake network's loss: those of `sigma_span`, or EDM's lognormal(-1.2, 1.2)",
    )
    labels: Literal["uniform", "data"] = Field("uniform", description="how the student's conditions are drawn")
    pairs: PairsOf = Field(
        "shared",
        description="regression on the teacher's pairs: on all of them, on those of the student's part, or none",
    )
    pair_weight: Weight = Field(0.25, description="weight of the regression loss (DMD)")
    pair_batch: Batch | None = Field(None, description="pairs per update; `batch` if absent")
    student_input: Literal["simulation", "data"] = Field(
        "simulation",
        description="what a student of several levels sees at a later one: what its earlier ones make of noise (DMD2's "
        "backward simulation), or noisy images of the data (FastGen)",
    )

    @model_validator(mode="after")
    def _a_trained_guidance_is_one(self) -> Self:
        if self.fake_guidance_trained and self.fake_guidance in ("none", "zero"):
            raise ValueError(
                f"`fake_guidance_trained` needs a `fake_guidance` that is same or a number, not {self.fake_guidance}"
            )
        return self

    def _check_forgetting(self, before: StageSettings | None) -> None:
        if self.classes is not None:
            raise ValueError("`forget` names the classes that it is about: leave `classes` out")
        if self.needs_images or self.pairs_used != "none":
            raise ValueError("`forget` must not see the classes to forget: `pairs: none`, and no loss on images")
        if not isinstance(before, GeneratorSettings) or before.sigmas != self.sigmas:
            raise ValueError("`forget` continues a stage that made students of the same `sigmas`: put it after one")

    def check_after(self, before: StageSettings | None) -> None:
        super().check_after(before)
        if self.forget is not None:
            self._check_forgetting(before)
        if isinstance(before, DmSettings) and before.fake != self.fake:
            raise ValueError("`fake` differs from that of the stage before, whose fake network it inherits")

    def check_anew(self, before: StageSettings | None) -> None:
        super().check_anew(before)
        if self.fake_span is not None and self.fake_sigma == "lognormal":
            raise ValueError("`fake_span` is of `fake_sigma: span`: lognormal levels have none")

    def check_sharded(self) -> None:
        if self.fake.kind == "lora":
            raise ValueError(
                f"`fsdp`: stage {self.objective} with `fake.kind: lora` keeps its network whole on every device: "
                "take one"
            )

    @property
    def needs_images(self) -> bool:
        return self.student_input == "data" and self.evaluations > 1

    @property
    def pairs_used(self) -> PairsOf:
        return self.pairs


class AdmSettings(DmSettings):
    """Adversarial distribution matching: `dm` continued with a GAN loss (DMD2, arXiv 2405.14867)."""

    objective: Literal["adm"] = Field("adm", description="adversarial distribution matching")  # type: ignore[assignment]
    features: Literal["fake", "teacher"] = Field(
        "fake", description="where the heads look: the trainable fake network (DMD2) or the frozen teacher (FastGen)"
    )
    taps: list[str] | None = Field(
        None, min_length=1, description="encoder blocks that get a head each, by name; the last one if absent"
    )
    head_norm: Literal["unet", "dmd2"] = Field(
        "unet",
        description="group norms of the heads: as in msd's U-Net (at most 32 groups of at least 4 channels, epsilon "
        "1e-6), or 32 groups and epsilon 1e-5 (DMD2, FastGen)",
    )
    tap_loss: Literal["mean_logit", "mean_loss"] = Field(
        "mean_logit",
        description="of several taps: the loss of the heads' mean logit, or the mean of every head's loss (FastGen)",
    )
    gan_weight: Weight = Field(3e-3, description="weight of the student's GAN loss (DMD2: 3e-3)")
    head_weight: Weight = Field(1e-2, description="weight of the heads' loss (DMD2: 1e-2; FastGen: 1)")
    gan_noise: Literal["own", "shared"] = Field(
        "own", description="noise of the samples the heads see: their own draw (DMD2) or that of the dm loss (FastGen)"
    )
    gan_span: Span = Field(
        [0.0, 1.0],
        min_length=2,
        max_length=2,
        description="noise levels the heads see, as parts of the Karras schedule",
    )

    dm_weight: Weight = Field(1.0, description="weight of the dm loss; 0: the adversarial loss alone (LADD)")
    head_penalty: Weight = Field(0.0, description="weight of the heads' R1 penalty on real images, beside their loss")
    divergence: Divergence = Field(
        "rkl",
        description="f-divergence that the dm loss minimises (f-distill): its gradient times h(r), r from the heads",
    )
    ratio_clip: ClipRange = Field([0.1, 20.0], description="bounds of the density ratio (f-distill)")
    ratio_bins: int = Field(
        10, ge=1, le=1000, description="noise levels are cut into so many parts; r is over its mean"
    )
    ratio_rate: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="what stays of those means from batch to batch (f-distill: 0 on CIFAR-10, 0.5 on ImageNet)"
    )

    def check_anew(self, before: StageSettings | None) -> None:
        super().check_anew(before)
        if not isinstance(before, AdmSettings):
            return
        inherited = ["features", "taps", "head_norm"]  # of the heads
        inherited += ["ratio_bins"] if "rkl" not in (self.divergence, before.divergence) else []
        for name in inherited:
            if getattr(before, name) != getattr(self, name):
                raise ValueError(f"`{name}` differs from that of the stage before, whose heads it inherits")

    @model_validator(mode="after")
    def _a_divergence_has_something_to_weigh(self) -> Self:
        if self.divergence != "rkl" and (self.gan_weight == 0 or self.dm_weight == 0):
            raise ValueError(f"`divergence` {self.divergence} needs `gan_weight` and `dm_weight` above 0")
        return self

    @property
    def needs_images(self) -> bool:
        return True


class SidSettings(DmSettings):
    """Score identity distillation (SiD, arXiv 2404.04057) and its family: SiDA (2410.14919), SiM (2410.16794) and
    Uni-Instruct (2505.20755).
    """

    objective: Literal["sid"] = Field("sid", description="score identity distillation")  # type: ignore[assignment]
    alpha: float = Field(
        1.0,
        ge=-10,
        le=10,
        description="of the loss e (D_t - y - alpha e), e = D_t - D_fake: 1 and 1.2 as published; 0.5 is the whole "
        "gradient of the Fisher divergence (`distance: l2` without `through_ratio`)",
    )
    distance: Literal["l2", "huber"] = Field(
        "l2", description="of the scores: squared (SiD), or pseudo-Huber (SiM), whose loss is e (D_fake - y) / norm"
    )
    huber_c: Positive = Field(0.03, description="constant of the pseudo-Huber distance, of a whole image")
    divergence: Divergence = Field(
        "rkl", description="f-divergence that is expanded along the noise (Uni-Instruct); all but rkl need `gan_weight`"
    )
    through_ratio: bool = Field(
        False, description="the divergence's exact gradient, through the density ratio at x, instead of the paper's"
    )
    ratio_clip: ClipRange = Field([0.1, 20.0], description="bounds of the density ratio")
    gan_weight: Weight = Field(0.0, description="weight of the student's GAN loss (SiDA); 0: no real images")
    head_weight: Weight = Field(1.0, description="weight of the discriminator's loss in the fake network's")
    taps: list[str] | None = Field(
        None, min_length=1, max_length=1, description="encoder block of the fake network that is the discriminator"
    )
    fake_updates: int = Field(1, ge=1, le=1000, description="updates of the fake network per update of the student")
    fake_weight: FakeWeight = Field("edm", description="weight of the fake network's loss, as in `dm`")
    fake_sigma: FakeSigma = Field("lognormal", description="noise levels of the fake network's loss, as in `dm`")
    sigma_span: Span = Field(
        [0.0, 0.8],
        min_length=2,
        max_length=2,
        description="noise levels of the loss, as a part of the schedule",
    )
    pairs: PairsOf = Field("none", description="regression on the teacher's pairs, as in `dm`")

    @property
    def needs_images(self) -> bool:
        return self.gan_weight > 0 or super().needs_images

    @model_validator(mode="after")
    def _a_divergence_has_a_discriminator(self) -> Self:
        if self.divergence != "rkl" and self.gan_weight == 0:
            raise ValueError(f"`divergence` {self.divergence} needs a discriminator: `gan_weight` above 0")
        if self.through_ratio and self.gan_weight == 0:
            raise ValueError("`through_ratio` needs a discriminator: `gan_weight` above 0")
        return self

    @model_validator(mode="after")
    def _nothing_is_left_unread(self) -> Self:
        huber = self.distance == "huber"
        if huber and self.through_ratio:
            raise ValueError("`through_ratio` is the gradient of the squared distance: leave `distance` at l2")
        if (huber or self.through_ratio) and self.alpha != 1:
            form = "`distance: huber` is SiM's loss" if huber else "`through_ratio` is the exact gradient"
            raise ValueError(f"{form}, which has no `alpha`: leave {self.alpha:g} out")
        return self

    def check_anew(self, before: StageSettings | None) -> None:
        super().check_anew(before)
        if self.distance == "huber" and self.weight == "none":
            raise ValueError("`distance: huber` is divided by its own norm, and not by `weight`: leave none out")


Stage = Annotated[
    EdmSettings
    | TsmSettings
    | RegressSettings
    | FlowSettings
    | DmSettings
    | AdmSettings
    | SidSettings
    | CdSettings
    | EctSettings
    | TcmSettings
    | ScdSettings
    | ProgressiveSettings,
    Field(discriminator="objective"),
]


MOST_STAGES = 16


def in_order(given: list[Stage]) -> list[Stage]:
    """Return the stages that the given ones stand for. ValueError where one cannot come where it does."""
    stages: list[Stage] = [own for stage in given for own in stage.expanded()]
    if len(stages) > MOST_STAGES:
        raise ValueError(f"{len(stages)} stages, counting every round of `repeat`; at most {MOST_STAGES}")
    for number, stage in enumerate(stages):
        try:
            stage.check_after(stages[number - 1] if number else None)
            stage.check_before(stages[number + 1] if number + 1 < len(stages) else None)
        except ValueError as error:
            raise ValueError(f"stage {number}, {stage.objective}: {error}") from None
    return stages


def teacher_stage(stages: Sequence[StageSettings], number: int) -> int | None:
    """Return which stage made the teacher of stage `number`; None: it is the recipe's."""
    return next((k for k in reversed(range(number)) if stages[k].is_teacher), None)


Stages = Annotated[list[Stage], AfterValidator(in_order)]
