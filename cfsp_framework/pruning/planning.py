"""Plan widths and kept channels from summaries and a budget, without a model or files.

The rounding, the exact total and the stable selection are the same for every allocator and criterion (docs/method.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Literal, cast

from cfsp_framework.api.components import Allocator, Fitness, SearchingAllocator
from cfsp_framework.api.data import BlockSummary, Budget
from cfsp_framework.api.records import BlockPlan
from cfsp_framework.errors import ConfigError, PlanError, PluginError

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp_framework.host.registry import ConfiguredComponent


_MOST_VALUES = 100_000
"""Largest number of values read from an allocator's result, in case it never ends; no model has as many blocks."""


def width_step(round_to: int, tensor_parallel: int) -> int:
    """Return the least number whose multiples both divide; a process gets multiples of ``step / tensor_parallel``."""
    return math.lcm(round_to, tensor_parallel)


def check_shared(widths: Sequence[tuple[int, str, int]], tensor_parallel: int) -> None:
    """Refuse feed-forwards, given by block, path and width, that cannot be divided equally among the processes.

    Raises:
        PlanError: it names the first of them.
    """
    for block, path, width in widths:
        if width % tensor_parallel:
            raise PlanError(
                f"--tensor-parallel {tensor_parallel}: block {block}, {path or 'the block itself'} has {width} channels, "
                f"which cannot be divided equally among {tensor_parallel} processes."
            )


def channel_ratio(ratio: float, parameters: int, prunable: int, removed: int = 0) -> float:
    """Return the share of channels to remove for a share of all ``parameters``, ``prunable`` of which are in channels.

    ``removed`` parameters, of dropped attentions, count toward the share.

    Raises:
        ConfigError: the share cannot be met.
    """
    remaining = ratio * parameters - removed
    if remaining < 0:
        raise ConfigError(
            f"the dropped attention is {removed / parameters:.1%} of all parameters already, more than --ratio {ratio}."
        )
    if remaining >= prunable:
        raise ConfigError(
            f"--ratio {ratio} of all parameters cannot be met: the feed-forward channels hold "
            f"{prunable / parameters:.1%} of them. Choose a smaller one, --budget channels, or --drop-attention."
        )
    return remaining / prunable


def allocate(
    allocator: ConfiguredComponent[Allocator],
    summaries: Sequence[BlockSummary],
    budget: Budget,
    fitness: Fitness | None = None,
) -> list[float]:
    """Return the allocator's shares, checked: one per block, finite, in (0, 1]; one that searches needs a ``fitness``.

    Raises:
        PluginError: the allocator failed or returned something else.
        ConfigError: the allocator searches, and the model cannot be tried here.
    """
    searches = isinstance(allocator.component, SearchingAllocator)
    if searches and fitness is None:
        raise ConfigError(f"{allocator} tries widths on the model, which is not possible here; use another allocator.")
    with allocator.call_component("search()" if searches else "allocate()", _read_only_inputs(summaries)) as component:
        if isinstance(component, SearchingAllocator) and fitness is not None:
            result = component.search(summaries, budget, fitness)
        else:
            result = component.allocate(summaries, budget)
        shares = [float(share) for share in islice(result, _MOST_VALUES)]
    check_shares(allocator, shares, summaries)
    return shares


def check_shares(allocator: object, shares: Sequence[float], summaries: Sequence[BlockSummary]) -> None:
    """Refuse shares that are not one per block, finite, in (0, 1].

    Raises:
        PluginError: it names the ``allocator``.
    """
    _check_count(allocator, "shares", shares, summaries)
    for summary, share in zip(summaries, shares, strict=True):
        if not 0 < share <= 1 + 1e-9:  # also refuses NaN
            raise PluginError(f"{allocator} returned the share {share} for block {summary.block}, outside (0, 1].")


def get_importance(
    allocator: ConfiguredComponent[Allocator], summaries: Sequence[BlockSummary]
) -> Sequence[float | None]:
    """Return the allocator's coarse importance, checked: one finite number per block, or None for each.

    Raises:
        PluginError: the allocator failed or returned something else.
    """
    with allocator.call_component("importance()", _read_only_inputs(summaries)) as component:
        importance = component.importance(summaries)
        values = None if importance is None else [float(value) for value in islice(importance, _MOST_VALUES)]
    if values is None:
        return [None] * len(summaries)
    _check_count(allocator, "importances", values, summaries)
    for summary, value in zip(summaries, values, strict=True):
        if not math.isfinite(value):
            raise PluginError(f"{allocator} returned the importance {value} for block {summary.block}.")
    return values


def _check_count(allocator: object, what: str, values: Sequence[float], summaries: Sequence[BlockSummary]) -> None:
    if len(values) != len(summaries):
        raise PluginError(f"{allocator} returned {len(values)} {what} for {len(summaries)} blocks.")


def _read_only_inputs(summaries: Sequence[BlockSummary]) -> dict[str, Tensor | None]:
    """Return the tensors that an allocator gets and must not write to, by name."""
    scores = {f"block {summary.block} {summary.path} scores": summary.scores for summary in summaries}
    return {**scores, **{f"block {summary.block} {summary.path} curve": summary.curve for summary in summaries}}


