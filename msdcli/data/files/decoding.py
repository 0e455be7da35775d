"""One picture's bytes to uint8 RGB, or a refusal that names it.

Decoding follows clean-fid where it is defined (grey repeated, palettes looked up, alpha dropped, CMYK by PIL), because
its numbers are what people publish. What PIL would silently damage, such as 16 bits per channel, is refused by name.
Pictures are taken as stored: an EXIF orientation turns nothing, as in clean-fid and EDM's data tool.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from msdcli.errors import UserError
from msdcli.foreign import POINTER_HINT, POINTER_SAYS, is_pointer

# What PIL may take the bytes for: a name says little, and some of its formats start other programs (EPS).
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_BYTES = 2**30  # of one picture's file: more than the pixels that PIL takes for no attack, raw
PNG = b"\x89PNG\r\n\x1a\n"
TEXTS = {b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf"}  # no pixel depends on these
BITS_PER_SAMPLE = 258  # a TIFF's tag


def decode(content: bytes, name: str) -> np.ndarray:
    """Decode one picture to uint8 RGB [H, W, 3]; `name` is what an error calls it."""
    if is_pointer(content):
        raise UserError(f"{name} {POINTER_SAYS}", hint=POINTER_HINT)
    content = without_texts(content)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            if _is_deep(picture, content):
                raise UserError(f"{name} has more than 8 bits per channel, which no FID protocol defines.")
            # By way of RGBA a palette with transparency gives the same colours, without PIL's warning about it.
            through = picture.convert("RGBA") if "transparency" in picture.info else picture
            return np.asarray(through.convert("RGB"))
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(f for f in FORMATS if f != "DIB")
        raise UserError(f"{name} is not an image that can be read ({known}).") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UserError(f"{name} has more than {limit:,} pixels, which is the limit.") from error
    except Exception as error:  # a damaged file makes PIL's readers raise almost anything
        raise UserError(f"{name} is damaged: {error}.") from error


def without_texts(content: bytes) -> bytes:
    """Leave the texts out of a PNG: prompts and workflows may be longer than PIL reads, and its pixels are whole."""
    if not content.startswith(PNG):
        return content
    chunks = list(_chunks(content))
    if not any(kind in TEXTS for kind, _, _ in chunks):
        return content
    end = chunks[-1][2]
    return PNG + b"".join(content[a:b] for kind, a, b in chunks if kind not in TEXTS) + content[end:]


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, first byte and last byte of every whole chunk of a PNG."""
    at = len(PNG)
    while at + 12 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        if at + 12 + size > len(content):
            return
        yield kind, at, at + 12 + size
        at += 12 + size


def _is_deep(picture: Image.Image, content: bytes) -> bool:
    """Whether a picture has more than 8 bits per channel, of which PIL keeps 8 without a word."""
    if picture.mode[0] in "IF":
        return True
    if picture.format == "PNG":
        return bool(content[24] == 16)  # its bit depth
    if picture.format == "TIFF":
        bits = getattr(picture, "tag_v2", {}).get(BITS_PER_SAMPLE, 8)
        return bool(max(bits if isinstance(bits, tuple) else (bits,)) > 8)
    if picture.format == "PPM":
        tiles = getattr(picture, "tile", [])
        return any(tile[0] in ("ppm", "ppm_plain") and tile[3][1] > 255 for tile in tiles)  # its largest value
    return False
