"""`msd import`, and a pickle as the teacher of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from msdcli import nets
from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine.checkpoints.model import load_model
from msdcli.engine.partitioning import making as partition
from msdcli.engine.train.student import new_network
from msdcli.errors import UserError
from msdcli.nets.edm.importing import build_edm
from msdcli.recipe import PartitionSettings, StudentSettings, load
from msdcli.recipe.networks import EdmNetworkSettings
from tests.conftest import Msd
from tests.nets.edm.edm_format import shake, snapshot, write

ARGUMENTS = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 10,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [],
}
RECIPE = """
name: given
threads: 1
workers: 1
data: {name: digits}
teacher: {path: teacher.pkl, solver: {steps: 2}}
partition: {students: 2}
pairs: {count: 8, shard: 8}
stages: [{objective: dm, steps: 2, batch: 4, fake_updates: 1, log_every: 1}]
evaluation: {judge: off}
"""


def pickled(path: Path, preconditioning: str = "VP", **changes: object) -> Denoiser:
    """Write a pickle in the published format; return its denoiser."""
    description = {"kind": "edm", "preconditioning": preconditioning, "arguments": ARGUMENTS | changes}
    denoiser = shake(build_edm(description)).eval()
    write(path, snapshot(denoiser, description))
    return denoiser


def reference(path: Path, denoiser: Denoiser, *, off: float = 1.0) -> None:
    x, sigma, c = torch.randn(3, *denoiser.shape), torch.tensor([0.1, 1.0, 9.0]), torch.arange(3)
    with torch.no_grad():
        denoised = denoiser(x, sigma, c) * off
    np.savez(path, x=x, sigma=sigma, class_labels=torch.eye(denoiser.num_classes)[c], denoised=denoised)


@pytest.mark.parametrize("preconditioning", ["EDM", "VP", "VE", "iDDPM", "EDM2"])
def test_an_imported_teacher_is_the_same_denoiser(msd: Msd, tmp_path: Path, preconditioning: str) -> None:
    original = pickled(tmp_path / "teacher.pkl", preconditioning)
    reference(tmp_path / "ref.npz", original)
    done = msd("import", "teacher.pkl", "out", "--check", "ref.npz", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["agrees"] and told["max_relative_difference"] <= 1e-5
    assert told["parameters"] == sum(p.numel() for p in original.parameters())
    loaded, description = load_model(tmp_path / "out")
    assert description["source"] == told["source"]
    assert type(loaded) is type(original)
    assert loaded.settings.arguments["dropout"] == 0
    x, sigma = torch.randn(4, 1, 8, 8), torch.full((4,), 2.5)
    with torch.no_grad():
        assert torch.equal(loaded(x, sigma, torch.arange(4)), original(x, sigma, torch.arange(4)))


def test_a_reference_that_differs_is_exit_1_and_nothing_is_written(msd: Msd, tmp_path: Path) -> None:
    reference(tmp_path / "ref.npz", pickled(tmp_path / "teacher.pkl"), off=1.001)
    done = msd("import", "teacher.pkl", "out", "--check", "ref.npz")
    assert (done.returncode, "0.000999" in done.stdout, "nothing was written" in done.stderr) == (1, True, True)
    assert not (tmp_path / "out").exists()


def test_import_writes_nothing_where_it_should_not(msd: Msd, tmp_path: Path) -> None:
    pickled(tmp_path / "teacher.pkl")
    assert msd("import", "teacher.pkl", "out", "--dry-run").returncode == 0
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    refused = msd("import", "teacher.pkl", "out")
    assert (refused.returncode, [p.name for p in (tmp_path / "out").iterdir()]) == (2, ["thesis.tex"])
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    evil = msd("import", "evil.pkl", "new")
    assert (evil.returncode, "Traceback" in evil.stderr) == (2, False)


def test_a_pickle_is_a_recipes_teacher(msd: Msd, tmp_path: Path) -> None:
    original = pickled(tmp_path / "teacher.pkl")
    (tmp_path / "given.yaml").write_text(RECIPE)
    planned = msd("distill", "given.yaml", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["given.yaml", "teacher.pkl"]
    done = msd("distill", "given.yaml", "--student", "1")
    assert done.returncode == 0, done.stderr
    teacher, _ = load_model(tmp_path / "runs/given/teacher")
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), teacher.parameters(), strict=True))
    student, description = load_model(tmp_path / "runs/given/students/1/0-dm")
    assert student.settings == teacher.settings and description["network"]["preconditioning"] == "VP"
    assert not torch.equal(next(student.parameters()), next(teacher.parameters()))


@pytest.mark.parametrize(
    ("changes", "override", "said"),
    [
        ({"label_dim": 0}, "seed=1", "knows no classes, the data have 10"),
        ({"img_channels": 3}, "seed=1", "makes images of shape [3, 8, 8]"),
        ({}, "teacher.network={kind: edm, preconditioning: EDM}", "is no EDM network"),
        (
            {},
            "teacher.network={kind: edm, preconditioning: VP, arguments: {model_channels: 16}}",
            "model_channels 8, the recipe expects 16",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    msd: Msd, tmp_path: Path, changes: dict, override: str, said: str
) -> None:
    pickled(tmp_path / "teacher.pkl", **changes)
    (tmp_path / "given.yaml").write_text(RECIPE)
    done = msd("distill", "given.yaml", override)
    assert (done.returncode, said in done.stderr, (tmp_path / "runs").exists()) == (2, True, False), done.stderr


def test_students_of_an_imported_teacher_are_scaled(tmp_path: Path) -> None:
    (tmp_path / "given.yaml").write_text(RECIPE)
    arguments = ARGUMENTS | {"model_channels": 192, "num_blocks": 3}
    settings = EdmNetworkSettings(preconditioning="EDM", arguments=arguments)
    smaller = StudentSettings(width=0.7, depth=0.5).network_for(settings)
    assert (smaller.arguments["model_channels"], smaller.arguments["num_blocks"]) == (128, 2)
    teacher = nets.build(
        EdmNetworkSettings(arguments={"model_channels": 16, "channel_mult": [1, 1]}),
        shape=(1, 8, 8),
        num_classes=10,
        sigma_data=0.5,
    )
    student = new_network(load(tmp_path / "given.yaml", ["student.width=0.5"]), teacher, 0)
    assert student.net.enc["8x8_conv"].weight.shape[0] == 8
    copied = new_network(load(tmp_path / "given.yaml"), teacher, 0)
    assert torch.equal(next(copied.parameters()), next(teacher.parameters()))


@pytest.mark.parametrize("preconditioning", ["VP", "EDM", "EDM2"])
def test_class_embeddings_of_an_imported_teacher_can_be_clustered(tmp_path: Path, preconditioning: str) -> None:
    from msdcli.data.digits import Digits
    from msdcli.recipe.data import DigitsSettings

    teacher = pickled(tmp_path / "t.pkl", preconditioning)
    settings = PartitionSettings(students=2, method="kmeans")
    assert [len(part) for part in partition.make(settings, Digits(DigitsSettings()), teacher).parts] == [5, 5]


def test_a_section_that_contradicts_the_data_is_refused() -> None:
    section = EdmNetworkSettings(arguments={"img_resolution": 16})
    with pytest.raises(UserError, match="img_resolution is 16, the data make it 8"):
        nets.build(section, shape=(1, 8, 8), num_classes=10, sigma_data=0.5)
