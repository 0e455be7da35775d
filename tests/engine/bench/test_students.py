"""Several students on one device: in one process they learn what each learns alone; `msd bench` compares the ways."""

from __future__ import annotations

import json

import pytest
import torch

from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.guidance import Guided
from msdcli.engine.bench import students as bench_students
from msdcli.engine.bench.threads import ThreadedStudents
from msdcli.engine.train.trial import Mode, StageTrainer
from msdcli.recipe.stages import AdmSettings, StageSettings
from tests.conftest import Msd
from tests.engine.train.test_precision import CPU, STAGES, build, objective_of

UPDATES = 3


def trainers(stage: StageSettings, teacher: Denoiser, numbers: tuple[int, ...], precision: str = "float32") -> dict:
    student = objective_of(stage, teacher).nets["student"]
    made = {}
    for number in numbers:
        torch.manual_seed(number)
        made[number] = StageTrainer(stage, teacher, student, CPU)
        made[number].enter(Mode(precision))
    return made


def train(made: dict) -> tuple[dict[int, list[float]], ThreadedStudents]:
    threaded = ThreadedStudents(made, CPU, threads=1, key=("test",))
    losses = threaded.check()
    threaded.run(UPDATES - 2)
    last = threaded.check()
    threaded.close()
    return {number: losses[number] + last[number] for number in made}, threaded


def teacher_of(kind: str) -> Denoiser:
    plain = build("unet")
    if kind == "plain":
        return plain
    guide = build("unet") if kind == "guided by another" else None
    return Guided(plain, scale=[1.0, 3.0], interval=[0.0, 10.0], guide=guide).requires_grad_(False)


@pytest.mark.parametrize(
    ("stage", "kind", "asked"),
    [  # how often the teacher is asked in an update, by all students together
        ("dm", "plain", 1),
        ("dm", "guided", 1),  # with and without the class in one call
        ("dm", "guided by another", 2),
        ("adm fake", "plain", 1),
        ("adm teacher", "plain", 2),  # its features of samples carry a gradient back, and are each student's own
        ("tsm", "plain", 1),
        ("cd", "plain", 2),
        ("ect", "guided", 1),
    ],
)
def test_students_in_one_process_learn_what_each_learns_alone(stage: str, kind: str, asked: int) -> None:
    settings, numbers = STAGES[stage].model_copy(update={"lr": 1e-4}), (0, 1, 2)
    join_torchrun, threaded = train(trainers(settings, teacher_of(kind), numbers))
    assert threaded.batcher.evaluations == asked * UPDATES
    for number in numbers:
        mine = trainers(settings, teacher_of(kind), (number,))
        alone, lone = train(mine)
        assert lone.batcher.evaluations == 0
        assert join_torchrun[number] == pytest.approx(alone[number], rel=1e-5)
        theirs = threaded.trainers[number].objective.nets
        for name, net in mine[number].objective.nets.items():
            a, b = (torch.cat([p.detach().flatten() for p in n.parameters()]) for n in (theirs[name], net))
            # Adam gives a step of the learning rate to gradients of any size, rounding errors among them.
            assert (a - b).norm() / len(a) ** 0.5 < 0.05 * settings.lr
    assert len({losses[0] for losses in join_torchrun.values()}) == len(numbers), "every student has draws of its own"


def test_a_student_that_fails_is_not_waited_for() -> None:
    made = trainers(STAGES["dm"], build("unet"), (0, 1))

    def broken(draws: object) -> torch.Tensor:
        raise ValueError("the second student fails")

    made[1].objective.student_loss = broken
    threaded = ThreadedStudents(made, CPU, threads=1, key=("test",))
    with pytest.raises(ValueError, match="the second student fails"):
        threaded.run(1)
    threaded.close()


