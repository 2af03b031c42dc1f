"""The fine criteria, what they are computed from, and the bias that goes with them (docs/method.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfsp_criteria import Cfsp, Flap, Magnitude, Random, WandaL2, WandaSp
from cfsp_criteria.cfsp import Variant
from cfsp_framework import BlockStatistics, Collector, Criterion, FeedForward, Site, Statistic
from cfsp_framework.pruning.planning import keep_highest
from cfsp_framework.statistics import (
    DOWN_INPUT_FLUCTUATION,
    DOWN_INPUT_MEAN,
    DOWN_INPUT_SQUARES,
    DOWN_INPUT_VARIANCE,
)
from cfsp_plugins.collectors import DownInputFluctuation, DownInputMean, DownInputSquares, DownInputVariance
from cfsp_plugins.collectors.distances import (
    AngularDistance,
    CosineDistance,
    MaeDistance,
    MseDistance,
    angular_distance,
    cosine,
    cosine_distance,
    mae_distance,
    mse_distance,
)
from cfsp_plugins.compensators import Bias, NoCompensation

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure

# The test vector of the method reference, section 2.3: d = 2, m = 3, a = [1, 2, 4].
DOWN = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 1.0]])
UP = torch.tensor([[1.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
GATE = torch.tensor([[2.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
NORM = torch.tensor([1.0, 2.0, 4.0])
TINY = FeedForward(0, "mlp", UP, DOWN, "silu", GATE)
UNGATED = replace(TINY, gate=None)

CRITERIA: list[Criterion] = [
    Cfsp(variant="rel"),
    Cfsp(variant="act"),
    Cfsp(variant="eq8"),
    Cfsp(variant="eq8", c=1.0),
    Cfsp(variant="rel", b=0.5, c=2.0),
    Flap(),
    Flap(released=True),
    Magnitude(),
    WandaL2(),
    WandaSp(),
]
every_criterion = pytest.mark.parametrize("criterion", CRITERIA, ids=repr)


def measured(norm: Tensor, tokens: int = 1) -> BlockStatistics:
    """Statistics of channels whose root mean square is ``norm (F,)``."""
    return BlockStatistics({DOWN_INPUT_SQUARES: norm.square() * tokens}, tokens)


def feed_forward(width: int = 12, hidden: int = 5, seed: int = 0, *, gated: bool = True) -> FeedForward:
    generator = torch.Generator().manual_seed(seed)
    up, gate = (torch.randn(width, hidden, generator=generator) for _ in range(2))
    down = torch.randn(hidden, width, generator=generator)
    return FeedForward(0, "mlp", up, down, "silu", gate if gated else None)


def statistics(width: int = 12, seed: int = 1) -> BlockStatistics:
    """Every statistic of the channels that a built-in criterion reads, all positive."""
    generator = torch.Generator().manual_seed(seed)
    names = (DOWN_INPUT_SQUARES, DOWN_INPUT_VARIANCE, DOWN_INPUT_FLUCTUATION)
    return BlockStatistics({name: torch.rand(width, generator=generator) + 0.01 for name in names}, 7)


def score(criterion: Criterion, block: FeedForward, values: BlockStatistics) -> Tensor:
    """As the host does it: a criterion sees only what it declared."""
    return criterion.score(block, values.only(criterion.required()))


# --- test vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (Cfsp(variant="act"), [1.0, 2.0, 4.0]),
        (Cfsp(variant="act", b=3.0), [1.0, 2.0, 4.0]),
        (Cfsp(variant="act", c=2.0), [1.0, 4.0, 16.0]),
        (Cfsp(variant="eq8"), [2.109524, 2.152381, 2.4]),
        (Cfsp(variant="eq8", c=1.0), [2.109524, 4.304762, 9.6]),
        (Cfsp(variant="rel"), [0.946078, 1.624183, 4.967320]),
        (Cfsp(variant="rel", c=0.0), [0.946078, 0.812092, 1.241830]),
        (Cfsp(), [0.946078, 1.624183, 4.967320]),
        (WandaSp(), [2.0, 3.0, 8.0]),
        (Magnitude(), [3.162278, 2.236068, 3.162278]),
        (WandaL2(), [3.162278, 4.472136, 12.649111]),
    ],
)
def test_the_vectors_of_the_method_reference(criterion: Criterion, expected: list[float], tokens: int) -> None:
    assert score(criterion, TINY, measured(NORM, tokens)).tolist() == pytest.approx(expected, abs=1e-5)


def test_act_is_the_released_metric_up_to_its_constant() -> None:
    released = torch.zeros(3)
    for weight in (DOWN.T * NORM[:, None], UP, GATE):  # (F, D)
        released += (weight / weight.sum(1, keepdim=True)).mean(1)
    assert (released * NORM).tolist() == pytest.approx([1.5, 3.0, 6.0])
    assert torch.allclose(score(Cfsp(variant="act"), TINY, measured(NORM)) * 3 / 2, released * NORM)


@pytest.mark.parametrize(("block", "total"), [(TINY, 3.0), (UNGATED, 2.0)])
def test_the_relative_shares_add_up_to_the_number_of_matrices(block: FeedForward, total: float) -> None:
    assert float(score(Cfsp(variant="rel", c=0.0), block, measured(NORM)).sum()) == pytest.approx(total)


def naive_rel(block: FeedForward, norm: Tensor, b: float, c: float) -> list[float]:
    """The formula of section 2.3, summand by summand."""
    total = torch.zeros(block.width, dtype=torch.float64)
    for i in range(block.width):
        for j in range(block.hidden):
            weighted = block.down[j].abs().double() * norm.double() ** b
            total[i] += weighted[i] / weighted.sum()
            for weight in (block.up, block.gate):
                if weight is not None:
                    column = weight[:, j].abs().double()
                    total[i] += column[i] / column.sum()
    scores: list[float] = (total / block.hidden * norm.double() ** c).tolist()
    return scores


def naive_eq8(block: FeedForward, norm: Tensor, b: float, c: float) -> list[float]:
    """The formula of section 2.2, summand by summand."""
    total = torch.zeros(block.width, dtype=torch.float64)
    activation = norm.double() ** b
    for i in range(block.width):
        for j in range(block.hidden):
            row = block.down[j].abs().double()
            total[i] += row[i] * activation[i] / (row.sum() * activation.sum())
            for weight in (block.up, block.gate):
                if weight is not None:
                    total[i] += weight[i, j].abs().double() / weight[i].abs().double().sum()
    scores: list[float] = (total * norm.double() ** c).tolist()
    return scores


@pytest.mark.parametrize(("b", "c"), [(1.0, 1.0), (1.0, 0.0), (0.5, 2.0), (0.0, 1.0)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("variant", "naive"), [("rel", naive_rel), ("eq8", naive_eq8)])
def test_the_formulas_agree_with_a_naive_evaluation(
    variant: Variant,
    naive: Callable[[FeedForward, Tensor, float, float], list[float]],
    gated: bool,
    b: float,
    c: float,
) -> None:
    block, norm = feed_forward(gated=gated), torch.rand(12, generator=torch.Generator().manual_seed(2)) + 0.1
    scores = score(Cfsp(variant=variant, b=b, c=c), block, measured(norm, 9))
    assert scores.tolist() == pytest.approx(naive(block, norm, b, c), rel=1e-5)


@pytest.mark.parametrize(
    ("criterion", "spread"), [(Flap(), DOWN_INPUT_VARIANCE), (Flap(released=True), DOWN_INPUT_FLUCTUATION)]
)
def test_flap_is_the_spread_times_the_squared_weights(criterion: Flap, spread: Statistic) -> None:
    assert criterion.required() == {spread}
    values = BlockStatistics({spread: torch.tensor([2.0, 1.0, 0.5])}, 4)
    assert score(criterion, TINY, values).tolist() == pytest.approx([20.0, 5.0, 5.0])


def test_the_square_of_wanda_l2_is_the_error_of_removing_one_channel() -> None:
    block = feed_forward()
    inputs = torch.randn(40, 12, generator=torch.Generator().manual_seed(3))
    scores = score(WandaL2(), block, measured(inputs.square().mean(0).sqrt(), 40))
    for channel in range(12):
        error = torch.outer(inputs[:, channel], block.down[:, channel]).square().sum()
        assert float(scores[channel] ** 2 * 40) == pytest.approx(float(error), rel=1e-4)


def test_flap_is_the_error_of_removing_one_channel_after_the_best_constant_correction() -> None:
    block = feed_forward()
    inputs = torch.randn(40, 12, generator=torch.Generator().manual_seed(4)) + 2
    variance = inputs.var(0, unbiased=False)
    scores = score(Flap(), block, BlockStatistics({DOWN_INPUT_VARIANCE: variance}, 40))
    for channel in range(12):
        lost = torch.outer(inputs[:, channel], block.down[:, channel])
        assert float(scores[channel]) == pytest.approx(float((lost - lost.mean(0)).square().sum() / 40), rel=1e-4)


# --- what must hold for every criterion ------------------------------------------------------------------------------


@every_criterion
@untimed
@given(st.permutations(range(12)), st.booleans())
def test_permuting_the_channels_permutes_the_scores(criterion: Criterion, order: list[int], gated: bool) -> None:
    block, values, index = feed_forward(gated=gated), statistics(), torch.tensor(order)
    gate = None if block.gate is None else block.gate[index]
    permuted = replace(block, up=block.up[index], down=block.down[:, index], gate=gate)
    moved = BlockStatistics({name: value[index] for name, value in values.items()}, values.tokens)
    expected = score(criterion, block, values)[index]
    assert torch.allclose(score(criterion, permuted, moved), expected, rtol=1e-5, atol=0)


@every_criterion
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_scores_are_finite_for_every_dtype_with_or_without_a_gate(
    criterion: Criterion, gated: bool, dtype: torch.dtype
) -> None:
    block = feed_forward(gated=gated)
    gate = None if block.gate is None else block.gate.to(dtype)
    block = replace(block, up=block.up.to(dtype), down=block.down.to(dtype), gate=gate)
    scores = score(criterion, block, statistics())
    assert scores.shape == (12,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert (scores >= 0).all()


@every_criterion
def test_half_precision_weights_do_not_overflow(criterion: Criterion) -> None:
    block = feed_forward(width=64, hidden=8)
    block = replace(block, up=block.up.half() * 5000, down=block.down.half() * 5000, gate=None)
    assert score(criterion, block, statistics(64)).isfinite().all()


@every_criterion
def test_scoring_leaves_weights_and_statistics_alone(criterion: Criterion) -> None:
    block, values = feed_forward(), statistics()
    assert block.gate is not None
    tensors = [block.up, block.down, block.gate, *values.values()]
    before = [tensor.clone() for tensor in tensors]
    first = score(criterion, block, values)
    assert torch.equal(first, score(criterion, block, values))
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))


def nothing(block: FeedForward, values: dict[Statistic, Tensor]) -> None:
    """The block as it is."""


def dead_channel(block: FeedForward, values: dict[Statistic, Tensor]) -> None:
    assert block.gate is not None
    block.up[3] = block.gate[3] = 0
    block.down[:, 3] = 0
    for value in values.values():
        value[3] = 0


def dead_hidden_unit(block: FeedForward, values: dict[Statistic, Tensor]) -> None:
    assert block.gate is not None
    block.up[:, 1] = block.gate[:, 1] = 0
    block.down[1] = 0


def almost_dead_hidden_unit(block: FeedForward, values: dict[Statistic, Tensor]) -> None:
    assert block.gate is not None
    block.up[:, 1] = block.gate[:, 1] = 1e-45  # the smallest number there is; one over it is infinite
    block.down[1] = 1e-42
    block.down[1, 0] = 0


def silence(block: FeedForward, values: dict[Statistic, Tensor]) -> None:
    for value in values.values():
        value.zero_()


def no_weights(block: FeedForward, values: dict[Statistic, Tensor]) -> None:
    assert block.gate is not None
    for weight in (block.up, block.down, block.gate):
        weight.zero_()


@every_criterion
@pytest.mark.parametrize(
    "kill", [nothing, dead_channel, dead_hidden_unit, almost_dead_hidden_unit, silence, no_weights]
)
def test_nothing_to_divide_by_gives_no_nan(
    criterion: Criterion, kill: Callable[[FeedForward, dict[Statistic, Tensor]], None]
) -> None:
    block, values = feed_forward(), dict(statistics())
    kill(block, values)
    scores = score(criterion, block, BlockStatistics(values, 7))
    assert scores.isfinite().all()
    if kill is dead_channel:
        assert scores.argmin() == 3
        assert scores[3] == 0


def test_an_empty_row_contributes_nothing_to_the_printed_formula() -> None:
    block = replace(TINY, up=torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 3.0]]))
    full, empty = (score(Cfsp(variant="eq8"), each, measured(NORM)) for each in (TINY, block))
    assert (full - empty).tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)


def test_a_criterion_cannot_read_what_it_did_not_declare() -> None:
    with pytest.raises(KeyError, match="is read but not in `requires`"):
        WandaSp().score(TINY, statistics(3).only(frozenset()))


@pytest.mark.parametrize("criterion", [Magnitude(), Random()])
def test_criteria_without_data_require_none(criterion: Criterion) -> None:
    assert criterion.required() == frozenset()
    assert score(criterion, TINY, BlockStatistics({}, 0)).shape == (3,)


def test_random_scores_depend_on_seed_and_block_only() -> None:
    block = feed_forward(width=64)
    torch.manual_seed(5)
    first = score(Random(), block, BlockStatistics({}, 0))
    torch.manual_seed(6)
    assert torch.equal(first, score(Random(), block, BlockStatistics({}, 0)))
    assert torch.equal(first, score(Random(), replace(block, up=block.up * 2), statistics(64)))
    for other in (replace(block, block=1), replace(block, seed=1)):
        assert not torch.equal(first, score(Random(), other, BlockStatistics({}, 0)))
    assert ((first >= 0) & (first < 1)).all()
    assert len(set(keep_highest(first, 32)) ^ set(range(32))) > 0


# --- distances -------------------------------------------------------------------------------------------------------


def test_the_distances_by_hand() -> None:
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [2.0, 2.0]])
    after = torch.tensor([[0.0, 3.0], [-2.0, 0.0], [5.0, 0.0], [2.0, 0.0]])
    assert cosine(before, after).tolist() == pytest.approx([0.0, -1.0, 1.0, math.sqrt(0.5)])
    assert angular_distance(before, after).tolist() == pytest.approx([0.5, 1.0, 0.0, 0.25], abs=1e-6)
    assert cosine_distance(before, after).tolist() == pytest.approx([1.0, 2.0, 0.0, 1 - math.sqrt(0.5)], abs=1e-6)
    assert mse_distance(before, after).tolist() == pytest.approx([5.0, 4.5, 8.0, 2.0])
    assert mae_distance(before, after).tolist() == pytest.approx([2.0, 1.5, 2.0, 1.0])


VECTORS = st.integers(0, 2**31).map(lambda seed: torch.randn(64, 16, generator=torch.Generator().manual_seed(seed)))


@untimed
@given(VECTORS, st.floats(1e-3, 1e3))
def test_parallel_vectors_stay_inside_the_domain_of_arccos(vectors: Tensor, scale: float) -> None:
    for sign in (1.0, -1.0):
        value = cosine(vectors, vectors * (sign * scale))
        assert value.abs().max() <= 1
        assert torch.allclose(value, torch.full((64,), sign), atol=1e-6)
        assert angular_distance(vectors, vectors * (sign * scale)).isfinite().all()


@untimed
@given(VECTORS)
def test_identical_vectors_are_at_no_distance(vectors: Tensor) -> None:
    # in float32 a cosine of 1 is known to 6e-8, which is an angle of 3.5e-4
    assert angular_distance(vectors, vectors).max() < 2e-4
    assert cosine_distance(vectors, vectors).abs().max() < 1e-6
    assert mse_distance(vectors, vectors).max() == 0
    assert mae_distance(vectors, vectors).max() == 0


@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_zero_vector_has_the_cosine_one_half(before: float, after: float) -> None:
    value = cosine(torch.full((1, 8), before), torch.full((1, 8), after))
    assert value.tolist() == [0.5]
    assert angular_distance(torch.zeros(1, 8), torch.ones(1, 8)).tolist() == pytest.approx([1 / 3])


@untimed
@given(VECTORS, VECTORS)
def test_distances_are_symmetric_and_in_range(one: Tensor, other: Tensor) -> None:
    for distance, largest in (
        (angular_distance, 1.0),
        (cosine_distance, 2.0),
        (mse_distance, 1e9),
        (mae_distance, 1e9),
    ):
        value = distance(one, other)
        assert torch.allclose(value, distance(other, one), atol=1e-6)
        assert ((value >= 0) & (value <= largest)).all()


# --- collectors ------------------------------------------------------------------------------------------------------

UNORDERED: list[Collector] = [
    DownInputSquares(),
    DownInputMean(),
    DownInputVariance(),
    AngularDistance(),
    CosineDistance(),
    MseDistance(),
    MaeDistance(),
]


def collected(collector: Collector, windows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The statistic after these windows of inputs and outputs, in float64."""
    running = collector.start()
    for inputs, outputs in windows:
        running.update(inputs, outputs)
    return running.value(sum(len(inputs) for inputs, _ in windows)).double()


