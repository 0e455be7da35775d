"""Samples as files: one picture of many, a folder or an archive of PNGs, an .npz."""

from __future__ import annotations

import colorsys
import contextlib
import io
import json
import re
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from msdcli.data.images import to_uint8
from msdcli.engine.tracking.formatting import evaluations, hue, plural
from msdcli.errors import UserError
from msdcli.foreign import visible
from msdcli.outputs import COMMENT, MARK, in_own_place, is_marked_picture, mark_archive
from msdcli.recipe import Recipe
from msdcli.rundir import building, writing

INK = (235, 235, 235)  # of words on a grid
LONGEST_NAME = 24  # letters of a class's name, or of a prompt
WAITING = 2000  # images of a GPU that are drawn and not yet on the disk, at most

Done = TypeVar("Done")
Drawn = Iterable[tuple[Sequence[int], Tensor]]  # numbers, and samples [as many, *shape] on any device


def save_grid(
    path: Path,
    rows: Sequence[Tensor],
    *,
    beside: Sequence[Tensor] | None = None,
    class_names: Sequence[str] | None = None,
    captions: tuple[str, str] | None = None,
    owners: Sequence[int] | None = None,
) -> None:
    """Write one PNG with a row of images per entry of `rows`, to the left of them, after a gap, those of `beside`.

    `class_names` stand before the rows, in the colours of their `owners`; `captions`, of `beside` and of `rows`, above
    them. Points in the plane become one scatter plot per entry, those of `beside` in grey behind.
    """
    if rows[0].ndim == 2:
        _save_scatter(path, rows, beside, class_names or [""] * len(rows), captions, owners)
        return
    height, width = rows[0].shape[-2:]
    scale, gap = max(1, (32 if class_names is None else 64) // height), 2
    lead = max(len(row) for row in beside) + 1 if beside else 0
    columns = lead + max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height * scale + gap) + gap, columns * (width * scale + gap) + gap, 3), 32, np.uint8)
    for start, side in ((0, beside or []), (lead, rows)):
        for r, row in enumerate(side):
            for i, image in enumerate(to_pixels(row)):
                top, left = gap + r * (height * scale + gap), gap + (start + i) * (width * scale + gap)
                big = np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)
                canvas[top : top + height * scale, left : left + width * scale] = big
    picture = Image.fromarray(canvas)
    if class_names is not None:
        starts = (0 if beside else None, lead * (width * scale + gap))
        above = [(x, text) for x, text in zip(starts, captions or (), strict=False) if x is not None]
        picture = _labelled(picture, class_names, owners, above, height * scale + gap)
    with writing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=_marked())


def _labelled(
    picture: Image.Image,
    names: Sequence[str],
    owners: Sequence[int] | None,
    captions: Sequence[tuple[int, str]],
    step: int,
) -> Image.Image:
    """Return a grid with the names of its rows, which are `step` apart, before it, and captions above it."""
    import matplotlib  # its fonts; a plan, which draws nothing, starts without it

    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 15)
    short = [visible(name) if len(name) <= LONGEST_NAME else f"{visible(name[:LONGEST_NAME])}..." for name in names]
    left = 28 + int(max((font.getlength(name) for name in short), default=0))
    top = 28 if captions else 0
    right = max([left + picture.width, *(left + x + int(font.getlength(text)) + 8 for x, text in captions)])
    sheet = Image.new("RGB", (right, top + picture.height), (32, 32, 32))
    sheet.paste(picture, (left, top))
    draw = ImageDraw.Draw(sheet)
    for x, text in captions:
        draw.text((left + x + 2, top / 2), text, font=font, fill=INK, anchor="lm")
    for i, name in enumerate(short):
        y = top + i * step
        if owners is not None:
            draw.rectangle((4, y + 3, 10, y + step - 2), fill=colour(owners[i]))
        draw.text((18, y + step / 2), name, font=font, fill=INK, anchor="lm")
    return sheet


