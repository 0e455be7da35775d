"""Latent teachers: the autoencoder travels with the teacher, data are encoded once, samples come back as pictures."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from msdcli.data.base import StoredImages, fingerprint_of_version_1, to_float
from msdcli.data.images import to_uint8
from msdcli.data.latents import LATENTS, RECORD, Latents
from msdcli.diffusion.draws import Draws, Source
from msdcli.engine import sample
from msdcli.engine.inputs import autoencoder, dataset, importing, latents
from msdcli.engine.tracking.events import silent
from msdcli.errors import UserError
from msdcli.noise import image_noise
from msdcli.recipe import load
from msdcli.rundir import RunDir, key
from tests.conftest import Msd, command, environment
from tests.latent_teacher import RECIPE, latent_pipeline, picture_folder

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def latent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the test, with a pipeline, pictures and a recipe."""
    monkeypatch.chdir(tmp_path)
    latent_pipeline(tmp_path / "pipeline")
    picture_folder(tmp_path / "pictures")
    (tmp_path / "latent.yaml").write_text(RECIPE)
    return tmp_path


def encoded(folder: Path, *overrides: str) -> Latents:
    recipe = load(folder / "latent.yaml", [*overrides, f"run={folder / 'runs/latent'}"])
    run = RunDir(recipe.run_dir)
    data = dataset.provide(run, recipe, silent)
    teacher = folder / "teacher"
    if not teacher.exists():
        importing.write(importing.read(folder / "pipeline"), teacher)
    found = latents.provide(run, recipe, data, teacher, torch.device("cpu"), silent, always=True)
    assert isinstance(found, Latents)
    return found


@pytest.mark.parametrize("shift", [None, 0.25])
def test_latents_are_those_of_the_library(tmp_path: Path, shift: float | None) -> None:
    _, vae = latent_pipeline(tmp_path / "pipeline", shift_factor=shift)
    ours = autoencoder.open_autoencoder(tmp_path / "pipeline/vae")
    x = torch.rand(3, 3, 8, 8) * 2 - 1
    posterior = vae.encode(x).latent_dist
    mean, std = ours.encode(x)
    torch.testing.assert_close(mean, (posterior.mean - (shift or 0)) * 0.6)
    torch.testing.assert_close(std, posterior.std * 0.6)
    torch.testing.assert_close(ours.decode(mean), vae.decode(mean / 0.6 + (shift or 0)).sample)
    assert ours.geometry.latent_shape((3, 8, 8)) == mean.shape[1:]


def test_latents_of_several_channels_have_their_own_mean_and_scale(tmp_path: Path) -> None:
    numbers = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 4.0]}
    _, vae = latent_pipeline(tmp_path / "pipeline", **numbers)
    ours = autoencoder.open_autoencoder(tmp_path / "pipeline/vae")
    x = torch.rand(2, 3, 8, 8)
    m, s = (torch.tensor(v).reshape(1, 4, 1, 1) for v in numbers.values())
    torch.testing.assert_close(ours.encode(x)[0], (vae.encode(x).latent_dist.mean - m) * 0.6 / s)


