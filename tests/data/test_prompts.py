"""Prompts from files of every kind; what is no prompt is refused by file and line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msdcli.data import prompts
from msdcli.data.base import fingerprint
from msdcli.errors import UserError
from msdcli.recipe.data import PromptsSettings


def read(path: Path, **keys: object) -> prompts.Captions:
    return prompts.read(PromptsSettings(path=str(path), **keys))


def test_lines_jsonl_lists_and_coco_give_the_same(tmp_path: Path) -> None:
    texts = ["a red fox", "the sea", "a red fox", 'with "quotes", commas\u2028and more', "日本語"]
    (tmp_path / "a.txt").write_text("\ufeff" + "\r\n".join(texts) + "\n\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"caption": t, "file_name": "x.png"}) + "\n" for t in texts))
    (tmp_path / "strings.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    (tmp_path / "a.json").write_text(json.dumps(texts))
    coco = {"annotations": [{"image_id": 1, "caption": t} for t in texts], "images": [{"id": 1, "file_name": "x.png"}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    found = [read(tmp_path / name) for name in ("a.txt", "a.jsonl", "strings.jsonl", "a.json", "coco.json")]
    wanted = [*dict.fromkeys(prompts.clean(t) for t in texts)]
    assert all((f.prompts, f.numbers) == (wanted, [0, 1, 0, 2, 3]) for f in found)
    assert found[0].empty == 1 and found[0].repeated == 1
    assert found[1].files == found[4].files == ["x.png"] * 5


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"caption": "x"}\n{"caption": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"title": "x"}\n', "a.jsonl:1: no text under caption or text or prompt"),
        ("a.jsonl", b'{"caption": 5}\n', "a.jsonl:1: no text"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: no text"),
        ("a.txt", b"good\n\xe9t\xe9\n", "a.txt:2: not UTF-8"),
        ("a.json", b"{}", "neither a list of prompts nor"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.json", b'{"annotations": [{"caption": "x"}]}', "no file of COCO captions"),
        ("a.json", b"\xff\xfe", "not UTF-8"),
        ("a.json", b"[3]", "entry 0: no text"),
        ("a.txt", b"", "holds no prompt"),
    ],
)
def test_what_is_no_prompt_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert said in caught.value.message


def test_another_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"caption": "no", "TEXT": "yes", "url": "u.png"}\n')
    found = read(tmp_path / "a.jsonl", column="TEXT", image_column="url")
    assert (found.prompts, found.files) == (["yes"], ["u.png"])
    with pytest.raises(UserError, match="names no picture"):
        read(tmp_path / "a.jsonl", images="folder", column="TEXT")


def test_the_fingerprint_follows_texts_and_rows() -> None:
    def of(*texts: str) -> str:
        rows = ((t, None) for t in texts)
        return fingerprint(prompts.Prompts(prompts.collect(rows, Path("x")), (4, 8, 8)))

    assert of("a", "b") == of(" a ", "b") != of("a", "c")
    assert len({of("a", "b"), of("a", "b", "b"), of("b", "a")}) == 3


def test_rows_find_their_pictures_by_name() -> None:
    class Pixels:
        shape = (1, 2, 2)

        def images(self, numbers: list[int]) -> torch.Tensor:
            return torch.tensor(numbers).float().reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)

    rows = [("b", "b.png"), ("a", "train/a.png"), ("again", "b.png"), ("gone", "c.png")]
    captions = prompts.collect(iter(rows), Path("x"))
    names = ["train/a.png", "train/b.png"]
    with pytest.raises(UserError, match=r"1 pictures that the rows name are not there: c\.png"):
        prompts.with_pictures(captions, Pixels(), names, skip=False, where="x")
    data = prompts.with_pictures(captions, Pixels(), names, skip=True, where="x")
    assert data.prompts == ["b", "a", "again"]
    assert data.images(range(3))[:, 0, 0, 0].tolist() == [1, 0, 1]
    twice = [*names, "val/b.png"]
    with pytest.raises(UserError, match=r"b\.png is the name of several pictures"):
        prompts.with_pictures(captions, Pixels(), twice, skip=True, where="x")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=80), st.sampled_from(["x.txt", "x.jsonl", "x.json"]))
def test_any_bytes_are_prompts_or_a_user_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(raw)
    try:
        found = read(path)
    except UserError:
        return
    assert found.prompts and all(p == prompts.clean(p) != "" for p in found.prompts)


def test_what_is_too_long_or_binary_is_refused_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sparse.txt").write_bytes(b"a fox\n")
    with open(tmp_path / "sparse.txt", "ab") as file:
        file.truncate(2**36)  # zeros, which take no space
    monkeypatch.setattr(prompts, "MAX_JSON", 100)
    for name, content, said in (
        ("sparse.txt", None, r"sparse\.txt:2: the line has more than 1,048,576 bytes"),
        ("nul.txt", b"a\0f\0o\0x\0\n", "holds a NUL"),
        ("nul.jsonl", b'"a"\n"a\0b"\n', r"nul\.jsonl:2: not text, it holds a NUL"),
        ("half.jsonl", b'"a\\ud800b"\n', "half a character"),
        ("long.txt", b"a fox, " * 5000, "34,999 characters, the limit is 20,000"),
        ("large.json", b'["' + b"x" * 100 + b'"]', "has 104 bytes, the limit is 100"),
        ("pointer.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of git-lfs"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=said):
            read(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="named pipe"):
        read(tmp_path / "pipe.txt")
