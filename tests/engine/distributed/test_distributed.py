"""Several processes, or several passes, learn what one does: through torchrun and the real command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from msdcli.engine.checkpoints import files as checkpoint_files
from msdcli.engine.checkpoints.storage import StoredCheckpoint
from msdcli.engine.distributed.group import ProcessGroup, slices
from msdcli.errors import UserError
from msdcli.rundir import read_lines
from tests.conftest import TINY, Msd, distilled, environment
from tests.engine.distributed import gradients, sharded

LINES = {"teacher": "teacher/metrics.jsonl", "student": "students/0/0-adm/metrics.jsonl"}
# Every kind of turn: two levels, of which a batch leaves the student at one, and figures of the whole batch.
ADM = TINY.replace(
    "objective: dm, steps: 6, batch: 16",
    "objective: adm, steps: 6, batch: 16, pair_batch: 8, sigmas: [2.5, 0.5], divergence: js, ratio_rate: 0.5",
).replace("partition: {students: 2}", "partition: {students: 1}")


def launch(*words: str, processes: int = 2) -> list[str]:
    """The command that starts a program in several processes on this machine."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
        *("--master-port", str(20_000 + os.getpid() % 20_000), *words),
    ]


def launched(folder: Path, *words: str, processes: int = 2, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        launch(*words, processes=processes),
        cwd=folder,
        env=environment(CUDA_VISIBLE_DEVICES="", **extra),
        capture_output=True,
        text=True,
        timeout=200,
    )


