"""Render a sweep as one page: the best methods, figures, a table to sort and filter, and the command of every cell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from markupsafe import Markup

from cfsp_framework.ablation import figures
from cfsp_framework.ablation.figures import QualityMeasure, Read, percent
from cfsp_framework.ablation.results import CellResult, SweepResults
from cfsp_framework.ablation.summary import (
    Best,
    Group,
    Interval,
    Method,
    agreement_pairs,
    best_means,
    best_per_ratio,
    bits_per_byte,
    by_quality,
    data_specs,
    dense_quality,
    excess_nll,
    grids,
    groups,
    kept_parameters,
    mean_kept,
    nll,
    pareto_front,
    perplexity,
    ranked,
    relative_latency,
    short_labels,
    task_metrics,
)
from cfsp_framework.data.sources import shorten_spec
from cfsp_framework.reporting.figures import MUTED, plotly_script, to_fragment
from cfsp_framework.reporting.html import page_environment

_AXES = {
    "criterion": ("criterion", "criteria"),
    "allocator": ("allocator", "allocators"),
    "compensator": ("compensator", "compensators"),
    "recovery": ("recovery", "recoveries"),
    "samples": ("calibration size", "calibration sizes"),
    "ratio": ("ratio", "ratios"),
    "seed": ("seed", "seeds"),
}
_UNITS = {"channels": "feed-forward channels", "parameters": "all parameters"}
_INFINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}
_WIDTH_LABEL = 34
"""Characters of the names of methods that share a row of widths."""


@dataclass(frozen=True)
class Column:
    """A column of numbers: how a cell has each, and how it is written."""

    over: str
    """The heading above several columns: a data SPEC or a task."""
    heading: str
    description: str
    read: Read
    write: Callable[[float], str]
    better: Callable[[Sequence[float]], float] | None = None
    """Selects the best of several values; None where no value is better."""
    dense: float | None = None
    spread: bool = True
    """Whether the table gives its interval."""

    @property
    def largest_first(self) -> bool:
        """Whether the first click on the heading shows the largest value first."""
        return self.better is max


@dataclass(frozen=True)
class PageCell:
    """A number of the table."""

    text: str = ""
    spread: str = ""
    sort: str = ""
    """The number as JavaScript reads it; empty where there is nothing to sort by."""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A method at one ratio."""

    group: Group
    entries: tuple[PageCell, ...]
    words: str
    """The text that the filter searches, in lower case."""


@dataclass(frozen=True)
class FailureGroup:
    """Cells with the same error."""

    error: str
    labels: tuple[str, ...]
    count: int


def sweep_page(results: SweepResults) -> str:
    """Return a sweep as one HTML page with figures, styles and script inside; sections without data are left out."""
    members = groups(results)
    specs = data_specs(results)
    data = specs[0] if specs else ""
    order = by_quality(members, data)
    columns = _columns(results)
    dense = dense_quality(results, data)
    drawn: dict[str, Any] = {
        "curves": _plot_curves(members, order, results),
        "grids": _plot_grids(members, results, data),
        **_plot_pareto(members, results, data),
        "widths": _plot_widths(members, results),
        **_plot_agreement(results),
    }
    return (
        page_environment()
        .get_template("sweep.html.j2")
        .render(
            results=results,
            plotly=plotly_script() if any(drawn.values()) else "",
            axes=_describe_axes(results),
            unit=_UNITS[results.budget],
            done=sum(cell.status == "done" for cell in results.cells),
            seeds=max((len(group.cells) for group in members), default=0),
            data=data,
            dense=dense,
            best=best_per_ratio(members, data).values(),
            excess=lambda group: group.interval(_excess(results, data)),
            failures=_failures(members),
            order=order,
            styles=figures.STYLES,
            muted=MUTED,
            ratios=sorted({group.ratio for group in members}),
            infinite=sum(1 for group in members if group.interval(_nll(data)) and not group.finite(_nll(data))),
            grid_measure="Excess NLL" if dense else "NLL",
            columns=columns,
            rows=_rows(_best_first(members, order, data), columns),
            headings=[(over, len(list(held))) for over, held in groupby(columns, key=lambda column: column.over)],
            short=shorten_spec,
            percent=percent,
            number=number,
            clock=clock,
            minus=minus,
            verdict=_verdict,
            **drawn,
        )
    )


