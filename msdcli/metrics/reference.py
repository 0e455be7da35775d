"""Published reference statistics: clean-fid's, EDM's and ADM's `.npz` (mu, sigma) and EDM's and EDM2's `.pkl`.

Statistics are numbers of one protocol, and nearly no file says of which; its form or its name often does
(`provenance`). What is of another protocol than the images it is compared with is refused. Nothing in a file is run,
and its sizes are checked before anything is allocated.
"""

from __future__ import annotations

import importlib.util
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from msdcli.errors import UserError
from msdcli.foreign import check_file
from msdcli.metrics.moments import Gaussian
from msdcli.metrics.statistics_pickle import read_arrays

MAX_DIMENSION = 8192  # of features; Inception's are 2048, the widest ViT's 1536
MEMBERS = ("mu", "sigma")
SYMMETRY = 1e-3  # what a covariance of float32 sums may be off, relative to its largest entry
# Protocols with the same network and the same resizing, whose numbers are the same (Heusel's graph, which resizes
# itself; NVlabs' fid.py runs a port of it, ADM's evaluator the graph).
ADM = "legacy-tensorflow"
SAME = (frozenset({"legacy-tensorflow", "edm"}),)


@dataclass(frozen=True)
class Provenance:
    """The protocol that statistics are of, and what says so."""

    protocol: str
    said_by: str


def comparable(a: str, b: str) -> bool:
    """Whether numbers of two protocols may be compared."""
    return a == b or any({a, b} <= same for same in SAME)


# What a file is.


def is_statistics(path: str | Path) -> bool:
    """Tell statistics from images by the file itself; one of ADM's holds both, and counts as statistics."""
    path = Path(path)
    return set(MEMBERS) <= _members(path) or path.suffix == ".pkl"


def has_images(path: str | Path) -> bool:
    """Whether a file has images beside its statistics, as ADM's reference batches have."""
    return "arr_0" in _members(Path(path))


def _members(path: Path) -> set[str]:
    """The names of an npz's arrays; of anything else none."""
    if path.suffix != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return set()
    try:
        with zipfile.ZipFile(path) as file:
            return {name.removesuffix(".npy") for name in file.namelist()}
    except (OSError, zipfile.BadZipFile):
        return set()


# Whose numbers they are.

_WORDS = {
    **dict.fromkeys(("legacy_tensorflow", "tensorflow", "guided_diffusion", "adm", "virtual"), "legacy-tensorflow"),
    "edm": "edm",
    **dict.fromkeys(("legacy_pytorch", "pytorch", "pytorch_fid"), "legacy-pytorch"),
    **dict.fromkeys(("clean", "cleanfid", "clean_fid"), "clean"),
    **dict.fromkeys(("dinov2", "dino_v2"), "dinov2"),
}
_MODES = {"clean": "clean", "legacy_tensorflow": "legacy-tensorflow", "legacy_pytorch": "legacy-pytorch"}
# clean-fid's NAME_MODE[_MODEL]_SPLIT_RES; a data set of its own has the split `custom` and the resolution `na`.
_CLEANFID = re.compile(r".+_(clean|legacy_tensorflow|legacy_pytorch)(_clip\w*?|)_([^_]+)_(\d+|na)")
_NVLABS = re.compile(r"(cifar10|ffhq|afhqv2|imagenet)-(\d+)x\2")  # EDM's fid-refs


def provenance(path: str | Path) -> Provenance | None:
    """Return which protocol's statistics a file holds, as far as its form or its name tells; None where neither does.

    EDM2's pickles are of the Inception of `edm`; their DINOv2 part is told apart when it is read.
    """
    path = Path(path)
    if _members(path) & {"arr_0", "mu_s", "sigma_s"}:
        return Provenance(ADM, "its form, which is ADM's")
    if path.suffix == ".pkl":
        content = _read(path)
        if isinstance(content.get("fid"), dict) or isinstance(content.get("fd_dinov2"), dict):
            return Provenance("edm", "its form, which is EDM2's")
    protocol = _named(path.stem.lower())
    return None if protocol is None else Provenance(protocol, "its name")


def _named(stem: str) -> str | None:
    """Return the one protocol that a file's name speaks of."""
    if found := _CLEANFID.fullmatch(stem.removesuffix("_kid")):
        return "clip" if found[2] else _MODES[found[1]]
    if _NVLABS.fullmatch(stem):
        return "edm"
    words = f"_{re.sub('[^a-z0-9]+', '_', stem)}_"
    said = {protocol for word, protocol in _WORDS.items() if f"_{word}_" in words}
    return said.pop() if len(said) == 1 else None


def check_protocol(path: str | Path, protocol: str) -> Provenance | None:
    """Return whose statistics a file holds, if that is known. UserError where `protocol` cannot be compared with it."""
    known = provenance(path)
    if known is None or comparable(known.protocol, protocol):
        return known
    if protocol == "dinov2" and known.said_by.endswith("EDM2's"):  # has a part of each
        return Provenance(protocol, known.said_by)
    raise UserError(
        f"{path} holds statistics of the protocol {known.protocol} ({known.said_by} says so); "
        f"their numbers cannot be compared with those of the protocol {protocol}.",
        hint=f"--protocol {known.protocol}, or statistics of {protocol}; if its name is wrong, give it another one.",
    )


