"""`msd fid`: measure a run, or pictures in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from msdcli import console
from msdcli.cli import options

if TYPE_CHECKING:
    from msdcli.engine.measure.feature_metric import FidOptions
    from msdcli.engine.measure.rows import Measurement

Protocols = Literal["data", "clean", "edm", "legacy-pytorch", "legacy-tensorflow", "clip", "dinov2"]


def register(app: typer.Typer) -> None:
    app.command("fid")(fid)


def fid(
    images: Annotated[Path, typer.Argument(metavar="RUN|FOLDER|ZIP|NPZ", help="A run directory, or pictures.")],
    reference: Annotated[
        str | None,
        typer.Argument(help="Pictures, or statistics (.npz, .pkl, a name of clean-fid's). Of a run: its own data."),
    ] = None,
    protocol: Annotated[
        Protocols | None,
        typer.Option(help="Whose numbers; for a run the data's own classifier if absent, for pictures clean."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The protocol's weights, if not where msd looks; trusted as code is.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=2, help="Samples (the recipe's if absent), or pictures drawn by --seed (all if absent)."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Which pictures --samples takes: those of NVlabs' fid.py; 0 if absent.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per forward pass; changes no figure.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode pictures.")] = 1,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps; a run's recipe says if absent.")] = None,
    bootstrap: Annotated[
        int | None, typer.Option(min=0, help="Resamples behind the intervals; 100 for small features, else none.")
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(help="Measure these classes too: even=0,2,4 or low=0-4, or another run's parts. Repeatable."),
    ] = None,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="A line for every class, where there are more than 100 too.")
    ] = False,
    infinity: Annotated[bool, typer.Option("--infinity", help="Also extrapolate to infinitely many samples.")] = False,
    lean: Annotated[
        bool, typer.Option("--lean", help="Distances only: memory does not grow with the number of images.")
    ] = False,
    save: Annotated[int, typer.Option(min=0, help="Keep the first so many samples of a run as PNG.")] = 0,
    watch: Annotated[bool, typer.Option("--watch", help="Follow a run's checkpoints until it is finished.")] = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
) -> None:
    """Measure a run (teacher and students against the data: whole, per student, per class), or pictures in files."""
    from msdcli.engine.measure.feature_metric import FidOptions

    chosen = FidOptions(
        *(protocol, weights, reference, samples, batch, workers, device, bootstrap, infinity, lean, save),
        groups=tuple(group or ()),
        seed=seed,
        per_class=per_class,
    )
    if lean and (infinity or bootstrap):
        from msdcli.errors import UserError

        raise UserError("--lean keeps no features: without them there is no --infinity and no --bootstrap")
    if json_ and quiet:
        from msdcli.errors import UserError

        raise UserError("--json and --quiet do not go together", hint="--json has the number as `value`")
    shown = Shown(json=json_, quiet=quiet)
    if (images / "recipe.yaml").is_file():
        _run(images, chosen, shown, watch=watch, dry_run=dry_run)
    else:
        _files(images, chosen, shown, watch=watch, dry_run=dry_run)


@dataclass(frozen=True)
class Shown:
    """How a figure is printed: as JSON, as a bare number, or as a table."""

    json: bool
    quiet: bool

    @property
    def monitor(self) -> console.Monitor:
        """What progress is told to: nobody, where a script reads."""
        return console.Monitor(quiet=self.json or self.quiet)


def _run(path: Path, chosen: FidOptions, shown: Shown, *, watch: bool, dry_run: bool) -> None:
    from msdcli.engine.measure import fid as engine
    from msdcli.rundir import RunDir

    run = RunDir(path)
    if dry_run:
        count, protocol = engine.check(run, chosen)
        console.outcome(
            f"would draw {count:,} samples of the students and of the teacher of {path}; protocol: {protocol}",
            {"run": str(path), "samples": count, "protocol": protocol},
            json_=shown.json,
        )
        return
    with shown.monitor as monitor:
        if watch:
            from msdcli.engine.measure.watch import watch as follow

            for line in follow(run, monitor, chosen):
                _show_line(line, shown)
            return
        result = engine.measure(run, monitor, chosen)
    if shown.json:
        console.print_json(result.to_json())
        return
    if shown.quiet:
        _show_number(result.headline()["value"])
        return
    show(result, brief=False)
    console.say(f"written: {run.metrics / (result.metric + '.json')}")


def _show_line(line: dict[str, Any], shown: Shown) -> None:
    if shown.json:
        console.print_json(line, compact=True)
    elif not shown.quiet:
        console.say(line_of(line))
    elif line["whole"] is not None:
        _show_number(line["whole"])


def _show_number(value: float | None) -> None:
    """Print a figure with all its digits."""
    console.say("nan" if value is None else repr(float(value)))


def _files(path: Path, chosen: FidOptions, shown: Shown, *, watch: bool, dry_run: bool) -> None:
    from msdcli.engine.measure import fid_files as engine
    from msdcli.errors import UserError

    if watch:
        raise UserError(f"--watch follows a run directory; {path} is none: it has no recipe.yaml")
    request = engine.check(path, chosen.reference, chosen)
    if dry_run:
        console.outcome(
            f"would compare {request.count:,} images of {path} with {request.reference}; writes nothing else",
            {"images": str(path), "count": request.count, "reference": request.reference},
            json_=shown.json,
        )
        return
    with shown.monitor as monitor:
        result = engine.compare(request, monitor)
    if result is None:
        return
    if shown.json:
        console.print_json(engine.headline(result) | result)
    elif shown.quiet:
        _show_number(result["fid"])
    else:
        _show_files(result)


def _show_files(result: dict[str, Any]) -> None:
    record, spans = result["record"], result["intervals"]
    rows = [[name, f"{v:.6g}", _span(spans.get(name))] for name, v in result.items() if isinstance(v, float)]
    rows += [
        [f"fid of {name}", f"{group['fid']:.6g}", ""]
        for name, group in result["groups"].items()
        if group["fid"] is not None
    ]
    console.table(f"protocol {result['protocol']}", ["", "value", "95 % interval"], rows)
    count = record["reference_count"]
    console.say(
        f"{record['count']:,} images of {record['images']} against "
        f"{'an unknown number of' if count is None else f'{count:,}'} images of {record['reference']}; "
        f"weights {(record['weights_sha256'] or '')[:8]}"
        f"{'' if record['weights_published'] else ' (not the published ones)'}"
    )
    if "drawn" in record:
        console.say(f"drawn from {record['drawn']['of']:,} images with seed {record['drawn']['seed']}")


def show(result: Measurement, *, brief: bool) -> None:
    """Print the table; `brief` leaves out the single classes and what stands beside distance and accuracy."""
    from msdcli.engine.report.facts import group_name
    from msdcli.engine.tracking.formatting import numbered

    rows = [row for row in result.rows if not (brief and numbered(row.group)[0] == "class")]
    names = list(dict.fromkeys(name for row in rows for name in row.values))[: 2 if brief else None]
    called: list[str] = result.record.get("class_names", [])
    cells = [
        [
            row.who,
            group_name(row.group, called),
            f"{row.samples:,}",
            _count(row.reference),
            *(_value(row.values.get(n)) for n in names),
        ]
        for row in rows
    ]
    console.table(f"{result.metric}: {result.protocol}", ["", "of", "n", "real n", *names], cells, text_columns=2)
    if not brief:
        for row in (row for row in rows if row.intervals and row.group == "whole"):
            spans = "; ".join(f"{name} {_span(span)}" for name, span in row.intervals.items())
            console.say(f"95 % of {row.who}: {spans}")
    for warning in result.record["warnings"]:
        console.say_prose(warning)


def line_of(line: dict[str, Any]) -> str:
    """One measured checkpoint as a sentence."""
    parts = [f"student {k} {s['stage']} step {s['step']}: {_value(s['value'])}" for k, s in line["students"].items()]
    whole = "" if line["whole"] is None else f"; whole: {line['whole']:.4f}"
    return f"{line['metric']}: {'; '.join(parts)}{whole}"


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _count(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def _span(span: dict[str, float] | None) -> str:
    return "" if span is None else f"{span['low']:.4g} to {span['high']:.4g}"


def cost_table(costs: list[dict[str, Any]]) -> None:
    """Print what every part of a run has cost."""
    rows = [
        [
            c["part"],
            f"{c['seconds']:.0f}",
            f"{c['images']:,.0f}",
            f"{c['flops']:.3g}",
            f"{c['peak_bytes'] / 2**20:,.0f}",
        ]
        for c in costs
    ]
    console.table("cost", ["", "seconds", "images", "FLOP", "peak MiB"], rows)
