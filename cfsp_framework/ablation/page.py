"""A sweep as one page: summary, pictures, a table to sort and filter, and the command of every cell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup, escape

from cfsp_framework.ablation import pictures
from cfsp_framework.ablation.drawing import HIGHLIGHTS, MUTED, percent
from cfsp_framework.ablation.results import CellResult, SweepResults
from cfsp_framework.ablation.summary import (
    Best,
    Grid,
    Group,
    Interval,
    Method,
    Pair,
    agreement_pairs,
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
_COUNTED = {"channels": "feed-forward channels", "parameters": "all parameters"}
_FEW_RATIOS = 3
"""As many overlaps as stand side by side."""
_LABEL = 34
"""Letters of a heatmap's row."""
_WARM = (217, 119, 54)

Read = Callable[[CellResult], float | None]


@dataclass(frozen=True)
class Column:
    """A column of numbers: how each is read from a cell, and how written."""

    over: str
    """The heading above several columns: a data SPEC or a task."""
    heading: str
    explained: str
    read: Read
    write: Callable[[float], str]
    better: Callable[[Sequence[float]], float] | None = None
    """Which value is the best of several; None where none is."""
    dense: float | None = None
    spread: bool = True
    """Whether its confidence is worth telling."""

    @property
    def largest_first(self) -> bool:
        """Whether a click on the heading shows the largest first."""
        return self.better is max


@dataclass(frozen=True)
class Entry:
    """A number of the table."""

    text: str
    spread: str
    sort: str
    """The number as JavaScript reads it; empty where there is none."""
    best: bool


@dataclass(frozen=True)
class Row:
    """A method at one ratio."""

    place: int
    """Of the method, by quality."""
    group: Group
    entries: tuple[Entry, ...]
    words: str
    """What the filter looks through, in lower case."""


@dataclass(frozen=True)
class Shade:
    """A cell of a grid."""

    text: str
    colour: str
    best: bool
    explained: str


@dataclass(frozen=True)
class ShadedGrid:
    """A grid with its colours."""

    grid: Grid
    rows: tuple[tuple[Shade, ...], ...]
    """The columns of all ratios after one another."""


@dataclass(frozen=True)
class Headline:
    """What is said first of one ratio."""

    best: Best
    excess: Interval | None
    verdict: str


@dataclass(frozen=True)
class Failure:
    """Cells that failed alike."""

    error: str
    labels: tuple[str, ...]
    count: int


def sweep_page(results: SweepResults) -> str:
    """One HTML page with its pictures, styles and script inside; sections without data are left out."""
    found = groups(results)
    specs = data_specs(results)
    data = specs[0] if specs else ""
    order = by_quality(found, data)
    columns = _columns(results)
    return (
        page_environment()
        .get_template("sweep.html.j2")
        .render(
            results=results,
            swept=_swept(results),
            counted=_COUNTED[results.budget],
            done=sum(cell.status == "done" for cell in results.cells),
            seeds=max((len(group.cells) for group in found), default=0),
            data=data,
            dense=dense_quality(results, data),
            headlines=_headlines(found, results, data),
            failures=_failures(found),
            order=order,
            styles=HIGHLIGHTS,
            muted=MUTED,
            ratios=sorted({group.ratio for group in found}),
            curves=_curves(found, order, results),
            endless=_endless(found, data),
            axis={axis: one for axis, (one, _) in _AXES.items()},
            grids=_shaded(grids(found, data), results, data),
            grid_measure="Excess NLL" if dense_quality(results, data) else "NLL",
            columns=columns,
            rows=_rows(_best_first(found, order, data), order, columns),
            **_pareto(found, results, data),
            **_widths(found, results),
            **_agreement(results),
            headings=[(over, len(list(held))) for over, held in groupby(columns, key=lambda column: column.over)],
            short=shorten_spec,
            percent=percent,
            number=number,
            clock=clock,
            minus=minus,
            breakable=breakable,
        )
    )


# --- what is said first -----------------------------------------------------------------------------------------------


