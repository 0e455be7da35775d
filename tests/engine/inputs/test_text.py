"""A text-conditioned teacher through the ordinary commands: partition, distill, sample, export."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import msdcli
from msdcli.data.images import to_uint8
from msdcli.engine import pipeline
from msdcli.engine.bench import recipe as bench
from msdcli.engine.inputs import prompts as engine
from msdcli.engine.measure import feature_metric
from msdcli.engine.measure.feature_metric import FidOptions
from msdcli.engine.train import precision
from msdcli.errors import UserError
from msdcli.nets.diffusers.text_denoiser import TextDenoiser
from msdcli.partition import Partition
from msdcli.recipe import load
from msdcli.rundir import RunDir
from tests.conftest import Msd
from tests.latent_teacher import VAE
from tests.text_teacher import diffusers, prompts, sd3_pipeline, sd_pipeline, sdxl_pipeline

pytestmark = pytest.mark.filterwarnings("default")
RECIPE = """
name: text
threads: 1
workers: 1
data: {name: prompts, path: prompts.txt}
teacher:
  path: pipeline
  solver: {steps: 2, sigma_min: 0.03, sigma_max: 14.6}
  guidance: {scale: 1.75}
partition: {students: 2, method: kmeans}
pairs: {count: 8, shard: 8}
stages: [{objective: dm, steps: 2, batch: 4, fake_updates: 1, log_every: 1, sigma_init: 14.6}]
"""


@pytest.fixture(scope="module")
def hashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose prompts are divided by a hash. Its samples may be added to."""
    folder = tmp_path_factory.mktemp("hashed")
    sd_pipeline(folder / "pipeline")
    (folder / "prompts.txt").write_text("\n".join(prompts(40)))
    (folder / "text.yaml").write_text(RECIPE.replace("kmeans", "random"))
    with contextlib.chdir(folder):
        pipeline.distill(load("text.yaml"), lambda _: None)
    return folder / "runs/text"


@pytest.fixture
def place(msd: Msd, tmp_path: Path) -> Path:
    """A folder with a pipeline, forty prompts and a recipe."""
    sd_pipeline(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts(40)) + "\n\n  a red   fox \na red fox\n")
    (tmp_path / "text.yaml").write_text(RECIPE)
    return tmp_path


