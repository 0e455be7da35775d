"""A student measured while it trains: samples of its average against the real images of its part."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from msdcli.data.base import Dataset
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.device_batch import DeviceBatch
from msdcli.diffusion.float32 import fast_float32
from msdcli.diffusion.generator import Generator
from msdcli.engine.distributed.group import ProcessGroup
from msdcli.engine.inputs import autoencoder, pairs
from msdcli.engine.measure import features
from msdcli.engine.measure.feature_metric import FidOptions, Reference
from msdcli.engine.measure.fid import EvaluationContext
from msdcli.engine.tracking.events import Report
from msdcli.engine.train import compiling
from msdcli.errors import UserError
from msdcli.metrics.evaluate import FeatureSet
from msdcli.metrics.inception import open_network
from msdcli.noise import image_noise, step_noise
from msdcli.recipe import Recipe
from msdcli.recipe.stages import GeneratorSettings
from msdcli.rundir import RunDir
from msdcli.seeds import derive


def check(recipe: Recipe, data: Dataset, group: ProcessGroup, *, planning: bool) -> None:
    """Raise UserError where a stage selects by what cannot be measured here."""
    for stage in recipe.stages:
        if not isinstance(stage, GeneratorSettings) or stage.select is None:
            continue
        where, protocol = f"stage {stage.objective}: select", stage.select.protocol
        if not recipe.has_measure:
            raise UserError(
                f"{where}: {'prompts have' if recipe.has_prompts else 'without data there is'} no measure to choose by",
                hint="leave `select` out: the last average is kept",
            )
        if len(data.shape) == 1 and protocol != "data":
            raise UserError(f"{where}: points have no {protocol} features", hint="leave `protocol` out")
        if stage.select.samples < group.size:
            raise UserError(f"{where}: {stage.select.samples} samples are too few for {group.size} processes")
        if protocol != "data" and not planning:
            try:
                open_network(protocol)  # its weights are here
            except UserError as error:
                raise UserError(
                    f"{where}: {error.message}", hint="without `protocol` the classifier of the data measures"
                ) from None


class PartEvaluator:
    """Measures samples for the conditions of one part, which are drawn as frequent as in the data.

    Pictures are compared with the data, points with the teacher's samples, as in `msd fid`, but with the images that
    are trained on: what is held out chooses nothing. The noise is the same at every step, and that of no pair and of no
    final measurement. The processes of a group share the samples.
    """

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        stage: GeneratorSettings,
        part: list[int],
        device: torch.device,
        group: ProcessGroup,
        report: Report,
    ) -> None:
        assert stage.select is not None, "the stage does not select"
        protocol = stage.select.protocol
        # A published protocol's features are many and large: the distance needs no more than their moments.
        options = FidOptions(protocol=protocol, device=str(device), lean=protocol != "data")
        context = group.leader_first(lambda: EvaluationContext(run, options, report, choosing=True))
        self.metric, self.samples, self.sigmas = context.metric.name, stage.select.samples, tuple(stage.sigmas)
        self.feature_metric, self.device, self.group, self.batch = context.metric, device, group, context.batch
        self.extractor = features.FeatureExtractor(
            context.metric.network, context.batch, keep=context.planar, memory=DeviceBatch(report)
        )
        self.memory = DeviceBatch(report)
        self.reference: Reference = group.leader_first(lambda: _of_part(context, part))
        self.decode = autoencoder.decoder(run.teacher, device)
        self.seed = derive("selection", recipe.seed)
        labels = pairs.labels_for(context.data, range(len(context.data)))
        own = labels[torch.isin(labels, torch.tensor(part))]
        self.classes = own[torch.arange(self.samples) % len(own)]

    def record(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "protocol": self.feature_metric.protocol,
            "network": self.feature_metric.network.record(),
            "samples": self.samples,
            "reference": self.reference.count,
            "seed": self.seed,
        }

    @torch.no_grad()
    def value(self, net: Denoiser) -> float | None:
        finite = True

        def drawn() -> Iterator[Tensor]:
            nonlocal finite
            for y in self._own_samples(net):
                finite = finite and bool(y.isfinite().all())
                yield self.extractor.as_fed(y.nan_to_num())

        mine = self.extractor.collect(drawn())
        parts = self.group.gather(mine.to_arrays() if finite else None)
        return self.group.broadcast(self._compare(parts) if self.group.is_leader else None)

    def _own_samples(self, net: Denoiser) -> Iterator[Tensor]:
        """Yield this process's share of the samples as pictures or points.

        Every process calls the network as often as the others, for that is how a sharded one computes; what it draws
        beyond the last sample is thrown away.
        """
        net.compute_in(None)  # as it will be sampled, whatever it trains in
        generator = Generator(net, self.sigmas)
        size = self.group.size
        own = range(self.group.rank, -(-self.samples // size) * size, size)
        for numbers in (own[i : i + self.batch] for i in range(0, len(own), self.batch)):
            at = [number % self.samples for number in numbers]
            inputs = [image_noise(self.seed, at, net.shape), self.classes[at]]
            if (noise := step_noise(self.seed, at, net.shape, generator.steps)) is not None:
                inputs.append(noise)
            call = functools.partial(self._drawn, generator)
            with compiling.eagerly():
                y = call(*inputs) if size > 1 else self.memory.map(call, *inputs)
            if kept := sum(number < self.samples for number in numbers):
                yield self.decode(y[:kept])

    def _drawn(self, generator: Generator, z: Tensor, c: Tensor, noise: Tensor | None = None) -> Tensor:
        between = None if noise is None else noise.to(self.device)
        with fast_float32():
            return generator(z.to(self.device), c.to(self.device), between)

    def _compare(self, parts: list[dict[str, Any] | None]) -> float | None:
        sets = [FeatureSet.from_arrays(arrays) for arrays in parts if arrays is not None]
        if len(sets) < len(parts):
            return None
        for other in sets[1:]:
            sets[0].merge(other)
        value = self.feature_metric.compare(sets[0], self.reference, 0, False)[0][self.metric]
        return value if math.isfinite(value) else None


def _of_part(context: EvaluationContext, part: list[int]) -> Reference:
    """Return what samples of these classes are compared with; of pictures the moments. UserError where there are fewer
    than two.
    """
    if context.planar:
        found = context.teacher().select(part)
    else:
        real = context.real()
        assert isinstance(real, FeatureSet), "a run's own data have features"
        found = real.select(part)
    if found.count < 2:
        raise UserError(f"select: the data have {found.count} images of classes {part}, which is too few to measure by")
    return found if context.planar else found.moments.whole().gaussian()
