"""Who owns which condition: K disjoint parts that together are everything (MSD, arXiv 2410.23274, Section 4)."""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdcli import records, routing
from msdcli.errors import UserError, WrongValueError
from msdcli.routing import Rule
from msdcli.rundir import write_json
from msdcli.seeds import derive

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Partition:
    """`parts[k]` are the condition numbers of student k; `rule` places prompts that have no number. `evidence` is what
    was measured of the classes where that placed them, as in partition.json.

    UserError unless every condition has exactly one owner.
    """

    parts: list[list[int]]
    num_conditions: int
    method: str
    rule: Rule | None = None
    evidence: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        owners = Counter(c for part in self.parts for c in part)
        if twice := sorted(c for c, n in owners.items() if n > 1):
            raise UserError(f"partition: condition {_listed(twice)} is in more than one part")
        if outside := sorted(c for c in owners if not 0 <= c < self.num_conditions):
            raise UserError(
                f"partition: condition {_listed(outside)} does not exist: there are 0 to {self.num_conditions - 1}"
            )
        if len(owners) < self.num_conditions:  # counted: a file may claim any number of them
            missing = (c for c in range(self.num_conditions) if c not in owners)
            raise UserError(f"partition: condition {_listed([*itertools.islice(missing, 9)])} is in no part")
        if empty := [k for k, part in enumerate(self.parts) if not part]:
            raise UserError(f"partition: student {_listed(empty)} has no condition")

    def __repr__(self) -> str:
        sizes = ", ".join(str(len(part)) for part in self.parts[:10]) + (", ..." if len(self.parts) > 10 else "")
        return f"Partition({len(self.parts)} students by {self.method}: {sizes} of {self.num_conditions} conditions)"

    @functools.cached_property
    def owner(self) -> list[int]:
        """The student of each condition."""
        owner = [0] * self.num_conditions
        for k, part in enumerate(self.parts):
            for c in part:
                owner[c] = k
        return owner

    def route(self, conditions: Sequence[int]) -> dict[int, list[int]]:
        """Return, for every student that is needed, the positions in `conditions` that it serves."""
        owner, positions = self.owner, dict[int, list[int]]()
        for position, condition in enumerate(conditions):
            positions.setdefault(owner[condition], []).append(position)
        return positions

    def save(self, path: Path) -> None:
        stored = {"method": self.method, "num_conditions": self.num_conditions, "parts": self.parts}
        more = {"rule": None if self.rule is None else self.rule.to_json(), "evidence": self.evidence}
        write_json(path, stored | {name: value for name, value in more.items() if value is not None})

    @classmethod
    def load(cls, path: Path) -> Partition:
        """Read partition.json. UserError if it is missing, damaged or no partition."""
        stored = records.read(path, records.PartitionRecord, "partition")
        try:
            rule = routing.from_json(stored["rule"]) if "rule" in stored else None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a partition: rule: {error}") from None
        try:
            return cls(stored["parts"], stored["num_conditions"], stored["method"], rule, stored.get("evidence"))
        except UserError as error:
            raise UserError(f"{path}: {error.message}", hint="was it edited? bring it back as it was") from None


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def sizes(num_conditions: int, num_parts: int) -> list[int]:
    """Sizes of parts that differ by one at most, larger ones first. UserError for more parts than conditions."""
    if num_parts > num_conditions:
        raise UserError(f"partition: {num_parts} students for {num_conditions} conditions: somebody would have none")
    whole, rest = divmod(num_conditions, num_parts)
    return [whole + (k < rest) for k in range(num_parts)]


def consecutive(num_conditions: int, num_parts: int) -> Partition:
    """Neighbouring condition numbers together (the paper's choice for ImageNet)."""
    return _cut(range(num_conditions), num_parts, "consecutive")


def shuffled(num_conditions: int, num_parts: int, *, seed: int = 0) -> Partition:
    """Equal parts at random: the baseline for any cleverer choice."""
    order = list(range(num_conditions))
    random.Random(derive("partition", seed)).shuffle(order)
    return _cut(order, num_parts, "random")


def _cut(order: Sequence[int], num_parts: int, method: str) -> Partition:
    parts, start = [], 0
    for size in sizes(len(order), num_parts):
        parts.append(sorted(order[start : start + size]))
        start += size
    return Partition(parts, len(order), method)


def of_rule(rule: Rule, num_parts: int, prompts: Sequence[str], vectors: np.ndarray | None, method: str) -> Partition:
    """The partition that a rule makes of the prompts, numbered in order."""
    owner = rule.place(prompts, vectors).owner
    return Partition([(owner == k).nonzero()[0].tolist() for k in range(num_parts)], len(prompts), method, rule)


START = 10_000  # vectors that the first centres are found from


