"""``cfsp prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cfsp_framework.cli.options import (
    EVALUATION,
    FILE,
    OUT,
    PLANNING,
    RECOVERY,
    SPEC_HELP,
    Output,
    config_options,
    given,
    output_options,
    preset_option,
    publish,
    push_option,
    read_plan,
    run_options,
)
from cfsp_framework.config import layered


@click.command(epilog=SPEC_HELP)
@click.argument("model")
@click.argument("out", type=OUT)
@config_options(*PLANNING, *RECOVERY, *EVALUATION)
@click.option(
    "--plan", "plan_file", type=FILE, help="Cut by this plan; --ratio, --criterion and --allocator are ignored."
)
@click.option("--keep-statistics", is_flag=True, help="Write the statistics to statistics.safetensors.")
@preset_option
@run_options
@push_option
@output_options()
def prune(
    out: Path,
    preset: str | None,
    config_file: Path | None,
    plan_file: Path | None,
    keep_statistics: bool,
    overwrite: bool,
    repository: str | None,
    output: Output,
    **options: Any,
) -> None:
    """Prune MODEL (a folder, a Hub id or `demo`) into the checkpoint folder OUT.

    Without --preset, --config or options for components, CFSP removes half of the feed-forward channels.
    """
    from cfsp_framework import pipeline
    from cfsp_framework.cli.tables import show_report

    result = pipeline.prune(
        layered(preset, config_file, given(options)),
        out,
        plan=read_plan(plan_file) if plan_file else None,
        overwrite=overwrite,
        keep_statistics=keep_statistics,
        progress=output.progress(),
    )
    output.show(result.report.to_json(), lambda: show_report(result.report, out))
    publish(out, repository, output)
