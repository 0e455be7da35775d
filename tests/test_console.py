"""What comes from other people's files is shown as text and steers no terminal."""

from __future__ import annotations

import json
import math

import pytest

from msdcli import console, recipe_yaml
from msdcli.engine.export.card import _plain
from msdcli.foreign import visible

HOSTILE = "\x1b]52;c;cm0gLXJm\x1b\\\x1b[31m\x9b31m\u202e\u2066\u200f\x07\r\x00\udcff"


@pytest.mark.parametrize("show", ["say", "tell", "fail", "table"])
def test_nothing_steers_the_terminal(show: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"cat{HOSTILE}[bold]"
    if show == "table":
        console.table(name, [name], [[name]])
    elif show == "fail":
        console.fail(name, name)
    else:
        getattr(console, show)(name)
    out = "".join(capsys.readouterr())
    assert "cat" in out and "[bold]" in out
    assert not set(out) & set(HOSTILE.replace("\\", "")) - set("]52;c;cm0gLXJm[31m")


def test_letters_of_every_script_stay() -> None:
    text = "naïve 猫 кот \t قط\nनमस्ते 👩\u200d🔬"
    assert console.plain(text) == text


def test_json_has_null_for_what_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": [math.nan, (math.inf, 1.5)], "b": "nan", "c": None})
    assert json.loads(capsys.readouterr().out) == {"a": [None, [None, 1.5]], "b": "nan", "c": None}


def test_a_recipe_is_printed_without_what_steers() -> None:
    tree = {"name": "a\u202eb\x1b", "note": "é"}
    text = recipe_yaml.dump(tree)
    assert not set(text) & {"\u202e", "\x1b"} and recipe_yaml.Document.parse(text, "x").tree == tree
    assert "é" in recipe_yaml.dump({"note": "é"})


def test_names_are_text_in_cards_and_pages() -> None:
    shown = _plain("<script>|a|`b`[c](d)\x1b\u202e")
    assert "<" not in shown and "\\|a\\|" in shown and "\\[c\\]" in shown and "\x1b" not in shown
    assert visible("a\x1b\u202eb é\xa0") == "a\ufffd\ufffdb é\xa0"
