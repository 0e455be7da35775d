"""N students on one device, measured: one at a time, a process for each, or all in one process with one teacher.

Weights and images are random. All ways are alive at once and take their turns in every repeat, each in processes of its
own, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch

from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.float32 import fast_float32
from msdcli.engine import pipeline
from msdcli.engine.bench import recipe as bench
from msdcli.engine.bench.clock import ratios, spread
from msdcli.engine.bench.threads import SeededDraws, ThreadedStudents
from msdcli.engine.distributed import device
from msdcli.engine.inputs import dataset
from msdcli.engine.tracking.events import Report
from msdcli.engine.train.counting import num_parameters
from msdcli.engine.train.student import with_teachers
from msdcli.engine.train.trial import Mode, StageTrainer, resized
from msdcli.errors import WorkerError
from msdcli.recipe import Recipe
from msdcli.seeds import derive

SINGLE_PROCESS, PROCESSES, TOGETHER = "one at a time", "a process each", "one process"
ALL_THREADS = "one at a time, all threads"  # as many as the students of the other ways have together
ROUND_SECONDS = 2.0  # what a student's updates in one repeat should take at least


@dataclass(frozen=True)
class BenchJob:
    """What one process is to train: students of one stage, and with how many threads each."""

    recipe: Recipe
    stage: int
    batch: int
    precision: str
    students: tuple[int, ...]
    threads: int

    def threaded(self) -> ThreadedStudents:
        """Build the students; their weights depend on the recipe's seed and their numbers only."""
        on = device.prepare(self.recipe)
        torch.set_num_threads(self.threads)
        data = dataset.look(self.recipe, planning=True)
        torch.manual_seed(self.recipe.seed)
        frozen, described = pipeline.networks_on_meta(self.recipe, data, planning=True)
        teacher, *sizes = (filled(bench.build(net, on)) for net in (frozen, *described))
        trainers = dict[int, StageTrainer]()
        for number in self.students:
            student = sizes[size_of(self.recipe, number)]
            stage, own_teacher = with_teachers(self.recipe.stages, student, teacher)[self.stage]
            torch.manual_seed(derive(self.recipe.seed, number))
            stage = resized(stage, self.batch)
            trainers[number] = StageTrainer(stage, own_teacher, student, on, self.recipe.micro_batch)
            trainers[number].enter(Mode(self.precision))
        return ThreadedStudents(trainers, on, threads=self.threads, key=(self.recipe.seed,))


def size_of(recipe: Recipe, number: int) -> int:
    """Return which of the recipe's sizes a student of the comparison has: of more than the recipe's, all over again."""
    number %= recipe.partition.students
    return next(i for i, numbers in enumerate(recipe.sizes) if number in numbers)


