"""``cfsp prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cfsp_framework.cli.options import (
    AMOUNT,
    CALIBRATION,
    COMPONENTS,
    EVALUATION,
    MODEL,
    RECOVERY,
    RESUME,
    SPEC_HELP,
    check_repository,
    config_option,
    config_options,
    given,
    json_option,
    observer_option,
    plugin_option,
    preset_option,
    publish,
    push_option,
    quiet_option,
    read_plan,
    traceback_option,
)
from cfsp_framework.config import layered


@click.command(epilog=SPEC_HELP)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@config_options(*AMOUNT, *COMPONENTS, *CALIBRATION, *RECOVERY, *RESUME, *EVALUATION, *MODEL)
@preset_option
@config_option
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Cut by this plan, whatever ratio, criterion and allocator say.",
)
@click.option("--keep-statistics", is_flag=True, help="Keep the statistics as statistics.safetensors.")
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint folder.")
@push_option
@observer_option
@plugin_option
@quiet_option
@json_option
@traceback_option
def prune(
    out: Path,
    preset: str | None,
    config_file: Path | None,
    plan_file: Path | None,
    keep_statistics: bool,
    overwrite: bool,
    repository: str | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Prune MODEL (a folder, a Hub id or `demo`) into the checkpoint folder OUT.

    What --preset, --config and the options leave open is CFSP on half of the feed-forward channels.
    """
    from cfsp_framework import pipeline
    from cfsp_framework.cli import tables as console
    from cfsp_framework.runtime.distributed import is_first
    from cfsp_framework.runtime.progress import Progress

    check_repository(repository)
    config = layered(preset, config_file, given(options))
    result = pipeline.prune(
        config,
        out,
        plan=read_plan(plan_file) if plan_file else None,
        overwrite=overwrite,
        keep_statistics=keep_statistics,
        progress=Progress(visible=is_first() and not (quiet or as_json)),
    )
    if not is_first():
        return
    if as_json:
        click.echo(result.report.to_json(), nl=False)
    elif not quiet:
        console.show_report(result.report, out)
    publish(out, repository, visible=not (quiet or as_json))
