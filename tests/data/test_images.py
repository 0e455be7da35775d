"""Reading images for metrics: every oddity gives the right pixels or a refusal that names the file."""

import io
import json
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from msdcli.data.images import ImageArray, decode, to_uint8
from msdcli.data.opening import content_hash, open_images
from msdcli.errors import UserError


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pixels(rng, *shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def png16(channels):
    """A PNG of 16 bits per channel, which PIL can read but not write in colour."""
    chunk = lambda kind, data: (  # noqa: E731
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    header = struct.pack(">IIBBBBB", 2, 2, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + b"\x12\x34" * 2 * channels for _ in range(2))
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def everything(path, **options):
    return np.concatenate([batch.images for batch in open_images(path).batches(4, **options)])


@pytest.fixture
def folder(rng, tmp_path):
    """Ten pictures in nested folders, and what does not count."""
    root = tmp_path / "folder"
    for i in range(10):
        place = root / f"{i // 5}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(pixels(rng, 6, 5, 3)))
    (root / "notes.txt").write_text("not an image")
    (root / "1" / "._5.png").write_bytes(b"macOS's metadata")
    return root


@pytest.fixture
def archive(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        for path in sorted(folder.rglob("*"), reverse=True):
            file.write(path, path.relative_to(folder))
    return tmp_path / "images.zip"


class TestSources:
    def test_folder_zip_and_npz_agree(self, folder, archive, tmp_path):
        images = everything(folder)
        np.savez(tmp_path / "plain.npz", arr_0=images)
        np.savez_compressed(tmp_path / "packed.npz", images=images)
        assert images.shape == (10, 6, 5, 3)
        for path in (archive, tmp_path / "plain.npz", tmp_path / "packed.npz"):
            assert (everything(path) == images).all()
            assert len(open_images(path)) == 10

    @pytest.mark.parametrize("batch_size", [1, 3, 10, 99])
    @pytest.mark.parametrize("workers", [1, 3])
    def test_batches_and_workers_change_nothing(self, archive, batch_size, workers):
        batches = list(open_images(archive).batches(batch_size, workers=workers))
        assert np.concatenate([batch.numbers for batch in batches]).tolist() == list(range(10))
        assert (np.concatenate([batch.images for batch in batches]) == everything(archive)).all()

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_some_by_number(self, archive, tmp_path, save):
        save(tmp_path / "a.npz", arr_0=everything(archive))
        for numbers in ([0, 1, 2], [9], [0, 3, 4, 5, 9], range(10)):
            for path in (archive, tmp_path / "a.npz"):
                assert (everything(path, numbers=numbers) == everything(path)[list(numbers)]).all()
                batches = list(open_images(path).batches(2, numbers=numbers))
                assert np.concatenate([batch.numbers for batch in batches]).tolist() == list(numbers)
                shares = [list(open_images(path).batches(2, numbers=numbers, share=(i, 2))) for i in range(2)]
                assert sorted(n for part in shares for batch in part for n in batch.numbers) == list(numbers)

    def test_labels_of_edms_data_sets_follow_the_names(self, archive, folder):
        names = open_images(archive).names
        labels = [[name, 9 - i] for i, name in enumerate(names)]
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr("dataset.json", json.dumps({"labels": labels[::-1]}))
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
        assert open_images(archive).labels.tolist() == open_images(folder).labels.tolist() == list(range(9, -1, -1))

    def test_labels_of_an_npz(self, tmp_path, rng):
        np.savez(tmp_path / "a.npz", arr_0=pixels(rng, 4, 2, 2, 3), arr_1=np.array([3, 1, 2, 0]))
        assert open_images(tmp_path / "a.npz").labels.tolist() == [3, 1, 2, 0]

    def test_an_npz_is_streamed(self, tmp_path, rng, monkeypatch):
        np.savez(tmp_path / "a.npz", arr_0=pixels(rng, 50, 4, 4, 3))
        sizes = []
        read = zipfile.ZipExtFile.read
        monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda file, n=-1: (sizes.append(n), read(file, n))[1])
        assert sum(len(batch.images) for batch in open_images(tmp_path / "a.npz").batches(5)) == 50
        assert 0 < max(sizes) <= 5 * 4 * 4 * 3
        assert min(sizes) >= 0  # -1 would be the whole file

    def test_grey_arrays_are_repeated(self, tmp_path, rng):
        grey = pixels(rng, 4, 3, 3, 1)
        np.savez(tmp_path / "grey.npz", arr_0=grey)
        assert (everything(tmp_path / "grey.npz") == grey.repeat(3, axis=3)).all()

    def test_the_content_hash_follows_the_images(self, folder, archive):
        first = content_hash(folder)
        (folder / "notes.txt").write_text("changed")
        assert content_hash(folder) == first
        (folder / "0" / "0.png").write_bytes((folder / "0" / "1.png").read_bytes())
        assert content_hash(folder) != first
        assert content_hash(archive) != first


class TestOddities:
    def test_grey_palette_alpha_and_bits(self, rng):
        colour, grey = pixels(rng, 6, 6, 3), pixels(rng, 6, 6)
        assert (decode(encoded(grey), "x") == grey[:, :, None].repeat(3, axis=2)).all()
        palette = Image.fromarray(colour).quantize(8)
        assert (decode(encoded(palette), "x") == np.asarray(palette.convert("RGB"))).all()
        alpha = np.dstack([colour, pixels(rng, 6, 6)])
        assert (decode(encoded(alpha), "x") == colour).all()
        bits = Image.fromarray(grey > 128)
        assert (decode(encoded(bits), "x") == np.where(grey > 128, 255, 0)[:, :, None]).all()

    def test_a_transparent_palette_keeps_its_colours_without_a_warning(self, rng):
        palette = Image.fromarray(pixels(rng, 6, 6, 3)).quantize(8)
        content = encoded(palette, transparency=bytes(range(8)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert (decode(content, "x") == np.asarray(palette.convert("RGB"))).all()

    def test_cmyk_jpeg_is_what_pil_and_cleanfid_make_of_it(self, rng):
        content = encoded(Image.fromarray(pixels(rng, 16, 16, 3)).convert("CMYK"), "jpeg")
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.mode == "CMYK"
            assert (decode(content, "x") == np.asarray(picture.convert("RGB"))).all()

    @pytest.mark.parametrize("channels", [1, 3])
    def test_16_bits_are_refused(self, channels):
        with pytest.raises(UserError, match=r"deep\.png has more than 8 bits"):
            decode(png16(channels), "deep.png")

    def test_float_tiff_is_refused(self):
        content = encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "tiff")
        with pytest.raises(UserError, match="more than 8 bits"):
            decode(content, "x.tiff")

    @settings(max_examples=40, deadline=None)
    @given(share=st.floats(0, 0.98), kind=st.sampled_from(["png", "jpeg", "bmp"]))
    def test_a_truncated_image_is_refused_by_name(self, share, kind):
        content = encoded(pixels(np.random.default_rng(0), 32, 32, 3), kind)
        with pytest.raises(UserError, match=r"cut\.image"):
            decode(content[: int(len(content) * share)], "cut.image")

    def test_the_damaged_file_of_a_set_is_named(self, folder, archive):
        path = folder / "0" / "3.png"
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(UserError, match=r"0/3\.png is damaged"):
            everything(folder, workers=2)

    def test_a_damaged_entry_of_a_zip_is_named(self, archive):
        content = bytearray(archive.read_bytes())
        with zipfile.ZipFile(archive) as file:
            offset = file.getinfo("0/3.png").header_offset
        content[offset + 60] ^= 0xFF
        archive.write_bytes(content)
        with pytest.raises(UserError, match=r"0/3\.png"):
            everything(archive)


class TestRefusals:
    def test_empty_absent_and_other_files(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
            pass
        (tmp_path / "text.zip").write_text("no zip")
        for name, reason in {
            "empty": "holds no image",
            "empty.zip": "holds no image",
            "text.zip": "neither",
            "absent": "does not exist",
        }.items():
            with pytest.raises(UserError, match=f"{name} .*{reason}|{name} is {reason}"):
                open_images(tmp_path / name)

    @pytest.mark.parametrize(
        "arrays",
        [
            {"arr_0": np.zeros((2, 4, 4, 3))},
            {"arr_0": np.zeros((2, 3, 4, 4), np.uint8)},
            {"arr_0": np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))},
            {"arr_0": np.zeros((0, 4, 4, 3), np.uint8)},
            {"arr_0": np.array([None], dtype=object)},
            {"other": np.zeros((2, 4, 4, 3), np.uint8)},
            {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(3, np.int64)},
            {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(2)},
        ],
    )
    def test_other_arrays(self, tmp_path, arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(UserError, match=r"a\.npz"):
            open_images(tmp_path / "a.npz")

    def test_a_shorter_array_than_its_header_says(self, tmp_path):
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((5, 4, 4, 3), np.uint8))
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
            file.writestr("arr_0.npy", buffer.getvalue()[:-10])
        with pytest.raises(UserError, match="ends before image 5"):
            list(ImageArray(tmp_path / "a.npz").batches(5))

    def test_labels_that_miss_an_image(self, folder):
        (folder / "dataset.json").write_text(json.dumps({"labels": [["0/0.png", 1]]}))
        with pytest.raises(UserError, match=r"dataset\.json"):
            open_images(folder)


def test_to_uint8_rounds_as_a_saved_png_does():
    x = torch.tensor([-2.0, -1.0, 0.0, 1 / 255, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 128, 255, 255]
