"""``cfsp recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cfsp_framework.cli.options import (
    EVALUATION,
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
    publish,
    push_option,
    quiet_option,
    traceback_option,
)
from cfsp_framework.config import layered


@click.command(epilog=SPEC_HELP)
@click.argument("pruned")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--recovery", metavar="NAME[:k=v,...]", help="What is trained. [default: ig-lora]")
@config_options(*RECOVERY, *RESUME, "seqlen", "batch_size", "seed", *EVALUATION, "trust_remote_code", "device")
@config_option
@click.option(
    "--adapter",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Train nothing: merge this adapter, kept by --keep-adapter, into PRUNED.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint folder.")
@push_option
@observer_option
@plugin_option
@quiet_option
@json_option
@traceback_option
def recover(
    pruned: str,
    out: Path,
    config_file: Path | None,
    adapter: Path | None,
    overwrite: bool,
    repository: str | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train PRUNED, a checkpoint `cfsp prune` wrote, and write the result to the folder OUT.

    What --recovery leaves open is ig-lora: low-rank adapters, of higher rank in blocks of more importance.
    """
    from cfsp_framework import pipeline
    from cfsp_framework.cli import tables as console
    from cfsp_framework.runtime.distributed import is_first
    from cfsp_framework.runtime.progress import Progress

    check_repository(repository)
    config = layered(None, config_file, given({**options, "model": pruned}), {"recovery": "ig-lora"})
    progress = Progress(visible=is_first() and not (quiet or as_json))
    result = pipeline.recover(config, out, adapter=adapter, overwrite=overwrite, progress=progress)
    if not is_first():
        return
    if as_json:
        click.echo(result.report.to_json(), nl=False)
    elif not quiet:
        console.show_report(result.report, out)
    publish(out, repository, visible=not (quiet or as_json))
