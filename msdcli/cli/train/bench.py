"""`msd bench`: how fast a recipe trains, samples and is measured on this machine; `msd fid` beside other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from msdcli import console
from msdcli.cli import options


class RecipeOrFid(TyperGroup):
    """`msd bench RECIPE` is `msd bench recipe RECIPE`: what names no command is a recipe, or its options; `--show` is
    the command `show`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] == "--show":
            args = ["show", *args[1:]]
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["recipe", *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        cls=RecipeOrFid,
        help="Measure speed on this machine. `msd bench RECIPE`: a recipe's training and sampling; `msd bench "
        "measuring RECIPE`: what its figures take; `msd bench fid`: `msd fid` beside other programs; "
        "`msd bench show FILE`: what was measured elsewhere.",
        no_args_is_help=True,
    )
    group.command("recipe")(recipe)
    group.command("measuring")(measuring)
    group.command("fid")(fid)
    group.command("show")(show)
    app.add_typer(group, name="bench")


def recipe(
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often everything is timed, after a round to warm up.")] = 5,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per update, instead of the recipe's.")] = None,
    students: Annotated[
        int | None,
        typer.Option(min=2, help="Instead: this many students on one device, in processes and in one process."),
    ] = None,
    graphs: Annotated[
        bool, typer.Option("--graphs", help="Run compiled networks with CUDA graphs and without, wherever they pay.")
    ] = False,
    runtime: Annotated[
        Literal["torch", "onnx"],
        typer.Option(help="onnx: samples are timed by ONNX Runtime too, as `msd sample --runtime onnx` draws them."),
    ] = "torch",
    json_: options.Json = False,
) -> None:
    """Time a student's update by turn and network, and samples; weights and images are random.

    Needs neither teacher nor data, and writes nothing. On a CPU the batch is cut so that an update takes seconds.
    """
    from msdcli.engine.bench import recipe as bench
    from msdcli.engine.bench import students as bench_students
    from msdcli.engine.export import runtime as runtimes
    from msdcli.recipe import load

    by_onnx = runtimes.in_memory if runtime == "onnx" else None
    with console.Monitor(quiet=json_) as monitor:
        loaded = load(recipe, overrides)
        if students is None:
            result = bench.bench(loaded, monitor, repeats=repeats, batch=batch, graphs=graphs, by_onnx=by_onnx)
        else:
            result = bench_students.measure(loaded, monitor, students=students, repeats=repeats, batch=batch)
    if json_:
        console.print_json(result)
    elif students is None:
        _show(result)
    else:
        _show_students(result)


def _show(result: dict[str, Any]) -> None:
    from msdcli.engine.tracking.formatting import named_students

    several = len(result["sizes"]) > 1
    for stage in result["stages"]:
        _show_stage(stage, result["peak_flops"], named_students(stage["students"]) if several else "the student")
    for size in result["sizes"]:
        if several:
            console.say(f"{named_students(size['students'])}: {size['parameters']:,} parameters")
        _show_sampling(size["sampling"])
    if several:
        mean, worst = (1000 * result["latency_seconds"][name] for name in ("mean", "worst"))
        console.say(f"one image, whichever class: {mean:.2f} ms on average over classes, {worst:.2f} ms at worst")
    if result["float32"] != "float32":
        console.say(f"float32 is multiplied in {result['float32'].upper()} here, in training and sampling")


def _show_stage(stage: dict[str, Any], peaks: dict[str, float], whose: str) -> None:
    modes = stage["modes"]
    columns = [f"{name} (own)" if name == stage["own"] else name for name in modes]
    rows = [_row(f"{turn}, s", modes, "seconds", turn) for turn in next(iter(modes.values()))["seconds"]]
    rows += [_row(f"  {part}, s", modes, "parts", part) for part in next(iter(modes.values()))["parts"]]
    shares = [m["flops_per_second"] / peaks[name.split()[0]] for name, m in modes.items()]
    rows += [
        ["images/s", *(f"{m['images_per_second']:.2f}" for m in modes.values())],
        ["GFLOP/s", *(f"{m['flops_per_second'] / 1e9:.1f}" for m in modes.values())],
        ["share of the measured peak", *(f"{share:.0%}" for share in shares)],
        ["memory, GiB", *(f"{m['memory_bytes'] / 2**30:.2f}" for m in modes.values())],
        ["times plain float32", *(_spread(m["ratio"]) for m in modes.values())],
        *(
            [["  in CPU time", *(_spread(m["cpu_ratio"]) for m in modes.values())]]
            if modes["float32"]["cpu_ratio"]
            else []
        ),
    ]
    cut = "" if stage["micro_batch"] >= stage["batch"] else f" in passes of {stage['micro_batch']}"
    title = f"{stage['objective']}: one update of {whose}, batch {stage['batch']}{cut}"
    console.table(f"{title}, {stage['flops_per_update'] / 1e9:.3g} GFLOP", ["", *columns], rows)
    console.say(f"bound by {stage['bound_by']}")