def stream(tokens: int, width: int = 6, seed: int = 0) -> Tensor:
    """Activations ``(tokens, width)`` of mean about 1, so that sums do not cancel."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) + 1


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("collector", UNORDERED, ids=repr)
@untimed
@given(cuts=st.sets(st.integers(1, 59), max_size=8), data=st.data())
def test_any_split_and_order_of_the_windows_gives_the_same_statistic(
    collector: Collector, cuts: set[int], data: st.DataObject
) -> None:
    before, after = stream(60), stream(60, seed=1)
    whole = collected(collector, [(before, after)])
    edges = [0, *sorted(cuts), 60]
    windows = [(before[a:b], after[a:b]) for a, b in pairwise(edges)]
    assert close(collected(collector, windows), whole)
    assert close(collected(collector, data.draw(st.permutations(windows))), whole)
    assert not collector.ordered


@pytest.mark.parametrize("collector", UNORDERED, ids=repr)
def test_sums_of_several_processes_add_up(collector: Collector) -> None:
    before, after = stream(60), stream(60, seed=1)
    whole, first, second = collector.start(), collector.start(), collector.start()
    whole.update(before, after)
    first.update(before[:24], after[:24])
    second.update(before[24:], after[24:])
    assert all(total.dtype == torch.float64 for total in whole.sums.values())
    for name, total in second.sums.items():
        first.sums[name] = first.sums[name] + total
    assert close(first.value(60), whole.value(60))


EXPECTED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "down-input-squares": lambda h: h.square().sum(0),
    "down-input-mean": lambda h: h.mean(0),
    "down-input-variance": lambda h: h.var(0, unbiased=False),
}


@pytest.mark.parametrize("collector", [DownInputSquares(), DownInputMean(), DownInputVariance()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activation_statistics_equal_those_of_the_whole_stream(collector: Collector, dtype: torch.dtype) -> None:
    activation = (stream(200) * torch.tensor([1.0, 0.01, 30.0, 5.0, 1.0, 0.3])).to(dtype)
    expected = EXPECTED[collector.name](activation.double())
    windows = [(window, window) for window in activation.split(50)]
    assert torch.allclose(collected(collector, windows), expected, rtol=1e-6, atol=1e-9)
    assert collector.site is Site.DOWN_PROJECTION


@pytest.mark.parametrize(("offset", "deviation"), [(100.0, 0.1), (-1000.0, 1.0), (0.0, 1e-6)])
def test_the_variance_survives_a_large_mean(offset: float, deviation: float) -> None:
    activation = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)) * deviation + offset
    variance = collected(DownInputVariance(), [(window, window) for window in activation.split(64)])
    assert torch.allclose(variance, activation.double().var(0, unbiased=False), rtol=1e-6, atol=0)


def test_the_variance_of_constants_is_not_negative() -> None:
    constants = torch.rand(1000, generator=torch.Generator().manual_seed(0)).expand(70, 1000)
    variance = collected(DownInputVariance(), [(constants, constants)] * 9)
    assert (variance >= 0).all()
    assert variance.max() < 1e-14


def naive_fluctuation(windows: Sequence[Tensor]) -> Tensor:
    """Section 4 of the method reference: 1/(N-1) * sum_s s/(s+1) * sum_t (h - mu_s)^2, windows from 0."""
    total = torch.zeros(windows[0].shape[1], dtype=torch.float64)
    for s in range(1, len(windows)):
        mean = torch.stack([window.double().mean(0) for window in windows[: s + 1]]).mean(0)
        total += s / (s + 1) * (windows[s].double() - mean).square().sum(0)
    return total / (len(windows) - 1) if len(windows) > 1 else total


@untimed
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 1000))
def test_the_fluctuation_is_the_released_running_quantity(count: int, tokens: int, seed: int) -> None:
    windows = list(stream(count * tokens, seed=seed).split(tokens))
    found = collected(DownInputFluctuation(), [(window, window) for window in windows])
    assert torch.allclose(found, naive_fluctuation(windows), rtol=1e-5, atol=1e-6)
    if count == 1:
        assert found.tolist() == [0.0] * 6


def test_the_fluctuation_depends_on_the_order_of_the_windows_and_says_so() -> None:
    windows = [(window, window) for window in stream(40).split(10)]
    forward, backward = (collected(DownInputFluctuation(), each) for each in (windows, windows[::-1]))
    assert not torch.allclose(forward, backward)
    assert DownInputFluctuation.ordered


@pytest.mark.parametrize(
    ("collector", "distance"),
    [
        (AngularDistance(), angular_distance),
        (CosineDistance(), cosine_distance),
        (MseDistance(), mse_distance),
        (MaeDistance(), mae_distance),
    ],
    ids=["angular", "cosine", "mse", "mae"],
)
def test_distances_are_means_over_all_tokens_of_unequal_windows(
    collector: Collector, distance: Callable[[Tensor, Tensor], Tensor]
) -> None:
    before, after = stream(30).bfloat16(), stream(30, seed=1).bfloat16()
    windows = [(before[:7], after[:7]), (before[7:], after[7:])]
    value = collected(collector, windows)
    assert value.shape == ()
    assert float(value) == pytest.approx(float(distance(before.double(), after.double()).mean()), rel=1e-6)
    assert collector.site is Site.BLOCK


@pytest.mark.parametrize("collector", [*UNORDERED, DownInputFluctuation()], ids=repr)
def test_collecting_leaves_the_activations_alone_and_starts_afresh(collector: Collector) -> None:
    before, after = stream(10), stream(10, seed=1)
    first = collected(collector, [(before, after), (before, after)])
    assert torch.equal(before, stream(10))
    assert torch.equal(after, stream(10, seed=1))
    assert torch.equal(first, collected(collector, [(before, after), (before, after)]))


# --- compensators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [None, torch.arange(5.0)])
@untimed
@given(st.sets(st.integers(0, 11), min_size=1))
def test_the_bias_is_the_mean_output_of_the_removed_channels(own: Tensor | None, kept: set[int]) -> None:
    block = replace(feed_forward(), down_bias=own)
    inputs = stream(50, width=12)
    index = torch.tensor(sorted(kept))
    update = Bias().compensate(block, index, BlockStatistics({DOWN_INPUT_MEAN: inputs.mean(0)}, 50))
    assert update.down is None
    assert update.down_bias is not None
    dense = inputs @ block.down.T + (0 if own is None else own)
    pruned = inputs[:, index] @ block.down[:, index].T + update.down_bias
    assert torch.allclose(pruned.mean(0), dense.mean(0), atol=1e-4)


@pytest.mark.parametrize("own", [None, torch.arange(5.0)])
def test_removing_nothing_changes_nothing(own: Tensor | None) -> None:
    block = replace(feed_forward(), down_bias=own)
    values = BlockStatistics({DOWN_INPUT_MEAN: torch.ones(12)}, 1)
    update = Bias().compensate(block, torch.arange(12), values)
    assert update.down_bias is not None
    assert torch.equal(update.down_bias, torch.zeros(5) if own is None else own)


def test_half_precision_is_compensated_in_float32_and_left_as_it_was() -> None:
    block = feed_forward()
    half = replace(block, down=block.down.half(), down_bias=torch.ones(5).half())
    before = half.down.clone()
    update = Bias().compensate(half, torch.tensor([0]), BlockStatistics({DOWN_INPUT_MEAN: torch.full((12,), 1e4)}, 1))
    assert update.down_bias is not None
    assert update.down_bias.dtype == torch.float32
    assert update.down_bias.isfinite().all()
    assert torch.equal(half.down, before)


def test_no_compensation_requires_and_changes_nothing() -> None:
    assert NoCompensation().required() == frozenset()
    update = NoCompensation().compensate(TINY, torch.tensor([0, 2]), BlockStatistics({}, 0))
    assert (update.down, update.down_bias) == (None, None)
