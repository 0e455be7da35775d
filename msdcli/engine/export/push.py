"""An export as a repository of the Hugging Face Hub: its files, in a folder or uploaded."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msdcli.errors import UserError
from msdcli.rundir import building, write_text

HUB = "hub:"
RECORDS = ("bundle.json", "export.json")
LARGE = ("*.safetensors", "*.onnx", "*.onnx.data", "*.pt2")
ATTRIBUTES = ".gitattributes"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"


@dataclass(frozen=True)
class PushPlan:
    """What is to be published: files of `source` by name and size, and where to."""

    source: Path
    target: str | None
    files: list[tuple[str, int]]

    @property
    def repository(self) -> str | None:
        """owner/name on the Hub, if that is the target."""
        to_hub = self.target is not None and self.target.startswith(HUB)
        return self.target.removeprefix(HUB) if to_hub and self.target is not None else None

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files)


def plan(source: Path, target: str | None) -> PushPlan:
    """Check both ends. UserError if `source` is no export, or `target` cannot be written."""
    if not any((source / name).is_file() for name in RECORDS) or not (source / "README.md").is_file():
        raise UserError(f"{source} is no export of msd", hint="msd export RUN writes one")
    names = sorted(
        str(file.relative_to(source))
        for file in source.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and not file.name.endswith(".tmp")
    )
    push = PushPlan(source, target, [(name, (source / name).stat().st_size) for name in names])
    if push.repository is not None:
        if not re.fullmatch(rf"{NAME}/{NAME}", push.repository):
            raise UserError(f"{push.repository!r} is no repository of the Hub", hint="--to hub:owner/name")
        _hub()
    elif target is not None:
        folder = Path(target)
        if folder.exists() and not (folder.is_dir() and _may_replace(folder)):
            raise UserError(f"{folder} exists and is no export of msd: nothing was written", hint="another folder")
        if folder.resolve() == source.resolve() or source.resolve() in folder.resolve().parents:
            raise UserError(f"{folder} is inside what is pushed: nothing was written", hint="another folder")
    return push


def _may_replace(folder: Path) -> bool:
    return not any(folder.iterdir()) or any((folder / name).is_file() for name in RECORDS)


def run(push: PushPlan, *, private: bool = False) -> str:
    """Write the folder, or upload; return where it is now."""
    assert push.target is not None
    if push.repository is None:
        with building(Path(push.target)) as place:
            lay_out(push, place)
        return push.target
    api = _hub().HfApi()
    api.create_repo(push.repository, repo_type="model", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=push.repository,
        folder_path=str(push.source),
        allow_patterns=[name for name, _ in push.files],
        commit_message="Students exported by msd",
    )
    return f"https://huggingface.co/{push.repository}"


def lay_out(push: PushPlan, folder: Path) -> None:
    """Fill a folder as a repository of the Hub: the export's files, and what is kept as large files."""
    for name, _ in push.files:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(push.source / name, place)
    lines = [f"{pattern} filter=lfs diff=lfs merge=lfs -text" for pattern in LARGE]
    write_text(folder / ATTRIBUTES, "\n".join(lines) + "\n")


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"uploading needs the library huggingface_hub ({error})",
            hint="pip install 'msdcli[hub]', or --to FOLDER and git push",
        ) from None
    return huggingface_hub
