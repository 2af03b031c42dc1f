"""From shares to widths, from scores to channels, and the plan as a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cfsp_framework import Allocator, BlockSummary, Budget, PruningPlan
from cfsp_framework.api.records import BlockPlan, CalibrationIdentity, ModelIdentity
from cfsp_framework.errors import ConfigError, PlanError, PluginError
from cfsp_framework.host.registry import ConfiguredComponent, Origin
from cfsp_framework.pruning.planning import (
    allocate,
    channel_ratio,
    keep_highest,
    plan_blocks,
    round_widths,
    total_to_keep,
)

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure

# --- shares, widths, budgets -----------------------------------------------------------------------------------------


@st.composite
def shared_widths(draw: st.DrawFn, *, multiples: bool) -> tuple[list[float], list[int], int]:
    """Shares and widths of a few blocks, and a step; ``multiples`` makes every width a multiple of the step."""
    step = draw(st.sampled_from([1, 2, 7, 8, 64, 128]))
    blocks = draw(st.integers(1, 6))
    width = st.integers(1, 12).map(lambda count: count * step) if multiples else st.integers(1, 12 * step)
    shares = st.floats(1e-6, 1.0)
    return (
        draw(st.lists(shares, min_size=blocks, max_size=blocks)),
        draw(st.lists(width, min_size=blocks, max_size=blocks)),
        step,
    )


RATIOS = st.floats(0.01, 0.95)


def possible(widths: Sequence[int], budget: Budget) -> int:
    """The total, where there is one."""
    try:
        return total_to_keep(widths, budget)
    except ConfigError:
        assume(False)
        raise


def allowed(width: int, step: int) -> set[int]:
    return {*range(step, width, step), width}


@untimed
@given(shared_widths(multiples=True), RATIOS)
def test_the_total_is_exact_where_widths_are_multiples_of_the_step(
    case: tuple[list[float], list[int], int], ratio: float
) -> None:
    shares, widths, step = case
    budget = Budget(ratio, step)
    total = possible(widths, budget)
    assert sum(round_widths(shares, widths, budget)) == total
    assert abs(total - (1 - ratio) * sum(widths)) <= step / 2 + 1e-6


@untimed
@given(shared_widths(multiples=False), RATIOS, st.booleans())
def test_every_width_is_a_multiple_of_the_step_or_the_full_width(
    case: tuple[list[float], list[int], int], ratio: float, rebalance: bool
) -> None:
    shares, widths, step = case
    budget = Budget(ratio, step)
    possible(widths, budget)
    chosen = round_widths(shares, widths, budget, rebalance=rebalance)
    for after, before in zip(chosen, widths, strict=True):
        assert after in allowed(before, step)
        assert after >= min(step, before)


@untimed
@given(shared_widths(multiples=False), RATIOS)
def test_no_single_step_brings_the_total_nearer(case: tuple[list[float], list[int], int], ratio: float) -> None:
    shares, widths, step = case
    budget = Budget(ratio, step)
    total = possible(widths, budget)
    chosen = round_widths(shares, widths, budget)
    miss = abs(sum(chosen) - total)
    for block, width in enumerate(widths):
        steps = sorted(allowed(width, step))
        here = steps.index(chosen[block])
        for other in steps[max(here - 1, 0) : here + 2]:
            assert abs(sum(chosen) - chosen[block] + other - total) >= miss


@untimed
@given(shared_widths(multiples=False), RATIOS)
def test_without_rebalancing_each_width_is_the_nearest_to_its_share(
    case: tuple[list[float], list[int], int], ratio: float
) -> None:
    shares, widths, step = case
    chosen = round_widths(shares, widths, Budget(ratio, step), rebalance=False)
    for share, width, after in zip(shares, widths, chosen, strict=True):
        best = min(abs(other - width * share) for other in allowed(width, step))
        assert abs(after - width * share) == best


@untimed
@given(shared_widths(multiples=False), RATIOS)
def test_without_rebalancing_a_larger_share_keeps_no_less(
    case: tuple[list[float], list[int], int], ratio: float
) -> None:
    shares, widths, step = case
    same = [max(widths)] * len(shares)
    chosen = round_widths(shares, same, Budget(ratio, step), rebalance=False)
    ordered = [after for _, after in sorted(zip(shares, chosen, strict=True))]
    assert ordered == sorted(ordered)


@untimed
@given(shared_widths(multiples=True), RATIOS)
def test_equal_blocks_differ_by_one_step_at_most_under_equal_shares(
    case: tuple[list[float], list[int], int], ratio: float
) -> None:
    _, widths, step = case
    budget = Budget(ratio, step)
    same = [max(widths)] * len(widths)
    possible(same, budget)
    chosen = round_widths([1 - ratio] * len(same), same, budget)
    assert max(chosen) - min(chosen) <= step
    assert chosen == sorted(chosen, reverse=True) or chosen == sorted(chosen)


@untimed
@given(shared_widths(multiples=False), st.booleans())
def test_a_ratio_of_zero_is_the_identity(case: tuple[list[float], list[int], int], rebalance: bool) -> None:
    shares, widths, step = case
    assert round_widths(shares, widths, Budget(0.0, step), rebalance=rebalance) == widths
    assert total_to_keep(widths, Budget(0.0, step)) == sum(widths)


@untimed
@given(shared_widths(multiples=False), RATIOS)
def test_rounding_is_deterministic_and_leaves_its_arguments_alone(
    case: tuple[list[float], list[int], int], ratio: float
) -> None:
    shares, widths, step = case
    budget = Budget(ratio, step)
    possible(widths, budget)
    before = list(shares), list(widths)
    assert round_widths(shares, widths, budget) == round_widths(shares, widths, budget)
    assert (shares, widths) == before


@pytest.mark.parametrize(
    ("shares", "widths", "ratio", "step", "expected"),
    [
        # a tie takes the larger width; the surplus is then taken from the block furthest beyond its share, first on a tie
        ([0.5, 0.5], [256 + 128, 256 + 128], 0.5, 128, [128, 256]),
        # method.md, section 3: half a step up, floor(x + 1/2), not to even
        ([0.5], [5], 0.5, 1, [3]),
        # the full width is allowed though no multiple, a step down from it goes to the last multiple
        ([1.0, 0.3], [100, 100], 0.25, 64, [64, 64]),
        # narrower than one step: it cannot be pruned, the other block pays
        ([0.5, 0.5], [4, 32], 0.5, 8, [4, 16]),
        # a share a hair above 1, as floating point makes them
        ([1 + 1e-12, 0.25], [16, 16], 0.375, 4, [16, 4]),
    ],
)
def test_rounding_by_hand(shares: list[float], widths: list[int], ratio: float, step: int, expected: list[int]) -> None:
    assert round_widths(shares, widths, Budget(ratio, step)) == expected


def test_the_example_of_the_method_reference_rounds_as_released_and_then_meets_the_budget() -> None:
    shares = [0.990476, 0.896091, 0.763299, 0.708030, 0.684276, 0.684276, 0.720972, 0.952580]
    widths, budget = [11008] * 8, Budget(0.2, 128)
    released = round_widths(shares, widths, budget, rebalance=False)
    assert released == [10880, 9856, 8448, 7808, 7552, 7552, 7936, 10496]
    assert sum(released) == 70528
    exact = round_widths(shares, widths, budget)
    assert sum(exact) == 70400 == total_to_keep(widths, budget)
    assert sum(abs(a - b) for a, b in zip(released, exact, strict=True)) == 128


@pytest.mark.parametrize("ratio", [0.001, 1e-9])
def test_a_ratio_that_removes_nothing_says_why(ratio: float) -> None:
    with pytest.raises(
        ConfigError, match=r"removes nothing with --round-to 128: 1024 channels would all stay\. Choose"
    ):
        total_to_keep([512, 512], Budget(ratio, 128))


@pytest.mark.parametrize(("widths", "least"), [([512, 512], 256), ([512, 64], 192), ([64, 64], 128)])
def test_a_ratio_that_cannot_be_met_says_how_much_can(widths: list[int], least: int) -> None:
    with pytest.raises(ConfigError) as caught:
        total_to_keep(widths, Budget(0.95, 128))
    assert f"one multiple a block already keeps {least} of {sum(widths)}" in str(caught.value)
    assert f"at most {1 - least / sum(widths):.4g} can go" in str(caught.value)
    assert "--round-to" in str(caught.value)


def test_the_total_is_the_nearest_multiple_and_halves_go_up() -> None:
    assert total_to_keep([100, 100], Budget(0.5, 8)) == 104  # 12.5 steps
    assert total_to_keep([172] * 5, Budget(0.5, 1)) == 430
    assert total_to_keep([172] * 5, Budget(0.2, 128)) == 640  # 5.375 steps; also the least that five blocks can keep


def test_a_share_of_all_parameters_becomes_a_share_of_the_channels() -> None:
    assert channel_ratio(0.32, parameters=1000, prunable=640) == pytest.approx(0.5)
    assert channel_ratio(0.0, parameters=1000, prunable=640) == 0
    with pytest.raises(ConfigError, match=r"--ratio 0\.7 of all parameters cannot be met: .* hold 64\.0% of them\."):
        channel_ratio(0.7, parameters=1000, prunable=640)
    with pytest.raises(ConfigError, match=r"--budget channels"):
        channel_ratio(0.64, parameters=1000, prunable=640)


@untimed
@given(st.floats(0, 0.99), st.integers(1, 10**6), st.integers(1, 10**6))
def test_removing_the_converted_share_removes_the_share_asked_for(ratio: float, prunable: int, rest: int) -> None:
    assume(ratio * (prunable + rest) < prunable)
    converted = channel_ratio(ratio, prunable + rest, prunable)
    assert 0 <= converted < 1
    assert math.isclose(converted * prunable, ratio * (prunable + rest), abs_tol=1e-9)


# --- scores to channels ----------------------------------------------------------------------------------------------


def test_the_highest_stay_in_ascending_order() -> None:
    assert keep_highest(torch.tensor([0.1, 0.9, -3.0, 0.5]), 2) == (1, 3)
    assert keep_highest(torch.tensor([0.1, 0.9]), 2) == (0, 1)


@untimed
@given(st.lists(st.integers(-2, 2), min_size=1, max_size=200), st.data())
def test_among_equal_scores_the_lower_index_stays(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    assert keep_highest(torch.tensor(scores, dtype=torch.float32), count) == tuple(sorted(order[:count]))


def test_equal_scores_keep_the_first_channels_also_where_zeros_have_a_sign() -> None:
    assert keep_highest(torch.full((1000,), 0.1), 7) == tuple(range(7))
    assert keep_highest(torch.tensor([0.0, -0.0, 0.0, -0.0]), 3) == (0, 1, 2)


@untimed
@given(st.permutations(range(24)), st.integers(1, 24))
def test_a_permutation_of_distinct_scores_permutes_the_choice(order: list[int], count: int) -> None:
    scores = torch.linspace(-1, 1, 24)[torch.tensor([7 * index % 24 for index in range(24)])]
    permuted = keep_highest(scores[torch.tensor(order)], count)
    assert tuple(sorted(order[index] for index in permuted)) == keep_highest(scores, count)


def test_keeping_does_not_change_the_scores() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0])
    keep_highest(scores, 2)
    assert scores.tolist() == [3.0, 1.0, 2.0]


# --- allocators, checked ---------------------------------------------------------------------------------------------


class Fixed(Allocator):
    """Returns what it is told to."""

    name: ClassVar[str] = "fixed"
    answer: Any = None
    coarse: Any = None

    def allocate(self, summaries: Sequence[BlockSummary], budget: Budget) -> Any:
        return self.answer

    def importance(self, summaries: Sequence[BlockSummary]) -> Any:
        return self.coarse


def fixed(answer: object, coarse: object = None) -> ConfiguredComponent[Allocator]:
    # not validated: the answers that plugins give include those that pydantic would not let through
    return ConfiguredComponent(
        Fixed.model_construct(answer=answer, coarse=coarse), Origin("acme", "acme-pruning", "1.0")
    )


def summaries(widths: Sequence[int]) -> list[BlockSummary]:
    generator = torch.Generator().manual_seed(0)
    return [
        BlockSummary(block, "mlp", width, 10, {}, torch.rand(width, generator=generator))
        for block, width in enumerate(widths)
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([0.5, math.nan], "returned the share nan for block 1, outside (0, 1]."),
        ([0.0, 0.5], "returned the share 0.0 for block 0, outside (0, 1]."),
        ([0.5, -0.1], "returned the share -0.1 for block 1, outside (0, 1]."),
        ([1.01, 0.5], "returned the share 1.01 for block 0, outside (0, 1]."),
        ([math.inf, 0.5], "returned the share inf for block 0, outside (0, 1]."),
        ([0.5], "returned 1 shares for 2 blocks."),
        ([], "returned 0 shares for 2 blocks."),
        ([0.5, 0.5, 0.5], "returned 3 shares for 2 blocks."),
        (None, "failed in allocate(): TypeError: 'NoneType' object is not iterable."),
        (["much", 0.5], "failed in allocate(): ValueError: could not convert string to float: 'much'."),
    ],
)
def test_impossible_shares_are_blamed_on_the_allocator(answer: object, message: str) -> None:
    with pytest.raises(PluginError) as caught:
        allocate(fixed(answer), summaries([8, 8]), Budget(0.5))
    assert str(caught.value) == f"allocator 'fixed' (plugin 'acme' of acme-pruning 1.0) {message}"


def test_shares_may_be_any_numbers() -> None:
    answer = torch.tensor([0.25, 1.0])
    shares = allocate(fixed(answer), summaries([8, 8]), Budget(0.5))
    assert shares == [0.25, 1.0]
    assert all(type(share) is float for share in shares)


def test_blocks_are_planned_by_share_and_score() -> None:
    blocks = summaries([8, 16])
    planned = plan_blocks(blocks, fixed([0.5, 0.5], coarse=(0.25, torch.tensor(0.75))), Budget(0.5, 4))
    assert [(plan.block, plan.path, plan.width, plan.importance) for plan in planned] == [
        (0, "mlp", 8, 0.25),
        (1, "mlp", 16, 0.75),
    ]
    for plan, summary in zip(planned, blocks, strict=True):
        assert plan.kept == keep_highest(summary.scores, summary.width // 2)


def test_an_allocator_needs_no_importance() -> None:
    assert [plan.importance for plan in plan_blocks(summaries([8, 8]), fixed([0.5, 0.5]), Budget(0.5))] == [None, None]


@pytest.mark.parametrize(
    ("coarse", "message"),
    [([1.0], "returned 1 importances for 2 blocks."), (["a", "b"], "failed in importance(): ValueError: ")],
)
def test_impossible_importances_are_blamed_on_the_allocator(coarse: object, message: str) -> None:
    with pytest.raises(PluginError) as caught:
        plan_blocks(summaries([8, 8]), fixed([0.5, 0.5], coarse), Budget(0.5))
    assert str(caught.value).startswith(f"allocator 'fixed' (plugin 'acme' of acme-pruning 1.0) {message}")


def test_a_ratio_of_zero_keeps_every_channel() -> None:
    planned = plan_blocks(summaries([8, 13]), fixed([1.0, 1.0]), Budget(0.0, 4))
    assert [plan.kept for plan in planned] == [tuple(range(8)), tuple(range(13))]


# --- the plan as a file ----------------------------------------------------------------------------------------------


TEXT = st.text(max_size=12)
INTEGERS = st.integers(0, 2**40)


@st.composite
def block_plans(draw: st.DrawFn, block: int) -> BlockPlan:
    width = draw(st.integers(1, 40))
    kept = draw(st.sets(st.integers(0, width - 1), min_size=1))
    importance = draw(st.none() | st.floats(allow_nan=False, allow_infinity=False))
    return BlockPlan(block=block, path=draw(TEXT), width=width, importance=importance, kept=tuple(sorted(kept)))


@st.composite
def plans(draw: st.DrawFn) -> PruningPlan:
    calibration = st.builds(
        CalibrationIdentity, spec=TEXT, samples=INTEGERS, seqlen=INTEGERS, seed=INTEGERS, fingerprint=TEXT
    )
    return PruningPlan(
        model=draw(st.builds(ModelIdentity, source=TEXT, family=TEXT, fingerprint=TEXT, parameters=INTEGERS)),
        calibration=draw(st.none() | calibration),
        ratio=draw(st.floats(0, 1, exclude_max=True)),
        budget=draw(st.sampled_from(["channels", "parameters"])),
        round_to=draw(st.integers(1, 512)),
        seed=draw(INTEGERS),
        components=draw(st.dictionaries(TEXT, TEXT, max_size=3)),
        versions=draw(st.dictionaries(TEXT, TEXT, max_size=3)),
        blocks=tuple(draw(block_plans(block)) for block in range(draw(st.integers(1, 4)))),
    )


@untimed
@given(plans())
def test_a_plan_survives_json(plan: PruningPlan) -> None:
    text = plan.to_json()
    again = PruningPlan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert json.loads(text) == plan.model_dump(mode="json")


@untimed
@given(plans())
def test_a_plan_counts_what_it_keeps(plan: PruningPlan) -> None:
    assert plan.widths == tuple(len(block.kept) for block in plan.blocks)
    assert 0 <= plan.achieved_ratio < 1
    kept, channels = sum(plan.widths), sum(block.width for block in plan.blocks)
    assert plan.achieved_ratio == pytest.approx(1 - kept / channels)


def test_a_plan_has_one_line_per_block() -> None:
    lines = example().to_json().splitlines()
    assert sum('"kept"' in line for line in lines) == 2
    assert all(json.loads(line.strip().rstrip(",")) for line in lines if '"kept"' in line)


def example(**changes: object) -> PruningPlan:
    values: dict[str, object] = {
        "model": {"source": "demo", "family": "llama", "fingerprint": "f", "parameters": 100},
        "calibration": None,
        "ratio": 0.5,
        "budget": "channels",
        "round_to": 1,
        "seed": 0,
        "components": {},
        "versions": {},
        "blocks": [
            {"block": 0, "path": "mlp", "width": 4, "kept": [0, 3]},
            {"block": 7, "path": "mlp", "width": 4, "kept": [1, 2]},
        ],
    }
    return PruningPlan.from_json(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"kept": []}, "blocks.1: block 7, mlp: keeps no channel"),
        ({"kept": [1, 4]}, "blocks.1: block 7, mlp: keeps channel 4, outside 0..3"),
        ({"kept": [-1, 2]}, "blocks.1: block 7, mlp: keeps channel -1, outside 0..3"),
        ({"kept": [2, 1]}, "blocks.1: block 7, mlp: kept channels are not ascending and distinct"),
        ({"kept": [1, 1]}, "blocks.1: block 7, mlp: kept channels are not ascending and distinct"),
        ({"kept": [0.5]}, "blocks.1.kept.0: Input should be a valid integer"),
        ({"width": 0}, "blocks.1.width: Input should be greater than 0"),
        ({"block": -1}, "blocks.1.block: Input should be greater than or equal to 0"),
        ({"experts": 2}, "blocks.1.experts: Extra inputs are not permitted"),
        ({"block": 0}, "as a whole: block 0, mlp: listed twice"),
    ],
)
def test_an_impossible_block_is_refused_by_name(block: dict[str, object], message: str) -> None:
    first, second = json.loads(example().to_json())["blocks"]
    with pytest.raises(PlanError) as caught:
        example(blocks=[first, {**second, **block}])
    assert str(caught.value).startswith(f"the plan cannot be used: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "as a whole: Invalid JSON"),
        ('{"format": "cfsp-pruning-plan"', "as a whole: Invalid JSON"),
        ("[]", "as a whole: Input should be an object"),
        ("{}", "model: Field required"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        PruningPlan.from_json(text)
    assert str(caught.value).startswith(f"the plan cannot be used: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format: Input should be 'cfsp-pruning-plan'"),
        ({"version": 2}, "version: Input should be 1"),
        ({"ratio": 1.0}, "ratio: Input should be less than 1"),
        ({"round_to": 0}, "round_to: "),
        ({"budget": "heads"}, "budget: "),
        ({"blocks": []}, "blocks: "),
        ({"note": "mine"}, "note: Extra inputs are not permitted"),
        ({"ratio": 2, "round_to": 0}, "ratio: Input should be less than 1 (2 problems in all)"),
    ],
)
def test_a_plan_with_an_impossible_value_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        example(**changes)
    assert str(caught.value).startswith(f"the plan cannot be used: {message}")


def test_one_block_may_hold_several_feed_forwards() -> None:
    blocks = [{"block": 0, "path": f"experts.{expert}", "width": 4, "kept": [0]} for expert in range(3)]
    assert example(blocks=blocks).widths == (1, 1, 1)


def test_a_plan_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        example().ratio = 0.1
