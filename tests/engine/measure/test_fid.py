"""`msd fid` through the real command line: parity, refusals, kept references, runs and their checkpoints."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import weakref
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msdcli.engine.measure import fid, watch
from msdcli.engine.measure.feature_metric import FidOptions
from msdcli.engine.tracking.events import silent
from msdcli.metrics.evaluate import collect
from msdcli.metrics.inception import FeatureNetwork
from msdcli.rundir import RunDir, read_lines
from tests.conftest import Msd, command, environment, train_classifier_briefly

SIZE = 16
DIGITS = """
name: digits
threads: 1
workers: 1
data: {name: digits}
teacher:
  network: {kind: unet, channels: 8, multipliers: [1], blocks: 1, embedding: 8}
  training: {steps: 4, batch: 16}
  solver: {steps: 2}
partition: {students: 2}
pairs: {count: 64, shard: 32}
stages:
  - {objective: dm, steps: 2, batch: 8, fake_updates: 1}
evaluation: {samples: 120, judge: off}
"""


SHORT = 20  # steps of the classifier: another metric, but measured in the same way


@pytest.fixture(autouse=True)
def _short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train_classifier_briefly(monkeypatch, SHORT)


@pytest.fixture
def published(fixtures: Path) -> Path:
    return fixtures / "fid"


@pytest.fixture
def weights(published: Path) -> Path:
    return published / "inception-2015-12-05.pt"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on pictures, too short to be good. Read it; copy it to change it."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "digits.yaml").write_text(DIGITS)
    from msdcli.engine.pipeline import distill
    from msdcli.recipe import load

    with pytest.MonkeyPatch.context() as patch:
        train_classifier_briefly(patch, SHORT)
        distill(load(folder / "digits.yaml", [f"run={folder / 'runs' / 'digits'}"]), silent)
    return folder / "runs" / "digits"


def png(path: Path, pixels: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def folder_of(path: Path, count: int = 6) -> Path:
    rng = np.random.default_rng(count)
    for i in range(count):
        png(path / f"{i}.png", rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    return path


def figure(msd: Msd, *words: Any) -> dict[str, Any]:
    done = msd("fid", *map(str, words), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refusal(msd: Msd, *words: Any) -> str:
    done = msd("fid", *map(str, words))
    assert done.returncode == 2, (done.stdout, done.stderr)
    return done.stderr


# Pictures in files.


@pytest.mark.parametrize("protocol", ["clean", "legacy-tensorflow"])
def test_parity_from_zip_folder_and_npz(
    msd: Msd, published: Path, weights: Path, tmp_path: Path, protocol: str
) -> None:
    expected = json.loads((published / "expected.json").read_text())[protocol.replace("-", "_")]
    options = ("--protocol", protocol, "--weights", weights)
    a, b = published / "a.zip", published / "b.zip"
    found = figure(msd, a, b, *options)
    assert found["fid"] == pytest.approx(expected["exact"], rel=1e-6)
    assert found["fid"] == pytest.approx(expected["clean_fid"], rel=1e-4)
    assert (found["protocol"], found["record"]["count"], found["record"]["reference_count"]) == (protocol, 240, 240)
    assert len(found["record"]["weights_sha256"]) == 64 and not found["record"]["weights_published"]
    with zipfile.ZipFile(a) as file:
        file.extractall(tmp_path / "a")
        names = sorted(name for name in file.namelist() if name.endswith(".png"))
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(file.read(name))).convert("RGB")) for name in names])
    np.savez(tmp_path / "a.npz", images=pixels)
    for source, more in ((tmp_path / "a", ("--batch", 50, "--workers", 3)), (tmp_path / "a.npz", ("--batch", 240))):
        assert figure(msd, source, b, *options, *more)["fid"] == pytest.approx(found["fid"], rel=1e-9)


def test_two_processes_are_one(msd: Msd, published: Path, weights: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = (str(published / "a.zip"), str(published / "b.zip"), "--weights", str(weights), "--batch", "16", "--json")
    join_torchrun = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            command("fid", *words), env=environment(RANK=str(rank), **join_torchrun), stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    first, second = (process.communicate(timeout=120)[0] for process in processes)
    expected = json.loads((published / "expected.json").read_text())["clean"]["exact"]
    found, alone = json.loads(first), figure(msd, *words[:-1])
    assert (found["record"]["count"], second) == (240, "")
    assert found["fid"] == pytest.approx(expected, rel=1e-6)
    assert found["fid"] == pytest.approx(alone["fid"], rel=1e-9)


def test_a_reference_is_computed_once(msd: Msd, weights: Path, tmp_path: Path, monkeypatch: Any) -> None:
    a, b = folder_of(tmp_path / "a"), folder_of(tmp_path / "b", 7)
    options = ("--weights", weights, "--bootstrap", 5, "--infinity")
    first = figure(msd, a, b, *options)
    assert first["intervals"]["fid"]["low"] <= first["fid"] <= first["intervals"]["fid"]["high"]
    from msdcli.engine.measure import features

    monkeypatch.setattr(features, "collect", lambda *_, **__: pytest.fail("computed again"))
    assert figure(msd, a, b, *options) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (kept,) = (tmp_path / "cache" / "msd").glob("*/features.npz")
    kept.write_bytes(kept.read_bytes()[:500])
    monkeypatch.chdir(tmp_path)
    assert figure(msd, a, b, *options) == first, "a damaged file is made again"
    png(b / "0.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    assert figure(msd, a, b, *options)["fid"] != first["fid"]


def test_published_statistics_are_a_reference(msd: Msd, weights: Path, tmp_path: Path) -> None:
    a = folder_of(tmp_path / "a")
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    found = figure(msd, a, tmp_path / "ref.npz", "--weights", weights)
    assert found["record"]["reference_count"] is None and "kid" not in found
    np.savez(tmp_path / "other.npz", mu=np.zeros(512), sigma=np.eye(512))
    said = refusal(msd, a, tmp_path / "other.npz", "--weights", weights)
    assert "512 dimensions" in said and "2048" in said and "other.npz" in said


def test_statistics_of_another_protocol_are_refused(msd: Msd, weights: Path, tmp_path: Path) -> None:
    a, options = folder_of(tmp_path / "a"), ("--weights", weights)
    named = tmp_path / "toy_legacy_tensorflow_custom_na.npz"
    np.savez(named, mu=np.zeros(2048), sigma=np.eye(2048))
    said = refusal(msd, a, named, *options)
    assert "legacy-tensorflow" in said and "protocol clean" in said
    assert "legacy-tensorflow" in refusal(msd, a, named, *options, "--dry-run"), "before anything is measured"
    record = figure(msd, a, named, *options, "--protocol", "edm")["record"]
    assert record["reference_statistics"] == {"protocol": "legacy-tensorflow", "said_by": "its name"}
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    unknown = figure(msd, a, tmp_path / "ref.npz", *options)
    assert unknown["record"]["reference_statistics"]["protocol"] is None
    assert any("does not say of which protocol" in warning for warning in unknown["warnings"])


def test_a_batch_of_adm_is_images_and_statistics(msd: Msd, weights: Path, tmp_path: Path) -> None:
    """Its statistics are of the protocol `edm`; its images are images on either side, under any."""
    a, options = folder_of(tmp_path / "a"), ("--weights", weights)
    pixels = np.random.default_rng(9).integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8)
    batch = tmp_path / "VIRTUAL_toy.npz"
    np.savez(batch, arr_0=pixels, mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(3), sigma_s=np.eye(3))
    np.savez(tmp_path / "plain.npz", arr_0=pixels)
    assert figure(msd, batch, a, *options)["fid"] == figure(msd, tmp_path / "plain.npz", a, *options)["fid"]
    under_clean = figure(msd, a, batch, *options)
    assert under_clean["fid"] == figure(msd, a, tmp_path / "plain.npz", *options)["fid"]
    assert any("of legacy-tensorflow" in warning for warning in under_clean["warnings"])
    under_edm = figure(msd, a, batch, *options, "--protocol", "edm")
    assert under_edm["record"]["reference_count"] is None and not any("protocol" in w for w in under_edm["warnings"])


def test_some_pictures_are_drawn_by_seed(msd: Msd, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    for name in ("x", "y"):
        folder_of(tmp_path / "two" / name, 6 if name == "x" else 7)
    reference, words = folder_of(tmp_path / "b", 8), ("--weights", weights, "--samples", 6)
    found = figure(msd, tmp_path / "two", reference, *words)
    drawn = found["record"]["drawn"]
    order = np.arange(13)
    np.random.RandomState(0).shuffle(order)  # NVlabs' ImageFolderDataset
    assert (drawn["seed"], drawn["of"], drawn["numbers"]) == (0, 13, sorted(order[:6].tolist()))
    assert figure(msd, tmp_path / "two", reference, *words) == found
    assert figure(msd, tmp_path / "two", reference, *words, "--seed", 1)["fid"] != found["fid"]
    assert "drawn" not in figure(msd, reference, reference, "--weights", weights, "--samples", 8)["record"]


def test_odd_pictures_are_read_or_named(msd: Msd, weights: Path, tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    for name in ("colour", "odd"):
        folder_of(tmp_path / name)
    for name, image in (("g.png", grey), ("p.png", grey)):
        png(tmp_path / "colour" / name, np.stack([image] * 3, axis=-1))
    png(tmp_path / "odd" / "g.png", grey)
    Image.fromarray(grey).convert("P").save(tmp_path / "odd" / "p.png")
    same = figure(msd, tmp_path / "odd", tmp_path / "colour", "--weights", weights)
    assert same["fid"] < 1e-6, "grey and palette are the colours that they stand for"
    Image.fromarray(grey).convert("CMYK").save(tmp_path / "odd" / "c.jpg")
    png(tmp_path / "odd" / "large.png", np.zeros((3 * SIZE, SIZE, 3), np.uint8))
    mixed = figure(msd, tmp_path / "odd", tmp_path / "colour", "--weights", weights)
    assert mixed["record"]["count"] == 10
    (tmp_path / "odd" / "deep.png").write_bytes(b"")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "odd" / "deep.png")
    assert "deep.png has more than 8 bits" in refusal(msd, tmp_path / "odd", tmp_path / "colour", "--weights", weights)
    whole = (tmp_path / "odd" / "g.png").read_bytes()
    (tmp_path / "odd" / "deep.png").write_bytes(whole[: len(whole) // 2])
    assert "deep.png is damaged" in refusal(msd, tmp_path / "odd", tmp_path / "colour", "--weights", weights)


def test_what_cannot_be_compared_is_refused(msd: Msd, weights: Path, tmp_path: Path) -> None:
    a = folder_of(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    for words, said in (
        ((tmp_path / "empty", a), "empty holds no image"),
        ((a, tmp_path / "empty"), "empty holds no image"),
        ((a, "nowhere.zip"), "nowhere.zip does not exist"),
        ((a, "cifar11_clean_train_32"), "cifar11_clean_train_32"),
        ((a,), "compared with what"),
        ((a, a, "--samples", "7"), "6 images, fewer than the 7"),
        ((a, a, "--protocol", "data"), "run directory"),
        ((a, a, "--watch"), "run directory"),
        ((a, a, "--lean", "--infinity"), "--lean keeps no features"),
    ):
        assert said in refusal(msd, *words, "--weights", weights), words
    before = sorted(tmp_path.rglob("*"))
    assert msd("fid", str(a), str(a), "--weights", str(weights), "--dry-run").returncode == 0
    assert sorted(tmp_path.rglob("*")) == before


# A run.


def test_a_run_has_companions_and_intervals(msd: Msd, digits: Path) -> None:
    found = figure(msd, digits)
    rows = {(row["who"], row["group"]): row for row in found["rows"]}
    students = rows["students", "whole"]
    names = {"fd_digits", "accuracy", "kid", "precision", "recall", "density", "coverage"}
    assert names == set(students["values"]) == set(students["intervals"])
    assert (students["samples"], students["reference"]) == (120, 1797)
    assert sum(rows["students", f"student {k}"]["samples"] for k in range(2)) == 120
    assert names == set(rows["teacher", "class 3"]["values"]) and ("real halves", "whole") in rows
    assert found["network"]["weights_sha256"] == found["classifier_sha256"] and found["replicates"] == 100
    shown = msd("fid", str(digits), "--batch", "500")
    assert json.loads((digits / "metrics" / "fd_digits.json").read_text()) == found, "the same bits again"
    assert "coverage" in shown.stdout and "95 % of students" in shown.stdout


@pytest.mark.parametrize(("kept_as", "who"), [("halves", "real halves"), ("rows_of_teacher", "teacher")])
def test_what_no_student_changes_is_kept_for_other_runs(msd: Msd, digits: Path, kept_as: str, who: str) -> None:
    def measured(*words: str) -> list[dict[str, Any]]:
        return [row for row in figure(msd, digits, *words)["rows"] if row["who"] == who]

    before = measured()
    files = [(file, json.loads(file.read_text())) for file in (digits.parent / ".shared").glob(f"{kept_as}-*.json")]
    ((path, kept),) = ((f, told) for f, told in files if told["metric"] == "fd_digits" and told["rows"] == before)
    kept["rows"][0]["values"] |= {"kid": 7.0}
    path.write_text(json.dumps(kept))
    assert measured() == kept["rows"] != before, "read and not made again"
    assert measured("--bootstrap", "3")[0]["values"] == before[0]["values"] or who == "real halves", "other intervals"
    path.write_text("{")
    assert measured() == before


def test_the_teacher_is_prepared_as_it_is_measured(msd: Msd, digits: Path) -> None:
    """All samples of the table, and every line: what the measurement reads is what was prepared."""
    shared = digits.parent / ".shared"
    for path in shared.glob("rows_of_teacher-*.json"):
        path.unlink()
    fid.prepare_teacher(RunDir(digits), silent)
    (path,) = shared.glob("rows_of_teacher-*.json")
    rows = [row for row in figure(msd, digits)["rows"] if row["who"] == "teacher"]
    assert [*shared.glob("rows_of_teacher-*.json")] == [path] and json.loads(path.read_text())["rows"] == rows


def test_a_run_under_a_published_protocol(msd: Msd, digits: Path, weights: Path, tmp_path: Path) -> None:
    reference = folder_of(tmp_path / "reference", 8)
    words = ("--protocol", "clean", "--weights", weights, "--samples", 24)
    found = figure(msd, digits, reference, *words, "--save", 24)
    kept = digits / "samples" / "measured-fid_clean"
    rows = {(row["who"], row["group"]): row["values"] for row in found["rows"]}
    assert set(rows) == {("teacher", "whole"), ("students", "whole")}, "it knows no classes, and is too small to halve"
    saved = figure(msd, kept, reference, "--weights", weights)
    assert saved["fid"] == pytest.approx(rows["students", "whole"]["fid_clean"], rel=1e-6), "the pixels of the PNGs"
    assert saved["record"]["labels"] == found["labels"]
    lean = figure(msd, digits, reference, *words, "--lean")
    (row,) = (row for row in lean["rows"] if row["who"] == "students")
    assert row["values"] == {"fid_clean": pytest.approx(rows["students", "whole"]["fid_clean"], rel=1e-9)}
    for more in ((reference,), ("--weights", weights)):
        assert "the run's own" in refusal(msd, digits, *more)
    assert "the seed of its recipe" in refusal(msd, digits, "--seed", 1)
    other = tmp_path / "toy_legacy_pytorch_custom_na.npz"
    np.savez(other, mu=np.zeros(2048), sigma=np.eye(2048))
    assert "legacy-pytorch" in refusal(msd, digits, other, *words)


def test_groups_of_classes(msd: Msd, digits: Path, weights: Path, tmp_path: Path) -> None:
    words = ("--group", "even=0,2,4,6,8", "--group", "first=0-4", "--group", digits)
    found = {row["group"]: row for row in figure(msd, digits, *words)["rows"] if row["who"] == "students"}
    assert found[f"student 0 of {digits}"]["values"] == found["first"]["values"] == found["student 0"]["values"]
    assert found["even"]["samples"] == sum(found[f"class {c}"]["samples"] for c in range(0, 10, 2))
    a = folder_of(tmp_path / "a", 15)
    labels = [[f"{i}.png", min(i // 4, 2)] for i in range(15)]
    (a / "dataset.json").write_text(json.dumps({"labels": labels}))
    files = figure(msd, a, a, "--weights", weights, "--group", "ab=0,1")["groups"]
    assert (files["ab"]["count"], files["class 2"]["count"]) == (8, 7) and files["ab"]["fid"] < 1e-6
    for group, said in (
        ("even=0,12", "class '12' does not exist"),
        ("even=x", "class 'x' does not exist"),
        ("even=4-2", "class '4-2' does not exist"),
        ("nowhere", "neither NAME=CLASSES nor a partition"),
        ("whole=0,1", "is the name of a line"),
        ("student 0=3", "is the name of a line"),
        ("class 2=0", "is the name of a line"),
    ):
        assert said in refusal(msd, digits, "--group", group)
    assert "twice" in refusal(msd, digits, "--group", "a=1", "--group", "a=2")
    flat = folder_of(tmp_path / "flat")
    assert "images with labels" in refusal(msd, flat, flat, "--weights", weights, "--group", "a=0")
    with_reference = (digits, flat, "--protocol", "clean", "--weights", weights, "--samples", "24")
    assert "does not tell classes apart" in refusal(msd, *with_reference, "--group", "a=0")


def test_points_have_no_inception_features(msd: Msd, finished: Path, weights: Path) -> None:
    assert "holds points" in refusal(msd, finished, "--protocol", "clean", "--weights", weights)


def test_the_reference_is_checked_before_the_first_sample(
    msd: Msd, digits: Path, weights: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(fid.EvaluationContext, "students", lambda *_: pytest.fail("sampling began"))
    monkeypatch.setattr(fid.EvaluationContext, "teacher", lambda *_: pytest.fail("sampling began"))
    words = ("--protocol", "clean", "--weights", weights)
    assert "absent.zip does not exist" in refusal(msd, digits, "absent.zip", *words)


def test_batches_are_let_go(digits: Path) -> None:
    """No more than the batch at hand and the next are alive at once, however many are drawn."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def drawn() -> Any:
        for _ in range(20):
            image = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
            alive.append(weakref.ref(image))
            assert sum(ref() is not None for ref in alive) <= 2
            yield image

    network = FeatureNetwork("means", lambda x: x.float().mean(dim=(2, 3)))
    assert collect(drawn(), network, keep_features=False).count == 80


