"""Means, intervals, labels, the best, the Pareto front and grids of a sweep."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cfsp_framework.ablation import summary
from cfsp_framework.ablation.results import Agreement
from helpers.sweeps import ALLOCATORS, CRITERIA, make_quality, make_sweep

untimed = settings(deadline=None)  # a busy machine is not a failure
finite = st.floats(-1e6, 1e6).map(lambda value: round(value, 6))


@untimed
@given(st.lists(finite, min_size=2, max_size=8))
def test_an_interval_is_students(values: list[float]) -> None:
    actual = summary.interval(values)
    assert actual is not None
    assert actual.half is not None
    scale = max(map(abs, values)) + 1e-300
    assert actual.count == len(values)
    assert actual.mean == pytest.approx(math.fsum(values) / len(values), abs=1e-12 * scale)
    if len({*values}) > 1 and actual.half > 1e-9 * scale:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=actual.mean, scale=stats.sem(values))
        assert (actual.mean - actual.half, actual.mean + actual.half) == pytest.approx(
            (low, high), rel=1e-6, abs=1e-9 * scale
        )


@given(finite)
def test_one_value_has_no_interval(value: float) -> None:
    assert summary.interval([value]) == summary.Interval(value, None, 1)
    assert summary.interval([]) is None


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_mean_over_a_value_that_is_not_finite_is_not_finite(bad: float) -> None:
    mean = summary.interval([1.0, bad, 2.0])
    assert mean is not None
    assert (math.isfinite(mean.mean), mean.half) == (False, None)


points = st.lists(st.tuples(*[st.integers(0, 6).map(float) | st.just(math.nan) | st.just(math.inf)] * 2), max_size=12)


@given(points)
def test_the_front_is_what_nothing_beats(actual: list[tuple[float, float]]) -> None:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    usable = [place for place, point in enumerate(actual) if all(map(math.isfinite, point))]
    expected = {place for place in usable if not any(beats(actual[other], actual[place]) for other in usable)}
    front = summary.pareto_front(actual)
    assert set(front) == expected
    assert len(front) == len(expected)
    assert [actual[place][0] for place in front] == sorted(actual[place][0] for place in front)


choices = st.builds(
    lambda name, options: ":".join([name, *([",".join(f"{k}={v}" for k, v in options.items())] if options else [])]),
    st.sampled_from(["cfsp", "flap", "obs"]),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 2), max_size=3),
)


@given(st.lists(choices, max_size=8))
def test_short_labels_tell_components_apart(specs: list[str]) -> None:
    labels = summary.short_labels(specs)
    assert len({*labels.values()}) == len({*specs}) == len(labels)
    assert all(label.partition(":")[0] == spec.partition(":")[0] for spec, label in labels.items())
    assert all(len(label) <= len(spec) for spec, label in labels.items())


def test_short_labels_keep_only_what_differs() -> None:
    labels = summary.short_labels(["cfsp:variant=rel,b=1.0", "cfsp:variant=act,b=1.0", "flap:released=False"])
    assert list(labels.values()) == ["cfsp:variant=rel", "cfsp:variant=act", "flap"]


@untimed
@given(st.permutations(range(24)))
def test_a_sweeps_groups_do_not_depend_on_the_order_of_its_cells(order: list[int]) -> None:
    sweep = make_sweep(criteria=CRITERIA[:2], allocators=ALLOCATORS[:2], ratios=(0.3, 0.5), agreements=False)
    shuffled = sweep.model_copy(update={"cells": tuple(sweep.cells[place] for place in order)})
    plain, other = summary.groups(sweep), summary.groups(shuffled)
    assert {(group.method, group.ratio): group.cells for group in plain} == {
        (group.method, group.ratio): group.cells for group in other
    }
    assert all([cell.spec.seed for cell in group.cells] == [0, 1, 2] for group in plain)
    assert sum(len(group.cells) for group in plain) == len(sweep.cells)


def test_methods_of_one_name_are_told_apart_by_what_differs() -> None:
    sweep = make_sweep(criteria=CRITERIA[:2], allocators=ALLOCATORS[:1], samples=(32, 128), ratios=(0.5,), seeds=(0,))
    labels = [group.method.label for group in summary.groups(sweep)]
    assert labels == [
        f"cfsp + cfsp (cfsp:variant={variant}, {windows} windows)"
        for variant in ("rel", "act")
        for windows in (32, 128)
    ]


def test_the_best_of_a_ratio_has_the_lowest_mean_loss() -> None:
    sweep = make_sweep(criteria=CRITERIA[:3], exploding=["cfsp"], failing=["flap"])
    actual = summary.groups(sweep)
    best = summary.best_per_ratio(actual, "wikitext2")
    assert list(best) == [0.3, 0.5, 0.8]
    for ratio, first in best.items():
        scores = [
            mean.mean
            for group in actual
            if group.ratio == ratio and (mean := group.interval(lambda cell: summary.nll(cell, "wikitext2")))
        ]
        own = first.group.interval(lambda cell: summary.nll(cell, "wikitext2"))
        assert own is not None
        assert own.mean == min(score for score in scores if math.isfinite(score))
        assert first.margin is not None
        assert first.margin.mean >= 0
        assert first.margin.count == 3
    assert best[0.5].group.method.criterion == "wanda-sp"


@untimed
@given(st.lists(st.floats(0, 9) | st.sampled_from([math.nan, math.inf]), max_size=8))
def test_ranks_are_of_finite_losses(losses: list[float]) -> None:
    sweep = make_sweep(criteria=CRITERIA[:1], allocators=ALLOCATORS[:1], ratios=(0.5,), seeds=(0,))
    [group] = summary.groups(sweep)
    every = [
        summary.Group(
            group.method, 0.5, (group.cells[0].model_copy(update={"qualities": (make_quality("wikitext2", loss),)}),)
        )
        for loss in losses
    ]
    actual = [group.cells[0].qualities[0].nll for group in summary.ranked(every, "wikitext2")]
    assert actual == sorted(loss for loss in losses if math.isfinite(loss))


def test_nothing_is_best_where_nothing_was_measured() -> None:
    failed = summary.groups(make_sweep(criteria=["flap"], failing=["flap"]))
    assert summary.best_per_ratio(failed, "wikitext2") == {}
    assert summary.best_per_ratio(summary.groups(make_sweep(data=())), "wikitext2") == {}


def test_a_margin_is_paired_by_seed() -> None:
    sweep = make_sweep(criteria=CRITERIA[:2], allocators=ALLOCATORS[:1], ratios=(0.5,))
    first, second = summary.groups(sweep)
    fewer = summary.Group(second.method, second.ratio, second.cells[1:])
    actual = summary.paired_difference(fewer, first, "wikitext2")
    differences = [b.qualities[0].nll - a.qualities[0].nll for a, b in zip(first.cells[1:], fewer.cells, strict=True)]
    assert actual == summary.interval(differences)
    assert summary.paired_difference(summary.Group(second.method, 0.5, ()), first, "wikitext2") is None


def test_methods_are_ordered_by_their_places_and_failing_is_last() -> None:
    sweep = make_sweep(allocators=ALLOCATORS[:1], failing=["wanda-sp"], exploding=["flap"])
    order = [method.criterion.partition(":")[0] for method in summary.by_quality(summary.groups(sweep), "wikitext2")]
    assert order == ["cfsp", "cfsp", "obs", "taylor", "magnitude", "random", "flap", "wanda-sp"]


def test_excess_is_over_the_dense_model_on_the_same_text() -> None:
    sweep = make_sweep(data=("wikitext2", "ptb"))
    cell = sweep.cells[0]
    for place, name in enumerate(("wikitext2", "ptb")):
        expected = cell.qualities[place].nll - sweep.dense[place].nll
        assert summary.excess_nll(cell, sweep, name) == expected
    assert summary.excess_nll(cell, make_sweep(dense=False), "wikitext2") is None
    assert summary.excess_nll(cell, sweep, "c4") is None


def test_agreement_is_averaged_over_seeds_and_feed_forwards_of_a_block() -> None:
    def agreement(seed: int, block: int, path: str, first: str, value: float) -> Agreement:
        second = "b" if first == "a" else "a"
        return Agreement(
            seed=seed,
            block=block,
            path=path,
            first=first,
            second=second,
            rank_correlation=value,
            overlap={"0.5": value},
        )

    actual = (
        agreement(0, 0, "mlp.experts.0", "a", 0.2),
        agreement(0, 0, "mlp.experts.1", "a", 0.4),
        agreement(1, 0, "mlp.experts.0", "b", 0.6),
        agreement(0, 1, "mlp.experts.0", "a", 1.0),
    )
    [pair] = summary.agreement_pairs(make_sweep().model_copy(update={"agreements": actual}))
    assert pair.correlation == pytest.approx({0: 0.4, 1: 1.0})
    assert pair.overlap["0.5"] == pytest.approx({0: 0.4, 1: 1.0})
    assert pair.mean_correlation == pytest.approx(0.7)
    assert pair.mean_overlap("0.5") == pytest.approx(0.7)
    assert pair.mean_overlap("0.3") is None


def test_a_blocks_share_counts_all_its_feed_forwards() -> None:
    sweep = make_sweep(blocks=2, criteria=CRITERIA[:1], allocators=ALLOCATORS[:1], ratios=(0.5,), seeds=(0,))
    mixture = sweep.model_copy(update={"places": ((3, "mlp.experts.0"), (3, "mlp.experts.1")), "widths": (64, 32)})
    cell = sweep.cells[0].model_copy(update={"widths": (32, 8)})
    assert summary.kept_by_block(cell, mixture) == {3: 40 / 96}
    assert summary.kept_by_block(cell.model_copy(update={"widths": ()}), mixture) == {}


def test_a_full_sweep_is_one_grid_with_its_best_first() -> None:
    sweep = make_sweep(criteria=CRITERIA[:3], allocators=ALLOCATORS[:2], failing=["wanda-sp"])
    [grid] = summary.grids(summary.groups(sweep), "wikitext2")
    assert (grid.row_axis, grid.column_axis, grid.fixed) == ("criterion", "allocator", ())
    assert grid.rows == ("cfsp:variant=rel", "cfsp:variant=act", "wanda-sp")
    assert grid.columns == ("cfsp", "uniform")
    assert list(grid.groups) == [0.3, 0.5, 0.8]
    for ratio, rows in grid.groups.items():
        for name, row in zip(CRITERIA, rows, strict=False):
            for allocator, group in zip(ALLOCATORS, row, strict=False):
                assert group is not None
                assert (group.ratio, group.method.criterion, group.method.allocator) == (ratio, name, allocator)


def test_what_is_fixed_makes_several_grids_and_sizes_stay_in_order() -> None:
    sweep = make_sweep(
        criteria=CRITERIA[:2],
        allocators=ALLOCATORS[:1],
        compensators=("none", "least-squares:damping=0.001"),
        samples=(32, 512, 128),
        seeds=(0,),
    )
    actual = summary.grids(summary.groups(sweep), "wikitext2")
    assert {grid.fixed for grid in actual} == {("none",), ("least-squares",)}
    assert all((grid.row_axis, grid.rows) == ("samples", ("32", "128", "512")) for grid in actual)


def test_named_rows_are_no_grid() -> None:
    sweep = make_sweep(criteria=CRITERIA[:4], allocators=ALLOCATORS, ratios=(0.5,), seeds=(0,))
    named = [
        cell for cell in sweep.cells if CRITERIA.index(cell.spec.criterion) == ALLOCATORS.index(cell.spec.allocator)
    ]
    assert summary.grids(summary.groups(sweep.model_copy(update={"cells": tuple(named)})), "wikitext2") == ()
