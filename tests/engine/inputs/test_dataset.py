"""Decoded pictures are shared by what the files are: an edited, moved or relabelled picture reaches the next run."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdcli.data.folder import RECORD, DecodedPictures, PictureFiles
from msdcli.data.webdataset import TarFiles
from msdcli.engine.inputs import dataset
from msdcli.engine.tracking.events import silent
from msdcli.errors import UserError
from msdcli.recipe import load
from msdcli.rundir import RunDir

LABELS = {f"{k}/{i}.png": k for k in range(2) for i in range(3)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(grey: int) -> bytes:
    """A picture; of all greys it has the same number of bytes."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), grey, np.uint8)).save(file, "PNG", compress_level=0)
    return file.getvalue()


def grey(number: int) -> int:
    return 10 * number + 1


def described(labels: dict[str, int]) -> bytes:
    return json.dumps({"labels": [[name, c] for name, c in labels.items()]}).encode()


def write_folder(path: Path) -> Path:
    for number, name in enumerate(LABELS):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(png(grey(number)))
    return path


def write_zip(path: Path, labels: dict[str, int]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for number, name in enumerate(LABELS):
            file.writestr(name, png(grey(number)))
        file.writestr("dataset.json", described(labels))
    return path


def write_tar(path: Path, labels: dict[str, int]) -> Path:
    with tarfile.open(path, "w") as file:
        for number, (name, label) in enumerate(labels.items()):
            for suffix, content in ((".png", png(grey(number))), (".cls", str(label).encode())):
                info = tarfile.TarInfo(name.replace("/", "-").removesuffix(".png") + suffix)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return path


def rewrite(path: Path, content: bytes) -> None:
    """Overwrite a file with as many bytes and give it the time it had."""
    stat = path.stat()
    assert len(content) == stat.st_size
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def opened(path: Path) -> DecodedPictures:
    """The data as the next run of a recipe finds them."""
    recipe = path.parent / "r.yaml"
    recipe.write_text(
        f"""
name: x
data: {{name: folder, path: {path}}}
teacher: {{network: {{kind: unet, channels: 8, multipliers: [1], blocks: 1}}, training: {{steps: 1}}}}
stages: [{{objective: dm, steps: 1}}]
"""
    )
    run = RunDir(path.parent / "runs" / "x")
    found = dataset.provide(run, load(recipe), silent)
    assert isinstance(found, DecodedPictures)
    return found


def content(data: DecodedPictures) -> list[tuple[str, int]]:
    """Every picture's class by name, and its grey."""
    numbers = range(len(data))
    pixels = data.stored(numbers)[:, 0, 0, 0].tolist()
    return [(data.class_names[c], g) for c, g in zip(data.labels(numbers).tolist(), pixels, strict=True)]


def swap(path: Path) -> None:
    (path / "0").rename(path / "x")
    (path / "1").rename(path / "0")
    (path / "x").rename(path / "1")


def equal_times(path: Path) -> None:
    for file in path.rglob("*.png"):
        os.utime(file, ns=(10**18, 10**18))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda p: (p / "0/1.png").rename(p / "1/9.png"), [("0", 1), ("0", 21), *[("1", g) for g in (31, 41, 51, 11)]]),
        (swap, [*[("0", g) for g in (31, 41, 51)], *[("1", g) for g in (1, 11, 21)]]),
        (lambda p: (p / "1").rename(p / "2"), [*[("0", g) for g in (1, 11, 21)], *[("2", g) for g in (31, 41, 51)]]),
        (
            lambda p: rewrite(p / "0/1.png", png(200)),
            [("0", 1), ("0", 200), ("0", 21), *[("1", g) for g in (31, 41, 51)]],
        ),
        (lambda p: (p / "1/0.png").unlink(), [*[("0", g) for g in (1, 11, 21)], ("1", 41), ("1", 51)]),
        (
            lambda p: (p / "dataset.json").write_bytes(described(LABELS | {"0/0.png": 1})),
            [("1", 1), ("0", 11), ("0", 21), *[("1", g) for g in (31, 41, 51)]],
        ),
    ],
    ids=["moved", "swapped", "renamed", "edited", "removed", "labelled"],
)
def test_a_changed_folder_reaches_the_next_run(
    tmp_path: Path, change: Callable[[Path], object], wanted: list[tuple[str, int]]
) -> None:
    path = write_folder(tmp_path / "pics")
    equal_times(path)
    first = content(opened(path))
    assert first == [*[("0", g) for g in (1, 11, 21)], *[("1", g) for g in (31, 41, 51)]]
    change(path)
    equal_times(path)
    assert content(opened(path)) == wanted


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_corrected_labels_in_a_zip_or_a_shard_reach_the_next_run(
    tmp_path: Path, write: Callable[[Path, dict[str, int]], Path]
) -> None:
    path = write(tmp_path / ("pics.tar" if write is write_tar else "pics.zip"), LABELS)
    assert [name for name, _ in content(opened(path))] == ["0", "0", "0", "1", "1", "1"]
    other = write(tmp_path / f"other{path.suffix}", LABELS | {"0/1.png": 1})
    rewrite(path, other.read_bytes())
    assert [name for name, _ in content(opened(path))] == ["0", "1", "0", "1", "1", "1"]


