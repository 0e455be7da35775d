"""Which size, K and stages suit a latency, a memory or a budget: only from lines of a frontier that was measured."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import Any

from msdcli.engine.frontier.lines import spread
from msdcli.engine.report.frontier import kind, mean_and_spread
from msdcli.engine.tracking.formatting import figure, flop, three_digits
from msdcli.errors import UserError
from msdcli.recipe import Recipe


@dataclass(frozen=True)
class Limits:
    """What a request (seconds), all students' weights (bytes) and training (FLOPs) may take; None: no limit."""

    latency: float | None = None
    memory: float | None = None
    budget: float | None = None


@dataclass(frozen=True)
class Advice:
    """The line that is advised, those that are as close as far as seeds tell, and the recipe keys that make it."""

    line: dict[str, Any]
    as_close: list[dict[str, Any]]
    keys: list[str]
    said: list[str]


def advise(record: dict[str, Any], recipe: Recipe, limits: Limits) -> Advice:
    """Return the cheapest line within the limits whose distance is within the spread over seeds of the closest one.

    Nothing is interpolated, and nothing said of what was not measured: UserError where the frontier is of other data or
    another teacher, and where no line keeps the limits.
    """
    _check_same(record, recipe)
    request = {size["label"]: at_worst(size) for size in record["sizes"]}
    asked = {"latency": limits.latency, "memory": limits.memory, "budget": limits.budget}
    takes = [
        {"latency": request[line["size"]], "memory": line["memory"], "budget": line["budget"]}
        for line in record["lines"]
    ]
    for name, most in asked.items():
        if most is not None and (least := min(one[name] for one in takes)) > most:
            raise UserError(
                f"{name}: the least that was measured is {_shown(name, least)}, more than {_shown(name, most)}"
            )
    kept = [
        (line, one)
        for line, one in zip(record["lines"], takes, strict=True)
        if all(most is None or one[name] <= most for name, most in asked.items())
    ]
    if not kept:
        raise UserError("no line of the frontier keeps all limits at once", hint="msd sweep NAME --table shows them")
    best, _ = min(kept, key=lambda pair: statistics.fmean(pair[0]["distances"]))
    close = [(line, one) for line, one in kept if _as_close(line, best)]
    chosen, cost = min(close, key=lambda pair: (pair[1]["budget"], pair[1]["latency"], pair[1]["memory"]))
    mean, sd = mean_and_spread(chosen["distances"])
    machine = record["machine"]
    of_size = next(size for size in record["sizes"] if size["label"] == chosen["size"])
    said = [
        f"{chosen['size']}, {kind(chosen)}: {record['metric']} {figure(mean)} ± {figure(sd)} over "
        f"{len(chosen['seeds'])} seeds; {', '.join(f'{n} {_shown(n, v)}' for n, v in cost.items())}",
        f"measured by the sweep {record['sweep']} on {machine['name']}, {machine['threads']} thread(s), torch "
        f"{machine['torch']}; latencies are that machine's",
    ]
    if (mean_request := of_size["latency"]["request"]) < cost["latency"]:
        said.append(
            f"latency is that of the slowest student; over classes a request takes {_shown('latency', mean_request)}"
        )
    if len(close) > 1:
        said.append(f"as close, and no cheaper: {'; '.join(_named(line) for line, _ in close if line is not chosen)}")
    largest = max(line["budget"] for line in record["lines"])
    if limits.budget is not None and limits.budget > largest:
        said.append(f"no budget above {flop(largest)} was measured, so nothing is said of {flop(limits.budget)}")
    if record["open"]:
        said.append(f"the sweep is not finished, runs are left of: {'; '.join(record['open'])}")
    return Advice(chosen, [line for line, _ in close], _keys(record, chosen), said)


def at_worst(size: dict[str, Any]) -> float:
    """Return the seconds of a request to the slowest student of a size: students may be of different ones."""
    return float(size["latency"].get("worst", size["latency"]["request"]))


def _check_same(record: dict[str, Any], recipe: Recipe) -> None:
    if record["data"] != recipe.data.model_dump(mode="json"):
        raise UserError(
            f"no frontier of these data was measured: {record['sweep']} is of others",
            hint="a sweep file with `frontier` measures one (msd docs cluster)",
        )
    trained = recipe.teacher.path is None  # else `network` says nothing of it
    if trained and recipe.teacher.network.model_dump(mode="json") != record["teacher"]["network"]:
        raise UserError(f"the frontier {record['sweep']} is of another teacher's network")


def _as_close(line: dict[str, Any], best: dict[str, Any]) -> bool:
    difference = statistics.fmean(line["distances"]) - statistics.fmean(best["distances"])
    return difference <= spread(line["distances"], best["distances"])


def _named(line: dict[str, Any]) -> str:
    return f"{line['size']}, {kind(line)}, {flop(line['budget'])}"


def _shown(name: str, value: float) -> str:
    if name == "latency":
        return f"{three_digits(1e3 * value)} ms"
    return f"{three_digits(value / 1e6)} MB" if name == "memory" else flop(value)


def _keys(record: dict[str, Any], line: dict[str, Any]) -> list[str]:
    """Return the recipe keys of a line as overrides."""
    size = next(size for size in record["sizes"] if size["label"] == line["size"])
    return [f"{key}={json.dumps(value)}" for key, value in (size["set"] | line["keys"]).items()]
