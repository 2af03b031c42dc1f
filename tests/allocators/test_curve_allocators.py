"""Allocators that read curves, cosines, depth and outliers: exact where they promise it, in range everywhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import median

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cfsp_allocators import ErrorCurve, LogIncrease, Owl, SoftmaxBi
from cfsp_allocators.error_curve import cheapest
from cfsp_allocators.softmax_bi import capped
from cfsp_framework import Allocator, BlockSummary, Budget
from cfsp_framework.host.registry import ConfiguredComponent, Origin
from cfsp_framework.pruning.planning import allocate, round_widths, total_to_keep
from cfsp_framework.statistics import COSINE_DISTANCE

untimed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

RATIOS = st.one_of(st.sampled_from([0.01, 0.5, 0.95]), st.floats(0.001, 0.99))


def summaries(
    scores: Sequence[torch.Tensor],
    *,
    distances: Sequence[float] | None = None,
    curves: Sequence[Sequence[float]] | None = None,
    sensitivities: Sequence[float | None] | None = None,
) -> list[BlockSummary]:
    """Blocks with these scores, cosine distances, removal curves and sensitivities."""
    blocks: list[BlockSummary] = []
    for block, values in enumerate(scores):
        statistics = {COSINE_DISTANCE: distances[block]} if distances is not None else {}
        curve = None if curves is None else torch.tensor(curves[block], dtype=torch.float64)
        sensitivity = sensitivities[block] if sensitivities is not None else None
        blocks.append(BlockSummary(block, "mlp", len(values), 100, statistics, values, curve, sensitivity))
    return blocks


def influenced(distances: Sequence[float]) -> list[BlockSummary]:
    return summaries([torch.rand(16)] * len(distances), distances=distances)


def curved(
    curves: Sequence[Sequence[float]], sensitivities: Sequence[float | None] | None = None
) -> list[BlockSummary]:
    return summaries([torch.rand(len(curve) - 1) for curve in curves], curves=curves, sensitivities=sensitivities)


def shares_of(allocator: Allocator, blocks: Sequence[BlockSummary], budget: Budget) -> list[float]:
    """As the host asks."""
    return allocate(ConfiguredComponent(allocator, Origin("cfsp-allocators")), blocks, budget)


def widths_of(allocator: Allocator, blocks: Sequence[BlockSummary], budget: Budget) -> list[int]:
    """What the host makes of the shares."""
    return round_widths(shares_of(allocator, blocks, budget), [block.width for block in blocks], budget)


# --- error-curve -----------------------------------------------------------------------------------------------------


def best_total(curves: Sequence[Sequence[float]], weights: Sequence[float], step: int, keep: int) -> float:
    """The least weighted error of all ways to keep ``keep`` channels in multiples of ``step``, at least one each."""
    choices = [
        sorted({*range(step, len(curve), step), len(curve) - 1})  # widths; len(curve) - 1 is the whole block
        for curve in curves
    ]
    found: float = min(
        sum(
            weight * curve[len(curve) - 1 - width] for weight, curve, width in zip(weights, curves, widths, strict=True)
        )
        for widths in itertools.product(*choices)
        if sum(widths) == keep
    )
    return found


@st.composite
def convex_curves(draw: st.DrawFn, step: int) -> list[list[float]]:
    """Curves of blocks whose every further channel costs more than the one before."""
    curves = []
    for _ in range(draw(st.integers(1, 4))):
        width = step * draw(st.integers(1, 5))
        costs = sorted(draw(st.lists(st.floats(0, 100), min_size=width, max_size=width)))
        curves.append([0.0, *itertools.accumulate(costs)])
    return curves


@pytest.mark.parametrize("step", [1, 3])
@untimed
@given(data=st.data())
def test_error_curve_is_optimal_for_convex_curves(step: int, data: st.DataObject) -> None:
    curves = data.draw(convex_curves(step))
    sensitivities = data.draw(st.lists(st.floats(0.1, 10), min_size=len(curves), max_size=len(curves)))
    full = [len(curve) - 1 for curve in curves]
    keep = step * data.draw(st.integers(len(curves), sum(full) // step))
    budget = Budget(1 - keep / sum(full), step)
    shares = shares_of(ErrorCurve(), curved(curves, sensitivities), budget)
    removed = [round(width * (1 - share)) for width, share in zip(full, shares, strict=True)]
    assert sum(removed) == sum(full) - keep
    widths = full if keep == sum(full) else round_widths(shares, full, budget)
    assert sum(widths) == keep
    assert all(width >= step and width % step == 0 for width in widths)
    typical = median(sensitivities)
    weights = [max(value, typical / 10) for value in sensitivities]
    found = sum(w * c[len(c) - 1 - width] for w, c, width in zip(weights, curves, widths, strict=True))
    assert found == pytest.approx(best_total(curves, weights, step, keep), rel=1e-9, abs=1e-9)


@untimed
@given(data=st.data(), step=st.sampled_from([1, 4, 7]), ratio=st.floats(0.02, 0.9))
def test_error_curve_meets_the_budget_whatever_the_curves(data: st.DataObject, step: int, ratio: float) -> None:
    full = data.draw(st.lists(st.integers(8, 40), min_size=1, max_size=6))
    curves = [
        [0.0, *data.draw(st.lists(st.floats(-10, 1e6), min_size=width, max_size=width))] for width in full
    ]  # a plain curve may even fall where channels cancel
    total = step * math.floor((1 - ratio) * sum(full) / step + 0.5)
    if not sum(min(step, width) for width in full) <= total < sum(full):
        return  # the host refuses such a ratio
    budget = Budget(ratio, step)
    blocks = curved(curves)
    shares = shares_of(ErrorCurve(), blocks, budget)
    assert all(0 < share <= 1 for share in shares)
    kept = [width * share for width, share in zip(full, shares, strict=True)]
    removable = sum(width - min(step, width) for width in full)
    assert sum(full) - sum(kept) == pytest.approx(min(round(ratio * sum(full)), removable), abs=1e-6)
    assert all(width >= min(step, of) - 1e-9 for width, of in zip(kept, full, strict=True))
    widths = widths_of(ErrorCurve(), blocks, budget)
    assert all(0 < width <= of for width, of in zip(widths, full, strict=True))
    if all(width % step == 0 for width in full):
        assert sum(widths) == total_to_keep(full, budget)


def test_error_curve_by_hand() -> None:
    steep, flat = [0.0, 1.0, 3.0, 6.0, 10.0], [0.0, 0.5, 1.0, 1.5, 9.0]
    blocks = curved([steep, flat])
    assert widths_of(ErrorCurve(), blocks, Budget(0.25)) == [4, 2]
    assert widths_of(ErrorCurve(), blocks, Budget(0.5)) == [3, 1]  # the fourth of the flat one would be its last
    assert widths_of(ErrorCurve(), blocks, Budget(0.75)) == [1, 1]
    # the first block's errors do a tenth of the harm
    assert widths_of(ErrorCurve(), curved([steep, flat], [1.0, 10.0]), Budget(0.375)) == [1, 4]


def test_error_curve_looks_past_a_first_step_that_is_dear() -> None:
    jump = [0.0, 4.0, 4.0, 4.0, 4.0]  # three channels for the price of one
    slope = [0.0, 1.5, 3.0, 4.5, 6.0]
    assert widths_of(ErrorCurve(), curved([jump, slope]), Budget(0.375)) == [1, 4]


def test_equal_convex_blocks_share_equally() -> None:
    curve = [float(k * k) for k in range(17)]
    assert widths_of(ErrorCurve(), curved([curve] * 4), Budget(0.5, 4)) == [8] * 4
    uneven = widths_of(ErrorCurve(), curved([curve] * 4), Budget(0.3))
    assert sum(uneven) == 45
    assert max(uneven) - min(uneven) == 1


def test_a_scale_common_to_all_curves_changes_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    curves = [[0.0, *torch.rand(12, generator=draw).cumsum(0).tolist()] for _ in range(5)]
    expected = widths_of(ErrorCurve(), curved(curves), Budget(0.4))
    for scale in (1e-20, 1e20):
        assert widths_of(ErrorCurve(), curved([[scale * e for e in c] for c in curves]), Budget(0.4)) == expected


def test_error_curve_asks_for_the_curve_its_option_names() -> None:
    assert ErrorCurve().curve() == "compensated"
    assert ErrorCurve(compensated=False).curve() == "plain"
    assert ErrorCurve().required() == frozenset()
    assert ErrorCurve().sensitivity()
    assert not ErrorCurve(measured=False).sensitivity()


def test_nothing_or_more_than_there_is_can_be_asked_of_the_hulls() -> None:
    hulls = [[(0, 0.0), (3, 1.0)], [(0, 0.0)], [(0, 0.0), (2, 1.0), (4, 5.0)]]
    assert cheapest(hulls, 0) == [0, 0, 0]
    assert cheapest(hulls, 4) == [3, 0, 1]
    assert cheapest(hulls, 99) == [3, 0, 4]


# --- softmax-bi ------------------------------------------------------------------------------------------------------

DISTANCES = st.lists(st.floats(0, 2), min_size=1, max_size=30)


@untimed
@given(DISTANCES, RATIOS, st.sampled_from([1e-3, 0.015, 0.1, 1.0, 100.0]))
@example([0.1, 0.9, 0.95], 0.5, 1e-3)  # all weights but one are 0 in floating point
@example([0.0, 2.0], 0.95, 1e-3)
def test_softmax_bi_has_the_mean_asked_for_and_stays_in_range(
    distances: list[float], ratio: float, temperature: float
) -> None:
    shares = shares_of(SoftmaxBi(temperature=temperature), influenced(distances), Budget(ratio))
    assert math.fsum(shares) / len(shares) == pytest.approx(1 - ratio, abs=1e-9)
    assert all(0 < share <= 1 for share in shares)
    limit = max(0.8, (1 + ratio) / 2)
    assert all(1 - share <= limit + 1e-9 for share in shares)
    for (low, less), (high, more) in itertools.pairwise(sorted(zip(distances, shares, strict=True))):
        assert less <= more + 1e-12, "the block that changes its stream more keeps more"
        if high - low > 0.05 * temperature and 1e-6 < 1 - less < limit - 1e-6:
            assert less < more


def test_softmax_bi_is_its_formula_below_the_cap() -> None:
    distances, ratio, temperature = [0.30, 0.22, 0.18, 0.25], 0.3, 0.1
    weights = [math.exp(-value / temperature) for value in distances]
    expected = [1 - 4 * ratio * weight / sum(weights) for weight in weights]
    assert min(expected) > 0.2
    shares = shares_of(SoftmaxBi(temperature=temperature), influenced(distances), Budget(ratio))
    assert shares == pytest.approx(expected, rel=1e-12)
    assert SoftmaxBi().importance(influenced(distances)) == distances
    moved = shares_of(SoftmaxBi(), influenced([value + 0.5 for value in distances]), Budget(ratio))
    assert moved == pytest.approx(shares, rel=1e-9)


def test_what_the_cap_leaves_is_spread_in_proportion() -> None:
    def spread(weights: list[float], total: float) -> list[float]:
        return capped([math.log(weight) for weight in weights], total, 0.8)

    assert spread([8.0, 1.0, 1.0], 1.2) == pytest.approx([0.8, 0.2, 0.2])
    assert spread([8.0, 3.0, 1.0], 1.8) == pytest.approx([0.8, 0.75, 0.25])
    assert spread([8.0, 7.0, 1.0], 1.8) == pytest.approx([0.8, 0.8, 0.2])
    assert capped([0.0, -1000.0, -1000.0, -5000.0], 1.2, 0.8) == pytest.approx([0.8, 0.2, 0.2, 0.0])


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.95])
def test_a_smaller_temperature_spreads_more(ratio: float) -> None:
    ranges = []
    for temperature in (10.0, 1.0, 0.1):
        shares = shares_of(SoftmaxBi(temperature=temperature), influenced([0.1, 0.2, 0.3, 0.4]), Budget(ratio))
        ranges.append(max(shares) - min(shares))
    assert ranges == pytest.approx(sorted(ranges))
    assert ranges[0] < ranges[1] - 1e-4


# --- log-increase ----------------------------------------------------------------------------------------------------


@untimed
@given(st.integers(1, 60), RATIOS, st.floats(0, 1))
def test_log_increase_has_the_mean_asked_for_and_prunes_deeper_blocks_more(
    count: int, ratio: float, spread: float
) -> None:
    shares = shares_of(LogIncrease(spread=spread), influenced([0.5] * count), Budget(ratio))
    assert math.fsum(shares) / count == pytest.approx(1 - ratio, abs=1e-9)
    assert all(0 < share <= 1 + 1e-12 for share in shares)
    assert all(deeper <= before for before, deeper in itertools.pairwise(shares))
    if count > 1 and spread > 1e-3:
        assert shares[-1] < shares[0]
        assert shares[0] - shares[-1] <= spread + 1e-9


def test_log_increase_is_its_formula() -> None:
    count, ratio, spread = 8, 0.5, 0.2
    depth = [math.log(block + 1) / math.log(count) for block in range(count)]
    first = ratio - spread * sum(depth) / count
    expected = [1 - (first + spread * value) for value in depth]
    shares = shares_of(LogIncrease(), influenced([0.5] * count), Budget(ratio))
    assert shares == pytest.approx(expected, rel=1e-12)
    assert shares[0] - shares[-1] == pytest.approx(spread)
    assert LogIncrease().required() == frozenset()


# --- owl -------------------------------------------------------------------------------------------------------------


def with_outliers(*counts: int, width: int = 100) -> list[BlockSummary]:
    """Blocks of ones with that many scores of 50: outliers while they are few."""
    return summaries([torch.cat([torch.full((count,), 50.0), torch.ones(width - count)]) for count in counts])


@untimed
@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=20),
    RATIOS,
    st.floats(0, 0.49),
)
def test_owl_has_the_mean_asked_for_and_spares_blocks_with_outliers(
    counts: list[int], ratio: float, spread: float
) -> None:
    blocks = with_outliers(*counts)
    allocator = Owl(spread=spread)
    shares = shares_of(allocator, blocks, Budget(ratio))
    assert math.fsum(shares) / len(shares) == pytest.approx(1 - ratio, abs=1e-9)
    assert all(0 < share <= 1 + 1e-12 for share in shares)
    assert max(shares) - min(shares) <= 2 * spread + 1e-9
    importance = allocator.importance(blocks)
    assert importance == pytest.approx([count / 100 for count in counts])
    for (low, less), (high, more) in itertools.pairwise(sorted(zip(counts, shares, strict=True))):
        assert less <= more + 1e-12
        if high > low and spread > 1e-3:
            assert less < more


def test_owl_is_its_formula() -> None:
    shares = shares_of(Owl(), with_outliers(0, 2, 8, 2), Budget(0.5))
    raised = [0.0, 0.04, 0.16, 0.04]  # 2 * 0.08 * (D - min) / (max - min)
    assert shares == pytest.approx([0.5 + value - 0.06 for value in raised])
    wide = shares_of(Owl(spread=0.2), with_outliers(0, 4), Budget(0.5))
    assert wide == pytest.approx([0.3, 0.7])


def test_what_counts_as_an_outlier_is_an_option() -> None:
    blocks = summaries([torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])])
    assert Owl().importance(blocks) == [0.0, 0.0]
    assert Owl(outlier=2.0).importance(blocks) == [0.25, 0.0]
    assert Owl().importance(summaries([torch.zeros(4)])) == [0.0]


# --- all of them -----------------------------------------------------------------------------------------------------

ALL: list[Allocator] = [ErrorCurve(), ErrorCurve(compensated=False), SoftmaxBi(), LogIncrease(), Owl()]


def any_blocks(count: int, *, equal: bool = False) -> list[BlockSummary]:
    draw = torch.Generator().manual_seed(0)
    scores = [torch.rand(128, generator=draw) ** 4 for _ in range(count)]
    curves = [[0.0, *sorted_scores.cumsum(0).tolist()] for sorted_scores in (s.sort().values for s in scores)]
    distances = torch.rand(count, generator=draw).tolist()
    if equal:
        scores, curves, distances = [scores[0]] * count, [curves[0]] * count, [distances[0]] * count
    return summaries(scores, distances=distances, curves=curves)


@pytest.mark.parametrize("allocator", ALL, ids=repr)
@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.95])
def test_one_block_takes_the_whole_budget(allocator: Allocator, ratio: float) -> None:
    (share,) = shares_of(allocator, any_blocks(1), Budget(ratio))
    assert share == pytest.approx(1 - ratio, abs=0.5 / 128)


@pytest.mark.parametrize("allocator", ALL, ids=repr)
@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.95])
def test_equal_blocks_keep_equal_shares(allocator: Allocator, ratio: float) -> None:
    shares = shares_of(allocator, any_blocks(5, equal=True), Budget(ratio))
    if isinstance(allocator, LogIncrease):
        assert shares == sorted(shares, reverse=True)
    else:
        assert shares == pytest.approx([1 - ratio] * 5, abs=1.01 / 128)


@pytest.mark.parametrize("allocator", ALL, ids=repr)
@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.5, 0.95])
@pytest.mark.parametrize("step", [1, 4])
def test_every_allocator_is_deterministic_and_the_total_exact(allocator: Allocator, ratio: float, step: int) -> None:
    blocks, budget = any_blocks(7), Budget(ratio, step)
    before = [block.scores.clone() for block in blocks]
    shares = shares_of(allocator, blocks, budget)
    assert shares == shares_of(allocator, blocks, budget)
    assert all(torch.equal(old, block.scores) for old, block in zip(before, blocks, strict=True))
    widths = widths_of(allocator, blocks, budget)
    assert sum(widths) == total_to_keep([128] * 7, budget)
    assert all(width > 0 and width % step == 0 for width in widths)


@pytest.mark.parametrize("allocator", ALL, ids=repr)
def test_removing_nothing_keeps_everything(allocator: Allocator) -> None:
    assert shares_of(allocator, any_blocks(4), Budget(0.0)) == pytest.approx([1.0] * 4)
