"""The programs that students are exported as (torch.export's; ONNX graphs and compiled packages are made of them) have
one device, take nothing from the host, and wait for nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from msdcli.diffusion.generator import Generator
from msdcli.engine.export.torch import program
from tests.device import READS, FakeDevice, HostWaitError
from tests.waits.cases import NETWORKS, TEXT, network

FAST = [("mlp", (80.0, 2.5))]
EXPORTED = [(name, sigmas) for name in NETWORKS if name not in TEXT for sigmas in ((2.5,), (80.0, 2.5))]


def run(traced: torch.export.ExportedProgram, shape: tuple[int, ...], steps: int) -> Any:
    """Run a program that was traced on the device, for a batch of another size than it was traced with."""
    given = [torch.empty(5, *shape, device="meta"), torch.empty(5, dtype=torch.int64, device="meta")]
    if steps > 1:
        given.append(torch.empty(5, steps - 1, *shape, device="meta"))
    module = traced.module()
    with torch.no_grad(), FakeDevice(numbers=False) as on, on.watched():
        return module(*given)


@pytest.mark.parametrize(
    ("name", "sigmas"), [*FAST, *(pytest.param(*c, marks=pytest.mark.slow) for c in EXPORTED if c not in FAST)]
)
def test_a_program_has_one_device_and_waits_for_nothing(name: str, sigmas: tuple[float, ...]) -> None:
    net = network(name)
    traced = program(Generator(net, sigmas), "meta")
    for node in traced.graph.nodes:
        assert getattr(node.target, "overloadpacket", None) not in READS, node
        for value in (*node.args, *node.kwargs.values()):
            assert not isinstance(value, torch.device) or value.type == "meta", node
    held = {**traced.state_dict, **traced.constants}
    assert {name: t.device.type for name, t in held.items() if t.device.type != "meta"} == {}
    assert run(traced, net.shape, len(sigmas)).shape == (5, *net.shape)


def test_a_program_that_takes_numbers_from_the_host_is_found() -> None:
    class Copies(torch.nn.Module):
        def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return z * torch.ones(2, device="cpu").to(z.device)

    example = torch.zeros(5, 2, device="meta"), torch.zeros(5, dtype=torch.int64, device="meta")
    with pytest.raises(HostWaitError, match="copy to the device"):
        run(torch.export.export(Copies(), example), (2,), 1)