def colour(owner: int) -> tuple[int, int, int]:
    """Return a student's colour, of the hue that it has in reports."""
    red, green, blue = colorsys.hls_to_rgb(hue(owner) / 360, 0.6, 0.7)
    return round(255 * red), round(255 * green), round(255 * blue)


def to_pixels(images: Tensor) -> np.ndarray:
    """Return uint8 RGB pixels [batch, height, width, 3]; grey images are repeated."""
    if not is_picture(images):  # a look at latents: their first channels
        images = images[:, : 3 if images.shape[1] > 3 else 1]
    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def as_pil(images: Tensor) -> list[Image.Image]:
    """Return pictures [n, 1 or 3, height, width] in [-1, 1] as PIL images, grey ones in mode L. UserError otherwise."""
    if not is_picture(images):
        raise UserError(f"{'points' if images.ndim == 2 else 'latents'} are no pictures", hint="as_images=False")
    pixels = to_uint8(images.cpu()).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]


def is_picture(images: Tensor) -> bool:
    """Whether these are pictures [n, 1 or 3, height, width], and not points or latents."""
    return images.ndim == 4 and images.shape[1] in (1, 3)


def _save_scatter(
    path: Path,
    rows: Sequence[Tensor],
    beside: Sequence[Tensor] | None,
    names: Sequence[str],
    captions: tuple[str, str] | None,
    owners: Sequence[int] | None,
) -> None:
    from matplotlib.figure import Figure

    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.5 * lines), layout="constrained")
    for i, (points, name) in enumerate(zip(rows, names, strict=True)):
        axes = figure.add_subplot(lines, columns, i + 1, aspect="equal", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2))
        own = "tab:blue" if owners is None else tuple(c / 255 for c in colour(owners[i]))
        if beside is not None:
            axes.scatter(beside[i][:, 0], beside[i][:, 1], s=2, linewidths=0, alpha=0.5, color="tab:gray")
        axes.scatter(points[:, 0], points[:, 1], s=1, linewidths=0, alpha=0.7, color=own)
        axes.set_title(name.replace("$", r"\$"), fontsize=9)  # a dollar would begin a formula
        axes.tick_params(labelsize=6)
    if captions is not None:
        behind = f"grey: {captions[0]}; " if beside is not None else ""
        figure.suptitle(f"{behind}in colour: {captions[1]}", fontsize=9)
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": MARK})


def save_pngs(folder: Path, drawn: Drawn, beside: Mapping[str, str]) -> None:
    """Make a folder with one PNG per image, named by its number, and text files `beside` them, by name.

    The folder appears when it is complete, in the place of samples that were there before. UserError where something
    else is there, or for points.
    """
    check_replaceable(folder)
    with building(folder) as place:

        def write(name: str, pixels: np.ndarray) -> None:
            (place / name).write_bytes(_png(pixels))

        deque(_in_threads(write, drawn), maxlen=0)
        for name, text in beside.items():
            (place / name).write_text(text, encoding="utf-8")


def save_zip(path: Path, drawn: Drawn, beside: Mapping[str, str]) -> None:
    """Write what `save_pngs` does as one archive, EDM's form of a data set; the same samples give the same bytes."""
    with writing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.comment = COMMENT
        for name, png in _in_threads(lambda name, pixels: (name, _png(pixels)), drawn):
            archive.writestr(zipfile.ZipInfo(name), png)  # not compressed again; of 1980, not of now
        for name, text in beside.items():
            archive.writestr(zipfile.ZipInfo(name), text)