def takes_statistics(path: str | Path, protocol: str) -> bool:
    """Whether a reference is compared with by the statistics in it.

    ADM's batches have images too, which are measured anew under protocols that their statistics are not of.
    """
    return is_statistics(path) and not (has_images(path) and not comparable(ADM, protocol))


def notes(path: str | Path, protocol: str) -> tuple[dict[str, Any], list[str]]:
    """What a result says of a reference: for the record whose statistics they are, and what to beware of."""
    if not is_statistics(path):
        return {}, []
    if not takes_statistics(path, protocol):
        return {}, [
            f"{path}: its statistics are of {ADM}; under the protocol {protocol} its images are measured instead."
        ]
    known = check_protocol(path, protocol)
    if known is None:
        warning = f"{path} does not say of which protocol its statistics are; they are taken to be of {protocol}."
        return {"reference_statistics": {"protocol": None, "said_by": None}}, [warning]
    return {"reference_statistics": {"protocol": known.protocol, "said_by": known.said_by}}, []


# Reading.


def read_statistics(path: str | Path, protocol: str) -> Gaussian:
    """Read mu and sigma; EDM2's file holds them for several networks, of which `protocol` picks one.

    UserError for what is damaged, no covariance, or of another protocol.
    """
    path = Path(path)
    check_protocol(path, protocol)
    content = _read(path)
    part = "fd_dinov2" if protocol == "dinov2" else "fid"
    content = content.get(part, content)
    if not (isinstance(content, dict) and set(MEMBERS) <= set(content)):
        raise UserError(f"{path} holds no `mu` and `sigma` for the protocol {protocol}.")
    mu, sigma = content["mu"], content["sigma"]
    for name, array in (("mu", mu), ("sigma", sigma)):
        if not isinstance(array, np.ndarray):
            raise UserError(f"{path}: `{name}` is no array of numbers.")
        _check_kind(f"{path}: `{name}`", array.dtype)
    _check_shapes(path, mu.shape, sigma.shape)
    return _gaussian(path, mu.astype(np.float64), sigma.astype(np.float64))


def _check_kind(what: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind != "f" or dtype.itemsize > 16:
        raise UserError(f"{what} must be floating point, not {dtype}.")


def _check_shapes(path: Path, mu: tuple[int, ...], sigma: tuple[int, ...]) -> None:
    if len(mu) != 1 or not mu[0] or sigma != (mu[0], mu[0]):
        raise UserError(f"{path}: a `mu` of shape {list(mu)} and a `sigma` of shape {list(sigma)} do not fit.")
    if mu[0] > MAX_DIMENSION:
        raise UserError(f"{path}: statistics of {mu[0]:,} dimensions; features have at most {MAX_DIMENSION:,}.")


def _gaussian(path: Path, mu: np.ndarray, sigma: np.ndarray) -> Gaussian:
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: the statistics contain NaN or infinity.")
    if np.abs(sigma - sigma.T).max() > SYMMETRY * np.abs(sigma).max():
        raise UserError(f"{path}: `sigma` is not symmetric, so it is no covariance.")
    if (np.diagonal(sigma) < 0).any():
        raise UserError(f"{path}: `sigma` has negative variances, so it is no covariance.")
    return Gaussian(mu, sigma)


def _read(path: Path) -> dict[str, Any]:
    check_file(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    content = read_arrays(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of arrays.")
    return content


def _read_npz(path: Path) -> dict[str, Any]:
    """Read mu and sigma alone, after their headers have been checked against each other."""
    try:
        with zipfile.ZipFile(path) as file:
            headers = {name: _header(path, file, name) for name in MEMBERS if f"{name}.npy" in file.namelist()}
            if len(headers) == len(MEMBERS):
                _check_shapes(path, *(headers[name][0] for name in MEMBERS))
            return {name: _array(path, file, name, *header) for name, header in headers.items()}
    except UserError:
        raise
    except Exception as error:  # a damaged archive makes zipfile and numpy raise almost anything
        raise UserError(f"{path} cannot be read: {error}.") from error


def _open_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[np.lib.format.read_magic(file)[0]](file)
    return shape, fortran, dtype


def _header(path: Path, file: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, order and type of an array. UserError unless it is of plain floats, and as long as it says."""
    with file.open(f"{name}.npy") as member:
        shape, fortran, dtype = _open_header(member)
        start = member.tell()
    _check_kind(f"{path}: `{name}`", dtype)
    if len(shape) > 2 or any(side > MAX_DIMENSION for side in shape):
        raise UserError(f"{path}: `{name}` has the shape {list(shape)}; features have at most {MAX_DIMENSION:,}.")
    if file.getinfo(f"{name}.npy").file_size - start != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise UserError(f"{path}: `{name}` is not as long as its shape {list(shape)} says.")
    return shape, fortran, dtype


def _array(
    path: Path, file: zipfile.ZipFile, name: str, shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any]
) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    with file.open(f"{name}.npy") as member:
        _open_header(member)
        content = member.read(size)
    if len(content) != size:
        raise UserError(f"{path}: `{name}` ends early.")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def cleanfid_statistics(name: str) -> Path:
    """The file where the installed clean-fid keeps its statistics `name`, such as cifar10_clean_train_32."""
    package = importlib.util.find_spec("cleanfid")
    folder = Path(package.origin).parent / "stats" if package and package.origin else None
    if folder and (folder / f"{name}.npz").is_file():
        return folder / f"{name}.npz"
    raise UserError(f"clean-fid's statistics {name}.npz are not on this machine.", hint=f"They belong in {folder}.")