def total_to_keep(widths: Sequence[int], budget: Budget, counts: Sequence[int] | None = None) -> int:
    """Return the number of channels all blocks keep together: the multiple of ``round_to`` nearest to the budget.

    Width i stands for ``counts[i]`` channels at once, one in each expert of a mixture; by default for one.

    Raises:
        ConfigError: the budget is below one multiple per block, or would remove nothing.
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
            f"{1 - least / all_channels:.4g} can be removed. Choose a smaller ratio or a smaller --round-to."
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
    """Round shares to widths: the nearest allowed width per block, then single steps until the total is exact.

    Allowed are the multiples of ``round_to`` below a block's width, and the width itself; the larger one on a tie. A
    step is taken by the block furthest beyond its share, the first one on a tie. If full widths are not multiples, or
    stand for different ``counts`` of channels, the steps end at the nearest total.
    """
    if budget.ratio == 0:
        return list(widths)
    counts = counts or [1] * len(widths)
    targets = [width * min(share, 1.0) for width, share in zip(widths, shares, strict=True)]
    rounded = [_nearest(width, target, budget.round_to) for width, target in zip(widths, targets, strict=True)]
    if not rebalance:
        return rounded
    total = total_to_keep(widths, budget, counts)
    while (excess := sum(width * count for width, count in zip(rounded, counts, strict=True)) - total) != 0:
        step = _best_step(rounded, targets, widths, counts, budget.round_to, excess)
        if step is None:
            break
        block, width = step
        rounded[block] = width
    return rounded


def keep_highest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the indices of the ``count`` highest ``scores (F,)``, ascending; among equals the lower index stays."""
    order = scores.neg().argsort(stable=True)  # (F,)
    kept = cast("list[int]", order[:count].sort().values.tolist())  # pyright: ignore[reportUnknownMemberType]
    return tuple(kept)


def plan_blocks(
    summaries: Sequence[BlockSummary],
    allocator: ConfiguredComponent[Allocator],
    budget: Budget,
    *,
    rebalance: bool = True,
    fitness: Fitness | None = None,
) -> tuple[BlockPlan, ...]:
    """Choose widths by the allocator and channels by the scores; every feed-forward gets an entry."""
    shares = allocate(allocator, summaries, budget, fitness)
    widths = round_shares(shares, summaries, budget, rebalance=rebalance)
    importance = get_importance(allocator, summaries)
    return tuple(
        BlockPlan(block=summary.block, path=path, width=len(scores), importance=value, kept=kept)
        for summary, width, value in zip(summaries, widths, importance, strict=True)
        for (path, scores), kept in zip(_members(summary), select_channels(summary, width), strict=True)
    )


def total_to_keep_of(summaries: Sequence[BlockSummary], budget: Budget) -> int:
    """Return the number of channels that all blocks of a model keep together, see ``total_to_keep``."""
    units = [_unit(summary) for summary in summaries]
    counts = [summary.width // unit for summary, unit in zip(summaries, units, strict=True)]
    return total_to_keep(units, budget, counts)


def round_shares(
    shares: Sequence[float], summaries: Sequence[BlockSummary], budget: Budget, *, rebalance: bool = True
) -> tuple[int, ...]:
    """Round one share per summary to widths as the configuration sets them: for a mixture, that of one expert."""
    units = [_unit(summary) for summary in summaries]
    counts = [summary.width // unit for summary, unit in zip(summaries, units, strict=True)]
    return tuple(round_widths(shares, units, budget, rebalance=rebalance, counts=counts))


def select_channels(summary: BlockSummary, width: int) -> list[tuple[int, ...]]:
    """Return the channels that every feed-forward of a summary keeps at a ``width`` of the configuration."""
    unit = _unit(summary)
    return [keep_highest(scores, width * len(scores) // unit) for _, scores in _members(summary)]


def _unit(summary: BlockSummary) -> int:
    """Return the width that the configuration sets: that of one expert; shared experts may be a multiple of it."""
    return min(summary.members.values(), default=summary.width)


def _members(summary: BlockSummary) -> list[tuple[str, Tensor]]:
    """Return path and scores ``(F,)`` of every feed-forward of a summary."""
    members = summary.members or {summary.path: summary.width}
    ends = accumulate(members.values())
    return [(path, summary.scores[end - members[path] : end]) for path, end in zip(members, ends, strict=True)]


def _nearest(full: int, target: float, step: int) -> int:
    below = min(max(step, step * math.floor(target / step)), full)
    above = min(below + step, full)
    return below if target - below < above - target else above


def _neighbour(width: int, full: int, step: int, direction: Literal[-1, 1]) -> int | None:
    """Return the next allowed width up or down; None if there is none."""
    if direction == 1:
        return min(width + step, full) if width < full else None
    below = step * ((width - 1) // step)
    return below if below > 0 else None


def _best_step(
    rounded: Sequence[int],
    targets: Sequence[float],
    full: Sequence[int],
    counts: Sequence[int],
    step: int,
    excess: int,
) -> tuple[int, int] | None:
    """Return the block to move by one step toward the total, and its new width; None if no step helps."""
    direction: Literal[-1, 1] = -1 if excess > 0 else 1
    steps: list[tuple[float, int, int]] = []
    for block, width in enumerate(rounded):
        neighbour = _neighbour(width, full[block], step, direction)
        if neighbour is not None and abs(excess + (neighbour - width) * counts[block]) < abs(excess):
            steps.append(((width - targets[block]) * direction, block, neighbour))
    if not steps:
        return None
    _, block, neighbour = min(steps)
    return block, neighbour
