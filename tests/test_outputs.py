"""What msd wrote is replaced; what anybody else wrote stays, byte for byte."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from msdcli import outputs
from msdcli.engine import pictures, sample
from msdcli.engine.export import push
from msdcli.errors import UserError
from msdcli.rundir import link, write_json


def given(folder: Path, text: str = "first") -> Path:
    """A folder as an export leaves it: two files and a record that lists them."""
    with outputs.replacing(folder, outputs.check_folder(folder, "export of msd")) as place:
        (place / "students").mkdir()
        (place / "README.md").write_text(text)
        (place / "students" / f"{text}.bin").write_text(text)
        write_json(place / "export.json", outputs.with_files({"kind": "torch"}, place))
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_export_is_replaced_by_the_next_one(tmp_path: Path) -> None:
    given(tmp_path / "e"), given(tmp_path / "e", "second")
    assert sorted(everything(tmp_path / "e")) == ["README.md", "export.json", "students/second.bin"]
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_what_others_put_beside_it_stays(tmp_path: Path) -> None:
    folder = given(tmp_path / "e")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "notes.txt").write_text("mine")
    (folder / "students" / "mine.bin").write_text("mine")
    given(folder, "second")
    found = everything(folder)
    assert sorted(found) == [
        *(".git/HEAD", "README.md", "export.json", "notes.txt", "students/mine.bin", "students/second.bin"),
    ]
    assert outputs.listed(folder) is not None and found["README.md"] == b"second"


@pytest.mark.parametrize("what", ["changed", "record", "in the way", "folder", "no record", "list", "outside", "link"])
def test_what_is_not_msds_is_refused_and_left_alone(tmp_path: Path, what: str) -> None:
    folder = given(tmp_path / "e")
    record = folder / "export.json"
    if what == "changed":
        (folder / "README.md").write_text("corrected by hand")
    elif what == "record":
        record.write_text(record.read_text().replace("torch", "onnx"))
    elif what == "in the way":
        (folder / "students" / "second.bin").write_text("mine")
    elif what == "folder":
        (folder / "students" / "second.bin").mkdir()
        (folder / "students" / "second.bin" / "mine").write_text("mine")
    elif what == "no record":
        record.unlink()
    elif what == "list":
        record.write_text('{"mine": 1}')
    elif what == "outside":
        (tmp_path / "thesis.tex").write_text("years")
        said = {"kind": "torch", "files": {"../thesis.tex": outputs.file_hash(tmp_path / "thesis.tex")}}
        write_json(record, said | {"check": outputs.key(said)})
    elif what == "link":
        (folder / "README.md").rename(tmp_path / "elsewhere.md")
        (folder / "README.md").symlink_to(tmp_path / "elsewhere.md")
    before = everything(tmp_path)
    with pytest.raises(UserError, match="nothing was written"):
        given(folder, "second")
    assert everything(tmp_path) == before


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    given(tmp_path / "real")
    (tmp_path / "e").symlink_to("real")
    given(tmp_path / "e", "second")
    assert (tmp_path / "e").is_symlink() and (tmp_path / "real" / "README.md").read_text() == "second"


def test_a_pushed_repository_keeps_its_history_and_notes(tmp_path: Path) -> None:
    source, target = given(tmp_path / "e"), tmp_path / "repository"
    (source / "LICENSE").write_text("MIT")  # added by hand: it goes along, and is msd's there
    push.run(push.plan(source, str(target)))
    (target / ".git").mkdir()
    (target / ".git" / "HEAD").write_text("ref")
    (target / "notes.md").write_text("mine")
    given(source, "second")
    push.run(push.plan(source, str(target)))
    push.run(push.plan(source, str(target)))
    found = everything(target)
    assert found[".git/HEAD"] == b"ref" and found["notes.md"] == b"mine" and found["README.md"] == b"second"
    assert "LICENSE" in found and "students/first.bin" not in found
    (target / "README.md").write_text("corrected by hand")
    with pytest.raises(UserError, match=r"README\.md was changed"):
        push.plan(source, str(target))


def test_an_empty_repository_may_be_pushed_to_and_its_attributes_stay(tmp_path: Path) -> None:
    source, target = given(tmp_path / "e"), tmp_path / "clone"
    (target / ".git").mkdir(parents=True)
    (target / ".gitattributes").write_text("*.psd binary\n")
    with pytest.raises(UserError, match="lacks the lines for large files"):
        push.plan(source, str(target))
    lines = "*.psd binary\n" + push._attributes()
    (target / ".gitattributes").write_text(lines)
    push.run(push.plan(source, str(target)))
    assert (target / ".gitattributes").read_text() == lines and (target / "README.md").is_file()


# Single files, and folders of pictures.

IMAGES = torch.zeros(2, 3, 8, 8)


def wrote(kind: str, path: Path) -> None:
    """Write samples as `msd sample` does, after the check that it makes."""
    sample.check_target(path, kind)
    if kind == "grid":
        pictures.save_grid(path, [IMAGES])
    elif kind == "npz":
        pictures.save_npz(path, IMAGES, [0, 1])
    else:
        save = pictures.save_zip if kind == "zip" else pictures.save_pngs
        save(path, [(range(2), IMAGES)], pictures.labels_file([0, 1]))


@pytest.mark.parametrize("kind", ["grid", "npz", "zip", "png"])
def test_own_samples_are_written_anew(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"out{sample.SUFFIXES[kind]}"
    wrote(kind, path)
    wrote(kind, path)
    if kind == "npz":
        with np.load(path) as arrays:
            assert sorted(arrays.files) == ["images", "labels"]
    if kind == "zip":
        assert zipfile.ZipFile(path).testzip() is None


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["grid", "npz", "zip"])
@pytest.mark.parametrize("held", [b"thesis", picture(), b"PK\x05\x06" + bytes(18), b"<!doctype html>", b""])
def test_a_file_of_anybody_else_is_refused(tmp_path: Path, kind: str, held: bytes) -> None:
    path = tmp_path / "mine"
    path.write_bytes(held)
    with pytest.raises(UserError, match="nothing was written"):
        wrote(kind, path)
    assert path.read_bytes() == held


def test_samples_of_one_kind_do_not_replace_those_of_another(tmp_path: Path) -> None:
    wrote("zip", tmp_path / "a.zip")
    with pytest.raises(UserError, match="no png file that msd wrote"):
        wrote("grid", tmp_path / "a.zip")


def test_nothing_comes_among_the_records_of_a_run(tmp_path: Path) -> None:
    for name in ("recipe.yaml", "run.json"):
        (tmp_path / name).write_text("{}")
    for name in ("recipe.yaml", "students/0/0-dm/model.json", "metrics/fid.json"):
        with pytest.raises(UserError, match="among the records"):
            wrote("grid", tmp_path / name)
    wrote("grid", tmp_path / "mine.png")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "old.png").write_bytes(picture())  # of a version that left no mark
    wrote("grid", tmp_path / "samples" / "old.png")


def test_a_data_set_that_looks_like_samples_is_no_folder_of_samples(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "000000.png").write_bytes(picture())
    (folder / "dataset.json").write_text(json.dumps({"labels": [["000000.png", 0]]}))
    before = everything(folder)
    with pytest.raises(UserError, match="would be lost"):
        wrote("png", folder)
    assert everything(folder) == before
    wrote("png", tmp_path / "p")
    (tmp_path / "p" / "dataset.json").write_text('{"labels": []}')
    with pytest.raises(UserError, match=r"dataset\.json, which is no sample"):
        wrote("png", tmp_path / "p")


def test_tables_are_known_by_their_first_words(tmp_path: Path) -> None:
    (tmp_path / "table.md").write_text("|  | seeds | samples |\n|---|\n| a |\n")
    outputs.check_table(tmp_path / "table.md", "|  | seeds | samples")
    for text in ("# notes\n", "|  | seeds | samples |\n\nmy notes\n"):
        (tmp_path / "table.md").write_text(text)
        with pytest.raises(UserError, match="no table that msd wrote"):
            outputs.check_table(tmp_path / "table.md", "|  | seeds | samples")


def test_figures_of_earlier_versions_are_known_by_their_places(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{}")
    for name, held in (("curves.pdf", b"%PDF-1.4"), ("mine.pdf", b"%PDF-1.4")):
        (tmp_path / name).write_bytes(held)
    outputs.check_file(tmp_path / "curves.pdf", ".pdf")
    with pytest.raises(UserError):
        outputs.check_file(tmp_path / "mine.pdf", ".pdf")
    (tmp_path / "table.png").write_bytes(picture())
    with pytest.raises(UserError):
        outputs.check_drawn_table(tmp_path / "table.png")
    Figure(figsize=(1, 1)).savefig(tmp_path / "table.png")
    outputs.check_drawn_table(tmp_path / "table.png")


def test_names_of_samples_are_bounded(tmp_path: Path) -> None:
    many = sample.default_target(tmp_path, "grid", range(1000), 0, everything=False)
    other = sample.default_target(tmp_path, "grid", range(1, 1001), 0, everything=False)
    assert len(many.name) < 100 and many != other
    assert sample.default_target(tmp_path, "grid", [3, 7], 0, everything=False).name == "classes-3-7-seed0.png"


def test_linked_files_of_a_snapshot_are_given_on_as_files(tmp_path: Path) -> None:
    """As in the Hub's cache: relative links into a folder of blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "h").write_text("weights")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/h")
    link(snapshot, tmp_path / "run" / "teacher")
    place = tmp_path / "run" / "teacher" / "model.safetensors"
    assert not place.is_symlink() and place.read_text() == "weights"
