"""Published reference statistics: clean-fid's and EDM's `.npz` (mu, sigma) and EDM's and EDM2's `.pkl`.

A pickle is a program. Here only dicts, strings, numbers and plain numpy arrays are put together; a pickle that names
anything else is refused before anything it names is imported or called.
"""

from __future__ import annotations

import importlib.util
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from msdcli.errors import UserError
from msdcli.foreign import check_file
from msdcli.metrics.moments import Gaussian

# numpy's own three constructors, asked for by example since their modules were renamed between numpy 1 and 2.
_CONSTRUCTORS: dict[str, Any] = {
    "_reconstruct": np.zeros(1).__reduce__()[0],
    "_frombuffer": np.zeros(1).__reduce_ex__(5)[0],
    "scalar": np.float64(0).__reduce__()[0],
}


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes, which pickle's protocols below 3 spell as an encoded string."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
    **{(f"numpy.{core}.multiarray", name): _CONSTRUCTORS[name] for core in ("core", "_core") for name in _CONSTRUCTORS},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _CONSTRUCTORS["_frombuffer"] for core in ("core", "_core")},
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside itself")


def is_statistics(path: str | Path) -> bool:
    """Tell statistics from images by the file itself."""
    path = Path(path)
    if path.suffix == ".npz" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            return {"mu.npy", "sigma.npy"} <= set(file.namelist())
    return path.suffix == ".pkl"


def read_statistics(path: str | Path, protocol: str) -> Gaussian:
    """Read mu and sigma; EDM2's file holds them for several networks, of which `protocol` picks one."""
    content = _read(Path(path))
    part = "fd_dinov2" if protocol == "dinov2" else "fid"
    content = content.get(part, content)
    if not (isinstance(content, dict) and {"mu", "sigma"} <= set(content)):
        raise UserError(f"{path} holds no `mu` and `sigma` for the protocol {protocol}.")
    mu, sigma = (np.array(content[name]) for name in ("mu", "sigma"))
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise UserError(f"{path}: `mu` and `sigma` must be floating point, not {mu.dtype} and {sigma.dtype}.")
    return Gaussian(mu.astype(np.float64), sigma.astype(np.float64))


def cleanfid_statistics(name: str) -> Path:
    """The file where the installed clean-fid keeps its statistics `name`, such as cifar10_clean_train_32."""
    package = importlib.util.find_spec("cleanfid")
    folder = Path(package.origin).parent / "stats" if package and package.origin else None
    if folder and (folder / f"{name}.npz").is_file():
        return folder / f"{name}.npz"
    raise UserError(f"clean-fid's statistics {name}.npz are not on this machine.", hint=f"They belong in {folder}.")


def _read(path: Path) -> dict[str, Any]:
    check_file(path)
    try:
        with path.open("rb") as file:
            if path.suffix == ".npz":
                return dict(np.load(file, allow_pickle=False))
            content = _ArraysOnly(file).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is not a pickle of plain arrays ({error}); nothing in it was run.") from error
    except Exception as error:  # a damaged file makes either reader raise almost anything
        raise UserError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of arrays.")
    return content
