"""What a file or folder is that msd does not read as a teacher, and what to give in its place; nothing of it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msdcli.foreign import visible

HEADER = 100_000_000  # bytes that safetensors allow for it
WEB = (b"<!doctype html", b"<html")
LORA = ("lora_down", "lora_A", "lora_up", "lora_B", "lora.down", "lora.up")
SINGLE = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
MERGE = "put them into their pipeline: pipe.load_lora_weights(...), pipe.fuse_lora(), pipe.save_pretrained(FOLDER)"
CONVERT = "the diffusers library makes a folder of it: DiffusionPipeline.from_single_file(...).save_pretrained(FOLDER)"
PIPELINE = (
    "give the folder of its whole pipeline, which has model_index.json: its scheduler says what a network predicts"
)
KINDS = "msd docs teacher says what is read"


def of_file(path: Path) -> tuple[str, str] | None:
    """Return what a file is that is no pickle of protocol 2 or newer, and what to do; None where nothing is known.

    The first goes on a sentence that begins with the file's name.
    """
    with path.open("rb") as file:
        begin = file.read(512)
    if begin.lstrip().lower().startswith(WEB):
        return (
            "is a web page: its download did not bring the file",
            "download it again, with the link to the file itself",
        )
    if begin.startswith(b"PK\x03\x04"):
        return (
            "is a file of torch.save or another archive, which msd does not open",
            f"of EDM, give network-snapshot-*.pkl; of a single-file checkpoint, {CONVERT}",
        )
    if begin.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        return "is a compressed archive", "unpack it, and give what is in it"
    if begin[8:9] == b"{" and (names := tensor_names(path)) is not None:
        return _of_tensors(path, names)
    return None


def _of_tensors(path: Path, names: list[str]) -> tuple[str, str]:
    if _are_lora(names):
        return "holds LoRA weights: changes of a network, and not a network", MERGE
    if any(name.startswith(SINGLE) for name in names):
        return "is a single-file checkpoint", CONVERT
    folder = path.parent
    if (folder / "model.json").is_file():
        return "is a file of a folder that msd wrote", f"give the folder: {folder}"
    pipeline = next((f for f in (folder, folder.parent) if (f / "model_index.json").is_file()), None)
    if pipeline is not None:
        return "is a file of a pipeline", f"give the folder: {pipeline}"
    return "holds tensors alone, which do not say what network they are", PIPELINE


def of_folder(folder: Path) -> tuple[str, str]:
    """Return what a folder is that is neither a pipeline of diffusers nor a teacher of msd, and what to do."""
    if (folder / "recipe.yaml").is_file() and (folder / "run.json").is_file():
        return "is a run of msd, and no teacher", f"give the folder of its teacher: {folder / 'teacher'}"
    if (folder / "bundle.json").is_file() or (folder / "export.json").is_file():
        return "holds students that msd exported, and no teacher", KINDS
    config = _object(folder / "config.json")
    if name := config.get("_class_name"):
        return _of_network(folder, visible(str(name))[:80])
    if isinstance(known := config.get("architectures"), list) and known:
        return f"is {visible(str(known[0]))[:80]} of the transformers library, and no diffusion model", PIPELINE
    held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if not held:
        return "is an empty folder", KINDS
    weights = [name for name in held if name.endswith((".safetensors", ".pkl", ".ckpt", ".pt", ".pth", ".bin"))]
    if "adapter_config.json" in held or any(_are_lora(tensor_names(folder / name) or []) for name in weights):
        return "holds LoRA weights: changes of a network, and not a network", MERGE
    if pickles := [name for name in weights if name.endswith(".pkl")]:
        return "is a folder, and no pipeline of diffusers", f"give the file: {folder / pickles[0]}"
    some = ", ".join(visible(name) for name in held[:3]) + (", ..." if len(held) > 3 else "")
    return f"is no pipeline of diffusers and no teacher that msd wrote: it holds {some}", KINDS


def _of_network(folder: Path, name: str) -> tuple[str, str]:
    if name.startswith("Autoencoder") or name in ("VQModel", "ConsistencyDecoderVAE"):
        kind = "an autoencoder, which turns images into latents and back, and no diffusion model"
        return (
            f"is {name}: {kind}",
            f"{PIPELINE}; to go with an EDM pickle, msd import TEACHER OUT --autoencoder {folder}",
        )
    if "ControlNet" in name or "Adapter" in name:
        return f"is {name}, which steers a network, and is not one", PIPELINE
    parent = folder.resolve().parent
    whole = parent if (parent / "model_index.json").is_file() else None
    return f"is {name} alone", f"give the folder of its pipeline: {whole}" if whole else PIPELINE


def _are_lora(names: list[str]) -> bool:
    return any(part in name for name in names for part in LORA)


def tensor_names(path: Path) -> list[str] | None:
    """Return the names in the header of a safetensors file; None where it is none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(HEADER, path.stat().st_size):
                return None
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError):
        return None
    return [name for name in header if name != "__metadata__"] if isinstance(header, dict) else None


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