def test_a_data_set_is_encoded_once_and_mapped(latent: Path) -> None:
    mean = encoded(latent, "latents.posterior=mean")
    assert isinstance(mean, StoredImages) and (mean.shape, len(mean)) == ((4, 4, 4), 24)
    assert mean.class_names == ["ant", "bee", "cow", "doe"]
    network = autoencoder.open_autoencoder(latent / "teacher/autoencoder")
    wanted, std = network.encode(mean.pictures.images(range(24)))
    torch.testing.assert_close(mean.images(range(24)), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(to_float(mean.stored([7, 3])), mean.images([7, 3]))

    drawn = encoded(latent, "latents.seed=5")
    noise = image_noise(5, [7, 3], (4, 4, 4))
    torch.testing.assert_close(drawn.images([7, 3]), wanted[[7, 3]] + std[[7, 3]] * noise, rtol=1e-5, atol=1e-5)
    real, c = Draws(Source(drawn, [1, 3]), 5, ("x",), 0).real()
    assert {*c.tolist()} <= {1, 3} and all((drawn.images(range(24)) == y).all((1, 2, 3)).any() for y in real)

    folders = list((latent / "runs/.shared").glob("latents-*"))
    assert len(folders) == 1, "mean and sample share one file"
    assert sorted(p.name for p in folders[0].iterdir() if p.name != ".lock") == sorted([LATENTS, RECORD])

    half = encoded(latent, "latents.dtype=float16", "latents.posterior=mean")
    assert half.stored([0]).dtype == torch.float16
    torch.testing.assert_close(half.images(range(24)), wanted, rtol=1e-3, atol=1e-3)


def test_an_interrupted_encoding_goes_on(latent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "SHARD", 10)
    whole = encoded(latent).images(range(24))
    folder = next((latent / "runs/.shared").glob("latents-*"))
    for file in [*folder.iterdir()]:
        if file.is_file():
            file.unlink()
    calls = []
    encode = autoencoder.Autoencoder.encode

    def failing(self: autoencoder.Autoencoder, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(images))
        if len(calls) == 4:  # in the middle of the second shard
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(autoencoder.Autoencoder, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        encoded(latent)
    assert not (folder / RECORD).exists()
    calls[:] = [0] * 10
    assert torch.equal(encoded(latent).images(range(24)), whole)
    assert sum(calls) == 14, "the first shard of ten was not made again"


@pytest.mark.slow
def test_several_processes_share_the_encoding_and_one_may_be_killed(latent: Path) -> None:
    picture_folder(latent / "more", per_class=300)
    words = command("latents", "latent.yaml", "data.path=more", "latents.batch=1")
    options = {"cwd": latent, "env": environment(), "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    first = subprocess.Popen(words, **options)
    patience = time.monotonic() + 60
    while not list(latent.glob("runs/.shared/latents-*/.*/.lock")) and time.monotonic() < patience:
        time.sleep(0.05)
    first.kill()
    first.communicate()
    pair = [subprocess.Popen(words, **options) for _ in range(2)]
    for process in pair:
        assert process.wait(120) == 0, process.stderr.read()
        process.stderr.close()
    folder = next(latent.glob("runs/.shared/latents-*"))
    moments = np.memmap(folder / LATENTS, np.float32, "r", shape=(1200, 2, 4, 4, 4))
    assert (moments[:, 1] > 0).all(), "every image has a standard deviation"
    assert not list(folder.glob("*.done")) and not list(folder.glob("*.tmp"))


def test_the_verb(msd: Msd, latent: Path) -> None:
    planned = msd("latents", "latent.yaml", "--dry-run")
    assert (planned.returncode, "[4, 4, 4]" in planned.stdout) == (0, True), planned.stderr
    assert not (latent / "runs").exists()
    done = msd("latents", "latent.yaml", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["images"], told["shape"], told["posterior"]) == (24, [4, 4, 4], "sample")
    assert len(told["mean"]) == 4 and Path(told["folder"]).is_dir()
    again = msd("latents", "latent.yaml")
    assert (again.returncode, "encoded at" in again.stderr) == (0, False), again.stderr
    assert not (latent / "runs/latent").exists(), "only what runs share is written"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.size=7", "do not divide by 2"),
        ("data.channels=1", "takes pictures of 3 channels"),
        ("data.size=12", "as latents [4, 6, 6]"),
        ("teacher.latent={channels: 4, factor: 8}", "is one of 4 channels and factor 2"),
    ],
)
def test_data_that_do_not_fit_are_refused(msd: Msd, latent: Path, override: str, said: str) -> None:
    for verb in ("latents", "distill"):
        done = msd(verb, "latent.yaml", "data.resize=box", override)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert not (latent / "runs").exists()


def test_what_is_no_autoencoder_or_not_whole_is_refused(latent: Path) -> None:
    vae = latent / "pipeline/vae"
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="needs its autoencoder") as error:
        importing.read(latent / "pipeline")
    assert error.value.hint is not None and "safetensors" in error.value.hint
    (vae / "diffusion_pytorch_model.bin").rename(vae / "diffusion_pytorch_model.safetensors")
    config = json.loads((vae / "config.json").read_text())
    for change, said in (
        ({"_class_name": "VQModel"}, "VQModel"),
        ({"latent_channels": 8}, "latents of 8 channels"),
        ({"layers_per_block": 2}, "does not fit the network"),
        ({"scaling_factor": float("inf")}, "scale"),
    ):
        (vae / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=said):
            importing.write(importing.read(latent / "pipeline"), latent / "out")
    assert not (latent / "out/model.json").exists()


