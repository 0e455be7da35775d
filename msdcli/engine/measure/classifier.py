"""The classifier that judges samples: trained on the data with a fixed seed and fixed settings, once per data set.

A tenth of the images is held out, on which it says how much it knows: of images that it was trained on it may know
every one by heart, and nothing about their classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msdcli.data.base import Dataset, fingerprint
from msdcli.diffusion.draws import Draws, Source
from msdcli.engine.checkpoints.model import MODEL, WEIGHTS, is_complete
from msdcli.engine.checkpoints.tensors import load_tensors, load_weights, save_tensors
from msdcli.engine.tracking.events import Report
from msdcli.engine.train.loop import TrainOptions, train
from msdcli.metrics.inception import FeatureNetwork
from msdcli.nets.classifier import Classifier
from msdcli.objectives import Objective
from msdcli.objectives.base import Turn
from msdcli.recipe import Recipe
from msdcli.recipe.stages import StageSettings
from msdcli.rundir import RunDir, file_hash, key, link, lock, read_json, write_json
from msdcli.seeds import derive

# Part of the metric's definition: to change any of it is to make another metric.
TRAINING = StageSettings(objective="classify", steps=400, batch=128, lr=2e-3, ema=0.99)
FORMAT = 2  # of classifiers: another number where the code below or the network makes another one
EVERY, MOST = 10, 5000  # one image in ten is held out, and no more than so many
BATCH = 500
SURE = 0.01  # how rarely guessing may be as often right, where the classifier is said to know something


class Classification(Objective):
    """-log p(c | y), with a little label smoothing so that features keep telling good images apart."""

    def __init__(self, settings: StageSettings, student: Classifier, teacher: None = None) -> None:
        self.student = student
        self.nets = {"student": student}

    def turns(self, step: int) -> Iterator[Turn]:
        yield ("student",), self.loss

    def loss(self, draws: Draws) -> Tensor:
        y, c = draws.real()
        return F.cross_entropy(self.student(y), c, reduction="none", label_smoothing=0.05)


@dataclass(frozen=True)
class HeldOut:
    """How many of the images that it was not trained on the classifier names right, and how many always saying the most
    frequent class would.
    """

    images: int
    right: int
    guessed: int

    @property
    def accuracy(self) -> float | None:
        return self.right / self.images if self.images else None

    @property
    def knows(self) -> bool:
        """Whether guessing would hardly be right as often: a binomial test."""
        from scipy.special import bdtrc  # slow to import

        return self.images > 0 and bool(bdtrc(self.right - 1, self.images, self.guessed / self.images) <= SURE)

    def told(self) -> str:
        """One phrase on it."""
        if not self.images:
            return "no images were held out: there are too few"
        return f"{self.right / self.images:.1%} right on {self.images:,} images that it was not trained on"

    def warnings(self, metric: str, num_classes: int) -> list[str]:
        """What whoever reads the metric should know."""
        if self.knows:
            return []
        if num_classes == 1:
            why = "The data have one class, of which a classifier learns nothing"
        elif not self.images:
            why = "The data are too few to hold any out: whether their classifier knows the classes is unknown"
        else:
            why = (
                f"The classifier is right on {self.right:,} of {self.images:,} images that it was not trained on, and "
                f"guessing on {self.guessed:,}: it is not shown to know anything about the classes"
            )
        return [f"{why}, so {metric} and accuracy say little; --protocol clean measures by a published network."]


@dataclass(frozen=True)
class TrainedClassifier:
    """The frozen classifier, its weights' hash and what it knows."""

    network: Classifier
    sha256: str
    held_out: HeldOut


def held_out(labels: Tensor) -> Tensor:
    """Return the numbers of the images that are not trained on, the same ones for equal labels: every tenth within the
    classes, so that each is held out in proportion and keeps most of its images; of a class of one image none.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive("held out", len(labels))))
    order = order[labels.bincount()[labels[order]] > 1]
    order = order[labels[order].argsort(stable=True)]
    every = max(EVERY, -(-len(labels) // MOST))
    return order[every - 1 :: every].sort().values


def place(run: RunDir, data: Dataset) -> Path:
    """Return the folder of these data's classifier, complete or not."""
    # It depends on the data (their shape and classes make the network), TRAINING, the seeds, which are fixed, and the
    # code (FORMAT). Threads and device move last bits that training amplifies: figures name the weights' hash.
    return run.shared / f"classifier-{key('classifier', FORMAT, fingerprint(data), TRAINING.keyed())}"


def provide(run: RunDir, recipe: Recipe, data: Dataset, device: torch.device, report: Report) -> TrainedClassifier:
    """Return the classifier after training or reusing it."""
    content, folder = fingerprint(data), place(run, data)
    weights = folder / WEIGHTS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(data.shape, len(data.class_names))
    with lock(folder, "the classifier", wait=report):
        if not is_complete(folder):
            away = held_out(data.labels(range(len(data))))
            save_tensors(weights, _trained(network, data, away, folder, device, report).state_dict())
            load_weights(network, load_tensors(weights)[0], weights)
            found = _examined(network, data, away)
            report(f"classifier: {found.told()}")
            record = {"classifier": recipe.data.label, "data": content, "held_out": vars(found)}
            write_json(folder / MODEL, record | {"sha256": file_hash(weights)})
    load_weights(network, load_tensors(weights)[0], weights)
    link(folder, run.classifier)
    record = read_json(folder / MODEL)
    network = network.to(device).requires_grad_(False).eval()
    return TrainedClassifier(network, record["sha256"], HeldOut(**record["held_out"]))


def _trained(
    network: Classifier, data: Dataset, without: Tensor, folder: Path, device: torch.device, report: Report
) -> nn.Module:
    """Train the network on all images but those `without`; return its average."""
    source = Source(data, range(len(data.class_names)), without=without, device=device)
    objective = Classification(TRAINING, network.to(device).train())
    name = "classifier"
    state = train(
        objective, TRAINING, source, folder, key=(name,), what=name, options=TrainOptions(keep=1), report=report
    )
    return state.ema.net


@torch.no_grad()
def _examined(network: Classifier, data: Dataset, numbers: Tensor) -> HeldOut:
    labels, right = data.labels(numbers.tolist()), 0
    device = next(network.parameters()).device
    for start in range(0, len(numbers), BATCH):
        part = numbers[start : start + BATCH].tolist()
        said = network.eval()(data.images(part).to(device)).argmax(dim=1).cpu()
        right += int((said == data.labels(part)).sum())
    return HeldOut(len(numbers), right, int(labels.bincount().max()) if len(labels) else 0)


def as_network(net: Classifier, sha256: str, device: torch.device) -> FeatureNetwork:
    """The classifier in the place of Inception: it sees floats, and its classes are the data's own."""
    return FeatureNetwork(
        "data", net.features, lambda f: net.head(f).softmax(dim=1), sha256, device=device, floats=True, cpu_batch=500
    )