def kmeans(vectors: np.ndarray, num_parts: int, *, seed: int = 0) -> Partition:
    """Balanced k-means on one vector per condition [conditions, dimensions]: alike inside, equal in size.

    k-means++ starts the centres; then conditions are assigned to centres (each has as many as its part is large) at
    the least total squared distance, and centres move to their means, until nothing changes.
    """
    import numpy as np
    from sklearn.cluster import KMeans

    num = len(vectors)
    capacity = sizes(num, num_parts)
    some = np.random.default_rng(derive("kmeans", seed)).permutation(num)[:START] if num > START else slice(None)
    start = KMeans(num_parts, n_init=10, random_state=derive("kmeans", seed) % 2**32).fit(vectors[some])
    centres, owner, prices = start.cluster_centers_.astype(np.float64), np.full(num, -1), None
    for _ in range(100):
        chosen, prices = routing.balanced(routing.squared_distances(vectors, centres), capacity, prices)
        changed, owner = int((chosen != owner).sum()), chosen
        if changed <= num // START:  # of very many, a few that go back and forth do not matter
            break
        used = centres
        centres = np.stack([np.asarray(vectors[owner == k], np.float64).mean(0) for k in range(num_parts)])
    else:
        centres = used  # those that the last assignment was made with
    assert prices is not None
    order = sorted(range(num_parts), key=lambda k: int(np.flatnonzero(owner == k)[0]))
    parts = [np.flatnonzero(owner == k).tolist() for k in order]
    return Partition(parts, num, "kmeans", routing.Centres(centres[order], prices[order]))


FINE = 10**6  # figures are rounded to so many parts of the largest: sums are exact, ties the same on every machine


def _whole_numbers(figures: np.ndarray) -> np.ndarray:
    """Figures that are not negative as whole numbers, the largest one `FINE`."""
    import numpy as np

    found = np.clip(np.nan_to_num(np.asarray(figures, np.float64)), 0, None)
    return np.rint(found * (FINE / max(float(found.max()), 1e-300))).astype(np.int64)


def by_difficulty(distances: Sequence[float], num_parts: int) -> Partition:
    """Parts of equal size, and of equal total distance as far as that goes: every student gets hard and easy classes.

    The hardest class that is left goes to the part with the least total that has room (longest processing time first);
    then the parts of the largest and of the least total exchange the two classes that even them out the most, as long
    as any do. Ties go to the lower number.
    """
    import numpy as np

    hard, capacity = _whole_numbers(np.array(distances)), sizes(len(distances), num_parts)
    owner, total, room = np.zeros(len(hard), np.int64), np.zeros(num_parts, np.int64), np.array(capacity)
    for c in np.argsort(-hard, kind="stable"):
        k = int(np.where(room > 0, total, np.iinfo(np.int64).max).argmin())
        owner[c], total[k], room[k] = k, total[k] + hard[c], room[k] - 1
    while True:
        high, low = int(total.argmax()), int(total.argmin())
        mine, theirs = np.flatnonzero(owner == high), np.flatnonzero(owner == low)
        less = hard[mine][:, None] - hard[theirs]  # of the largest total, where the two change places
        apart = np.abs(total[high] - total[low] - 2 * less)
        i, j = np.unravel_index(int(apart.argmin()), apart.shape)
        if apart[i, j] >= total[high] - total[low]:
            return _by_owner(owner, num_parts, "difficulty")
        owner[mine[i]], owner[theirs[j]] = low, high
        total[high], total[low] = total[high] - less[i, j], total[low] + less[i, j]


def sorted_by_difficulty(distances: Sequence[float], num_parts: int) -> Partition:
    """Parts of equal size, the first one of the classes with the least distances, the last one of those with the
    largest: for students that grow with what they have to know. Ties go to the lower number.
    """
    import numpy as np

    return _cut(np.argsort(_whole_numbers(np.array(distances)), kind="stable").tolist(), num_parts, "difficulty")


MOST_CONFUSED = 4096  # classes: each is compared with each
RANDOM_STARTS = 4


def by_confusion(mixed: np.ndarray, num_parts: int, *, seed: int = 0) -> Partition:
    """Parts of equal size with as much confusion inside them as can be found: alike classes go to one student.

    `mixed` [classes, classes] is how much class i is taken for class j. From several starts (parts that grow by the
    class that they are mixed up with the most, consecutive ones, random ones) the two classes change places that gain
    the most, as long as any do (Kernighan and Lin's exchange); the best end counts. Ties go to the lower number.
    """
    import numpy as np

    num, capacity = len(mixed), sizes(len(mixed), num_parts)
    if num > MOST_CONFUSED:
        raise UserError(f"partition.method confusion compares every class with every other: at most {MOST_CONFUSED:,}")
    alike = np.nan_to_num(np.asarray(mixed, np.float64))
    np.fill_diagonal(alike, 0)
    alike = _whole_numbers(alike + alike.T)
    in_order = np.repeat(np.arange(num_parts), capacity)
    random_ = [np.random.default_rng(derive("confusion", seed, i)).permutation(in_order) for i in range(RANDOM_STARTS)]
    ends = [_exchanged(alike, owner, num_parts) for owner in (_grown(alike, capacity), in_order, *random_)]
    inside = [int(alike[owner[:, None] == owner].sum()) for owner in ends]
    return _by_owner(ends[inside.index(max(inside))], num_parts, "confusion")


