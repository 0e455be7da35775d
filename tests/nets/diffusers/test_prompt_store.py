"""Numbers of prompts are looked up where they lie, in memory or in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from msdcli.nets.diffusers import prompt_store
from msdcli.nets.diffusers.prompt_store import PromptStore


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_file_is_looked_up_like_memory(tmp_path: Path, dtype: str) -> None:
    tokens, pooled = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(dtype), np.ones((5, 4), dtype)
    (tmp_path / prompt_store.TOKENS).write_bytes(tokens.tobytes())
    (tmp_path / prompt_store.POOLED).write_bytes(pooled.tobytes())
    store = prompt_store.mapped(tmp_path, 4, (3, 2), 4, dtype)
    assert len(store) == 4 and store.pooled.shape == (4, 4)
    found, _ = store.look_up(torch.tensor([3, -1, 0]))
    assert found.dtype == torch.float32
    assert (found.numpy() == tokens[[4, 0, 1]]).all()
    more = store.extended(torch.full((1, 3, 2), 7.0), torch.zeros(1, 4))
    assert more.look_up(torch.tensor([4]))[0].unique().tolist() == [7]
    with pytest.raises(ValueError, match="bytes"):
        prompt_store.mapped(tmp_path, 5, (3, 2), 4, dtype)


@pytest.mark.gpu
def test_a_gpu_keeps_the_rows_or_fetches_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, pooled = torch.randn(5, 3, 2), torch.randn(5, 4)
    wanted = tokens[[2, 0]]
    for free in (1, 10**12):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        found, _ = PromptStore(tokens, pooled).look_up(torch.tensor([1, -1], device="cuda"))
        assert found.is_cuda and torch.equal(found.cpu(), wanted)
