"""`msd export`: the students as a folder to give away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from msdcli import console
from msdcli.cli import options
from msdcli.engine.tracking.formatting import counted


def register(app: typer.Typer) -> None:
    app.command("export")(export)


def export(
    run: options.Run,
    format_: Annotated[
        Literal["bundle", "onnx", "torch", "diffusers", "triton"],
        typer.Option(
            "--format",
            help="bundle: safetensors for msd. onnx: graphs for ONNX Runtime. torch: programs without msd. diffusers: "
            "a pipeline. triton: a model repository.",
        ),
    ] = "bundle",
    out: Annotated[Path | None, typer.Option(help="Where to write; RUN/export/FORMAT if absent.")] = None,
    precision: Annotated[
        Literal["float32", "float16", "int8", "int8-static"],
        typer.Option(help="onnx, triton: of the weights; int8-static: of the layers too. The effect is measured."),
    ] = "float32",
    aot: Annotated[
        bool, typer.Option("--aot", help="torch: compile ahead of time, for a device of this machine.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="torch --aot: what to compile for, cpu or cuda; no other runs it.")
    ] = "cpu",
    max_resident: Annotated[
        int | None, typer.Option(min=1, help="Time it with at most so many students in memory.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Time it within so much memory for students, e.g. 2GB.")] = None,
    bench: Annotated[bool, typer.Option("--bench/--no-bench", help="Time the exported students.")] = True,
    samples: Annotated[
        int | None, typer.Option(min=0, help="Samples of the distance at a lower precision; 0: not measured.")
    ] = None,
    license_: Annotated[str | None, typer.Option("--license", help="The model card's, e.g. apache-2.0.")] = None,
    json_: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Write the students and their router to a folder, and check it against the run before saying done."""
    from msdcli.engine.export import export as engine
    from msdcli.engine.export.format import ExportOptions
    from msdcli.rundir import RunDir

    directory = RunDir(run)
    chosen = ExportOptions(
        *(
            precision,
            aot,
            max_resident,
            None if memory is None else options.parse_bytes(memory),
            bench,
            samples,
            license_,
            device,
        )
    )
    target = out or directory.export / engine.folder_name(format_, chosen)
    students = engine.check(directory, target, format_, chosen)
    if dry_run:
        console.outcome(
            f"would write {counted(len(students.folders), 'student')} to {target}",
            {"folder": str(target), "format": format_, "students": len(students.folders)},
            json_=json_,
        )
        return
    with console.Monitor(quiet=json_) as monitor:
        record = engine.export(directory, target, format_, options=chosen, report=monitor)
    if json_:
        console.print_json(record)
    else:
        _show(record, target)


def _show(record: dict[str, Any], target: Path) -> None:
    if speed := record.get("speed"):
        rows = [
            [str(r["batch"]), r["resident"], f"{r['milliseconds']:.2f}", f"{r['images_per_second']:,.0f}"]
            for r in speed
        ]
        console.table("speed, routing included", ["batch", "students in memory", "ms (median)", "images/s"], rows)
    if distance := record.get("distance"):
        low = distance[record["precision"]]
        console.say(
            f"{distance['metric']} of {distance['samples']:,} samples: {distance['float32']:.4f} in float32, "
            f"{low:.4f} in {record['precision']} ({distance['change']:+.4f})"
        )
    difference = f"{record['max_difference']:.3g}, allowed {record['tolerance']:.3g}"
    how_many = counted(len(record["students"]), "student")
    console.say(f"{how_many}: {target} (largest difference from the run's samples: {difference})")
    console.say(f"how to use it: {target / 'README.md'}   to the Hub's layout: msd push {target} --to FOLDER")
