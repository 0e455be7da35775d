"""The Slurm scripts that ship, unchanged, under a stub of Slurm: submitted, signalled and queued again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, Msd, environment

SCRIPTS = ROOT / "recipes" / "slurm"

# Runs a batch script as Slurm does: one task after the other, options from the script or the command line, the signal
# that --signal asks for when the file `limit` appears, and once more when the script asks to be queued again.
SBATCH = """
import os, re, signal, subprocess, sys, time
options, rest = [], sys.argv[1:]
while rest[0].startswith("--"):
    options.append(rest.pop(0))
text = open(rest[0]).read()
options = re.findall(r"^#SBATCH (--.*)$", text, re.M) + options
chosen = dict(o[2:].split("=", 1) for o in options if "=" in o)
first, _, last = chosen.get("array", "0").partition("-")
number = getattr(signal, "SIG" + re.fullmatch(r"B:(\\w+)@\\d+", chosen["signal"])[1])
print("Submitted batch job 77", flush=True)
code = 0
for task in range(int(first), int(last or first) + 1):
    own = {"SLURM_JOB_ID": "77", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(task)}
    own |= {"SLURM_NNODES": chosen["nodes"], "SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "2"}
    again = True
    while again:
        job = subprocess.Popen(["bash", *rest], env=os.environ | own)
        while job.poll() is None:
            if os.path.exists(os.environ["LIMIT"]):
                log = os.environ["LOG"]
                if os.path.exists(log) and os.path.getsize(log):
                    os.remove(os.environ["LIMIT"])
                    job.send_signal(number)
            time.sleep(0.05)
        code = max(code, job.returncode)
        if again := os.path.exists("requeued"):
            os.rename("requeued", f"requeued-{task}")
sys.exit(code)
"""
SCONTROL = """
import sys
if sys.argv[1] == "requeue":
    open("requeued", "w").write(sys.argv[2])
else:
    assert sys.argv[1:3] == ["show", "hostnames"]
    print(sys.argv[3])
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which Slurm's commands are stubs."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "sbatch.py").write_text(SBATCH)
    (stubs / "scontrol.py").write_text(SCONTROL)
    commands = {"msd": "-m msdcli", "torchrun": "-m torch.distributed.run"}
    commands |= {name: str(stubs / f"{name}.py") for name in ("sbatch", "scontrol")}
    lines = {name: f'exec {sys.executable} {words} "$@"' for name, words in commands.items()} | {"srun": 'exec "$@"'}
    for name, line in lines.items():
        (stubs / name).write_text(f"#!/bin/sh\n{line}\n")
        (stubs / name).chmod(0o755)
    return environment(PATH=f"{stubs}:{os.environ['PATH']}", LIMIT=str(tmp_path / "limit"))


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda p: p.name)
def test_a_script_is_sound(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(script, os.X_OK)
    text = script.read_text()
    header = text.split("set -euo pipefail")[0]
    assert all(line.startswith("#") for line in header.splitlines()), "Slurm reads no options after a command"
    assert re.search(r"^#SBATCH --signal=B:USR1@\d+$", header, re.M) and "#SBATCH --requeue" in header
    usage = re.search(r"^#   sbatch (--\S+) (recipes/slurm/\S+) ", header, re.M)
    assert usage is not None and (ROOT / usage[2]) == script


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "option", "student"), [("array.sh", "--array=0-1", "0"), ("torchrun.sh", "--nodes=1", "0")]
)
def test_a_script_runs_is_stopped_before_its_limit_and_finishes(
    msd: Msd, tmp_path: Path, slurm: dict[str, str], script: str, option: str, student: str
) -> None:
    steps = 600
    (tmp_path / "tiny.yaml").write_text(
        TINY.replace("steps: 6,", f"steps: {steps},").replace("seconds: 0", "seconds: 99")
    )
    (tmp_path / "limit").touch()
    done = subprocess.run(
        ["sbatch", option, str(SCRIPTS / script), "tiny.yaml", "seed=3"],
        cwd=tmp_path,
        env=slurm | {"LOG": str(tmp_path / f"runs/tiny/students/{student}/0-dm/metrics.jsonl")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "Submitted batch job 77" in done.stdout
    stopped = re.search(rf"stopped at step (\d+) of {steps}; the same command continues", done.stderr)
    assert stopped is not None and int(stopped[1]) < steps
    requeued = (tmp_path / "requeued-0").read_text()
    assert requeued == ("77_0" if script == "array.sh" else "77")
    state = json.loads(msd("status", "runs/tiny", "--json").stdout)
    assert [s["stages"][0]["state"] for s in state["students"]] == ["done", "done"]
    assert state["done"] == (script == "torchrun.sh")
    assert "seed: 3" in (tmp_path / "runs/tiny/recipe.yaml").read_text()
