"""Zips and npz of other people: odd ones are read, and what is encrypted, damaged or endless is refused by name."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msdcli.data import open_data
from msdcli.data.files.archive import Archive
from msdcli.data.folder import PictureFiles
from msdcli.data.images import ImageArray, ImageFiles
from msdcli.data.opening import open_images
from msdcli.errors import UserError
from msdcli.recipe.data import FolderSettings
from tests.data.test_folder import encoded, picture, provided

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def make(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def pngs(*names: str) -> dict[str, bytes]:
    return {name: encoded(picture(i), "png") for i, name in enumerate(names)}


def classes(path: Path) -> tuple[list[str], list[int]]:
    data = open_data(FolderSettings(path=str(path)))
    return data.class_names, data.labels(range(len(data))).tolist()


def labelled(**classes: int) -> bytes:
    return json.dumps({"labels": [[f"{name}.png", number] for name, number in classes.items()]}).encode()


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("cat/0.png", "dog/1.png"), ["cat", "dog"]),
        (("pics/cat/0.png", "pics/dog/1.png"), ["cat", "dog"]),
        (("a/b/c/cat/0.png", "a/b/c/dog/1.png"), ["cat", "dog"]),
        (("./pics/cat/0.png", "./pics/dog/1.png"), ["cat", "dog"]),
        (("pics\\cat\\0.png", "pics\\dog\\1.png"), ["cat", "dog"]),
        (("cat\\0.png", "dog\\deep\\1.png"), ["cat", "dog"]),
        (("pics/cat/0.png", "__MACOSX/pics/cat/._0.png", "pics/dog/1.png", "pics/.x/1.png"), ["cat", "dog"]),
        (("cat/0.png", "cat/1.png"), ["cat"]),
    ],
)
def test_the_classes_are_inside_the_folder_that_a_zip_was_made_of(
    tmp_path: Path, names: tuple[str, ...], wanted: list[str]
) -> None:
    path = make(tmp_path / "a.zip", pngs(*names))
    assert classes(path)[0] == wanted
    assert (open_images(path).picture(0) == picture(0)).all()


def test_edms_labels_are_found_inside_that_folder_too(tmp_path: Path) -> None:
    files = pngs("pics/00/a.png", "pics/00/b.png")
    for listed in ({"00/a": 1, "00/b": 0}, {"pics/00/a": 1, "pics/00/b": 0}, {"00\\a": 1, "00\\b": 0}):
        for place in ("pics/dataset.json", "pics\\dataset.json"):
            path = make(tmp_path / "a.zip", files | {place: labelled(**listed)})
            assert classes(path) == (["0", "1"], [1, 0])


def test_every_way_of_packing_is_read(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        source = open_images(make(tmp_path / "a.zip", pngs("cat/0.png", "dog/1.png"), method))
        assert (np.concatenate([b.images for b in source.batches(2)])[1] == picture(1)).all()


def central(content: bytes, offset: int, value: int) -> bytes:
    """Change two bytes of every entry in a zip's directory, and in front of every member."""
    found = bytearray(content)
    for begin, shift in ((b"PK\1\2", 2), (b"PK\3\4", 0)):
        at = -1
        while (at := content.find(begin, at + 1)) >= 0:
            struct.pack_into("<H", found, at + offset + shift, value)
    return bytes(found)


@pytest.mark.parametrize(
    ("offset", "value", "said"),
    [(6, 1, "is encrypted"), (8, 93, "method 93"), (8, 9, "method 9 "), (8, 97, "method 97")],
)
def test_what_cannot_be_unpacked_is_refused_as_a_whole(tmp_path: Path, offset: int, value: int, said: str) -> None:
    path = make(tmp_path / "a.zip", pngs("cat/0.png", "dog/1.png"))
    path.write_bytes(central(path.read_bytes(), offset, value))
    for on_bad in ("refuse", "skip"):
        with pytest.raises(UserError, match=rf"a\.zip: cat/0\.png .*{said}"):
            open_data(FolderSettings(path=str(path), on_bad=on_bad))


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a.zip", pngs("cat/0.png", "cat\\0.png"))
    with pytest.raises(UserError, match=r"a\.zip holds cat/0\.png twice"):
        open_images(path)
    with zipfile.ZipFile(make(path, pngs("0.png") | {"dataset.json": b"{}"}), "a") as file:
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("dataset.json", labelled(**{"0": 1}))
    with pytest.raises(UserError, match=r"dataset\.json twice"):
        open_images(path)


