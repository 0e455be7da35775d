"""Several processes, or several passes, learn what one does: through torchrun and the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from msdcli.engine.distributed import Group, slices
from msdcli.errors import UserError
from tests.conftest import TINY, Msd, environment

LINES = {"teacher": "teacher/metrics.jsonl", "student": "students/0/0-adm/metrics.jsonl"}
ADM = TINY.replace("objective: dm, steps: 6, batch: 16", "objective: adm, steps: 6, batch: 16, pair_batch: 8").replace(
    "partition: {students: 2}", "partition: {students: 1}"
)


def torchrun(folder: Path, *words: str, processes: int = 2, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `msd ...` under torchrun, on this machine."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
            *("--master-port", str(20_000 + os.getpid() % 20_000), "-m", "msdcli", *words),
        ],
        cwd=folder,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=200,
    )


def losses(run: Path, part: str) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / LINES[part]).read_text().splitlines()]
    return {line["step"]: line["losses"] for line in lines}


def same_losses(one: Path, other: Path) -> None:
    for part in LINES:
        mine, theirs = losses(one, part), losses(other, part)
        assert mine.keys() == theirs.keys()
        for step, found in mine.items():
            assert found == pytest.approx(theirs[step], rel=1e-5), (part, step)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every kind of turn, by one process that takes whole batches."""
    from typer.testing import CliRunner

    from msdcli.cli import app

    folder = tmp_path_factory.mktemp("reference")
    (folder / "tiny.yaml").write_text(ADM)
    done = CliRunner().invoke(app, ["distill", str(folder / "tiny.yaml"), f"run={folder}/runs/tiny"])
    assert done.exit_code == 0, done.stderr
    return folder / "runs/tiny"


@pytest.mark.parametrize("fsdp", ["false", "true"])
def test_two_processes_give_the_losses_of_one(reference: Path, tmp_path: Path, fsdp: str) -> None:
    """Replicated and sharded; a run that two begin goes on as one, and the other way round, to the same losses."""
    (tmp_path / "tiny.yaml").write_text(ADM)
    done = torchrun(tmp_path, "distill", "tiny.yaml", f"fsdp={fsdp}", "--json")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/tiny"
    same_losses(run, reference)
    result = json.loads(done.stdout)
    assert result["unfinished"] == [] and result["measurement"]["metric"] == "l1_toy2d"
    model, wanted = (json.loads((r / "students/0/0-adm/model.json").read_text()) for r in (run, reference))
    for figure in ("images", "flops"):
        assert model["cost"][figure] == pytest.approx(wanted["cost"][figure], rel=0.01)
    for name in ("model", "state"):
        mine, theirs = (load_file(r / f"students/0/0-adm/{name}.safetensors") for r in (run, reference))
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert mine[key].shape == tensor.shape
            assert (mine[key] - tensor).abs().max() < 1e-4, key


@pytest.mark.parametrize(
    ("fsdp", "first"),
    [("true", 2), pytest.param("false", 2, marks=pytest.mark.slow), pytest.param("true", 1, marks=pytest.mark.slow)],
)
def test_a_run_goes_on_with_another_number_of_processes(
    reference: Path, msd: Msd, tmp_path: Path, fsdp: str, first: int
) -> None:
    (tmp_path / "tiny.yaml").write_text(ADM)
    whole = ["stages.0.lr_hold=1.0"]
    assert msd("distill", "tiny.yaml", *whole, "run=runs/whole").returncode == 0
    begin, go_on = ["stages.0.steps=4", f"fsdp={fsdp}"], ["stages.0.steps=6", f"fsdp={fsdp}"]
    for number, words in ((first, begin), (3 - first, go_on)):
        words = ["distill", "tiny.yaml", *whole, *words]
        done = torchrun(tmp_path, *words) if number == 2 else msd(*words)
        assert done.returncode == 0, done.stderr
    same_losses(tmp_path / "runs/tiny", tmp_path / "runs/whole")


@pytest.mark.parametrize("fake_batch", ["fresh", "shared"])
def test_batches_in_parts_give_the_losses_of_whole_ones(
    reference: Path, msd: Msd, tmp_path: Path, fake_batch: str
) -> None:
    (tmp_path / "tiny.yaml").write_text(ADM)
    how = f"stages.0.fake_batch={fake_batch}"
    whole = reference
    if fake_batch == "shared":
        assert msd("distill", "tiny.yaml", how, "run=runs/whole").returncode == 0
        whole = tmp_path / "runs/whole"
    done = msd("distill", "tiny.yaml", "micro_batch=4", how, "run=runs/parts")
    assert done.returncode == 0, done.stderr
    same_losses(tmp_path / "runs/parts", whole)


def test_a_batch_that_cannot_be_shared_is_refused_once_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(ADM)
    done = torchrun(tmp_path, "distill", "tiny.yaml", "stages.0.batch=15")
    assert done.returncode != 0
    assert done.stderr.count("batch 15 cannot be shared equally by 2 processes") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]


def test_slices_cover_the_batch_once() -> None:
    for size, batch, pair_batch, largest in [(1, 16, None, None), (2, 16, 8, 3), (4, 64, 128, 10), (2, 6, None, 1)]:
        parts = [slices(batch, pair_batch, Group(rank, size), largest) for rank in range(size)]
        (count,) = {count for own in parts for _, count in own}
        assert sorted(i for own in parts for i, _ in own) == list(range(count))
        assert batch % count == 0 and (pair_batch or batch) % count == 0
        assert largest is None or max(batch, pair_batch or 0) // count <= largest
    with pytest.raises(UserError, match="batch 10 cannot be shared equally by 4"):
        slices(10, None, Group(0, 4), None)
    with pytest.raises(UserError, match="micro_batch 2"):
        slices(16, 9, Group(0, 1), 2)
