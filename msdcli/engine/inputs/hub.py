"""Teachers on the Hugging Face Hub, `hub:owner/name[@revision]`: configurations and safetensors, never pickles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from msdcli.engine.checkpoints.model import MODEL, WEIGHTS
from msdcli.errors import UserError
from msdcli.nets.diffusers.files import weight_files
from msdcli.rundir import read_json

PREFIX = "hub:"
NAME = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# What is fetched: all configurations, weights inside folders (a file beside them repeats them), tokenizers.
WANTED = ["*.json", "model.safetensors", "*/*.safetensors", "tokenizer*/*"]
UNWANTED = ["*.bin", "*.pt", "*.ckpt", "*.pkl", "*.fp16.*", "*.non_ema.*", "safety_checker/*", "feature_extractor/*"]


def is_hub(path: str | Path) -> bool:
    """Whether a path is a name on the Hub."""
    return str(path).startswith(PREFIX)


def resolve(path: str | Path) -> Path:
    """Return a path as it is, and of a name on the Hub the folder that it is in, after downloading what is missing.

    An interrupted download goes on where it was. UserError that says what to fetch and where to put it where it cannot.
    """
    if not is_hub(path):
        return Path(path)
    if (folder := cached(path)) is not None:
        return folder
    name = str(path)
    try:
        folder = Path(_library(name).snapshot_download(**_options(name)))
    except (OSError, ValueError, RuntimeError) as error:  # the library's own errors are among these
        raise UserError(
            f"{name} cannot be downloaded: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint=by_hand(name),
        ) from None
    if lacking := missing(folder):
        raise UserError(
            f"{name} has no {', '.join(lacking)}; msd reads safetensors only, no pickles (.bin, .pt, .ckpt)",
            hint="load it with the diffusers library, save it by save_pretrained, and name that folder",
        )
    return folder


def cached(path: str | Path) -> Path | None:
    """Return the folder of what was downloaded before, whole, without asking the network; None for what was not.

    The library keeps it by repository and revision. A name without a revision means what it meant when it was
    downloaded; what is made from it is keyed by the content of its files, never by the name.

    Paths that are no names on the Hub are themselves, if they exist.
    """
    if not is_hub(path):
        return Path(path) if Path(path).exists() else None
    name = str(path)
    options = _options(name)
    try:
        folder = Path(_library(name).snapshot_download(**options, local_files_only=True))
    except (UserError, OSError, ValueError, RuntimeError):
        return None
    return None if missing(folder) else folder


def missing(folder: Path) -> list[str]:
    """Return the files that a teacher in `folder` needs and that are not there."""
    if (folder / MODEL).is_file():
        return [] if (folder / WEIGHTS).is_file() else [WEIGHTS]
    if not (folder / "model_index.json").is_file():
        return ["model_index.json"]
    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict):
        raise UserError(f"{folder / 'model_index.json'} is no description of a pipeline")
    wanted = ["scheduler/scheduler_config.json"]
    for part in index:
        if part in ("unet", "transformer", "vae"):
            wanted += [f"{part}/config.json", f"{part}/diffusion_pytorch_model.safetensors"]
        elif part.startswith("text_encoder") and isinstance(index[part], list) and index[part][:1] not in ([], [None]):
            wanted += [f"{part}/config.json", f"{part}/model.safetensors"]
    return [name for name in wanted if not _is_here(folder / name)]


def by_hand(name: str) -> str:
    """Say how to bring a model here without a network."""
    match = _parsed(name)
    revision = f" --revision {match['revision']}" if match["revision"] else ""
    patterns = " ".join(f"'{pattern}'" for pattern in WANTED)
    excluded = " ".join(f"'{pattern}'" for pattern in UNWANTED)
    return (
        f"where there is a network: hf download {match['repo']}{revision} --include {patterns} --exclude {excluded} "
        "--local-dir FOLDER; bring FOLDER here, and teacher.path=FOLDER"
    )


def _is_here(path: Path) -> bool:
    """Whether weights are here, in one file or in several with their index."""
    return all(file.is_file() for file in weight_files(path))


def _parsed(name: str) -> re.Match[str]:
    match = NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{name} is no name on the Hub", hint="hub:owner/name or hub:owner/name@revision")
    return match


def _options(name: str) -> dict[str, Any]:
    match = _parsed(name)
    patterns = {"allow_patterns": WANTED, "ignore_patterns": UNWANTED}
    return {"repo_id": match["repo"], "revision": match["revision"], **patterns}


def _library(name: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name}: the library huggingface_hub is not installed",
            hint=f"pip install 'msdcli[diffusers]'; or, {by_hand(name)}",
        ) from None
    return huggingface_hub
