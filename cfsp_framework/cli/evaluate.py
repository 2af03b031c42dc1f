"""``cfsp evaluate``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from cfsp_framework.cli.options import MODEL, SPEC_HELP, Output, config_options, given, output_options, task_options
from cfsp_framework.config import RunConfig
from cfsp_framework.errors import ConfigError


@click.command(epilog=SPEC_HELP)
@click.argument("model")
@click.option(
    "--data",
    "--evaluate",
    "evaluate",
    multiple=True,
    metavar="SPEC",
    help="Data SPEC to report perplexity on. May be repeated. [default: demo, unless there are tasks]",
)
@task_options("NAME,NAME")
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="Prompts per batch; default: what keeps a batch small."
)
@config_options("seqlen", "evaluate_windows", *MODEL)
@output_options(quiet="No progress.")
def evaluate(
    evaluate: tuple[str, ...],
    tasks: tuple[str, ...],
    task_data: Path | None,
    limit: int | None,
    fewshot: int | None,
    output: Output,
    **options: Any,
) -> None:
    """Report the perplexity of MODEL, dense or pruned, on each data SPEC, and its scores on tasks."""
    from cfsp_framework import pipeline
    from cfsp_framework.cli.tables import show_perplexities, show_tasks

    names = [name.strip() for listed in tasks for name in listed.split(",") if name.strip()]
    if not names and (task_data or limit or fewshot is not None):
        raise ConfigError("--task-data, --limit and --fewshot need --tasks.")
    config = RunConfig.build(evaluate=evaluate or (() if names else ("demo",)), **given(options))
    progress = output.progress()
    loaded = scores = None
    if names:
        from cfsp_framework.evaluation.tasks import score

        loaded, scores = score(config, names, task_data=task_data, limit=limit, fewshot=fewshot, progress=progress)
    measured = pipeline.evaluate_only(config, progress, loaded) if config.evaluation.data else []
    rows = [
        {"data": data.spec, "seqlen": data.windows.shape[1], "windows": len(data.windows), **perplexity.model_dump()}
        for data, perplexity in measured
    ]

    def show() -> None:
        if measured:
            show_perplexities(config.model.source, measured)
        if scores:
            show_tasks(config.model.source, scores)

    result = {
        "model": config.model.source,
        "evaluations": rows,
        "tasks": scores.model_dump(mode="json") if scores else None,
    }
    replace(output, quiet=False).show(result, show)
