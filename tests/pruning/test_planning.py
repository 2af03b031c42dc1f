"""From shares to widths, from scores to channels, and the plan as a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from cfsp_framework.testing import build_plan

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure

# --- shares, widths, budgets -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Shares and widths of a few blocks, and a budget."""

    shares: list[float]
    widths: list[int]
    budget: Budget

    @property
    def total(self) -> int:
        """Channels to keep; a budget that cannot be met is passed over."""
        try:
            return total_to_keep(self.widths, self.budget)
        except ConfigError:
            assume(False)
            raise

    @property
    def equal(self) -> Case:
        """The same case with blocks of equal widths."""
        return replace(self, widths=[max(self.widths)] * len(self.widths))


@st.composite
def cases(draw: st.DrawFn, *, multiples: bool = False) -> Case:
    """Draw a case; with ``multiples`` every width is a multiple of the step."""
    step = draw(st.sampled_from([1, 2, 7, 8, 64, 128]))
    width = st.integers(1, 12).map(lambda count: count * step) if multiples else st.integers(1, 12 * step)
    blocks = draw(st.lists(st.tuples(st.floats(1e-6, 1.0), width), min_size=1, max_size=6))
    budget = Budget(draw(st.floats(0.01, 0.95)), step)
    return Case([share for share, _ in blocks], [count for _, count in blocks], budget)


def allowed(width: int, step: int) -> set[int]:
    return {*range(step, width, step), width}


@untimed
@given(cases(multiples=True))
def test_the_total_is_exact_where_widths_are_multiples_of_the_step(case: Case) -> None:
    total, exact = case.total, (1 - case.budget.ratio) * sum(case.widths)
    assert sum(round_widths(case.shares, case.widths, case.budget)) == total
    assert abs(total - exact) <= case.budget.round_to / 2 + 1e-6


@untimed
@given(cases(), st.booleans())
def test_every_width_is_a_multiple_of_the_step_or_the_full_width(case: Case, rebalance: bool) -> None:
    assert case.total
    rounded = round_widths(case.shares, case.widths, case.budget, rebalance=rebalance)
    assert all(after in allowed(width, case.budget.round_to) for after, width in zip(rounded, case.widths, strict=True))


@untimed
@given(cases())
def test_no_single_step_brings_the_total_nearer(case: Case) -> None:
    total, rounded = case.total, round_widths(case.shares, case.widths, case.budget)
    miss = abs(sum(rounded) - total)
    for after, width in zip(rounded, case.widths, strict=True):
        steps = sorted(allowed(width, case.budget.round_to))
        position = steps.index(after)
        for other in steps[max(position - 1, 0) : position + 2]:
            assert abs(sum(rounded) - after + other - total) >= miss


@untimed
@given(cases())
def test_without_rebalancing_each_width_is_the_nearest_to_its_share(case: Case) -> None:
    rounded = round_widths(case.shares, case.widths, case.budget, rebalance=False)
    for share, width, after in zip(case.shares, case.widths, rounded, strict=True):
        best = min(abs(other - width * share) for other in allowed(width, case.budget.round_to))
        assert abs(after - width * share) == best


@untimed
@given(cases())
def test_without_rebalancing_a_larger_share_keeps_no_less(case: Case) -> None:
    rounded = round_widths(case.shares, case.equal.widths, case.budget, rebalance=False)
    ordered = [width for _, width in sorted(zip(case.shares, rounded, strict=True))]
    assert ordered == sorted(ordered)


@untimed
@given(cases(multiples=True))
def test_equal_blocks_differ_by_one_step_at_most_under_equal_shares(case: Case) -> None:
    case = case.equal
    assert case.total
    rounded = round_widths([1 - case.budget.ratio] * len(case.widths), case.widths, case.budget)
    assert max(rounded) - min(rounded) <= case.budget.round_to
    assert rounded in (sorted(rounded), sorted(rounded, reverse=True))