def test_a_member_that_grows_without_end_is_not_unpacked(tmp_path: Path) -> None:
    path = make(tmp_path / "a.zip", pngs("cat/0.png", "dog/1.png"))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file, file.open("dog/bomb.png", "w") as member:
        for _ in range(80):
            member.write(bytes(2**20))
    tracemalloc.start()
    source = open_images(path)
    assert isinstance(source, ImageFiles)
    with pytest.raises(UserError, match=r"a\.zip: dog/bomb\.png is .*bytes, packed in .*not unpacked"):
        source.content(2)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()
    data = provided(tmp_path, said := [], path=str(path), on_bad="skip")
    assert len(data) == 2 and "dog/bomb.png" in said[-1]


def test_a_dataset_json_is_bounded_by_its_pictures(tmp_path: Path) -> None:
    files = pngs("cat/0.png") | {"dataset.json": b" " * (2**24 + 2000)}
    with pytest.raises(UserError, match=r"dataset\.json has 16,779,216 bytes, the limit is"):
        open_images(make(tmp_path / "a.zip", files))
    (tmp_path / "d").mkdir()
    for name in ("0.png", "dataset.json"):
        (tmp_path / "d" / name).write_bytes(files.get(f"cat/{name}", files["dataset.json"]))
    with pytest.raises(UserError, match=r"dataset\.json has 16,779,216 bytes, the limit is"):
        open_images(tmp_path / "d")


@pytest.mark.parametrize("name", ["a.zip", "a.npz", "a.tar", "d/0.png"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / name).write_bytes(POINTER)
    path = tmp_path / name.split("/")[0]
    with pytest.raises(UserError, match="pointer of git-lfs") as refused:
        next(iter(open_images(path).batches(1)))
    assert "git lfs pull" in str(refused.value.hint)


# Arrays.


def npy(array: Any, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), version=version)
    return buffer.getvalue()


IMAGES = np.stack([picture(i) for i in range(4)])


def header(text: str) -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode("latin1")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_an_array_is_read(tmp_path: Path, version: tuple[int, int]) -> None:
    files = {"images.npy": npy(IMAGES, version), "labels.npy": npy(np.array([0, 1, 1, 0], ">u2"), version)}
    source = open_images(make(tmp_path / "a.npz", files))
    assert isinstance(source, ImageArray) and source.labels is not None
    assert (next(iter(source.batches(4))).images == IMAGES).all() and source.labels.tolist() == [0, 1, 1, 0]


def test_an_order_that_makes_no_difference_is_read(tmp_path: Path) -> None:
    one = header("{'descr': '|u1', 'fortran_order': True, 'shape': (1, 1, 1, 3), }") + b"\1\2\3"
    source = open_images(make(tmp_path / "a.npz", {"images.npy": one}))
    assert next(iter(source.batches(1))).images.tolist() == [[[[1, 2, 3]]]]


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (npy(np.asfortranarray(IMAGES)), "Fortran's order"),
        (npy(IMAGES)[:-1], "ends before image 4"),
        (npy(IMAGES)[:9], "damaged header"),
        (b"no array at all", "damaged header"),
        (b"\x93NUMPY\x09\0" + npy(IMAGES)[8:], "version 9.0"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (4, 8, 8, 3), }"), "Python's objects"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (-4, 8, 8, 3), }"), "damaged header"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (10**30, 8, 8, 3), }"), "damaged header"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 8, 8, 3), }"), "ends before image 1"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (True, 8, 8, 3), }"), "damaged header"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 0, 8, 3), }"), "holds no image"),
        (header("{'descr': 'u1" + "," * 20_000 + "'}"), "damaged header"),
        (header("(" * 5000), "damaged header"),
        (header("__import__('os').system('true')"), "damaged header"),
    ],
)
def test_arrays_that_are_no_images(tmp_path: Path, images: bytes, said: str) -> None:
    path = make(tmp_path / "a.npz", {"images.npy": images})
    with pytest.raises(UserError, match=rf"a\.npz.*{said}"):
        open_images(path)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.array([0, 1, 2, None]), "Python's objects"),
        (np.array([0.0, 1, 2, 3]), "float64"),
        (np.array([True] * 4), "bool"),
        (np.eye(4, dtype=np.int64), r"\[4, 4\]"),
        (np.array([0, 1, 2]), r"\[3\]"),
        (np.array([0, 1, 2, 2**63], np.uint64), "class 9223372036854775808"),
        (np.array(["0", "1", "2", "3"]), "<U1"),
    ],
)
def test_labels_that_are_no_classes(tmp_path: Path, labels: np.ndarray, said: str) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=IMAGES, labels=labels)
    with pytest.raises(UserError, match=rf"a\.npz.*labels.*{said}"):
        open_images(path)


