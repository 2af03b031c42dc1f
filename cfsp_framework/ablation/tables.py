"""Write a sweep as tables: for a terminal, a spreadsheet, a README and a paper."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cfsp_framework.ablation.results import CellResult, CellSpec, SweepResults
from cfsp_framework.ablation.summary import (
    Interval,
    best_means,
    data_specs,
    dense_quality,
    excess_nll,
    groups,
    perplexity,
    quality,
    relative_latency,
    task_metrics,
)
from cfsp_framework.data.sources import shorten_spec
from cfsp_framework.runtime.atomic_files import write_text

PAGE = "report.html"
T = TypeVar("T")


def write_tables(results: SweepResults, folder: Path) -> None:
    """Write ``results.csv``, ``.md`` and ``.tex``, and the page."""
    from cfsp_framework.ablation.page import sweep_page

    write_text(folder / "results.csv", csv_table(results))
    write_text(folder / "results.md", markdown_tables(results))
    write_text(folder / "results.tex", latex_tables(results))
    write_text(folder / PAGE, sweep_page(results))


def csv_table(results: SweepResults) -> str:
    """Return a row for each cell, with all its single values."""
    data = data_specs(results)
    rows: list[dict[str, object]] = []
    for cell in results.cells:
        row: dict[str, object] = {**cell.spec.model_dump(), "status": cell.status}
        row |= {name: getattr(cell, name) for name in ("channel_ratio", "parameter_ratio", "parameters")}
        for spec in data:
            for name in ("perplexity", "nll", "bits_per_byte"):
                row[f"{name} {spec}"] = getattr(quality(cell, spec), name, None)
            row[f"excess_nll {spec}"] = excess_nll(cell, results, spec)
        row |= {f"{metric} {task}": cell.tasks.get(task, {}).get(metric) for task, metric in task_metrics(results)}
        if any(other.latency for other in results.cells):
            row |= {name: getattr(cell.latency, name, None) for name in ("milliseconds", "dense_milliseconds")}
        rows.append({**row, "seconds": cell.seconds, "error": cell.error, "command": cell.command, "key": cell.key})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [*CellSpec.model_fields], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@dataclass(frozen=True)
class TableMeasure:
    """A number of each cell that makes a table."""

    title: str
    read: Callable[[CellResult], float | None]
    dense: float | None = None
    """The number of the dense model."""
    excess: Callable[[CellResult], float | None] | None = None
    """A second number, written in brackets with its sign."""
    digits: int = 2
    better: Callable[[Sequence[float]], float] = min
    """Selects the best of several values."""


@dataclass(frozen=True)
class TableCell:
    """A method's number at one ratio."""

    mean: Interval | None
    excess: Interval | None
    failed: int
    best: bool

    def text(self, digits: int, plus: str = " ± ") -> str:
        """Write ``12.34 ± 0.05 (+0.321)`` and how many seeds failed; without a spread where all seeds agree."""
        if self.mean is None:
            return "failed" if self.failed else ""
        spread = f"{plus}{self.mean.half:.{digits}f}" if self.mean.half else ""
        excess = f" ({self.excess.mean:+.3f})" if self.excess is not None else ""
        return f"{self.mean.mean:.{digits}f}{spread}{excess}" + (f", {self.failed} failed" if self.failed else "")


@dataclass(frozen=True)
class MethodTable:
    """Methods against ratios."""

    measure: TableMeasure
    ratios: tuple[float, ...]
    rows: dict[str, list[TableCell | None]]
    """By the method's label; None where a method lacks a ratio."""

    def write(self, bold: Callable[[str], T], plus: str = " ± ") -> Iterator[tuple[str, list[str | T]]]:
        """Yield each row's label and written numbers, the dense model first; ``bold`` marks the best."""
        digits = self.measure.digits
        if self.measure.dense is not None:
            yield "dense", [f"{self.measure.dense:.{digits}f}"] * len(self.ratios)
        for label, entries in self.rows.items():
            words = [entry.text(digits, plus) if entry else "" for entry in entries]
            yield (
                label,
                [bold(word) if entry and entry.best else word for word, entry in zip(words, entries, strict=True)],
            )


def measures(results: SweepResults) -> list[TableMeasure]:
    """Return perplexity on every text, the tasks, and latency, as far as they were measured."""
    measured: list[TableMeasure] = []
    for data in data_specs(results):
        dense = dense_quality(results, data)
        measured.append(
            TableMeasure(
                f"Perplexity on {shorten_spec(data)} (excess, nats per token)",
                partial(perplexity, data=data),
                dense.perplexity if dense else None,
                partial(excess_nll, results=results, data=data),
            )
        )
    for task in dict.fromkeys(task for task, _ in task_metrics(results)):
        known = [metric for name, metric in task_metrics(results) if name == task]
        metric = next((name for name in ("acc_norm", "acc") if name in known), known[0])
        dense_score = results.dense_tasks.get(task, {}).get(metric)
        measured.append(
            TableMeasure(
                f"{metric} on {task}", partial(_task, task=task, metric=metric), dense_score, None, 4, better=max
            )
        )
    if any(cell.latency for cell in results.cells):
        measured.append(TableMeasure("Latency relative to the dense model", relative_latency, 1.0, None, 3))
    return measured or [
        TableMeasure("Share of channels removed", lambda cell: cell.channel_ratio, 0.0, None, 4, better=max)
    ]


