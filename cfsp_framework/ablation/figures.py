"""Plotly figures of a sweep: quality, quality against cost, widths of the blocks, agreement of the criteria."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cfsp_framework.ablation.results import CellResult
from cfsp_framework.ablation.summary import AxisGrid, Group, Interval, Method, Pair
from cfsp_framework.reporting.figures import INK, MUTED, SOFT, new_figure, plain_text, set_value_axis, shorten

Read = Callable[[CellResult], float | None]

STYLES = (
    ("#0072b2", "circle", "solid"),
    ("#d55e00", "square", "solid"),
    ("#009e73", "triangle-up", "solid"),
    ("#cc79a7", "diamond", "dash"),
    ("#e69f00", "triangle-down", "dash"),
    ("#56b4e9", "cross", "dash"),
)
"""Colour, marker and line of the best methods: the palette of Okabe and Ito, safe for the colour-blind."""
_WITH_INTERVALS = 3
"""Methods whose intervals are drawn against the ratio; more would hide each other."""
_MANY_PAIRS = 45
"""Pairs of criteria that still get a row each: those of ten criteria."""
_FEW_BLOCKS = 20
"""Blocks whose widths are also written."""
_LABEL = 30
"""Characters of a label beside the axes."""
_LOSS_COLOURS = ((0.0, "#ffffff"), (1.0, "#e99350"))
_SHARE_COLOURS = ((0.0, "#ffffff"), (0.5, "#9cc3e6"), (1.0, "#2563a8"))


@dataclass(frozen=True)
class QualityMeasure:
    """A measure of quality: its title, how a cell has it, and its value for the dense model."""

    title: str
    read: Read
    dense: float | None


@dataclass(frozen=True)
class Point:
    """A method at one ratio in the figure of quality against cost."""

    group: Group
    cost: Interval
    quality: Interval
    front: int | None
    """Its number on the Pareto front, from 1; None where another point beats it."""


@dataclass(frozen=True)
class WidthRow:
    """The share of channels that each block keeps at one ratio, by one or several methods."""

    label: str
    kept: dict[int, float]


def percent(share: float) -> str:
    """Write a share as a percentage: ``30%``, ``12.5%``."""
    return f"{100 * share:.4g}%"


def label(name: str) -> str:
    """Return a name as a label beside the axes, cut in the middle where it is long."""
    return plain_text(shorten(name, _LABEL))


def describe(name: str, ratio: float, *values: str) -> str:
    """Return the text that appears under the mouse."""
    return "<br>".join([f"<b>{plain_text(name)}</b>", f"{percent(ratio)} to remove", *values])


def format_interval(mean: Interval, form: str) -> str:
    """Write ``1.23 ± 0.04``, or the mean alone."""
    return f"{mean.mean:{form}}" + ("" if mean.half is None else f" ± {mean.half:{form}}")


# --- quality ----------------------------------------------------------------------------------------------------------


def plot_quality(groups: Sequence[Group], order: Sequence[Method], measure: QualityMeasure, unit: str) -> Any:
    """Return a line over the ratios for each method; with a single ratio, a point for each method, the best on top.

    The first methods of ``order`` are in colour; ``unit`` names what a ratio is a share of.
    """
    means: dict[Method, list[tuple[float, Interval]]] = {}
    for group in groups:
        if mean := group.finite(measure.read):
            means.setdefault(group.method, []).append((group.ratio, mean))
    several = len({group.ratio for group in groups}) > 1
    title = measure.title if measure.dense is None else f"{measure.title}; dense {measure.dense:.4g}"
    figure = new_figure(title, height=440 if several else 110 + 26 * len(order))
    for place, method in reversed([*enumerate(order)]):
        if method in means:
            _add_method(figure, place, method, means[method], several=several)
    values = [mean.mean for points in means.values() for _, mean in points]
    if measure.dense is not None:
        line = {"color": INK, "width": 1, "dash": "dot"}
        figure.add_hline(measure.dense, line=line) if several else figure.add_vline(measure.dense, line=line)
        values.append(measure.dense)
    if several:
        set_value_axis(figure.layout.yaxis, values)
        figure.update_xaxes(title=f"share of {unit} to remove", tickformat=".4~p", showgrid=False)
    else:
        set_value_axis(figure.layout.xaxis, values)
        figure.update_layout(showlegend=False)
        places = [*range(len(order))]
        labels = [label(method.label) for method in order]
        figure.update_yaxes(tickvals=places, ticktext=labels, range=(len(order) - 0.5, -0.5))
    return figure


def _add_method(
    figure: Any, place: int, method: Method, points: Sequence[tuple[float, Interval]], *, several: bool
) -> None:
    highlighted = place < len(STYLES)
    colour, symbol, dash = STYLES[place] if highlighted else (MUTED if several else SOFT, "circle", "solid")
    halves = [mean.half or 0.0 for _, mean in points]
    with_intervals = any(halves) and (place < _WITH_INTERVALS or not several)
    error = {"array": halves, "color": colour, "thickness": 1, "width": 3} if with_intervals else None
    values = [mean.mean for _, mean in points]
    positions: dict[str, Any] = (
        {"x": [ratio for ratio, _ in points], "y": values, "error_y": error}
        if several
        else {"x": values, "y": [place], "error_x": error}
    )
    figure.add_scatter(
        **positions,
        mode="lines+markers",
        name=f"{place + 1}  {label(method.label)}" if highlighted else "other methods",
        legendrank=place + 1,
        legendgroup=f"{place}" if highlighted else "other",
        showlegend=place <= len(STYLES),
        line={"color": colour, "dash": dash, "width": 2 if highlighted else 1},
        marker={"symbol": symbol, "size": 8 if highlighted or not several else 4},
        hovertext=[describe(method.label, ratio, format_interval(mean, ".4f")) for ratio, mean in points],
        hoverinfo="text",
    )


def plot_quality_by_cost(points: Sequence[Point], dense: float | None, cost: str, data: str) -> Any:
    """Return all points by cost (a share of the dense model's) and perplexity; the front is joined and numbered."""
    figure = new_figure(f"Perplexity, {plain_text(data)}", height=480, legend="to remove ")
    front = sorted((point for point in points if point.front), key=lambda point: point.front or 0)
    figure.add_scatter(
        x=[point.cost.mean for point in front],
        y=[point.quality.mean for point in front],
        mode="lines",
        line={"shape": "hv", "color": INK, "width": 1},
        name="Pareto front",
        hoverinfo="skip",
    )
    for place, ratio in enumerate(sorted({point.group.ratio for point in points})):
        colour, symbol, _ = STYLES[place % len(STYLES)]
        of_ratio = [point for point in points if point.group.ratio == ratio]
        figure.add_scatter(
            x=[point.cost.mean for point in of_ratio],
            y=[point.quality.mean for point in of_ratio],
            mode="markers+text",
            name=percent(ratio),
            text=[f"<b>{point.front}</b>" if point.front else "" for point in of_ratio],
            textfont={"color": "white", "size": 10},
            marker={
                "color": colour,
                "symbol": ["circle" if point.front else symbol for point in of_ratio],
                "size": [18 if point.front else 7 for point in of_ratio],
                "opacity": [1 if point.front else 0.55 for point in of_ratio],
            },
            hovertext=[
                describe(
                    point.group.method.label,
                    ratio,
                    f"perplexity {format_interval(point.quality, '.4g')}",
                    f"{percent(point.cost.mean)} of the dense {cost}",
                )
                for point in of_ratio
            ],
            hoverinfo="text",
        )
    values = [point.quality.mean for point in points]
    if dense is not None:
        star = {"symbol": "star", "size": 14, "color": INK}
        figure.add_scatter(x=[1.0], y=[dense], mode="markers", name="dense", marker=star)
        values.append(dense)
    set_value_axis(figure.layout.yaxis, values)
    figure.update_xaxes(title=f"{cost}, share of the dense model's", tickformat=".0%")
    return figure


# --- heat maps --------------------------------------------------------------------------------------------------------


class _Cell(NamedTuple):
    """A cell of a heat map: its value, the text in it, and the text under the mouse."""

    value: float = math.nan
    text: str = ""
    hover: str = ""


def _heatmap(
    title: str,
    rows: Sequence[str],
    columns: Sequence[object],
    cells: Sequence[Sequence[_Cell]],
    colours: object,
    limits: tuple[float, float],
    *,
    scale: bool = False,
) -> Any:
    """Return values as colours between two ``limits``, with their text; only finite values have a colour."""
    figure = new_figure(title, height=max(170, 120 + 27 * len(rows) + (35 if scale else 0)))
    figure.add_heatmap(
        z=[[cell.value if math.isfinite(cell.value) else None for cell in row] for row in cells],
        text=[[cell.text for cell in row] for row in cells],
        hovertext=[[cell.hover for cell in row] for row in cells],
        texttemplate="%{text}",
        hoverinfo="text",
        hoverongaps=False,
        colorscale=colours,
        zmin=limits[0],
        zmax=limits[1],
        xgap=1,
        ygap=1,
        showscale=scale,
        colorbar={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "thickness": 8, "nticks": 5},
    )
    step = math.ceil(len(columns) / 12) if all(isinstance(column, int) for column in columns) else 1
    shown = [*range(0, len(columns), step)]
    figure.update_xaxes(tickvals=shown, ticktext=[columns[place] for place in shown], ticklabeloverflow="allow")
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(tickvals=[*range(len(rows))], ticktext=rows, showgrid=False, range=(len(rows) - 0.5, -0.5))
    return figure


def plot_grid(grid: AxisGrid, ratio: float, read: Read, finite: Sequence[float]) -> Any:
    """Return one ratio of a grid, coloured by where each loss lies among the ``finite`` ones of that ratio.

    The colours are logarithmic where the losses span a factor of 4 or more; the lowest is bold.
    """
    low, high = min(finite), max(finite)
    scale = math.log if low > 0 and high / low >= 4 else float

    def to_cell(group: Group | None) -> _Cell:
        mean = group.interval(read) if group else None
        if group is None or mean is None:
            return _Cell(text="failed" if group and group.failed else "")
        hover = describe(group.method.label, ratio, format_interval(mean, ".4f"))
        if not math.isfinite(mean.mean):
            return _Cell(text="NaN" if math.isnan(mean.mean) else "∞", hover=hover)
        text = f"{mean.mean:.3f}"
        return _Cell(scale(mean.mean), f"<b>{text}</b>" if mean.mean == low else text, hover)

    return _heatmap(
        ", ".join([f"{percent(ratio)} to remove", *map(plain_text, grid.fixed)]),
        [*map(label, grid.rows)],
        [label(name).replace(":", ":<br>") for name in grid.columns],
        [[to_cell(group) for group in row] for row in grid.groups[ratio]],
        _LOSS_COLOURS,
        (scale(low), scale(high) if high > low else scale(low) + 1),
    )


def plot_kept_widths(rows: Sequence[WidthRow], ratio: float, reach: float) -> Any:
    """Return a row per allocation and a column per block, coloured by the distance from the row's mean.

    ``reach`` is the distance, a share of the channels, that has the darkest colour.
    """
    blocks = [*rows[0].kept]

    def to_cells(row: WidthRow) -> list[_Cell]:
        mean = statistics.fmean(row.kept.values())
        return [
            _Cell(
                100 * (share - mean),
                f"{100 * share:.0f}" if len(blocks) <= _FEW_BLOCKS else "",
                f"{plain_text(row.label)}<br>block {block} keeps {percent(share)}",
            )
            for block, share in row.kept.items()
        ]

    cells = [to_cells(row) for row in rows]
    labels, limits = [label(row.label) for row in rows], (-100 * reach, 100 * reach)
    figure = _heatmap(f"{percent(ratio)} to remove", labels, blocks, cells, "PuOr", limits, scale=True)
    return figure.update_xaxes(title="block")


def plot_agreement(
    criteria: Sequence[str], names: Mapping[str, str], values: Mapping[tuple[str, str], float], ratio: str | None
) -> Any:
    """Return every two criteria against each other: overlaps at ``ratio``, or without one rank correlations."""
    rows, columns = criteria[1:], criteria[:-1]

    def to_cell(row: str, column: str) -> _Cell:
        value = _lookup(values, row, column)
        text = ">.99" if 0.995 <= value < 1 else f"{value:.2f}"  # not quite 1
        return _Cell(value, text, f"{plain_text(names[row])}<br>{plain_text(names[column])}<br>{value:.3f}")

    return _heatmap(
        agreement_title(ratio),
        [label(names[name]) for name in rows],
        [label(names[name]).replace(":", ":<br>") for name in columns],
        [
            [to_cell(row, column) if place <= number else _Cell() for place, column in enumerate(columns)]
            for number, row in enumerate(rows)
        ],
        *_agreement_colours(ratio),
    )


def plot_agreement_by_block(pairs: Sequence[Pair], names: Mapping[str, str], ratio: str | None) -> Any:
    """Return a column per block and a row per pair of criteria, or per criterion where the pairs are many.

    The values are overlaps at ``ratio``, or without one rank correlations.
    """
    blocks = sorted({block for pair in pairs for block in pair.correlation})
    rows = _pair_rows(pairs, names)

    def to_cell(name: str, held: Sequence[Pair], block: int) -> _Cell:
        by_block = [pair.correlation if ratio is None else pair.overlap.get(ratio, {}) for pair in held]
        values = [values[block] for values in by_block if math.isfinite(values.get(block, math.nan))]
        mean = statistics.fmean(values) if values else math.nan
        return _Cell(mean, hover=f"{name}<br>block {block}<br>{mean:.3f}")

    labels, cells = [name for name, _ in rows], [[to_cell(*row, block) for block in blocks] for row in rows]
    figure = _heatmap(agreement_title(ratio), labels, blocks, cells, *_agreement_colours(ratio), scale=True)
    return figure.update_xaxes(title="block")


def _agreement_colours(ratio: str | None) -> tuple[object, tuple[float, float]]:
    """Return the colours and limits of correlations, or of shares at a ratio."""
    return ("RdBu", (-1.0, 1.0)) if ratio is None else (_SHARE_COLOURS, (0.0, 1.0))


def agreement_title(ratio: str | None) -> str:
    """Name a measure of agreement: the overlap at a ratio, or without one the rank correlation."""
    return "rank correlation" if ratio is None else f"overlap, {percent(float(ratio))} removed"


def _pair_rows(pairs: Sequence[Pair], names: Mapping[str, str]) -> list[tuple[str, list[Pair]]]:
    if len(pairs) > _MANY_PAIRS:
        return [
            (f"{label(names[name])}, others", [pair for pair in pairs if name in (pair.first, pair.second)])
            for name in order_by_similarity(pairs)
        ]
    ordered = sorted(pairs, key=lambda pair: -pair.mean_correlation)
    return [(label(f"{names[pair.first]} · {names[pair.second]}"), [pair]) for pair in ordered]


def order_by_similarity(pairs: Sequence[Pair]) -> list[str]:
    """Return the criteria so that similar ones are neighbours: the leaves of average-linkage clustering."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    criteria = list(dict.fromkeys(name for pair in pairs for name in (pair.first, pair.second)))
    if len(criteria) < 3:
        return criteria
    values = {(pair.first, pair.second): pair.mean_correlation for pair in pairs}
    distances = [
        1 - _lookup(values, first, second)
        for place, first in enumerate(criteria)
        for second in criteria[place + 1 :]
    ]  # fmt: skip
    usable = [distance if math.isfinite(distance) else 1.0 for distance in distances]
    return [criteria[place] for place in leaves_list(linkage(usable, "average", optimal_ordering=True))]


def _lookup(values: Mapping[tuple[str, str], float], first: str, second: str) -> float:
    return values.get((first, second), values.get((second, first), math.nan))