def _grown(alike: np.ndarray, capacity: Sequence[int]) -> np.ndarray:
    """Owners of classes: a part begins with the two that are mixed up the most, and grows by what it is mixed up with
    the most.
    """
    import numpy as np

    free, owner = np.ones(len(alike), bool), np.zeros(len(alike), np.int64)
    for k, size in enumerate(capacity):
        pull = np.where(free, alike, 0).max(1)  # to an empty part: that of the best partner
        for place in range(size):
            c = int(np.where(free, pull, -1).argmax())
            pull = alike[c] + (pull if place else 0)
            owner[c], free[c] = k, False
    return owner


def _exchanged(alike: np.ndarray, owner: np.ndarray, num_parts: int) -> np.ndarray:
    """Owners after the best exchanges of two classes, until none gains anything."""
    import numpy as np

    owner, num = owner.copy(), len(alike)
    pull = np.stack([alike[:, owner == k].sum(1) for k in range(num_parts)], axis=1)  # of part k on class i
    while True:
        more = pull[:, owner] - pull[np.arange(num), owner][:, None]  # class i in the place of class j
        gain = more + more.T - 2 * alike
        i, j = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[i, j] <= 0:
            return owner
        a, b = owner[i], owner[j]
        pull[:, a] += alike[:, j] - alike[:, i]
        pull[:, b] += alike[:, i] - alike[:, j]
        owner[i], owner[j] = b, a


def _by_owner(owner: np.ndarray, num_parts: int, method: str) -> Partition:
    """The partition of these owners, its parts in the order of their first classes."""
    parts = sorted((owner == k).nonzero()[0].tolist() for k in range(num_parts))
    return Partition(parts, len(owner), method)


def parse_classes(text: str, class_names: Sequence[str] = ()) -> list[int]:
    """Return the class numbers in `3,7,10-19,cat`. UserError for a class that does not exist.

    A name that exists wins. Where all names are whole numbers, numbers and spans mean names (folders called 0 to 11
    sort as 0, 1, 10, 11, 2 ...); else they are the classes' own numbers, as they are where there are no names.
    """
    named = _numbers_of_names(class_names)
    return [number for word in text.split(",") for number in _members(word.strip(), class_names, named)]


def class_numbers(classes: Sequence[int | str], class_names: Sequence[str]) -> list[int]:
    """Return the numbers of classes that are given by number, or as text as `parse_classes` reads a single one."""
    named = _numbers_of_names(class_names)
    return [int(c) if not isinstance(c, str) else _member(c, class_names, named) for c in classes]


def named_parts(parts: Sequence[Sequence[int]], class_names: Sequence[str]) -> list[list[int]]:
    """Return a recipe's parts as class numbers: what it lists are names where all names are whole numbers."""
    named = _numbers_of_names(class_names)
    if named is None:
        return [sorted(part) for part in parts]
    return [sorted(_member(str(c), class_names, named) for c in part) for part in parts]


LONGEST_NUMBER = 18  # digits


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= LONGEST_NUMBER


def _numbers_of_names(class_names: Sequence[str]) -> dict[int, int] | None:
    """Return the class of every number that is a name, or None unless all names are numbers, all different."""
    if not class_names or not all(map(_is_number, class_names)):
        return None
    named = {int(name): c for c, name in enumerate(class_names)}
    return named if len(named) == len(class_names) else None


def _members(word: str, class_names: Sequence[str], named: dict[int, int] | None) -> list[int]:
    """Return the classes of a word: one, or those of a span."""
    first, dash, last = word.partition("-")
    if word in class_names or not (dash and _is_number(first) and _is_number(last) and int(first) <= int(last)):
        return [_member(word, class_names, named)]
    ends = [_member(end, class_names, named) for end in (first, last)]
    if named is not None:
        return [named[number] for number in sorted(named) if int(first) <= number <= int(last)]
    if ends[1] - ends[0] >= MOST_CLASSES:
        raise UserError(f"{word} means {ends[1] - ends[0] + 1:,} classes, the limit is {MOST_CLASSES:,}")
    return list(range(ends[0], ends[1] + 1))


MOST_CLASSES = 10**6  # of a span


def _member(word: str, class_names: Sequence[str], named: dict[int, int] | None) -> int:
    if word in class_names:
        return class_names.index(word)
    if _is_number(word):
        number = int(word)
        if named is not None and number in named:
            return named[number]
        if named is None and (not class_names or number < len(class_names)):
            return number
    there_are = f": there are {', '.join(class_names[:20])}" if class_names else ""
    raise WrongValueError(f"class {word[:80]!r} does not exist{there_are}")
