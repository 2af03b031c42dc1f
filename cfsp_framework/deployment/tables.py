"""What the commands of this package print for people: tables on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from cfsp_framework.runtime.atomic_files import human_bytes

if TYPE_CHECKING:
    from cfsp_framework.benchmark.timing import Benchmark, ModelSize, Speed
    from cfsp_framework.export.hub import Upload
    from cfsp_framework.evaluation.tasks import Metric, TaskResult, TaskResults


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


def show_benchmark(found: Benchmark, plot: Path | None = None) -> None:
    """What the models are, and a row for each phase, setting and model."""
    console = Console(highlight=False, markup=False)
    console.print(_model_table(found))
    for name in dict.fromkeys(one.phase for one in found.speeds):
        console.print(_speed_table(name, [one for one in found.speeds if one.phase == name], len(found.models) > 1))
    console.print(
        f"{found.device}, {found.threads} thread{'s'[: found.threads > 1]}, {found.dtype}: {found.flops_per_second / 1e9:,.0f} GFLOP/s and "
        f"{found.bytes_per_second / 1e9:,.1f} GB/s in products just now."
    )
    clock = "" if found.workload.clock == "wall" else " Processor seconds, not those on the wall."
    console.print(f"±: half of what lies between the quartiles of the rounds.{clock}")
    if len(found.models) > 1:
        console.print(
            "speed-up: median over rounds in which the models run in turn. ideal: if only products (FLOPs) or reading "
            "the weights (bytes) took time; the bound one is named. reached: the share of it that was measured."
        )
    weights = ", random weights" if found.random_weights else ""
    memory = "" if found.memory == "not measured" else f" peak: weights and what a run adds, {found.memory}."
    console.print(f"{found.workload.repeats} rounds, {found.workload.cache} cache{weights}.{memory}")
    if plot:
        console.print(f"Drawn into {plot}.", soft_wrap=True)


def _model_table(found: Benchmark) -> Table:
    table = Table(title="Models", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold", min_width=8)
    for heading in ("parameters", "weights", "MFLOPs/token", "widths", "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found.models:
        table.add_row(
            one.name,
            f"{one.parameters:,}",
            human_bytes(one.bytes),
            f"{one.flops_per_token / 1e6:,.1f}",
            _widths(one),
            "" if one.peak_bytes is None else human_bytes(one.peak_bytes),
        )
    return table


def _widths(one: ModelSize) -> str:
    if one.widths == 1:
        return str(one.least_width)
    return f"{one.least_width} to {one.most_width}"


def _speed_table(phase: str, speeds: Sequence[Speed], compared: bool) -> Table:
    unit = "a prompt" if phase == "prefill" else "a token of each sequence"
    table = Table(
        title=f"{phase.capitalize()}, milliseconds for {unit}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("batch", no_wrap=True)
    table.add_column("model", overflow="fold", min_width=8)
    for heading in ("ms", "±", "tokens/s", *(("speed-up", "ideal", "reached") if compared else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for one in speeds:
        setting = f"{one.batch_size} x {one.length}"
        seconds = one.seconds
        row = [
            setting if setting != before else "",
            one.model,
            _milliseconds(seconds.median),
            f"{(seconds.high - seconds.low) / 2 / seconds.median:.0%}",
            f"{one.tokens_per_second:,.0f}" if one.tokens_per_second >= 100 else f"{one.tokens_per_second:.1f}",
        ]
        if one.speed_up and one.ideal and one.reached is not None:
            row += [f"{one.speed_up.median:.2f}", f"{one.ideal.expected:.2f} {one.ideal.bound}", f"{one.reached:.0%}"]
        table.add_row(*row)
        before = setting
    return table


def _milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def show_upload(upload: Upload) -> None:
    """The files, what was checked, and what the card tells the Hub."""
    console = Console(highlight=False, markup=False)
    table = Table(title=f"To {upload.repository}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    for file in upload.files:
        table.add_row(file.name, f"{file.bytes:,}")
    table.add_section()
    table.add_row(f"{len(upload.files)} files", f"{upload.bytes:,}")
    console.print(table)
    if upload.left_out:
        console.print(f"Left out: {', '.join(upload.left_out)}.", soft_wrap=True)
    for check in upload.checks:
        console.print(f"{check.outcome:6}  {check.what}: {check.detail}", soft_wrap=True)
    told = [f"{key} {_value(upload.card[key])}" for key in _CARD_KEYS if upload.card.get(key)]
    console.print(f"card: {'; '.join(told)}", soft_wrap=True)
    if upload.url:
        console.print(f"Uploaded: {upload.url}", soft_wrap=True)
    else:
        console.print(f"Nothing was uploaded. Commit message: {upload.message}", soft_wrap=True)


_CARD_KEYS = ("base_model", "base_model_relation", "license", "license_name", "language", "datasets", "tags")


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