def _swept(results: SweepResults) -> list[str]:
    """``8 criteria``, ``3 ratios``: the axes with several values; all else is as in every cell."""
    told = []
    for axis, (one, many) in _AXES.items():
        values = {getattr(cell.spec, axis) for cell in results.cells}
        if len(values) > 1 or axis in ("ratio", "seed"):
            told.append(f"{len(values)} {one if len(values) == 1 else many}")
    return told


def _headlines(found: Sequence[Group], results: SweepResults, data: str) -> list[Headline]:
    return [
        Headline(best, best.group.interval(lambda cell: excess_nll(cell, results, data)), _verdict(best))
        for best in best_per_ratio(found, data).values()
    ]


def _verdict(best: Best) -> str:
    """How sure it is that the best is the best."""
    if best.second is None:
        return ""
    if best.margin is None:
        return f"next: {best.second.method.label}"
    lead = f"{best.margin.mean:.4f}"
    if best.margin.half is None:
        return f"{lead} nats/token ahead of {best.second.method.label}"
    spread = f"{lead} ± {best.margin.half:.4f} nats/token, {best.margin.count} seeds in pairs"
    if best.clear:
        return f"ahead of {best.second.method.label} by {spread}"
    return f"not clearly ahead of {best.second.method.label}: {spread}"


def _failures(found: Sequence[Group]) -> list[Failure]:
    labels: dict[str, Counter[str]] = {}
    for group in found:
        for cell in group.failed:
            label = f"{group.method.label} at {percent(group.ratio)}"
            labels.setdefault(cell.error or "no reason was given", Counter())[label] += 1
    return [Failure(error, tuple(where), where.total()) for error, where in labels.items()]


# --- pictures ---------------------------------------------------------------------------------------------------------


def _curves(found: Sequence[Group], order: Sequence[Method], results: SweepResults) -> list[tuple[str, Markup]]:
    """A picture per data SPEC; none for a single number."""
    drawn: list[tuple[str, Markup]] = []
    if len(found) < 2:
        return drawn
    for number_, data in enumerate(data_specs(results)):
        dense = dense_quality(results, data)
        panels: list[tuple[str, Read, float | None]] = [
            ("perplexity", _reader(perplexity, data), dense.perplexity if dense else None)
        ]
        if dense:
            panels.append(("excess NLL, nats/token", _excess_reader(results, data), None))
        if any(_finite(group, read) for group in found for _, read, _ in panels):
            picture = pictures.quality_by_ratio(found, order, panels, _COUNTED[results.budget], f"curves-{number_}")
            drawn.append((data, Markup(picture)))
    return drawn


def _finite(group: Group, read: Read) -> bool:
    measured = group.interval(read)
    return measured is not None and math.isfinite(measured.mean)


def _endless(found: Sequence[Group], data: str) -> int:
    """Cells that were measured and have no finite loss, which no picture can show."""
    means = (group.interval(lambda cell: nll(cell, data)) for group in found)
    return sum(mean is not None and not math.isfinite(mean.mean) for mean in means)


def _pareto(found: Sequence[Group], results: SweepResults, data: str) -> dict[str, object]:
    """Quality against latency where that was measured, else against parameters."""
    timed = any(group.interval(relative_latency) for group in found)
    if not timed and len({group.ratio for group in found}) < 2:
        return {"pareto": None, "front": [], "timed": timed}  # all of about one size
    read = relative_latency if timed else kept_parameters
    measured = [
        (group, cost, quality)
        for group in found
        if (cost := group.interval(read)) and (quality := group.interval(_reader(perplexity, data)))
        if math.isfinite(quality.mean) and math.isfinite(cost.mean)
    ]
    if len(measured) < 2:
        return {"pareto": None, "front": [], "timed": timed}
    # In whole percents: at one ratio all methods take about the same time, and noise is no merit.
    front = pareto_front([(round(cost.mean, 2), quality.mean) for _, cost, quality in measured])
    points = [
        pictures.Point(group, cost, quality, front.index(place) + 1 if place in front else None)
        for place, (group, cost, quality) in enumerate(measured)
    ]
    dense = dense_quality(results, data)
    picture = pictures.quality_by_cost(
        points, dense.perplexity if dense else None, "latency" if timed else "parameters", shorten_spec(data)
    )
    return {"pareto": Markup(picture), "front": [points[place] for place in front], "timed": timed}


