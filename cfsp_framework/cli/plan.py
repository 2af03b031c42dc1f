"""``cfsp plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cfsp_framework.cli.options import (
    PLANNING,
    SPEC_HELP,
    Output,
    config_options,
    given,
    is_first,
    output_options,
    preset_option,
    run_options,
)
from cfsp_framework.config import layered


@click.command(epilog=SPEC_HELP)
@click.argument("model")
@click.argument("plan_file", type=click.Path(path_type=Path, dir_okay=False), required=False)
@config_options(*PLANNING)
@preset_option
@run_options
@click.option(
    "--estimate",
    is_flag=True,
    help="Only estimate, from MODEL's config.json, the time and memory of a run; PLAN_FILE is not needed.",
)
@output_options()
def plan(
    plan_file: Path | None,
    preset: str | None,
    config_file: Path | None,
    overwrite: bool,
    estimate: bool,
    output: Output,
    **options: Any,
) -> None:
    """Decide what to prune in MODEL and write it to PLAN_FILE; `cfsp prune --plan` cuts by it without data."""
    from cfsp_framework import pipeline
    from cfsp_framework.cli import tables
    from cfsp_framework.runtime.atomic_files import check_file, write_text

    config = layered(preset, config_file, given(options))
    if estimate:
        from cfsp_framework.estimate.estimate import estimate_run

        costs = estimate_run(config)
        output.show(costs.to_dict(), lambda: tables.show_estimate(costs))
        return
    if plan_file is None:
        raise click.MissingParameter(param_hint="'PLAN_FILE'", param_type="argument")
    check_file(plan_file, overwrite=overwrite)
    planned = pipeline.plan_only(config, output.progress())
    if is_first():
        write_text(plan_file, planned.to_json())
    output.show(planned.to_json(), lambda: tables.show_plan(planned, plan_file))
