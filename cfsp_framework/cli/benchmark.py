"""``cfsp benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cfsp_framework.cli.options import config_options, given, json_option, plugin_option, quiet_option, traceback_option
from cfsp_framework.config import RunConfig
from cfsp_framework.errors import ConfigError


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """``1,8`` as numbers, each once; none where nothing was given."""
    if value is None:
        return ()
    try:
        found = tuple(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise click.BadParameter(f"expected whole numbers of 1 or more, such as 1,8, not {value!r}.")
    return found


@click.command
@click.argument("model")
@click.argument("pruned", nargs=-1)
@click.option("--ratio", type=click.FloatRange(0, 1, max_open=True), help="Also cut MODEL in memory by this share.")
@click.option(
    "--allocator",
    "allocators",
    multiple=True,
    metavar="NAME[:k=v,...]",
    help="With --ratio: the widths of the cut. May be repeated. [default: uniform]",
)
@click.option(
    "--round-to",
    "roundings",
    callback=_numbers,
    metavar="N,N",
    help="With --ratio: widths are multiples of this; a cut for each. [default: 128]",
)
@click.option(
    "--random-weights", is_flag=True, help="Take the shapes from each config.json and draw the weights: no download."
)
@click.option(
    "--batch-sizes", default="1", callback=_numbers, metavar="N,N", show_default=True, help="Sequences at once."
)
@click.option(
    "--lengths", default="128,512", callback=_numbers, metavar="N,N", show_default=True, help="Tokens of a prompt."
)
@click.option(
    "--decode-tokens",
    type=click.IntRange(0),
    default=32,
    metavar="N",
    show_default=True,
    help="Tokens decoded after it; 0: prefill only.",
)
@click.option(
    "--cache",
    type=click.Choice(["dynamic", "static"]),
    default="dynamic",
    show_default=True,
    help="Keys and values that grow with every token, or have their full length from the start.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=7,
    metavar="N",
    show_default=True,
    help="Rounds: in each one every model runs in turn.",
)
@click.option(
    "--clock",
    type=click.Choice(["wall", "processor"]),
    default="wall",
    show_default=True,
    help="Seconds that pass, or those a CPU works: on a machine with other work to do.",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Of a CPU. [default: PyTorch's own choice]")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the speeds into this .svg, .png or .pdf file."
)
@config_options("seed", "trust_remote_code", "device", "dtype")
@plugin_option
@quiet_option
@json_option
@traceback_option
def benchmark(
    model: str,
    pruned: tuple[str, ...],
    ratio: float | None,
    allocators: tuple[str, ...],
    roundings: tuple[int, ...],
    random_weights: bool,
    batch_sizes: tuple[int, ...],
    lengths: tuple[int, ...],
    decode_tokens: int,
    cache: Any,
    repeats: int,
    clock: Any,
    threads: int | None,
    plot: Path | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Time MODEL and what was PRUNED from it, in turns: prefill, decode, memory, and how much of the ideal is reached.

    PRUNED are checkpoints. --ratio compares cuts of MODEL without any: of least magnitude, in memory.
    """
    from cfsp_framework.benchmark import plots
    from cfsp_framework.benchmark.benchmark import race
    from cfsp_framework.benchmark.candidates import Cuts
    from cfsp_framework.benchmark.timing import Workload
    from cfsp_framework.cli.tables import show_benchmark
    from cfsp_framework.runtime.progress import Progress

    if ratio is None and (allocators or roundings):
        raise ConfigError("--allocator and --round-to are about cuts in memory; give --ratio too.")
    if plot:
        plots.check_file(plot)
    found = race(
        RunConfig.build(**given({**options, "model": model})),
        pruned,
        Cuts(ratio, allocators or ("uniform",), roundings or (128,)) if ratio is not None else None,
        Workload(
            batch_sizes=batch_sizes,
            lengths=lengths,
            decode_tokens=decode_tokens,
            repeats=repeats,
            cache=cache,
            clock=clock,
            seed=options["seed"] or 0,
        ),
        random_weights=random_weights,
        threads=threads,
        progress=Progress(visible=not (quiet or as_json)),
    )
    if plot:
        plots.plot_speeds(found, plot)
    if as_json:
        click.echo(found.to_json(), nl=False)
    elif not quiet:
        show_benchmark(found, plot)