def _widths(found: Sequence[Group], results: SweepResults) -> dict[str, object]:
    """A heatmap per ratio; methods whose widths are equal there share a row."""
    by_ratio: dict[float, list[tuple[Group, dict[int, float]]]] = {}
    for group in found:
        if kept := mean_kept(group, results):
            by_ratio.setdefault(group.ratio, []).append((group, kept))
    rows = {ratio: _width_rows(held) for ratio, held in sorted(by_ratio.items())}
    distances = [
        abs(share - sum(row.kept.values()) / len(row.kept))
        for held in rows.values()
        for row in held
        for share in row.kept.values()
    ]
    # All but one in twenty: a single wide block would leave all others pale.
    reach = max(0.02, sorted(distances)[int(0.95 * (len(distances) - 1))]) if distances else 0.02
    drawn = [
        Markup(pictures.widths_by_block(held, ratio, reach, f"widths-{place}"))
        for place, (ratio, held) in enumerate(rows.items())
    ]
    return {"widths": drawn, "reach": reach, "width_key": pictures.colour_key(pictures.WIDTH_COLOURS)}


def _width_rows(held: Sequence[tuple[Group, dict[int, float]]]) -> list[pictures.WidthRow]:
    """One row for all methods whose widths are the same."""
    alike: dict[tuple[float, ...], list[tuple[Group, dict[int, float]]]] = {}
    for group, kept in held:
        alike.setdefault(tuple(round(share, 4) for share in kept.values()), []).append((group, kept))
    every = [group.method for group, _ in held]
    return [
        pictures.WidthRow(_width_label([group.method for group, _ in together], every), together[0][1])
        for together in alike.values()
    ]


def _width_label(together: Sequence[Method], every: Sequence[Method]) -> str:
    """Allocators all of whose methods are in the row, several each; then the other methods, as many as fit."""
    names = short_labels(method.allocator for method in every)
    own = Counter(method.allocator for method in together)
    whole = [one for one, count in own.items() if count > 1 and count == sum(m.allocator == one for m in every)]
    words = [names[one] for one in whole] + [method.label for method in together if method.allocator not in whole]
    shown = words[:1]
    for word in words[1:]:
        if len(", ".join([*shown, word])) > _LABEL:
            break
        shown.append(word)
    more = f" and {len(words) - len(shown)} more" if len(shown) < len(words) else ""
    return ", ".join(shown) + more


def _agreement(results: SweepResults) -> dict[str, object]:
    pairs = agreement_pairs(results)
    if not pairs:
        return {"matrices": [], "agreement_blocks": None, "overlap_ratios": []}
    names = short_labels(name for pair in pairs for name in (pair.first, pair.second))
    criteria = pictures.similar_first(pairs)
    ratios = _some(sorted({ratio for pair in pairs for ratio in pair.overlap}, key=float))
    values = [("rank correlation", {(pair.first, pair.second): pair.mean_correlation for pair in pairs})]
    values += [(f"overlap, {percent(float(ratio))} removed", _overlaps(pairs, ratio)) for ratio in ratios]
    drawn = [
        Markup(pictures.agreement_matrix(criteria, names, held, title, f"agreement-{place}"))
        for place, (title, held) in enumerate(values)
    ]
    several = len({block for pair in pairs for block in pair.correlation}) > 1
    blocks = Markup(pictures.agreement_by_block(pairs, names, ratios)) if several else None
    return {"matrices": drawn, "agreement_blocks": blocks, "overlap_ratios": ratios}


def _overlaps(pairs: Sequence[Pair], ratio: str) -> dict[tuple[str, str], float]:
    found = {(pair.first, pair.second): pair.mean_overlap(ratio) for pair in pairs}
    return {pair: share for pair, share in found.items() if share is not None}


