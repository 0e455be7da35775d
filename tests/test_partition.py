"""Partitions are disjoint, complete and balanced, or refused."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msdcli import partition as p
from msdcli.errors import UserError
from msdcli.partition import Partition
from msdcli.rundir import write_json

conditions = st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(conditions, st.integers(0, 3))
def test_parts_are_disjoint_complete_and_equal_to_one(sizes: tuple[int, int], seed: int) -> None:
    num, parts = sizes
    for partition in (p.consecutive(num, parts), p.shuffled(num, parts, seed=seed)):
        assert sorted(c for part in partition.parts for c in part) == list(range(num))
        lengths = [len(part) for part in partition.parts]
        assert max(lengths) - min(lengths) <= 1


@given(conditions, st.lists(st.integers(0, 59), max_size=30))
def test_routing_serves_every_request_by_its_owner(sizes: tuple[int, int], wanted: list[int]) -> None:
    num, parts = sizes
    partition = p.shuffled(num, parts)
    wanted = [c % num for c in wanted]
    routed = partition.route(wanted)
    assert sorted(i for positions in routed.values() for i in positions) == list(range(len(wanted)))
    assert all(wanted[i] in partition.parts[k] for k, positions in routed.items() for i in positions)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([[0, 1], [1, 2]], "1 is in more than one part"),
        ([[0], [2]], "1 is in no part"),
        ([[0, 1, 2], []], "student 1 has no condition"),
        ([[0, 1, 2, 7]], "7 does not exist"),
    ],
)
def test_what_is_no_partition_is_refused(parts: list[list[int]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Partition(parts, 3, "explicit")


def test_more_students_than_conditions_are_refused() -> None:
    with pytest.raises(UserError, match="4 students for 3 conditions"):
        p.consecutive(3, 4)


def test_kmeans_finds_clusters_and_keeps_parts_equal() -> None:
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(0, 0.1, (4, 3)) + centre for centre in ([0, 0, 9], [9, 0, 0], [0, 9, 0])])
    order = rng.permutation(12)
    parts = p.kmeans(vectors[order], 3).parts
    assert {frozenset(order[part] // 4) for part in map(np.array, parts)} == {frozenset({k}) for k in range(3)}
    lopsided = np.concatenate([rng.normal(0, 0.1, (10, 3)), rng.normal(5, 0.1, (2, 3))])
    assert sorted(map(len, p.kmeans(lopsided, 3).parts)) == [4, 4, 4]


figures = st.lists(st.floats(0, 1e6), min_size=1, max_size=40).flatmap(
    lambda d: st.tuples(st.just(d), st.integers(1, len(d)))
)


@given(figures)
def test_hard_classes_are_shared_out(drawn: tuple[list[float], int]) -> None:
    distances, parts = drawn
    found = p.by_difficulty(distances, parts)
    assert sorted(map(len, found.parts), reverse=True) == p.sizes(len(distances), parts)
    assert found == p.by_difficulty(distances, parts), "the same again"
    if len(distances) % parts == 0:  # an exchange with the least part would not bring two totals closer together
        total = [sum(distances[c] for c in part) for part in found.parts]
        apart, fine = max(total) - min(total), 1e-5 * max(distances)
        hard, easy = found.parts[total.index(max(total))], found.parts[total.index(min(total))]
        less = [distances[i] - distances[j] for i in hard for j in easy]
        assert all(abs(apart - 2 * d) >= apart - fine * len(distances) for d in less)


def test_planted_difficulties_come_out_level() -> None:
    hard = [9.0, 8, 7, 6, 5, 4, 3, 2, 1, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    total = [sum(hard[c] for c in part) for part in p.by_difficulty(hard, 3).parts]
    assert total == [30, 30, 30]
    assert p.by_difficulty([1.0] * 6, 3).parts == [[0, 3], [1, 4], [2, 5]], "ties go to the lower number"
    assert p.by_difficulty([100.0, 1, 1, 1], 2).parts[0][0] == 0
    one_each = p.by_difficulty([3.0, 1, 2], 3)
    assert one_each.parts == [[0], [1], [2]]


@given(figures)
def test_sorted_parts_are_cut_from_the_easiest_to_the_hardest(drawn: tuple[list[float], int]) -> None:
    distances, parts = drawn
    found, fine = p.sorted_by_difficulty(distances, parts), 1e-6 * max(distances)
    assert [*map(len, found.parts)] == p.sizes(len(distances), parts)
    for easy, hard in itertools.pairwise(found.parts):
        assert max(distances[c] for c in easy) <= min(distances[c] for c in hard) + fine
    assert p.sorted_by_difficulty([3.0, 1, 2, 1], 2).parts == [[1, 3], [0, 2]]
    assert p.sorted_by_difficulty([1.0] * 4, 2).parts == [[0, 1], [2, 3]], "ties go to the lower number"


@pytest.mark.parametrize("shapes", [(4, 4, 4), (5, 5, 5, 5, 5), (3, 3, 2)])
def test_planted_confusions_are_found(shapes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat(np.arange(len(shapes)), shapes))
    mixed = rng.uniform(0, 0.05, (len(group), len(group))) + 0.2 * (group[:, None] == group)
    found = p.by_confusion(mixed, len(shapes))
    assert {frozenset(part) for part in found.parts} == {frozenset(np.flatnonzero(group == k)) for k in set(group)}
    assert found == p.by_confusion(mixed, len(shapes))
    assert p.by_confusion(mixed + mixed.T, len(shapes)) == found, "one direction is as good as the other"


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.integers(0, 5))
def test_confusion_is_as_good_as_any_exchange(drawn: tuple[int, int], seed: int) -> None:
    num, parts = drawn
    mixed = np.random.default_rng(seed).uniform(size=(num, num)) ** 3
    mixed[0] = np.nan  # a class of which no image was held out
    found = p.by_confusion(mixed, parts)
    assert sorted(map(len, found.parts), reverse=True) == p.sizes(num, parts)
    alike = np.nan_to_num(mixed) + np.nan_to_num(mixed).T
    np.fill_diagonal(alike, 0)
    owner = np.array(found.owner)

    def inside(owner: np.ndarray) -> float:
        return float(alike[owner[:, None] == owner].sum())

    for i in range(num):
        for j in range(i):
            other = owner.copy()
            other[[i, j]] = other[[j, i]]
            assert inside(other) <= inside(owner) + 1e-4


def test_equal_confusions_are_decided_by_number() -> None:
    assert p.by_confusion(np.ones((6, 6)), 3).parts == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(UserError, match="at most 4,096"):
        p.by_confusion(np.broadcast_to(np.float32(0), (5000, 5000)), 2)


def test_file_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    p.shuffled(10, 3).save(path)
    assert Partition.load(path) == p.shuffled(10, 3)
    why = replace(p.by_difficulty([1.0, 2.0], 2), evidence={"metric": "fd", "distances": [1.0, 2.0]})
    why.save(path)
    assert Partition.load(path) == why
    for evidence in ({"distances": ["x"]}, {"mixed_with": [[{"number": -1, "share": 0.1}]]}, 5):
        write_json(path, {"method": "x", "num_conditions": 1, "parts": [[0]], "evidence": evidence})
        with pytest.raises(UserError, match="evidence"):
            Partition.load(path)
    for text in ("{", "[]", '{"parts": 5}', '{"parts": [["a"]], "num_conditions": 1, "method": "x"}'):
        path.write_text(text)
        with pytest.raises(UserError):
            Partition.load(path)


SORTED_AS_TEXT = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2 ...: folders


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0-2", ["0", "1", "2"]),
        ("0,1,2", ["0", "1", "2"]),
        ("10", ["10"]),
        ("9-11, 3", ["9", "10", "11", "3"]),
        ("02", ["2"]),
    ],
)
def test_numbers_mean_names_where_all_names_are_numbers(text: str, names: list[str]) -> None:
    assert [SORTED_AS_TEXT[c] for c in p.parse_classes(text, SORTED_AS_TEXT)] == names
    assert [SORTED_AS_TEXT[c] for c in p.class_numbers(list(names), SORTED_AS_TEXT)] == names


def test_other_classes_are_numbered_in_order() -> None:
    names = ["cat", "7", "dog", "a-b", "3-4"]
    assert p.parse_classes("cat, 7, 2, a-b, 0-2, 3-4", names) == [0, 1, 2, 3, 0, 1, 2, 4], "a name that exists wins"
    assert p.parse_classes("5,2-4") == [5, 2, 3, 4], "labels of files have no names"
    assert p.class_numbers([2, "2", "dog"], names) == [2, 2, 2]
    gaps = ["5", "10", "7"]
    assert p.parse_classes("5-10", gaps) == [0, 2, 1], "those between that there are"


@pytest.mark.parametrize(
    ("text", "names", "said"),
    [
        ("12", SORTED_AS_TEXT, "class '12' does not exist: there are 0, 1, 10"),
        ("0-12", SORTED_AS_TEXT, "class '12' does not exist"),
        ("1", ["0", "2"], "class '1' does not exist"),
        ("4-2", ["a", "b"], "class '4-2' does not exist"),
        ("x", ["a", "b"], "class 'x' does not exist"),
        ("", ["a"], "class '' does not exist"),
        ("9" * 5000, ["a"], "does not exist"),
        ("0-99999999999", (), "limit"),
        ("\u0663", SORTED_AS_TEXT, "does not exist"),
    ],
)
def test_classes_that_do_not_exist(text: str, names: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        p.parse_classes(text, names)


def test_parts_of_a_recipe_mean_names_too() -> None:
    parts = p.named_parts([[0, 1, 2], [11, 3, 4, 5, 6, 7, 8, 9, 10]], SORTED_AS_TEXT)
    assert [SORTED_AS_TEXT[c] for c in parts[0]] == ["0", "1", "2"]
    assert Partition(parts, 12, "explicit").owner[SORTED_AS_TEXT.index("10")] == 1
    assert p.named_parts([[1, 0], [2]], ["cat", "dog", "7"]) == [[0, 1], [2]]
    with pytest.raises(UserError, match="class '12' does not exist"):
        p.named_parts([[12]], SORTED_AS_TEXT)