def _in_threads(do: Callable[[str, np.ndarray], Done], drawn: Drawn) -> Iterator[Done]:
    """Yield `do(name, pixels)` of every image, in order, from as many threads as torch uses, while a GPU draws on."""
    waiting: deque[Future[Done]] = deque()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for numbers, images in drawn:
            if not is_picture(images):
                raise UserError(f"{'points' if images.ndim == 2 else 'latents'} are no pictures", hint="--format npz")
            pixels = to_uint8(images).cpu().permute(0, 2, 3, 1).numpy()
            waiting += [pool.submit(do, f"{i:06d}.png", p) for i, p in zip(numbers, pixels, strict=True)]
            most = 0 if images.device.type == "cpu" else WAITING  # a CPU's threads would only be in each other's way
            while len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _png(pixels: np.ndarray) -> bytes:
    """Encode [height, width, 1 or 3] uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, format="PNG", pnginfo=_marked())
    return file.getvalue()


def _marked() -> PngInfo:
    """Say in a PNG that msd drew it: only such a one is ever replaced."""
    info = PngInfo()
    info.add_text("Software", MARK)
    return info


def check_replaceable(folder: Path) -> None:
    """Raise UserError unless a folder is free, or holds samples that msd wrote and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", hint="a folder for the PNGs with --out")
    known = in_own_place(folder)  # earlier versions left no mark: in a run they are known by their names
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if other := next((file.name for file in files if not _is_sample(file, known=known)), None):
        raise UserError(
            f"{folder} holds {other}, which is no sample of msd's and would be lost", hint="a new folder with --out"
        )


def _is_sample(file: Path, *, known: bool) -> bool:
    """Whether msd wrote a file of a folder of samples; `known`: its name says so."""
    if (
        file.is_symlink()
        or not file.is_file()
        or not re.fullmatch(r"\d{6,}\.png|dataset\.json|prompts\.jsonl", file.name)
    ):
        return False
    if known or file.suffix == ".png":
        return known or is_marked_picture(file)
    text = file.read_text(encoding="utf-8", errors="replace")
    with contextlib.suppress(ValueError, AttributeError):
        if file.suffix == ".json":
            return bool(json.loads(text).get("made_by") == MARK)
        return all(json.loads(line).keys() == {"file_name", "prompt", "student"} for line in text.splitlines())
    return False


def labels_file(classes: Sequence[int], how: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return dataset.json in EDM's form: the class of every PNG, and `how` they were made, where that is unusual."""
    labels = [[f"{i:06d}.png", int(c)] for i, c in enumerate(classes)]
    return {"dataset.json": json.dumps({"made_by": MARK, **(how or {}), "labels": labels}, indent=1) + "\n"}


def prompts_file(prompts: Sequence[str], owners: Sequence[int]) -> dict[str, str]:
    """Return prompts.jsonl: the prompt of every PNG, and the student that drew it."""
    lines = [
        json.dumps({"file_name": f"{i:06d}.png", "prompt": prompt, "student": owner}, ensure_ascii=False) + "\n"
        for i, (prompt, owner) in enumerate(zip(prompts, owners, strict=True))
    ]
    return {"prompts.jsonl": "".join(lines)}


def save_npz(path: Path, images: Tensor, classes: Sequence[int] | Sequence[str], *, pixels: bool = True) -> None:
    """Write `images` (uint8 NHWC; points, and latents as `latents` NCHW, float32) and `labels` or `prompts` as .npz."""
    arrays: dict[str, Any] = {"prompts" if classes and isinstance(classes[0], str) else "labels": np.asarray(classes)}
    if pixels:
        arrays["images"] = to_uint8(images).permute(0, 2, 3, 1).numpy() if is_picture(images) else images.numpy()
    else:
        arrays["latents"] = images.numpy()
    with writing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
        file.close()
        mark_archive(temporary)


def captions(recipe: Recipe) -> tuple[str, str]:
    """Say whose samples stand in the run's picture, and what an image of theirs costs."""
    whose = plural(recipe.partition.students, "student")
    return (
        f"teacher, {evaluations(recipe.teacher.solver.evaluations)} each",
        f"{whose}, {evaluations(recipe.stages[-1].evaluations)} each",
    )
