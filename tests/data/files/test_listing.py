"""What in a folder or an archive counts: pictures and classes, not what tools leave there; links lead on, not round."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from msdcli.data import open_data
from msdcli.data.files.listing import common_folder, is_picture, walk
from msdcli.data.folder import PictureFiles
from msdcli.data.opening import open_images
from msdcli.errors import UserError
from msdcli.recipe.data import FolderSettings
from tests.data.test_folder import encoded, make_folder, picture

LEFT_OUT = [".ipynb_checkpoints", ".thumbnails", ".Trash-1000", ".git", "__MACOSX", "@eaDir", "#recycle", "lost+found"]
LEFT_OUT += ["$RECYCLE.BIN", "System Volume Information", "@Recycle", "thumbs.db"]


def opened(path: Path, **settings: object) -> PictureFiles:
    data = open_data(FolderSettings(path=str(path), **settings))  # type: ignore[arg-type]
    assert isinstance(data, PictureFiles)
    return data


@pytest.mark.parametrize("name", LEFT_OUT)
def test_folders_of_tools_are_no_classes(tmp_path: Path, name: str) -> None:
    root = make_folder(tmp_path / "d")
    for folder in (root / name, root / "cat" / name / "deep"):
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(encoded(picture(0), "png"))
    data = opened(root)
    assert (data.class_names, len(data)) == (["cat", "dog", "emu"], 9)


def test_hidden_is_what_lies_inside_and_not_where_the_data_lie(tmp_path: Path) -> None:
    assert opened(make_folder(tmp_path / ".cache/@eaDir/d")).class_names == ["cat", "dog", "emu"]
    assert is_picture("../x/1.png") and not is_picture("x/.1.png") and not is_picture("x/1.txt")
    (tmp_path / "only/.hidden").mkdir(parents=True)
    (tmp_path / "only/.hidden/0.png").write_bytes(b"")
    with pytest.raises(UserError, match="holds no image") as refused:
        open_images(tmp_path / "only")
    assert "hidden" in str(refused.value.hint)


def test_links_are_followed(tmp_path: Path) -> None:
    root, other = make_folder(tmp_path / "d"), make_folder(tmp_path / "other")
    (root / "fox").symlink_to(other / "cat")  # a class
    (root / "dog/9.png").symlink_to(other / "cat/0.png")  # a picture
    (tmp_path / "whole").symlink_to(root)
    for path in (root, tmp_path / "whole"):
        data = opened(path)
        assert (data.class_names, len(data)) == (["cat", "dog", "emu", "fox"], 13)


def test_circles_of_links_end(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d")
    (root / "cat/up").symlink_to(root)
    (root / "dog/self").symlink_to(root / "dog")
    (root / "cat/there").symlink_to(root / "dog")
    (root / "dog/back").symlink_to(root / "cat")
    (root / "emu/round.png").symlink_to(root / "emu/round.png")
    found = sorted(walk(root))
    assert {"cat/0.png", "cat/there/0.webp", "dog/back/0.png"} <= set(found) and len(found) < 40


def test_a_class_whose_link_is_broken_is_missed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d")
    (root / "fox").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"fox is a link to .*gone, which does not exist"):
        open_images(root)


def test_pipes_devices_and_broken_links_are_named_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "d")
    os.mkfifo(root / "cat/pipe.png")
    (root / "cat/zero.png").symlink_to("/dev/zero")
    (root / "cat/gone.png").symlink_to("nowhere")
    monkeypatch.chdir(root / "cat")  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("talk.png")
        said = {bad.name: bad.reason for bad in opened(root).decode_all(2) if hasattr(bad, "reason")}
    kinds = {"pipe": "named pipe", "zero": "device", "gone": "a link to what does not exist", "talk": "socket"}
    assert said.keys() == {f"cat/{name}.png" for name in kinds}
    for name, kind in kinds.items():
        assert kind in said[f"cat/{name}.png"]
    for name in ("pipe.zip", "pipe.npz", "pipe.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="named pipe"):
            open_images(tmp_path / name)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, scan = make_folder(tmp_path / "d"), os.scandir

    def refusing(path: str | Path) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"dog cannot be listed: Permission denied"):
        open_images(root)


def test_names_that_are_not_utf8_can_be_said_and_stored(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d")
    os.rename(os.fsencode(root / "cat"), os.fsencode(root) + b"/caf\xe9")
    (root / "dog/0.webp").unlink()
    with open(os.fsencode(root) + b"/dog/\xff.png", "wb") as file:
        file.write(b"no picture")
    data = opened(root)
    assert data.class_names == ["caf\\udce9", "dog", "emu"]
    assert [bad.name for bad in data.decode_all(1) if hasattr(bad, "reason")] == ["dog/\\udcff.png"]
    assert "\n".join(data.names).encode()


@pytest.mark.parametrize(
    ("names", "keep", "common"),
    [
        (["p/cat/1", "p/dog/2"], 1, "p/"),
        (["p/q/cat/1", "p/q/dog/2"], 1, "p/q/"),
        (["cat/1", "cat/2"], 1, ""),
        (["cat/1", "dog/2"], 1, ""),
        (["p/cat/1", "p/2"], 1, ""),
        (["p/cat/1", "p/2"], 0, "p/"),
        (["p/cat/1", "pp/cat/2"], 0, ""),
        (["a"], 0, ""),
    ],
)
def test_the_folder_that_all_are_in(names: list[str], keep: int, common: str) -> None:
    assert common_folder(names, keep=keep) == common
