"""``cfsp plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cfsp_framework.cli.options import (
    AMOUNT,
    CALIBRATION,
    COMPONENTS,
    MODEL,
    RESUME,
    SPEC_HELP,
    config_option,
    config_options,
    given,
    json_option,
    observer_option,
    plugin_option,
    preset_option,
    quiet_option,
    traceback_option,
)
from cfsp_framework.config import RunConfig, layered
from cfsp_framework.errors import InputError


@click.command(epilog=SPEC_HELP)
@click.argument("model")
@click.argument("plan_file", type=click.Path(path_type=Path, dir_okay=False), required=False)
@config_options(*AMOUNT, *COMPONENTS, *CALIBRATION, *RESUME, *MODEL)
@preset_option
@config_option
@click.option("--overwrite", is_flag=True, help="Replace an existing plan.")
@click.option(
    "--estimate",
    is_flag=True,
    help="Only tell, from MODEL's config.json, what time and memory a run takes; no PLAN_FILE is needed.",
)
@observer_option
@plugin_option
@quiet_option
@json_option
@traceback_option
def plan(
    plan_file: Path | None,
    preset: str | None,
    config_file: Path | None,
    overwrite: bool,
    estimate: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Decide what to prune in MODEL and write it to PLAN_FILE; `cfsp prune --plan` cuts by it without data."""
    from cfsp_framework import pipeline
    from cfsp_framework.cli import tables as console
    from cfsp_framework.runtime.atomic_files import check_parent, write_text
    from cfsp_framework.runtime.distributed import is_first
    from cfsp_framework.runtime.progress import Progress

    if estimate:
        _estimate(layered(preset, config_file, given(options)), quiet=quiet, as_json=as_json)
        return
    if plan_file is None:
        raise click.MissingParameter(param_hint="'PLAN_FILE'", param_type="argument")
    check_parent(plan_file)
    if plan_file.exists() and not overwrite:
        raise InputError(f"{plan_file} exists; give another file or --overwrite.")
    config = layered(preset, config_file, given(options))
    made = pipeline.plan_only(config, Progress(visible=is_first() and not (quiet or as_json)))
    if not is_first():
        return
    write_text(plan_file, made.to_json())
    if as_json:
        click.echo(made.to_json(), nl=False)
    elif not quiet:
        console.show_plan(made, plan_file)


def _estimate(config: RunConfig, *, quiet: bool, as_json: bool) -> None:
    from cfsp_framework.cli import tables as console
    from cfsp_framework.estimate.estimate import estimate_run

    found = estimate_run(config)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    elif not quiet:
        console.show_estimate(found)