# --- the head of the page ---------------------------------------------------------------------------------------------


def _describe_axes(results: SweepResults) -> list[str]:
    """Count the values of each axis that has several: ``8 criteria``, ``3 ratios``."""
    counts = {axis: len({getattr(cell.spec, axis) for cell in results.cells}) for axis in _AXES}
    return [
        f"{count} {_AXES[axis][count != 1]}" for axis, count in counts.items() if count > 1 or axis in ("ratio", "seed")
    ]


def _verdict(best: Best) -> str:
    """Say by how much the best method leads, and whether its interval excludes 0."""
    if best.second is None:
        return ""
    name, margin = best.second.method.label, best.margin
    if margin is None:
        return f"Next: {name}."
    lead = f"{margin.mean:.4f}"
    if margin.half is None:
        return f"{lead} nats/token ahead of {name}."
    spread = f"{lead} ± {margin.half:.4f} nats/token, {margin.count} seeds in pairs"
    return f"Ahead of {name} by {spread}." if best.clear else f"Not clearly ahead of {name}: {spread}."


def _failures(members: Sequence[Group]) -> list[FailureGroup]:
    labels: dict[str, Counter[str]] = {}
    for group in members:
        for cell in group.failed:
            counter = labels.setdefault(cell.error or "no reason was given", Counter())
            counter[f"{group.method.label} at {percent(group.ratio)}"] += 1
    return [FailureGroup(error, tuple(counter), counter.total()) for error, counter in labels.items()]


# --- figures ----------------------------------------------------------------------------------------------------------


def _plot_curves(members: Sequence[Group], order: Sequence[Method], results: SweepResults) -> dict[str, list[Markup]]:
    """Draw perplexity and excess loss on each data SPEC; nothing for a single group."""
    drawn: dict[str, list[Markup]] = {}
    if len(members) < 2:
        return drawn
    for place, data in enumerate(data_specs(results)):
        dense = dense_quality(results, data)
        measures = [QualityMeasure("perplexity", partial(perplexity, data=data), dense.perplexity if dense else None)]
        if dense:
            measures.append(QualityMeasure("excess NLL, nats per token", _excess(results, data), None))
        if any(group.finite(measures[0].read) for group in members):
            drawn[data] = [
                to_fragment(
                    figures.plot_quality(members, order, measure, _UNITS[results.budget]), f"quality-{place}-{number_}"
                )
                for number_, measure in enumerate(measures)
            ]
    return drawn


def _plot_pareto(members: Sequence[Group], results: SweepResults, data: str) -> dict[str, Any]:
    """Draw quality against latency where that was measured, else against parameters."""
    timed = any(group.interval(relative_latency) for group in members)
    read = relative_latency if timed else kept_parameters
    measured = [
        (group, cost, quality)
        for group in members
        if (cost := group.finite(read)) and (quality := group.finite(partial(perplexity, data=data)))
    ]
    same_size = not timed and len({group.ratio for group in members}) < 2
    if same_size or len(measured) < 2:
        return {"pareto": None, "front": [], "timed": timed}
    # In whole percents: at one ratio all methods take about the same time, and the difference is noise.
    front = pareto_front([(round(cost.mean, 2), quality.mean) for _, cost, quality in measured])
    points = [
        figures.Point(group, cost, quality, front.index(place) + 1 if place in front else None)
        for place, (group, cost, quality) in enumerate(measured)
    ]
    dense = dense_quality(results, data)
    figure = figures.plot_quality_by_cost(
        points, dense.perplexity if dense else None, "latency" if timed else "parameters", shorten_spec(data)
    )
    return {"pareto": to_fragment(figure, "pareto"), "front": [points[place] for place in front], "timed": timed}


def _plot_widths(members: Sequence[Group], results: SweepResults) -> list[Markup]:
    """Draw a heat map per ratio; methods with the same widths share a row."""
    by_ratio: dict[float, list[tuple[Method, dict[int, float]]]] = {}
    for group in members:
        if kept := mean_kept(group, results):
            by_ratio.setdefault(group.ratio, []).append((group.method, kept))
    rows = {ratio: _width_rows(held) for ratio, held in sorted(by_ratio.items())}
    distances = sorted(
        abs(share - sum(row.kept.values()) / len(row.kept))
        for held in rows.values()
        for row in held
        for share in row.kept.values()
    )
    # The 95th percentile: a single wide block would leave all others pale.
    reach = max(0.02, distances[int(0.95 * (len(distances) - 1))]) if distances else 0.02
    return [
        to_fragment(figures.plot_kept_widths(held, ratio, reach), f"widths-{place}")
        for place, (ratio, held) in enumerate(rows.items())
    ]