def test_an_array_of_the_same_size_and_time_is_another(tmp_path: Path) -> None:
    arrays = {"images": np.full((6, 4, 4, 3), 7, np.uint8), "labels": np.arange(6) % 2}
    np.savez(tmp_path / "pics.npz", **arrays)
    assert {g for _, g in content(opened(tmp_path / "pics.npz"))} == {7}
    np.savez(tmp_path / "other.npz", **arrays | {"images": np.full((6, 4, 4, 3), 8, np.uint8)})
    rewrite(tmp_path / "pics.npz", (tmp_path / "other.npz").read_bytes())
    assert {g for _, g in content(opened(tmp_path / "pics.npz"))} == {8}


def test_what_has_not_changed_is_decoded_once(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "pics")
    opened(path)
    opened(path)
    assert len(list((tmp_path / "runs/.shared").glob("data-*"))) == 1
    (path / "dataset.json").write_bytes(described(LABELS | {"0/1.png": 1}))
    opened(path)
    (path / "dataset.json").write_bytes(described(LABELS | {"0/1.png": 1}))  # the same again, at another time
    opened(path)
    assert len(list((tmp_path / "runs/.shared").glob("data-*"))) == 2


def test_pictures_that_change_while_they_are_decoded_are_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, decode = write_folder(tmp_path / "pics"), PictureFiles.decode_all

    def meddled(self: PictureFiles, workers: int) -> object:
        for number, picture in enumerate(decode(self, workers)):
            if number == 2:
                rewrite(path / "0/0.png", png(99))
            yield picture

    monkeypatch.setattr(PictureFiles, "decode_all", meddled)
    with pytest.raises(UserError, match="changed while its pictures were decoded"):
        opened(path)
    assert not list((tmp_path / "runs/.shared").glob(f"data-*/{RECORD}"))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert content(opened(path))[0] == ("0", 99)


def test_a_picture_that_goes_away_meanwhile_is_named(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "pics")
    files = PictureFiles(load(_recipe(path)).data)  # type: ignore[arg-type]
    (path / "1/2.png").unlink()
    with pytest.raises(UserError, match=r"1/2\.png cannot be read"):
        files.fingerprint()


def _recipe(path: Path) -> Path:
    opened(path)
    return path.parent / "r.yaml"


def test_the_index_of_a_shard_that_is_written_to_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msdcli.data import webdataset

    path, index = write_tar(tmp_path / "pics.tar", LABELS), webdataset._index

    def meddled(shard: Path) -> webdataset.Index:
        found = index(shard)
        rewrite(shard, shard.read_bytes())
        return found

    monkeypatch.setattr(webdataset, "_index", meddled)
    TarFiles(path)
    assert not list((tmp_path / "cache/msd/shards").glob("*.json"))
    monkeypatch.setattr(webdataset, "_index", index)
    TarFiles(path)
    assert len(list((tmp_path / "cache/msd/shards").glob("*.json"))) == 1
