"""Summarise a sweep's cells: methods, means over seeds with confidence intervals, the best, and the Pareto front.

Pure functions of ``SweepResults``. Every mean is an arithmetic mean over seeds; its confidence is Student's interval,
which assumes that seeds scatter normally and needs two of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from cfsp_framework.ablation.results import CellResult, CellSpec, Quality, SweepResults

CONFIDENCE = 0.95

_FIELDS = ("criterion", "allocator", "compensator", "recovery", "samples")
"""Fields that distinguish methods of one name, in the order of a label."""


@dataclass(frozen=True)
class Interval:
    """The mean of ``count`` values; the true mean lies within ``half`` of it with 95 % confidence."""

    mean: float
    half: float | None
    """None for a single value, and where a value is not finite."""
    count: int


@dataclass(frozen=True)
class Method:
    """The common part of cells that differ in ratio and seed only."""

    label: str
    """Unique in the sweep: the row's name, and what distinguishes it from other methods of that name."""
    row: str
    criterion: str
    allocator: str
    compensator: str
    recovery: str
    samples: int


@dataclass(frozen=True)
class Group:
    """The cells of one method and one ratio, which differ in their seeds."""

    method: Method
    ratio: float
    cells: tuple[CellResult, ...]
    """By seed."""

    @cached_property
    def done(self) -> tuple[CellResult, ...]:
        """Cells with a result."""
        return tuple(cell for cell in self.cells if cell.status == "done")

    @cached_property
    def failed(self) -> tuple[CellResult, ...]:
        """Cells with an error."""
        return tuple(cell for cell in self.cells if cell.status == "failed")

    def interval(self, read: Callable[[CellResult], float | None]) -> Interval | None:
        """Return the mean over seeds of a value of each finished cell; None where no cell has it."""
        return interval(value for cell in self.done if (value := read(cell)) is not None)

    def finite(self, read: Callable[[CellResult], float | None]) -> Interval | None:
        """Return the mean over seeds, or None where it is not finite or no cell has the value."""
        mean = self.interval(read)
        return mean if mean is not None and math.isfinite(mean.mean) else None


@dataclass(frozen=True)
class Best:
    """The best method at one ratio, and the one after it."""

    group: Group
    perplexity: Interval
    second: Group | None
    margin: Interval | None
    """Loss of the second minus loss of the best, in nats per token, paired by seed; None where they share no seed."""

    @property
    def clear(self) -> bool:
        """Whether the margin's interval excludes 0."""
        return self.margin is not None and self.margin.half is not None and self.margin.mean > self.margin.half


@dataclass(frozen=True)
class AxisGrid:
    """Two axes of a sweep against each other at every ratio, everything else fixed."""

    fixed: tuple[str, ...]
    """Short names of the choices on the other axes that have several values."""
    row_axis: str
    column_axis: str
    rows: tuple[str, ...]
    """Short names, the best on average first, calibration sizes ascending; likewise the columns."""
    columns: tuple[str, ...]
    groups: dict[float, tuple[tuple[Group | None, ...], ...]]
    """By ratio, row and column; None without a cell."""


@dataclass(frozen=True)
class Pair:
    """How alike two criteria rank channels, averaged over seeds and over the feed-forwards of each block."""

    first: str
    second: str
    correlation: dict[int, float]
    """Spearman's, by block."""
    overlap: dict[str, dict[int, float]]
    """By ratio, then by block."""

    @property
    def mean_correlation(self) -> float:
        """Rank correlation averaged over blocks."""
        return statistics.fmean(self.correlation.values())

    def mean_overlap(self, ratio: str) -> float | None:
        """Return the overlap averaged over blocks; None where it was not measured at this ratio."""
        return statistics.fmean(self.overlap[ratio].values()) if self.overlap.get(ratio) else None


# --- cells, groups, methods -------------------------------------------------------------------------------------------


def groups(results: SweepResults) -> tuple[Group, ...]:
    """Group all cells by method and ratio; methods in the order of their first cells, ratios ascending."""
    named = methods(cell.spec for cell in results.cells)
    order = {method: place for place, method in enumerate(dict.fromkeys(named.values()))}
    together: dict[tuple[int, float], list[CellResult]] = {}
    for cell in results.cells:
        together.setdefault((order[named[_identity(cell.spec)]], cell.spec.ratio), []).append(cell)
    by_place = list(order)
    return tuple(
        Group(by_place[place], ratio, tuple(sorted(cells, key=lambda cell: cell.spec.seed)))
        for (place, ratio), cells in sorted(together.items(), key=lambda item: item[0])
    )


