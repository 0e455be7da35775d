"""A run and its ONNX export, which several files read: a graph takes seconds to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from msdcli.engine.export.export import export
from msdcli.engine.export.format import ExportOptions
from msdcli.rundir import RunDir
from tests.engine.export.test_export import SMALL, trained


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two small students, with its ONNX export in `given` beside it. Read it; do not change it."""
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("small")
    run = trained(folder, SMALL)
    export(RunDir(run), folder / "given", "onnx", options=ExportOptions(bench=False))
    return run
