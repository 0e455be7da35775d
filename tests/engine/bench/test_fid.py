import numpy as np
import pytest

from msdcli.engine.bench import fid as bench_fid

pytest.importorskip("cleanfid")


def test_both_sides_compute_the_same_distance(tmp_path, monkeypatch):
    """On 64 of the 2048 dimensions, where sqrtm takes no time."""
    monkeypatch.setattr(bench_fid, "DIMENSION", 64)
    rng = np.random.default_rng(0)
    for timing in (bench_fid.network_free(tmp_path, rng, 100, 16), bench_fid.full_rank_distance(rng)):
        assert timing["relative_difference"] < 1e-5
        assert timing["ratio"] == pytest.approx(timing["theirs_s"] / timing["ours_s"])


@pytest.mark.slow
def test_both_sides_see_the_same_network(tmp_path):
    timing = bench_fid.inception_network(tmp_path, np.random.default_rng(0), 2, 16)
    assert timing["relative_difference"] < 1e-5
