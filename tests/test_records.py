"""Records edited by hand are refused by name, and a log goes on without its damaged lines."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from msdcli import records
from msdcli.engine.checkpoints.model import load_model, save_model
from msdcli.errors import UserError
from msdcli.nets import build
from msdcli.partition import Partition
from msdcli.recipe.networks import MLPSettings
from msdcli.rundir import append_line, parsed_lines, read_lines
from tests.conftest import Msd

EDITS: list[tuple[str, str, str]] = [
    ("teacher/model.json", "True", "report"),
    ("teacher/model.json", "old | {'shape': 'x'}", "report"),
    ("students/0/0-dm/model.json", "{k: v for k, v in old.items() if k != 'sha256'}", "report"),
    ("students/0/0-dm/model.json", "{k: v for k, v in old.items() if k != 'steps'}", "status"),
    ("students/0/0-dm/model.json", "old | {'cost': 3}", "report"),
    ("students/0/0-dm/model.json", "old | {'steps': 'x'}", "status"),
    ("metrics/l1_toy2d.json", "old | {'rows': [old['rows'][0] | {'samples': 'x'}]}", "report"),
    ("metrics/l1_toy2d.json", "old | {'rows': [old['rows'][1] | {'values': 0}]}", "report"),
    ("metrics/l1_toy2d.json", "old | {'rows': [r | {'values': {}} for r in old['rows']]}", "report"),
    ("metrics/l1_toy2d.json", "[]", "report"),
    ("run.json", "[1]", "distill"),
    ("run.json", "{'commands': 1}", "distill"),
    ("run.json", "old | {'class_names': None}", "sample"),
    ("run.json", "old | {'class_names': ['a']}", "sample"),
    ("partition.json", "old | {'parts': [[0], 1]}", "sample"),
    ("partition.json", "old | {'num_conditions': 10**10}", "sample"),
    ("partition.json", "7", "report"),
]
WORDS = {
    "report": ["report", "--no-pictures"],
    "status": ["status"],
    "distill": ["distill"],
    "sample": ["sample", "--all", "-n", "2", "--format", "npz"],
}


@pytest.fixture(scope="module")
def copied(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("edited") / "runs" / "tiny"
    shutil.copytree(finished.parent, run.parent)
    return run


@pytest.mark.parametrize(("name", "edit", "verb"), EDITS)
def test_an_edited_record_is_named(copied: Path, msd: Msd, name: str, edit: str, verb: str) -> None:
    path = copied / name
    before = path.read_bytes()
    try:
        path.write_text(json.dumps(eval(edit, {"old": json.loads(before)})))
        first, *rest = WORDS[verb]
        done = msd(first, str(copied), *rest)
    finally:
        path.write_bytes(before)
    assert (done.returncode, path.name in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("counted", [{}, 3, {"teacher": 1.0, "sizes": [{"students": [0]}]}])
def test_an_edited_count_of_operations_is_named(copied: Path, msd: Msd, counted: object) -> None:
    path = copied / "flops.json"
    path.write_text(json.dumps(counted))
    done = msd("watch", str(copied))
    path.write_text(json.dumps({"teacher": 1.0, "stages": [2.0]}))  # as it was before students had sizes
    assert (done.returncode, "flops.json" in done.stderr) == (2, True), done.stderr
    assert msd("watch", str(copied)).returncode == 0
    path.unlink()


def test_older_records_are_still_read(copied: Path, msd: Msd) -> None:
    """No intervals, no network, no warnings; a log of commands that is missing is begun anew."""
    path = copied / "metrics" / "l1_toy2d.json"
    before = json.loads(path.read_text())
    old = {k: v for k, v in before.items() if k not in ("network", "warnings", "versions")}
    old["rows"] = [{k: v for k, v in row.items() if k != "intervals"} for row in before["rows"]]
    path.write_text(json.dumps(old))
    assert records.measurement(path)["rows"][0]["intervals"] == {}
    assert msd("report", str(copied), "--no-pictures").returncode == 0
    path.write_text(json.dumps(before))


# What another's model claims.


@pytest.fixture
def model(tmp_path: Path) -> Path:
    net = build(MLPSettings(channels=8, blocks=1), shape=(2,), num_classes=4, sigma_data=0.5)
    save_model(tmp_path / "m", net, {"stage": {"sigma_init": 2.5}})
    return tmp_path / "m"


@pytest.mark.parametrize(
    "edit",
    [
        {"num_classes": 10**9},
        {"shape": [-2]},
        {"shape": []},
        {"shape": [10**9]},
        {"sigma_data": "x"},
        {"sigma_data": 0},
        {"network": {"kind": "mlp", "channels": 65536, "blocks": 1024}},
        {"network": {"kind": "mlp", "channels": 65536, "blocks": 40}},
        {"network": {"kind": "nobody's"}},
        {"network": []},
        {"network": {"kind": "edm", "arguments": {"num_blocks": 10**9}}},
    ],
)
def test_a_model_that_claims_another_size_is_refused_before_memory_is_taken(model: Path, edit: dict[str, Any]) -> None:
    path = model / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    begun = time.monotonic()
    with pytest.raises(UserError):
        load_model(model)
    assert time.monotonic() - begun < 10


def test_a_model_without_its_hash_is_told_by_its_file(model: Path) -> None:
    path = model / "model.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in said.items() if k != "sha256"}))
    assert load_model(model)[1]["sha256"] == said["sha256"]


def test_a_partition_of_more_conditions_than_it_lists_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"condition 2, 3, 4, 5, 6, 7, 8, 9, \.\.\. is in no part"):
        Partition([[0], [1]], 10**12, "explicit")


# Logs.


def test_damaged_lines_are_left_out_and_lines_are_added_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\xffep": 2}\n{"step";3}\n[4]\n{"step": 5')
    assert parsed_lines(path) == [{"step": 1}, None, None, None, None]
    append_line(path, {"step": 6})
    assert read_lines(path) == [{"step": 1}, {"step": 6}]
    append_line(tmp_path / "new.jsonl", {"step": 1})
    assert (tmp_path / "new.jsonl").read_bytes() == b'{"step": 1}\n'


def test_a_damaged_log_stops_nobody_and_is_told_once(copied: Path, msd: Msd) -> None:
    path = copied / "students" / "0" / "0-dm" / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    (copied / "metrics" / "watch.jsonl").write_text('{"metric": 3}\n{"metric"\n[]\n')
    path.write_bytes(lines[0].replace(b'"losses":', b'"losses";') + b"\n" + b'{"step": 4, "losses": "x"}\n' + lines[2])
    for words in (["status"], ["report", "--no-pictures"], ["watch", "--once"]):
        done = msd(words[0], str(copied), *words[1:])
        assert done.returncode == 0, (words, done.stderr)
    done = msd("distill", str(copied), "stages.0.steps=8")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("1 damaged line was left out") == 1
    assert all(line is not None for line in parsed_lines(path))
