import codecs
import io
import os
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest

from msdcli.errors import UserError
from msdcli.metrics.reference import (
    check_protocol,
    cleanfid_statistics,
    is_statistics,
    provenance,
    read_statistics,
    takes_statistics,
)

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
    with pytest.raises(UserError, match="protocol edm"):
        read_statistics(path, "clean")
    assert_is_the_reference(read_statistics(path, "legacy-tensorflow"))
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


def opcodes(*parts):
    """A pickle of {"mu": ..., "sigma": ...} from the opcodes of the two values."""
    mu, sigma = parts
    return b"\x80\x04}(X\x02\0\0\0mu" + mu + b"X\x05\0\0\0sigma" + sigma + b"u."


def text(words):
    return b"X" + len(words).to_bytes(4, "little") + words.encode()


def call(module, name, *arguments):
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def whole(number):
    return b"J" + number.to_bytes(4, "little", signed=True)


RAW = b"B" + (32).to_bytes(4, "little") + b"\x41" * 32
OBJECTS = call("numpy", "dtype", text("O8"), b"\x89", b"\x88")
PLAIN = call("numpy", "dtype", text("f8"), b"\x89", b"\x88")
BLANK = call("numpy._core.multiarray", "_reconstruct", b"cnumpy\nndarray\n", whole(0) + b"\x85", b"C\x01b")
LAUGHS = b"](K\1K\1e" + b"".join(b"q" + bytes([k]) + b"0]h" + bytes([k]) + b"ah" + bytes([k]) + b"a" for k in range(60))


def state(shape, dtype):
    return b"(" + whole(1) + b"(" + b"".join(map(whole, shape)) + b"t" + dtype + b"\x89" + RAW + b"tb"


