"""The prompts of a run: embedded once by the teacher's text encoder, kept by content, and asked for by number."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from msdcli import records
from msdcli.data.base import Dataset, PromptDataset
from msdcli.data.prompts import clean
from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine.checkpoints import disk
from msdcli.engine.distributed.device import resolve
from msdcli.engine.inputs import hub, importing
from msdcli.engine.inputs.importing import TEXT
from msdcli.engine.tracking.events import Progress, Report
from msdcli.errors import UserError
from msdcli.nets.diffusers import prompt_store, text_encoder
from msdcli.nets.diffusers.prompt_store import PromptStore
from msdcli.nets.diffusers.sections import read_section, text_part
from msdcli.nets.diffusers.text_encoder import TextEncoder
from msdcli.partition import Partition
from msdcli.recipe import Recipe
from msdcli.recipe.data import PromptsSettings
from msdcli.rundir import RunDir, key, link, lock, read_json, write_json, write_text

RECORD, PROGRESS, LINES = "prompts.json", "progress.json", "prompts.jsonl"
BATCH = 64  # prompts per call of the text encoder
FORMAT = 1


def provide(run: RunDir, recipe: Recipe, data: Dataset, device: torch.device, report: Report) -> None:
    """Embed the prompts of a run, unless that is done, and link them into it; its teacher is there already."""
    settings = recipe.data
    assert isinstance(settings, PromptsSettings) and isinstance(data, PromptDataset)
    text_sha256 = records.text_hash(run.teacher / "model.json")
    folder = _folder(run, text_sha256, data, settings)
    embed(folder, data.prompts, run.teacher / TEXT, settings.embeddings, device, report)
    link(folder, run.prompts)


def embed(folder: Path, prompts: Sequence[str], text: Path, dtype: str, device: torch.device, report: Report) -> None:
    """Write the embeddings of `prompts` and of the empty one; what an earlier process has written is taken up."""
    with lock(folder, "the prompts' embeddings", wait=report):
        if (folder / RECORD).is_file():
            return
        encoder = TextEncoder(text, device)
        state = read_json(folder / PROGRESS) if (folder / PROGRESS).is_file() else {"rows": 0, "cut": 0}
        rows, begun, first = ["", *prompts], time.monotonic(), state["rows"]
        _check_space(folder, (len(rows) - first) * encoder.length * encoder.width * np.dtype(dtype).itemsize)
        saved, shapes = begun, list[list[int]]()
        with ExitStack() as stack:
            names = (prompt_store.TOKENS, prompt_store.POOLED)
            files = [stack.enter_context(_reopened(folder / name, state.get(name, 0))) for name in names]
            for start in range(first, len(rows), BATCH):
                *found, cut = encoder.encode(rows[start : start + BATCH])
                shapes = [list(f.shape[1:]) for f in found]
                for file, values in zip(files, found, strict=True):
                    file.write(values.cpu().numpy().astype(dtype).tobytes())
                state = {"rows": min(start + BATCH, len(rows)), "cut": state["cut"] + cut, "shapes": shapes}
                report(Progress("prompts", state["rows"] - 1, len(prompts), "prompts"))
                if time.monotonic() - saved > 30 or state["rows"] == len(rows):
                    state |= _synced(files)
                    write_json(folder / PROGRESS, state)
                    saved = time.monotonic()
        write_text(folder / LINES, "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in prompts))
        record = {
            "format": FORMAT,
            "count": len(prompts),
            "dtype": dtype,
            "cut": state["cut"],
            "shapes": state["shapes"],
        }
        write_json(folder / RECORD, record | {"text": read_json(text / "text.json"), "batch": BATCH})
        (folder / PROGRESS).unlink()
    speed = (len(rows) - first) / max(time.monotonic() - begun, 1e-9)
    report(f"prompts: {len(prompts):,} embedded at {speed:,.0f} a second, in {folder}")
    if state["cut"]:
        report(f"prompts: {state['cut']:,} are longer than the text encoder reads; it sees their beginning")


def _check_space(folder: Path, needed: int) -> None:
    if (free := disk.free_bytes(folder)) < needed:
        raise UserError(
            f"{folder}: the prompts' embeddings need {needed:,} bytes, the disk has {free:,} left",
            hint="run=... puts the run on another disk",
        )


def _reopened(path: Path, size: int) -> IO[bytes]:
    """Open for writing at `size`: what was written after the last note of progress is written again."""
    file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
    file.truncate(size)
    file.seek(size)
    return file


def _synced(files: Sequence[IO[bytes]]) -> dict[str, int]:
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    return {Path(file.name).name: file.tell() for file in files}


@contextmanager
def text_folder(run: RunDir, recipe: Recipe) -> Iterator[Path]:
    """Give the folder of a teacher's text encoder: the run's, an imported teacher's own, or links to a pipeline's."""
    path = hub.resolve(recipe.teacher.path or "")
    if (run.teacher / TEXT / text_encoder.RECORD).is_file():
        yield run.teacher / TEXT
        return
    if not importing.is_foreign(path):
        yield path / TEXT
        return
    with tempfile.TemporaryDirectory(prefix="msd-text-") as folder:
        section, _ = read_section(path)
        text_encoder.copy(path, text_part(path, section.config), Path(folder), link=True)
        yield Path(folder)


def for_recipe(run: RunDir, recipe: Recipe, data: PromptDataset, report: Report) -> PromptStore:
    """Return the embeddings of a recipe's prompts, of its run or, made now, those that the run will use."""
    if is_here(run, recipe, data):
        return open_store(run.prompts)
    settings, folder = recipe.data, folder_for(run, recipe, data)
    assert isinstance(settings, PromptsSettings)
    with text_folder(run, recipe) as text:
        embed(folder, data.prompts, text, settings.embeddings, resolve(recipe.device), report)
    return open_store(folder)


