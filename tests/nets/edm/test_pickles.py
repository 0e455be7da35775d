"""The pickle reader: what it reads, and a corpus of hostile files that it must refuse with nothing run."""

from __future__ import annotations

import contextlib
import copyreg
import hashlib
import os
import pickle
import sys
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msdcli.errors import UserError
from msdcli.nets import pickle_machine
from msdcli.nets.edm.importing import build_edm, import_edm
from msdcli.nets.edm.pickles import NAMES, TensorRecord, read_pickle
from msdcli.nets.pickle_machine import ArrayRecord, Record
from tests.nets.edm.edm_format import EasyDict, Persistent, dumps, shake, snapshot
from tests.nets.edm.hostile_pickles import CANARY, HOSTILE, RUN, program

EVENTS: list[tuple[str, str]] = []
WATCH = {"on": False}


def _audit(event: str, args: tuple) -> None:
    if WATCH["on"]:
        EVENTS.append((event, str(args[:1])))


sys.addaudithook(_audit)


def read(tmp_path: Path, data: bytes):
    path = tmp_path / "teacher.pkl"
    path.write_bytes(data)
    return read_pickle(path)


# What it reads.


def test_reads_tensors_of_every_type_as_views_of_the_file(tmp_path):
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
    tensors = {str(dtype): torch.arange(12).reshape(3, 4).to(dtype) for dtype in dtypes}
    tensors |= {"transposed": torch.arange(12.0).reshape(3, 4).t(), "part": torch.arange(12.0)[3:9:2]}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(torch.ones(2))}
    held = read(tmp_path, dumps(tensors)).content
    assert held.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert isinstance(held[name], TensorRecord)
        assert held[name].dtype == tensor.dtype
        assert torch.equal(held[name].read(), tensor)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_containers_numbers_and_records(tmp_path, protocol):
    content = {"a": [1, -2, 2**40, 1.5, True, None], "b": (1, (2, 3, 4, 5)), "c": OrderedDict(x="é")}
    content |= {"d": EasyDict(path="x.zip"), "e": Persistent("EDMLoss", {"P_mean": -1.2}), "list": [[], {}, ()]}
    held = read(tmp_path, dumps(content, protocol)).content
    assert isinstance(held["e"], Record)
    assert held["e"].class_name == "EDMLoss"
    assert held["e"].state == {"P_mean": -1.2}
    assert {name: held[name] for name in "abcd"} == {name: content[name] for name in "abcd"}