def _show_students(result: dict[str, Any]) -> None:
    for stage in result["stages"]:
        per_cpu = result["device"] == "cpu"
        columns = ["images/s, all together", "times one at a time", *(["per CPU second"] if per_cpu else []), "GiB"]
        rows = [_way(name, way, per_cpu) for name, way in stage["ways"].items()]
        title = f"{stage['objective']}: {result['students']} students on one device, batch {stage['batch']} each"
        console.table(title, ["", *columns], rows)
        console.say(
            f"one process is {_spread(stage['one_process_to_processes'])} times as fast as a process each; what it "
            f"shares, the teacher's forward pass, is {stage['teacher_share']:.1%} of an update"
        )


def _way(name: str, way: dict[str, Any], per_cpu: bool) -> list[str]:
    threads = f" ({way['threads']} thread{'s' if way['threads'] > 1 else ''} each)" if per_cpu else ""
    memory = "" if way["memory_bytes"] is None else f"{way['memory_bytes'] / 2**30:.2f}"
    cpu = [_spread(way["images_per_cpu_second"])] if per_cpu else []
    return [f"{name}{threads}", _spread(way["images_per_second"]), _spread(way["ratio"]), *cpu, memory]


def _row(name: str, modes: dict[str, Any], section: str, key: str) -> list[str]:
    return [name, *(f"{m[section][key]:.4g}" if key in m[section] else "" for m in modes.values())]


def _show_sampling(sampling: dict[str, Any]) -> None:
    rows = [
        [name, f"{speed:.1f}", _spread(sampling["share_of_bare"][name]) if name in sampling["share_of_bare"] else ""]
        for name, speed in sampling["images_per_second"].items()
    ]
    console.table(
        f"samples in {sampling['steps']} evaluations, batch {sampling['batch']}, float32",
        ["", "images/s", "of the bare network"],
        rows,
    )
    console.say(f"one image: {sampling['latency_seconds'] * 1000:.2f} ms")
    if found := sampling.get("times_torch"):
        console.say(
            f"ONNX Runtime serves a batch {_spread(found['onnx'])} times and one image {_spread(found['onnx one'])} "
            "times as fast as torch"
        )


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def measuring(
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    images: Annotated[int, typer.Option(min=2, help="Samples that are drawn, seen and compared.")] = 10_000,
    json_: options.Json = False,
) -> None:
    """Time what `msd fid` does for a recipe's students: drawing, features, distances; weights are random.

    Needs neither teacher nor data nor a download, and writes nothing.
    """
    from msdcli.engine.bench.measuring import measure
    from msdcli.recipe import load

    with console.Monitor(quiet=json_) as monitor:
        result = measure(load(recipe, overrides), monitor, images=images)
    if json_:
        console.print_json(result)
        return
    title = f"{result['images']:,} samples of {result['students']} students, {result['classes']:,} classes"
    rows = [
        [part, f"{seconds:.1f}", f"{result['images'] / seconds:,.0f}"] for part, seconds in result["seconds"].items()
    ]
    console.table(f"{title}, on {result['device']}", ["", "s", "images/s"], rows)


def show(
    file: Annotated[Path, typer.Argument(help="What tests/gpu/run.sh wrote on a machine with a card.")],
    json_: options.Json = False,
) -> None:
    """Print what was measured on a card as a table in Markdown, as `msd docs measured` has it, with the card's name."""
    from msdcli.engine.bench import card

    found = card.read(file)
    if json_:
        console.print_json(found)
    else:
        console.say(card.markdown(found))


def fid(
    images: Annotated[int, typer.Option(min=2, help="Pictures of 64 x 64 on each side.")] = 1000,
    network_images: Annotated[int, typer.Option(min=1, help="Pictures through the full Inception.")] = 32,
    json_: options.Json = False,
) -> None:
    """Time `msd fid` beside clean-fid and scipy on one core, part by part; about two minutes."""
    from msdcli.engine.bench.fid import bench_fid

    result = bench_fid(num_images=images, num_network_images=network_images)
    if json_:
        console.print_json(result)
        return
    rows = [
        [part, *(f"{t[key]:.2f}" for key in ("ours_s", "theirs_s", "ratio")), _apart(t)] for part, t in result.items()
    ]
    console.table(
        f"one core, {images:,} pictures a side", ["", "msd (s)", "clean-fid, scipy (s)", "ratio", "difference"], rows
    )
    console.say("network: random weights of the full architecture; whole: the parts added up for all pictures")


def _apart(timing: dict[str, float]) -> str:
    """How far the two sides' results are apart, where both were computed."""
    return f"{timing['relative_difference']:.1g}" if "relative_difference" in timing else ""
