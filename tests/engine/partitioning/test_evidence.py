"""Parts that follow from what was measured of the classes: how hard each is, and what the classifier mixes up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from msdcli.engine.measure import classifier
from msdcli.engine.partitioning import evidence, explaining, making
from msdcli.errors import UserError
from msdcli.partition import Partition
from msdcli.recipe import Recipe, load_any
from msdcli.rundir import RunDir, write_json
from tests.conftest import Msd
from tests.engine.measure.test_classifier import Noise

BASE = {
    "name": "second",
    "threads": 1,
    "data": {"name": "digits"},
    "teacher": {"network": {"kind": "unet", "channels": 8, "multipliers": [1], "blocks": 1}, "training": {"steps": 1}},
    "stages": [{"objective": "dm", "steps": 1}],
}
HARD = [5.0, 1, 1, 1, 1, 4, 1, 2, 1, 3]


def first_run(folder: Path, distances: list[float], classes: list[str] | None = None) -> Path:
    """A run that has been measured: its recipe, its record and the distance of every class."""
    run = RunDir(folder / "first")
    run.root.mkdir()
    run.adopt(load_any(BASE, {"name": "first", "run": str(run.root)}))
    write_json(run.record_file, {"commands": [], "class_names": classes or [str(k) for k in range(10)]})
    rows = [{"who": "students", "group": "whole", "values": {"fd_digits": 1.0}}]
    rows += [{"who": "teacher", "group": f"class {k}", "values": {"fd_digits": 77.0}} for k in range(10)]
    rows += [{"who": "students", "group": f"class {k}", "values": {"fd_digits": d}} for k, d in enumerate(distances)]
    measured = {"metric": "fd_digits", "protocol": "data", "rows": rows, "samples": 100}
    write_json(run.metrics / "fd_digits.json", measured)
    return run.root


def second(folder: Path, **partition: object) -> Recipe:
    return load_any(BASE | {"run": str(folder / "second"), "partition": partition}, {})


def test_difficulty_reads_the_first_runs_distances(tmp_path: Path, msd: Msd) -> None:
    run = first_run(tmp_path, HARD)
    recipe = second(tmp_path, method="difficulty", students=2, run=str(run))
    found, data = making.preview(recipe)
    assert [sum(HARD[c] for c in part) for part in found.parts] == [10, 10]
    assert found.evidence is not None and found.evidence["distances"] == HARD
    apart = making.preview(second(tmp_path, method="difficulty", students=2, run=str(run), order="sorted"))[0]
    assert apart.parts == [[1, 2, 3, 4, 6], [0, 5, 7, 8, 9]] and apart.evidence == found.evidence
    with pytest.raises(UserError, match="`order: sorted` and `method: difficulty` go together"):
        second(tmp_path, method="random", students=2, order="sorted")
    assert explaining.reasons(found, data.class_names)[7] == "distance 2, number 4 from the hardest"
    assert explaining.explain(recipe, "0").reason == "distance 5, number 1 from the hardest"
    (tmp_path / "second.yaml").write_text(recipe.to_yaml())
    said = msd("partition", "second.yaml").stdout
    assert "why each class is where it is" in said and "number 4 from the hardest" in said, said
    told = json.loads(msd("partition", "second.yaml", "--json").stdout)
    assert told["parts"] == found.parts and told["evidence"]["metric"] == "fd_digits"


def test_a_first_run_that_does_not_do_is_refused(tmp_path: Path) -> None:
    def of(path: Path) -> None:
        making.preview(second(tmp_path, method="difficulty", students=2, run=str(path)))

    with pytest.raises(UserError, match="no run at"):
        of(tmp_path / "nowhere")
    run = first_run(tmp_path, HARD[:8])
    with pytest.raises(UserError, match="no fd_digits of 2 classes: 8, 9"):
        of(run)
    (run / "metrics/fd_digits.json").unlink()
    with pytest.raises(UserError, match="is not measured"):
        of(run)
    for names, said in ((["0"], "1 there, 10 here"), ([*"0123456798"], "class 8 is 9 there and 8 here")):
        write_json(run / "run.json", {"commands": [], "class_names": names})
        with pytest.raises(UserError, match=f"other classes than these data: {said}"):
            of(run)


@pytest.mark.parametrize(
    "partition",
    [{"method": "difficulty"}, {"method": "confusion", "run": "x"}, {"run": "x"}, {"method": "extend"}],
    ids=["without a run", "a run too many", "a run and no method", "nothing to extend"],
)
def test_run_and_difficulty_go_together(partition: dict[str, str]) -> None:
    with pytest.raises(UserError, match="`run` and `method: difficulty` or `extend` go together"):
        load_any(BASE | {"partition": partition}, {})


class Reads(nn.Module):
    """A classifier that says what is planted: of class c it takes some images for c + 5."""

    def __init__(self, classes: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.0))
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        c = x[:, 0, 0, 0].long()
        other = (c + 5) % 10
        return torch.full((len(c), 10), -30.0).scatter(1, c[:, None], 1.0).scatter(1, other[:, None], 0.0)


class Labelled(Noise):
    """Pictures that carry their class in a corner."""

    def images(self, numbers: list[int]) -> Tensor:  # type: ignore[override]
        x = super().images(numbers).clone()
        x[:, 0, 0, 0] = self.labels(numbers).float()
        return x


def test_classes_that_are_mixed_up_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Labelled(300)
    known = classifier.TrainedClassifier(Reads(torch.arange(10)), "hash", classifier.HeldOut(30, 30, 3))  # type: ignore[arg-type]
    monkeypatch.setattr(classifier, "provide", lambda *_: known)
    recipe = second(tmp_path, method="confusion", students=5)
    mixed = evidence.confusion(RunDir(tmp_path / "second"), recipe, data, torch.device("cpu"), print)
    expected = torch.tensor([1.0, 0.0]).softmax(0)[1].item()
    assert mixed[0][3, 8] == pytest.approx(expected) and mixed[0][3, 4] < 1e-9
    made = making.make(recipe.partition, data, None, mixed)
    assert made.parts == [[c, c + 5] for c in range(5)]
    said = explaining.reasons(made, data.class_names)
    assert said[2].startswith(f"mixed up with 7 {expected:.1%}, 0 0.0% (student 0)"), said[2]
    made.save(tmp_path / "partition.json")
    assert Partition.load(tmp_path / "partition.json") == made
    nothing = classifier.TrainedClassifier(known.network, "hash", classifier.HeldOut(30, 3, 3))
    monkeypatch.setattr(classifier, "provide", lambda *_: nothing)
    with pytest.raises(UserError, match="knows nothing of the classes"):
        evidence.confusion(RunDir(tmp_path / "second"), recipe, data, torch.device("cpu"), print)


def test_a_class_without_held_out_images_says_nothing_itself() -> None:
    data = Labelled(20)
    said = evidence.probabilities(Reads(torch.arange(10)), data, torch.arange(9))  # type: ignore[arg-type]
    assert said[9].isnan().all() and not said[:9].isnan().any()
    assert len(evidence.mixed_with(said.numpy())) == 10
    assert evidence.mixed_with(said[:1, :1].numpy()) == [[]]


def test_points_have_no_classifier(tmp_path: Path, msd: Msd) -> None:
    tree = BASE | {"data": {"name": "toy2d", "points": 64}, "teacher": {"network": {"kind": "mlp", "channels": 8}}}
    recipe = load_any(tree | {"run": str(tmp_path / "r"), "partition": {"method": "confusion"}}, {})
    with pytest.raises(UserError, match="classifier of the data's pictures, and there are none"):
        making.preview(recipe)
    (tmp_path / "digits.yaml").write_text(second(tmp_path, method="confusion", students=2).to_yaml())
    said = msd("partition", "digits.yaml", "--dry-run")
    assert said.returncode == 0 and "would first train the classifier" in said.stdout
    assert not list(tmp_path.glob("**/classifier*"))
