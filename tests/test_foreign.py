"""Files of other people are looked at before they are read, whoever reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from msdcli.engine.checkpoints.tensors import load_tensors
from msdcli.errors import UserError
from msdcli.foreign import check_file, problem, shown
from msdcli.metrics.inception import open_network
from msdcli.metrics.reference import read_statistics
from msdcli.nets.edm.pickles import read_pickle

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
READERS: dict[str, Callable[[Path], object]] = {
    "teacher.pkl": read_pickle,
    "weights.safetensors": load_tensors,
    "stats.npz": lambda path: read_statistics(path, "clean"),
    "stats.pkl": lambda path: read_statistics(path, "clean"),
    "inception.pt": lambda path: open_network("clean", weights=path),
    "inception.pth": lambda path: open_network("legacy-pytorch", weights=path),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError, match="is a pointer of git-lfs") as refused:
        READERS[name](tmp_path / name)
    assert name in refused.value.message and "git lfs pull" in str(refused.value.hint)


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=name):
        READERS[name](tmp_path / name)


def test_what_is_no_file_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("gone")
    assert problem(tmp_path / "file") is None
    assert problem(tmp_path / "absent") == "does not exist"
    assert problem(tmp_path / "link") == "is a link to what does not exist"
    assert problem(tmp_path) == "is a folder, not a file"
    assert problem(Path("/dev/zero")) == "is a device, not a file"
    assert "cannot be read" in str(problem(tmp_path / "a\0b"))
    check_file(tmp_path / "file", most=5)
    with pytest.raises(UserError, match="has 5 bytes, the limit is 4"):
        check_file(tmp_path / "file", most=4)
    assert shown(os.fsdecode(b"caf\xe9")) == "caf\\udce9" and shown("café") == "café"