def methods(specs: Iterable[CellSpec]) -> dict[tuple[str, ...], Method]:
    """Return every method by its identity; labels of rows with one name also give what differs between them."""
    identities = list(dict.fromkeys(map(_identity, specs)))
    by_row: dict[str, list[tuple[str, ...]]] = {}
    for identity in identities:
        by_row.setdefault(identity[0], []).append(identity)
    shortened = [short_labels(identity[place + 1] for identity in identities) for place in range(4)]
    return {
        identity: Method(
            label=_label(identity, by_row[identity[0]], shortened),
            row=identity[0],
            criterion=identity[1],
            allocator=identity[2],
            compensator=identity[3],
            recovery=identity[4],
            samples=int(identity[5]),
        )
        for identity in identities
    }


def _identity(spec: CellSpec) -> tuple[str, ...]:
    return (spec.row, *(str(getattr(spec, name)) for name in _FIELDS))


def _label(
    identity: tuple[str, ...], namesakes: Sequence[tuple[str, ...]], shortened: Sequence[Mapping[str, str]]
) -> str:
    differing = [place for place in range(len(_FIELDS)) if len({other[place + 1] for other in namesakes}) > 1]
    details = [
        f"{identity[place + 1]} windows" if _FIELDS[place] == "samples" else shortened[place][identity[place + 1]]
        for place in differing
    ]
    return f"{identity[0]} ({', '.join(details)})" if details else identity[0]


def short_labels(specs: Iterable[str]) -> dict[str, str]:
    """Return each component, ``NAME:option=value,...``, as its name and the options that distinguish it from the others.

    ``cfsp:b=1.0,c=1`` and ``cfsp:b=2.0,c=1`` become ``cfsp:b=1.0`` and ``cfsp:b=2.0``, and a single ``flap:...``
    becomes ``flap``. No two components get one label.
    """
    known = list(dict.fromkeys(specs))
    by_name: dict[str, list[str]] = {}
    for spec in known:
        by_name.setdefault(spec.partition(":")[0], []).append(spec)
    labels = {spec: _short(spec, by_name[spec.partition(":")[0]]) for spec in known}
    often = [label for label in labels.values() if list(labels.values()).count(label) > 1]
    return {spec: spec if label in often else label for spec, label in labels.items()}


def _short(spec: str, namesakes: Sequence[str]) -> str:
    common = set.intersection(*(set(_options(namesake)) for namesake in namesakes))
    differing = [option for option in _options(spec) if option not in common]
    return ":".join([spec.partition(":")[0], *([",".join(differing)] if differing else [])])


def _options(spec: str) -> list[str]:
    options = spec.partition(":")[2]
    return options.split(",") if options else []


# --- numbers ----------------------------------------------------------------------------------------------------------


def interval(values: Iterable[float]) -> Interval | None:
    """Return the mean of some values and its 95 % confidence interval; None without values.

    ``half`` is ``t * s / sqrt(n)``, with ``t`` the 97.5 % quantile of Student's distribution with n - 1 degrees of
    freedom and ``s`` the standard deviation with n - 1 in its denominator.
    """
    sample = list(values)
    if not sample:
        return None
    if not all(map(math.isfinite, sample)):
        return Interval(sum(sample), None, len(sample))  # inf, or NaN where a value is NaN
    if len(sample) == 1:
        return Interval(sample[0], None, 1)
    from scipy.special import stdtrit

    quantile = float(stdtrit(len(sample) - 1, (1 + CONFIDENCE) / 2))
    half = quantile * statistics.stdev(sample) / math.sqrt(len(sample))
    return Interval(statistics.mean(sample), half, len(sample))


def data_specs(results: SweepResults) -> tuple[str, ...]:
    """Return the evaluation SPECs in the order of the options; methods are ranked by the first."""
    measured = (quality.data for cell in results.cells for quality in cell.qualities)
    return tuple(dict.fromkeys([*(quality.data for quality in results.dense), *measured]))


def task_metrics(results: SweepResults) -> tuple[tuple[str, str], ...]:
    """Return every pair of task and metric that some cell has, in the order of occurrence."""
    scored = [results.dense_tasks, *(cell.tasks for cell in results.cells)]
    return tuple(
        dict.fromkeys((task, metric) for tasks in scored for task, metrics in tasks.items() for metric in metrics)
    )


