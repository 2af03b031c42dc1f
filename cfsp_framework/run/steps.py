"""Steps of a run before the result is trained and written, each on a ``RunContext``; ``pipeline.py`` orders them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cfsp_framework.api.data import Budget, Update
from cfsp_framework.api.records import ModelIdentity, Perplexity, PruningPlan
from cfsp_framework.data.windows import identify
from cfsp_framework.engine.cache import MeasurementCache
from cfsp_framework.engine.collect import collect
from cfsp_framework.engine.measurements import FeedForwardMeasurement, summarise
from cfsp_framework.engine.replay import logits
from cfsp_framework.evaluation.perplexity import perplexity
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.size import measure_size
from cfsp_framework.modeling.streaming import ShardWriter
from cfsp_framework.pruning import surgery
from cfsp_framework.pruning.attention import choose_attentions, count_to_drop
from cfsp_framework.pruning.compensation import (
    CachedCompensation,
    Compensation,
    FirstPassCompensation,
    SecondPassCompensation,
    UpdateCache,
)
from cfsp_framework.pruning.cut import StreamedOutput, cut_model
from cfsp_framework.pruning.planning import channel_ratio, plan_blocks, width_step
from cfsp_framework.run.cache_keys import collection_key, second_pass_key, versions
from cfsp_framework.run.checks import check_plan
from cfsp_framework.run.context import RunContext, sample_ids
from cfsp_framework.run.search import search_blocks

CRITERION = "criterion"
"""Label of a run's only criterion among the scores."""


def adopt_plan(context: RunContext, plan: PruningPlan) -> PruningPlan:
    """Check a given plan against the model, and record the components of this run that act after planning.

    Raises:
        PlanError: the plan is for another model.
    """
    check_plan(context.config, context.decoder, context.loaded.fingerprint, plan)
    selected = context.selection.describe()
    components = plan.components | {kind: selected[kind] for kind in ("compensator", "recovery")}
    shared = math.lcm(plan.tensor_parallel, context.config.budget.tensor_parallel)
    return plan.model_copy(update={"components": components, "tensor_parallel": shared})


def evaluate(context: RunContext, decoder: Decoder) -> list[Perplexity]:
    """Return a model's perplexity on every evaluation set."""
    model = decoder if context.config.model.stream else decoder.model
    with context.progress.phase("evaluate"):
        return [perplexity(model, data, context.progress, context.forward_options) for data in context.evaluation_sets]


def drop_attention(context: RunContext, plan: PruningPlan | None = None) -> None:
    """Remove the attentions that the plan names or, without a plan, those the loss depends on least."""
    budget, decoder = context.config.budget, context.decoder
    if plan is not None:
        surgery.drop_attention(decoder, plan.dropped_attention)
    elif budget.drop_attention != 0 and context.windows is not None:
        with context.progress.phase("attention"):
            automatic = budget.drop_attention == "auto"
            count = count_to_drop(decoder, budget.ratio) if automatic else int(budget.drop_attention)
            surgery.drop_attention(decoder, choose_attentions(decoder, context.windows, count, context.progress))


def measure(context: RunContext, *, planned: bool = False) -> tuple[FeedForwardMeasurement, ...]:
    """Run each block once over the calibration windows and score its channels; with a plan nothing is scored."""
    selection, run = context.selection, context.config.run
    curve = None if planned else selection.curve
    cached = run.resume is not None and not planned
    with context.progress.phase("collect"):
        return collect(
            context.decoder,
            context.windows_to_select,
            {} if planned else {CRITERION: selection.criterion},
            selection.collectors,
            curves={CRITERION: (CRITERION, curve)} if curve else {},
            sensitivities={CRITERION: CRITERION} if selection.probes else {},
            forward_options=context.forward_options,
            seed=run.seed,
            progress=context.progress,
            cache=MeasurementCache(run.resume, collection_key(context), context.ranks)
            if cached and run.resume
            else None,
        )


