"""One picture's bytes: 8 bits and whole pixels, or a refusal that says what it is."""

from __future__ import annotations

import contextlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from msdcli.data.files.decoding import PNG, decode, without_texts
from msdcli.errors import UserError
from tests.data.test_images import encoded, png16


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(colour_type: int, depth: int, values: int) -> bytes:
    """A PNG of 2 x 2 pixels of so many values each, whatever PIL can write."""
    header = struct.pack(">IIBBBBB", 2, 2, depth, colour_type, 0, 0, 0)
    rows = (b"\0" + b"\x12" * (2 * values * depth // 8)) * 2
    return PNG + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(bits: int, samples: int) -> bytes:
    """An uncompressed TIFF of 2 x 2 pixels."""
    data = b"\x34\x12" * (2 * 2 * samples * bits // 16)
    short, long = 3, 4
    tags = [(256, short, 1, 2), (257, short, 1, 2), (258, short, samples, 0), (259, short, 1, 1)]
    tags += [(262, short, 1, 2 if samples > 1 else 1), (273, long, 1, 0), (277, short, 1, samples), (278, short, 1, 2)]
    tags += [(279, long, 1, len(data))]
    after = 8 + 2 + 12 * len(tags) + 4
    extra = struct.pack(f"<{samples}H", *[bits] * samples)
    values = {258: after if samples > 2 else int.from_bytes(extra, "little"), 273: after + len(extra)}
    entries = b"".join(struct.pack("<HHII", tag, kind, n, values.get(tag, v)) for tag, kind, n, v in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + extra + data


DEEP = {
    "grey PNG": png(0, 16, 1),
    "RGB PNG": png(2, 16, 3),
    "grey PNG with alpha": png(4, 16, 2),
    "RGBA PNG": png(6, 16, 4),
    "PNG with a text": png16(3)[:33] + chunk(b"tEXt", b"a\0b") + png16(3)[33:],
    "grey TIFF": tiff(16, 1),
    "RGB TIFF": tiff(16, 3),
    "RGBA TIFF": tiff(16, 4),
    "TIFF of floats": encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "tiff"),
    "TIFF of 32 bits": encoded(Image.fromarray(np.zeros((4, 4), np.int32)), "tiff"),
    "PGM": b"P5 2 2 65535\n" + bytes(8),
    "PPM": b"P6 2 2 65535\n" + bytes(24),
    "PPM of 10 bits": b"P6 2 2 1023\n" + bytes(24),
    "PPM in digits": b"P3 2 2 1000\n" + b"7 " * 12,
    "PGM in digits": b"P2 2 2 300\n" + b"7 " * 4,
}


@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
def test_more_than_8_bits_are_refused_in_every_format(content: bytes) -> None:
    with pytest.raises(UserError, match=r"^deep\.x has more than 8 bits per channel"):
        decode(content, "deep.x")


SHALLOW = {
    "RGB TIFF": tiff(8, 3),
    "grey TIFF": tiff(8, 1),
    "PPM": b"P6 2 2 255\n" + b"\x34" * 12,
    "PGM of 4 bits": b"P5 2 2 15\n" + b"\x03" * 4,
    "PPM in digits": b"P3 2 2 255\n" + b"52 " * 12,
    "PNG of 2 bits": png(0, 2, 2),
    "RGBA PNG": png(6, 8, 4),
}


@pytest.mark.parametrize("content", SHALLOW.values(), ids=SHALLOW)
def test_8_bits_and_fewer_are_read(content: bytes) -> None:
    assert decode(content, "x").shape == (2, 2, 3)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt", "iCCP"])
@pytest.mark.parametrize("behind", [False, True])
def test_a_long_text_in_a_png_does_no_harm(kind: str, behind: bool) -> None:
    picture, long = pixels(4, 4, 3), b"a" * (3 * PngImagePlugin.MAX_TEXT_CHUNK)
    content = {
        "zTXt": b"key\0\0" + zlib.compress(long),
        "iTXt": b"key\0\1\0\0\0" + zlib.compress(long),
        "tEXt": b"key\0" + long,
        "iCCP": b"key\0\0" + zlib.compress(long),
    }[kind]
    plain = encoded(picture)
    at = len(plain) - 12 if behind else 33
    with_text = plain[:at] + chunk(kind.encode(), content) + plain[at:]
    assert (decode(with_text, "x") == picture).all()
    assert without_texts(with_text) == plain
    assert without_texts(plain) is plain


def test_transparency_stays_when_texts_go() -> None:
    palette = Image.fromarray(pixels(6, 6, 3)).quantize(8)
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 100, zip=True)
    content = encoded(palette, transparency=bytes(range(8)), pnginfo=info)
    assert b"tRNS" in without_texts(content) and b"zTXt" not in without_texts(content)
    assert (decode(content, "x") == np.asarray(palette.convert("RGB"))).all()


def test_a_picture_of_too_many_pixels_is_named() -> None:
    content = png(0, 1, 8)
    huge = content[:16] + struct.pack(">II", 20_000, 20_000) + content[24:29]
    with pytest.raises(UserError, match=r"^zz\.png has more than 178,956,970 pixels"):
        decode(huge + struct.pack(">I", zlib.crc32(huge[12:])) + content[33:], "zz.png")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "pointer of git-lfs"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "not an image that can be read"),
        (b"", "not an image"),
        (b"text", "not an image"),
    ],
)
def test_what_is_no_picture_is_called_what_it_is(content: bytes, said: str) -> None:
    with pytest.raises(UserError, match=f"^x.png is .*{said}"):
        decode(content, "x.png")


def test_pictures_are_taken_as_stored() -> None:
    picture = Image.fromarray(pixels(8, 16, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for kind in ("jpeg", "png", "webp"):
        assert decode(encoded(picture, kind, exif=exif), "x").shape == (8, 16, 3)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["png", "jpeg", "bmp", "tiff", "webp", "ppm", "gif"]),
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    share=st.floats(0.3, 1),
)
@pytest.mark.filterwarnings("ignore")
def test_damage_anywhere_gives_pixels_or_a_refusal(kind: str, places: list[tuple[float, int]], share: float) -> None:
    content = bytearray(encoded(pixels(12, 9, 3), kind))
    for place, value in places:
        content[int(place * (len(content) - 1))] = value
    with contextlib.suppress(UserError):
        found = decode(bytes(content[: int(share * len(content))]), "x")
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3


def test_bytes_of_any_kind_end_in_a_refusal() -> None:
    rng = np.random.default_rng(0)
    for begin in (b"", PNG, b"II*\0", b"MM\0*", b"BM", b"P6 ", b"P3 ", b"RIFF\0\0\0\0WEBP", b"\xff\xd8\xff", b"GIF89a"):
        for size in (0, 8, 60, 300):
            with pytest.raises(UserError, match=r"^x "):
                decode(begin + rng.bytes(size), "x")
