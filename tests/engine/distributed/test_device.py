"""Which GPU a process computes on, its share of that GPU's memory, and its random numbers: without one at hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, distributed

from msdcli.diffusion import draws
from msdcli.diffusion.device_batch import PROCESSES, free_share
from msdcli.engine.distributed import device, group, workers
from msdcli.engine.train import precision
from msdcli.errors import UserError
from msdcli.nets.diffusers.prompt_store import PromptStore
from msdcli.recipe import load
from tests.data.test_fingerprint import Pictures
from tests.engine.train.test_precision import build

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPUS = 2


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: GPUS)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", PROCESSES):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("rank", "gpus", "own"), [(0, 2, 0), (1, 2, 1), (3, 2, 1), (3, 1, 0)])
def test_what_computes_and_what_talks_are_on_one_gpu(
    rank: int, gpus: int, own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every process sees one GPU only, as under `srun --gpus-per-task 1`."""
    launcher = {"WORLD_SIZE": "4", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    for name, value in (launcher | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    current = list[torch.device]()
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda on: current.append(torch.device("cuda", torch.device(on).index))
    )
    monkeypatch.setattr(group, "meet", lambda backend: None)
    monkeypatch.setattr(group, "on_hosts", lambda **_: None)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    with group.join_torchrun():
        assert current == [device.local_device("auto")] == [device.local_device("cuda")] == [torch.device("cuda", own)]
    assert device.local_device("cpu") == CPU
    with pytest.raises(UserError, match="each process needs its own"):
        device.local_device("cuda:0")


def test_measuring_keeps_the_random_numbers_of_its_own_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[list[torch.device]]()
    fork = torch.random.fork_rng

    def recorded(devices: list[torch.device]) -> object:
        asked.append(devices)
        return fork([])

    monkeypatch.setattr(torch.random, "fork_rng", recorded)
    with device.seeded_apart(torch.device("cuda", 1)), device.seeded_apart(CPU):
        pass
    assert asked == [[torch.device("cuda", 1)], []]
    with warnings.catch_warnings(record=True) as warned:
        precision.measure(build("mlp").requires_grad_(True), 2, CPU, repeats=1)
    assert asked[2:] == [[]] and not warned


def test_processes_on_a_device_share_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that fit into half of a process' share are kept there, prompts that fit into a quarter."""
    data, store = Pictures(), PromptStore(torch.zeros(100, 1, 4), torch.zeros(100, 2))
    images, prompts = data.pixels.nbytes, 100 * 6 * 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 10**9))
    monkeypatch.setattr(Tensor, "to", lambda tensor, *_, **__: tensor)  # what goes to a device that is not here

    def kept() -> tuple[bool, bool]:
        store._resident.clear()
        return draws.resident(data, torch.arange(len(data)), CUDA) is not None, store._on(CUDA) is not None  # type: ignore[arg-type]

    for processes, environment in (
        (1, {}),
        (2, workers._environment(1, 4, CUDA)),
        (3, workers._environment(0, 5, CUDA)),
    ):
        monkeypatch.setenv(PROCESSES, environment.get(PROCESSES, "1"))
        free = processes * 2 * images
        assert free_share(CUDA) == 2 * images and free_share(CPU) == 0
        assert kept()[0]
        free -= processes
        assert not kept()[0]
        free = processes * 4 * prompts
        assert kept()[1]
        free -= processes
        assert not kept()[1]
    assert workers._environment(0, 3, torch.device("cuda:1"))[PROCESSES] == "3", "one is named"


def test_every_process_of_a_group_has_the_recipes_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    recipe = load("toy", ["threads=3", "device=cpu"])
    assert device.prepare(recipe, shared=True) == device.prepare(recipe) == CPU and asked == [3, 3]
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert device.prepare(load("toy", ["device=cuda"]), shared=True) == torch.device("cuda", 1)
