"""Pictures of the user's own: what is accepted, what is refused by name, and that a batch is the same bytes."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msdcli.data import open_data
from msdcli.data.base import to_float
from msdcli.data.folder import RECORD, DecodedPictures
from msdcli.diffusion.draws import Draws, Source
from msdcli.engine.inputs import dataset
from msdcli.errors import UserError
from msdcli.recipe import Recipe, load
from msdcli.recipe.data import FolderSettings
from msdcli.rundir import RunDir

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


def picture(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(array: np.ndarray, suffix: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, FORMATS[suffix], **({"lossless": True} if suffix == "webp" else {}))
    return buffer.getvalue()


def make_folder(root: Path, *, per_class: int = 3) -> Path:
    """Classes cat (png), dog (webp), emu (jpg)."""
    for k, (name, suffix) in enumerate(zip(("cat", "dog", "emu"), ("png", "webp", "jpg"), strict=True)):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            (root / name / f"{i}.{suffix}").write_bytes(encoded(picture(10 * k + i), suffix))
    return root


def make_zip(path: Path, labels: Any = (2, 0, 1, 0)) -> Path:
    names = [f"0000{i % 2}/img{i:08d}.png" for i in range(4)]
    with zipfile.ZipFile(path, "w") as file:
        for i, name in enumerate(names):
            file.writestr(name, encoded(picture(i), "png"))
        listed = None if labels is None else [[n, c] for n, c in zip(names, labels, strict=True)]
        file.writestr("dataset.json", json.dumps({"labels": listed}))
    return path


def provided(tmp_path: Path, said: list[Any], **settings: Any) -> DecodedPictures:
    recipe = load_recipe(tmp_path, **settings)
    data = dataset.provide(RunDir(tmp_path / "runs/x"), recipe, said.append)
    assert isinstance(data, DecodedPictures)
    return data


def load_recipe(tmp_path: Path, **settings: Any) -> Recipe:
    (tmp_path / "x.yaml").write_text(
        json.dumps({"data": {"name": "folder"} | settings, "stages": [{"objective": "dm"}]})
    )
    return load(tmp_path / "x.yaml")


def test_a_folder_of_classes(tmp_path: Path) -> None:
    said: list[Any] = []
    path = make_folder(tmp_path / "d")
    data = provided(tmp_path, said, path=str(path))
    assert (len(data), data.shape, data.class_names) == (9, (3, 8, 8), ["cat", "dog", "emu"])
    assert data.labels(range(9)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert torch.equal(data.stored([4])[0], torch.from_numpy(picture(11)).permute(2, 0, 1))
    assert any("images decoded at" in str(line) for line in said)
    files = open_data(FolderSettings(path=str(path)))
    assert torch.equal(files.images(range(9)), data.images(range(9)))
    provided(tmp_path, said := [], path=str(path))
    assert not said, "the second run decodes nothing"


def test_a_changed_folder_is_decoded_again(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "d")
    provided(tmp_path, [], path=str(path))
    (path / "cat/9.png").write_bytes(encoded(picture(99), "png"))
    assert len(provided(tmp_path, [], path=str(path))) == 10


def test_what_a_killed_decoding_left_is_swept_and_done_again(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "d")
    whole = provided(tmp_path, [], path=str(path))
    folder = next((tmp_path / "runs/.shared").glob("data-*"))
    (folder / RECORD).unlink()  # it comes last
    (folder / ".pixels.bin.x1.tmp").write_bytes(b"half")
    assert torch.equal(provided(tmp_path, [], path=str(path)).images(range(9)), whole.images(range(9)))
    assert not list(folder.glob("*.tmp"))


def test_edms_zip_and_folder(tmp_path: Path) -> None:
    data = provided(tmp_path, [], path=str(make_zip(tmp_path / "a.zip")))
    # Sorted by name: images 0, 2 of folder 00000, then 1, 3.
    assert (data.labels(range(4)).tolist(), data.class_names) == ([2, 1, 0, 0], ["0", "1", "2"])
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        file.extractall(tmp_path / "a")
    unpacked = provided(tmp_path, [], path=str(tmp_path / "a"))
    assert torch.equal(unpacked.images(range(4)), data.images(range(4)))
    assert torch.equal(unpacked.labels(range(4)), data.labels(range(4)))


def test_unlabelled_data_are_one_class_only_on_request(tmp_path: Path) -> None:
    path = str(make_zip(tmp_path / "a.zip", labels=None))
    with pytest.raises(UserError, match="gives no classes"):
        open_data(FolderSettings(path=path))
    assert open_data(FolderSettings(path=path, labels=False)).class_names == ["all"]


def test_an_npz_of_arrays(tmp_path: Path) -> None:
    images = np.stack([picture(i) for i in range(5)])
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1, 1, 0, 1]))
    data = provided(tmp_path, [], path=str(tmp_path / "a.npz"), count=5, classes=2)
    assert torch.equal(data.stored(range(5)), torch.from_numpy(images).permute(0, 3, 1, 2))
    assert data.labels([1, 3]).tolist() == [1, 0]


def test_grey_pictures_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "d/a").mkdir(parents=True)
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(grey).save(tmp_path / "d/a/0.png")
    data = provided(tmp_path, [], path=str(tmp_path / "d"), channels=1)
    assert data.stored([0])[0, 0].tolist() == grey.tolist()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    path = make_folder(tmp_path / "d")
    (path / "cat/1.png").write_bytes(b"\x89PNG\r\n\x1a\n no")
    (path / "dog/0.webp").write_bytes(encoded(picture(1, 8, 12), "webp"))
    (path / "emu/2.jpg").write_bytes(encoded(picture(2, 16, 16), "jpg"))
    return path


def test_bad_pictures_are_refused_by_name(tmp_path: Path, mixed: Path) -> None:
    with pytest.raises(UserError) as refusal:
        provided(tmp_path, [], path=str(mixed))
    lines = refusal.value.message.splitlines()
    assert "3 of 9 pictures cannot be used" in lines[0]
    assert lines[1].startswith("  cat/1.png: ")
    assert lines[2:] == ["  dog/0.webp: is 12x8, not square", "  emu/2.jpg: is 16x16, not 8x8"]
    assert not list((tmp_path / "runs").rglob(RECORD)) and not list((tmp_path / "runs").rglob("*.bin"))


def test_many_bad_pictures_are_listed_by_cause(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "d")
    for i in range(14):
        (path / f"cat/w{i:02d}.png").write_bytes(encoded(picture(i, 8, 9 + i), "png"))
        (path / f"dog/d{i:02d}.png").write_bytes(encoded(picture(i), "png")[: 60 + 9 * i])
    (path / "emu/t.png").write_text("text")
    (path / "emu/l.png").write_bytes(encoded(picture(0, 16, 16), "png"))
    with pytest.raises(UserError) as refusal:
        provided(tmp_path, [], path=str(path))
    lines = refusal.value.message.splitlines()
    assert lines[0].endswith("30 of 39 pictures cannot be used")
    assert "  14: is not square: cat/w00.png, cat/w01.png, cat/w02.png, cat/w03.png, cat/w04.png, ..." in lines
    assert "  1: is 16x16, not 8x8: emu/l.png" in lines
    assert sum(int(line.split(":")[0]) for line in lines[1:]) == 30 and len(lines) <= 8
    assert "the first picture's" in str(refusal.value.hint)


def test_classes_without_pictures_are_named_at_the_start(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.stack([picture(i) for i in range(4)]), labels=np.array([1, 4, 1, 4]))
    provided(tmp_path, said := [], path=str(tmp_path / "a.npz"))
    assert said[-1] == "data: 3 of 5 classes have no picture: 0, 2, 3"


def test_bad_pictures_are_skipped_by_name(tmp_path: Path, mixed: Path) -> None:
    said: list[Any] = []
    data = provided(tmp_path, said, path=str(mixed), on_bad="skip")
    assert (len(data), data.labels(range(6)).tolist()) == (6, [0, 0, 1, 1, 2, 2])
    assert "3 pictures were skipped: cat/1.png, dog/0.webp, emu/2.jpg" in said[-1]
    assert torch.equal(data.stored([1])[0], torch.from_numpy(picture(2)).permute(2, 0, 1))


def test_what_is_no_file_is_skipped_by_name_and_decoded_once(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "d")
    os.mkfifo(path / "cat/pipe.png")
    (path / "cat/zero.png").symlink_to("/dev/zero")
    (path / "cat/gone.png").symlink_to("nowhere")
    with open(os.fsencode(path) + b"/dog/\xff.png", "wb") as file:
        file.write(b"no picture")
    data = provided(tmp_path, said := [], path=str(path), on_bad="skip")
    assert len(data) == 9 and "4 pictures were skipped: cat/gone.png, cat/pipe.png, cat/zero.png, dog/" in said[-1]
    provided(tmp_path, said := [], path=str(path), on_bad="skip")
    assert not said


def test_crop_and_resize_are_done_when_stated(tmp_path: Path, mixed: Path) -> None:
    (mixed / "cat/1.png").unlink()
    data = provided(tmp_path, [], path=str(mixed), crop=True, resize="box")
    assert len(data) == 8
    assert torch.equal(data.stored([2])[0], torch.from_numpy(picture(1, 8, 12)[:, 2:10]).permute(2, 0, 1))
    assert provided(tmp_path, [], path=str(mixed), crop=True, resize="lanczos", size=4).shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"path": "nowhere"}, "does not exist"),
        ({"count": 10}, "holds 9 pictures, the recipe expects 10"),
        ({"classes": 4}, "holds 3 classes, the recipe expects 4"),
    ],
)
def test_data_that_are_not_what_was_expected_are_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    make_folder(tmp_path / "d")
    with pytest.raises(UserError, match=said):
        open_data(FolderSettings(**{"path": str(tmp_path / "d")} | settings))


def test_batches_from_the_mapped_file_are_those_of_memory(tmp_path: Path) -> None:
    data = provided(tmp_path, [], path=str(make_folder(tmp_path / "d")))

    class InMemory:
        shape, class_names = data.shape, data.class_names
        labels, images = data.labels, data.images

        def __len__(self) -> int:
            return len(data)

    for key in range(4):
        mapped = Draws(Source(data, [0, 2]), 5, (key,), 0).real()
        held = Draws(Source(InMemory(), [0, 2]), 5, (key,), 0).real()
        assert all(torch.equal(a, b) for a, b in zip(mapped, held, strict=True))


def test_pixels_become_floats_as_edm_does() -> None:
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
    assert torch.equal(to_float(torch.tensor([0.3])), torch.tensor([0.3]))