def is_here(run: RunDir, recipe: Recipe, data: PromptDataset) -> bool:
    """Whether the run has the embeddings of just these prompts, as the recipe keeps them."""
    if not (run.prompts / RECORD).is_file():
        return False
    dtype = getattr(recipe.data, "embeddings", None)
    return read_json(run.prompts / RECORD).get("dtype") == dtype and read_prompts(run.prompts) == list(data.prompts)


def folder_for(run: RunDir, recipe: Recipe, data: PromptDataset) -> Path:
    """Return where the embeddings of a recipe's prompts are, or will be."""
    settings, path = recipe.data, hub.resolve(recipe.teacher.path or "")
    assert isinstance(settings, PromptsSettings)
    if importing.is_foreign(path):
        text_sha256 = importing.text_identity(path, read_section(path)[0].config)
    else:
        text_sha256 = records.text_hash(path / "model.json")
    return _folder(run, text_sha256, data, settings)


def _folder(run: RunDir, text_sha256: str, data: PromptDataset, settings: PromptsSettings) -> Path:
    # Embeddings depend on the text encoder (weights, vocabularies and configurations are in its hash), the prompts in
    # order, the type that they are kept in and the code (FORMAT); BATCH and the device move their last bits alone.
    return run.shared / f"prompts-{key('prompts', FORMAT, text_sha256, data.text_hash(), settings.embeddings)}"


