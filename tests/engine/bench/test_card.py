"""What was measured on a card, as a table: read from a file that is checked, and made by tests/gpu/collect.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Msd
from tests.gpu import collect

WAY = {"images_per_second": 90.0, "flops_per_second": 4e13, "memory_bytes": 3 * 2**30, "ratio": {"median": 2.0}}
TRAINING: dict[str, Any] = {
    "recipe": "adm",
    "float32": "tf32",
    "parameters": {"teacher": 10**8, "student": 5 * 10**7},
    "peak_flops": {"float32": 1e14, "bf16": 8e14},
    "sampling": {},
    "stages": [
        {
            "objective": "dm",
            "batch": 64,
            "micro_batch": 32,
            "own": "bf16 compiled, graphs",
            "modes": {"float32": WAY | {"counted_bytes": 2**31}, "bf16 compiled, graphs": WAY},
        }
    ],
}
MEASURING = {"recipe": "adm", "images": 500, "classes": 9, "students": 2, "seconds": {"drawn": 2.0}, "lines": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bench-adm.json").write_text(json.dumps(TRAINING))
    (tmp_path / "measuring.json").write_text(json.dumps(MEASURING | {"peak_bytes": None}))
    (tmp_path / "tests.xml").write_text(
        "<testsuites><testsuite><testcase name='good'/><testcase name='bad[dm]'><failure/></testcase>"
        "<testcase name='none'><skipped/></testcase></testsuite></testsuites>"
    )
    collect.main(tmp_path)
    return tmp_path


def test_the_table_holds_what_was_measured(folder: Path, msd: Msd) -> None:
    done = msd("bench", "--show", str(folder / "card.json"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "| adm: dm, 50.0 M, batch 64 in passes of 32 | tf32 | 90 | 2.00 | 40% | 3.0 | 2.0 |" in lines
    assert "|  | bf16 compiled, graphs (own) | 90 | 2.00 | 5% | 3.0 |  |" in lines
    assert "| adm: 500 images of 9 classes, drawn | 2.0 | 250 |" in lines
    assert lines[-1] == "Tests marked `gpu`: 1 passed, 1 failed (bad dm ), 1 skipped."
    assert json.loads(msd("bench", "show", str(folder / "card.json"), "--json").stdout)["card"] == "no card"


@pytest.mark.parametrize(
    "change", [{"card": "a | b"}, {"torch": 3}, {"training": [TRAINING | {"stages": 1}]}, {"tests": {"passed": -1}}]
)
def test_another_file_is_refused(folder: Path, msd: Msd, change: dict[str, Any]) -> None:
    path = folder / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    done = msd("bench", "--show", str(path))
    assert done.returncode == 2 and "is not what tests/gpu/run.sh writes" in done.stderr


def test_a_file_that_is_absent_or_no_json_is_refused(tmp_path: Path, msd: Msd) -> None:
    assert "does not exist" in msd("bench", "--show", str(tmp_path / "none.json")).stderr
    (tmp_path / "bad.json").write_text("[" * 100_000)
    assert "is not what" in msd("bench", "show", str(tmp_path / "bad.json")).stderr
