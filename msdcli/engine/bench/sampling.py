"""How fast sampling is: a single image, a batch, and files written, beside the bare network."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.generator import Generator
from msdcli.engine.bench.clock import ratios
from msdcli.engine.pictures import save_pngs, save_zip
from msdcli.engine.sample import Students
from msdcli.engine.train.precision import timed, timed_in_turn
from msdcli.partition import Partition

ENOUGH = 0.5  # seconds of the bare network, in batches that are written in one piece


@torch.no_grad()
def measure(
    student: Denoiser,
    sigmas: tuple[float, ...],
    on: torch.device,
    *,
    batch: int,
    repeats: int = 5,
    by_onnx: Callable[[Students], Students] | None = None,
) -> dict[str, Any]:
    """Return seconds of one image, images per second of a batch, and the share that is left of the bare network's.

    `routed` is a request as `msd sample` serves it, with noise, routing and the copy to the host; `zip` and `png` also
    make an archive and a folder of PNGs, of several batches (absent for points and latents): what lies between them is
    the file system's. `by_onnx` gives the same students by ONNX Runtime: `onnx` is the request, `onnx one`
    that of one image.
    """
    num_classes = max(student.num_classes, 1)
    names = [str(k) for k in range(num_classes)]
    students = Students([], Partition([list(range(num_classes))], num_classes, "consecutive"), names, on)
    students.put(0, Generator(student, sigmas))
    students.sample([0] * batch, batch=batch)
    batch = min(batch, students.memory.largest)
    classes = [i % num_classes for i in range(batch)]
    x, sigma = torch.randn(batch, *student.shape, device=on), torch.full((batch,), sigmas[0], device=on)
    condition = torch.tensor(classes, device=on)

    def bare() -> None:
        for _ in sigmas:
            student(x, sigma, condition)

    many = max(1, round(ENOUGH / min(timed(bare, on) for _ in range(2))))

    def written(save: Callable[..., None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder) / "images", students.stream(classes * many, batch=batch), {})

    calls: dict[str, Callable[[], Any]] = {
        "bare": bare,
        "routed": lambda: students.sample(classes, batch=batch),
        "one": lambda: students.sample(classes[:1]),
    }
    if by_onnx is not None:
        served = by_onnx(students)
        calls |= {
            "onnx": lambda: served.sample(classes, batch=batch),
            "onnx one": lambda: served.sample(classes[:1]),
        }
    if len(student.shape) == 3 and student.shape[0] in (1, 3):  # pictures, and no latents
        calls |= {"zip": lambda: written(save_zip), "png": lambda: written(save_pngs)}
    seconds = timed_in_turn(calls, on, repeats)
    for name in seconds.keys() & {"zip", "png"}:
        seconds[name] = [s / many for s in seconds[name]]
    single = {"one", "onnx one"}
    shares = {name: ratios(seconds["bare"], seconds[name]) for name in calls if name not in {"bare", *single}}
    faster = {
        name: ratios(seconds[own], seconds[name])
        for own, name in (("routed", "onnx"), ("one", "onnx one"))
        if name in seconds
    }
    return {
        "batch": batch,
        "steps": len(sigmas),
        "latency_seconds": statistics.median(seconds["one"]),
        "images_per_second": {n: batch / statistics.median(s) for n, s in seconds.items() if n not in single},
        "share_of_bare": shares,
        **({"times_torch": faster} if faster else {}),
    }
