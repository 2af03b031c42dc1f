"""``cfsp evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cfsp_framework.cli.options import (
    MODEL,
    SPEC_HELP,
    config_options,
    given,
    json_option,
    plugin_option,
    traceback_option,
)
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
@click.option(
    "--tasks",
    multiple=True,
    metavar="NAME,NAME",
    help="Tasks of lm-evaluation-harness to score MODEL on: arc_easy,piqa ... Needs the extra `eval`.",
)
@click.option(
    "--task-data",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Read the tasks' data from DIR/TASK/SPLIT.jsonl, not from the Hub.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N documents of each task only.")
@click.option("--fewshot", type=click.IntRange(0), metavar="N", help="Examples in a prompt. [default: the task's own]")
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="Prompts per batch; default: what keeps a batch small."
)
@config_options("seqlen", "evaluate_windows", *MODEL)
@plugin_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
@traceback_option
def evaluate(
    evaluate: tuple[str, ...],
    tasks: tuple[str, ...],
    task_data: Path | None,
    limit: int | None,
    fewshot: int | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Report the perplexity of MODEL, dense or pruned, on each data SPEC, and its scores on tasks."""
    from cfsp_framework import pipeline
    from cfsp_framework.cli import tables as console
    from cfsp_framework.runtime.distributed import is_first
    from cfsp_framework.runtime.progress import Progress

    names = [name.strip() for given_names in tasks for name in given_names.split(",") if name.strip()]
    if not names and (task_data or limit or fewshot is not None):
        raise ConfigError("--task-data, --limit and --fewshot are about --tasks; name some.")
    config = RunConfig.build(evaluate=evaluate or (() if names else ("demo",)), **given(options))
    progress = Progress(visible=is_first() and not (quiet or as_json))
    loaded = found = None
    if names:
        from cfsp_framework.evaluation import tasks as harness

        loaded, found = harness.score(
            config, names, task_data=task_data, limit=limit, fewshot=fewshot, progress=progress
        )
    measured = pipeline.evaluate_only(config, progress, loaded) if config.evaluation.data else []
    if not is_first():
        return
    if as_json:
        rows = [
            {"data": data.spec, "seqlen": data.windows.shape[1], "windows": len(data.windows), **told.model_dump()}
            for data, told in measured
        ]
        scores = found.model_dump(mode="json") if found else None
        click.echo(json.dumps({"model": config.model.source, "evaluations": rows, "tasks": scores}, indent=2))
        return
    if measured:
        console.show_perplexities(config.model.source, measured)
    if found:
        from cfsp_framework.cli.tables import show_tasks

        show_tasks(config.model.source, found)
