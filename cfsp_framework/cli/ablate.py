"""``cfsp ablate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cfsp_framework.cli.options import (
    CALIBRATION,
    EVALUATION,
    SPEC_HELP,
    Command,
    config_options,
    given,
    json_option,
    plugin_option,
    quiet_option,
    traceback_option,
)
from cfsp_framework.config import PRESETS, read_yaml
from cfsp_framework.errors import CfspError, InputError

_AXES = {
    "criterion": ("NAMES", "Fine importance: names, between commas, with their options: a,b:k=v,k=v,c."),
    "allocator": ("NAMES", "Coarse importance, likewise."),
    "compensator": ("NAMES", "How the kept weights change, likewise."),
    "recovery": ("NAMES", "What is trained afterwards, likewise."),
    "preset": ("NAMES", f"Named rows beside the grid: {', '.join(PRESETS)}."),
    "ratio": ("NUMBERS", "Shares to remove, in [0, 1), between commas. [default: 0.5]"),
    "samples": ("NUMBERS", "Calibration windows. [default: 128]"),
    "seeds": ("NUMBERS", "Seeds of everything that draws. [default: 0]"),
}


def _axes(command: Command) -> Command:
    for name, (metavar, text) in reversed(_AXES.items()):
        command = click.option(f"--{name}", multiple=True, metavar=metavar, help=f"{text} May be repeated.")(command)
    return command


@click.command(epilog=SPEC_HELP)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@_axes
@config_options("budget", "round_to", "rebalance")
@config_options(*(name for name in CALIBRATION if name not in ("samples", "seed")))
@config_options("recovery_data", "recovery_steps", "recovery_check_every", "recovery_patience")
@config_options(*EVALUATION, "device", "dtype", "spill", "trust_remote_code")
@click.option("--tasks", metavar="NAMES", multiple=True, help="Tasks of lm-evaluation-harness, between commas.")
@click.option(
    "--task-data",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="The tasks' data, a folder for each; default: the Hub's.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N documents of each task only.")
@click.option("--fewshot", type=click.IntRange(0), metavar="N", help="Examples in a prompt. [default: the task's own]")
@click.option("--latency", is_flag=True, default=None, help="Time each cell's forward in turn with the dense model's.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A YAML file of these options, with rows, include and exclude; those given here come after it.",
)
@click.option(
    "--executor",
    type=click.Choice(["serial", "process", "ray"]),
    default="serial",
    help="Run cells one by one, in processes, or as Ray's tasks. [default: serial]",
)
@click.option(
    "-j", "--jobs", type=click.IntRange(1), metavar="N", help="Cells at a time. [default: 2 with an executor]"
)
@click.option("--ray-address", metavar="ADDRESS", help="A Ray cluster that is there. [default: one is started here]")
@plugin_option
@quiet_option
@json_option
@traceback_option
def ablate(
    model: str,
    out: Path,
    config_file: Path | None,
    executor: Any,
    jobs: int | None,
    ray_address: str | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fill a table: every criterion, allocator, compensator and recovery with every other, at every ratio and seed.

    One pass over the calibration windows serves all cells of a seed. Results land in OUT as they are made; the same
    command goes on after being killed, and a wider one adds what is new.
    """
    from cfsp_framework.ablation.cells import Extras
    from cfsp_framework.ablation.executors import Executor
    from cfsp_framework.ablation.grid import expand
    from cfsp_framework.ablation.sweep import Sweep
    from cfsp_framework.ablation.sweep import ablate as run
    from cfsp_framework.ablation.tables import show_results
    from cfsp_framework.runtime.progress import Progress

    asked = {**(read_yaml(config_file) if config_file else {}), **given(options)}
    extras = Extras.build({name: asked.pop(name) for name in Extras.model_fields if name in asked})
    sweep = Sweep(expand(model, asked), extras)
    try:
        results = run(
            sweep,
            out,
            executor=Executor(executor, jobs or (1 if executor == "serial" else 2), ray_address),
            progress=Progress(visible=not (quiet or as_json)),
        )
    except KeyboardInterrupt:
        raise InputError(f"interrupted; what is finished is in {out}, and the same command goes on.") from None
    if as_json:
        click.echo(results.model_dump_json(indent=2))
    elif not quiet:
        show_results(results, out)
    failed = sum(cell.status == "failed" for cell in results.cells)
    if failed:
        raise CfspError(
            f"{failed} of {len(results.cells)} cells failed; {out / 'results.csv'} says why, and the same command tries "
            "them again."
        )
