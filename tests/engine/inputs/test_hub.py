"""`hub:owner/name`: what is asked of the Hub, and what users are told where it does not answer. No network."""

from __future__ import annotations

import fnmatch
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msdcli.engine.inputs import hub
from msdcli.errors import UserError
from tests.conftest import Msd
from tests.latent_teacher import RECIPE, latent_pipeline, picture_folder

pytestmark = pytest.mark.filterwarnings("default")


class FakeHub:
    """A Hub of one repository: gives what is asked for, as the library does, into a cache."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache, self.online = repository, cache, True
        self.asked: list[dict[str, Any]] = []

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None,
        allow_patterns: Any,
        ignore_patterns: Any,
        local_files_only: Any = 0,
    ) -> str:
        target = self.cache / repo_id.replace("/", "--") / (revision or "main")
        if local_files_only:
            if not target.exists():
                raise FileNotFoundError("not in the cache")
            return str(target)
        self.asked.append({"repo_id": repo_id, "revision": revision})
        if not self.online:
            raise ConnectionError("Network is unreachable\nlong story")
        for file in (f for f in self.repository.rglob("*") if f.is_file()):
            name = file.relative_to(self.repository).as_posix()
            allowed, ignored = ([fnmatch.fnmatch(name, p) for p in ps] for ps in (allow_patterns, ignore_patterns))
            if any(allowed) and not any(ignored):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / name)
        return str(target)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    latent_pipeline(tmp_path / "repository")
    for name in ("transformer/diffusion_pytorch_model.bin", "model.ckpt", "big.safetensors", "vae/a.fp16.safetensors"):
        (tmp_path / "repository" / name).write_bytes(b"a pickle")
    fake = FakeHub(tmp_path / "repository", tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fake.snapshot_download))
    return fake


def test_configurations_and_safetensors_are_fetched_once_and_no_pickle(fake: FakeHub) -> None:
    folder = hub.resolve("hub:some-one/tiny.dit@v1.0")
    names = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    assert {f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae")} <= names
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
    assert not names & {"big.safetensors", "vae/a.fp16.safetensors"}
    assert hub.resolve("hub:some-one/tiny.dit@v1.0") == folder
    assert fake.asked == [{"repo_id": "some-one/tiny.dit", "revision": "v1.0"}]


def test_an_interrupted_download_goes_on(fake: FakeHub) -> None:
    folder = hub.resolve("hub:a/b")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert hub.cached("hub:a/b") is None
    hub.resolve("hub:a/b")
    assert len(fake.asked) == 2 and hub.cached("hub:a/b") == folder


def test_weights_in_several_files_must_all_be_here(fake: FakeHub) -> None:
    folder = hub.resolve("hub:a/b")
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(folder / "vae/1.safetensors")
    index = {"weight_map": {"x": "1.safetensors", "y": "2.safetensors"}}
    (folder / "vae/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert hub.missing(folder) == ["vae/diffusion_pytorch_model.safetensors"]


def test_a_recipe_and_the_import_take_a_name(fake: FakeHub, msd: Msd, tmp_path: Path) -> None:
    picture_folder(tmp_path / "pictures")
    (tmp_path / "latent.yaml").write_text(RECIPE)
    done = msd("import", "hub:a/b", "teacher")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "teacher/autoencoder/config.json").is_file()
    fake.online = False  # from now on the cache must do
    done = msd("distill", "latent.yaml", "teacher.path=hub:a/b", "--student", "0")
    assert done.returncode == 0, done.stderr
    assert "hub:a/b" in (tmp_path / "runs/latent/recipe.yaml").read_text()


def test_offline_says_what_to_fetch_and_where_to_put_it(fake: FakeHub, msd: Msd, tmp_path: Path) -> None:
    fake.online = False
    picture_folder(tmp_path / "pictures")
    (tmp_path / "latent.yaml").write_text(RECIPE)
    name = "teacher.path=hub:a/b@v2"
    refused = msd("distill", "latent.yaml", name)
    assert refused.returncode == 2
    for part in ("Network is unreachable", "hf download a/b --revision v2", "'*/*.safetensors'", "teacher.path=FOLDER"):
        assert part in refused.stderr
    assert "long story" not in refused.stderr and not (tmp_path / "runs").exists()
    network = "teacher.network={kind: diffusers, class_name: DiTTransformer2DModel, config: {sample_size: 4, "
    network += "in_channels: 4, num_attention_heads: 2, attention_head_dim: 8, num_layers: 1, num_embeds_ada_norm: 4}}"
    planned = msd("distill", "latent.yaml", name, network, "teacher.latent={channels: 4, factor: 2}", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "missing:   teacher hub:a/b@v2: the run downloads it" in planned.stdout
    assert "latents:   [4, 4, 4]" in planned.stdout


def test_without_the_library_or_without_safetensors(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (fake.repository / "transformer/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no transformer/diffusion_pytorch_model\.safetensors; .* no pickles"):
        hub.resolve("hub:a/b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="huggingface_hub is not installed") as error:
        hub.resolve("hub:a/b")
    assert "hf download a/b" in str(error.value.hint)
    for wrong in ("hub:", "hub:a", "hub:a/b/c", "hub:a/b@", "hub:../x@y z"):
        with pytest.raises(UserError, match="no name on the Hub"):
            hub.resolve(wrong)
