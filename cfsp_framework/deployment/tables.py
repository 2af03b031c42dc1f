"""What the commands of this package print for people: tables on stdout."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from .tasks import Metric, TaskResult, TaskResults


def show_tasks(model: str, found: TaskResults) -> None:
    """A row for each task, their mean, and what else somebody needs to get the same numbers."""
    console = Console(highlight=False, markup=False)
    table = Table(title=f"Tasks of {_name(model)}", title_justify="left")
    table.add_column("task", overflow="fold", min_width=12)
    for heading in ("version", "shots", "docs", "acc", "acc_norm"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found.tasks:
        table.add_row(
            one.task, one.version, str(one.fewshot), f"{one.samples:,}", _scored(one.acc), _scored(one.acc_norm)
        )
    if len(found.tasks) > 1 and found.mean_acc is not None and found.mean_acc_norm is not None:
        table.add_section()
        table.add_row("mean", "", "", "", f"{found.mean_acc:.4f}", f"{found.mean_acc_norm:.4f} *")
    console.print(table)
    for one in found.tasks:
        if others := _others(one):
            console.print(f"{one.task}: {others}.")
    starred = " *: acc where a task has no acc_norm." if len(found.tasks) > 1 else ""
    console.print(f"In brackets: standard errors. shots: examples in a prompt.{starred}")
    for one in found.tasks:
        if one.note:
            console.print(f"Note: {one.task}: {one.note}, not as the Hub's data give them.")
    bos = "with" if found.bos else "without"
    limit = "" if found.limit is None else f", the first {found.limit} documents of each task"
    console.print(f"lm-eval {found.harness}{limit}; prompts {bos} a beginning-of-sequence token, no chat template.")


def _scored(metric: Metric | None) -> str:
    if metric is None:
        return ""
    return f"{metric.value:.4f}" if metric.stderr is None else f"{metric.value:.4f} ({metric.stderr:.3f})"


def _others(one: TaskResult) -> str:
    """The metrics that have no column of their own."""
    rest = {name: metric for name, metric in one.metrics.items() if name not in ("acc", "acc_norm")}
    return ", ".join(f"{name} {metric.value:.4g}" for name, metric in rest.items())


def _name(model: str) -> str:
    """A model's folder by its name alone; a Hub id as it is."""
    return Path(model).name if Path(model).is_dir() else model
