"""The files of a pipeline that diffusers saved: JSON that says what it is made of; nothing of it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msdcli.errors import UserError


def is_pipeline(path: Path) -> bool:
    """Whether this is a folder that diffusers saved."""
    return (path / "model_index.json").is_file()


def read_index(folder: Path) -> dict[str, Any]:
    """Read model_index.json."""
    return read_object(folder / "model_index.json")


def autoencoder_folder(folder: Path) -> Path | None:
    """Return where a saved pipeline keeps its autoencoder; None for a pixel-space pipeline."""
    return folder / "vae" if "vae" in read_index(folder) else None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a pipeline. UserError if it is missing, damaged or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object")
    return content


def weight_files(path: Path) -> list[Path]:
    """Return a network's files of weights: the one at `path`, or the shards beside it that its index lists. UserError
    for a damaged index.
    """
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file() or not index.is_file():
        return [path]
    places = read_object(index).get("weight_map")
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise UserError(f"{index} lists no safetensors beside it")
    return [path.with_name(name) for name in names]


def import_diffusers() -> Any:
    """Return the library. UserError where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"networks of kind diffusers need the library ({error})", hint="pip install 'msdcli[diffusers]'"
        ) from None
    return diffusers
