"""What a plan says a run costs is what training counts; plans need neither weights nor data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from msdcli.engine import estimate, pipeline, plan, search
from msdcli.engine.inputs import dataset
from msdcli.engine.tracking import formatting
from msdcli.engine.train.counting import MemoryCounter, forward_flops, num_parameters, turn_bytes
from msdcli.recipe import load, shipped
from msdcli.rundir import RunDir, write_json
from tests.conftest import Msd

MISSING = """
name: big
data: {name: folder, path: data.zip, size: 8, classes: 4, count: 100, source: the shelf}
teacher:
  path: teacher.pkl
  source: the web
  network: {kind: edm, arguments: {model_channels: 8, channel_mult: [1, 2], num_blocks: 1}}
student: {width: 0.5}
partition: {students: 2}
stages: [{objective: tsm, steps: 10, batch: 4}, {objective: adm, steps: 10, batch: 4}]
"""


def test_the_plan_counts_what_training_counts(finished: Path) -> None:
    recipe = load(finished)
    data = pipeline.check(recipe)
    cost = estimate.estimate(recipe, data, *pipeline.networks_on_meta(recipe, data))
    for part, folder in ((cost.sizes[0].stages[0].flops, "students/0/0-dm"), (cost.teacher_flops, "teacher")):
        recorded = json.loads((finished / folder / "model.json").read_text())["cost"]["flops"]
        assert part == pytest.approx(recorded, rel=1e-6)


def test_attention_is_counted_on_the_meta_device_as_on_the_cpu() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from msdcli import nets
    from msdcli.recipe.networks import EdmNetworkSettings

    settings = EdmNetworkSettings(arguments={"model_channels": 64, "channel_mult": [1], "attn_resolutions": [8]})
    options = {"shape": (3, 8, 8), "num_classes": 4, "sigma_data": 0.5}
    with torch.device("meta"):
        counted = forward_flops(nets.build(settings, **options))
    net = nets.build(settings, **options)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    assert counted == counter.get_total_flops() > 0


def test_bytes_are_those_of_what_is_alive_at_once() -> None:
    """Activations are freed one by one in the backward pass, while gradients come: by hand, in units of a matrix."""
    with torch.device("meta"):
        net = nn.Sequential(*[nn.Linear(100, 100, bias=False) for _ in range(4)])
        with MemoryCounter() as memory, torch.no_grad():
            net(torch.empty(100, 100))
            assert memory.now == 0 and memory.peak == 3 * 40_000, "the first input, a layer's and its output"
        with MemoryCounter() as memory:
            x = torch.empty(100, 100)
            y = net(x)
            assert memory.now == memory.peak == 5 * 40_000, "every layer's input, and the output"
            y.backward(torch.empty(100, 100))
            # The third layer's backward pass: x and two activations, y, its gradient, that of the layer's output and of
            # the last weight, and what the pass makes, the gradients of its input and of its weight.
            assert memory.now == 6 * 40_000 and memory.peak == 9 * 40_000
            del x, y
            assert memory.now == 4 * 40_000, "the weights' gradients"


def test_gradients_of_the_passes_before_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two passes a turn takes a gradient more than in one of half the batch, as long as it is not cut itself."""
    with torch.device("meta"):
        net = nn.Linear(100, 100, bias=False)
        objective = SimpleNamespace(nets={"student": net})
        one, two = (
            turn_bytes(objective, ("student",), lambda _: net(torch.empty(2, 100)), None, passes=passes)  # type: ignore[arg-type]
            for passes in (1, 2)
        )
    assert two - one == 40_000 and net.weight.grad is None


# What the recipes say of an 80 GB card: counted, with a tenth of it for what is not (gaps, workspaces, the context).
CARD = 80e9 * 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*sorted(p.stem for p in shipped() if p.stem.startswith("imagenet64-msd4")), "sd15-msd4"]
)
def test_the_large_recipes_fit_a_card_as_they_say(name: str) -> None:
    recipe = load(name)
    data = dataset.look(recipe, planning=True)
    teacher, (student,) = pipeline.networks_on_meta(recipe, data, planning=True)
    most = max(estimate.stage_cost(stage, student, teacher, recipe.micro_batch).peak_bytes for stage in recipe.stages)
    said = re.search(r"(\d+) GiB in passes of (\d+) images", next(p for p in shipped() if p.stem == name).read_text())
    assert said and (round(most / 2**30), recipe.micro_batch) == (int(said[1]), int(said[2]))
    assert most < CARD


