"""sample, fid, export, status and partition on a finished run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import msdcli
from msdcli.data.images import ImageFiles, to_uint8
from msdcli.engine import pictures, sample
from msdcli.errors import UserError
from msdcli.recipe import load
from tests.conftest import Msd, command, environment


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_mixed_batch_comes_back_in_order(finished: Path) -> None:
    students = msdcli.load(finished)
    classes = [7, 0, 3, 4, 0, 7]
    together = students.sample(classes, seed=5)
    for i, c in enumerate(classes):
        assert torch.equal(students.sample([c], seed=5, first=i)[0], together[i])


def test_a_sample_depends_on_seed_number_and_class_alone(finished: Path) -> None:
    students = msdcli.load(finished)
    classes = [i % 8 for i in range(40)]
    wanted = students.sample(classes)
    for batch in (1, 3, 40):
        torch.testing.assert_close(students.sample(classes, batch=batch), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(students.sample(classes, seed=1), wanted)


def test_routing_asks_the_owner_and_loads_nobody_else(finished: Path) -> None:
    students = msdcli.load(finished)
    students.sample([0, 1])
    assert list(students._loaded) == [0]
    with pytest.raises(UserError, match="class 8 does not exist"):
        students.sample([8])


def test_a_request_reads_every_student_once_though_only_one_may_stay(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, load = list[Path](), sample.load_model
    monkeypatch.setattr(sample, "load_model", lambda folder, *base: (read.append(folder), load(folder, *base))[1])
    students = msdcli.load(finished)
    students.max_resident = 1
    students.sample(list(range(8)), batch=2)
    assert len(students.folders) == 2 and sorted(read) == sorted({students.folders[k] for k in range(2)})


def test_bundle_gives_bit_equal_samples_and_its_readme_runs(finished: Path, msd: Msd, tmp_path: Path) -> None:
    done = msd("export", str(finished), "--out", "given", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["max_difference"] == 0
    bundle = tmp_path / "given"
    classes = [6, 1, 3]
    assert torch.equal(msdcli.load(bundle).sample(classes, seed=2), msdcli.load(finished).sample(classes, seed=2))
    code = (bundle / "README.md").read_text().split("```python")[1].split("```")[0]
    exec(code.replace('"given"', repr(str(bundle))), scope := {})
    assert scope["images"].shape == (2, 2)


def test_export_does_not_overwrite_other_things(finished: Path, msd: Msd, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    done = msd("export", str(finished), "--out", "mine")
    assert (done.returncode, [p.name for p in (tmp_path / "mine").iterdir()]) == (2, ["thesis.tex"])


def test_sample_writes_what_it_says(finished: Path, msd: Msd, tmp_path: Path) -> None:
    done = msd(
        "sample", str(finished), "--classes", "3,moons", "-n", "10", "--format", "npz", "--out", "s.npz", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["students"] == [0]
    with np.load(tmp_path / "s.npz") as file:
        arrays = dict(file)
    assert arrays["labels"].tolist() == [3, 2] * 5 and arrays["images"].shape == (10, 2)
    assert msd("sample", str(finished), "--all", "-n", "80", "--out", "s.png").returncode == 0
    assert pixels(tmp_path / "s.png").shape[1] > 500
    for words, said in ((("--classes", "11"), "class '11' does not exist"), ((), "say which classes")):
        refused = msd("sample", str(finished), *words)
        assert (refused.returncode, said in refused.stderr) == (2, True)


def test_pictures_are_saved_with_edms_rounding(tmp_path: Path) -> None:
    images = torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0, 0.0039]).reshape(6, 1, 1, 1)
    assert to_uint8(images).flatten().tolist() == [0, 0, 128, 255, 255, 128]
    folder, drawn = tmp_path / "p", [((5, 3), images[[5, 3]].expand(2, 1, 4, 4)), ((0,), images[:1].expand(1, 3, 4, 4))]
    pictures.save_pngs(folder, drawn, pictures.labels_file([0] * 6))
    assert pixels(folder / "000003.png").tolist() == [[255] * 4] * 4
    assert sorted(p.name for p in folder.iterdir()) == ["000000.png", "000003.png", "000005.png", "dataset.json"]
    assert len(json.loads((folder / "dataset.json").read_text())["labels"]) == 6
    pictures.save_grid(tmp_path / "g.png", [images.expand(6, 3, 4, 4)] * 2)
    assert pixels(tmp_path / "g.png").shape == (2 + 2 * 34, 2 + 6 * 34, 3)


def test_a_folder_of_samples_replaces_older_samples_and_nothing_else(tmp_path: Path) -> None:
    folder, two = tmp_path / "p", torch.zeros(2, 3, 4, 4)
    pictures.save_pngs(folder, [(range(2), two)], {})
    before = (folder / "000001.png").read_bytes()

    def dies() -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        yield range(2), two + 1
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        pictures.save_pngs(folder, dies(), {})
    assert (folder / "000001.png").read_bytes() == before
    pictures.save_pngs(folder, [(range(1), two[:1])], {})
    assert [p.name for p in tmp_path.rglob("*.png")] == ["000000.png"]  # an older, larger set leaves nothing behind
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.tex, which is no sample"):
        pictures.save_pngs(folder, [(range(1), two[:1])], {})
    assert (folder / "thesis.tex").read_text() == "precious"


def test_a_zip_of_samples_is_a_data_set_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name in ("a.zip", "b.zip"):
        drawn = [((4, 1), images[[4, 1]]), ((0, 2, 3), images[[0, 2, 3]])]
        pictures.save_zip(tmp_path / name, drawn, pictures.labels_file([7, 8, 7, 8, 9]))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    source = ImageFiles(tmp_path / "a.zip")
    assert source.names == [f"{i:06d}.png" for i in range(5)] and source.labels is not None
    assert source.labels.tolist() == [7, 8, 7, 8, 9]
    assert (np.stack([source.picture(i) for i in range(5)]) == to_uint8(images).permute(0, 2, 3, 1).numpy()).all()


def test_measurement_names_protocol_counts_and_weights(finished: Path) -> None:
    stored = json.loads((finished / "metrics/l1_toy2d.json").read_text())
    assert stored["samples"] == 200 and len(stored["students_sha256"]) == 2 and len(stored["teacher_sha256"]) == 64
    rows = {(row["who"], row["group"]): row for row in stored["rows"]}
    assert ("students", "student 1") in rows and ("teacher", "class 7") in rows
    assert rows["students", "whole"]["samples"] == 200
    assert all(0 <= row["values"]["l1_toy2d"] <= 2 for row in rows.values())


def test_status_and_partition_tell_what_is(finished: Path, msd: Msd) -> None:
    state = json.loads(msd("status", str(finished), "--json").stdout)
    assert state["done"] and state["students"][1]["stages"][0]["state"] == "done"
    parts = json.loads(msd("partition", str(finished), "--json").stdout)["parts"]
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7]]
    shown = msd("partition", "digits", "partition.method=kmeans", "partition.features=images")
    assert shown.returncode == 0 and "student" in shown.stdout
    told = next(line for line in msd("status", str(finished)).stdout.splitlines() if line.startswith("measured: "))
    figure = json.loads((finished / "metrics/l1_toy2d.json").read_text())["value"]
    assert told.startswith(f"measured: l1_toy2d {figure:.3f}, in "), "the name of a figure alone says little"


@pytest.mark.parametrize("verb", ["fid", "sample", "export", "status", "partition"])
def test_what_is_no_run_directory_is_refused(msd: Msd, verb: str) -> None:
    done = msd(verb, "nowhere", *(["--all"] if verb == "sample" else []))
    assert done.returncode == 2
    assert "nowhere" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["distill", "fid", "sample", "export", "partition"])
def test_dry_run_writes_nothing(finished: Path, msd: Msd, tiny: Path, verb: str) -> None:
    words = {"distill": ["tiny.yaml"], "partition": ["tiny.yaml", "--picture", "p.png"]}.get(verb, [str(finished)])
    before = sorted(finished.rglob("*"))
    done = msd(verb, *words, *(["--all"] if verb == "sample" else []), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny.yaml"]
    assert sorted(finished.rglob("*")) == before


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    for debug, shown in (("", False), ("1", True)):
        env = environment(MSD_DEBUG=debug)
        done = subprocess.run(command("status", "nowhere"), cwd=tmp_path, env=env, capture_output=True, text=True)
        assert ("Traceback" in done.stderr, done.returncode) == (shown, 1 if debug else 2)


def test_recipes_are_listed_copied_and_checked(msd: Msd, tmp_path: Path) -> None:
    assert "digits" in msd("recipes").stdout
    assert msd("recipes", "cp", "digits", "my.yaml").returncode == 0
    assert msd("recipes", "validate", "my.yaml").returncode == 0
    assert load("my.yaml").run_dir == Path("runs/my"), "a run of its own, and no other of runs/digits"
    again = msd("recipes", "cp", "digits", "my.yaml")
    assert (again.returncode, "exists" in again.stderr) == (2, True)
    assert json.loads(msd("recipes", "schema").stdout)["properties"]["stages"]["description"]
