"""What many tests share: one thread, tiny recipes, and the real command line in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer.testing
from hypothesis import settings
from typer.testing import CliRunner

typer.testing._get_command = functools.cache(typer.main.get_command)  # 70 ms, and the same for every call
torch.set_num_threads(1)
os.environ.update(NO_COLOR="1", COLUMNS="120")
# The same examples in every run; `pytest --hypothesis-profile default` looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # inputs and fixtures of other people's programs; tests skip where it is absent
TINY = """
name: tiny
threads: 1
workers: 1
checkpoint_seconds: 0
data: {name: toy2d, points: 800}
teacher:
  network: {kind: mlp, channels: 16, blocks: 1}
  training: {steps: 12, batch: 32, log_every: 4}
  solver: {steps: 4}
partition: {students: 2}
pairs: {count: 64, shard: 32}
stages:
  - {objective: dm, steps: 6, batch: 16, fake_updates: 2, log_every: 2}
evaluation: {samples: 200, judge: off}
"""

QUICK = (
    "diffusion",
    "metrics",
    "objectives",
    *(f"test_{name}.py" for name in ("layers", "partition", "recipe", "routing")),
)
NOT_QUICK = ("test_guidance.py", "test_evaluate.py")  # whole runs, and other programs to compare with


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what a change of the mathematics is tried on first; the longest test begins first, so that nobody waits."""
    items.sort(key=lambda item: item.name != "test_lint_and_types_are_clean")
    for item in items:
        other = any(item.get_closest_marker(name) for name in ("slow", "gpu", "weights"))
        if item.path.relative_to(ROOT / "tests").parts[0] in QUICK and item.path.name not in NOT_QUICK and not other:
            item.add_marker("quick")
        if item.get_closest_marker("gpu"):  # Inductor's advice: these tests compare with float32 and leave it off
            item.add_marker(pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"))
            # What torch says of its own work: an empty graph that it begins with, a mode that tests of waiting set.
            item.add_marker(pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"))
            item.add_marker(pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"))


@pytest.fixture(autouse=True)
def _exact_on_a_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let tests marked `gpu` compute in float32, without TF32, and give back what was set; skip them without a card."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


def environment(**extra: str) -> dict[str, str]:
    """The environment of a command under test: one thread, no colours, a fixed width."""
    kept = {k: v for k, v in os.environ.items() if k not in ("MSD_DEBUG", "FORCE_COLOR")}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return kept | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "120", "PYTHONPATH": path} | extra


def train_classifier_briefly(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the network that measures pictures learn for a moment, and in this process: one beside it knows no patch."""
    from msdcli.engine.measure import ahead, classifier

    patch.setattr(classifier, "TRAINING", classifier.TRAINING.model_copy(update={"steps": steps}))
    patch.setattr(ahead, "beside_teacher", lambda *_: contextlib.nullcontext)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "msdcli", *words]


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Msd = Callable[..., Done]


@pytest.fixture
def msd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Msd:
    """Run `msd ...` in the test's own folder: the real command line, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MSD_DEBUG", raising=False)
    monkeypatch.setattr("msdcli.engine.timing.SECONDS", 0.0)  # a plan measures one pass of its networks, no more

    def run(*words: str) -> Done:
        from msdcli.cli import app

        result = CliRunner().invoke(app, [*words])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return Done(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A recipe that runs in a second."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def distilled(folder: Path, recipe: str) -> Path:
    """Finish a run of the recipe in this process; return its directory."""
    from msdcli.cli import app

    (folder / "tiny.yaml").write_text(recipe)
    done = CliRunner().invoke(app, ["distill", str(folder / "tiny.yaml"), f"run={folder}/runs/tiny"])
    assert done.exit_code == 0, done.stderr
    return folder / "runs/tiny"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run. Read it; do not change it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY)
    done = subprocess.run(
        command("distill", "tiny.yaml"), cwd=folder, env=environment(), capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


@pytest.fixture
def fixtures() -> Path:
    """Data made by other people's programs; absent outside the project's own machines."""
    folder = ROOT.parent / "shared" / "fixtures"
    if not folder.is_dir():
        pytest.skip("the folder shared/fixtures is not beside this checkout")
    return folder