def test_a_plan_needs_neither_weights_nor_data(msd: Msd, tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text(MISSING)
    planned = msd("distill", "big.yaml", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "missing:   teacher teacher.pkl: put it there, from the web" in planned.stdout
    assert "missing:   data data.zip: put it there, from the shelf" in planned.stdout
    assert all(word in planned.stdout for word in ("one student, adm", "FLOP", "iB ("))
    assert [p.name for p in tmp_path.iterdir()] == ["big.yaml"]
    refused = msd("distill", "big.yaml")
    assert (refused.returncode, "data.zip does not exist" in refused.stderr) == (2, True)


def test_data_that_are_missing_must_be_described(msd: Msd, tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text(MISSING.replace("count: 100, ", ""))
    planned = msd("distill", "big.yaml", "--dry-run")
    assert (planned.returncode, "data.count" in planned.stderr) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("path", shipped(), ids=lambda p: p.stem)
def test_every_shipped_recipe_can_be_planned(msd: Msd, tmp_path: Path, path: Path) -> None:
    planned = msd("distill", path.stem, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "FLOP" in planned.stdout
    assert path.stem != "sd15-msd4" or "859,520,964 parameters" in planned.stdout  # Stable Diffusion 1.5's own count
    assert not list(tmp_path.iterdir())


def test_a_student_that_is_searched_is_counted_as_what_its_target_implies(tmp_path: Path) -> None:
    recipe = load("digits-dm", [f"run={tmp_path / 'r'}", "student={parameters: 0.58, prune: layers}"])
    data = pipeline.check(recipe, planning=True)
    teacher, (student,) = plan._networks(recipe, data)
    share = num_parameters(student) / num_parameters(teacher)
    assert 0.4 < share <= 0.58, "the widest that keeps the target"
    made = {"recipe": recipe, "parameters": (num_parameters(teacher), [num_parameters(student)])}
    said = plan.Plan._size(SimpleNamespace(**made, searched=False), range(5), num_parameters(student))  # type: ignore[arg-type]
    assert "at most 58% of the teacher's parameters (87,743) each" in said
    chosen = search.Candidate(teacher.settings.scaled(0.5, 1.0), 0.3, 0.3)
    run = RunDir(tmp_path / "r")
    run.adopt(load("digits-dm", [f"run={run.root}", "student.parameters=0.3"]))
    write_json(run.searched(), {"target": {}, "chosen": chosen.record(), "tried": []})
    assert num_parameters(plan._networks(recipe, data)[1][0]) == num_parameters(student), "found for another target"
    run.adopt(recipe)
    assert num_parameters(plan._networks(recipe, data)[1][0]) < num_parameters(student), "what a run found is counted"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["stages.0.pairs=shared"], ["regress"]),
        (["stages.0={objective: flow, steps: 5, lr: 1e-3}"], ["flow"]),
        ([], []),
        (["stages.0.pairs=shared", "partition.students=1"], []),
        (["stages.0.pairs=shared", "pairs.count=2400"], []),  # 480 each
    ],
)
def test_students_that_learn_the_pairs_of_all_classes_are_told_of(changes: list[str], told: list[str]) -> None:
    said = plan.remarks(load("digits", changes), None)
    assert [line.split()[1] for line in said] == told
    assert all("some 819 each" in line for line in said)


def test_one_of_a_thing_is_not_several() -> None:
    assert [formatting.counted(n, "class", "classes") for n in (1, 2, 1200)] == [
        "1 class",
        "2 classes",
        "1,200 classes",
    ]
    lines = estimate.lines(estimate.Estimate(1e12, 0.0, [estimate.StudentCost([], [0])], 1e10))
    assert any("all, 1 student " in line for line in lines)
