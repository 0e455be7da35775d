"""WebDataset shards: read in place by image number, and nothing damaged passes in silence."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msdcli.data import open_data
from msdcli.data.folder import PictureFiles
from msdcli.data.opening import content_hash, open_images
from msdcli.data.webdataset import TarFiles, expand
from msdcli.errors import UserError
from msdcli.recipe.data import FolderSettings
from tests.data.test_folder import encoded, picture, provided


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_shard(path: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as file:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def sample(number: int, label: int | None, suffix: str = "png") -> dict[str, bytes]:
    files = {f"{number:06d}.{suffix}": encoded(picture(number), suffix)}
    if label is not None:
        files[f"{number:06d}.cls"] = b"%d\n" % label
    return files


def test_a_picture_without_a_class_is_of_none(tmp_path: Path) -> None:
    """What is only measured may lack classes: it is no picture of class 0."""
    files: dict[str, bytes] = {}
    for i, label in enumerate((0, 0, 1, 1, None, None)):
        files |= sample(i, label)
    files["000004.cls"] = b"cat"
    make_shard(tmp_path / "s.tar", files)
    assert open_images(tmp_path / "s.tar").labels.tolist() == [0, 0, 1, 1, -1, -1]
    with pytest.raises(UserError, match="no class number"):
        provided(tmp_path, [], path=str(tmp_path / "s.tar"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards of three pictures each: png, webp and jpg, classes 0, 1, 2."""
    for shard in range(2):
        files: dict[str, bytes] = {}
        for i, suffix in enumerate(("png", "webp", "jpg")):
            files |= sample(3 * shard + i, i, suffix)
        files[f"{3 * shard:06d}.txt"] = f"number {3 * shard}\n".encode()
        files[f"{3 * shard + 1:06d}.json"] = json.dumps({"caption": f"json {shard}", "width": 8}).encode()
        make_shard(tmp_path / f"d/shard-{shard:03d}.tar", files, (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[shard])
    return tmp_path / "d"


@pytest.mark.parametrize("path", ["d", "d/shard-{000..001}.tar"])
def test_shards_are_a_data_set(sharded: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(sharded.parent)
    data = provided(sharded.parent, [], path=path)
    assert (len(data), data.shape, data.class_names) == (6, (3, 8, 8), ["0", "1", "2"])
    assert data.labels(range(6)).tolist() == [0, 1, 2, 0, 1, 2]
    for number in (0, 1, 3, 4):  # lossless
        assert torch.equal(data.stored([number])[0], torch.from_numpy(picture(number)).permute(2, 0, 1))
    files = open_data(FolderSettings(path=path))
    assert torch.equal(files.images([5, 0]), data.images([5, 0]))
    assert [files.caption(i) for i in range(5)] == ["number 0", "json 0", None, "number 3", "json 1"]


def test_one_shard_is_images_for_fid_too(sharded: Path) -> None:
    images = open_images(sharded / "shard-001.tar")
    assert [batch.images.shape for batch in images.batches(2, workers=2)] == [(2, 8, 8, 3), (1, 8, 8, 3)]
    before = content_hash(sharded)
    make_shard(sharded / "shard-001.tar", sample(9, 0))
    assert content_hash(sharded) != before


def test_a_changed_shard_is_decoded_again(sharded: Path) -> None:
    assert len(provided(sharded.parent, [], path=str(sharded))) == 6
    make_shard(sharded / "shard-002.tar", sample(9, 1))
    assert len(provided(sharded.parent, [], path=str(sharded))) == 7


def test_a_shard_is_indexed_once(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_data(FolderSettings(path=str(sharded)))
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("the headers were read again"))
    after = open_data(FolderSettings(path=str(sharded)))
    assert torch.equal(after.images(range(6)), before.images(range(6)))
    assert (after.caption(3), after.labels(range(6)).tolist()) == ("number 3", [0, 1, 2, 0, 1, 2])
    for file in (sharded.parent / "cache/msd/shards").iterdir():
        file.write_text('{"names": 1')
    monkeypatch.undo()
    assert len(open_data(FolderSettings(path=str(sharded)))) == 6, "a damaged index is made again"


def test_long_names_and_folders_inside(tmp_path: Path) -> None:
    long = "x" * 120
    files = {f"{long}/a.b.png": encoded(picture(0), "png"), f"{long}/a.cls": b"1", "c.png": encoded(picture(1), "png")}
    make_shard(tmp_path / "a.tar", files | {"c.cls": b"0", "README.md": b"no sample", ".hidden.png": b"no"})
    with pytest.raises(UserError, match="has no picture, only"):
        provided(tmp_path, [], path=str(tmp_path / "a.tar"))  # `a.b.png` is no picture's suffix
    data = provided(tmp_path, [], path=str(tmp_path / "a.tar"), on_bad="skip")
    assert data.labels(range(len(data))).tolist() == [0]


@pytest.mark.parametrize("cut", ["inside a picture", "inside a header", "a broken header", "a broken picture"])
def test_a_damaged_shard_is_refused_or_skipped_by_name(sharded: Path, cut: str) -> None:
    shard = sharded / "shard-000.tar"
    with tarfile.open(shard) as file:
        members = {info.name: info for info in file}
    content = bytearray(shard.read_bytes())
    second = members["000001.webp"]
    if cut == "inside a picture":
        content = content[: second.offset_data + 20]
    elif cut == "inside a header":
        content = content[: second.offset + 100]
    elif cut == "a broken header":
        content[second.offset] ^= 0xFF
    else:
        content[second.offset_data + 30 : second.offset_data + 40] = bytes(10)
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-000\.tar/") as refused:
        provided(sharded.parent, [], path=str(sharded))
    if cut in ("inside a picture", "a broken picture"):
        assert "shard-000.tar/000001.webp" in refused.value.message
    if cut != "a broken picture":
        assert "damaged from byte" in refused.value.message
    said: list[Any] = []
    data = provided(sharded.parent, said, path=str(sharded), on_bad="skip")
    left = 5 if cut == "a broken picture" else 4
    assert (len(data), "skipped" in said[-1], "shard-000.tar/" in said[-1]) == (left, True, True)


def test_what_is_no_shard_is_refused(tmp_path: Path, sharded: Path) -> None:
    (tmp_path / "text.tar").write_text("no tar" * 200)
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as file:
        file.add(sharded / "shard-000.tar", "a.png")
    make_shard(tmp_path / "empty.tar", {"a.md": b"x"})
    make_shard(tmp_path / "mixed.tar", sample(0, 1) | sample(1, None))
    make_shard(tmp_path / "word.tar", sample(0, None) | {"000000.cls": b"cat"})
    make_shard(tmp_path / "none.tar", sample(0, None))
    make_shard(tmp_path / "twice.tar", {"a.png": b"x", "A.PNG": b"y", "a.PNG": b"y"})
    for name, reason in {
        "text.tar": "no tar file",
        "packed.tar.gz": "compressed",
        "empty.tar": "holds no picture",
        "mixed.tar": "000001.png: has no .cls",
        "word.tar": "000000.png: .* no class number",
        "none.tar": "gives no classes",
        "twice.tar": "twice",
        "d/shard-{000..003}.tar": "shard-002.tar, .*shard-003.tar does not exist",
        "absent.tar": "does not exist",
    }.items():
        with pytest.raises(UserError, match=reason):
            provided(tmp_path, [], path=str(tmp_path / name))
    assert provided(tmp_path, [], path=str(tmp_path / "mixed.tar"), on_bad="skip").labels([0]).tolist() == [1]
    assert len(provided(tmp_path, [], path=str(tmp_path / "mixed.tar"), labels=False)) == 2


def test_patterns_are_written_out() -> None:
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{0..1}/b{1..2}") == ["0/b1", "0/b2", "1/b1", "1/b2"]
    assert expand("plain.tar") == ["plain.tar"]
    for wrong, said in (("{3..1}.tar", "ascend"), ("{0..999999}.tar", "the limit is")):
        with pytest.raises(UserError, match=said):
            expand(wrong)


def test_a_plan_does_without_shards_that_are_not_here(tmp_path: Path) -> None:
    settings = FolderSettings(path=str(tmp_path / "s-{0..9}.tar"), size=8, classes=4, count=100)
    assert len(open_data(settings, planning=True)) == 100


def test_folders_of_tools_are_left_out(tmp_path: Path) -> None:
    good = encoded(picture(0), "png")
    files = {"a/0.png": good, "a/0.cls": b"0", "__MACOSX/a/._0.png": b"x", ".hidden/1.png": good, "@eaDir/2.png": good}
    make_shard(tmp_path / "d/s.tar", files)
    (tmp_path / "d/._s.tar").write_bytes(b"a Mac's")
    source = open_images(tmp_path / "d")
    assert isinstance(source, TarFiles) and source.names == ["s.tar/a/0.png"]


def test_classes_and_captions_are_bounded(tmp_path: Path) -> None:
    make_shard(tmp_path / "a.tar", sample(0, 0) | sample(1, 999_999_999) | {"000000.txt": b"x" * (2**20 + 1)})
    with pytest.raises(UserError, match=r"a\.tar/000001\.png has the class 999999999; of 2 pictures"):
        open_data(FolderSettings(path=str(tmp_path / "a.tar")))
    files = open_data(FolderSettings(path=str(tmp_path / "a.tar"), labels=False))
    assert isinstance(files, PictureFiles)
    with pytest.raises(UserError, match=r"caption of a\.tar/000000\.png has 1,048,577 bytes"):
        files.caption(0)


def test_sizes_that_no_shard_has_are_not_believed(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "a.tar", sample(0, 0) | sample(1, 1))
    with tarfile.open(shard) as file:
        member = file.getmember("000001.png")
    for size in (b"\x80" + (2**40).to_bytes(11, "big"), b"\xff" * 12, b"77777777777\0"):
        content = bytearray(shard.read_bytes())
        header = content[member.offset : member.offset + 512]
        header[124:136], header[148:156] = size, b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content[member.offset : member.offset + 512] = header
        (tmp_path / "b.tar").write_bytes(content)
        data = provided(tmp_path, said := [], path=str(tmp_path / "b.tar"), on_bad="skip", labels=False)
        assert len(data) == 1 and "b.tar/" in said[-1]


@settings(max_examples=120, deadline=None)
@given(places=st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=6))
def test_damage_anywhere_is_refused_or_skipped(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    content = bytearray(make_shard(folder / "whole.tar", sample(0, 0) | sample(1, 1)).read_bytes())
    for place, value in places:
        content[place] = value
    (folder / "damaged.tar").write_bytes(content)
    with contextlib.suppress(UserError):
        data = open_data(FolderSettings(path=str(folder / "damaged.tar"), size=8, on_bad="skip"))
        assert isinstance(data, PictureFiles)
        list(data.decode_all(1))
