"""Distances of point clouds where the answer is known."""

import pytest
import torch

from msdcli.metrics.planar import histogram_l1, sliced_wasserstein


def test_histogram_distance_runs_from_equal_to_disjoint() -> None:
    a = torch.rand(1000, 2) - 1.2
    assert histogram_l1(a, a) == 0
    assert histogram_l1(a, a + 1.2) == pytest.approx(2)
    assert histogram_l1(a, torch.cat([a, a + 1.2])) == pytest.approx(1)


def test_sliced_wasserstein_of_a_shift_is_its_length_over_root_two() -> None:
    a = torch.randn(500, 2, dtype=torch.float64)
    shift = torch.tensor([0.3, -0.4], dtype=torch.float64)
    assert sliced_wasserstein(a, a + shift) == pytest.approx(0.5 / 2**0.5, rel=1e-6)
    assert sliced_wasserstein(a, a.repeat(3, 1)) == pytest.approx(0, abs=1e-9)