@untimed
@given(cases(), st.booleans())
def test_a_ratio_of_zero_is_the_identity(case: Case, rebalance: bool) -> None:
    nothing = Budget(0.0, case.budget.round_to)
    assert round_widths(case.shares, case.widths, nothing, rebalance=rebalance) == case.widths
    assert total_to_keep(case.widths, nothing) == sum(case.widths)


@untimed
@given(cases())
def test_rounding_is_deterministic_and_does_not_change_its_arguments(case: Case) -> None:
    assert case.total
    before = list(case.shares), list(case.widths)
    first, second = (round_widths(case.shares, case.widths, case.budget) for _ in range(2))
    assert first == second
    assert (case.shares, case.widths) == before


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
def test_a_ratio_that_removes_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"--round-to 128.* 1024 "):
        total_to_keep([512, 512], Budget(ratio, 128))


@pytest.mark.parametrize(("widths", "least"), [([512, 512], 256), ([512, 64], 192), ([64, 64], 128)])
def test_a_ratio_that_cannot_be_met_is_refused_with_the_largest_that_can(widths: list[int], least: int) -> None:
    with pytest.raises(ConfigError, match=f" {least} of {sum(widths)}.*{1 - least / sum(widths):.4g}.*--round-to"):
        total_to_keep(widths, Budget(0.95, 128))


def test_the_total_is_the_nearest_multiple_and_halves_go_up() -> None:
    assert total_to_keep([100, 100], Budget(0.5, 8)) == 104  # 12.5 steps
    assert total_to_keep([172] * 5, Budget(0.5, 1)) == 430
    assert total_to_keep([172] * 5, Budget(0.2, 128)) == 640  # 5.375 steps; also the least that five blocks can keep


def test_a_share_of_all_parameters_becomes_a_share_of_the_channels() -> None:
    assert channel_ratio(0.32, parameters=1000, prunable=640) == pytest.approx(0.5)
    assert channel_ratio(0.0, parameters=1000, prunable=640) == 0
    for ratio in (0.7, 0.64):
        with pytest.raises(ConfigError, match=rf"--ratio {ratio} .*64\.0%.*--budget channels"):
            channel_ratio(ratio, parameters=1000, prunable=640)


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
    """Return fixed shares and importances."""

    name: ClassVar[str] = "fixed"
    shares: Any = None
    coarse: Any = None

    def allocate(self, summaries: Sequence[BlockSummary], budget: Budget) -> Any:
        return self.shares

    def importance(self, summaries: Sequence[BlockSummary]) -> Any:
        return self.coarse


def fixed(shares: object, coarse: object = None) -> ConfiguredComponent[Allocator]:
    # not validated: plugins return values that pydantic would refuse
    component = Fixed.model_construct(shares=shares, coarse=coarse)
    return ConfiguredComponent(component, Origin("acme", "acme-pruning", "1.0"))


def summaries(*widths: int) -> list[BlockSummary]:
    draw = torch.Generator().manual_seed(0)
    return [BlockSummary(block, "mlp", F, 10, {}, torch.rand(F, generator=draw)) for block, F in enumerate(widths)]


BLAME = r"^allocator 'fixed' \(plugin 'acme' of acme-pruning 1\.0\)"


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.5, math.nan], "share nan for block 1"),
        ([0.0, 0.5], r"share 0\.0 for block 0"),
        ([0.5, -0.1], r"share -0\.1 for block 1"),
        ([1.01, 0.5], r"share 1\.01 for block 0"),
        ([math.inf, 0.5], "share inf for block 0"),
        ([0.5], "1 shares for 2 blocks"),
        ([], "0 shares for 2 blocks"),
        ([0.5, 0.5, 0.5], "3 shares for 2 blocks"),
        (None, r"allocate\(\): TypeError"),
        (["much", 0.5], r"allocate\(\): ValueError"),
    ],
)
def test_impossible_shares_are_blamed_on_the_allocator(shares: object, message: str) -> None:
    with pytest.raises(PluginError, match=f"{BLAME}.*{message}"):
        allocate(fixed(shares), summaries(8, 8), Budget(0.5))


