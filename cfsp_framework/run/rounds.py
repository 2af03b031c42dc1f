"""Prune in several rounds: each is measured on the model as the rounds before cut and compensated it.

Every round keeps the same share of the channels that the one before kept: of ``N`` rounds to a ratio ``r``, round ``i``
ends at ``(1 - r) ** (i / N)`` of the dense model's channels. Allocators get the current model's blocks as they are, and
their shares are shares of the current widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cfsp_framework.api.data import Budget
from cfsp_framework.api.records import PruningPlan
from cfsp_framework.engine.measurements import FeedForwardMeasurement, summarise
from cfsp_framework.errors import ConfigError
from cfsp_framework.pruning.planning import total_to_keep_of
from cfsp_framework.run.cache_keys import collection_key, second_pass_key
from cfsp_framework.run.context import RunContext
from cfsp_framework.run.steps import CRITERION, channel_budget, cutting_phase, make_plan, measure, narrow
from cfsp_framework.runtime.hashing import hash_json


@dataclass(frozen=True)
class RoundsResult:
    """The last round, planned but not cut, and the plans of the rounds before it."""

    context: RunContext
    """Context of the last round; its model is cut and compensated by the rounds before."""
    measurements: tuple[FeedForwardMeasurement, ...]
    """Measurements of the last round."""
    step: PruningPlan
    """Plan of the last round, in channels of the model as it is."""
    plan: PruningPlan
    """The same plan in channels of the dense model."""
    earlier: tuple[PruningPlan, ...] = ()
    """Plans of the rounds before, in channels of the dense model; each keeps a part of the one before."""


def plan_rounds(context: RunContext, measurements: Sequence[FeedForwardMeasurement]) -> RoundsResult:
    """Plan every round from ``measurements`` of the dense model on; cut and compensate the model in all but the last.

    Raises:
        ConfigError: a round would remove nothing.
    """
    rounds, final = context.config.budget.rounds, channel_budget(context)
    measured = tuple(measurements)
    if rounds == 1:
        plan = make_plan(context, measured, final)
        return RoundsResult(context, measured, plan, plan)
    kept = kept_channels(context, measured, final)
    steps: list[PruningPlan] = []
    plans: list[PruningPlan] = []
    for number, target in enumerate(kept, start=1):
        if number > 1:
            with context.progress.phase(cutting_phase(context)):
                narrow(context, steps[-1], measured)
            context = replace(context, history=hash_history(context, steps[-1]))
            measured = measure(context)
        channels = sum(measurement.width for measurement in measured)
        steps.append(make_plan(context, measured, Budget(max(0.0, 1 - target / channels), final.round_to)))
        plans.append(compose(plans[-1] if plans else None, steps[-1], number, rounds))
    return RoundsResult(context, measured, steps[-1], plans[-1], tuple(plans[:-1]))


def kept_channels(context: RunContext, measurements: Sequence[FeedForwardMeasurement], budget: Budget) -> list[int]:
    """Return the channels that the model keeps after each round, the last one exactly those of a single round.

    Raises:
        ConfigError: a round would remove nothing.
    """
    rounds = context.config.budget.rounds
    summaries = summarise(context.decoder, measurements, CRITERION)
    ratios = [1 - (1 - budget.ratio) ** (number / rounds) for number in range(1, rounds)]
    try:
        totals = [total_to_keep_of(summaries, Budget(ratio, budget.round_to)) for ratio in (*ratios, budget.ratio)]
    except ConfigError:
        total_to_keep_of(summaries, budget)  # a ratio that one round cannot meet either
        totals = []
    if len({*totals}) < rounds:
        raise ConfigError(
            f"--rounds {rounds}: a round would remove nothing at a ratio of {budget.ratio:.4g} with --round-to "
            f"{budget.round_to}; use fewer rounds, a larger ratio or a smaller --round-to."
        )
    return totals


def compose(before: PruningPlan | None, step: PruningPlan, number: int, rounds: int) -> PruningPlan:
    """Return a round's plan in channels of the dense model; ``before`` is that of the round before.

    The plan of a round that is not the last states the share of channels it removes as its ratio.
    """
    blocks = step.blocks
    if before is not None:
        blocks = tuple(
            entry.model_copy(
                update={"width": earlier.width, "kept": tuple(earlier.kept[channel] for channel in entry.kept)}
            )
            for entry, earlier in zip(step.blocks, before.blocks, strict=True)
        )
    plan = step.model_copy(update={"blocks": blocks, "rounds": number})
    if number == rounds:
        return plan
    return plan.model_copy(update={"ratio": max(0.0, plan.achieved_ratio), "budget": "channels"})


def hash_history(context: RunContext, step: PruningPlan) -> str:
    """Hash everything that decided the model after a round, for the cache keys of the next one."""
    return hash_json([context.history, collection_key(context), second_pass_key(context, step)])
