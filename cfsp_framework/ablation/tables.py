"""A sweep as tables: for a terminal, a spreadsheet, a README and a paper."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cfsp_framework.ablation.results import CellResult, CellSpec, SweepResults
from cfsp_framework.ablation.summary import (
    Interval,
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


def write_tables(results: SweepResults, folder: Path) -> None:
    """``results.csv``, ``.md`` and ``.tex``, and the page."""
    from cfsp_framework.ablation.page import sweep_page

    write_text(folder / "results.csv", csv_table(results))
    write_text(folder / "results.md", markdown_tables(results))
    write_text(folder / "results.tex", latex_tables(results))
    write_text(folder / PAGE, sweep_page(results))


def csv_table(results: SweepResults) -> str:
    """A row for each cell, with everything that is one value."""
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
        if any(one.latency for one in results.cells):
            row |= {name: getattr(cell.latency, name, None) for name in ("milliseconds", "dense_milliseconds")}
        rows.append({**row, "seconds": cell.seconds, "error": cell.error, "command": cell.command, "key": cell.key})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [*CellSpec.model_fields], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@dataclass(frozen=True)
class Measure:
    """One number of a cell that tables are made of."""

    title: str
    read: Callable[[CellResult], float | None]
    dense: float | None = None
    """The same number of the dense model."""
    less: Callable[[CellResult], float | None] | None = None
    """What is told beside it with its sign."""
    digits: int = 2
    lowest: bool = True
    """Whether less is better."""


@dataclass(frozen=True)
class Entry:
    """What one method has at one ratio."""

    mean: Interval | None
    beside: Interval | None
    failed: int
    best: bool

    def text(self, digits: int, plus: str = " ± ") -> str:
        """``12.34 ± 0.05 (+0.321)``; how many seeds failed where some did. What no seed changes has no spread."""
        if self.mean is None:
            return "failed" if self.failed else ""
        spread = f"{plus}{self.mean.half:.{digits}f}" if self.mean.half else ""
        beside = f" ({self.beside.mean:+.3f})" if self.beside is not None else ""
        return f"{self.mean.mean:.{digits}f}{spread}{beside}" + (f", {self.failed} failed" if self.failed else "")


@dataclass(frozen=True)
class Grid:
    """Methods against ratios."""

    measure: Measure
    ratios: tuple[float, ...]
    rows: tuple[tuple[str, tuple[Entry | None, ...]], ...]


def measures(results: SweepResults) -> list[Measure]:
    """Perplexity on every text, the tasks, and latency, as far as they were measured."""
    found: list[Measure] = []
    for data in data_specs(results):
        dense = dense_quality(results, data)
        found.append(
            Measure(
                f"Perplexity on {shorten_spec(data)} (excess, nats per token)",
                partial(perplexity, data=data),
                dense.perplexity if dense else None,
                partial(excess_nll, results=results, data=data),
            )
        )
    for task in dict.fromkeys(task for task, _ in task_metrics(results)):
        known = [metric for name, metric in task_metrics(results) if name == task]
        metric = next((one for one in ("acc_norm", "acc") if one in known), known[0])
        own = results.dense_tasks.get(task, {}).get(metric)
        found.append(
            Measure(f"{metric} on {task}", partial(_task, task=task, metric=metric), own, None, 4, lowest=False)
        )
    if any(cell.latency for cell in results.cells):
        found.append(Measure("Latency relative to the dense model", relative_latency, 1.0, None, 3))
    return found or [Measure("Share of channels removed", lambda cell: cell.channel_ratio, 0.0, None, 4, lowest=False)]


def _task(cell: CellResult, task: str, metric: str) -> float | None:
    return cell.tasks.get(task, {}).get(metric)


def grid(results: SweepResults, measure: Measure) -> Grid:
    """One measure of every method at every ratio, averaged over seeds."""
    found = groups(results)
    ratios = tuple(sorted({group.ratio for group in found}))
    means = {(group.method.label, group.ratio): group.interval(measure.read) for group in found}
    best = {
        ratio: _best([means.get((label, ratio)) for label, at in means if at == ratio], measure) for ratio in ratios
    }
    rows: dict[str, dict[float, Entry]] = {}
    for group in found:
        mean = means[group.method.label, group.ratio]
        beside = group.interval(measure.less) if measure.less else None
        leads = mean is not None and mean.mean == best[group.ratio]
        rows.setdefault(group.method.label, {})[group.ratio] = Entry(mean, beside, len(group.failed), leads)
    return Grid(
        measure, ratios, tuple((label, tuple(row.get(ratio) for ratio in ratios)) for label, row in rows.items())
    )


def _best(means: Sequence[Interval | None], measure: Measure) -> float | None:
    values = [one.mean for one in means if one is not None and math.isfinite(one.mean)]
    return (min(values) if measure.lowest else max(values)) if len(values) > 1 else None


def show_results(results: SweepResults, folder: Path) -> None:
    """What a finished sweep prints."""
    console = Console(highlight=False, markup=False)
    for made in (grid(results, measure) for measure in measures(results)):
        console.print(made.measure.title, style="italic")  # a table's own title is folded at the table's width
        table = Table()
        table.add_column("method", overflow="fold", min_width=16)
        for ratio in made.ratios:
            table.add_column(_percent(ratio), justify="right")
        if made.measure.dense is not None:
            table.add_row("dense", *[f"{made.measure.dense:.{made.measure.digits}f}"] * len(made.ratios))
        for label, entries in made.rows:
            words = [Text(one.text(made.measure.digits), "bold" if one.best else "") if one else "" for one in entries]
            table.add_row(label, *words)
        console.print(table)
    console.print(spread_note(results))
    for cell in results.cells:
        if cell.status == "failed":
            console.print(f"Failed: {cell.spec.row}, {_percent(cell.spec.ratio)}, seed {cell.spec.seed}: {cell.error}")
    console.print(
        f"Written to {folder}: {PAGE}, results.csv, .md, .tex and .sqlite, a plan for each cell.", soft_wrap=True
    )


def spread_note(results: SweepResults) -> str:
    """What the numbers are means of."""
    seeds = len({cell.spec.seed for cell in results.cells})
    if seeds == 1:
        return "One seed: no spread can be told."
    return (
        f"Means over {seeds} seeds ± half of the 95 % confidence interval (Student); "
        "none where all seeds agree or only one has a value."
    )


def markdown_tables(results: SweepResults) -> str:
    """A table for each measure, and the errors."""
    lines = [f"# Ablation of {shorten_spec(results.model)}", "", _told(results), ""]
    for made in (grid(results, measure) for measure in measures(results)):
        lines += [f"## {_markdown(made.measure.title)}", ""]
        lines += [_markdown_row("method", *map(_percent, made.ratios)), "|---|" + "---:|" * len(made.ratios)]
        if made.measure.dense is not None:
            lines.append(_markdown_row("dense", *[f"{made.measure.dense:.{made.measure.digits}f}"] * len(made.ratios)))
        for label, entries in made.rows:
            words = [one.text(made.measure.digits) if one else "" for one in entries]
            bold = [f"**{word}**" if one and one.best else word for word, one in zip(words, entries, strict=True)]
            lines.append(_markdown_row(_markdown(label), *bold))
        lines.append("")
    failures = [cell for cell in results.cells if cell.status == "failed"]
    if failures:
        lines += ["## Failed", ""]
        lines += [
            f"- {_markdown(cell.spec.row)}, {_percent(cell.spec.ratio)}, seed {cell.spec.seed}: {_markdown(cell.error or '')}"
            for cell in failures
        ]
        lines.append("")
    return "\n".join(lines)


def _told(results: SweepResults) -> str:
    return (
        f"{len(results.cells)} cells; calibrated on {_markdown(shorten_spec(results.calibration))}, {results.seqlen} tokens per "
        f"window; widths are multiples of {results.round_to}. {spread_note(results)} The best of each ratio in bold."
    )


def _markdown_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", text)


def latex_tables(results: SweepResults) -> str:
    """A ``tabular`` with booktabs rules for each measure."""
    lines = ["% \\usepackage{booktabs}", f"% {spread_note(results)}", ""]
    for made in (grid(results, measure) for measure in measures(results)):
        lines += [f"% {made.measure.title}", f"\\begin{{tabular}}{{l{'r' * len(made.ratios)}}}", "\\toprule"]
        lines += [_latex_row("Method", *(latex(_percent(ratio)) for ratio in made.ratios)), "\\midrule"]
        if made.measure.dense is not None:
            lines.append(_latex_row("dense", *[f"{made.measure.dense:.{made.measure.digits}f}"] * len(made.ratios)))
        for label, entries in made.rows:
            words = [one.text(made.measure.digits, " $\\pm$ ") if one else "" for one in entries]
            bold = [
                f"\\textbf{{{word}}}" if one and one.best else word for word, one in zip(words, entries, strict=True)
            ]
            lines.append(_latex_row(latex(label), *bold))
        lines += ["\\bottomrule", "\\end{tabular}", ""]
    return "\n".join(lines)


def _latex_row(*cells: str) -> str:
    return f"{' & '.join(cells)} \\\\"


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


def latex(text: str) -> str:
    """Text as LaTeX sets it."""
    return "".join(_LATEX.get(character, character) for character in text)


def _percent(ratio: float) -> str:
    return f"{100 * ratio:g} %"
