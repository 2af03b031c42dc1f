"""``cfsp benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cfsp_framework.cli.options import Decorator, Output, config_options, given, output_options
from cfsp_framework.config import RunConfig
from cfsp_framework.errors import ConfigError


def _parse_numbers(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Parse ``1,8`` into distinct numbers; an option not given is an empty tuple."""
    if value is None:
        return ()
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"expected whole numbers of 1 or more, such as 1,8, not {value!r}.")
    return numbers


def _numbers(flag: str, **settings: Any) -> Decorator:
    return click.option(flag, callback=_parse_numbers, metavar="N,N", **settings)


def _setting(flag: str, kind: click.ParamType[Any], default: object, text: str) -> Decorator:
    metavar = "N" if isinstance(kind, click.IntRange) else None
    return click.option(flag, type=kind, default=default, metavar=metavar, show_default=True, help=text)


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
@_numbers("--round-to", help="With --ratio: widths are multiples of this; a cut for each. [default: 128]")
@click.option("--random-weights", is_flag=True, help="Read only each config.json and use random weights: no download.")
@_numbers("--batch-sizes", default="1", show_default=True, help="Sequences at once.")
@_numbers("--lengths", default="128,512", show_default=True, help="Tokens of a prompt.")
@_setting("--decode-tokens", click.IntRange(0), 32, "Tokens decoded after the prompt; 0: prefill only.")
@_setting(
    "--cache",
    click.Choice(["dynamic", "static"]),
    "dynamic",
    "A key-value cache that grows with every token, or one allocated at full length.",
)
@_setting("--repeats", click.IntRange(1), 7, "Rounds; in each round every model runs in turn.")
@_setting(
    "--clock",
    click.Choice(["wall", "processor"]),
    "wall",
    "Measure wall-clock seconds, or processor seconds on a CPU that other programs use too.",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads of a CPU. [default: PyTorch's choice]")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Plot the speeds into this .svg, .png or .pdf file."
)
@config_options("seed", "trust_remote_code", "device", "dtype")
@output_options()
def benchmark(
    model: str,
    pruned: tuple[str, ...],
    ratio: float | None,
    allocators: tuple[str, ...],
    round_to: tuple[int, ...],
    random_weights: bool,
    threads: int | None,
    plot: Path | None,
    output: Output,
    **options: Any,
) -> None:
    """Time MODEL and its PRUNED checkpoints in turns: prefill, decode, memory, and the share of the ideal speed-up.

    --ratio needs no checkpoint: it cuts the channels of least magnitude from MODEL in memory.
    """
    from cfsp_framework.benchmark import plots
    from cfsp_framework.benchmark.benchmark import run_benchmark
    from cfsp_framework.benchmark.candidates import Cuts
    from cfsp_framework.benchmark.timing import BenchmarkSettings
    from cfsp_framework.cli.tables import show_benchmark

    if ratio is None and (allocators or round_to):
        raise ConfigError("--allocator and --round-to describe cuts in memory; give --ratio too.")
    if plot:
        plots.check_plot_file(plot)
    settings = {name: options.pop(name) for name in BenchmarkSettings.model_fields if name != "seed"}
    report = run_benchmark(
        RunConfig.build(**given({**options, "model": model})),
        pruned,
        Cuts(ratio, allocators or ("uniform",), round_to or (128,)) if ratio is not None else None,
        BenchmarkSettings(**settings, seed=options["seed"] or 0),
        random_weights=random_weights,
        threads=threads,
        progress=output.progress(),
    )
    if plot:
        plots.plot_speeds(report, plot)
    output.show(report.to_json(), lambda: show_benchmark(report, plot))