@pytest.mark.parametrize(
    ("coarse", "message"), [([1.0], "1 importances for 2 blocks"), (["a", "b"], r"importance\(\): ValueError")]
)
def test_impossible_importances_are_blamed_on_the_allocator(coarse: object, message: str) -> None:
    with pytest.raises(PluginError, match=f"{BLAME}.*{message}"):
        plan_blocks(summaries(8, 8), fixed([0.5, 0.5], coarse), Budget(0.5))


def test_shares_may_be_any_numbers() -> None:
    shares = allocate(fixed(torch.tensor([0.25, 1.0])), summaries(8, 8), Budget(0.5))
    assert shares == [0.25, 1.0]
    assert all(type(share) is float for share in shares)


def test_blocks_are_planned_by_share_and_score() -> None:
    blocks = summaries(8, 16)
    planned = plan_blocks(blocks, fixed([0.5, 0.5], coarse=(0.25, torch.tensor(0.75))), Budget(0.5, 4))
    assert [(plan.block, plan.path, plan.width, plan.importance) for plan in planned] == [
        (0, "mlp", 8, 0.25),
        (1, "mlp", 16, 0.75),
    ]
    for plan, summary in zip(planned, blocks, strict=True):
        assert plan.kept == keep_highest(summary.scores, summary.width // 2)
    without = plan_blocks(summaries(8, 8), fixed([0.5, 0.5]), Budget(0.5))
    assert [plan.importance for plan in without] == [None, None]


def test_a_ratio_of_zero_keeps_every_channel() -> None:
    planned = plan_blocks(summaries(8, 13), fixed([1.0, 1.0]), Budget(0.0, 4))
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
    blocks = [
        BlockPlan(block=0, path="mlp", width=4, kept=(0, 3)),
        BlockPlan(block=7, path="mlp", width=4, kept=(1, 2)),
    ]
    return PruningPlan.from_json(json.dumps({**build_plan(blocks).model_dump(mode="json"), **changes}))


def change(**values: object) -> dict[str, object]:
    """Return changes that give the second block other values."""
    first, second = json.loads(example().to_json())["blocks"]
    return {"blocks": [first, {**second, **values}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (change(kept=[]), "block 7, mlp: keeps no channel"),
        (change(kept=[1, 4]), r"block 7, mlp: keeps channel 4, outside 0\.\.3"),
        (change(kept=[-1, 2]), r"block 7, mlp: keeps channel -1, outside 0\.\.3"),
        (change(kept=[2, 1]), "block 7, mlp: .*not ascending"),
        (change(kept=[1, 1]), "block 7, mlp: .*not ascending"),
        (change(kept=[0.5]), r"blocks\.1\.kept\.0: "),
        (change(width=0), r"blocks\.1\.width: "),
        (change(block=-1), r"blocks\.1\.block: "),
        (change(experts=2), r"blocks\.1\.experts: "),
        (change(block=0), "block 0, mlp: .*twice"),
        ({"format": "other"}, "format: "),
        ({"version": 2}, "version: "),
        ({"ratio": 1.0}, "ratio: "),
        ({"round_to": 0}, "round_to: "),
        ({"budget": "heads"}, "budget: "),
        ({"blocks": []}, "blocks: "),
        ({"note": "mine"}, "note: "),
        ({"ratio": 2, "round_to": 0}, r"ratio: .*\(2 problems"),
    ],
)
def test_an_impossible_value_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        example(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "Invalid JSON"), ('{"format": "cfsp-pruning-plan"', "Invalid JSON"), ("[]", "object"), ("{}", "model: ")],
)
def test_a_text_that_is_not_a_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=f"^the plan cannot be used: .*{message}"):
        PruningPlan.from_json(text)


def test_a_block_may_hold_several_feed_forwards_and_a_plan_is_frozen() -> None:
    blocks = [{"block": 0, "path": f"experts.{expert}", "width": 4, "kept": [0]} for expert in range(3)]
    plan = example(blocks=blocks)
    assert plan.widths == (1, 1, 1)
    with pytest.raises(ValidationError, match="frozen"):
        plan.ratio = 0.1
