"""Schedulers: ranks in proportion to weights, within a budget of parameters, and what a recovery plan says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfsp_framework import PruningPlan, RecoveryPlan, RecoveryScheduler, TrainableBlock
from cfsp_framework.api.records import BlockPlan
from cfsp_framework.errors import ConfigError
from cfsp_framework.testing import build_plan
from cfsp_plugins.recovery import Full, IgLora, UniformLora, spread_ranks

Ranks = tuple[list[float], list[int], list[int], int]


@st.composite
def budgets(draw: st.DrawFn, equal: bool = False) -> Ranks:
    """Draw weights, costs, caps and a rank that fits under the caps."""
    count = draw(st.integers(1, 12))
    weights = draw(st.lists(st.floats(0, 10), min_size=count, max_size=count))
    costs = draw(st.lists(st.integers(50, 400), min_size=count, max_size=count))
    rank = draw(st.integers(1, 16))
    caps = draw(st.lists(st.integers(rank, 40), min_size=count, max_size=count))
    return weights, [costs[0]] * count if equal else costs, caps, rank


@given(budgets())
def test_ranks_spend_the_budget_but_for_less_than_one_unit(drawn: Ranks) -> None:
    weights, costs, caps, rank = drawn
    ranks = spread_ranks(weights, costs, caps, rank)
    left = rank * sum(costs) - sum(cost * value for cost, value in zip(costs, ranks, strict=True))
    assert 0 <= left < max(costs)
    assert all(1 <= value <= cap for value, cap in zip(ranks, caps, strict=True))


@given(budgets(equal=True))
def test_ranks_sum_to_the_budget_where_all_blocks_cost_the_same(drawn: Ranks) -> None:
    weights, costs, caps, rank = drawn
    assert sum(spread_ranks(weights, costs, caps, rank)) == rank * len(weights)


@given(budgets())
def test_a_block_of_more_weight_never_gets_less(drawn: Ranks) -> None:
    weights, costs, caps, rank = drawn
    ranks = spread_ranks(weights, costs, [min(caps)] * len(caps), rank)
    for i, more in enumerate(ranks):
        assert all(more >= less for less, weight in zip(ranks, weights, strict=True) if weight < weights[i])


@pytest.mark.parametrize(
    ("weights", "caps", "rank", "least", "expected"),
    [
        ([4, 2, 1, 1], [64] * 4, 8, 1, [16, 8, 4, 4]),
        ([0, 0, 0], [64] * 3, 8, 1, [8, 8, 8]),
        ([0, 1, 1], [64] * 3, 4, 1, [1, 6, 5]),  # the first on a tie
        ([9, 1, 1], [8, 64, 64], 8, 1, [8, 8, 8]),
        ([0, 1], [8, 8], 8, 0, [8, 8]),  # caps leave some for a weight of 0
    ],
)
def test_ranks_are_in_proportion(
    weights: list[float], caps: list[int], rank: int, least: int, expected: list[int]
) -> None:
    assert spread_ranks(weights, [10] * len(weights), caps, rank, least) == expected


def gated_blocks(*widths: int, hidden: int = 32) -> list[TrainableBlock]:
    up = {width: {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden)} for width in widths}
    return [
        TrainableBlock(index, {**up[width], "mlp.down_proj": (hidden, width)}, {"self_attn.q_proj": (hidden, hidden)})
        for index, width in enumerate(widths)
    ]


def pruning_plan(kept: Sequence[int], importance: Sequence[float | None], width: int = 64) -> PruningPlan:
    return build_plan(
        BlockPlan(block=index, path="mlp", width=width, importance=value, kept=tuple(range(count)))
        for index, (count, value) in enumerate(zip(kept, importance, strict=True))
    )


def schedule(
    scheduler: RecoveryScheduler, *widths: int, importance: Sequence[float | None] | None = None, hidden: int = 32
) -> RecoveryPlan:
    """Schedule the training of blocks that were cut to these widths."""
    plan = pruning_plan(widths, importance or [1.0] * len(widths))
    recovery = scheduler.schedule((), plan, gated_blocks(*widths, hidden=hidden))
    assert recovery is not None
    return recovery


def ranks_of(plan: RecoveryPlan) -> list[int]:
    return [block.rank for block in plan.blocks]


def test_directions_are_nearly_opposite_and_spend_the_same() -> None:
    widths = (64, 32, 16, 16)
    schedulers = IgLora(rank=4), IgLora(rank=4, direction="removed"), UniformLora(rank=4)
    importance, removed, uniform = (
        ranks_of(schedule(scheduler, *widths, importance=[0.8, 0.4, 0.2, 0.2])) for scheduler in schedulers
    )
    assert importance == sorted(importance, reverse=True)
    assert removed == sorted(removed)
    assert uniform == [4] * 4
    costs = [3 * (32 + width) for width in widths]
    budget = 4 * sum(costs)
    for ranks in (importance, removed):
        assert 0 <= budget - sum(cost * rank for cost, rank in zip(costs, ranks, strict=True)) < max(costs)


def test_without_importance_the_kept_share_replaces_it() -> None:
    kept = ranks_of(schedule(IgLora(), 64, 32, 16, importance=[None] * 3))
    assert kept == ranks_of(schedule(IgLora(), 64, 32, 16, importance=[4.0, 2.0, 1.0]))
    assert kept == sorted(kept, reverse=True)
    removed = ranks_of(schedule(IgLora(direction="removed"), 64, 32, 16, importance=[None] * 3))
    assert removed == sorted(removed)


def test_the_learning_rate_follows_the_hidden_size_unless_it_is_given() -> None:
    def rate(scheduler: RecoveryScheduler, hidden: int) -> float:
        return schedule(scheduler, 32, hidden=hidden).learning_rate

    assert rate(UniformLora(), 2000) == pytest.approx(5e-4)
    assert rate(UniformLora(), 4096) == pytest.approx(2.86e-4, rel=1e-2)
    assert rate(Full(), 256) == pytest.approx(rate(UniformLora(), 256) / 10)
    assert rate(UniformLora(learning_rate=0.01), 256) == 0.01


def test_options_reach_the_recovery_plan_which_survives_json() -> None:
    plan = schedule(IgLora(rank=4, scale=3, attention=True, distillation=0.25, decay="linear"), 32, 32)
    assert plan.targets == ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")
    assert [block.alpha for block in plan.blocks] == [12, 12]
    assert plan.distillation is not None
    assert (plan.decay, plan.distillation.weight, plan.full) == ("linear", 0.25, False)
    assert RecoveryPlan.model_validate_json(plan.to_json()) == plan
    assert schedule(Full(), 32, 32).full


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (IgLora(rank=2, min_rank=3), "rank 2 .*min_rank 3"),
        (IgLora(rank=2, min_rank=3, max_rank=2), "min_rank 3 .*max_rank 2"),
        (UniformLora(rank=8), "rank 8 .*max_rank.* 4 "),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(scheduler: RecoveryScheduler, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule(scheduler, 4, 4)
