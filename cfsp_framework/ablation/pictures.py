"""The pictures of a sweep, each as one SVG element."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cfsp_framework.ablation.drawing import (
    ACCENT,
    HIGHLIGHTS,
    INK,
    MUTED,
    SOFT,
    dodge,
    page_style,
    percent,
    shortened,
    to_svg,
    use_log_axis,
    use_share_axis,
)
from cfsp_framework.ablation.summary import Group, Interval, Method, Pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from cfsp_framework.ablation.results import CellResult

_WIDTH = 11.0
"""Inches of a picture as wide as the page."""
_AXIS = "share of {} to remove"
_MANY_PAIRS = 45
"""Of criteria: as many rows as can be read, those of ten."""

_WITH_CONFIDENCE = 3
"""Methods whose intervals are drawn; more would hide each other."""

WIDTH_COLOURS, AGREEMENT_COLOURS, SHARE_COLOURS = "PuOr", "RdBu", "Blues"


@dataclass(frozen=True)
class Point:
    """One cell of the picture of quality against cost."""

    group: Group
    cost: Interval
    quality: Interval
    front: int | None
    """Its number on the Pareto front, from 1; None where another cell beats it."""


@dataclass(frozen=True)
class WidthRow:
    """What each block keeps at one ratio, by one or several methods."""

    label: str
    kept: dict[int, float]


# --- quality against ratio --------------------------------------------------------------------------------------------


def quality_by_ratio(
    found: Sequence[Group],
    order: Sequence[Method],
    panels: Sequence[tuple[str, Callable[[CellResult], float | None], float | None]],
    counted: str,
    name: str,
) -> str:
    """A panel for each measure (title, how to read it, the dense model's): lines over ratios, the best few in colour.

    With a single ratio, a row for each method instead, the best at the top.
    """
    if len({group.ratio for group in found}) == 1:
        return _quality_at_one_ratio(found, order, panels, name)
    from matplotlib.figure import Figure

    with page_style():
        figure = Figure(figsize=(_WIDTH, 4.3))
        left, right = 0.05, 0.76
        gap = 0.055
        width = (right - left - gap * (len(panels) - 1)) / len(panels)
        for place, (title, read, dense) in enumerate(panels):
            axes = figure.add_axes((left + place * (width + gap), 0.12, width, 0.79))
            lines = _curves(found, order, read)
            _draw_curves(axes, lines, order)
            _finish(axes, title, lines, dense)
            axes.set_xlabel(_AXIS.format(counted))
            if place == len(panels) - 1:
                _label_ends(axes, lines, order)
        titles = {f"series-{place}": method.label for place, method in enumerate(order)}
        return to_svg(figure, name, f"{' and '.join(title for title, *_ in panels)} against the ratio", titles)


def _curves(
    found: Sequence[Group], order: Sequence[Method], read: Callable[[CellResult], float | None]
) -> dict[Method, list[tuple[float, Interval]]]:
    curves: dict[Method, list[tuple[float, Interval]]] = {method: [] for method in order}
    for group in found:
        measured = group.interval(read)
        if measured is not None and math.isfinite(measured.mean):
            curves[group.method].append((group.ratio, measured))
    return curves


def _draw_curves(
    axes: Axes, curves: Mapping[Method, Sequence[tuple[float, Interval]]], order: Sequence[Method]
) -> None:
    for place, method in reversed(list(enumerate(order))):
        if not curves[method]:
            continue
        ratios, means = zip(*((ratio, one.mean) for ratio, one in curves[method]), strict=True)
        if place >= len(HIGHLIGHTS):
            axes.plot(ratios, means, color=MUTED, linewidth=0.9, marker=".", markersize=3, gid=f"series-{place}")
            continue
        colour, marker, line = HIGHLIGHTS[place]
        if place < _WITH_CONFIDENCE and any(one.half for _, one in curves[method]):
            spread = [one.half or 0.0 for _, one in curves[method]]
            axes.errorbar(
                ratios, means, yerr=spread, color=colour, linestyle="", elinewidth=1, capsize=2.5, capthick=1, alpha=0.7,
                gid=f"series-{place}-spread", zorder=2,
            )  # fmt: skip
        axes.plot(
            ratios, means, color=colour, linewidth=1.6, marker=marker, markersize=4.5, linestyle=line,
            markeredgecolor="white", markeredgewidth=0.6, gid=f"series-{place}", zorder=3,
        )  # fmt: skip


def _finish(
    axes: Axes, title: str, curves: Mapping[Method, Sequence[tuple[float, Interval]]], dense: float | None
) -> None:
    values = [one.mean for curve in curves.values() for _, one in curve]
    ratios = sorted({ratio for curve in curves.values() for ratio, _ in curve})
    if dense is not None and dense > 0:
        axes.axhline(dense, color=INK, linewidth=0.9, linestyle=":")
        axes.annotate(
            "dense", (1, dense), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
            color=SOFT, fontsize=8, ha="right",
        )  # fmt: skip
        values.append(dense)
    logarithmic = bool(values) and min(values) > 0 and max(values) / min(values) > 3
    if values:
        axes.set_ylim(*_limits(values, logarithmic=logarithmic))  # by the means: an interval of two seeds may be huge
    if logarithmic:
        use_log_axis(axes, values)
    axes.set_title(f"{title}, logarithmic" if logarithmic else title)
    axes.grid(visible=False, axis="x")
    if ratios:
        axes.set_xticks(ratios if len(ratios) <= 9 else ratios[:: math.ceil(len(ratios) / 9)])
    use_share_axis(axes)


def _limits(values: Sequence[float], *, logarithmic: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if logarithmic:
        room = (high / low) ** 0.06
        return low / room, high * room
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _label_ends(axes: Axes, curves: Mapping[Method, Sequence[tuple[float, Interval]]], order: Sequence[Method]) -> None:
    """The names of the best few at the right ends of their lines, moved apart."""
    ends = [(place, curves[method][-1]) for place, method in enumerate(order[: len(HIGHLIGHTS)]) if curves[method]]
    axes.get_ylim()  # makes matplotlib settle what its transforms depend on
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((ratio, one.mean))[1]) for _, (ratio, one) in ends]
    for (place, (ratio, one)), height in zip(ends, dodge(wanted, 0.056), strict=True):
        axes.annotate(
            f"{place + 1}  {shortened(order[place].label, 38)}", (ratio, one.mean), xytext=(1.03, height), textcoords="axes fraction",
            color=HIGHLIGHTS[place][0], va="center", fontsize=8.5, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": HIGHLIGHTS[place][0], "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def _quality_at_one_ratio(
    found: Sequence[Group],
    order: Sequence[Method],
    panels: Sequence[tuple[str, Callable[[CellResult], float | None], float | None]],
    name: str,
) -> str:
    from matplotlib.figure import Figure

    with page_style():
        height = max(1.4, 0.21 * len(order) + 0.75)
        longest = min(44, max(len(method.label) for method in order))
        left, right, gap = 0.015 + 0.0072 * longest, 0.985, 0.03
        width = (right - left - gap * (len(panels) - 1)) / len(panels)
        figure = Figure(figsize=(_WIDTH, height))
        by_method = {group.method: group for group in found}
        for number, (title, read, dense) in enumerate(panels):
            axes = figure.add_axes((left + number * (width + gap), 0.36 / height, width, 1 - 0.64 / height))
            values = []
            for place, method in enumerate(order):
                measured = by_method[method].interval(read) if method in by_method else None
                if measured is None or not math.isfinite(measured.mean):
                    continue
                colour, marker, _ = HIGHLIGHTS[place] if place < len(HIGHLIGHTS) else (SOFT, "o", "")
                axes.errorbar(
                    measured.mean, place, xerr=measured.half, color=colour, marker=marker, markersize=5,
                    linewidth=1.2, gid=f"series-{place}",
                )  # fmt: skip
                values.append(measured.mean)
            if dense is not None:
                axes.axvline(dense, color=INK, linewidth=0.9, linestyle=":")
                values.append(dense)
            if values and min(values) > 0 and max(values) / min(values) > 20:
                axes.set_xscale("log")
                title += ", logarithmic"
            axes.set_title(title + (f"; dense {dense:.4g}" if dense else ""))
            axes.set_ylim(len(order) - 0.4, -0.6)
            axes.set_yticks(range(len(order)), [shortened(method.label, 44) for method in order] if number == 0 else [])
            if number:
                axes.set_yticks(range(len(order)), [""] * len(order))
        return to_svg(figure, name, f"{' and '.join(title for title, *_ in panels)} of each method")


# --- quality against cost ---------------------------------------------------------------------------------------------


def quality_by_cost(points: Sequence[Point], dense: float | None, cost: str, data: str) -> str:
    """Every cell by what it costs (a share of the dense model's) and its perplexity; the front joined and numbered."""
    from matplotlib.figure import Figure

    ratios = sorted({point.group.ratio for point in points})
    with page_style():
        figure = Figure(figsize=(7.0, 4.4))
        axes = figure.add_axes((0.075, 0.115, 0.905, 0.81))
        for place, ratio in enumerate(ratios):
            colour, marker, _ = HIGHLIGHTS[place % len(HIGHLIGHTS)]
            here = [point for point in points if point.group.ratio == ratio]
            axes.plot(
                [point.cost.mean for point in here], [point.quality.mean for point in here], linestyle="",
                marker=marker, markersize=4.5, color=colour, alpha=0.55, markeredgewidth=0, label=f"{percent(ratio)}",
            )  # fmt: skip
        front = sorted((point for point in points if point.front), key=lambda point: point.front or 0)
        axes.step(
            [point.cost.mean for point in front], [point.quality.mean for point in front], where="post", color=INK,
            linewidth=0.9, zorder=1,
        )  # fmt: skip
        for point in front:
            colour, marker, _ = HIGHLIGHTS[ratios.index(point.group.ratio) % len(HIGHLIGHTS)]
            axes.plot(
                point.cost.mean, point.quality.mean, marker="o", markersize=11, color=colour, markeredgecolor="white",
                markeredgewidth=1, zorder=4, gid=f"series-{1000 + (point.front or 0)}",
            )  # fmt: skip
            axes.annotate(
                str(point.front), (point.cost.mean, point.quality.mean), color="white", fontsize=7, ha="center",
                va="center_baseline", zorder=5, fontweight="bold",
            )  # fmt: skip
        values = [point.quality.mean for point in points]
        if dense is not None:
            axes.plot(1.0, dense, marker="*", markersize=12, color=INK, linestyle="")
            axes.annotate("dense", (1.0, dense), xytext=(-9, 0), textcoords="offset points", ha="right", va="center")
            values.append(dense)
        if max(values) / min(values) > 3:
            use_log_axis(axes, values)
        axes.set_title(f"perplexity, {data}")
        axes.set_xlabel(f"{cost}, share of the dense model's")
        use_share_axis(axes)
        axes.legend(title="removed", frameon=False, loc="upper right", alignment="left", handletextpad=0.2)
        titles = {f"series-{1000 + (p.front or 0)}": f"{p.group.method.label}, {percent(p.group.ratio)}" for p in front}
        return to_svg(figure, "pareto", f"Perplexity against {cost}", titles)


# --- widths -----------------------------------------------------------------------------------------------------------


def widths_by_block(rows: Sequence[WidthRow], ratio: float, reach: float, name: str) -> str:
    """A row per allocation and a column per block, coloured by how far the block is from the row's mean.

    ``reach`` is the distance that has the darkest colour.
    """
    from matplotlib.figure import Figure

    blocks = list(rows[0].kept)
    with page_style():
        left = 0.2 + 0.062 * min(46, max(len(row.label) for row in rows))
        cell = min(0.33, (_WIDTH - left - 0.1) / len(blocks))
        wide, tall = max(cell * len(blocks), 1.3), 0.25 * len(rows)
        figure = Figure(figsize=(left + wide + 0.1, tall + 0.75))
        axes = _place(figure, left, 0.45, wide, tall)
        shares = [[row.kept[block] for block in blocks] for row in rows]
        distances = [[share - _mean(row.kept) for share in found] for row, found in zip(rows, shares, strict=True)]
        _heat(axes, distances, WIDTH_COLOURS, -reach, reach)
        if cell >= 0.26:
            dark = [[abs(distance) > 0.72 * reach for distance in found] for found in distances]
            _write_cells(axes, shares, lambda share: f"{share * 100:.0f}", dark)
        axes.set_title(f"{percent(ratio)} to remove")
        axes.set_yticks(range(len(rows)), [shortened(row.label, 46) for row in rows])
        _block_ticks(axes, blocks, wide)
        axes.set_xlabel("block")
        return to_svg(figure, name, f"Width of every block with {percent(ratio)} to remove")


def colour_key(colours: str, steps: int = 9) -> list[str]:
    """Evenly spaced colours of a scale, for a key beside the pictures."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps[colours](step / (steps - 1))) for step in range(steps)]


def _mean(kept: Mapping[int, float]) -> float:
    return sum(kept.values()) / len(kept)


# --- agreement --------------------------------------------------------------------------------------------------------


def agreement_matrix(
    criteria: Sequence[str], names: Mapping[str, str], values: Mapping[tuple[str, str], float], title: str, name: str
) -> str:
    """One number for every two criteria: a triangle whose diagonal carries the names, of rows and columns alike.

    Values below 0 are possible where ``title`` speaks of correlation; shares are between 0 and 1.
    """
    from matplotlib.figure import Figure

    signed = "correlation" in title
    side = 0.34 * (len(criteria) - 1)
    with page_style():
        longest = max(len(shortened(names[one], 26)) for one in criteria)
        figure = Figure(figsize=(max(side + 0.2 + 0.064 * longest, 0.12 + 0.088 * len(title)), side + 0.85))
        axes = _place(figure, 0.03, 0.08, side, side)
        matrix = [
            [_either(values, criteria[row], criteria[column]) if column < row else math.nan
             for column in range(len(criteria) - 1)]
            for row in range(1, len(criteria))
        ]  # fmt: skip
        _heat(axes, matrix, AGREEMENT_COLOURS if signed else SHARE_COLOURS, -1.0 if signed else 0.0, 1.0)
        dark = [[abs(value) > 0.62 for value in row] for row in matrix]
        _write_cells(axes, matrix, _decimals, dark)
        for row, one in enumerate(criteria):
            axes.text(row - 0.42, row - 1, shortened(names[one], 26), va="center_baseline", fontsize=8)
        axes.text(-0.5, -2.1, title, fontsize=9.5, fontweight="bold", va="center")
        axes.set_xticks([])
        axes.set_yticks([])
        return to_svg(figure, name, f"{title}, for every two criteria")


def _decimals(value: float) -> str:
    """Two decimals without the 0 before the point: .83, -.20; 1 for 1 alone."""
    if 0.995 <= value < 1:
        return ">.99"
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.0f}"


def agreement_by_block(pairs: Sequence[Pair], names: Mapping[str, str], ratios: Sequence[str]) -> str:
    """A column per block; a row for every two criteria, or, where those are many, for each criterion and all others."""
    from matplotlib.figure import Figure

    blocks = sorted({block for pair in pairs for block in pair.correlation})
    rows = _agreement_rows(pairs, names)
    panels: list[tuple[str, str, float, Callable[[Pair, int], float]]] = [
        ("rank correlation", AGREEMENT_COLOURS, -1.0, lambda pair, block: pair.correlation.get(block, math.nan))
    ]
    panels += [
        (f"overlap, {percent(float(ratio))} removed", SHARE_COLOURS, 0.0, _overlap_at(ratio)) for ratio in ratios
    ]
    with page_style():
        left, gap = 0.2 + 0.06 * max(len(label) for label, _ in rows), 0.22
        tall = min(0.2, 7.5 / len(rows)) * len(rows)
        wide = min((_WIDTH - left - 0.1) / len(panels) - gap, 0.42 * len(blocks))
        wide = max(wide, 1.0)
        figure = Figure(figsize=(left + (wide + gap) * len(panels), tall + 1.0))
        for place, (title, colours, low, read) in enumerate(panels):
            across = left + place * (wide + gap)
            axes = _place(figure, across, 0.7, wide, tall)
            matrix = [[_average([read(pair, block) for pair in found]) for block in blocks] for _, found in rows]
            image = _heat(axes, matrix, colours, low, 1.0)
            axes.set_title(shortened(title, max(16, int(wide / 0.075))))
            axes.set_yticks(range(len(rows)), [label if place == 0 else "" for label, _ in rows])
            axes.tick_params(axis="y", labelsize=8 if len(rows) <= 37 else 6.5)
            _block_ticks(axes, blocks, wide)
            axes.set_xlabel("block")
            figure.colorbar(image, cax=_place(figure, across, 0.2, min(wide, 1.6), 0.08), orientation="horizontal")
        return to_svg(figure, "agreement-blocks", "How alike the criteria rank channels, block by block")


def _agreement_rows(pairs: Sequence[Pair], names: Mapping[str, str]) -> list[tuple[str, list[Pair]]]:
    if len(pairs) > _MANY_PAIRS:
        return [
            (f"{shortened(names[one], 40)}, others", [pair for pair in pairs if one in (pair.first, pair.second)])
            for one in similar_first(pairs)
        ]
    ordered = sorted(pairs, key=lambda pair: -pair.mean_correlation)
    return [(f"{shortened(names[p.first], 24)} · {shortened(names[p.second], 24)}", [p]) for p in ordered]


def _overlap_at(ratio: str) -> Callable[[Pair, int], float]:
    return lambda pair, block: pair.overlap.get(ratio, {}).get(block, math.nan)


def similar_first(pairs: Sequence[Pair]) -> list[str]:
    """The criteria so that those that agree stand together: the leaves of average-linkage clustering, well ordered."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    criteria = list(dict.fromkeys(name for pair in pairs for name in (pair.first, pair.second)))
    if len(criteria) < 3:
        return criteria
    values = {(pair.first, pair.second): pair.mean_correlation for pair in pairs}
    distances = [
        1 - _either(values, first, second)
        for place, first in enumerate(criteria)
        for second in criteria[place + 1 :]
    ]  # fmt: skip
    usable = [distance if math.isfinite(distance) else 1.0 for distance in distances]
    return [criteria[place] for place in leaves_list(linkage(usable, "average", optimal_ordering=True))]


def _either(values: Mapping[tuple[str, str], float], first: str, second: str) -> float:
    return values.get((first, second), values.get((second, first), math.nan))


def _average(values: Sequence[float]) -> float:
    there = [value for value in values if math.isfinite(value)]
    return sum(there) / len(there) if there else math.nan


# --- heatmaps ---------------------------------------------------------------------------------------------------------


def _place(figure: Figure, left: float, bottom: float, wide: float, tall: float) -> Axes:
    """Axes at a place of the figure, in inches."""
    full, total = figure.get_size_inches()
    return figure.add_axes((left / full, bottom / total, wide / full, tall / total))


def _heat(axes: Axes, matrix: Sequence[Sequence[float]], colours: str, low: float, high: float) -> AxesImage:
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    chosen: Colormap = colormaps[colours]
    if colours == SHARE_COLOURS:  # up to where dark text and white text both can be read
        chosen = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#9cc3e6", ACCENT])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes.imshow(matrix, cmap=chosen, vmin=low, vmax=high, aspect="auto", interpolation="none")


def _write_cells(
    axes: Axes,
    matrix: Sequence[Sequence[float]],
    tell: Callable[[float], str],
    dark: Sequence[Sequence[bool]],
) -> None:
    """A number in every cell, light on ``dark`` ones."""
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            if math.isfinite(value):
                colour = "white" if dark[row][column] else INK
                axes.text(column, row, tell(value), ha="center", va="center_baseline", fontsize=7.5, color=colour)


def _block_ticks(axes: Axes, blocks: Sequence[int], wide: float) -> None:
    """As many of the blocks' numbers as have room."""
    every = max(1, math.ceil(len(blocks) * 0.24 / wide))
    for round_number in (1, 2, 5, 10, 20, 50, 100):
        if round_number >= every:
            every = round_number
            break
    shown = [place for place, block in enumerate(blocks) if block % every == 0]
    axes.set_xticks(shown, [str(blocks[place]) for place in shown])
