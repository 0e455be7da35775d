"""Rules place what they were made from where it is, and the unseen by the same measure."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from msdcli import partition as p
from msdcli import routing
from msdcli.errors import UserError
from msdcli.partition import Partition
from msdcli.routing import Centres, Hash, Quadrants


def vectors(num: int, width: int = 6, seed: int = 0) -> np.ndarray:
    """Embeddings whose components depend on each other, far from the origin."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(num, width)) * np.linspace(3, 0.3, width)
    z[:, 1] += 0.3 * z[:, 0] ** 2
    return 40 + z @ np.linalg.qr(rng.normal(size=(width, width)))[0]


@pytest.mark.parametrize("num_parts", [2, 4, 8])
@pytest.mark.parametrize("num", [64, 1001])
def test_quadrants_are_equal_and_place_their_own(num: int, num_parts: int) -> None:
    x = vectors(num)
    rule = Quadrants.fit(x, num_parts)
    made = p.of_rule(rule, num_parts, [""] * num, x, "quadrants")
    assert max(map(len, made.parts)) - min(map(len, made.parts)) <= 1
    again = routing.from_json(json.loads(json.dumps(rule.to_json())))
    assert again.place([""] * num, x).owner.tolist() == made.owner


@pytest.mark.parametrize("num_parts", [1, 3, 6])
def test_quadrants_are_powers_of_two(num_parts: int) -> None:
    with pytest.raises(UserError, match="halves of halves"):
        Quadrants.fit(vectors(20), num_parts)


def test_quadrants_look_along_the_directions_of_most_variance() -> None:
    rng = np.random.default_rng(1)
    signs = rng.choice([-1.0, 1.0], size=(400, 2))
    x = np.concatenate([signs * [9, 5] + rng.normal(0, 0.2, (400, 2)), rng.normal(0, 1, (400, 3))], axis=1)
    owner = Quadrants.fit(x, 4).place([""] * 400, x).owner
    # Signs are drawn, not balanced, so the medians may cut a group; all others are whole.
    purity = [np.unique(signs[owner == k], axis=0, return_counts=True)[1].max() / (owner == k).sum() for k in range(4)]
    assert min(purity) > 0.85


@pytest.mark.parametrize("make", [lambda x: Quadrants.fit(x, 4), lambda x: p.kmeans(x, 3).rule], ids=["quad", "means"])
def test_the_margin_is_the_distance_to_the_border(make: object) -> None:
    x = vectors(300)
    rule = make(x)
    placed = rule.place([""] * 300, x)
    rng = np.random.default_rng(2)
    for share, leaves in ((0.98, False), (1.02, True)):
        left = np.zeros(300, bool)
        steps = rng.normal(size=(400, *x.shape))
        steps[:30] = directions(rule, placed)
        steps /= np.linalg.norm(steps, axis=2, keepdims=True)
        for step in steps:
            moved = rule.place([""] * 300, x + share * placed.margin[:, None] * step).owner
            left |= moved != placed.owner
            if leaves and step is steps[0]:
                assert (moved == placed.second).all(), "straight on lies the second choice"
        assert left.all() if leaves else not left.any()


def directions(rule: object, placed: routing.Placed) -> np.ndarray:
    """The straight ways to the nearest border."""
    if isinstance(rule, Centres):
        return rule.centres[placed.second] - rule.centres[placed.owner]
    changed = placed.owner ^ placed.second
    # The highest bit that differs is the level that was crossed.
    level = len(rule.thresholds) - 1 - np.floor(np.log2(changed)).astype(int)
    up = (placed.second >> (len(rule.thresholds) - 1 - level)) & 1
    return rule.components[level] * np.where(up, 1.0, -1.0)[:, None]


@pytest.mark.parametrize(("num", "num_parts"), [(12, 3), (100, 4), (157, 7), (40, 2), (5, 5)])
def test_balanced_assignment_costs_as_little_as_scipys(num: int, num_parts: int) -> None:
    x = vectors(num, seed=num)
    cost = routing.squared_distances(x, x[:num_parts] * 0.7 + 12)
    capacity = p.sizes(num, num_parts)
    owner, prices = routing.balanced(cost, capacity)
    assert np.bincount(owner, minlength=num_parts).tolist() == capacity
    columns = np.repeat(np.arange(num_parts), capacity)
    rows, places = linear_sum_assignment(cost[:, columns])
    assert cost[np.arange(num), owner].sum() == pytest.approx(cost[rows, columns[places]].sum(), rel=1e-9)
    assert ((cost + prices).argmin(1) == owner).all(), "prices explain the assignment"


def test_kmeans_stores_a_rule_that_places_its_own(tmp_path: object) -> None:
    x = np.concatenate([vectors(400), vectors(111) + 2])
    made = p.kmeans(x, 4)
    made.save(tmp_path / "partition.json")
    loaded = Partition.load(tmp_path / "partition.json")
    assert loaded.rule.place([""] * 511, x).owner.tolist() == made.owner
    assert sorted(map(len, made.parts)) == [127, 128, 128, 128]


def test_many_vectors_are_balanced(tmp_path: object) -> None:
    x = np.concatenate([vectors(9_000, 16), vectors(2_003, 16, seed=1) * 1.5]).astype(np.float16)
    made = p.kmeans(x, 4)
    assert max(map(len, made.parts)) - min(map(len, made.parts)) <= 1
    assert made.rule.place([""] * len(x), x).owner.tolist() == made.owner


def test_a_hash_is_the_same_everywhere_and_nearly_even() -> None:
    prompts = [f"a photo of thing number {i}" for i in range(4000)]
    owner = Hash(4).place(prompts, None).owner
    assert owner[:12].tolist() == [2, 0, 1, 0, 2, 2, 2, 0, 1, 2, 0, 3]
    assert np.bincount(owner).min() > 900
    assert Hash(4, seed=1).place(prompts, None).owner.tolist() != owner.tolist()


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "hash"},
        {"kind": "magic"},
        {"kind": "centres", "centres": [[1.0, 2.0]], "prices": [1.0, 2.0]},
        {"kind": "quadrants", "mean": [0.0], "components": [[1.0, 2.0]], "thresholds": [[0.0]]},
        5,
    ],
)
def test_a_damaged_rule_is_refused(tmp_path: object, rule: object) -> None:
    path = tmp_path / "partition.json"
    path.write_text(json.dumps({"parts": [[0]], "num_conditions": 1, "method": "x", "rule": rule}))
    with pytest.raises(UserError, match="is not a partition|is no partition"):
        Partition.load(path)
