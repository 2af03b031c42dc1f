"""What a sweep's cells say together, and the page that shows it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cfsp_framework.ablation import summary
from cfsp_framework.ablation.results import Agreement, CellResult, CellSpec, Latency, Quality, SweepResults

untimed = settings(deadline=None)  # a busy machine is no failure
finite = st.floats(-1e6, 1e6)

CRITERIA = (
    "cfsp:variant=rel,b=1.0,c=1",
    "cfsp:variant=act,b=1.0,c=1",
    "wanda-sp",
    "flap:released=False",
    "obs:damping=0.01,batch=null",
    "taylor:squared=False",
    "magnitude",
    "random",
)
ALLOCATORS = (
    "cfsp:distance=angular,a=1.0,temperature=null,released=False",
    "uniform:released=False",
    "error-curve:compensated=True",
    "owl:outlier=5.0,spread=0.08",
)


def make_sweep(
    *,
    criteria: Sequence[str] = CRITERIA,
    allocators: Sequence[str] = ALLOCATORS,
    compensators: Sequence[str] = ("none",),
    ratios: Sequence[float] = (0.3, 0.5, 0.8),
    seeds: Sequence[int] = (0, 1, 2),
    samples: Sequence[int] = (128,),
    blocks: int = 8,
    data: Sequence[str] = ("wikitext2",),
    latency: bool = True,
    tasks: bool = False,
    agreements: bool = True,
    dense: bool = True,
    failing: Sequence[str] = (),
    exploding: Sequence[str] = (),
    model: str = "models/wiki9m",
) -> SweepResults:
    """A grid made up. What is named first is better; ``failing`` criteria fail, ``exploding`` ones lose everything."""
    draw = random.Random(0)
    cells = []
    grid = product(enumerate(criteria), enumerate(allocators), compensators, samples, ratios, seeds)
    for (first, criterion), (second, allocator), compensator, windows, ratio, seed in grid:
        chosen = [name.partition(":")[0] for name in (criterion, allocator, compensator) if name != "none"]
        spec = CellSpec(
            row=" + ".join(chosen),
            criterion=criterion,
            allocator=allocator,
            compensator=compensator,
            recovery="none",
            ratio=ratio,
            samples=windows,
            seed=seed,
        )
        worse = (1 + 0.25 * first + 0.12 * second) * (0.8 if compensator != "none" else 1) * (128 / windows) ** 0.1
        loss = 2.2 * ratio**2.5 * worse * (1 + 0.02 * draw.gauss(0, 1))
        if chosen[0] in exploding and ratio >= 0.5:
            loss = math.inf if ratio < 0.8 else math.nan
        tilt = 0.15 * second
        shares = [1 - ratio * (1 + tilt * math.cos(3 * block / max(blocks - 1, 1))) for block in range(blocks)]
        failed = chosen[0] in failing
        cells.append(make_cell(spec, len(cells), shares, loss, data, failed=failed, latency=latency, tasks=tasks))
    return SweepResults(
        model=model,
        fingerprint="ab" * 32,
        family="llama",
        dtype="float32",
        device="cpu",
        parameters=9_000_000,
        widths=(512,) * blocks,
        places=tuple((block, "mlp") for block in range(blocks)),
        budget="channels",
        round_to=8,
        calibration="wikitext2",
        seqlen=256,
        dense=tuple(make_quality(name, 2.9 + 0.3 * place) for place, name in enumerate(data)) if dense else (),
        dense_tasks={"piqa": {"acc": 0.78}, "arc_easy": {"acc_norm": 0.74}} if tasks and dense else {},
        cells=tuple(cells),
        agreements=tuple(make_agreements(criteria, ratios, seeds, blocks)) if agreements else (),
        versions={"cfsp-framework": "0.1.0", "torch": "2.13.0"},
        seconds={"load": 1.2, "calibrate": 0.6, "collect": 14.2, "plan": 2.9, "evaluate": 88.0},
    )


def make_cell(
    spec: CellSpec,
    number: int,
    shares: Sequence[float],
    loss: float,
    data: Sequence[str],
    *,
    failed: bool,
    latency: bool,
    tasks: bool,
) -> CellResult:
    command = (
        f"cfsp prune MODEL OUT --criterion '{spec.criterion}' --allocator '{spec.allocator}' --ratio {spec.ratio} "
        f"--seed {spec.seed}"
    )
    key = f"{number:064x}"
    if failed:
        return CellResult(key=key, spec=spec, status="failed", error="3 of 512 scores are <NaN>", command=command)
    widths = tuple(min(512, max(8, round(512 * share))) for share in shares)
    kept = sum(widths) / (512 * len(widths))
    return CellResult(
        key=key,
        spec=spec,
        status="done",
        channel_ratio=1 - kept,
        parameter_ratio=(1 - kept) * 0.6,
        parameters=round(9_000_000 * (1 - (1 - kept) * 0.6)),
        widths=widths,
        qualities=tuple(make_quality(name, 2.9 + 0.3 * place + loss) for place, name in enumerate(data)),
        tasks={"piqa": {"acc": 0.75 - loss / 12}, "arc_easy": {"acc_norm": 0.7 - loss / 11}} if tasks else {},
        latency=Latency(tokens=512, milliseconds=40 - 22 * (1 - kept) + number % 3, dense_milliseconds=40)
        if latency
        else None,
        seconds=2.0 + number % 2,
        command=command,
    )


def make_quality(data: str, nll: float) -> Quality:
    """Perplexity and bits per byte that belong to a loss, where a token is four bytes."""
    perplexity = math.exp(nll) if not nll > 700 else math.inf
    return Quality(data=data, windows=100, seqlen=256, perplexity=perplexity, nll=nll, bits_per_byte=nll / math.log(16))


def make_agreements(
    criteria: Sequence[str], ratios: Sequence[float], seeds: Sequence[int], blocks: int
) -> list[Agreement]:
    return [
        Agreement(
            seed=seed,
            block=block,
            path="mlp",
            first=first,
            second=second,
            rank_correlation=0.95 - 0.12 * abs(criteria.index(first) - criteria.index(second)) - 0.04 * (block % 3),
            overlap={f"{ratio:g}": 1 - ratio * (0.2 + 0.1 * criteria.index(second)) for ratio in ratios},
        )
        for (first, second), block, seed in product(combinations(criteria, 2), range(blocks), seeds)
    ]


# --- summary ----------------------------------------------------------------------------------------------------------


@untimed
@given(st.lists(finite, min_size=2, max_size=8))
def test_an_interval_is_students(values: list[float]) -> None:
    found = summary.interval(values)
    assert found is not None
    assert found.half is not None
    scale = max(map(abs, values)) + 1e-300
    assert found.count == len(values)
    assert found.mean == pytest.approx(math.fsum(values) / len(values), abs=1e-12 * scale)
    if len({*values}) > 1 and found.half > 1e-9 * scale:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=found.mean, scale=stats.sem(values))
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9 * scale)


@given(finite)
def test_one_value_has_no_interval(value: float) -> None:
    assert summary.interval([value]) == summary.Interval(value, None, 1)
    assert summary.interval([]) is None


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_mean_over_what_is_not_finite_is_not_finite(bad: float) -> None:
    found = summary.interval([1.0, bad, 2.0])
    assert found is not None
    assert not math.isfinite(found.mean)
    assert (found.half, found.low == found.mean or math.isnan(bad)) == (None, True)


points = st.lists(st.tuples(*[st.integers(0, 6).map(float) | st.just(math.nan) | st.just(math.inf)] * 2), max_size=12)


@given(points)
def test_the_front_is_what_nothing_beats(found: list[tuple[float, float]]) -> None:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    usable = [place for place, point in enumerate(found) if all(map(math.isfinite, point))]
    expected = {one for one in usable if not any(beats(found[other], found[one]) for other in usable)}
    front = summary.pareto_front(found)
    assert set(front) == expected
    assert len(front) == len(expected)
    assert [found[place][0] for place in front] == sorted(found[place][0] for place in front)


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
    made = make_sweep(criteria=CRITERIA[:2], allocators=ALLOCATORS[:2], ratios=(0.3, 0.5), agreements=False)
    shuffled = made.model_copy(update={"cells": tuple(made.cells[place] for place in order)})
    plain, other = summary.groups(made), summary.groups(shuffled)
    assert {(group.method, group.ratio): group.cells for group in plain} == {
        (group.method, group.ratio): group.cells for group in other
    }
    assert all([cell.spec.seed for cell in group.cells] == [0, 1, 2] for group in plain)
    assert sum(len(group.cells) for group in plain) == len(made.cells)


def test_methods_of_one_name_are_told_apart_by_what_differs() -> None:
    made = make_sweep(criteria=CRITERIA[:2], allocators=ALLOCATORS[:1], samples=(32, 128), ratios=(0.5,), seeds=(0,))
    labels = [group.method.label for group in summary.groups(made)]
    assert labels == [
        f"cfsp + cfsp (cfsp:variant={variant}, {windows} windows)"
        for variant in ("rel", "act")
        for windows in (32, 128)
    ]


def test_the_best_of_a_ratio_has_the_lowest_mean_loss() -> None:
    made = make_sweep(criteria=CRITERIA[:3], exploding=["cfsp"], failing=["flap"])
    found = summary.groups(made)
    best = summary.best_per_ratio(found, "wikitext2")
    assert list(best) == [0.3, 0.5, 0.8]
    for ratio, one in best.items():
        scores = [
            mean.mean
            for group in found
            if group.ratio == ratio and (mean := group.interval(lambda cell: summary.nll(cell, "wikitext2")))
        ]
        own = one.group.interval(lambda cell: summary.nll(cell, "wikitext2"))
        assert own is not None
        assert own.mean == min(score for score in scores if math.isfinite(score))
        assert one.margin is not None
        assert one.margin.mean >= 0
        assert one.margin.count == 3
    assert best[0.5].group.method.criterion == "wanda-sp"


def test_nothing_is_best_where_nothing_was_measured() -> None:
    failed = summary.groups(make_sweep(criteria=["flap"], failing=["flap"]))
    assert summary.best_per_ratio(failed, "wikitext2") == {}
    assert summary.best_per_ratio(summary.groups(make_sweep(data=())), "wikitext2") == {}


def test_a_margin_is_paired_by_seed() -> None:
    made = make_sweep(criteria=CRITERIA[:2], allocators=ALLOCATORS[:1], ratios=(0.5,))
    first, second = summary.groups(made)
    fewer = summary.Group(second.method, second.ratio, second.cells[1:])
    found = summary.paired_difference(fewer, first, "wikitext2")
    differences = [b.qualities[0].nll - a.qualities[0].nll for a, b in zip(first.cells[1:], fewer.cells, strict=True)]
    assert found == summary.interval(differences)
    assert summary.paired_difference(summary.Group(second.method, 0.5, ()), first, "wikitext2") is None


def test_methods_are_ordered_by_their_places_and_failing_is_last() -> None:
    made = make_sweep(allocators=ALLOCATORS[:1], failing=["wanda-sp"], exploding=["flap"])
    order = [method.criterion.partition(":")[0] for method in summary.by_quality(summary.groups(made), "wikitext2")]
    assert order == ["cfsp", "cfsp", "obs", "taylor", "magnitude", "random", "flap", "wanda-sp"]


def test_excess_is_over_the_dense_model_on_the_same_text() -> None:
    made = make_sweep(data=("wikitext2", "ptb"))
    cell = made.cells[0]
    for place, name in enumerate(("wikitext2", "ptb")):
        expected = cell.qualities[place].nll - made.dense[place].nll
        assert summary.excess_nll(cell, made, name) == expected
    assert summary.excess_nll(cell, make_sweep(dense=False), "wikitext2") is None
    assert summary.excess_nll(cell, made, "c4") is None


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

    found = (
        agreement(0, 0, "mlp.experts.0", "a", 0.2),
        agreement(0, 0, "mlp.experts.1", "a", 0.4),
        agreement(1, 0, "mlp.experts.0", "b", 0.6),
        agreement(0, 1, "mlp.experts.0", "a", 1.0),
    )
    [pair] = summary.agreement_pairs(make_sweep().model_copy(update={"agreements": found}))
    assert pair.correlation == pytest.approx({0: 0.4, 1: 1.0})
    assert pair.overlap["0.5"] == pytest.approx({0: 0.4, 1: 1.0})
    assert pair.mean_correlation == pytest.approx(0.7)
    assert pair.mean_overlap("0.5") == pytest.approx(0.7)
    assert pair.mean_overlap("0.3") is None


def test_a_blocks_share_counts_all_its_feed_forwards() -> None:
    made = make_sweep(blocks=2, criteria=CRITERIA[:1], allocators=ALLOCATORS[:1], ratios=(0.5,), seeds=(0,))
    mixture = made.model_copy(update={"places": ((3, "mlp.experts.0"), (3, "mlp.experts.1")), "widths": (64, 32)})
    cell = made.cells[0].model_copy(update={"widths": (32, 8)})
    assert summary.kept_by_block(cell, mixture) == {3: 40 / 96}
    assert summary.kept_by_block(cell.model_copy(update={"widths": ()}), mixture) == {}
