"""Whatever a path names, opened: a folder, a zip, an `.npz` of images, or WebDataset shards."""

from __future__ import annotations

import hashlib
import zipfile
from contextlib import closing
from pathlib import Path

from msdcli.data.files.labels import LABELS_FILE
from msdcli.data.images import ImageArray, ImageFiles
from msdcli.data.webdataset import TarFiles, expand, shards, tars
from msdcli.errors import UserError
from msdcli.foreign import check_file

Images = ImageFiles | ImageArray


def is_shards(path: Path) -> bool:
    """Whether a path means WebDataset shards: a .tar, a pattern of them, or a folder of them."""
    return bool(tars(path)) if path.is_dir() else path.name.endswith((".tar", ".tgz", ".gz"))


def is_there(path: str | Path) -> bool:
    """Whether there is anything at a path; of a pattern of shards, the first one."""
    if "{" not in str(path) or Path(path).exists():
        return Path(path).exists()
    return Path(expand(str(path))[0]).exists()


def open_images(path: str | Path) -> Images:
    """Open a folder, a zip, an `.npz` of images, or WebDataset shards."""
    path = Path(path)
    if is_shards(path):
        return TarFiles(path)
    if path.is_dir():
        return ImageFiles(path)
    check_file(path)
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is neither a folder, a zip nor an npz of images (or it is truncated).")
    return ImageArray(path) if path.suffix == ".npz" else ImageFiles(path)


def content_hash(path: str | Path) -> str:
    """sha256 of what the images are: of the file, or of a folder's names and files; the key of cached statistics."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    if is_shards(path):
        for shard in shards(path):
            digest.update(content_hash(shard).encode())
        return digest.hexdigest()
    with closing(ImageFiles(path)) as files:
        for name in [*files.names, *([LABELS_FILE] if files.labels is not None else [])]:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + hashlib.sha256(files._read(name)).digest())
    return digest.hexdigest()