def test_distilled_sampled_and_exported(place: Path, msd: Msd) -> None:
    done = msd("distill", "text.yaml")
    assert done.returncode == 0, done.stderr
    assert "41 prompts, 1 repeated rows, 1 empty rows" in done.stderr and "--prompt" in done.stdout
    with Image.open(place / "runs/text/samples/grid.png") as grid:
        assert grid.width > 11 * (8 * 8 + 2), (
            "eight of the students', and some of the teacher's, though there are no pairs"
        )
    state = json.loads(msd("status", "runs/text", "--json").stdout)
    assert state["done"]
    made = Partition.load(place / "runs/text/partition.json")
    assert sorted(map(len, made.parts)) == [20, 21]
    assert json.loads((place / "runs/text/run.json").read_text())["class_names"] == []
    reported = msd("report", "runs/text")
    page = (place / "runs/text/report.html").read_text()
    assert reported.returncode == 0 and prompts(40)[0] in page, reported.stderr
    assert "41 prompts between them" in page and "Who owns which prompt" in page and "By prompt" in page
    shown = re.sub(r"<style.*?</style>|<script.*?</script>|<[^>]+>", "", page.split('id="recipe"')[0], flags=re.S)
    assert "class" not in shown

    trained = prompts(40)[0]
    shutil.move(place / "pipeline", place / "gone")  # the run has its own copy of all that it needs
    words = ("--prompt", "a blue house", "--prompt", trained, "-n", "4", "--format", "npz")
    done = msd("sample", "runs/text", *words, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["students"][1] == told["students"][3] == made.owner[0], "a prompt goes where it was trained"
    assert told["routing_seconds"] > 0
    with np.load(told["file"]) as file:
        assert file["prompts"].tolist() == ["a blue house", trained] * 2
        first = file["images"]

    students = msdcli.load(place / "runs/text")
    again = students.sample(prompts=["a blue house", trained] * 2)
    assert torch.equal(msdcli.load(place / "runs/text").sample(prompts=["a blue house", trained] * 2), again)
    assert (to_uint8(again).permute(0, 2, 3, 1).numpy() == first).all()
    torch.testing.assert_close(students.sample([0], first=1)[0], again[1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(again[0], again[2]), "number 2 is another sample"

    done = msd("export", "runs/text", "--out", "given", "--json")
    assert done.returncode == 0, done.stderr
    shutil.move(place / "runs", place / "gone/runs")
    bundle = msdcli.load(place / "given")
    assert torch.equal(bundle.sample(prompts=["a blue house", trained] * 2), again)
    with pytest.raises(UserError, match="were trained on are not in this folder"):
        bundle.sample([0])
    card = (place / "given/README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and "Every prompt belongs to one student" in card
    assert "class" not in card.split("---", 2)[2]
    code = card.split("```python")[1].split("```")[0]
    exec(code, scope := {})
    assert scope["images"].shape == (2, 3, 8, 8)
    for words in (("--all",), ("--classes", "0")):
        refused = msd("sample", "given", *words)
        assert (refused.returncode, "asked with texts" in refused.stderr) == (2, True), refused.stderr
    done = msd("sample", "given", "--prompt", "the sea")
    assert done.returncode == 0 and "routing is" in done.stdout, done.stderr


def test_files_have_safe_names_and_say_what_they_show(
    hashed: Path, tmp_path: Path, msd: Msd, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(hashed)
    (tmp_path / "mine.jsonl").write_text('{"prompt": "../../etc/passwd"}\n{"prompt": "Ünï/\\u0007 fox"}\n')
    done = msd("sample", run, "--prompts", "mine.jsonl", "--format", "png", "--json")
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout)["file"])
    assert folder.parent == hashed / "samples" and folder.name.startswith("etc-passwd-and-1-more-")
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["../../etc/passwd", "Ünï/\u0007 fox"]
    with Image.open(folder / lines[1]["file_name"]) as image:
        assert image.size == (8, 8)
    for words, said in ((("--prompt", " "), "empty"), (("--prompt", "x", "--all"), "either"), ((), "--prompt")):
        refused = msd("sample", run, *words)
        assert (refused.returncode, said in refused.stderr) == (2, True), refused.stderr
    monkeypatch.chdir(hashed.parent.parent)
    refused = msd("fid", run)
    assert (refused.returncode, "no classifier" in refused.stderr) == (2, True)


@pytest.mark.parametrize("method", ["quadrants", "kmeans", "random"])
def test_a_prompt_is_explained_before_and_after_the_run(place: Path, msd: Msd, method: str) -> None:
    keys = (f"partition.method={method}", "partition.students=4")
    planned = msd("partition", "text.yaml", *keys, "--explain", "a red fox", "--dry-run")
    assert "would embed 41 prompts" in planned.stdout and not (place / "runs").exists()
    shown = msd("partition", "text.yaml", *keys)
    assert shown.returncode == 0 and "number" in shown.stdout, shown.stderr
    told = json.loads(msd("partition", "text.yaml", *keys, "--json").stdout)
    sizes = [part["number"] for part in told["parts"]]
    assert sum(sizes) == 41 and (method == "random" or max(sizes) - min(sizes) <= 1)
    done = msd("partition", "text.yaml", *keys, "--explain", "a red  fox", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["condition"] == "a red fox" and len(found["neighbours"]) == 5
    similar = [near["similarity"] for near in found["neighbours"]]
    assert similar == sorted(similar, reverse=True) and "a red fox" not in [n["name"] for n in found["neighbours"]]
    if method == "random":
        assert found["margin"] is None
    else:
        assert found["margin"] > 0 and 0 <= found["percentile"] <= 100 and found["second"] != found["student"]
    said = msd("partition", "text.yaml", *keys, "--explain", "the sea at night")
    assert ("student" in said.stdout, said.stdout.count("like ")) == (True, 5)


def test_classes_are_explained_too(msd: Msd) -> None:
    keys = ("partition.method=kmeans", "partition.features=images", "partition.students=2")
    found = json.loads(msd("partition", "digits", *keys, "--explain", "7", "--json").stdout)
    assert found["margin"] > 0 and found["second"] == 1 - found["student"]
    plain = msd("partition", "digits", "--explain", "7")
    assert "no border" in plain.stdout
    refused = msd("partition", "digits", "--explain", "eleven")
    assert (refused.returncode, "does not exist" in refused.stderr) == (2, True)


@pytest.mark.slow
def test_adm_sees_the_pictures_that_captions_name(place: Path, msd: Msd) -> None:
    (place / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"pictures/{i}.png")
    coco = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png"} for i in range(6)],
        "annotations": [{"image_id": 10 + i % 6, "caption": text} for i, text in enumerate(prompts(12))],
    }
    (place / "captions.json").write_text(json.dumps(coco))
    keys = ["data.path=captions.json", "stages.0.objective=adm", "stages.0.taps=[down0, mid]", "stages.0.pairs=none"]
    refused = msd("distill", "text.yaml", *keys)
    assert (refused.returncode, "needs real images" in refused.stderr, (place / "runs").exists()) == (2, True, False)
    done = msd("distill", "text.yaml", *keys, "data.images=pictures")
    assert done.returncode == 0, done.stderr
    assert msdcli.load(place / "runs/text").sample([11]).shape == (1, 3, 8, 8)
    (place / "pictures/3.png").unlink()
    refused = msd("distill", "text.yaml", *keys, "data.images=pictures", "name=other")
    assert (refused.returncode, "1 pictures that the rows name are not there: 3.png" in refused.stderr) == (2, True)
    done = msd("partition", "text.yaml", *keys, "data.images=pictures", "data.on_bad=skip", "name=other")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_sdxl_teacher_is_distilled_and_its_bundle_reads_prompts(place: Path, msd: Msd) -> None:
    sdxl_pipeline(place / "sdxl", max_shard_size="40KB")
    done = msd("distill", "text.yaml", "teacher.path=sdxl", "student.depth=0.5", "stages.0.sigmas=[14.6, 1.6]")
    assert done.returncode == 0, done.stderr
    done = msd("export", "runs/text", "--out", "given")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(place / "sdxl")
    made = [msdcli.load(place / folder).sample(prompts=["the sun"]) for folder in ("runs/text", "given")]
    assert made[0].shape == (1, 3, 8, 8) and torch.equal(*made)


@pytest.mark.slow
def test_an_sd3_teacher_is_distilled_on_raw_latents(place: Path, msd: Msd) -> None:
    sd3_pipeline(place / "sd3")
    keys = (
        "teacher.path=sd3",
        "partition={students: 4, method: quadrants}",
        "student.depth=0.5",
        "evaluation.samples=4",
    )
    done = msd("distill", "text.yaml", *keys)
    assert done.returncode == 0, done.stderr
    assert msdcli.load(place / "runs/text").sample(prompts=["the sun"]).shape == (1, 4, 8, 8)
    refused = msd("sample", "runs/text", "--prompt", "the sun", "--format", "png")
    assert (refused.returncode, "latents are no pictures" in refused.stderr) == (2, True)


@pytest.mark.slow
def test_a_latent_teacher_of_prompts_gives_pictures(place: Path, msd: Msd) -> None:
    """Stable Diffusion's arrangement: prompts, latents, pictures for the GAN, decoded samples, a bundle with it all."""
    sd_pipeline(place / "sd", in_channels=4, out_channels=4)
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**VAE).save_pretrained(place / "sd/vae")
    index = json.loads((place / "sd/model_index.json").read_text())
    (place / "sd/model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
    (place / "pictures").mkdir()
    rows = [{"caption": text, "file_name": f"{i % 6}.png"} for i, text in enumerate(prompts(12))]
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"pictures/{i}.png")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ["teacher.path=sd", "data.path=rows.jsonl", "stages.0.objective=adm", "data.images=pictures"]
    done = msd("distill", "text.yaml", *keys)
    assert done.returncode == 0, done.stderr
    students = msdcli.load(place / "runs/text")
    assert students.sample(prompts=["the sun"]).shape == (1, 3, 16, 16)
    assert students.sample(prompts=["the sun"], latents=True).shape == (1, 4, 8, 8)
    done = msd("sample", "runs/text", "--prompt", "the sun", "--format", "png", "--json")
    with Image.open(Path(json.loads(done.stdout)["file"]) / "000000.png") as image:
        assert image.size == (16, 16)
    done = msd("export", "runs/text", "--out", "given")
    assert done.returncode == 0, done.stderr
    assert torch.equal(msdcli.load(place / "given").sample(prompts=["x"]), students.sample(prompts=["x"]))
    alone = msd("distill", "text.yaml", "teacher.path=sd", "name=alone")
    assert alone.returncode == 0, alone.stderr
    assert msdcli.load(place / "runs/alone").sample([0]).shape == (1, 3, 16, 16)


def test_what_does_not_fit_is_refused_before_anything_is_written(place: Path, msd: Msd) -> None:
    (place / "bad.txt").write_bytes(b"a red fox\n\xff\xfe\n")
    (place / "empty.txt").write_text("\n \n")
    for keys, said in (
        (["partition.method=consecutive"], "could not place a new prompt"),
        (["partition.method=quadrants", "partition.students=3"], "halves of halves"),
        (["partition.students=50"], "50 students for 41"),
        (["data.path=bad.txt"], "bad.txt:2: not UTF-8"),
        (["data.path=empty.txt"], "holds no prompt"),
        (["data.path=none.txt"], "none.txt does not exist"),
        (["data.count=7"], "holds 41 prompts, the recipe expects 7"),
        (["data={name: digits}", "partition.method=consecutive"], "is conditioned on prompts"),
        (["teacher.path=nowhere"], "no model at nowhere"),
        (["stages=[{objective: tsm}]"], "needs real images"),
    ):
        done = msd("distill", "text.yaml", *keys)
        assert (done.returncode, said in done.stderr) == (2, True), (keys, done.stderr)
        assert not (place / "runs").exists()


def test_prompts_are_measured_against_pictures(hashed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a network of a few features in Inception's place: rows, counts, and no row per prompt."""
    from msdcli.engine.measure import fid
    from msdcli.metrics.inception import FeatureNetwork

    def features(x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((2, 3))

    monkeypatch.setattr(
        feature_metric, "open_network", lambda *a, **k: FeatureNetwork("clean", features, sha256="0" * 64)
    )
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"pictures/{i}.png")
    options = FidOptions(protocol="clean", reference=str(tmp_path / "pictures"), samples=24, batch=8)
    with contextlib.chdir(hashed.parent.parent):
        found = fid.measure(RunDir(hashed), lambda _: None, options).to_json()
    assert [(row["who"], row["group"]) for row in found["rows"] if row["who"] != "real halves"] == [
        ("teacher", "whole"),
        ("students", "whole"),
    ]
    assert found["prompts"] == 24 and "labels" not in found


def test_long_prompts_are_counted_once(place: Path, msd: Msd) -> None:
    (place / "prompts.txt").write_text("a red fox\n" + "fox " * 30 + "\n" + "sea sun " * 20 + "\nthe sea\n")
    done = msd("partition", "text.yaml", "partition.method=quadrants", "partition.students=2")
    assert done.returncode == 0 and done.stderr.count("2 are longer than the text encoder reads") == 1, done.stderr


def test_a_full_disk_is_met_before_the_embeddings(place: Path, msd: Msd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.disk, "free_bytes", lambda _: 1000)
    refused = msd("partition", "text.yaml")
    assert (refused.returncode, "embeddings need 16,128 bytes" in refused.stderr) == (2, True), refused.stderr


def test_embedding_is_taken_up_after_a_kill(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the disk at any moment leads to the same bits."""
    from msdcli.engine.inputs import importing

    importing.write(importing.read(place / "pipeline"), place / "t")
    rows = prompts(200)
    engine.embed(place / "whole", rows, place / "t/text", "float16", torch.device("cpu"), lambda _: None)
    monkeypatch.setattr(engine.time, "monotonic", iter(range(0, 10**6, 40)).__next__)  # notes progress at every step
    told = []

    def stop(event: object) -> None:
        told.append(event)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.embed(place / "cut", rows, place / "t/text", "float16", torch.device("cpu"), stop)
    with open(place / "cut/tokens.bin", "ab") as file:
        file.write(b"half a row")
    engine.embed(place / "cut", rows, place / "t/text", "float16", torch.device("cpu"), told.append)
    assert len(told) == 3 + 3, "two of four steps were not done again"
    for name in ("tokens.bin", "pooled.bin", "prompts.jsonl"):
        assert (place / "cut" / name).read_bytes() == (place / "whole" / name).read_bytes()


@pytest.mark.parametrize("make", [pytest.param(sd_pipeline, marks=pytest.mark.slow), sd3_pipeline])
def test_a_teacher_of_real_size_is_timed_and_distilled(
    make: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`precision: auto` and `msd bench` evaluate networks that read text; tiny ones escape by their size alone."""
    monkeypatch.setattr(precision, "TINY_FLOPS", 0)
    monkeypatch.setattr(precision, "SECONDS", {"cpu": 0.05})
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "pipeline")  # type: ignore[operator]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts(8)))
    (tmp_path / "text.yaml").write_text(RECIPE.replace("kmeans", "random").replace("log_every: 1", "log_every: 2"))
    recipe = load("text.yaml", ["micro_batch=2", "pairs.count=4", "pairs.shard=4"])
    seen: list[int] = []
    look_up = TextDenoiser.look_up
    monkeypatch.setattr(
        TextDenoiser, "look_up", lambda net, c: (seen.append(0 if c.is_meta else len(c)), look_up(net, c))[1]
    )
    measured = bench.bench(recipe, lambda _: None, repeats=1)
    assert measured["precision"] in ("float32", "bf16") and measured["sampling"]["latency_seconds"] > 0
    assert measured["stages"][0]["batch"] == 4
    assert max(seen) <= 4, "a guided teacher evaluates a micro batch of two with and without its prompts"
    run = pipeline.distill(recipe, lambda _: None).run
    assert "ratio" in json.loads((run.root / "run.json").read_text())["precision"]
