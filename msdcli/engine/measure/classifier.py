"""The classifier that judges samples: trained on the data with a fixed seed and fixed settings, once per data set."""

from __future__ import annotations

import torch

from msdcli import records
from msdcli.data.base import Dataset, fingerprint
from msdcli.diffusion.draws import Source
from msdcli.engine.checkpoints.model import MODEL, WEIGHTS, is_complete
from msdcli.engine.checkpoints.tensors import load_tensors, load_weights, save_tensors
from msdcli.engine.tracking.events import Report
from msdcli.engine.train.loop import TrainOptions, train
from msdcli.metrics.inception import FeatureNetwork
from msdcli.nets.classifier import Classifier
from msdcli.objectives.classify import Classification
from msdcli.recipe import Recipe
from msdcli.recipe.stages import StageSettings
from msdcli.rundir import RunDir, file_hash, key, link, lock, write_json

# Part of the metric's definition: to change any of it is to make another metric.
TRAINING = StageSettings(objective="classify", steps=400, batch=128, lr=2e-3, ema=0.99)


def provide(run: RunDir, recipe: Recipe, data: Dataset, device: torch.device, report: Report) -> tuple[Classifier, str]:
    """Return the frozen classifier and its weights' hash, after training or reusing it."""
    content = fingerprint(data)
    folder = run.shared / f"classifier-{key('classifier', content, TRAINING.model_dump(mode='json'))}"
    weights = folder / WEIGHTS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(data.shape, len(data.class_names))
    with lock(folder, "the classifier", wait=report):
        if not is_complete(folder):
            source = Source(data, range(len(data.class_names)), device=device)
            objective = Classification(TRAINING, network.to(device).train())
            state = train(
                objective,
                TRAINING,
                source,
                folder,
                key=("classifier",),
                what="classifier",
                options=TrainOptions(keep=1),
                report=report,
            )
            save_tensors(weights, state.ema.net.state_dict())
            write_json(
                folder / MODEL,
                {"classifier": recipe.data.name, "data": content, "sha256": file_hash(weights)},
            )
    tensors, _ = load_tensors(weights)
    load_weights(network, tensors, weights)
    link(folder, run.classifier)
    return network.to(device).requires_grad_(False).eval(), str(
        records.read(folder / MODEL, records.Hashed, "classifier")["sha256"]
    )


def as_network(net: Classifier, sha256: str, device: torch.device) -> FeatureNetwork:
    """The classifier in the place of Inception: it sees floats, and its classes are the data's own."""
    return FeatureNetwork(
        "data", net.features, lambda f: net.head(f).softmax(dim=1), sha256, device=device, floats=True, cpu_batch=500
    )