def open_store(folder: Path) -> PromptStore:
    """Open embeddings that are there. UserError if they are missing or damaged."""
    record = records.read(folder / RECORD, records.Embedded, "record of prompts")
    try:
        shape, (pooled,) = record["shapes"]
        return prompt_store.mapped(folder, record["count"], (shape[0], shape[1]), pooled, record["dtype"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        hint = f"remove {folder} and what it links to, and msd distill makes it again"
        raise UserError(f"{folder} is damaged: {error}", hint=hint) from None


def read_prompts(folder: Path) -> list[str]:
    """Return the texts of embedded prompts, in order."""
    try:
        return [json.loads(line) for line in (folder / LINES).read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / LINES} cannot be read: {error}") from None


class PromptRouter:
    """Where new prompts get a number: embedded, placed by the partition's rule, and looked up like those before.

    Numbers below `known` are those that were trained on. Time is kept: of the text encoder, and of routing alone.
    """

    def __init__(
        self, text: Path, partition: Partition, *, store: PromptStore | None, device: torch.device, dtype: str
    ) -> None:
        self.text, self.partition, self.device, self.dtype = text, partition, device, dtype
        self.known = partition.num_conditions
        self.texts, self.owner = list[str](), list[int]()
        self.encoder_seconds = self.routing_seconds = 0.0
        self._stored, self._dtype = store, getattr(torch, dtype)
        self._encoder: TextEncoder | None = None
        self._new: PromptStore | None = None
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return self.known + len(self.texts)

    def number(self, prompts: Sequence[str]) -> list[int]:
        """Return the numbers of prompts, after embedding and placing those that were not asked for before."""
        wanted = [clean(prompt) for prompt in prompts]
        if not all(wanted):
            raise UserError("a prompt is empty")
        new = [prompt for prompt in dict.fromkeys(wanted) if prompt not in self._numbers]
        if new:
            kept, begun = self._kept(), time.perf_counter()
            tokens, pooled = self.embed(new)
            self.encoder_seconds += time.perf_counter() - begun
            begun = time.perf_counter()
            owner = self.place(new, pooled.numpy())
            self.routing_seconds += time.perf_counter() - begun
            self._numbers |= {prompt: self.known + len(self.texts) + i for i, prompt in enumerate(new)}
            self.texts += new
            self.owner += owner
            self._new = kept.extended(tokens, pooled)
        return [self._numbers[prompt] for prompt in wanted]

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return tokens and pooled embeddings on the CPU, as rounded as those that were trained with."""
        if self._encoder is None:
            self._encoder = TextEncoder(self.text, self.device)
        found = list[tuple[Tensor, Tensor]]()
        for start in range(0, len(prompts), BATCH):
            tokens, pooled, _ = self._encoder.encode(prompts[start : start + BATCH])
            found.append((tokens.cpu().to(self._dtype), pooled.cpu().to(self._dtype)))
        return torch.cat([tokens for tokens, _ in found]), torch.cat([pooled for _, pooled in found])

    def place(self, prompts: Sequence[str], pooled: np.ndarray | None) -> list[int]:
        """Return the students of prompts."""
        rule = self.partition.rule
        if rule is None:
            raise UserError("this partition has no rule for new prompts", hint="msd partition says what it is made of")
        owner: list[int] = rule.place(prompts, pooled).owner.tolist()
        return owner

    def owner_of(self, number: int) -> int:
        """Return the student of a prompt's number."""
        return self.partition.owner[number] if number < self.known else self.owner[number - self.known]

    def name(self, number: int, trained: Sequence[str]) -> str:
        """Return the text of a prompt's number."""
        return self.texts[number - self.known] if number >= self.known else trained[number]

    def look_up(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """What a student's network asks for: embeddings of numbers, trained or new."""
        new = condition >= self.known
        if not bool(new.any()):
            return self._trained().look_up(condition)
        if bool(new.all()):
            return self._kept().look_up(condition - self.known)
        tokens, pooled = self._kept().look_up((condition - self.known).clamp(min=-1))
        tokens[~new], pooled[~new] = self._trained().look_up(condition[~new])
        return tokens, pooled

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptRouter:
        return self

    def _kept(self) -> PromptStore:
        if self._new is None:
            self._new = PromptStore(*self.embed([""]))
        return self._new

    def _trained(self) -> PromptStore:
        if self._stored is None:
            raise UserError("the prompts that were trained on are not in this folder", hint="ask with texts: --prompt")
        return self._stored


def attach_prompts(net: Denoiser, prompts: PromptStore | PromptRouter | None) -> Denoiser:
    """Let a network that reads text look its conditions up; others, and one without a store, stay as they are."""
    if net.reads_text and prompts is not None:
        net.prompts = prompts
    return net


def prompt_router_of(run: RunDir, partition: Partition, device: torch.device) -> PromptRouter | None:
    """Return the router of a run's prompts, or None where conditions are classes."""
    if not (run.prompts / RECORD).is_file():
        return None
    store = open_store(run.prompts)
    dtype = records.read(run.prompts / RECORD, records.Embedded, "record of prompts")["dtype"]
    return PromptRouter(run.teacher / TEXT, partition, store=store, device=device, dtype=dtype)