def test_labels_that_are_no_classes_of_so_few_pictures(tmp_path: Path) -> None:
    for labels, said in (([0, 1, 10**9, 1], "image 2 has the class 1000000000"), ([0, -5, 1, 1], "negative")):
        np.savez(tmp_path / "a.npz", images=IMAGES, labels=np.array(labels))
        with pytest.raises(UserError, match=said):
            open_data(FolderSettings(path=str(tmp_path / "a.npz")))
        assert len(open_data(FolderSettings(path=str(tmp_path / "a.npz"), labels=False))) == 4


def test_a_wrong_checksum_is_the_files(tmp_path: Path) -> None:
    path = make(tmp_path / "a.npz", {"images.npy": npy(IMAGES)}, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[400] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz: images\.npy cannot be read: Bad CRC"):
        list(open_images(path).batches(3))


# Damage of any kind.


def everything(path: Path) -> None:
    """Open a file as data and read all of it: right or refused, and nothing else."""
    with contextlib.suppress(UserError):
        data = open_data(FolderSettings(path=str(path), size=8, on_bad="skip"))
        assert isinstance(data, PictureFiles) and len(data.class_names) <= 100_000
        list(data.decode_all(1))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("originals")
    files = pngs("a/0.png", "b/1.png") | {"dataset.json": labelled(**{"a/0": 0, "b/1": 1})}
    packed = {f"{m}.zip": make(folder / "a.zip", files, m).read_bytes() for m in (0, 8, 12, 14)}
    arrays = {"images.npy": npy(IMAGES), "labels.npy": npy([0, 1, 0, 1])}
    return packed | {f"{m}.npz": make(folder / "a.npz", arrays, m).read_bytes() for m in (0, 8)}


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["0.zip", "8.zip", "12.zip", "14.zip", "0.npz", "8.npz"]),
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    share=st.sampled_from([1.0, 1.0, 1.0, 0.99, 0.7]),
)
@pytest.mark.filterwarnings("ignore")
def test_damage_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
    originals: dict[str, bytes],
    kind: str,
    places: list[tuple[float, int]],
    share: float,
) -> None:
    content = bytearray(originals[kind])
    for place, value in places:
        content[int(place * (len(content) - 1))] = value
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind[-3:]}"
    path.write_bytes(content[: int(share * len(content))])
    everything(path)


@settings(max_examples=150, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.builds(
            "{{'descr': {!r}, 'fortran_order': {!r}, 'shape': {!r}, }}".format,
            st.sampled_from(["|u1", "<i8", "|O", "|V3", "<f4", "x", "", "<U4", [("a", "<i4")]]),
            st.sampled_from([False, True, 0, None]),
            st.lists(st.integers(-2, 2**65) | st.booleans(), max_size=5).map(tuple) | st.just((2, 2, 2, 3)),
        ),
    ),
    member=st.sampled_from(["images.npy", "labels.npy"]),
)
@pytest.mark.filterwarnings("ignore")
def test_headers_of_any_kind_are_refused(tmp_path_factory: pytest.TempPathFactory, text: str, member: str) -> None:
    files = {"images.npy": npy(IMAGES)} | {
        member: header(text.encode("latin1", "replace").decode("latin1")) + bytes(64)
    }
    everything(make(tmp_path_factory.getbasetemp() / "header.npz", files))


@settings(max_examples=60, deadline=None)
@given(names=st.lists(st.text(min_size=1, max_size=8).map(lambda s: s + ".png"), min_size=1, max_size=4, unique=True))
@pytest.mark.filterwarnings("ignore")
def test_names_of_any_kind_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "names.zip"
    with contextlib.suppress(UnicodeEncodeError, IndexError):  # zipfile writes neither half characters nor no name
        everything(make(path, pngs(*names)))


def test_the_reader_closes(tmp_path: Path) -> None:
    archive = Archive(make(tmp_path / "a.zip", pngs("cat/0.png")))
    archive.close()
    with pytest.raises(UserError, match="cannot be read"):
        archive.read("cat/0.png")