@pytest.mark.gpu
@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_streams_of_one_device_wait_for_each_other(features: str) -> None:
    cuda = torch.device("cuda")
    stage = AdmSettings(batch=8, fake_updates=2, features=features, lr=1e-4)
    found = []
    for numbers in ((0, 1, 2), (0,), (1,), (2,)):
        teacher = build("unet").to(cuda)
        student, made = objective_of(stage, teacher).nets["student"], {}
        for number in numbers:
            torch.manual_seed(number)
            made[number] = StageTrainer(stage, teacher, student, cuda)
        threaded = ThreadedStudents(made, cuda, threads=1, key=("test",))
        threaded.run(20)
        found.append(threaded.check())
        threaded.close()
    for alone in found[1:]:
        for number, losses in alone.items():
            assert found[0][number] == pytest.approx(losses, rel=1e-3)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict:
    from typer.testing import CliRunner

    from msdcli.cli import app
    from tests.conftest import TINY

    recipe = tmp_path_factory.mktemp("students") / "tiny.yaml"
    recipe.write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_students, "ROUND_SECONDS", 0.05)
        words = ["bench", str(recipe), "--students", "2", "--repeats", "2", "--batch", "8", "--json"]
        done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert list(recipe.parent.iterdir()) == [recipe], "it writes nothing"
    return json.loads(done.stdout)


def test_bench_compares_processes_with_one_process(figures: dict) -> None:
    assert (figures["students"], figures["device"], figures["precision"]) == (2, "cpu", "float32")
    (stage,) = figures["stages"]
    assert (stage["objective"], stage["batch"]) == ("dm", 8)
    assert [(name, pool["processes"], pool["threads"]) for name, pool in stage["ways"].items()] == [
        ("one at a time", 1, 1),
        ("a process each", 2, 1),
        ("one process", 1, 1),
    ]
    for pool in stage["ways"].values():
        for spread in (pool["images_per_second"], pool["images_per_cpu_second"], pool["ratio"]):
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert pool["updates"] >= 1
        assert pool["memory_bytes"] is None or pool["memory_bytes"] > 2**24
    assert stage["ways"]["one at a time"]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert 0 < stage["teacher_share"] < 0.5, "five evaluations and three backward passes are others'"
    assert stage["one_process_to_processes"]["min"] > 0


def test_bench_says_that_all_ways_compute_the_same(figures: dict) -> None:
    assert figures["stages"][0]["losses_apart"] < 1e-5
    same = {0: [1.0, 2.0], 1: [3.0, 4.0]}
    other = {0: [1.0, 2.0], 1: [3.0, 4.4]}
    assert bench_students.apart({"one at a time": {0: [1.0, 2.0]}, "a process each": same, "one process": same}) == 0
    found = bench_students.apart({"a process each": same, "one process": other})
    assert found == pytest.approx(0.1)


def test_speeds_are_of_all_students_together() -> None:
    from msdcli.recipe import load

    jobs = bench_students.strategies(bench_students.BenchJob(load("digits"), 0, 8, "float32", (0, 1), 1), 1)
    took = {"one at a time": (1.0, 1.0), "a process each": (2.0, 4.0), "one process": (1.0, 2.0)}
    rounds = [{name: bench_students.RoundSeconds(*seconds) for name, seconds in took.items()}] * 2
    found = bench_students.summary(jobs, dict.fromkeys(jobs, 3), rounds, clocked=True)
    speeds = {name: pool["images_per_second"]["median"] for name, pool in found["ways"].items()}
    assert speeds == {"one at a time": 24.0, "a process each": 24.0, "one process": 48.0}  # 3 updates of 8 images
    assert found["ways"]["one process"]["ratio"]["median"] == found["one_process_to_processes"]["median"] == 2.0
    assert found["ways"]["a process each"]["images_per_cpu_second"]["median"] == 12.0


def test_cores_are_the_same_for_every_way() -> None:
    from msdcli.recipe import load

    one = bench_students.BenchJob(load("digits"), 0, 8, "float32", (0, 1, 2), 2)
    threads = {n: [job.threads for job in jobs] for n, jobs in bench_students.strategies(one, 8).items()}
    assert threads == {
        "one at a time": [2],
        "one at a time, all threads": [6],
        "a process each": [2, 2, 2],
        "one process": [2],
    }
    assert bench_students.strategies(one, 4)["one at a time, all threads"][0].threads == 4


def test_a_process_that_fails_is_told(msd: Msd) -> None:
    from msdcli.recipe import load

    one = bench_students.BenchJob(load("digits-dm"), 1, 8, "float32", (0,), 1)  # there is one stage only
    with bench_students.WorkerPool([one]) as pool, pytest.raises(IndexError):
        pool.check()
    alone = msd("bench", "digits", "--students", "1")
    assert alone.returncode == 2 and "--students" in alone.stderr