def filled(net: Denoiser) -> Denoiser:
    """Give what begins at zero small random weights: a network that answers zero would agree with anything."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, 0.02)
    return net


def measure(
    recipe: Recipe, report: Report, *, students: int, repeats: int = 5, batch: int | None = None
) -> dict[str, Any]:
    """Compare the ways to train `students` at once on one device, for every stage of a recipe."""
    cores = torch.get_num_threads()
    on = device.prepare(recipe)
    data = dataset.look(recipe, planning=True)
    teacher, described = pipeline.networks_on_meta(recipe, data, planning=True)
    own = {size_of(recipe, number) for number in range(students)}
    largest = max((described[i] for i in own), key=num_parameters)
    chosen, reason, _ = bench.settle(recipe, bench.build(teacher, on), on)
    report(reason)
    each = recipe.threads or max(1, cores // students)
    stages = []
    for number, stage in enumerate(recipe.stages):
        size = batch or bench.fitting_batch(stage, largest, on)
        report(f"{stage.objective}: {repeats} repeats at batch {size}, {students} students")
        together = BenchJob(recipe, number, size, chosen, tuple(range(students)), each)
        jobs = strategies(together, cores if on.type == "cpu" else each)
        stages.append({"objective": stage.objective, "batch": size} | compare(jobs, on, repeats=repeats))
    return {
        "recipe": recipe.name,
        "device": device.name_of(on),
        "cores": cores,
        "torch": torch.__version__,
        "precision": chosen,
        "parameters": {"teacher": num_parameters(teacher), "student": num_parameters(largest)},
        "students": students,
        "stages": stages,
    }


def strategies(together: BenchJob, cores: int) -> dict[str, list[BenchJob]]:
    """Return the jobs of every way to train the students of one process, with `cores` for all of them."""
    each = [replace(together, students=(number,)) for number in together.students]
    more = min(cores, together.threads * len(each))
    alone = {SINGLE_PROCESS: each[:1]} | (
        {ALL_THREADS: [replace(each[0], threads=more)]} if more > together.threads else {}
    )
    return alone | {PROCESSES: each, TOGETHER: [together]}


def compare(jobs: dict[str, list[BenchJob]], on: torch.device, *, repeats: int) -> dict[str, Any]:
    """Return the figures of every way, and how they compare; `on` tells what memory each holds."""
    with contextlib.ExitStack() as stack:
        pools, memory, losses = dict[str, WorkerPool](), dict[str, int | None](), dict[str, dict[int, list[float]]]()
        for name, mine in jobs.items():
            free = free_bytes(on)
            pools[name] = stack.enter_context(WorkerPool(mine))
            losses[name] = pools[name].check()
            memory[name] = free - free_bytes(on) if on.type == "cuda" else pools[name].host_bytes()
            pools[name].ask("rest")
        updates = {name: max(1, math.ceil(ROUND_SECONDS / pool.run(1).wall)) for name, pool in pools.items()}
        share = statistics.median(pools[SINGLE_PROCESS].ask("teacher_share")[0] for _ in range(3))
        rounds = [{name: pool.run(updates[name]) for name, pool in pools.items()} for _ in range(repeats)]
    summed = summary(jobs, updates, rounds, clocked=on.type == "cpu")
    for name, figures in summed["ways"].items():
        figures["memory_bytes"] = memory[name]
    return summed | {"teacher_share": share, "losses_apart": apart(losses)}


def summary(
    jobs: dict[str, list[BenchJob]], updates: dict[str, int], rounds: list[dict[str, RoundSeconds]], *, clocked: bool
) -> dict[str, Any]:
    """Return speeds and their ratios from the seconds of all rounds; `clocked`: per second of the processors too."""
    images = {name: mine[0].batch * updates[name] * sum(len(j.students) for j in mine) for name, mine in jobs.items()}
    rates = {name: [images[name] / took[name].wall for took in rounds] for name in jobs}
    per_cpu = {name: [images[name] / took[name].cpu for took in rounds] for name in jobs} if clocked else {}
    figures = {
        name: {
            "processes": len(mine),
            "threads": mine[0].threads,
            "updates": updates[name],
            "images_per_second": spread(rates[name]),
            "images_per_cpu_second": spread(per_cpu[name]) if clocked else None,
            "ratio": ratios(rates[name], rates[SINGLE_PROCESS]),
        }
        for name, mine in jobs.items()
    }
    return {
        "ways": figures,
        "one_process_to_processes": ratios(rates[TOGETHER], rates[PROCESSES]),
        "one_process_to_processes_cpu": ratios(per_cpu[TOGETHER], per_cpu[PROCESSES]) if clocked else None,
    }


@dataclass(frozen=True)
class RoundSeconds:
    """Seconds of one round: of the clock, and of all processors together."""

    wall: float
    cpu: float


class WorkerPool:
    """The processes of one way to train students; they wait for work, and end with the `with` block."""

    def __init__(self, jobs: Sequence[BenchJob]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for job in jobs:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()

    def ask(self, what: str, *given: Any) -> list[Any]:
        """Let every process do one thing at once; return the answers. Raises what one of them failed with."""
        with contextlib.suppress(OSError):  # one that has ended is found out below
            for pipe in self._pipes:
                pipe.send((what, given))
        return [self._answer(pipe, process) for pipe, process in zip(self._pipes, self._processes, strict=True)]

    def _answer(self, pipe: Connection, process: Any) -> Any:
        try:
            answer = pipe.recv()
        except (EOFError, OSError):
            process.join(10)
            raise WorkerError(f"a process of the comparison ended with code {process.exitcode}") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def check(self) -> dict[int, list[float]]:
        """Return the losses of every student's first update, turn by turn."""
        return {number: losses for answer in self.ask("check") for number, losses in answer.items()}

    def run(self, updates: int) -> RoundSeconds:
        """Let every student take `updates` updates, all processes at once, after one that is not counted."""
        self.ask("run", 1)
        begun = time.perf_counter()
        cpu = self.ask("run", updates)
        took = RoundSeconds(time.perf_counter() - begun, sum(cpu))
        self.ask("rest")
        return took

    def host_bytes(self) -> int | None:
        found = self.ask("host_bytes")
        return None if None in found else sum(found)


def _serve(pipe: Connection, job: BenchJob) -> None:
    """Do what the pipe asks for until it closes: the process's side of a Way."""
    threaded: ThreadedStudents | None = None
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt), fast_float32():  # who asks has gone
        try:
            while True:
                what, given = pipe.recv()
                threaded = threaded or job.threaded()
                pipe.send(_ORDERS[what](threaded, *given))
        except Exception as error:  # is raised there
            pipe.send(error)
    os._exit(0)  # threads that wait for work would be waited for


def _rest(threaded: ThreadedStudents) -> None:
    """Leave the device's memory to the others until the next turn."""
    if threaded.on.type == "cuda":
        torch.cuda.empty_cache()


def _teacher_share(threaded: ThreadedStudents) -> float:
    """Return which part of an update the teacher's forward pass takes, where the device is waited for each time."""
    trainer = next(iter(threaded.trainers.values()))
    net = trainer.objective.nets[trainer.objective.product]
    assert isinstance(net, Denoiser)
    parts = trainer.parts(SeededDraws(net, trainer.stage.batch, threaded.on, ("parts",)))
    return parts.get("teacher forward", 0.0) / sum(parts.values())


def _host_bytes(_: ThreadedStudents) -> int | None:
    """Return this process's share of the memory, at its peak; None where the system does not tell."""
    try:
        shares, status = (Path(f"/proc/self/{name}").read_text() for name in ("smaps_rollup", "status"))
    except OSError:
        return None
    found = re.findall(r"^(Pss|VmHWM|VmRSS):\s+(\d+) kB", shares + status, re.MULTILINE)
    kilobytes = {name: int(value) for name, value in found}
    return (kilobytes["Pss"] + kilobytes["VmHWM"] - kilobytes["VmRSS"]) * 1024


_ORDERS: dict[str, Callable[..., Any]] = {
    "check": ThreadedStudents.check,
    "run": ThreadedStudents.run,
    "rest": _rest,
    "teacher_share": _teacher_share,
    "host_bytes": _host_bytes,
}


def free_bytes(on: torch.device) -> int:
    """Return what is free on a CUDA device, whoever holds the rest; elsewhere 0."""
    return torch.cuda.mem_get_info(on)[0] if on.type == "cuda" else 0


def apart(losses: dict[str, dict[int, list[float]]]) -> float:
    """Return the largest relative difference of a student's losses between two ways."""
    pairs = [
        (a, b)
        for found in losses.values()
        for number, mine in found.items()
        for a, b in zip(mine, losses[PROCESSES][number], strict=True)
    ]
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)
