"""From summaries and a budget to widths, kept channels and a plan. Pure: no model, no files.

The rounding, the exact total and the stable selection serve every allocator and criterion alike (docs/method.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Literal, cast

from cfsp_framework.api.components import Allocator
from cfsp_framework.api.data import BlockSummary, Budget
from cfsp_framework.api.records import BlockPlan
from cfsp_framework.errors import ConfigError, PlanError, PluginError

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp_framework.host.registry import ConfiguredComponent


_ENDLESS = 100_000
"""Numbers taken from an allocator's answer at most, more than any model has blocks."""


def width_step(round_to: int, tensor_parallel: int) -> int:
    """What widths are multiples of, so that both divide them; a process then gets multiples of ``step / tensor_parallel``."""
    return math.lcm(round_to, tensor_parallel)


def check_shared(widths: Sequence[tuple[int, str, int]], tensor_parallel: int) -> None:
    """Refuse feed-forwards, each a block, a path and a width, that so many processes cannot share alike.

    Raises:
        PlanError: the first of them, by name.
    """
    for block, path, width in widths:
        if width % tensor_parallel:
            raise PlanError(
                f"--tensor-parallel {tensor_parallel}: block {block}, {path or 'the block itself'} has {width} channels, "
                f"which {tensor_parallel} processes cannot share alike."
            )


def channel_ratio(ratio: float, parameters: int, prunable: int, gone: int = 0) -> float:
    """The share of channels to remove for a share of all ``parameters`` of which ``prunable`` sit in channels.

    ``gone`` parameters were removed otherwise and count.
    """
    wanted = ratio * parameters - gone
    if wanted < 0:
        raise ConfigError(
            f"the dropped attention is {gone / parameters:.1%} of all parameters already, more than --ratio {ratio}."
        )
    if wanted >= prunable:
        raise ConfigError(
            f"--ratio {ratio} of all parameters cannot be met: the feed-forward channels hold "
            f"{prunable / parameters:.1%} of them. Choose less, --budget channels, or --drop-attention."
        )
    return wanted / prunable


def allocate(
    allocator: ConfiguredComponent[Allocator], summaries: Sequence[BlockSummary], budget: Budget
) -> list[float]:
    """The allocator's shares, checked: one per block, finite, in (0, 1]."""
    with allocator.call_component("allocate()", _read_only_inputs(summaries)) as component:
        shares = [float(share) for share in islice(component.allocate(summaries, budget), _ENDLESS)]
    _check_count(allocator, "shares", shares, summaries)
    for summary, share in zip(summaries, shares, strict=True):
        if not 0 < share <= 1 + 1e-9:  # also refuses NaN
            raise PluginError(f"{allocator} returned the share {share} for block {summary.block}, outside (0, 1].")
    return shares


def importance_of(
    allocator: ConfiguredComponent[Allocator], summaries: Sequence[BlockSummary]
) -> Sequence[float | None]:
    """The allocator's coarse importance, checked: one finite number per block, or None for each."""
    with allocator.call_component("importance()", _read_only_inputs(summaries)) as component:
        found = component.importance(summaries)
        values = None if found is None else [float(value) for value in islice(found, _ENDLESS)]
    if values is None:
        return [None] * len(summaries)
    _check_count(allocator, "importances", values, summaries)
    for summary, value in zip(summaries, values, strict=True):
        if not math.isfinite(value):
            raise PluginError(f"{allocator} returned the importance {value} for block {summary.block}.")
    return values


def _check_count(
    allocator: ConfiguredComponent[Allocator], what: str, values: Sequence[float], summaries: Sequence[BlockSummary]
) -> None:
    if len(values) != len(summaries):
        raise PluginError(f"{allocator} returned {len(values)} {what} for {len(summaries)} blocks.")


def _read_only_inputs(summaries: Sequence[BlockSummary]) -> dict[str, Tensor | None]:
    """The tensors an allocator sees."""
    named = {f"block {summary.block} {summary.path} scores": summary.scores for summary in summaries}
    return {**named, **{f"block {summary.block} {summary.path} curve": summary.curve for summary in summaries}}


def total_to_keep(widths: Sequence[int], budget: Budget, counts: Sequence[int] | None = None) -> int:
    """The number of channels all blocks keep together: the multiple of ``round_to`` nearest to what was asked for.

    Width i stands for ``counts[i]`` channels at once, one in each expert of a mixture; by default for one.
    """
    counts = counts or [1] * len(widths)
    all_channels = sum(width * count for width, count in zip(widths, counts, strict=True))
    if budget.ratio == 0:
        return all_channels
    step = budget.round_to * math.gcd(*counts)
    total = min(step * math.floor((1 - budget.ratio) * all_channels / step + 0.5), all_channels)
    least = sum(min(budget.round_to, width) * count for width, count in zip(widths, counts, strict=True))
    if total < least:
        raise ConfigError(
            f"a ratio of {budget.ratio:.4g} of the feed-forward channels cannot be met with --round-to "
            f"{budget.round_to}: one multiple a block already keeps {least} of {all_channels}, so at most "
            f"{1 - least / all_channels:.4g} can go. Choose a smaller ratio or a smaller --round-to."
        )
    if total == all_channels:
        raise ConfigError(
            f"a ratio of {budget.ratio:.4g} of the feed-forward channels removes nothing with --round-to "
            f"{budget.round_to}: {all_channels} channels would all stay. Choose a larger ratio or a smaller --round-to."
        )
    return total


