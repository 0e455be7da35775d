"""Pictures of one's own: looked at before a run, padded, mirrored, and called by a name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msdcli.data import folder, survey
from msdcli.data.folder import PictureFiles
from msdcli.diffusion.draws import Draws, Source
from msdcli.errors import UserError
from msdcli.recipe.data import FolderSettings, PromptsSettings, label_of
from tests.conftest import Msd


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three grey 28x28 pictures in each of two classes, one of them black, the other white."""
    for name, value in (("dark", 0), ("light", 255)):
        place = tmp_path / "mnist" / "train" / name
        place.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((28, 28), value, np.uint8)).save(place / f"{i}.png")
    return tmp_path / "mnist" / "train"


def settings(path: Path, **more: object) -> FolderSettings:
    return FolderSettings(path=str(path), **({"channels": 1} | more))  # type: ignore[arg-type]


def test_a_survey_says_what_pictures_are_like(pictures: Path) -> None:
    found = survey.check(PictureFiles(settings(pictures)))
    assert found.sizes == [((28, 28), 6)] and found.grey == 6 and found.per_class == [3, 3]
    assert (found.mean, found.deviation) == (0, 1)
    assert found.lines()[0] == "28x28, grey"
    assert any("sigma_data=1.00" in line for line in found.remarks(0.5))
    assert survey.survey(PictureFiles(settings(pictures)), most=2).lines()[0].endswith("2 of 6 were looked at")


def test_sizes_that_do_not_fit_are_no_good_recipe(pictures: Path, msd: Msd, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        f"data: {{name: folder, path: {pictures}, size: 32, channels: 1}}\nstages: [{{objective: dm}}]\n"
    )
    for words in (("recipes", "validate"), ("distill", "--dry-run")):
        done = msd(words[0], *words[1:], "my.yaml")
        assert done.returncode == 2 and "all 6 pictures cannot be used" in done.stderr
        assert "data.pad=edge" in done.stderr and "on_bad=skip" not in done.stderr
    done = msd("recipes", "validate", "my.yaml", "data.pad=edge")
    assert done.returncode == 0 and "2 classes of 3 pictures" in done.stdout


def test_leaving_out_is_offered_where_something_stays(pictures: Path) -> None:
    (pictures / "dark" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="1 of 7 pictures cannot be used") as error:
        survey.check(PictureFiles(settings(pictures)))
    assert error.value.hint == "data.on_bad=skip leaves them out"
    assert survey.check(PictureFiles(settings(pictures, on_bad="skip"))).remarks()[-2].startswith("1 of 7 pictures")


def test_padding_puts_a_picture_into_the_middle() -> None:
    picture = np.arange(1, 10, dtype=np.uint8).reshape(3, 3, 1).repeat(3, axis=2)
    edge, black = (folder._padded(picture, 6, how)[:, :, 0] for how in ("edge", "black"))
    assert np.array_equal(edge[1:4, 1:4], picture[:, :, 0]) and edge[0, 0] == 1 and edge[5, 5] == 9
    assert black.sum() == picture[:, :, 0].sum() and np.array_equal(black[1:4, 1:4], picture[:, :, 0])
    with pytest.raises(ValueError, match="say which"):
        FolderSettings(path="x", pad="edge")
    with pytest.raises(ValueError, match="say which"):
        PromptsSettings(path="x.txt", images="x", pad="edge")


def test_mirrored_images_are_whole_images_and_half_of_them(pictures: Path) -> None:
    class Data:
        shape = (1, 2, 2)

        def __len__(self) -> int:
            return 1

        def labels(self, numbers: object) -> torch.Tensor:
            return torch.zeros(1, dtype=torch.int64)

        def images(self, numbers: object) -> torch.Tensor:
            return torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])

    def drawn(mirror: bool, part: tuple[int, int] = (0, 1)) -> torch.Tensor:
        source = Source(Data(), [0], mirror=mirror)  # type: ignore[arg-type]
        return Draws(source, 64, ("teacher", 0), 0, part).real()[0][:, 0, :, 0]

    assert not drawn(False).any()
    turned = drawn(True)
    assert 16 < turned[:, 0].sum() < 48 and torch.equal(turned[:, 0], turned[:, 1])
    assert torch.equal(turned, torch.cat([drawn(True, (0, 2)), drawn(True, (1, 2))])), "however a batch is cut"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/mnist", "mnist"),
        ("/data/mnist/train", "mnist_train"),
        ("/data/CIFAR-10.zip", "cifar_10"),
        ("/data/cats/shards-{000..010}.tar", "shards"),
        ("/", None),
    ],
)
def test_data_are_called_by_their_folder(path: str, name: str | None) -> None:
    assert label_of(path) == name
    assert name is None or FolderSettings(path=path).label == name