# Checkpoints.


def test_watch_ends_with_the_run_and_agrees_with_it(msd: Msd, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits.parent, tmp_path / "runs")
    run = tmp_path / "runs" / "digits"
    done = msd("fid", str(run), "--watch", "--json")
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    measured = json.loads((run / "metrics" / "fd_digits.json").read_text())["rows"]
    values = {row["group"]: row["values"]["fd_digits"] for row in measured if row["who"] == "students"}
    assert line["whole"] == pytest.approx(values["whole"], rel=1e-6)
    assert line["students"]["1"]["value"] == pytest.approx(values["student 1"], rel=1e-6)
    assert msd("fid", str(run), "--watch").returncode == 0
    assert len((run / "metrics" / "watch.jsonl").read_text().splitlines()) == 1, "nothing new, no line"
    with Image.open(run / "metrics" / "watch.png") as image:
        assert image.format == "PNG"


def test_watch_follows_what_is_in_training(digits: Path, tmp_path: Path) -> None:
    """A student's average in its training state is what it draws with, and the end is seen when it comes."""
    shutil.copytree(digits.parent, tmp_path / "runs")
    run = RunDir(tmp_path / "runs" / "digits")
    stages = [run.stage(k, 0, "dm") for k in range(2)]
    for folder in stages:
        (folder / "model.json").rename(folder / "kept")
    (stages[1] / "state.safetensors").rename(stages[1] / "later")
    lines = watch.watch(run, silent, FidOptions(), poll=0)
    first = next(lines)
    assert (list(first["students"]), first["whole"], first["students"]["0"]["step"]) == (["0"], None, 2)
    (stages[1] / "later").rename(stages[1] / "state.safetensors")
    both = next(lines)
    for folder in stages:
        (folder / "kept").rename(folder / "model.json")
    (last,) = lines
    assert both["whole"] == last["whole"] and len(last["students"]) == 2
    assert len(read_lines(run.watched)) == 2, "the weights are the same"


def test_bench_is_a_group(msd: Msd) -> None:
    assert "fid" in msd("bench", "--help").stdout and "--json" in msd("bench", "fid", "--help").stdout