def round_widths(
    shares: Sequence[float],
    widths: Sequence[int],
    budget: Budget,
    *,
    rebalance: bool = True,
    counts: Sequence[int] | None = None,
) -> list[int]:
    """Whole widths for real shares: the nearest allowed one per block, then single steps until the total is exact.

    Allowed are the multiples of ``round_to`` below a block's width, and the width itself; the larger one on a tie. A
    step is taken by the block furthest beyond its share, the first one on a tie. Where widths are no multiples, or
    stand for different ``counts`` of channels, and the exact total cannot be reached, the steps end as near as they get.
    """
    if budget.ratio == 0:
        return list(widths)
    counts = counts or [1] * len(widths)
    targets = [width * min(share, 1.0) for width, share in zip(widths, shares, strict=True)]
    chosen = [_nearest(width, target, budget.round_to) for width, target in zip(widths, targets, strict=True)]
    if not rebalance:
        return chosen
    total = total_to_keep(widths, budget, counts)
    while (excess := sum(width * count for width, count in zip(chosen, counts, strict=True)) - total) != 0:
        step = _best_step(chosen, targets, widths, counts, budget.round_to, excess)
        if step is None:
            break
        block, width = step
        chosen[block] = width
    return chosen


def keep_highest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the ``count`` highest of ``scores (F,)``, ascending; among equals the lower index stays."""
    order = scores.neg().argsort(stable=True)  # (F,)
    kept = cast("list[int]", order[:count].sort().values.tolist())  # pyright: ignore[reportUnknownMemberType]
    return tuple(kept)


def plan_blocks(
    summaries: Sequence[BlockSummary],
    allocator: ConfiguredComponent[Allocator],
    budget: Budget,
    *,
    rebalance: bool = True,
) -> tuple[BlockPlan, ...]:
    """Widths by the allocator, channels by the scores; one entry for every feed-forward."""
    shares = allocate(allocator, summaries, budget)
    units = [_unit(summary) for summary in summaries]
    counts = [summary.width // unit for summary, unit in zip(summaries, units, strict=True)]
    widths = round_widths(shares, units, budget, rebalance=rebalance, counts=counts)
    importance = importance_of(allocator, summaries)
    return tuple(
        BlockPlan(
            block=summary.block,
            path=path,
            width=len(scores),
            importance=value,
            kept=keep_highest(scores, width * len(scores) // unit),
        )
        for summary, unit, width, value in zip(summaries, units, widths, importance, strict=True)
        for path, scores in _members(summary)
    )


def _unit(summary: BlockSummary) -> int:
    """The width the configuration gives: of one expert, where shared experts may be several of them wide."""
    return min(summary.members.values(), default=summary.width)


def _members(summary: BlockSummary) -> list[tuple[str, Tensor]]:
    """Path and scores ``(F,)`` of every feed-forward of a summary."""
    members = summary.members or {summary.path: summary.width}
    ends = accumulate(members.values())
    return [(path, summary.scores[end - members[path] : end]) for path, end in zip(members, ends, strict=True)]


def _nearest(full: int, target: float, step: int) -> int:
    below = min(max(step, step * math.floor(target / step)), full)
    above = min(below + step, full)
    return below if target - below < above - target else above


def _neighbour(width: int, full: int, step: int, direction: Literal[-1, 1]) -> int | None:
    """The next allowed width up or down."""
    if direction == 1:
        return min(width + step, full) if width < full else None
    below = step * ((width - 1) // step)
    return below if below > 0 else None


def _best_step(
    chosen: Sequence[int],
    targets: Sequence[float],
    full: Sequence[int],
    counts: Sequence[int],
    step: int,
    excess: int,
) -> tuple[int, int] | None:
    """The block to move by one step toward the total, and its new width; None where no step brings it nearer."""
    direction: Literal[-1, 1] = -1 if excess > 0 else 1
    steps: list[tuple[float, int, int]] = []
    for block, width in enumerate(chosen):
        after = _neighbour(width, full[block], step, direction)
        if after is not None and abs(excess + (after - width) * counts[block]) < abs(excess):
            steps.append(((width - targets[block]) * direction, block, after))
    if not steps:
        return None
    _, block, after = min(steps)
    return block, after
