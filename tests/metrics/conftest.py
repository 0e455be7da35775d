"""Random pictures and the stand-in Inception that clean-fid's published file was replaced by for these tests."""

import json
import zipfile

import numpy as np
import pytest

from tests.conftest import SHARED

FID = SHARED / "fixtures" / "fid"


@pytest.fixture(scope="session")
def fid_fixtures():
    if not (FID / "expected.json").is_file():
        pytest.skip(f"no fixtures at {FID}")
    return FID


@pytest.fixture(scope="session")
def expected(fid_fixtures):
    return json.loads((fid_fixtures / "expected.json").read_text())


@pytest.fixture(scope="session")
def unpacked(fid_fixtures, tmp_path_factory):
    """The pictures of a.zip and b.zip in folders of their own."""
    root = tmp_path_factory.mktemp("unpacked")
    for name in ("a", "b"):
        with zipfile.ZipFile(fid_fixtures / f"{name}.zip") as file:
            file.extractall(root / name / "nested")
    return root


@pytest.fixture
def rng():
    return np.random.default_rng(0)
