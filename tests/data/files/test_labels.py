"""Classes from EDM's dataset.json: one integer each, or a refusal that names the picture and what is there."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msdcli.data.files.labels import checked, empty_classes, from_json
from msdcli.errors import UserError

NAMES = ["a/0.png", "a/1.png"]


def read(labels: Any, **keys: str) -> list[int] | None:
    found = from_json(json.dumps({"labels": labels}).encode(), NAMES, "d.zip: dataset.json", **keys)
    return None if found is None else found.tolist()


def test_lists_objects_and_the_names_of_other_systems() -> None:
    assert read([["a/1.png", 4], ["a/0.png", 2], ["b.png", 9]]) == [2, 4]
    assert read({"a/0.png": 2, "a/1.png": 4}) == [2, 4]
    assert read([["a\\0.png", 2], ["./a/1.png", 4]]) == [2, 4]
    assert read([["0.png", 2], ["1.png", 4]], inside="a/") == [2, 4]
    assert read(None) is None


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (0.5, "the class 0.5"),
        (1.0, "the class 1.0"),
        (True, "the class True"),
        ("1", "the class '1'"),
        ([0, 1], r"the class \[0, 1\]"),
        ({"id": 1}, "the class {'id': 1}"),
        (None, "no class"),
        (2**63, "the class 9223372036854775808"),
        (10**400, "the class 1000"),
        ([[[[[[[[1]]]]]]]], "the class"),
    ],
)
def test_what_is_no_integer_is_shown(label: Any, said: str) -> None:
    with pytest.raises(UserError, match=rf"^d\.zip: dataset\.json gives a/1\.png {said}") as refused:
        read([["a/0.png", 0], ["a/1.png", label]])
    assert len(refused.value.message) < 200


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"[]", "holds no `labels`"),
        (b'{"labels": 3}', "is 3, not a list"),
        (b'{"labels": [3]}', "3 is not a name with its class"),
        (b'{"labels": [["a/0.png", 1, 2]]}', "is not a name with its class"),
        (b'{"labels": [["a/0.png", 1], ["a/1.png", 0], ["a/0.png", 2]]}', "gives a/0.png two classes"),
        (b'{"labels": [["a/0.png", 1]]}', "gives a/1.png no class"),
    ],
)
def test_what_is_no_list_of_classes(content: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        from_json(content, NAMES, "dataset.json")


def test_the_largest_class_is_bounded_by_the_pictures() -> None:
    def check(*labels: int) -> np.ndarray:
        return checked(np.array(labels), lambda number: f"image {number}", "d.npz")

    assert check(0, 99_999).tolist() == [0, 99_999]
    with pytest.raises(UserError, match=r"^d\.npz: image 1 has the class 1000000000; of 2 pictures .* below 100,000"):
        check(0, 10**9)
    with pytest.raises(UserError, match=r"^d\.npz: image 0 has the class -1, which is negative"):
        check(-1, 3)


def test_gaps_are_found() -> None:
    assert empty_classes(np.array([1, 3, 3]), 5) == [0, 2, 4]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)
names = st.sampled_from(NAMES) | st.text(max_size=6)
listed = st.lists(st.tuples(names, json_values | st.integers(0, 9)) | json_values, max_size=6)


@settings(max_examples=300, deadline=None)
@given(tree=json_values | st.fixed_dictionaries({"labels": listed | json_values}))
def test_any_json_gives_classes_or_a_refusal(tree: Any) -> None:
    with contextlib.suppress(UserError):
        found = from_json(json.dumps(tree).encode(), NAMES, "dataset.json")
        assert found is None or (found.dtype == np.int64 and found.shape == (2,))


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60))
def test_any_bytes_give_a_refusal(content: bytes) -> None:
    with pytest.raises(UserError):
        from_json(b"{" + content, NAMES, "dataset.json")
