"""Variables of a launcher that are half set, empty or nonsense are the user's to fix, in one sentence."""

from __future__ import annotations

import os

import pytest

from msdcli.engine.distributed import launcher
from msdcli.errors import UserError
from tests.conftest import Msd

MET = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "said", [{}, {"WORLD_SIZE": ""}, {"RANK": ""}, {"RANK": "3"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": " "}]
)
def test_no_launcher_is_one_process(monkeypatch: pytest.MonkeyPatch, said: dict[str, str]) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert launcher.share() == (0, 1)


def test_a_launcher_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"} | MET).items():
        monkeypatch.setenv(name, value)
    assert (launcher.share(), launcher.local_rank()) == ((3, 4), 1)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE="),
        ({"WORLD_SIZE": "2"} | MET, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"} | MET, "RANK=2 is no process of WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "1.5"} | MET, "RANK='1.5'"),
        ({"WORLD_SIZE": "2", "RANK": "0"} | MET | {"MASTER_PORT": "99999"}, "MASTER_PORT='99999'"),
    ],
)
def test_what_no_launcher_says_is_refused(msd: Msd, said: dict[str, str], named: str) -> None:
    os.environ.update(said)
    try:
        with pytest.raises(UserError):
            launcher.share()
        done = msd("distill", "digits")
    finally:
        for name in said:
            del os.environ[name]
    assert (done.returncode, named in done.stderr) == (2, True), done.stderr
