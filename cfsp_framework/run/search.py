"""Let a searching allocator try widths on the model, and plan by its result."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cfsp_framework.api.data import HELD_OUT_EVERY, BlockSummary, Budget, FitnessOptions
from cfsp_framework.api.records import BlockPlan, SearchRecord
from cfsp_framework.host.selection import get_fitness_options
from cfsp_framework.pruning.fitness import FitnessCache, ModelFitness, Widths
from cfsp_framework.pruning.planning import allocate, plan_blocks, round_shares
from cfsp_framework.run.cache_keys import collection_key, fingerprint_of
from cfsp_framework.run.context import RunContext
from cfsp_framework.runtime.hashing import hash_json


def search_blocks(
    context: RunContext, summaries: Sequence[BlockSummary], budget: Budget
) -> tuple[tuple[BlockPlan, ...], SearchRecord | None]:
    """Search in the first process, measure in all; return the plan's blocks and a record of the search everywhere."""
    fitness = open_fitness(context, summaries, budget)
    planned: tuple[tuple[BlockPlan, ...], SearchRecord | None] | None = None
    if context.ranks.first:
        try:
            planned = _search(context, summaries, budget, fitness)
        finally:
            fitness.close()
    else:
        fitness.serve()
    planned = context.ranks.agree(planned)
    assert planned is not None, "the first process returned or raised"
    return planned


def _search(
    context: RunContext, summaries: Sequence[BlockSummary], budget: Budget, fitness: ModelFitness
) -> tuple[tuple[BlockPlan, ...], SearchRecord | None]:
    rebalance = context.config.budget.rebalance
    blocks = plan_blocks(summaries, context.selection.allocator, budget, rebalance=rebalance, fitness=fitness)
    if budget.ratio == 0:
        return blocks, None
    kept = {(block.block, block.path): len(block.kept) / block.width for block in blocks}
    shares = [kept[summary.block, summary.path] for summary in summaries]
    names = list(fitness.starts)
    values = dict(zip(names, fitness([fitness.starts[name] for name in names]), strict=True)) if names else {}
    [final] = fitness([shares])
    record = SearchRecord(
        metric=fitness.metric,
        windows=fitness.windows,
        positions=fitness.positions,
        starts=values,
        fitness=final,
        evaluations=fitness.evaluations,
        block_forwards=fitness.block_forwards,
    )
    return blocks, record


def open_fitness(context: RunContext, summaries: Sequence[BlockSummary], budget: Budget) -> ModelFitness:
    """Prepare the fitness of a searching allocator, without a forward."""
    config, selection = context.config, context.selection
    options = get_fitness_options(selection.allocator)

    def round_to_plan(shares: Sequence[float]) -> Widths:
        return round_shares(shares, summaries, budget, rebalance=config.budget.rebalance)

    windows, cache = fitness_windows(context, options), None
    if config.run.resume and context.ranks.first:
        key = [collection_key(context), fingerprint_of(windows), options.metric, options.stride]
        cache = FitnessCache(config.run.resume, hash_json(key))
    return ModelFitness(
        context.decoder,
        windows,
        summaries,
        options,
        starts={start.component.name: allocate(start, summaries, budget) for start in selection.starts},
        round_shares=round_to_plan,
        forward_options=context.forward_options,
        seed=config.run.seed,
        cache=cache,
    )


def fitness_windows(context: RunContext, options: FitnessOptions) -> Tensor:
    """Return the windows ``(N, T)`` of a fitness: held-out ones of the first pass, or all of fewer than ten."""
    windows = context.windows_to_select
    assert windows is not None, "a selection that searches has windows"
    held_out = windows[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]  # (n, T)
    return (held_out if len(held_out) >= context.ranks.world else windows)[: options.windows]