def quality(cell: CellResult, data: str) -> Quality | None:
    """Return a cell's quality on one data SPEC, where it was measured."""
    return next((measured for measured in cell.qualities if measured.data == data), None)


def dense_quality(results: SweepResults, data: str) -> Quality | None:
    """Return the dense model's quality on one data SPEC, where it was measured."""
    return next((measured for measured in results.dense if measured.data == data), None)


def perplexity(cell: CellResult, data: str) -> float | None:
    """Return a cell's perplexity on one data SPEC."""
    return getattr(quality(cell, data), "perplexity", None)


def nll(cell: CellResult, data: str) -> float | None:
    """Return a cell's loss on one data SPEC, in nats per token."""
    return getattr(quality(cell, data), "nll", None)


def excess_nll(cell: CellResult, results: SweepResults, data: str) -> float | None:
    """Return a cell's loss minus the dense model's, in nats per token; None where either was not measured."""
    loss, dense = nll(cell, data), dense_quality(results, data)
    return None if loss is None or dense is None else loss - dense.nll


def bits_per_byte(cell: CellResult, data: str) -> float | None:
    """Return a cell's bits per byte on one data SPEC."""
    return getattr(quality(cell, data), "bits_per_byte", None)


def kept_parameters(cell: CellResult) -> float | None:
    """Return the share of all parameters that a cell's model keeps."""
    return None if cell.parameter_ratio is None else 1 - cell.parameter_ratio


def relative_latency(cell: CellResult) -> float | None:
    """Return a cell's latency divided by the dense model's, both measured in one run."""
    return None if cell.latency is None else cell.latency.milliseconds / cell.latency.dense_milliseconds


# --- comparisons ------------------------------------------------------------------------------------------------------


def ranked(members: Sequence[Group], data: str) -> tuple[Group, ...]:
    """Return the groups with a finite loss on ``data``, the lowest mean first; equal ones in the given order."""
    measured = ((group.finite(lambda cell: nll(cell, data)), group) for group in members)
    finite = [(mean.mean, group) for mean, group in measured if mean]
    return tuple(group for _, group in sorted(finite, key=lambda pair: pair[0]))


def best_means(
    members: Sequence[Group], read: Callable[[CellResult], float | None], better: Callable[[Sequence[float]], float]
) -> dict[float, float]:
    """Return the best finite mean of each ratio that has several."""
    means: dict[float, list[float]] = {}
    for group in members:
        if mean := group.finite(read):
            means.setdefault(group.ratio, []).append(mean.mean)
    return {ratio: better(values) for ratio, values in means.items() if len(values) > 1}


def best_per_ratio(members: Sequence[Group], data: str) -> dict[float, Best]:
    """Return the method of lowest mean loss on ``data`` by ratio, ascending; ratios without a finite loss are left out."""
    best: dict[float, Best] = {}
    for ratio in sorted({group.ratio for group in members}):
        first, second, *_ = [*ranked([group for group in members if group.ratio == ratio], data), None, None]
        measured = first.interval(lambda cell: perplexity(cell, data)) if first else None
        if first is not None and measured is not None:
            margin = paired_difference(second, first, data) if second else None
            best[ratio] = Best(first, measured, second, margin)
    return best


def paired_difference(first: Group, second: Group, data: str) -> Interval | None:
    """Return the loss of ``first`` minus that of ``second`` in nats per token, over the seeds that both have.

    Cells of one seed saw the same calibration windows, so their difference scatters less than either of them.
    """
    losses = {cell.spec.seed: nll(cell, data) for cell in second.done}
    both = ((nll(cell, data), losses.get(cell.spec.seed)) for cell in first.done)
    return interval(a - b for a, b in both if a is not None and b is not None)


def by_quality(members: Sequence[Group], data: str) -> tuple[Method, ...]:
    """Return all methods, the best first: by their mean rank among the methods of each ratio.

    A method without a finite result at a ratio is last there, so that failing is never better. Equal ones stay in the
    given order.
    """
    every = list(dict.fromkeys(group.method for group in members))
    places: dict[Method, list[int]] = {method: [] for method in every}
    for ratio in {group.ratio for group in members}:
        order = [group.method for group in ranked([group for group in members if group.ratio == ratio], data)]
        place_of = {method: place for place, method in enumerate(order)}
        for method in every:
            places[method].append(place_of.get(method, len(every)))
    return tuple(sorted(every, key=lambda method: statistics.fmean(places[method])))