def test_reads_numpy_scalars_and_arrays(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    held = read(
        tmp_path, dumps({"scalar": np.float64(0.25), "array": array, "columns": np.asfortranarray(array)})
    ).content
    assert held["scalar"] == 0.25
    assert type(held["scalar"]) is float
    for name in ("array", "columns"):
        assert isinstance(held[name], ArrayRecord)
        assert np.array_equal(held[name].array, array)
    with pytest.raises(ValueError, match="read-only"):
        held["array"].array[0, 0] = 1


def test_names_size_and_hash_come_along(tmp_path):
    data = dumps({})
    source = read(tmp_path, data)
    assert (source.file, source.size) == ("teacher.pkl", len(data))
    assert source.sha256 == hashlib.sha256(data).hexdigest()


def test_source_code_in_the_file_is_not_run(tmp_path):
    code = f"import pathlib\npathlib.Path({str(tmp_path / CANARY)!r}).touch()\n"
    held = quietly(tmp_path, dumps({"ema": Persistent("EDMPrecond", {}, module_src=code)}))
    assert isinstance(held.content["ema"], Record)


# Hostile files.


def quietly(tmp_path: Path, data: bytes):
    """Read while watching for anything but the reading of this one file: imports, calls of exec, processes, files."""
    path = tmp_path / "teacher.pkl"
    path.write_bytes(data)
    EVENTS.clear()
    small = len(data) < 10**6
    if small:  # tracing is slow, and the larger files are about time
        tracemalloc.start()
    WATCH["on"] = True
    try:
        return read_pickle(path)
    finally:
        WATCH["on"] = False
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        strange = [(name, args) for name, args in EVENTS if name != "mmap.__new__" and str(path) not in args]
        assert not strange
        assert peak < 8 * 2**20
        assert not Path(CANARY).exists()
        assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_is_refused_and_nothing_runs(tmp_path, monkeypatch, name):
    data, word = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refusal:
        quietly(tmp_path, data)
    assert word in refusal.value.message
    assert len(refusal.value.message) < 1000
    assert refusal.value.message.isprintable()


@pytest.mark.parametrize("name", [name for name in HOSTILE if "os.system" in name])
def test_the_corpus_is_live(tmp_path, monkeypatch, name):
    """The canary is worth something: Python's own unpickler does run these."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(HOSTILE[name][0])
    assert Path(CANARY).exists()


def test_registered_extensions_do_not_help(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension("posix", "system", 0xF0)
    try:
        with pytest.raises(UserError, match="EXT1"):
            quietly(tmp_path, program(b"\x82\xf0", RUN))
    finally:
        copyreg.remove_extension("posix", "system", 0xF0)


@pytest.mark.parametrize("opcode", [b"\x8f", b"}\x94", b"]\x94", b"("])
def test_memory_per_opcode_is_bounded(tmp_path, monkeypatch, opcode):
    """The limit of a million opcodes bounds memory: the greediest, an empty set, takes 0.2 kB."""
    monkeypatch.setattr(pickle_machine, "MAX_OPCODES", 50_000)
    monkeypatch.setattr(pickle_machine, "MAX_NESTING", 10**9)
    (tmp_path / "teacher.pkl").write_bytes(program(opcode * 50_001))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="opcodes"):
            read_pickle(tmp_path / "teacher.pkl")
        assert tracemalloc.get_traced_memory()[1] < 50_000 * 300
    finally:
        tracemalloc.stop()


def test_deep_and_circular_content_neither_crashes_nor_hangs(tmp_path):
    deep = read(tmp_path, program(b")" + b"\x85" * 200_000)).content
    assert isinstance(deep, tuple)
    del deep
    ring = read(tmp_path, program(b"]\x94h\0a")).content
    assert ring[0] is ring


SMALL = {"kind": "edm", "preconditioning": "EDM", "arguments": {"img_resolution": 4, "img_channels": 1}}
SMALL["arguments"] |= {"model_channels": 4, "channel_mult": [1], "num_blocks": 1, "model_type": "SongUNet"}


@pytest.fixture(scope="module")
def small() -> bytes:
    return dumps(snapshot(shake(build_edm(SMALL)), SMALL))


def ends_well(path: Path) -> None:
    """Import either works or is refused; nothing else may be raised."""
    with contextlib.suppress(UserError):
        import_edm(path)


HYPOTHESIS = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@HYPOTHESIS
@given(cut=st.integers(0, 60_000))
def test_truncated_anywhere_is_refused(tmp_path, small, cut):
    path = tmp_path / "teacher.pkl"
    path.write_bytes(small[: cut % len(small)])
    with pytest.raises(UserError):
        import_edm(path)


@HYPOTHESIS
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_anywhere_ends_well(tmp_path, small, flips):
    data = bytearray(small)
    for at, value in flips:
        data[at % len(data)] = value
    path = tmp_path / "teacher.pkl"
    path.write_bytes(data)
    ends_well(path)


PIECES = [bytes([code]) for code in range(256)]
PIECES += [b"\x8c\x01a", b"K\x01", b"h\x00", b"h\x01"]
PIECES += [b"c" + module.encode() + b"\n" + name.encode() + b"\n" for module, name in NAMES]


@HYPOTHESIS
@given(parts=st.lists(st.sampled_from(PIECES), max_size=40))
def test_random_programs_end_well(tmp_path, parts):
    path = tmp_path / "teacher.pkl"
    path.write_bytes(program(*parts))
    ends_well(path)


@HYPOTHESIS
@given(data=st.binary(max_size=300))
def test_random_bytes_end_well(tmp_path, data):
    path = tmp_path / "teacher.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError):
        import_edm(path)


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, word in (("empty", "empty"), ("pipe", "pipe"), ("missing", "not exist"), (".", "folder")):
        with pytest.raises(UserError, match=word):
            read_pickle(tmp_path / name)
