"""An export as a repository of the Hugging Face Hub: its files, in a folder or uploaded."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msdcli.errors import UserError
from msdcli.outputs import PROGRAMS, RECORDS, check_folder, files_in, relist, replacing
from msdcli.rundir import file_hash, write_text

HUB = "hub:"
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
    names = [name for name in files_in(source) if (source / name).is_file() and _is_published(name)]
    push = PushPlan(source, target, [(name, (source / name).stat().st_size) for name in names])
    if push.repository is not None:
        if not re.fullmatch(rf"{NAME}/{NAME}", push.repository):
            raise UserError(f"{push.repository!r} is no repository of the Hub", hint="--to hub:owner/name")
        _hub()
    elif target is not None:
        folder = Path(target)
        _may_replace(folder)
        if folder.resolve() == source.resolve() or source.resolve() in folder.resolve().parents:
            raise UserError(f"{folder} is inside what is pushed: nothing was written", hint="another folder")
    return push


def _is_published(name: str) -> bool:
    """Whether a file of an export goes along: not what Python, git, `--runtime onnx` or a killed process left there."""
    return not {"__pycache__", ".git", ".lock", PROGRAMS} & set(Path(name).parts) and not name.endswith(".tmp")


def _may_replace(folder: Path) -> dict[str, str]:
    """Return the files of a folder that msd wrote and may write anew. UserError where it holds anything else.

    A repository without files yet is free; what it says of large files stays, if that is enough.
    """
    git = {folder / ".git", folder / ATTRIBUTES}
    own = {} if folder.is_dir() and {*folder.iterdir()} <= git else check_folder(folder, "export of msd")
    attributes = folder / ATTRIBUTES
    if attributes.is_file():
        if not set(_attributes().splitlines()) <= set(attributes.read_text(encoding="utf-8").splitlines()):
            raise UserError(
                f"{attributes} is not msd's and lacks the lines for large files: nothing was written",
                hint=f"add to it: {'; '.join(_attributes().splitlines())}",
            )
        own[ATTRIBUTES] = file_hash(attributes)
    return own


def _attributes() -> str:
    return "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE)


def run(push: PushPlan, *, private: bool = False) -> str:
    """Write the folder, or upload; return where it is now."""
    assert push.target is not None
    if push.repository is None:
        folder = Path(push.target)
        with replacing(folder, _may_replace(folder)) as place:
            lay_out(push, place)
            if (folder / ATTRIBUTES).is_file():  # the user's lines, too
                shutil.copyfile(folder / ATTRIBUTES, place / ATTRIBUTES)
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
    for name in RECORDS:  # what was added to the export, or changed in it, is msd's in the repository
        if (folder / name).is_file():
            relist(folder / name)
    write_text(folder / ATTRIBUTES, _attributes())


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"uploading needs the library huggingface_hub ({error})",
            hint="pip install 'msdcli[hub]', or --to FOLDER and git push",
        ) from None
    return huggingface_hub
