"""`msd sample`: routed samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from msdcli import console
from msdcli.cli import options
from msdcli.engine.tracking.formatting import counted, plural

if TYPE_CHECKING:
    from msdcli.engine.sample import Students


def register(app: typer.Typer) -> None:
    app.command("sample")(sample)


def sample(
    run: Annotated[Path, typer.Argument(help="A run directory or an exported bundle.")],
    classes: Annotated[
        str | None, typer.Option(help="Classes by name, number or span: 3,7 or cat,dog or 0-4 (drawn in turn).")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="All classes in turn.")] = False,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; several by repeating the option.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts: one a line, or JSONL.")] = None,
    number: Annotated[
        int | None, typer.Option("-n", min=1, help="How many samples in all; 64, or one per prompt, if absent.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Sample i depends on the seed, i and its class alone.")] = 0,
    format_: Annotated[
        Literal["grid", "png", "zip", "npz", "latents"],
        typer.Option(
            "--format", help="One picture, a folder or a zip of PNGs, one .npz, or one .npz of undecoded latents."
        ),
    ] = "grid",
    out: Annotated[Path | None, typer.Option(help="Where to write; RUN/samples/... if absent.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images per forward pass; the recipe's evaluation.batch if absent.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Evaluations per image, of students that know several; all if absent.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    runtime: Annotated[
        Literal["torch", "onnx"],
        typer.Option(help="What evaluates the networks: torch, or on a CPU ONNX Runtime, checked against it."),
    ] = "torch",
    json_: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Draw samples, as a rule one network evaluation each; every class or prompt goes to the student that owns it."""
    import time

    from msdcli.engine import sample as engine
    from msdcli.engine.export import runtime as runtimes
    from msdcli.errors import UserError
    from msdcli.partition import parse_classes

    on = runtimes.device(device, runtime)
    students = runtimes.load(run, on, steps=steps, runtime=runtime, report=lambda event: console.tell(str(event)))
    if prompt or prompts:
        if classes is not None or all_:
            raise UserError("either classes or prompts")
        _of_prompts(
            students, engine.texts(prompt or [], prompts, number), run, seed, format_, out, batch, json_, dry_run
        )
        return
    number = number or 64
    if (classes is None) == (not all_):
        raise UserError("say which classes: --classes 3,7 or --all; or which prompts: --prompt or --prompts FILE")
    if students.prompt_router is not None and not students.class_names:
        raise UserError("these students are asked with texts: --prompt, or --prompts FILE")
    wanted = list(range(len(students.class_names))) if classes is None else parse_classes(classes, students.class_names)
    asked = [wanted[i % len(wanted)] for i in range(number)]
    target = out or engine.default_target(run, format_, wanted, seed, everything=all_)
    engine.check_target(target, format_)
    serving = sorted(students.route(asked))
    if dry_run:
        console.outcome(
            f"would draw {counted(number, 'sample')} from {_named(serving)} and write {target}",
            {"file": str(target), "classes": asked, "seed": seed, "students": serving},
            json_=json_,
        )
        return
    begun = time.perf_counter()
    engine.draw(students, target, asked, format_, seed=seed, batch=batch)
    seconds = time.perf_counter() - begun
    if json_:
        console.print_json(
            {"file": str(target), "classes": asked, "seed": seed, "students": serving, "seconds": seconds}
            | {"runtime": runtime}
        )
    else:
        of = counted(len(wanted), "class", "classes")
        by = "" if runtime == "torch" else ", by ONNX Runtime"
        console.say(f"{counted(number, 'sample')} of {of} from {_named(serving)}{by}: {target}")


def _named(students: list[int]) -> str:
    """Return `student 3`, or `students 0, 3`."""
    return f"{plural(len(students), 'student')} {', '.join(map(str, students))}"


def _of_prompts(
    students: Students,
    texts: list[str],
    run: Path,
    seed: int,
    format_: str,
    out: Path | None,
    batch: int | None,
    json_: bool,
    dry_run: bool,
) -> None:
    """Sample prompts, and say what finding their students took."""
    import time

    from msdcli.engine import sample as engine
    from msdcli.engine.tracking.formatting import three_digits

    asked = students.numbers(texts)
    assert students.prompt_router is not None
    names, owners = [students.name(c) for c in asked], [students.prompt_router.owner_of(c) for c in asked]
    different, serving = list(dict.fromkeys(names)), _named(sorted(set(owners)))
    target = out or engine.prompts_target(run, format_, different, seed)
    engine.check_target(target, format_)
    if dry_run:
        console.outcome(
            f"would draw {counted(len(asked), 'sample')} from {serving} and write {target}",
            {"file": str(target), "prompts": names, "students": owners, "seed": seed},
            json_=json_,
        )
        return
    begun = time.perf_counter()
    engine.draw(students, target, asked, format_, seed=seed, batch=batch)
    seconds = time.perf_counter() - begun
    encoder, routing = students.prompt_router.encoder_seconds, students.prompt_router.routing_seconds
    if json_:
        times = {"seconds": seconds, "encoder_seconds": encoder, "routing_seconds": routing}
        console.print_json({"file": str(target), "prompts": names, "students": owners, "seed": seed} | times)
        return
    for text, owner in list(dict(zip(names, owners, strict=True)).items())[:10]:
        console.say(f"student {owner}: {text}")
    if len(different) > 10:
        console.say(f"and {counted(len(different) - 10, 'more prompt')}")
    share = routing / (encoder + routing + seconds)
    console.say(f"{counted(len(asked), 'sample')} of {counted(len(different), 'prompt')} from {serving}: {target}")
    told = zip((encoder, routing, seconds), (len(different), len(different), len(asked)), strict=True)
    asking, finding, drawing = (f"{three_digits(1e3 * spent / count)} ms" for spent, count in told)
    console.say(
        f"text encoder {asking} and routing {finding} a prompt, students {drawing} a sample (weights read and files "
        f"written on the way): routing is {share:.2%} of it"
    )
