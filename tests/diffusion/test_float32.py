"""What float32 is multiplied in: TF32 where networks train and sample, float32 where features are measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msdcli.diffusion import float32
from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine import pipeline, sample
from msdcli.engine.distributed import cores
from msdcli.engine.measure import fid
from msdcli.engine.tracking.events import silent
from msdcli.engine.train import loop
from msdcli.metrics.inception import FeatureNetwork
from msdcli.recipe import load
from msdcli.records import measurement, trained

RECIPE = """
name: small
threads: 1
data: {name: digits}
teacher: {network: {kind: unet, channels: 4, embedding: 8}, training: {steps: 1, batch: 4}, solver: {steps: 2}}
partition: {students: 1}
stages: [{objective: dm, steps: 1, batch: 4, fake_updates: 1, pairs: none}]
evaluation: {samples: 60, batch: 60}
"""


def flags() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic


def test_flags_are_set_together_and_given_back() -> None:
    before = flags()
    with float32.fast_float32():
        assert flags() == (True, True, True, False)
        with float32.exact_float32():
            assert flags()[:2] == (False, False)
        assert flags() == (True, True, True, False)
    with pytest.raises(ValueError, match="broken"), float32.exact_float32():
        raise ValueError("broken")
    assert flags() == before


def test_deterministic_work_tries_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with float32.fast_float32(deterministic=True):
        assert flags() == (True, True, False, True) and torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("capability", "said"), [((7, 5), "float32"), ((8, 0), "tf32"), ((9, 0), "tf32")])
def test_what_it_is_called(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], said: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert float32.record(torch.device("cuda:1")) == {"samples": said, "features": "float32"}
    assert float32.record(torch.device("cpu")) == {"samples": "float32", "features": "float32"}


def test_from_training_to_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with its teacher, sampled and measured: every network is asked under the flags of what it is for."""
    seen: dict[str, set[tuple[bool, ...]]] = {}

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **keys: Any) -> Any:
            if not any(isinstance(a, torch.Tensor) and a.is_meta for a in args):  # counting costs nothing
                seen.setdefault(name, set()).add(flags()[:2])
            return call(*args, **keys)

        return noted

    monkeypatch.setattr(Denoiser, "forward", noting("networks", Denoiser.forward))
    monkeypatch.setattr(loop, "update", noting("updates", loop.update))
    made = FeatureNetwork.__init__

    def watched(network: FeatureNetwork, *args: Any, **keys: Any) -> None:
        made(network, *args, **keys)
        object.__setattr__(network, "features", noting("features", network.features))

    monkeypatch.setattr(FeatureNetwork, "__init__", watched)
    monkeypatch.setattr(cores, "MOST", 1)  # threads of a CPU leave the flags alone
    (tmp_path / "small.yaml").write_text(RECIPE)
    before = flags()
    run = pipeline.distill(load(tmp_path / "small.yaml", [f"run={tmp_path / 'runs/small'}"]), silent).run
    sample.load(run.root).sample([0, 1])
    fid.measure(run, silent)
    assert seen == {"networks": {(True, True)}, "updates": {(True, True)}, "features": {(False, False)}}
    assert flags() == before
    figures = [measurement(path)["computed_in"] for path in run.results()]
    assert figures == [{"samples": "float32", "features": "float32"}], "this is no GPU"
    assert trained(run.teacher / "model.json")["computed_in"] == "float32"
    assert trained(run.stage(0, 0, "dm") / "model.json")["computed_in"] == "float32"
