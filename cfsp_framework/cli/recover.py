"""``cfsp recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cfsp_framework.cli.options import (
    EVALUATION,
    FOLDER,
    OUT,
    RECOVERY,
    RESUME,
    SPEC_HELP,
    Output,
    config_options,
    given,
    output_options,
    publish,
    push_option,
    run_options,
)
from cfsp_framework.config import layered


@click.command(epilog=SPEC_HELP)
@click.argument("pruned")
@click.argument("out", type=OUT)
@click.option("--recovery", metavar="NAME[:k=v,...]", help="What is trained. [default: ig-lora]")
@config_options(*RECOVERY, *RESUME, "seqlen", "batch_size", "seed", *EVALUATION, "trust_remote_code", "device")
@click.option("--adapter", type=FOLDER, help="Train nothing: merge this adapter, kept by --keep-adapter, into PRUNED.")
@run_options
@push_option
@output_options()
def recover(
    pruned: str,
    out: Path,
    config_file: Path | None,
    adapter: Path | None,
    overwrite: bool,
    repository: str | None,
    output: Output,
    **options: Any,
) -> None:
    """Train PRUNED, a checkpoint written by `cfsp prune`, and write the result to the folder OUT.

    The default, ig-lora, trains low-rank adapters, of higher rank in blocks of more importance.
    """
    from cfsp_framework import pipeline
    from cfsp_framework.cli.tables import show_report

    config = layered(None, config_file, given({**options, "model": pruned}), {"recovery": "ig-lora"})
    result = pipeline.recover(config, out, adapter=adapter, overwrite=overwrite, progress=output.progress())
    output.show(result.report.to_json(), lambda: show_report(result.report, out))
    publish(out, repository, output)
