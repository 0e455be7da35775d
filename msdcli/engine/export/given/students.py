"""Students behind one router, for a folder that `msd export` wrote (format onnx or torch).

Needs numpy, and onnxruntime or torch; msd itself is not needed.

    from students import Students

    students = Students()                      # max_resident=2, or memory=4 * 2**30, bounds what is held at once
    images = students.sample([3, 7], seed=0)   # float32 [2, *shape]
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# unit noise [n, *shape], classes [n] int64, unit noise between steps [n, steps - 1, *shape] or None -> images
Student = Callable[[np.ndarray, np.ndarray, "np.ndarray | None"], np.ndarray]


class Students:
    """Every class belongs to one student, which is loaded when it is first asked.

    With `max_resident` (a number) or `memory` (bytes of model files) the one asked least recently makes room. Where
    the models run: `device` (torch: cpu, cuda, ...; if absent, what they were compiled for) or `providers` (ONNX
    Runtime's). ValueError where they were compiled for another device.
    """

    def __init__(
        self,
        folder: Path | str | None = None,
        *,
        max_resident: int | None = None,
        memory: int | None = None,
        device: str | None = None,
        providers: Sequence[str] | None = None,
    ) -> None:
        self.folder = Path(__file__).parent if folder is None else Path(folder)
        self.record: dict[str, Any] = json.loads((self.folder / "export.json").read_text(encoding="utf-8"))
        parts = json.loads((self.folder / "partition.json").read_text(encoding="utf-8"))["parts"]
        self.owner = {c: k for k, part in enumerate(parts) for c in part}
        self.shape: tuple[int, ...] = tuple(self.record["shape"])
        self.class_names: list[str] = self.record["class_names"]
        self.steps: int = self.record.get("steps", 1)  # network evaluations per image
        self.max_resident, self.memory = max_resident, memory
        built: dict[str, str] = self.record.get("compiled_for", {"device": "cpu"})
        self.device, self.providers = device or built["device"], providers
        if self.record.get("aot"):
            refuse_other_device(built, self.device)
        self.resident: dict[int, Student] = {}  # the last one asked is the last in line

    def sample(self, classes: Sequence[int | str], *, seed: int = 0) -> np.ndarray:
        """Return one image per class number or name. Image i depends on the seed, i and its class alone."""
        numbers = [self.class_names.index(c) if isinstance(c, str) else c for c in classes]
        return self.generate(self.noise(seed, len(numbers)), numbers, self.step_noise(seed, len(numbers)))

    def generate(self, z: np.ndarray, classes: Sequence[int], noise: np.ndarray | None = None) -> np.ndarray:
        """Return what the classes' students make of unit noise `z` [n, *shape].

        Students of several steps also need `noise` [n, steps - 1, *shape], the unit noise between them.
        """
        for c in classes:
            if c not in self.owner:
                raise ValueError(f"class {c} does not exist: there are 0 to {len(self.owner) - 1}")
        labels = np.asarray(classes, np.int64)
        owners = np.asarray([self.owner[int(c)] for c in labels])
        images, largest = np.empty((len(labels), *self.shape), np.float32), self.record["max_batch"]
        for number in dict.fromkeys(owners.tolist()):
            at = np.flatnonzero(owners == number)
            for part in (at[i : i + largest] for i in range(0, len(at), largest)):
                between = None if noise is None else noise[part].astype(np.float32)
                images[part] = self.student(number)(z[part].astype(np.float32), labels[part], between)
        return images

    def noise(self, seed: int, count: int) -> np.ndarray:
        """Unit noise [count, *shape]. With torch it is what `msd sample` draws; numpy alone draws other numbers."""
        return self._unit_noise(seed, count)

    def step_noise(self, seed: int, count: int) -> np.ndarray | None:
        """Unit noise between the steps [count, steps - 1, *shape]; None for one step."""
        if self.steps == 1:
            return None
        each = [self._unit_noise(_derive("step", k, seed), count) for k in range(1, self.steps)]
        return np.stack(each, axis=1)

    def _unit_noise(self, seed: int, count: int) -> np.ndarray:
        if self.record["kind"] == "torch":
            import torch

            generators = [torch.Generator().manual_seed(_derive("image", seed, i)) for i in range(count)]
            return np.stack([torch.randn(self.shape, generator=g).numpy() for g in generators])
        return np.stack(
            [np.random.default_rng([seed, i]).standard_normal(self.shape, np.float32) for i in range(count)]
        )

    def student(self, number: int) -> Student:
        """Return student `number`, from memory or from its file."""
        if number in self.resident:
            self.resident[number] = self.resident.pop(number)
            return self.resident[number]
        self._make_room(number)
        path = self.folder / self.record["students"][number]["file"]
        opener = _open_torch if self.record["kind"] == "torch" else _open_onnx
        self.resident[number] = opener(path, self)
        return self.resident[number]

    def _make_room(self, number: int) -> None:
        sizes = [student["bytes"] for student in self.record["students"]]
        while self.resident and (
            (self.max_resident is not None and len(self.resident) >= self.max_resident)
            or (self.memory is not None and sum(sizes[k] for k in [*self.resident, number]) > self.memory)
        ):
            del self.resident[next(iter(self.resident))]


CPU_LEVELS = ("DEFAULT", "AVX2", "AVX512")  # instructions of x86, as torch calls them; each has those before


def device_record(device: str) -> dict[str, str]:
    """Return what code that is compiled for a device of this machine needs: its kind, and what that one can do."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        return {"device": kind, "name": name, "capability": ".".join(map(str, capability))}
    return {"device": kind, "name": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()}


def refuse_other_device(built: dict[str, str], device: str) -> None:
    """Raise ValueError unless code that was `built` for one device runs on this one."""
    wanted, cure = f"these students were compiled ahead of time for {built['device']}", "--format torch runs anywhere"
    if device.split(":")[0] != built["device"]:
        raise ValueError(f"{wanted}, not for {device} (export.json: compiled_for); without --aot {cure}")
    if "capability" not in built:
        return
    if built["device"] == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"{wanted}, and there is none here; without --aot {cure}")
    here = device_record(device)
    fits = here["capability"] == built["capability"]
    if built["device"] == "cpu":
        levels = [CPU_LEVELS.index(r["capability"]) if r["capability"] in CPU_LEVELS else -1 for r in (here, built)]
        fits = here["name"] == built["name"] and (fits or levels[0] > levels[1] >= 0)
    if not fits:
        said = [f"{r['name']} ({r['capability']})" for r in (built, here)]
        raise ValueError(f"{wanted} {said[0]}; here is {said[1]}; without --aot {cure}")


def _open_onnx(path: Path, wanted: Students) -> Student:
    import onnxruntime

    providers = wanted.providers or onnxruntime.get_available_providers()
    session = onnxruntime.InferenceSession(path, providers=list(providers))

    def student(z: np.ndarray, labels: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        given = {"z": z, "labels": labels} | ({} if noise is None else {"noise": noise})
        return np.asarray(session.run(["images"], given)[0])

    return student


def _open_torch(path: Path, wanted: Students) -> Student:
    import torch

    if path.name.endswith(".aot.pt2"):
        module: Any = torch._inductor.aoti_load_package(str(path))
    else:
        program = torch.export.load(path)
        if wanted.device != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, wanted.device)
        module = program.module()

    def student(z: np.ndarray, labels: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        given = [torch.from_numpy(array).to(wanted.device) for array in (z, labels, noise) if array is not None]
        with torch.no_grad():
            images = module(*given)
        return np.asarray(images.cpu())

    return student


def _derive(*parts: int | str) -> int:
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