def test_another_autoencoder_is_another_teacher(latent: Path) -> None:
    before = importing.identity(latent / "pipeline")
    latent_pipeline(latent / "pipeline", scaling_factor=0.5)
    assert importing.identity(latent / "pipeline") != before


def test_a_pickle_is_given_its_autoencoder(msd: Msd, latent: Path) -> None:
    from tests.engine.inputs.test_importing import pickled

    pickled(latent / "t.pkl", "EDM2", img_resolution=4, img_channels=4)
    done = msd("import", "t.pkl", "given", "--autoencoder", "pipeline/vae")
    assert done.returncode == 0, done.stderr
    assert autoencoder.find(latent / "given") is not None
    pickled(latent / "p.pkl", "EDM2")
    refused = msd("import", "p.pkl", "other", "--autoencoder", "pipeline/vae")
    assert (refused.returncode, (latent / "other").exists()) == (2, False)


def test_samples_are_decoded_pictures(msd: Msd, latent: Path) -> None:
    done = msd("distill", "latent.yaml", "--student", "0")
    assert done.returncode == 0, done.stderr
    assert not list((latent / "runs/.shared").glob("latents-*")), "dm looks at no image, so nothing is encoded"
    done = msd("distill", "latent.yaml", "--student", "1")
    assert done.returncode == 0, done.stderr
    students = sample.load(latent / "runs/latent")
    z = students.sample([0, 3, 1], seed=1, latents=True)
    images = students.sample([0, 3, 1], seed=1)
    assert (z.shape, images.shape) == ((3, 4, 4, 4), (3, 3, 8, 8))
    network = autoencoder.open_autoencoder(latent / "pipeline/vae")
    torch.testing.assert_close(images, network.decode(z), rtol=1e-4, atol=1e-5)
    for form in ("png", "npz", "latents"):
        done = msd("sample", "runs/latent", "--classes", "0,3,1", "-n", "3", "--seed", "1", "--format", form)
        assert done.returncode == 0, done.stderr
    folder = latent / "runs/latent/samples"
    with np.load(folder / "classes-0-3-1-seed1.latents.npz") as arrays:
        torch.testing.assert_close(torch.from_numpy(arrays["latents"]), z)
    with np.load(folder / "classes-0-3-1-seed1.npz") as arrays:
        assert (arrays["images"] == to_uint8(images).permute(0, 2, 3, 1).numpy()).all()
    assert len(list((folder / "classes-0-3-1-seed1").glob("*.png"))) == 3


def test_a_run_of_version_1_goes_on_with_its_latents_where_they_are_whole(latent: Path) -> None:
    first = encoded(latent)
    run = RunDir(latent / "runs/latent")
    (folder,) = run.shared.glob("latents-*")
    parts = fingerprint_of_version_1(first), autoencoder.identity(latent / "teacher/autoencoder"), "float32"
    old = folder.rename(folder.with_name(f"latents-{key('latents', *parts)}"))
    run.root.mkdir(parents=True, exist_ok=True)
    run.record_file.write_text(json.dumps({"commands": [], "data": fingerprint_of_version_1(first), "teacher": "x"}))
    encoded(latent)
    assert [*run.shared.glob("latents-*")] == [old]
    (old / RECORD).unlink()
    encoded(latent)
    assert {*run.shared.glob("latents-*")} == {old, folder}, "half of them are no start: they may be of other pictures"