def _some(ratios: Sequence[str]) -> list[str]:
    """All ratios, or the first, the middle and the last."""
    if len(ratios) <= _FEW_RATIOS:
        return list(ratios)
    return [ratios[0], ratios[len(ratios) // 2], ratios[-1]]


# --- grids ------------------------------------------------------------------------------------------------------------


def _shaded(made: Sequence[Grid], results: SweepResults, data: str) -> list[ShadedGrid]:
    """All grids with the same colours, ratio by ratio, so that they can be compared."""
    read = _excess_reader(results, data) if dense_quality(results, data) else _reader(nll, data)
    finite: dict[float, list[float]] = {}
    for grid in made:
        for ratio, cells in grid.groups.items():
            means = (group.interval(read) for row in cells for group in row if group)
            finite.setdefault(ratio, []).extend(mean.mean for mean in means if mean and math.isfinite(mean.mean))
    if not any(finite.values()):
        return []
    shaded = []
    for grid in made:
        by_ratio = [_shades(cells, read, finite[ratio]) for ratio, cells in grid.groups.items()]
        rows = tuple(tuple(shade for part in parts for shade in part) for parts in zip(*by_ratio, strict=True))
        shaded.append(ShadedGrid(grid, rows))
    return shaded


def _shades(
    cells: Sequence[Sequence[Group | None]], read: Read, finite: Sequence[float]
) -> tuple[tuple[Shade, ...], ...]:
    """The cells of one ratio, coloured by where they are among the ``finite`` values."""

    def shade(group: Group | None) -> Shade:
        mean = group.interval(read) if group else None
        if group is None:
            return Shade("", "transparent", False, "no such cell")
        if mean is None:
            return Shade("failed" if group.failed else "", "#f2f4f7", False, group.method.label)
        if not math.isfinite(mean.mean):
            return Shade(number(mean.mean), "#f2f4f7", False, group.method.label)
        best = mean.mean == min(finite)
        return Shade(
            minus(f"{mean.mean:.3f}"), _warm(mean.mean, finite), best, f"{group.method.label}: {told(mean, '.4f')}"
        )

    return tuple(tuple(shade(group) for group in row) for row in cells)


def _warm(value: float, among: Sequence[float]) -> str:
    """From white for the lowest to orange for the highest, by logarithm where they span a factor of 4 or more."""
    low, high = min(among), max(among)
    if low > 0 and high / low >= 4:
        value, low, high = math.log(value), math.log(low), math.log(high)
    part = (value - low) / (high - low) if high > low else 0.0
    red, green, blue = (round(255 + (end - 255) * part * 0.8) for end in _WARM)
    return f"#{red:02x}{green:02x}{blue:02x}"


# --- the table --------------------------------------------------------------------------------------------------------


def _columns(results: SweepResults) -> list[Column]:
    """Of qualities, of tasks, and of costs as far as some cell has them."""
    columns = []
    for data in data_specs(results):
        dense, over = dense_quality(results, data), shorten_spec(data)
        columns += [
            Column(over, "perplexity", f"on {data}", _reader(perplexity, data), number, min,
                   dense.perplexity if dense else None),
            Column(over, "excess NLL", "nats per token above the dense model", _excess_reader(results, data),
                   lambda value: f"{value:+.4f}", min, 0.0 if dense else None),
            Column(over, "bits/byte", f"on {data}", _reader(bits_per_byte, data), lambda value: f"{value:.4f}", min,
                   dense.bits_per_byte if dense else None),
        ]  # fmt: skip
    for task, metric in task_metrics(results):
        better = None if any(word in metric for word in ("stderr", "perplexity", "bits", "loss")) else max
        columns.append(
            Column(task, metric.removesuffix(",none"), f"{task}, {metric}", _task_reader(task, metric),
                   lambda value: f"{value:.4f}", better, results.dense_tasks.get(task, {}).get(metric))
        )  # fmt: skip
    columns += [
        Column("", "parameters", "share of all parameters kept", kept_parameters,
               lambda value: f"{100 * value:.1f}%", None, 1.0),
        Column("", "latency", "a forward, of the dense model's", relative_latency,
               lambda value: f"{100 * value:.1f}%", None, 1.0),
        Column("", "seconds", "of one cell, without what all cells share", lambda cell: cell.seconds,
               lambda value: f"{value:.1f}", spread=False),
    ]  # fmt: skip
    return [column for column in columns if column.over or any(column.read(cell) is not None for cell in results.cells)]


def _best_first(found: Sequence[Group], order: Sequence[Method], data: str) -> list[Group]:
    """By ratio, then by loss; those without a finite one last."""
    losses = {(group.method, group.ratio): place for place, group in enumerate(ranked(found, data))}
    places = {method: place for place, method in enumerate(order)}
    last = len(found)
    return sorted(found, key=lambda g: (g.ratio, losses.get((g.method, g.ratio), last), places[g.method]))


def _rows(found: Sequence[Group], order: Sequence[Method], columns: Sequence[Column]) -> list[Row]:
    place_of = {method: place for place, method in enumerate(order)}
    best = _best_values(found, columns)
    return [
        Row(
            place=place_of[group.method],
            group=group,
            entries=tuple(
                _entry(group.interval(column.read), column, best.get((group.ratio, number_)))
                for number_, column in enumerate(columns)
            ),
            words=_words(group),
        )
        for group in found
    ]


def _best_values(found: Sequence[Group], columns: Sequence[Column]) -> dict[tuple[float, int], float]:
    """By ratio and column; none where there is nothing to be better than."""
    values: dict[tuple[float, int], list[float]] = {}
    for group in found:
        for place, column in enumerate(columns):
            mean = group.interval(column.read)
            if mean is not None and math.isfinite(mean.mean):
                values.setdefault((group.ratio, place), []).append(mean.mean)
    return {
        (ratio, place): better(held)
        for (ratio, place), held in values.items()
        if (better := columns[place].better) and len(held) > 1
    }


def _entry(mean: Interval | None, column: Column, best: float | None) -> Entry:
    if mean is None:
        return Entry("", "", "", False)
    if not math.isfinite(mean.mean):
        endless = number(mean.mean)
        return Entry(endless, "", {"∞": "Infinity", "-∞": "-Infinity"}.get(endless, ""), False)
    spread = column.write(mean.half).lstrip("+") if column.spread and mean.half is not None else ""
    spread = spread if any(digit in "123456789" for digit in spread) else ""  # what is the same with every seed
    return Entry(minus(column.write(mean.mean)), spread, repr(mean.mean), mean.mean == best)


def _words(group: Group) -> str:
    method = group.method
    chosen = (method.label, method.criterion, method.allocator, method.compensator, method.recovery)
    state = "failed" if group.failed else "done"
    return " ".join([*chosen, percent(group.ratio), state, *(cell.error or "" for cell in group.failed)]).lower()


# --- numbers ----------------------------------------------------------------------------------------------------------


def _reader(read: Callable[[CellResult, str], float | None], data: str) -> Read:
    return lambda cell: read(cell, data)


def _excess_reader(results: SweepResults, data: str) -> Read:
    return lambda cell: excess_nll(cell, results, data)


def _task_reader(task: str, metric: str) -> Read:
    return lambda cell: cell.tasks.get(task, {}).get(metric)


def number(value: float) -> str:
    """A perplexity: 12.345, 123.5, 12,345, 1.2e+07, ∞."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    return (
        f"{value:.3f}"
        if value < 100
        else f"{value:.1f}"
        if value < 1e4
        else f"{value:,.0f}"
        if value < 1e6
        else f"{value:.1e}"
    )


def minus(text: str) -> str:
    """A written number with a minus sign where it has a hyphen."""
    return text.replace("-", "\N{MINUS SIGN}")


def told(mean: Interval, form: str) -> str:
    """``1.23 ± 0.04``, or the mean alone."""
    return f"{mean.mean:{form}}" + ("" if mean.half is None else f" ± {mean.half:{form}}")


def breakable(name: str) -> Markup:
    """A component's name that may be broken before its options."""
    return Markup(":<wbr>").join(escape(part) for part in name.split(":"))


def clock(seconds: float) -> str:
    """``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 120:
        return f"{seconds:.0f} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
