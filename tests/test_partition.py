"""Partitions are disjoint, complete and balanced, or refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msdcli import partition as p
from msdcli.errors import UserError
from msdcli.partition import Partition

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


def test_file_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    p.shuffled(10, 3).save(path)
    assert Partition.load(path) == p.shuffled(10, 3)
    for text in ("{", "[]", '{"parts": 5}', '{"parts": [["a"]], "num_conditions": 1, "method": "x"}'):
        path.write_text(text)
        with pytest.raises(UserError):
            Partition.load(path)
