"""How fast `msd fid` is beside clean-fid and scipy, on one core of this machine and in one run.

Pictures and weights are random, of the published sizes. The parts are timed apart, since a random Inception of the full
architecture over thousands of images would take most of an hour: `whole` is their sum at 2 x `num_images`.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from msdcli.metrics.evaluate import collect
from msdcli.metrics.frechet import frechet_distance
from msdcli.metrics.inception import INCEPTION_SIZE, TORCHSCRIPT, FeatureNetwork, open_network
from msdcli.metrics.moments import Gaussian
from msdcli.metrics.resize import resize_clean

DIMENSION = 2048
Timing = dict[str, float]


def bench_fid(
    *, num_images: int = 1000, size: int = 64, num_network_images: int = 32, seed: int = 0
) -> dict[str, Timing]:
    """Seconds of both sides and their ratio for each part; takes about two minutes and clean-fid."""
    rng = np.random.default_rng(seed)
    with _one_core(), tempfile.TemporaryDirectory() as folder:
        free = network_free(Path(folder), rng, num_images, size)
        distance = full_rank_distance(rng)
        network = inception_network(Path(folder), rng, num_network_images, size)
    scale = 2 * num_images / num_network_images
    whole = _timing(*(free[side] + scale * network[side] for side in ("ours_s", "theirs_s")))
    return {"network_free": free, "distance": distance, "network": network, "whole": whole}


def network_free(folder: Path, rng: np.random.Generator, num_images: int, size: int) -> Timing:
    """Reading, resizing, statistics and distance of two folders of PNGs; the network picks 2048 pixels."""
    from cleanfid import fid

    for name in ("a", "b"):
        (folder / name).mkdir()
        for i in range(num_images):
            Image.fromarray(_picture(rng, size)).save(folder / name / f"{i:05}.png")
    network = FeatureNetwork("pixels", lambda images: _pixels(resize_clean(images, INCEPTION_SIZE)))

    def ours() -> float:
        a, b = (collect(folder / name, network).moments.whole() for name in ("a", "b"))
        return frechet_distance(a, b)

    def theirs() -> float:
        options: dict[str, Any] = {"num_workers": 0, "device": "cpu", "mode": "clean", "verbose": False}
        features = [fid.get_folder_features(str(folder / name), _pixels, **options) for name in ("a", "b")]
        means = [np.asarray(np.mean(x, axis=0, dtype=np.float64)) for x in features]
        a, b = (Gaussian(mean, np.atleast_2d(np.cov(x, rowvar=False))) for mean, x in zip(means, features, strict=True))
        return by_sqrtm(a, b)

    return _compare(ours, theirs)


def full_rank_distance(rng: np.random.Generator) -> Timing:
    """The distance alone, at full rank and 2048 dimensions."""
    mixing = rng.standard_normal((DIMENSION, DIMENSION)) / DIMENSION**0.5
    sides = []
    for scale in (1.0, 1.1):
        x = np.maximum(rng.standard_normal((2 * DIMENSION, DIMENSION)) @ mixing * scale, 0)
        sides.append(Gaussian(x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False))))
    return _compare(lambda: frechet_distance(*sides), lambda: by_sqrtm(*sides), repeats=2)


def inception_network(folder: Path, rng: np.random.Generator, num_images: int, size: int) -> Timing:
    """Resized pictures through the full architecture, loaded from one file by either; compilation is not counted."""
    from cleanfid.inception_torchscript import InceptionV3W

    save_inception(folder / TORCHSCRIPT)
    batch = torch.from_numpy(np.stack([_picture(rng, size) for _ in range(num_images)])).permute(0, 3, 1, 2)
    network = open_network("clean", weights=folder / TORCHSCRIPT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = InceptionV3W(str(folder), download=False)
    resized = resize_clean(batch, INCEPTION_SIZE)

    def ours() -> float:
        return float(collect(batch.split(8), network).moments.whole().mean.sum())

    def theirs() -> float:
        with torch.no_grad():
            return float(np.concatenate([model(part).numpy() for part in resized.split(32)]).mean(axis=0).sum())

    ours(), theirs()
    return _compare(ours, theirs)


def by_sqrtm(a: Gaussian, b: Gaussian) -> float:
    """The distance as FID tools compute it, without the argument of sqrtm that scipy 1.18 took away."""
    from scipy.linalg import sqrtm

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it speaks of singular matrices
        warnings.simplefilter("ignore")
        trace = np.trace(sqrtm(a.sigma @ b.sigma)).real
    return float(np.square(a.mean - b.mean).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * trace)


class _Inception(nn.Module):
    """torchvision's Inception behind the call interface of the published TorchScript file."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = F.interpolate(img.float(), size=[299, 299], mode="bilinear", align_corners=False)
        return self.layers((x - 128) / 128)  # type: ignore[no-any-return]


def save_inception(path: Path) -> None:
    from torchvision.models import inception_v3

    net = inception_v3(weights=None, aux_logits=False, init_weights=False).eval()
    net.fc = nn.Identity()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and is what clean-fid reads
        layers = torch.jit.trace(net, torch.zeros(2, 3, INCEPTION_SIZE, INCEPTION_SIZE))
        torch.jit.script(_Inception(layers).eval()).save(str(path))


def _picture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A smooth random picture: noise would be slow to decode, and no one's data."""
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def _pixels(resized: torch.Tensor) -> torch.Tensor:
    return resized[:, :, ::11, ::11].flatten(1)[:, :DIMENSION]


def _compare(ours: Callable[[], float], theirs: Callable[[], float], *, repeats: int = 1) -> Timing:
    mine, seconds = _best(ours, repeats)
    other, their_seconds = _best(theirs, repeats)
    return _timing(seconds, their_seconds) | {"relative_difference": abs(mine / other - 1)}


def _best(run: Callable[[], float], repeats: int) -> tuple[float, float]:
    """The value, and the seconds of the fastest of `repeats` runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        value = run()
        seconds.append(time.perf_counter() - start)
    return value, min(seconds)


def _timing(ours: float, theirs: float) -> Timing:
    return {"ours_s": ours, "theirs_s": theirs, "ratio": theirs / ours}


@contextlib.contextmanager
def _one_core() -> Iterator[Any]:
    """Hold torch and every BLAS to one thread, whatever the machine has."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)
