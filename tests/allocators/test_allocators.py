"""The coarse allocators: test vectors of the method reference (docs/method.md), and what must hold for any input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from cfsp_allocators import Cfsp, GlobalZscore, Uniform
from cfsp_allocators.cfsp import RELEASED_TOKENS, spread
from cfsp_framework import Allocator, BlockSummary, Budget, Statistic
from cfsp_framework.host.registry import ConfiguredComponent, Origin
from cfsp_framework.pruning.planning import allocate, round_widths
from cfsp_framework.statistics import ANGULAR_DISTANCE, COSINE_DISTANCE, MAE_DISTANCE, MSE_DISTANCE

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure

EIGHT = [0.35, 0.25, 0.16, 0.12, 0.10, 0.10, 0.13, 0.30]
FIVE = [0.2145, 0.1648, 0.1510, 0.1533, 0.1676]


def measured(
    distances: Sequence[float], *, statistic: Statistic = ANGULAR_DISTANCE, width: int = 128, tokens: int = 1000
) -> list[BlockSummary]:
    """Summaries of blocks with these distances and arbitrary scores."""
    return [
        BlockSummary(block, "mlp", width, tokens, {statistic: distance}, torch.arange(width, dtype=torch.float32))
        for block, distance in enumerate(distances)
    ]


def scored(*scores: torch.Tensor) -> list[BlockSummary]:
    """Summaries of blocks with these scores and nothing measured."""
    return [BlockSummary(block, "mlp", len(values), 0, {}, values) for block, values in enumerate(scores)]


# --- cfsp ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distances", "ratio", "temperature", "expected"),
    [
        (EIGHT, 0.2, 13.1072, [0.990476, 0.896091, 0.763299, 0.708030, 0.684276, 0.684276, 0.720972, 0.952580]),
        (EIGHT, 0.5, 13.1072, [0.919244, 0.711500, 0.419219, 0.297571, 0.245288, 0.245288, 0.326057, 0.835833]),
        (FIVE, 0.2, 13.1072, [0.990476, 0.776965, 0.716645, 0.726630, 0.789283]),
        (FIVE, 0.5, 1.6384, [0.518122, 0.497773, 0.492121, 0.493063, 0.498920]),
    ],
)
def test_the_vectors_of_the_method_reference(
    distances: list[float], ratio: float, temperature: float, expected: list[float]
) -> None:
    assert spread(distances, temperature, ratio) == pytest.approx(expected, abs=1e-6)
    shares = Cfsp(temperature=temperature).allocate(measured(distances), Budget(ratio))
    assert shares == pytest.approx(expected, abs=1e-6)


def test_the_default_temperature_is_the_released_one_at_its_own_calibration_size() -> None:
    assert RELEASED_TOKENS / 1e4 == 13.1072
    default = Cfsp().allocate(measured(EIGHT, tokens=17), Budget(0.5))
    assert default == spread(EIGHT, 13.1072, 0.5)
    assert Cfsp(released=True).allocate(measured(EIGHT, tokens=RELEASED_TOKENS), Budget(0.5, 128)) == default


def test_the_allocation_depends_on_the_calibration_size_in_the_released_form_only() -> None:
    few, many = measured(EIGHT, tokens=1000), measured(EIGHT, tokens=100_000)
    budget = Budget(0.5, 128)
    assert Cfsp().allocate(few, budget) == Cfsp().allocate(many, budget)
    assert Cfsp(released=True).allocate(few, budget) != Cfsp(released=True).allocate(many, budget)


def test_more_calibration_spreads_the_released_shares_further() -> None:
    ranges = []
    for windows in (8, 32, 128, 512):
        shares = Cfsp(released=True).allocate(measured(EIGHT, tokens=windows * 1024), Budget(0.5, 128))
        ranges.append(max(shares) - min(shares))
    assert ranges == sorted(set(ranges))


def test_a_multiplies_the_temperature() -> None:
    assert Cfsp(a=2.0, temperature=3.0).allocate(measured(EIGHT), Budget(0.5)) == spread(EIGHT, 6.0, 0.5)


RATIOS = st.floats(0.001, 0.99)
DISTANCES = st.lists(st.floats(0, 1), min_size=1, max_size=40)
TEMPERATURES = st.floats(0, 200)


@untimed
@given(DISTANCES, TEMPERATURES, RATIOS)
def test_shares_have_the_mean_asked_for_and_stay_in_range(
    distances: list[float], temperature: float, ratio: float
) -> None:
    shares = spread(distances, temperature, ratio)
    assert math.fsum(shares) / len(shares) == pytest.approx(1 - ratio, rel=1e-9)
    assert all(0 < share < 1 for share in shares)


@untimed
@given(DISTANCES, TEMPERATURES, RATIOS)
def test_shares_increase_with_importance(distances: list[float], temperature: float, ratio: float) -> None:
    pairs = sorted(zip(distances, spread(distances, temperature, ratio), strict=True))
    for (low, less), (high, more) in pairwise(pairs):
        assert less <= more
        if high - low > 1e-3 and 0.1 < temperature < 30:
            assert less < more


@untimed
@given(st.floats(0, 1e6), st.integers(1, 40), TEMPERATURES, st.floats(1e-300, 0.99))
@example(0.1, 3, 13.1072, 1e-17)  # 1 - ratio is 1 in floating point
def test_equal_importance_gives_exactly_equal_shares(
    distance: float, blocks: int, temperature: float, ratio: float
) -> None:
    shares = spread([distance] * blocks, temperature, ratio)
    assert len(set(shares)) == 1
    assert shares[0] == pytest.approx(1 - ratio, rel=1e-12)


@untimed
@given(DISTANCES, RATIOS)
def test_a_temperature_of_zero_is_uniform(distances: list[float], ratio: float) -> None:
    assert spread(distances, 0.0, ratio) == pytest.approx([1 - ratio] * len(distances))


@untimed
@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), TEMPERATURES, st.floats(0.01, 0.6))
def test_capped_shares_end_at_their_known_largest(distances: list[float], temperature: float, ratio: float) -> None:
    centre = math.fsum(distances) / len(distances)
    z = [1 / (1 + math.exp(-temperature * (distance - centre))) for distance in distances]
    largest = max(z) / (math.fsum(z) / len(z)) * (1 - ratio)
    assume(abs(largest - 1) > 1e-9)
    shares = spread(distances, temperature, ratio)
    assert max(shares) == pytest.approx((1 - ratio) + ratio / 1.05 if largest > 1 else largest, rel=1e-9)


@pytest.mark.parametrize(("ratio", "largest"), [(0.2, 0.990476), (0.3, 0.985714), (0.5, 0.976190)])
def test_the_cap_of_the_method_reference(ratio: float, largest: float) -> None:
    assert max(spread([0.9, 0.1, 0.1, 0.1], 50.0, ratio)) == pytest.approx(largest, abs=1e-6)


@untimed
@given(DISTANCES, st.floats(-5, 5), RATIOS)
def test_shares_depend_on_differences_of_importance_only(distances: list[float], offset: float, ratio: float) -> None:
    moved = spread([distance + offset for distance in distances], 13.1072, ratio)
    assert moved == pytest.approx(spread(distances, 13.1072, ratio), rel=1e-9)


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e12])
def test_extreme_distances_overflow_nothing(scale: float) -> None:
    shares = spread([scale, 0.0, scale / 2, 0.0], 13.1072, 0.5)
    assert all(0 < share < 1 for share in shares)
    assert math.fsum(shares) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("distance", "statistic"),
    [("angular", ANGULAR_DISTANCE), ("cosine", COSINE_DISTANCE), ("mse", MSE_DISTANCE), ("mae", MAE_DISTANCE)],
)
def test_each_distance_reads_its_own_statistic(distance: str, statistic: Statistic) -> None:
    allocator = Cfsp.model_validate({"distance": distance})
    assert allocator.required() == {statistic}
    summaries = measured(EIGHT, statistic=statistic)
    assert allocator.importance(summaries) == EIGHT
    assert allocator.allocate(summaries, Budget(0.5)) == spread(EIGHT, 13.1072, 0.5)


def test_the_uniform_distance_needs_no_data_and_spreads_nothing() -> None:
    allocator = Cfsp(distance="uniform")
    assert allocator.required() == frozenset()
    assert allocator.allocate(scored(torch.ones(8), torch.ones(8)), Budget(0.25)) == pytest.approx([0.75, 0.75])


def test_a_ratio_of_zero_keeps_everything() -> None:
    assert Cfsp().allocate(measured(EIGHT), Budget(0.0)) == [1.0] * 8


@pytest.mark.parametrize(
    ("ratio", "distance", "expected"),
    [(0.2, [0.3] * 5, [138] * 5), (0.5, [0.3] * 5, [87] * 5)],
)
def test_released_counts_keep_one_channel_more_than_the_share(
    ratio: float, distance: list[float], expected: list[int]
) -> None:
    """The widths 138 and 87 of 172 under equal distances are in the parity table of the method reference."""
    budget = Budget(ratio, 1)
    shares = Cfsp(released=True).allocate(measured(distance, width=172), budget)
    assert round_widths(shares, [172] * 5, budget, rebalance=False) == expected


def test_released_rounding_matches_the_method_reference() -> None:
    budget = Budget(0.2, 128)
    summaries = measured(EIGHT, width=11008, tokens=RELEASED_TOKENS)
    shares = Cfsp(released=True).allocate(summaries, budget)
    widths = round_widths(shares, [11008] * 8, budget, rebalance=False)
    assert widths == [10880, 9856, 8448, 7808, 7552, 7552, 7936, 10496]


def test_a_missing_distance_is_an_error_not_a_guess() -> None:
    with pytest.raises(KeyError):
        Cfsp().allocate(scored(torch.ones(4)), Budget(0.5))


# --- global-zscore ---------------------------------------------------------------------------------------------------


def naive_zscore(scores: Sequence[torch.Tensor], ratio: float) -> list[float]:
    """Per block (s - mean) / std with divisor n - 1, all pooled, the int(n * (1 - p)) highest kept."""
    pooled: list[tuple[float, int]] = []
    for block, values in enumerate(scores):
        numbers = [float(value) for value in values]
        mean = math.fsum(numbers) / len(numbers)
        deviation = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))
        pooled += [((number - mean) / deviation if deviation else 0.0, block) for number in numbers]
    kept = sorted(pooled, key=lambda item: -item[0])[: int(len(pooled) * (1 - ratio))]
    return [max(sum(block == b for _, b in kept), 1) / len(values) for block, values in enumerate(scores)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.77, 0.97])
def test_the_global_threshold_agrees_with_a_naive_one(seed: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [
        torch.rand(width, generator=generator) ** (block + 1) * 10.0**block
        for block, width in enumerate((50, 80, 64, 33))
    ]
    assert GlobalZscore().allocate(scored(*scores), Budget(ratio)) == naive_zscore(scores, ratio)


def test_the_deviation_has_the_divisor_one_less_than_the_width() -> None:
    narrow = torch.tensor([0.0, 0.0, 2.0, 2.0])  # z = 0.87 at the top; with divisor F it would be 1
    wide = torch.linspace(-1, 1, 100)  # the 22 highest have z > 0.93
    assert GlobalZscore().allocate(scored(narrow, wide), Budget(1 - 22.5 / 104)) == [0.25, 0.22]


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e20])
@pytest.mark.parametrize("width", [2, 172, 1000])
def test_a_block_without_spread_stands_at_zero(value: float, width: int) -> None:
    flat = torch.full((width,), value)
    varied = torch.linspace(-1, 1, width)
    shares = GlobalZscore().allocate(scored(flat, varied), Budget(0.5))
    # the upper half of the varied block is above zero and goes first, then the flat block's channels in order
    assert shares == [0.5, 0.5]
    assert GlobalZscore().allocate(scored(flat, flat), Budget(0.5)) == [1.0, 1 / width]


def test_shares_ignore_the_scale_and_offset_of_a_block() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.rand(100, generator=generator), torch.rand(60, generator=generator) ** 3
    plain = GlobalZscore().allocate(scored(first, second), Budget(0.4))
    assert GlobalZscore().allocate(scored(first * 1024 + 256, second), Budget(0.4)) == plain
    assert plain[0] != plain[1]


def test_every_block_keeps_a_channel_and_a_ratio_of_zero_keeps_all() -> None:
    outlier = torch.zeros(50)
    outlier[0] = 100.0
    shares = GlobalZscore().allocate(scored(outlier, torch.linspace(0, 1, 50)), Budget(0.98))
    assert min(shares) >= 1 / 50
    assert GlobalZscore().allocate(scored(outlier, outlier), Budget(0.0)) == [1.0, 1.0]


# --- uniform ---------------------------------------------------------------------------------------------------------


@untimed
@given(st.integers(1, 40), st.floats(0, 0.99))
def test_uniform_gives_every_block_the_same(blocks: int, ratio: float) -> None:
    assert Uniform().allocate(measured([0.5] * blocks), Budget(ratio)) == [1 - ratio] * blocks


@pytest.mark.parametrize(("ratio", "width"), [(0.2, 138), (0.5, 86)])
def test_uniform_as_released_keeps_the_counts_of_the_parity_table(ratio: float, width: int) -> None:
    budget = Budget(ratio, 1)
    shares = Uniform(released=True).allocate(measured([0.5] * 5, width=172), budget)
    assert round_widths(shares, [172] * 5, budget, rebalance=False) == [width] * 5


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocator", [Cfsp(), Cfsp(released=True), GlobalZscore(), Uniform(), Uniform(released=True)])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.9])
def test_every_allocator_is_deterministic_and_passes_the_host_s_checks(allocator: Allocator, ratio: float) -> None:
    generator = torch.Generator().manual_seed(3)
    summaries = [
        BlockSummary(
            block, "mlp", 128, 1000, {ANGULAR_DISTANCE: distance}, torch.rand(128, generator=generator) * (block + 1)
        )
        for block, distance in enumerate(EIGHT)
    ]
    before = [summary.scores.clone() for summary in summaries]
    chosen = ConfiguredComponent(allocator, Origin("cfsp-allocators"))
    budget = Budget(ratio, 1)
    shares = allocate(chosen, summaries, budget)
    assert shares == allocate(chosen, summaries, budget)
    assert all(torch.equal(old, summary.scores) for old, summary in zip(before, summaries, strict=True))
    widths = round_widths(shares, [128] * 8, budget)
    assert sum(widths) == round((1 - ratio) * 1024)
