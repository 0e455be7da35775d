"""A tiny latent DiT through the ordinary commands: images encoded, samples decoded, measured and exported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import msdcli
from msdcli.data.images import to_uint8
from msdcli.data.latents import RECORD
from msdcli.engine.checkpoints.model import load_model
from tests.conftest import Msd
from tests.latent_teacher import RECIPE, latent_pipeline, picture_folder

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]

STAGES = """
stages:
  - {objective: dm, steps: 3, batch: 4, fake_updates: 1, log_every: 1, fake_batch: shared}
  - {objective: adm, steps: 3, batch: 4, fake_updates: 1, pairs: none, taps: [block_0, block_1],
     select: {every: 2, samples: 20}}
evaluation: {samples: 40}
"""


def test_a_latent_teacher_from_pictures_to_a_bundle(msd: Msd, tmp_path: Path) -> None:
    _, vae = latent_pipeline(tmp_path / "pipeline")
    picture_folder(tmp_path / "pictures", per_class=12)
    (tmp_path / "latent.yaml").write_text(RECIPE[: RECIPE.index("stages:")] + STAGES)
    guided = "teacher.guidance={scale: [1.0, 3.0]}"

    # Real images are encoded before the students start, because adm looks at them.
    done = msd("distill", "latent.yaml", guided)
    assert done.returncode == 0, done.stderr
    assert "images encoded at" in done.stderr
    record = json.loads(next((tmp_path / "runs/.shared").glob("latents-*")).joinpath(RECORD).read_text())
    assert (record["shape"], record["dtype"]) == ([48, 2, 4, 4, 4], "float32")
    run = tmp_path / "runs/latent"
    partition = json.loads((run / "partition.json").read_text())
    assert partition["parts"] == [[0, 1], [2, 3]]
    with Image.open(run / "samples/grid.png") as grid:
        assert grid.height == 28 + 4 * (8 * 8 + 2) + 2, "captions, and decoded 8x8 pictures, eight times enlarged"
    before = {f: f.stat().st_mtime_ns for f in run.rglob("*.safetensors")}
    again = msd("distill", "latent.yaml", guided)
    assert (again.returncode, "encoded" in again.stderr) == (0, False), again.stderr
    assert before == {f: f.stat().st_mtime_ns for f in run.rglob("*.safetensors")}, "nothing is made twice"

    # Samples are pictures, those that the library's own autoencoder makes of the latents.
    done = msd("sample", "runs/latent", "--all", "-n", "8", "--format", "png", "--out", "drawn")
    assert done.returncode == 0, done.stderr
    students = msdcli.load(run)
    z = students.sample([0, 1, 2, 3, 0, 1, 2, 3], latents=True)
    wanted = to_uint8(vae.decode(z / 0.6).sample).permute(0, 2, 3, 1).numpy().astype(int)
    drawn = np.stack([np.asarray(Image.open(f)) for f in sorted((tmp_path / "drawn").glob("*.png"))]).astype(int)
    assert np.abs(drawn - wanted).max() <= 1, "one step of rounding at most"
    assert load_model(students.folders[1])[0].shape == (4, 4, 4)

    # Measured on pictures.
    done = msd("fid", "runs/latent", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {row["who"] for row in rows} == {"real halves", "teacher", "students"}
    assert all(np.isfinite(list(row["values"].values())).all() for row in rows)

    # Measured while they trained, on pictures too.
    for k in (0, 1):
        selected = json.loads((run / f"students/{k}/1-adm/model.json").read_text())["selected"]
        assert selected["metric"] == "fd_folder" and selected["of"] == 2 and selected["value"] <= selected["last"]

    # The report shows what the autoencoder makes, of teacher and students.
    assert msd("report", "runs/latent").returncode == 0
    page = (run / "report.html").read_text()
    assert "no pictures" not in page and page.count("images: teacher") >= 4 and page.count("images: student") == 4

    # Given away with the autoencoder: the folder alone samples pictures.
    done = msd("export", "runs/latent", "--out", "bundle")
    assert done.returncode == 0, done.stderr
    alone = tmp_path / "elsewhere"
    (tmp_path / "bundle").rename(alone)
    run.rename(tmp_path / "gone")
    exported = msdcli.load(alone)
    assert torch.equal(exported.sample([3, 0], seed=4), msdcli.load(tmp_path / "gone").sample([3, 0], seed=4))
    assert exported.sample([3], seed=4).shape == (1, 3, 8, 8)
