"""Kill a run again and again, at random moments, and hold its end against that of an undisturbed one.

`python -m tests.engine.checkpoints.endurance FOLDER KILLS SEED RECIPE` prints what it did as JSON. Processes are forked
from one that has imported everything, so that moments fall on work and not on imports; the signal and what it leaves
are the kernel's.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from safetensors.torch import load_file

from tests.conftest import TINY

LONG = TINY.replace("steps: 6,", "steps: 150,").replace("steps: 12,", "steps: 150,").replace("count: 64", "count: 256")
FEW = "steps: 60, batch: 16, log_every: 2, sigmas: [2.5, 0.5], fake_updates: 1"
GUIDED = "guidance: {scale: [1.0, 3.0], interval: [0.1, 20.0]}\n"
LEARNS = "steps: 150, label_dropout: 0.2,"
RECIPES = {
    "dm": LONG,
    # A guided teacher, two levels, figures of whole batches that are remembered, a discriminator in the fake network.
    "family": LONG.partition("stages:")[0].replace("solver:", f"{GUIDED}  solver:").replace("steps: 150,", LEARNS)
    + f"stages:\n  - {{objective: adm, divergence: js, ratio_rate: 0.5, {FEW}}}\n"
    + f"  - {{objective: sid, divergence: kl, gan_weight: 0.1, {FEW}}}\nevaluation: {{samples: 200}}\n",
}


def start(folder: Path, name: str, *, largest: int | None = None) -> int:
    """Fork a process that distils; files may not grow past `largest` bytes, as on a disk that is full."""
    if pid := os.fork():
        return pid
    from msdcli.cli import app

    code = 1
    try:
        said = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        app(["distill", str(folder / "tiny.yaml"), f"run={folder / name / 'tiny'}"])
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        os._exit(code)
    raise AssertionError


def ended(pid: int, patience: float) -> int | None:
    """Wait; return the exit code, or None where time was up and the process is gone by SIGKILL."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def weights(run: Path) -> dict[str, bytes]:
    """Every model as bytes, and every last checkpoint's tensors: networks, moments and what objectives remember."""
    found = {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("model.safetensors"))}
    for path in sorted(run.glob("students/*/*/state.safetensors")):
        tensors = sorted(load_file(path).items())
        found[str(path.relative_to(run))] = b"".join(k.encode() + v.numpy().tobytes() for k, v in tensors)
    return found


def truncate_one(run: Path, rng: random.Random) -> bool:
    """Cut a newest checkpoint that has one before it."""
    newest = [p for p in run.glob("students/*/*/state.safetensors") if (p.parent / "state.1.safetensors").exists()]
    newest = [p for p in newest if not (p.parent / "model.json").exists()]
    if not newest:
        return False
    path = rng.choice(newest)
    content = path.read_bytes()
    path.unlink()  # a checkpoint may be one file with two names
    path.write_bytes(content[: rng.randrange(len(content))])
    return True


def check(folder: Path, wanted: dict[str, bytes]) -> None:
    """Assert that a run which went through all of it is the undisturbed one."""
    assert weights(folder / "runs/tiny") == wanted, "other bits"
    assert not list((folder / "runs").rglob("*.tmp")), "leftovers"
    for log in (folder / "runs/tiny").rglob("metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert steps == sorted(set(steps)), log


def main(folder: Path, kills: int, seed: int, recipe: str) -> dict[str, int]:
    rng, did = random.Random(seed), Counter[str]()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(RECIPES[recipe])
    begun = time.monotonic()
    assert ended(start(folder, "reference"), 250) == 0, (folder / "reference.log").read_text()
    undisturbed = time.monotonic() - begun
    wanted = weights(folder / "reference/tiny")
    while did["kills"] < kills:
        kind = rng.choices(["kill", "truncate", "full"], [8, 1, 1])[0]
        largest = rng.randrange(500, 60_000) if kind == "full" else None
        code = ended(start(folder, "runs", largest=largest), 250 if largest else rng.uniform(0, undisturbed / 3))
        did["kills"] += code is None
        did["full disks"] += code == 1
        assert code in (None, 0, 1), (folder / "runs.log").read_text()
        assert code != 1 or largest, (folder / "runs.log").read_text()
        if kind == "truncate":
            did["truncated checkpoints"] += truncate_one(folder / "runs/tiny", rng)
        if code == 0:
            check(folder, wanted)
            did["finished runs"] += 1
            shutil.rmtree(folder / "runs")
    assert ended(start(folder, "runs"), 250) == 0, (folder / "runs.log").read_text()
    check(folder, wanted)
    did["finished runs"] += 1
    said = (folder / "runs.log").read_text()
    did["fallbacks said"] = said.count("going on from the checkpoint before it")
    assert "Traceback" not in said
    return dict(did)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