def torchrun(folder: Path, *words: str, processes: int = 2, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `msd ...` under torchrun, on this machine."""
    return launched(folder, "-m", "msdcli", *words, processes=processes, **extra)


def losses(run: Path, part: str) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / LINES[part]).read_text().splitlines()]
    return {line["step"]: line["losses"] for line in lines}


def same_losses(one: Path, other: Path) -> None:
    for part in LINES:
        mine, theirs = losses(one, part), losses(other, part)
        assert mine.keys() == theirs.keys()
        for step, found in mine.items():
            assert found == pytest.approx(theirs[step], rel=1e-5), (part, step)


def state_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a stage's newest checkpoint, however it lies there."""
    path = checkpoint_files.newest(folder)
    assert path is not None
    stored = StoredCheckpoint(path)
    stored.verify()
    into = {name: torch.zeros(shape) for name, shape in stored.shapes().items()}
    stored.read(into)
    return into


def alike(mine: dict[str, Tensor], theirs: dict[str, Tensor], difference: float) -> None:
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert mine[key].shape == tensor.shape
        assert tensor.numel() == 0 or (mine[key] - tensor).abs().max() <= difference, key


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every kind of turn, by one process that takes whole batches."""
    return distilled(tmp_path_factory.mktemp("reference"), ADM)


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
    for read in (lambda folder: load_file(folder / "model.safetensors"), state_in):
        alike(read(run / "students/0/0-adm"), read(reference / "students/0/0-adm"), 1e-4)
    newest = [path.name for _, path in checkpoint_files.stored(run / "students/0/0-adm")]
    assert newest == (["state", "state.1"] if fsdp == "true" else ["state.safetensors", "state.1.safetensors"])
    parts = sorted((run / "students/0/0-adm").glob("state/*.safetensors"))
    assert len(parts) == (2 if fsdp == "true" else 0)
    sizes = [path.stat().st_size for path in parts]
    assert not sizes or max(sizes) < 1.3 * min(sizes), "every process writes about as much"
    assert not list(run.rglob("*.tmp")) and not list(run.glob("teacher/state*"))


@pytest.mark.parametrize(
    ("fsdp", "worlds"),
    [
        ("true", [2, 1]),
        pytest.param("false", [2, 1], marks=pytest.mark.slow),
        pytest.param("true", [1, 2, 1], marks=pytest.mark.slow),
        pytest.param("true", [2, 4, 2], marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(
    reference: Path, msd: Msd, tmp_path: Path, fsdp: str, worlds: list[int]
) -> None:
    (tmp_path / "tiny.yaml").write_text(ADM)
    whole = ["stages.0.lr_hold=1.0"]
    assert msd("distill", "tiny.yaml", *whole, "run=runs/whole").returncode == 0
    for number, processes in enumerate(worlds):
        steps = 6 - 2 * (len(worlds) - 1 - number)
        words = ["distill", "tiny.yaml", *whole, f"fsdp={fsdp}", f"stages.0.steps={steps}"]
        done = torchrun(tmp_path, *words, processes=processes) if processes > 1 else msd(*words)
        assert done.returncode == 0, done.stderr
    same_losses(tmp_path / "runs/tiny", tmp_path / "runs/whole")


@pytest.mark.slow
def test_gradients_of_two_processes_are_those_of_one_in_every_objective(tmp_path: Path) -> None:
    done = launched(tmp_path, gradients.__file__, str(tmp_path / "two.safetensors"))
    assert done.returncode == 0, done.stderr
    both, alone = load_file(tmp_path / "two.safetensors"), gradients.of_all()
    assert both.keys() == alone.keys()
    for name, gradient in alone.items():
        assert gradient.abs().max() > 0 and (both[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.slow
@pytest.mark.parametrize("case", sharded.CASES)
def test_every_kind_of_network_and_teacher_learns_sharded_what_it_learns_alone(tmp_path: Path, case: str) -> None:
    """EDM2's forced normalisation on parts of weights, guidance with and without a guide, diffusers' networks; a stage
    after another.
    """
    program = Path(sharded.__file__)
    done = launched(tmp_path, str(program), str(tmp_path / "two"), case)
    assert done.returncode == 0, done.stderr
    sharded.train(tmp_path / "one", case, ProcessGroup())
    for alone in sorted((tmp_path / "one" / case).iterdir()):
        both = tmp_path / "two" / case / alone.name
        mine, theirs = (read_lines(folder / "metrics.jsonl") for folder in (both, alone))
        assert len(mine) == len(theirs) == 3
        for line, wanted in zip(mine, theirs, strict=True):
            assert line["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
            assert line["gradient_norms"] == pytest.approx(wanted["gradient_norms"], rel=1e-4)
        alike(*({k: v for k, v in state_in(f).items() if "exp_avg" not in k} for f in (both, alone)), 1e-4)


@pytest.mark.slow
def test_sharded_runs_survive_being_killed_to_the_bit(tmp_path: Path) -> None:
    """SIGKILL for all processes at once, at several moments; no leftover stays."""
    recipe = ADM.replace("steps: 6", "steps: 40").replace("keep: 2", "keep: 3")
    (tmp_path / "tiny.yaml").write_text(recipe)
    words = ("distill", "tiny.yaml", "fsdp=true")
    done = torchrun(tmp_path, *words, "run=runs/whole")
    assert done.returncode == 0, done.stderr
    run, kills = tmp_path / "runs/tiny", 0
    for step in (1, 9, 17, 25):
        process = subprocess.Popen(
            launch("-m", "msdcli", *words),
            cwd=tmp_path,
            env=environment(CUDA_VISIBLE_DEVICES=""),
            start_new_session=True,
        )
        while process.poll() is None and (checkpoint_files.step_of(run / "students/0/0-adm") or 0) < step:
            time.sleep(0.002 * step)
        kills += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert kills >= 3, "it was always done already"
    done = torchrun(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    alike(state_in(run / "students/0/0-adm"), state_in(tmp_path / "runs/whole/students/0/0-adm"), 0.0)
    assert not list(run.rglob("*.tmp"))


@pytest.mark.slow
def test_a_truncated_part_falls_back_for_all_processes(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(ADM)
    words = ("distill", "tiny.yaml", "fsdp=true", "stages.0.lr_hold=1.0")
    assert torchrun(tmp_path, *words, "run=runs/whole").returncode == 0
    assert torchrun(tmp_path, *words, "stages.0.steps=4").returncode == 0
    part = sorted((tmp_path / "runs/tiny/students/0/0-adm/state").glob("*.safetensors"))[1]
    part.write_bytes(part.read_bytes()[:-50])
    done = torchrun(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("going on from the checkpoint before it, of step 3") == 1
    alike(*(state_in(tmp_path / f"runs/{name}/students/0/0-adm") for name in ("tiny", "whole")), 0.0)


@pytest.mark.slow
def test_a_part_that_cannot_be_written_ends_the_run_with_one_sentence(tmp_path: Path) -> None:
    """A limit on the size of files that only the second process has."""
    (tmp_path / "tiny.yaml").write_text(ADM)
    words = ("distill", "tiny.yaml", "fsdp=true", "stages.0.lr_hold=1.0")
    assert torchrun(tmp_path, *words, "stages.0.steps=4").returncode == 0
    (tmp_path / "limited.py").write_text(
        "import os, resource, runpy, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "if os.environ['RANK'] == '1': resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "runpy.run_module('msdcli', run_name='__main__')\n"
    )
    done = launched(tmp_path, "limited.py", *words)
    assert done.returncode != 0 and done.stderr.count("error: file too large") == 1, done.stderr
    run = tmp_path / "runs/tiny"
    assert checkpoint_files.step_of(run / "students/0/0-adm") == 4 and not list(run.rglob("*.tmp"))
    assert torchrun(tmp_path, *words).returncode == 0


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
        parts = [slices(batch, pair_batch, ProcessGroup(rank, size), largest) for rank in range(size)]
        (count,) = {count for own in parts for _, count in own}
        assert sorted(i for own in parts for i, _ in own) == list(range(count))
        assert batch % count == 0 and (pair_batch or batch) % count == 0
        assert largest is None or max(batch, pair_batch or 0) // count <= largest
    with pytest.raises(UserError, match="batch 10 cannot be shared equally by 4"):
        slices(10, None, ProcessGroup(0, 4), None)
    with pytest.raises(UserError, match="micro_batch 2"):
        slices(16, 9, ProcessGroup(0, 1), 2)
