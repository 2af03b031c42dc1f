"""``cfsp evaluate``."""

from __future__ import annotations

import json
from typing import Any

import click

from cfsp_framework.config import RunConfig

from .options import MODEL, SPEC_HELP, config_options, given, json_option, plugin_option, traceback_option


@click.command(epilog=SPEC_HELP)
@click.argument("model")
@click.option(
    "--data",
    "--evaluate",
    "evaluate",
    multiple=True,
    metavar="SPEC",
    help="Data SPEC to report perplexity on. May be repeated. [default: demo]",
)
@config_options("seqlen", "evaluate_windows", *MODEL)
@plugin_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
@traceback_option
def evaluate(evaluate: tuple[str, ...], quiet: bool, as_json: bool, **options: Any) -> None:
    """Report the perplexity of MODEL, dense or pruned, on each data SPEC."""
    from cfsp_framework import console, pipeline
    from cfsp_framework.progress import Progress
    from cfsp_framework.ranks import is_first

    config = RunConfig.build(evaluate=evaluate or ("demo",), **given(options))
    measured = pipeline.evaluate_only(config, Progress(visible=is_first() and not (quiet or as_json)))
    if not is_first():
        return
    if as_json:
        rows = [
            {"data": data.spec, "seqlen": data.windows.shape[1], "windows": len(data.windows), **found.model_dump()}
            for data, found in measured
        ]
        click.echo(json.dumps({"model": config.model, "evaluations": rows}, indent=2))
    else:
        console.show_perplexities(config.model, measured)