def _width_rows(held: Sequence[tuple[Method, dict[int, float]]]) -> list[figures.WidthRow]:
    alike: dict[tuple[float, ...], list[tuple[Method, dict[int, float]]]] = {}
    for method, kept in held:
        alike.setdefault(tuple(round(share, 4) for share in kept.values()), []).append((method, kept))
    methods = [method for method, _ in held]
    return [
        figures.WidthRow(_width_label([method for method, _ in together], methods), together[0][1])
        for together in alike.values()
    ]


def _width_label(together: Sequence[Method], methods: Sequence[Method]) -> str:
    """Name allocators whose several methods are all in the row, then the other methods, as many as fit."""
    names = short_labels(method.allocator for method in methods)
    counts, totals = (Counter(method.allocator for method in held) for held in (together, methods))
    whole = [allocator for allocator, count in counts.items() if 1 < count == totals[allocator]]
    words = [names[allocator] for allocator in whole]
    words += [method.label for method in together if method.allocator not in whole]
    count = max(1, sum(len(", ".join(words[: place + 1])) <= _WIDTH_LABEL for place in range(len(words))))
    return ", ".join(words[:count]) + (f" and {len(words) - count} more" if count < len(words) else "")


def _plot_agreement(results: SweepResults) -> dict[str, list[Markup]]:
    """Draw how alike the criteria rank channels, on average and by block."""
    pairs = agreement_pairs(results)
    if not pairs:
        return {"agreement": [], "agreement_by_block": []}
    names = short_labels(name for pair in pairs for name in (pair.first, pair.second))
    criteria = figures.order_by_similarity(pairs)
    ratios = sorted({ratio for pair in pairs for ratio in pair.overlap}, key=float)
    if len(ratios) > 3:
        ratios = [ratios[0], ratios[len(ratios) // 2], ratios[-1]]
    drawn: dict[str, list[Markup]] = {"agreement": [], "agreement_by_block": []}
    several = len({block for pair in pairs for block in pair.correlation}) > 1
    for place, ratio in enumerate([None, *ratios]):
        means = {
            (pair.first, pair.second): pair.mean_correlation if ratio is None else pair.mean_overlap(ratio)
            for pair in pairs
        }
        known: Mapping[tuple[str, str], float] = {key: mean for key, mean in means.items() if mean is not None}
        figure = figures.plot_agreement(criteria, names, known, ratio)
        drawn["agreement"].append(to_fragment(figure, f"agreement-{place}"))
        if several:
            figure = figures.plot_agreement_by_block(pairs, names, ratio)
            drawn["agreement_by_block"].append(to_fragment(figure, f"agreement-blocks-{place}"))
    return drawn


def _plot_grids(members: Sequence[Group], results: SweepResults, data: str) -> dict[str, Any]:
    """Draw each grid at each ratio; one ratio has the same colours in all grids, so that they can be compared."""
    arranged = grids(members, data)
    read = _excess(results, data) if dense_quality(results, data) else _nll(data)
    finite: dict[float, list[float]] = {}
    for grid in arranged:
        for ratio, cells in grid.groups.items():
            means = (group.finite(read) for row in cells for group in row if group)
            finite.setdefault(ratio, []).extend(mean.mean for mean in means if mean)
    drawn = [
        to_fragment(figures.plot_grid(grid, ratio, read, finite[ratio]), f"grid-{place}-{number_}")
        for place, grid in enumerate(arranged)
        for number_, ratio in enumerate(grid.groups)
        if finite[ratio]
    ]
    if not drawn:
        return {}
    return {"title": f"{_AXES[arranged[0].row_axis][0]} by {_AXES[arranged[0].column_axis][0]}", "figures": drawn}


# --- the table --------------------------------------------------------------------------------------------------------


def _columns(results: SweepResults) -> list[Column]:
    """Return the columns of qualities, tasks and costs that some cell has."""
    columns = []
    for data in data_specs(results):
        dense, over = dense_quality(results, data), shorten_spec(data)
        columns += [
            Column(over, "perplexity", f"on {data}", partial(perplexity, data=data), number, min,
                   dense.perplexity if dense else None),
            Column(over, "excess NLL", "nats per token above the dense model", _excess(results, data),
                   "{:+.4f}".format, min, 0.0 if dense else None),
            Column(over, "bits/byte", f"on {data}", partial(bits_per_byte, data=data), "{:.4f}".format, min,
                   dense.bits_per_byte if dense else None),
        ]  # fmt: skip
    for task, metric in task_metrics(results):
        better = None if any(word in metric for word in ("stderr", "perplexity", "bits", "loss")) else max
        columns.append(
            Column(task, metric.removesuffix(",none"), f"{task}, {metric}", _task(task, metric), "{:.4f}".format, better,
                   results.dense_tasks.get(task, {}).get(metric))
        )  # fmt: skip
    columns += [
        Column("", "parameters", "share of all parameters kept", kept_parameters, "{:.1%}".format, None, 1.0),
        Column("", "latency", "of a forward, as a share of the dense model's", relative_latency, "{:.1%}".format, None,
               1.0),
        Column("", "seconds", "of one cell, without what all cells share", lambda cell: cell.seconds, "{:.1f}".format,
               spread=False),
    ]  # fmt: skip
    return [column for column in columns if column.over or any(column.read(cell) is not None for cell in results.cells)]


def _best_first(members: Sequence[Group], order: Sequence[Method], data: str) -> list[Group]:
    """Order groups by ratio, then by loss; those without a finite loss last."""
    losses = {(group.method, group.ratio): place for place, group in enumerate(ranked(members, data))}
    places = {method: place for place, method in enumerate(order)}
    last = len(members)
    return sorted(members, key=lambda g: (g.ratio, losses.get((g.method, g.ratio), last), places[g.method]))


def _rows(members: Sequence[Group], columns: Sequence[Column]) -> list[Row]:
    best = [best_means(members, column.read, column.better) if column.better else {} for column in columns]
    return [
        Row(
            group,
            tuple(
                _entry(group.interval(column.read), column, leading.get(group.ratio))
                for column, leading in zip(columns, best, strict=True)
            ),
            _words(group),
        )
        for group in members
    ]


def _entry(mean: Interval | None, column: Column, best: float | None) -> PageCell:
    if mean is None:
        return PageCell()
    if not math.isfinite(mean.mean):
        return PageCell(number(mean.mean), sort=_INFINITE.get(mean.mean, ""))
    spread = column.write(mean.half).lstrip("+") if column.spread and mean.half is not None else ""
    spread = spread if any(digit in "123456789" for digit in spread) else ""  # 0 where all seeds agree
    return PageCell(minus(column.write(mean.mean)), spread, repr(mean.mean), mean.mean == best)


def _words(group: Group) -> str:
    method = group.method
    chosen = (method.label, method.criterion, method.allocator, method.compensator, method.recovery)
    state = "failed" if group.failed else "done"
    return " ".join([*chosen, percent(group.ratio), state, *(cell.error or "" for cell in group.failed)]).lower()


# --- values of a cell, and how they are written -----------------------------------------------------------------------


def _nll(data: str) -> Read:
    return partial(nll, data=data)


def _excess(results: SweepResults, data: str) -> Read:
    return partial(excess_nll, results=results, data=data)


def _task(task: str, metric: str) -> Read:
    def read(cell: CellResult) -> float | None:
        return cell.tasks.get(task, {}).get(metric)

    return read


def number(value: float) -> str:
    """Write a perplexity: 12.345, 123.5, 12,345, 1.2e+07, ∞."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    form = next((form for limit, form in ((100, ".3f"), (1e4, ".1f"), (1e6, ",.0f")) if value < limit), ".1e")
    return f"{value:{form}}"


def minus(text: str) -> str:
    """Replace the hyphens of a written number by minus signs."""
    return text.replace("-", "\N{MINUS SIGN}")


def clock(seconds: float) -> str:
    """Write a duration: ``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 120:
        return f"{seconds:.0f} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
