"""A frontier that nobody measured: distances by a formula, with a crossing at a place that is known."""

from __future__ import annotations

from typing import Any

MLP = {"kind": "mlp", "channels": 8, "blocks": 1}
SIZES = {"large": (1000, 0.4), "small": (100, 0.2)}  # parameters, ms of a request


def record() -> dict[str, Any]:
    """One large student is always best; of small ones four together, from the second budget on."""
    lines = []
    for size, base in (("large", 0.1), ("small", 0.3)):
        for doubling in range(3):
            for students in (1, 4):
                gain = 0.0 if size == "large" else 0.1 * (students == 4) * (doubling - 0.5)
                mean = base - 0.02 * doubling - gain + 0.05 * (size == "large" and students == 4)
                lines.append(line(size, students, doubling, [mean - 0.01, mean, mean + 0.01]))
    return {
        "sweep": "example",
        "data": {"name": "toy2d", "points": 800, "seed": 0},
        "metric": "l1_toy2d",
        "samples": 1000,
        "students_against": "teacher",
        "machine": {"name": "Example CPU", "threads": 1, "torch": "2.15.0", "cores": 2},
        "teacher": {
            "network": MLP | {"channels": 16, "embedding": None},
            "parameters": 1000,
            "latency": {"request": 4e-4, "image": 2e-5},
            "evaluations": 7,
            "distance": 0.05,
        },
        "floor": {"teacher": 0.04, "halves": 0.05},
        "sizes": [
            {
                "label": label,
                "network": MLP,
                "parameters": parameters,
                "share": parameters / 1000,
                "evaluations": 1,
                "latency": {"request": ms / 1e3, "image": ms / 2e4},
                "saturated": 1 if label == "small" else None,
                "recipe": "tiny.yaml",
                "set": {"student.network": MLP} if label == "small" else {},
            }
            for label, (parameters, ms) in SIZES.items()
        ],
        "lines": lines,
        "open": [],
    }


def line(size: str, students: int, doubling: int, distances: list[float]) -> dict[str, Any]:
    return {
        "size": size,
        "students": students,
        "devices": students,
        "doubling": doubling,
        "budget": 1e9 * 2**doubling,
        "flops": 1e9 * 2**doubling,
        "memory": 4 * students * SIZES[size][0],
        "steps": [100 * 2**doubling // students],
        "seconds": [1.0, 2.0, 3.0],
        "reduced_bytes": 0.0,
        "seeds": [0, 1, 2],
        "distances": distances,
        "figures": {"l1_toy2d": distances},
        "keys": {"partition.students": students, "stages.0.steps": 100 * 2**doubling // students},
    }
