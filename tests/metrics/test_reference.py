import codecs
import os
import pickle

import numpy as np
import pytest

from msdcli.errors import UserError
from msdcli.metrics.reference import cleanfid_statistics, is_statistics, read_statistics

MU, SIGMA = np.arange(3.0), np.diag([1.0, 2.0, 3.0])


class Hostile:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def pickled(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def assert_is_the_reference(statistics):
    assert (statistics.mean == MU).all()
    assert (statistics.sigma == SIGMA).all()
    assert statistics.count is None


def test_npz_of_cleanfid_and_edm(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=MU.astype(np.float32), sigma=SIGMA)
    assert is_statistics(tmp_path / "ref.npz")
    assert_is_the_reference(read_statistics(tmp_path / "ref.npz", "clean"))


@pytest.mark.parametrize("protocol", range(6))
def test_pkl_of_edm_in_every_pickle_protocol(tmp_path, protocol):
    path = pickled(tmp_path / "ref.pkl", {"mu": MU, "sigma": np.asfortranarray(SIGMA), "n": np.float64(5)}, protocol)
    assert is_statistics(path)
    assert_is_the_reference(read_statistics(path, "edm"))


def test_pkl_written_under_numpy_1(tmp_path):
    content = pickle.dumps({"mu": MU, "sigma": SIGMA}, protocol=2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in content
    (tmp_path / "old.pkl").write_bytes(content)
    assert_is_the_reference(read_statistics(tmp_path / "old.pkl", "edm"))


def test_pkl_of_edm2_holds_two_networks(tmp_path):
    other = {"mu": MU + 1, "sigma": SIGMA}
    path = pickled(tmp_path / "ref.pkl", {"fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": other})
    assert_is_the_reference(read_statistics(path, "edm"))
    assert (read_statistics(path, "dinov2").mean == MU + 1).all()


@pytest.mark.parametrize(
    "call",
    [(os.mkdir, ("made",)), (eval, ("1",)), (np.load, ("x",)), (codecs.encode, ("print", "rot13")), (bytearray, (3,))],
)
def test_a_pickle_that_names_anything_else_runs_nothing(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    path = pickled(tmp_path / "ref.pkl", {"mu": MU, "sigma": Hostile(*call)})
    with pytest.raises(UserError, match="nothing in it was run"):
        read_statistics(path, "edm")
    assert [entry.name for entry in tmp_path.iterdir()] == ["ref.pkl"]


@pytest.mark.parametrize(
    "content",
    [
        {"mu": MU},
        [MU, SIGMA],
        {"fid": 3},
        {"mu": "words", "sigma": SIGMA},
        {"mu": MU, "sigma": SIGMA[:2]},
        {"mu": MU * np.nan, "sigma": SIGMA},
        {"mu": np.array([None, 1, 2]), "sigma": SIGMA},
    ],
)
def test_other_contents_are_refused(tmp_path, content):
    with pytest.raises(UserError):
        read_statistics(pickled(tmp_path / "ref.pkl", content), "edm")


def test_damaged_files_are_refused(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=MU, sigma=SIGMA)
    for name, content in (("ref.npz", (tmp_path / "ref.npz").read_bytes()), ("ref.pkl", pickle.dumps({"mu": MU}))):
        path = tmp_path / f"cut-{name}"
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match="cut-ref"):
            read_statistics(path, "edm")
    with pytest.raises(UserError, match="absent"):
        read_statistics(tmp_path / "absent.pkl", "edm")


def test_objects_in_an_npz_are_refused(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.array([Hostile(os.mkdir, ("made",))], dtype=object), sigma=SIGMA)
    with pytest.raises(UserError, match=r"ref\.npz"):
        read_statistics(tmp_path / "ref.npz", "edm")


def test_images_are_not_statistics(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((1, 2, 2, 3), np.uint8))
    assert not is_statistics(tmp_path / "images.npz")
    assert not is_statistics(tmp_path)


def test_absent_statistics_of_cleanfid_say_where_they_belong():
    pytest.importorskip("cleanfid")
    with pytest.raises(UserError) as caught:
        cleanfid_statistics("nowhere_clean_train_32")
    assert "stats" in caught.value.hint