def grids(members: Sequence[Group], data: str) -> tuple[AxisGrid, ...]:
    """Arrange the sweep as grids, where two or more axes have several values: the longest as rows, the next as columns.

    Grids of which the sweep fills less than three fifths are left out: those are named rows.
    """
    order = by_quality(members, data)
    every = {name: list(dict.fromkeys(str(getattr(method, name)) for method in order)) for name in _FIELDS}
    axes = sorted((name for name in _FIELDS if len(every[name]) > 1), key=lambda name: -len(every[name]))
    if len(axes) < 2:
        return ()
    down, across, *rest = axes
    short = {name: short_labels(every[name]) for name in axes}
    slices: dict[tuple[str, ...], list[Group]] = {}
    for group in members:
        slices.setdefault(tuple(short[name][str(getattr(group.method, name))] for name in rest), []).append(group)
    place_of = {method: place for place, method in enumerate(order)}
    arranged = []
    for fixed, held in slices.items():
        rows, columns = _in_order(down, held, place_of), _in_order(across, held, place_of)
        ratios = sorted({group.ratio for group in held})
        by_place = {(g.ratio, str(getattr(g.method, down)), str(getattr(g.method, across))): g for g in reversed(held)}
        if min(len(rows), len(columns)) > 1 and len(by_place) >= 0.6 * len(ratios) * len(rows) * len(columns):
            cells = {
                ratio: tuple(tuple(by_place.get((ratio, row, column)) for column in columns) for row in rows)
                for ratio in ratios
            }
            names = tuple(short[down][row] for row in rows), tuple(short[across][column] for column in columns)
            arranged.append(AxisGrid(fixed, down, across, *names, cells))
    return tuple(arranged)


def _in_order(axis: str, held: Sequence[Group], place_of: Mapping[Method, int]) -> list[str]:
    """Order an axis's distinct values by the mean rank of their methods; calibration sizes by size."""
    places: dict[str, list[int]] = {}
    for group in held:
        places.setdefault(str(getattr(group.method, axis)), []).append(place_of[group.method])
    return sorted(places, key=int if axis == "samples" else lambda name: statistics.fmean(places[name]))


def pareto_front(points: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """Return the points that no other beats, lower being better in both coordinates; indices by the first coordinate.

    A point is beaten by one that is at least as good in both coordinates and better in one. Points that are not finite are
    never on the front.
    """
    usable = [place for place, point in enumerate(points) if all(map(math.isfinite, point))]
    front: list[int] = []
    for place in sorted(usable, key=lambda place: points[place]):
        if not front or points[place][1] < points[front[-1]][1] or points[place] == points[front[-1]]:
            front.append(place)
    return tuple(front)


def agreement_pairs(results: SweepResults) -> tuple[Pair, ...]:
    """Average the agreements of every two criteria over seeds and feed-forwards."""
    correlations: dict[tuple[str, str], dict[int, list[float]]] = {}
    overlaps: dict[tuple[str, str], dict[str, dict[int, list[float]]]] = {}
    for agreement in results.agreements:
        first, second = agreement.first, agreement.second
        pair = (second, first) if (second, first) in correlations else (first, second)
        correlations.setdefault(pair, {}).setdefault(agreement.block, []).append(agreement.rank_correlation)
        for ratio, share in agreement.overlap.items():
            overlaps.setdefault(pair, {}).setdefault(ratio, {}).setdefault(agreement.block, []).append(share)
    return tuple(
        Pair(
            first,
            second,
            _means(by_block),
            {ratio: _means(shares) for ratio, shares in overlaps.get((first, second), {}).items()},
        )
        for (first, second), by_block in correlations.items()
    )


def _means(by_block: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {block: statistics.fmean(values) for block, values in sorted(by_block.items())}


def kept_by_block(cell: CellResult, results: SweepResults) -> dict[int, float]:
    """Return the share of channels that each block keeps, all its feed-forwards together; empty for a failed cell."""
    if not cell.widths:
        return {}
    before: dict[int, int] = {}
    after: dict[int, int] = {}
    for (block, _), dense, width in zip(results.places, results.widths, cell.widths, strict=True):
        before[block] = before.get(block, 0) + dense
        after[block] = after.get(block, 0) + width
    return {block: after[block] / before[block] for block in before}


def mean_kept(group: Group, results: SweepResults) -> dict[int, float]:
    """Average ``kept_by_block`` over a group's seeds."""
    shares = [kept for cell in group.done if (kept := kept_by_block(cell, results))]
    return {block: statistics.fmean(kept[block] for kept in shares) for block in shares[0]} if shares else {}