def make_plan(
    context: RunContext, measurements: Sequence[FeedForwardMeasurement], channels: Budget | None = None
) -> PruningPlan:
    """Spread the budget over the blocks and pick each block's channels; all processes take the first one's plan.

    ``channels`` is the budget of one round; by default, that of the run.
    """
    channels = channels or channel_budget(context)
    config, budget, decoder, windows = context.config, context.config.budget, context.decoder, context.windows
    torch.manual_seed(config.run.seed)  # for allocators that draw
    with context.progress.phase("plan"):
        summaries = summarise(decoder, measurements, CRITERION)
        blocks, search = (
            search_blocks(context, summaries, channels)
            if context.selection.searches
            else (plan_blocks(summaries, context.selection.allocator, channels, rebalance=budget.rebalance), None)
        )
        plan = PruningPlan(
            model=ModelIdentity(
                source=config.model.source,
                family=decoder.architecture.family,
                fingerprint=context.loaded.fingerprint,
                parameters=context.parameters,
            ),
            calibration=None if windows is None else identify(config.calibration.data, windows, config.run.seed),
            ratio=budget.ratio,
            budget=budget.unit,
            round_to=budget.round_to,
            tensor_parallel=budget.tensor_parallel,
            seed=config.run.seed,
            components=context.selection.describe(),
            versions=versions(context.selection),
            dropped_attention=tuple(surgery.dropped_attention(decoder.config)),
            search=search,
            blocks=blocks,
        )
        return context.ranks.agree(plan)


def channel_budget(context: RunContext) -> Budget:
    """Return the run's budget in channels of the model as it is."""
    budget = context.config.budget
    return Budget(_channel_ratio(context), width_step(budget.round_to, budget.tensor_parallel))


def _channel_ratio(context: RunContext) -> float:
    """Return the share of channels to remove, also where the user asked for a share of all parameters."""
    budget, decoder = context.config.budget, context.decoder
    if budget.unit == "channels":
        return budget.ratio
    removed = context.parameters - measure_size(decoder.model).parameters  # by dropped attentions
    return channel_ratio(budget.ratio, context.parameters, decoder.channel_parameters, removed)


@dataclass(frozen=True)
class CutResult:
    """Results of cutting a model."""

    updates: Mapping[tuple[int, str], Update]
    """The compensator's change of each feed-forward that lost channels, by block and path."""
    expected: Tensor  # (1, T, V): logits of the sample, which the reopened checkpoint must reproduce
    writer: ShardWriter | None
    """Writer of the shards; a streamed model's blocks are on disk by now."""


def cut(
    context: RunContext, plan: PruningPlan, measurements: Sequence[FeedForwardMeasurement], folder: Path
) -> CutResult:
    """Cut and compensate the model; a streamed model is written to ``folder`` on the way."""
    decoder, sample = context.decoder, sample_ids(context)  # (1, T)
    output = StreamedOutput(decoder, folder, sample, write=context.ranks.first) if context.config.model.stream else None
    with context.progress.phase(cutting_phase(context)):
        updates = narrow(context, plan, measurements, output)
        expected = output.logits() if output else logits(decoder, sample)  # (1, T, V)
    return CutResult(updates, expected, output.writer if output else None)


def narrow(
    context: RunContext,
    plan: PruningPlan,
    measurements: Sequence[FeedForwardMeasurement],
    output: StreamedOutput | None = None,
) -> dict[tuple[int, str], Update]:
    """Cut and compensate the model in memory, and return the changes by block and path."""
    torch.manual_seed(context.config.run.seed)  # for compensators that draw
    compensation = open_compensation(context, plan, measurements)
    phase = cutting_phase(context)
    return cut_model(context.decoder, plan, compensation, output, progress=context.progress, phase=phase)


def cutting_phase(context: RunContext) -> str:
    """Return the name that reports give to the cut; measuring blocks a second time makes it long."""
    return "compensate" if context.selection.second_pass else "cut"


def open_compensation(
    context: RunContext, plan: PruningPlan, measurements: Sequence[FeedForwardMeasurement]
) -> Compensation:
    """Prepare compensation from the first pass, or with a second one if the compensator requires heavy statistics."""
    selection, run = context.selection, context.config.run
    if context.windows_to_compensate is None:
        statistics = {(measurement.block, measurement.path): measurement.statistics for measurement in measurements}
        return FirstPassCompensation(context.decoder, statistics, selection.compensator, seed=run.seed)
    cache = UpdateCache(run.resume, second_pass_key(context, plan)) if run.resume else None
    if cache is not None and context.ranks.agree(context.ranks.first and _is_finished(cache, plan)):
        return CachedCompensation(cache, context.ranks)
    return SecondPassCompensation(
        context.decoder,
        context.windows_to_compensate,
        selection.compensator,
        selection.second_pass,
        seed=run.seed,
        forward_options=context.forward_options,
        cache=cache,
    )


def _is_finished(cache: UpdateCache, plan: PruningPlan) -> bool:
    """Return whether the changes of every block that loses channels are kept."""
    return all(
        cache.load(index, len(entries)) is not None
        for index, entries in plan.by_block().items()
        if any(len(entry.kept) < entry.width for entry in entries)
    )
