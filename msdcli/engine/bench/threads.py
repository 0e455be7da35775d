"""Several students in one process: each trains in a thread of its own, and they ask the frozen teacher together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine.train.precision import parts, synchronize
from msdcli.engine.train.trial import RandomDraws, StageTrainer
from msdcli.seeds import generator


class SeededDraws(RandomDraws):
    """Random draws of one update of one student: the same numbers in whichever thread or process it is made."""

    def __init__(self, net: Denoiser, batch: int, on: torch.device, key: tuple[int | str, ...]) -> None:
        super().__init__(net, batch, on)
        self.generator = generator(*key, device=on)

    def uniform(self, purpose: str) -> Tensor:
        return torch.rand(self.batch, device=self.on, generator=self.generator)

    def labels(self, how: str, count: int | None = None) -> Tensor:
        size = (count or self.batch,)
        return torch.randint(self.num_classes, size, device=self.on, generator=self.generator)

    def numbers(self, count: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(count, *shape, device=self.on, generator=self.generator)


class TeacherBatcher:
    """Where the threads of `size` students ask a frozen network: it is evaluated once, on all that they bring.

    What a gradient has to come back through is not shared: one student's backward pass would run through the others'.
    """

    def __init__(self, size: int, on: torch.device) -> None:
        self.on = on
        self.evaluations = 0
        self._barrier = threading.Barrier(size, action=self._ask)
        self._brought: dict[int, tuple[Callable[..., Any], tuple[Any, ...], torch.cuda.Event | None]] = {}
        self._answers: dict[int, Any] = {}
        self._done: torch.cuda.Event | None = None

    def wrap(self, net: Denoiser) -> None:
        """Let the network be asked here from now on; every thread must ask it for the same things in the same order."""
        for plain in parts(net):
            plain.forward = self._gathered(plain.forward)  # type: ignore[method-assign]
            plain.features = self._gathered(plain.features)  # type: ignore[method-assign]

    def leave(self) -> None:
        """Let nobody wait for a thread that has failed: the others get BrokenBarrierError."""
        self._barrier.abort()

    def _gathered(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def together(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
                return call(*args)
            me = threading.get_ident()
            self._brought[me] = (call, args, self._mark())
            self._barrier.wait()
            answer = self._answers.pop(me)
            if self._done is not None:
                stream = torch.cuda.current_stream(self.on)
                stream.wait_event(self._done)
                for tensor in [answer] if isinstance(answer, Tensor) else answer:
                    tensor.record_stream(stream)
            return answer

        return together

    def _ask(self) -> None:
        """Evaluate the network for all threads, in the one that came last; the others wait."""
        threads = sorted(self._brought)
        calls, given, marks = zip(*(self._brought.pop(thread) for thread in threads), strict=True)
        for mark in marks:
            if mark is not None:
                torch.cuda.current_stream(self.on).wait_event(mark)
        answer = calls[0](*map(_joined, zip(*given, strict=True)))
        self._done = self._mark()
        self.evaluations += 1
        sizes = [len(args[0]) for args in given]
        if isinstance(answer, Tensor):
            split: Sequence[Any] = answer.split(sizes)
        else:  # features: a list, one tensor per tap
            split = [list(own) for own in zip(*(tap.split(sizes) for tap in answer), strict=True)]
        self._answers.update(zip(threads, split, strict=True))

    def _mark(self) -> torch.cuda.Event | None:
        if self.on.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.on))
        return event


def _joined(values: Sequence[Any]) -> Any:
    """Return what all threads gave for one argument: images and conditions behind one another, else the first's."""
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else values[0]


class ThreadedStudents:
    """Students that train side by side in this process, each in a thread (on CUDA a stream) of its own.

    `trainers` by the students' numbers; where there are several they share one teacher. `threads` is what torch uses
    for each of them on a CPU.
    """

    def __init__(
        self, trainers: dict[int, StageTrainer], on: torch.device, *, threads: int, key: tuple[int | str, ...]
    ) -> None:
        self.trainers, self.on, self.key, self.step = trainers, on, key, 0
        self.batcher = TeacherBatcher(len(trainers), on)
        objectives = [trainer.objective for trainer in trainers.values()]
        teacher = getattr(objectives[0], "teacher", None)
        if len(trainers) > 1 and teacher is not None:
            assert all(vars(objective)["teacher"] is teacher for objective in objectives), (
                "students in one process share their teacher"
            )
            self.batcher.wrap(teacher)

        def begin() -> None:
            torch.set_num_threads(threads)
            if on.type == "cuda":
                torch.cuda.set_stream(torch.cuda.Stream(on))

        synchronize(on)
        self._threads: dict[int, ThreadPoolExecutor] = {}
        if len(trainers) == 1:  # in this thread: OpenMP slows a process down that has more threads than there are cores
            begin()
        else:
            self._threads = {number: ThreadPoolExecutor(1, initializer=begin) for number in trainers}

    def check(self) -> dict[int, list[float]]:
        """Return the losses of every student's next update by turn; without dropout, whose masks threads share."""
        self._mode(False)
        losses = self._together(1)
        self._mode(True)
        return losses

    def run(self, updates: int) -> float:
        """Let every student take `updates` updates; return the CPU seconds of this process."""
        begun = time.process_time()
        self._together(updates)
        return time.process_time() - begun

    def close(self) -> None:
        """End the threads."""
        for pool in self._threads.values():
            pool.shutdown()

    def _mode(self, training: bool) -> None:
        for trainer in self.trainers.values():
            for net in trainer.objective.nets.values():
                net.train(training)

    def _together(self, updates: int) -> dict[int, list[float]]:
        """Train all at once; return the losses of the last update. Raises what the first thread failed with."""
        if not self._threads:
            losses = {number: self._train(number, updates) for number in self.trainers}
            self.step += updates
            return losses
        asked = {number: pool.submit(self._train, number, updates) for number, pool in self._threads.items()}
        failures = [error for future in asked.values() if (error := future.exception())]
        for error in sorted(failures, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        self.step += updates
        return {number: future.result() for number, future in asked.items()}

    def _train(self, number: int, updates: int) -> list[float]:
        trainer, losses = self.trainers[number], list[Tensor]()
        net = trainer.objective.nets[trainer.objective.product]
        assert isinstance(net, Denoiser)
        try:
            for step in range(self.step, self.step + updates):
                draws = SeededDraws(net, trainer.stage.batch, self.on, (*self.key, number, step))
                losses = [trainer.turn(names, loss, draws) for names, loss in trainer.objective.turns(step)]
                trainer.average()
            synchronize(self.on)
        except BaseException:
            self.batcher.leave()
            raise
        return [float(loss) for loss in losses]