HOSTILE = {
    "objects over raw bytes": BLANK + state([4], OBJECTS),
    "an array called": call("numpy", "ndarray", b"(" + whole(4) + b"t", OBJECTS, RAW),
    "a huge array called": call("numpy", "ndarray", b"(" + whole(2**31 - 1) + b"t"),
    "a shape that its data do not fill": BLANK + state([2**30, 2**30], PLAIN),
    "a negative shape": BLANK + state([-4], PLAIN),
    "a scalar of objects": call("numpy._core.multiarray", "scalar", OBJECTS, b"C\x08" + b"\x41" * 8),
    "lists of lists": LAUGHS,
    "a deep list": b"]" * 3000 + b"a" * 2999,
    "text that is not there": b"\x8d" + (2**40).to_bytes(8, "little") + b"x",
    "a reduced list": b"]" + b"N" + b"R",
    "an array without its state": BLANK,
    "an object": b"cbuiltins\nobject\n)\x81",
    "an instance": b"(i__builtin__\nfile\n",
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_pickles_are_refused_at_once(tmp_path, value):
    (tmp_path / "ref.pkl").write_bytes(opcodes(value, value))
    for protocol in ("clean", "dinov2"):
        with pytest.raises(UserError, match=r"ref\.pkl"):
            read_statistics(tmp_path / "ref.pkl", protocol)


def test_text_is_encoded_once(tmp_path):
    """Protocol 2 spells bytes as text; a file that asks for it again and again is no file of numpy's."""
    encode = b"c_codecs\nencode\nh\1X\x06\0\0\0latin1\x86R"
    value = text("x" * 10_000) + b"q\x010" + b"0".join([encode] * 500)
    (tmp_path / "ref.pkl").write_bytes(opcodes(value, b"N"))
    with pytest.raises(UserError, match="bytes of text"):
        read_statistics(tmp_path / "ref.pkl", "clean")


def test_a_pickle_that_holds_itself(tmp_path):
    (tmp_path / "ref.pkl").write_bytes(b"\x80\x04}q\0(X\x02\0\0\0muh\0X\x05\0\0\0sigmah\0X\x03\0\0\0fidh\0u.")
    with pytest.raises(UserError, match="ref"):
        read_statistics(tmp_path / "ref.pkl", "edm")


def header_lies(path, shape, dtype="<f8"):
    """An npz whose mu claims a shape that it does not have."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, claimed in (("mu", shape), ("sigma", (3, 3))):
            content = io.BytesIO()
            head = {"descr": dtype, "fortran_order": False, "shape": claimed}
            np.lib.format.write_array_header_1_0(content, head)
            file.writestr(f"{name}.npy", content.getvalue() + bytes(72))
    return path


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**20), (-3,), (), (3, 3, 3), (8192,)])
def test_shapes_are_checked_before_anything_is_read(tmp_path, shape):
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"ref\.npz"):
            read_statistics(header_lies(tmp_path / "ref.npz", shape), "clean")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


BROKEN = {
    "not finite": (np.array([0, np.inf, 0]), SIGMA),
    "no square": (MU, SIGMA[:, :2]),
    "another size": (MU, np.eye(4)),
    "not symmetric": (MU, SIGMA + np.triu(np.ones((3, 3)), 1)),
    "negative variances": (MU, -SIGMA),
    "empty": (np.zeros(0), np.zeros((0, 0))),
    "a matrix and a matrix": (SIGMA, SIGMA),
    "integers": (np.arange(3), SIGMA),
    "complex": (MU, SIGMA.astype(complex)),
    "text": (np.array(["a", "b", "c"]), SIGMA),
    "fields": (np.zeros(3, [("a", "f8")]), SIGMA),
}


@pytest.mark.parametrize(("mu", "sigma"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_covariance_is_refused(tmp_path, mu, sigma):
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    for path in (tmp_path / "ref.npz", pickled(tmp_path / "ref.pkl", {"mu": mu, "sigma": sigma})):
        with pytest.raises(UserError, match="ref"):
            read_statistics(path, "clean")


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        ("cifar10_clean_train_32.npz", "clean"),
        ("cifar10_legacy_tensorflow_train_32.npz", "legacy-tensorflow"),
        ("ffhq_legacy_pytorch_trainval_256.npz", "legacy-pytorch"),
        ("mine_clean_clip_vit_b_32_custom_na.npz", "clip"),
        ("clean_room_legacy_tensorflow_custom_na.npz", "legacy-tensorflow"),
        ("imagenet-64x64.npz", "edm"),
        ("VIRTUAL_imagenet64_labeled.npz", "legacy-tensorflow"),
        ("fid_stats_imagenet256_guided_diffusion.npz", "legacy-tensorflow"),
        ("toy-legacy-pytorch.npz", "legacy-pytorch"),
        ("toy.npz", None),
        ("edm-samples-clean.npz", None),
        ("cleanly.npz", None),
    ],
)
def test_names_tell_protocols(tmp_path, name, protocol):
    np.savez(tmp_path / name, mu=MU, sigma=SIGMA)
    known = provenance(tmp_path / name)
    assert protocol == (known and known.protocol)
    for asked in ("clean", "edm", "legacy-tensorflow", "legacy-pytorch", "clip"):
        if protocol is None or asked == protocol or {asked, protocol} == {"edm", "legacy-tensorflow"}:
            assert check_protocol(tmp_path / name, asked) == known
        else:
            with pytest.raises(UserError, match=rf"{protocol}.*protocol {asked}"):
                read_statistics(tmp_path / name, asked)


def test_adms_batches_hold_images_and_statistics(tmp_path):
    images = np.zeros((1, 2, 2, 3), np.uint8)
    np.savez(tmp_path / "batch.npz", arr_0=images, mu=MU, sigma=SIGMA, mu_s=MU, sigma_s=SIGMA)
    assert provenance(tmp_path / "batch.npz").protocol == "legacy-tensorflow"
    assert takes_statistics(tmp_path / "batch.npz", "edm") and not takes_statistics(tmp_path / "batch.npz", "clean")
    assert_is_the_reference(read_statistics(tmp_path / "batch.npz", "edm"))
    np.savez(tmp_path / "moments.npz", mu=MU, sigma=SIGMA, mu_s=MU, sigma_s=SIGMA)
    with pytest.raises(UserError, match="legacy-tensorflow"):
        read_statistics(tmp_path / "moments.npz", "clean")


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