def _task(cell: CellResult, task: str, metric: str) -> float | None:
    return cell.tasks.get(task, {}).get(metric)


def grids(results: SweepResults) -> Iterator[MethodTable]:
    """Yield a grid for each measure."""
    for measure in measures(results):
        yield grid(results, measure)


def grid(results: SweepResults, measure: TableMeasure) -> MethodTable:
    """Return one measure of every method at every ratio, averaged over seeds."""
    members = groups(results)
    ratios = tuple(sorted({group.ratio for group in members}))
    best = best_means(members, measure.read, measure.better)
    rows: dict[str, dict[float, TableCell]] = {}
    for group in members:
        mean = group.interval(measure.read)
        excess = group.interval(measure.excess) if measure.excess else None
        leads = mean is not None and mean.mean == best.get(group.ratio)
        rows.setdefault(group.method.label, {})[group.ratio] = TableCell(mean, excess, len(group.failed), leads)
    return MethodTable(measure, ratios, {label: [row.get(ratio) for ratio in ratios] for label, row in rows.items()})


def show_results(results: SweepResults, folder: Path) -> None:
    """Print the tables of a finished sweep."""
    console = Console(highlight=False, markup=False)
    for numbers in grids(results):
        console.print(numbers.measure.title, style="italic")  # a table's own title is folded at the table's width
        table = Table()
        table.add_column("method", overflow="fold", min_width=16)
        for ratio in numbers.ratios:
            table.add_column(_percent(ratio), justify="right")
        for label, words in numbers.write(bold=lambda word: Text(word, "bold")):
            table.add_row(label, *words)
        console.print(table)
    console.print(spread_note(results))
    for line in _failures(results):
        console.print(f"Failed: {line}")
    console.print(
        f"Written to {folder}: {PAGE}, results.csv, .md, .tex and .sqlite, a plan for each cell.", soft_wrap=True
    )


def _failures(results: SweepResults) -> list[str]:
    return [
        f"{cell.spec.row}, {_percent(cell.spec.ratio)}, seed {cell.spec.seed}: {cell.error}"
        for cell in results.cells
        if cell.status == "failed"
    ]


def spread_note(results: SweepResults) -> str:
    """Say over which seeds the numbers are means."""
    seeds = len({cell.spec.seed for cell in results.cells})
    if seeds == 1:
        return "One seed: no confidence intervals."
    return (
        f"Means over {seeds} seeds ± half of the 95 % confidence interval (Student); "
        "none where all seeds agree or only one has a value."
    )


def markdown_tables(results: SweepResults) -> str:
    """Return a table for each measure, and the errors."""
    description = (
        f"{len(results.cells)} cells; calibrated on {_markdown(shorten_spec(results.calibration))}, {results.seqlen} tokens per "
        f"window; widths are multiples of {results.round_to}. {spread_note(results)} The best of each ratio in bold."
    )
    lines = [f"# Ablation of {shorten_spec(results.model)}", "", description, ""]
    for numbers in grids(results):
        lines += [f"## {_markdown(numbers.measure.title)}", ""]
        lines += [_markdown_row("method", *map(_percent, numbers.ratios)), "|---|" + "---:|" * len(numbers.ratios)]
        rows = numbers.write(bold=lambda word: f"**{word}**")
        lines += [*(_markdown_row(_markdown(label), *words) for label, words in rows), ""]
    if failures := _failures(results):
        lines += ["## Failed", "", *(f"- {_markdown(line)}" for line in failures), ""]
    return "\n".join(lines)


def _markdown_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", text)


def latex_tables(results: SweepResults) -> str:
    """Return a ``tabular`` with booktabs rules for each measure."""
    lines = ["% \\usepackage{booktabs}", f"% {spread_note(results)}", ""]
    for numbers in grids(results):
        lines += [f"% {numbers.measure.title}", f"\\begin{{tabular}}{{l{'r' * len(numbers.ratios)}}}", "\\toprule"]
        lines += [_latex_row("Method", *(latex(_percent(ratio)) for ratio in numbers.ratios)), "\\midrule"]
        rows = numbers.write(bold=lambda word: f"\\textbf{{{word}}}", plus=" $\\pm$ ")
        lines += [_latex_row(latex(label), *words) for label, words in rows]
        lines += ["\\bottomrule", "\\end{tabular}", ""]
    return "\n".join(lines)


def _latex_row(*cells: str) -> str:
    return f"{' & '.join(cells)} \\\\"


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


def latex(text: str) -> str:
    """Escape text for LaTeX."""
    return "".join(_LATEX.get(character, character) for character in text)


def _percent(ratio: float) -> str:
    return f"{100 * ratio:g} %"
