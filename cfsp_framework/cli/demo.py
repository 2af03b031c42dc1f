"""``cfsp demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cfsp_framework.cli.options import config_options, given, json_option, quiet_option, traceback_option
from cfsp_framework.config import RunConfig


@click.command()
@config_options("ratio")
@click.option("--out", type=click.Path(path_type=Path), help="Keep the pruned checkpoint in this folder.")
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint folder.")
@quiet_option
@json_option
@traceback_option
def demo(out: Path | None, overwrite: bool, quiet: bool, as_json: bool, **options: Any) -> None:
    """Prune the small model inside this package and compare both on text it never saw."""
    import tempfile

    from cfsp_framework import pipeline
    from cfsp_framework.cli import tables as console
    from cfsp_framework.runtime.distributed import is_first
    from cfsp_framework.runtime.progress import Progress

    few = {"samples": 64, "seqlen": 256, "evaluate_windows": 100}
    config = RunConfig.build(model="demo", evaluate=("demo",), **few, **given(options))
    with tempfile.TemporaryDirectory(prefix="cfsp-demo-") as scratch:
        result = pipeline.prune(
            config,
            out or Path(scratch, "pruned"),
            overwrite=overwrite,
            progress=Progress(visible=is_first() and not (quiet or as_json)),
        )
        samples = console.continuations(result.folder) if is_first() and not (quiet or as_json) else []
    if not is_first():
        return
    if as_json:
        click.echo(result.report.to_json(), nl=False)
    elif not quiet:
        console.show_report(result.report, out)
        console.show_continuations(samples)
