"""``cfsp ablate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cfsp_framework.cli.options import (
    CALIBRATION,
    EVALUATION,
    OUT,
    SPEC_HELP,
    Output,
    bundle,
    config_option,
    config_options,
    given,
    output_options,
    task_options,
)
from cfsp_framework.config import PRESETS, read_yaml
from cfsp_framework.errors import CfspError, InputError

_AXES = {
    "criterion": ("NAMES", "Fine importance: comma-separated names with their options, a,b:k=v,k=v,c."),
    "allocator": ("NAMES", "Coarse importance, likewise."),
    "compensator": ("NAMES", "How the kept weights change, likewise."),
    "recovery": ("NAMES", "What is trained afterwards, likewise."),
    "preset": ("NAMES", f"Presets to compare with the grid, comma-separated: {', '.join(PRESETS)}."),
    "ratio": ("NUMBERS", "Shares to remove, in [0, 1), comma-separated. [default: 0.5]"),
    "samples": ("NUMBERS", "Calibration windows. [default: 128]"),
    "seeds": ("NUMBERS", "Seeds of all random draws. [default: 0]"),
}
_axes = bundle(
    *(
        click.option(f"--{name}", multiple=True, metavar=metavar, help=f"{text} May be repeated.")
        for name, (metavar, text) in _AXES.items()
    )
)


@click.command(epilog=SPEC_HELP)
@click.argument("model")
@click.argument("out", type=OUT)
@_axes
@config_options("budget", "round_to", "rounds", "rebalance")
@config_options(*(name for name in CALIBRATION if name not in ("samples", "seed")))
@config_options("recovery_data", "recovery_steps", "recovery_check_every", "recovery_patience")
@config_options(*EVALUATION, "device", "dtype", "spill", "trust_remote_code")
@task_options("NAMES")
@click.option("--latency", is_flag=True, default=None, help="Time the forward of each cell against the dense model's.")
@config_option
@click.option(
    "--executor",
    type=click.Choice(["serial", "process", "ray"]),
    default="serial",
    help="Run cells one by one, in processes, or as Ray tasks. [default: serial]",
)
@click.option("-j", "--jobs", type=click.IntRange(1), metavar="N", help="Cells in parallel. [default: 2, serial: 1]")
@click.option("--ray-address", metavar="ADDRESS", help="An existing Ray cluster. [default: start one here]")
@output_options()
def ablate(
    model: str,
    out: Path,
    config_file: Path | None,
    executor: Any,
    jobs: int | None,
    ray_address: str | None,
    output: Output,
    **options: Any,
) -> None:
    """Compare every combination of criterion, allocator, compensator and recovery, at every ratio and seed.

    One pass over the calibration windows serves all cells of a seed. Results are written to OUT as cells finish; the
    same command resumes an interrupted sweep, and a wider one adds the missing cells. The file of --config may also
    hold rows, include and exclude.
    """
    from cfsp_framework.ablation.cells import Extras
    from cfsp_framework.ablation.executors import Executor
    from cfsp_framework.ablation.grid import expand
    from cfsp_framework.ablation.sweep import Sweep
    from cfsp_framework.ablation.sweep import ablate as run
    from cfsp_framework.ablation.tables import show_results

    settings = {**(read_yaml(config_file) if config_file else {}), **given(options)}
    extras = Extras.build({name: settings.pop(name) for name in Extras.model_fields if name in settings})
    sweep = Sweep(expand(model, settings), extras)
    pool = Executor(executor, jobs or (1 if executor == "serial" else 2), ray_address)
    try:
        results = run(sweep, out, executor=pool, progress=output.progress())
    except KeyboardInterrupt:
        raise InputError(f"interrupted; finished cells are in {out}, and the same command resumes.") from None
    output.show(results.model_dump_json(indent=2), lambda: show_results(results, out))
    failed = sum(cell.status == "failed" for cell in results.cells)
    if failed:
        raise CfspError(
            f"{failed} of {len(results.cells)} cells failed; {out / 'results.csv'} has the reasons. The same command "
            "runs them again."
        )
