"""Put what tests/gpu/run.sh left in a folder into one card.json: `python3 -m tests.gpu.collect FOLDER`."""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from msdcli.engine.bench import card


def collect(folder: Path) -> dict[str, Any]:
    """Return the content of card.json: whatever part was run."""
    here = torch.cuda.is_available()
    return {
        "card": torch.cuda.get_device_name() if here else "no card",
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if here else 0,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "tests": tests(folder / "tests.xml"),
        "training": results(folder, "bench-*.json"),
        "measuring": results(folder, "measuring*.json"),
    }


def results(folder: Path, pattern: str) -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern)) if path.stat().st_size]


def tests(path: Path) -> dict[str, Any] | None:
    """Count the outcomes in pytest's file."""
    if not path.exists():
        return None
    cases = list(ElementTree.parse(path).iter("testcase"))  # pytest wrote it a moment ago
    bad = [
        case.get("name", "?") for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    failed = ["".join(c if c.isalnum() or c in "_ .-" else " " for c in name) for name in bad]
    return {"passed": len(cases) - len(bad) - skipped, "failed": failed, "skipped": skipped}


def main(folder: Path) -> None:
    path = folder / "card.json"
    path.write_text(json.dumps(collect(folder), indent=1))
    card.read(path)  # what it will be read by


if __name__ == "__main__":
    main(Path(sys.argv[1]))
