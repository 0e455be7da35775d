"""Float resizing against PIL's own, which clean-fid calls one channel at a time."""

import numpy as np
import pytest
import torch
from PIL import Image

from msdcli.metrics.resize import bicubic_matrix, resize_clean, resize_legacy_pytorch


def by_pil(images, size):
    channels = [Image.fromarray(channel.astype(np.float32)) for image in images for channel in image]
    resized = [np.asarray(channel.resize((size[1], size[0]), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized).clip(0, 255).reshape(*images.shape[:2], *size)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (299, 299), (299, 64), (400, 17), (640, 512), (1, 5)])
def test_clean_is_pil_without_rounding(rng, size):
    images = rng.integers(0, 256, (2, 3, *size), dtype=np.uint8)
    found = resize_clean(torch.from_numpy(images), 299).numpy()
    assert np.abs(found - by_pil(images, (299, 299))).max() < 1.3e-4


def test_clean_takes_any_shape(rng):
    images = rng.integers(0, 256, (1, 3, 50, 70), dtype=np.uint8)
    assert np.abs(resize_clean(torch.from_numpy(images), (24, 31)).numpy() - by_pil(images, (24, 31))).max() < 1.3e-4


@pytest.mark.parametrize("sizes", [(8, 299), (299, 8), (640, 299), (1, 3)])
def test_a_flat_image_stays_flat(sizes):
    assert torch.allclose(bicubic_matrix(*sizes).sum(dim=1), torch.ones(sizes[1], dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("size", [(32, 32), (400, 350), (299, 299)])
def test_legacy_pytorch_is_cleanfids(rng, size):
    resizer = pytest.importorskip("cleanfid.resize").build_resizer("legacy_pytorch")
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    found = resize_legacy_pytorch(torch.from_numpy(image.transpose(2, 0, 1)[None].copy()), 299)
    assert np.abs(found[0].numpy().transpose(1, 2, 0) - resizer(image)).max() < 1e-4
