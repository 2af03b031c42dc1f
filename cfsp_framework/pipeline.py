"""A run, top to bottom: configure, select, open, calibrate, collect, plan, cut, recover, save, evaluate, tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cfsp_framework.api.data import Budget, Update
from cfsp_framework.api.events import BlockFinished, RunFinished
from cfsp_framework.api.records import ModelIdentity, Perplexity, PruningPlan, RunResult
from cfsp_framework.checkpoint.save import (
    PLAN_FILE,
    STATISTICS_FILE,
    check_output,
    read_pruned,
    save_model,
    save_streamed,
    verify,
)
from cfsp_framework.config import RunConfig
from cfsp_framework.data.windows import identify
from cfsp_framework.engine.cache import MeasurementCache
from cfsp_framework.engine.collect import FeedForwardMeasurement, collect, summarise
from cfsp_framework.engine.replay import Batch, ForwardOptions, embed, finish, logits, pass_block
from cfsp_framework.errors import ConfigError, PlanError
from cfsp_framework.evaluation.perplexity import EvaluationSet, perplexity
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.selection import curve_of
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.loading import LoadedModel, load_model, open_model, open_skeleton, resolve
from cfsp_framework.modeling.size import measure_size
from cfsp_framework.modeling.streaming import ShardWriter, Streamed
from cfsp_framework.pruning import surgery
from cfsp_framework.pruning.attention import choose_attentions, count_to_drop
from cfsp_framework.pruning.compensation import FinishedBlocks, FirstPass, SecondPass
from cfsp_framework.pruning.planning import channel_ratio, check_shared, plan_blocks, width_step
from cfsp_framework.recovery.recover import (
    RecoveryTask,
    Training,
    kept_plan,
    merge_adapter,
    needed,
    open_with_adapter,
    plan_recovery,
    save_recovery_plan,
    train_model,
)
from cfsp_framework.reporting.build import build_report, update_report, write_report
from cfsp_framework.reporting.findings import gather_notes
from cfsp_framework.reporting.metrics import save_statistics
from cfsp_framework.run.cache_keys import collection_key, second_pass_key, versions
from cfsp_framework.run.context import RunContext, open_evaluation_sets, open_streamed, sample_ids, set_up
from cfsp_framework.runtime.atomic_files import staged_folder
from cfsp_framework.runtime.distributed import join_ranks
from cfsp_framework.runtime.progress import Progress

CRITERION = "criterion"
"""The label of a run's only criterion among the scores."""


def prune(
    config: RunConfig,
    out: Path,
    *,
    plan: PruningPlan | None = None,
    overwrite: bool = False,
    keep_statistics: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Prune a model into the checkpoint folder ``out``; nothing is left there unless everything succeeded.

    With a ``plan`` the channels are taken from it, and data is only needed by a compensator that asks for some.
    """
    check_output(out, overwrite=overwrite)
    progress = progress or Progress()
    ranks = join_ranks(config.model.device)
    with progress.failure_told(), staged_folder(out) if ranks.first else nullcontext(out) as folder:
        context = set_up(config, progress, planned=plan is not None, ranks=ranks)
        if plan is not None:
            check_plan(context, plan)
            ran = context.selection.describe()
            kinds = ("compensator", "recovery")  # these are this run's, whatever the plan was made with
            components = plan.components | {kind: ran[kind] for kind in kinds}
            shared = math.lcm(plan.tensor_parallel, config.budget.tensor_parallel)
            plan = plan.model_copy(update={"components": components, "tensor_parallel": shared})
        dense, before = evaluate(context, context.decoder), measure_size(context.decoder.model)
        drop_attention(context, plan)
        measurements = measure(context, planned=plan is not None)
        plan = plan or make_plan(context, measurements)
        task = schedule(context, plan, measurements)
        native = surgery.added_biases(context.decoder.config)
        made = cut(context, plan, measurements, folder)
        notes = gather_notes(context, plan, measurements, made.updates, native)
        training = train(context, plan, task, folder) if task else None
        save(context, plan, made, folder, training)
        expected = training.outcome.expected if training else made.expected
        written, difference = reopen(
            context, expected, folder, adapter=training is not None and config.recovery.keep_adapter
        )
        after = evaluate(context, written)
        report = build_report(context, plan, made.updates, (dense, after), before, notes, difference, training)
        if ranks.first:
            write_report(report, folder, context.loaded.folder)
            if keep_statistics:
                metadata = {"model": context.loaded.fingerprint, **plan.components}
                save_statistics(folder / STATISTICS_FILE, measurements, metadata)
        ranks.wait()
    return finished(context, RunResult(config, plan, report, out))


def recover(
    config: RunConfig,
    out: Path,
    *,
    adapter: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Train a pruned checkpoint, ``config.model.source``, into another, ``out``; its plan and report are brought up to date.

    With an ``adapter``, a folder that was kept, nothing is trained: it is merged.

    Raises:
        ModelError: the model is no checkpoint that ``prune`` wrote, or the adapter is not for it.
        ConfigError: there is nothing to train, or nothing to train on.
    """
    check_output(out, overwrite=overwrite)
    if adapter and config.recovery.keep_adapter:
        raise ConfigError("--adapter merges an adapter, --keep-adapter keeps one apart; leave one of both out.")
    progress = progress or Progress()
    ranks = join_ranks(config.model.device)
    with progress.failure_told(), staged_folder(out) if ranks.first else nullcontext(out) as folder:
        plan, earlier = read_pruned(resolve(config.model.source))
        context = set_up(config, progress, planned=True, ranks=ranks)
        if adapter is None:
            ran = context.selection.describe()
            plan = plan.model_copy(update={"components": plan.components | {"recovery": ran["recovery"]}})
            training = train(context, plan, needed(context, plan_recovery(context, plan)), folder)
        else:
            training = Training(
                kept_plan(context, adapter), evaluate(context, context.decoder), merge_adapter(context, adapter)
            )
        save(context, plan, Cut({}, training.outcome.expected, None), folder, training)
        written, difference = reopen(context, training.outcome.expected, folder, adapter=config.recovery.keep_adapter)
        report = update_report(context, plan, earlier, evaluate(context, written), difference, training)
        if ranks.first:
            write_report(report, folder, context.loaded.folder)
        ranks.wait()
    return finished(context, RunResult(config, plan, report, out))


def finished(context: RunContext, result: RunResult) -> RunResult:
    """Tell the observers, and every plugin that wants to hear of finished runs."""
    if context.ranks.first:
        context.progress.notify(RunFinished(result.plan, result.report, result.folder))
        context.plugins.run_finished(result)
    return result


def plan_only(config: RunConfig, progress: Progress | None = None) -> PruningPlan:
    """The plan ``prune`` would cut by."""
    ranks, progress = join_ranks(config.model.device), progress or Progress()
    with progress.failure_told():
        context = set_up(config.replace(evaluate=()), progress, ranks=ranks)
        drop_attention(context)
        plan = make_plan(context, measure(context))
    progress.notify(RunFinished(plan))
    return plan


def evaluate_only(
    config: RunConfig, progress: Progress | None = None, loaded: LoadedModel | None = None
) -> list[tuple[EvaluationSet, Perplexity]]:
    """Perplexity of a model as it is, on every data SPEC of ``config.evaluation.data``; ``loaded`` where it is open already."""
    progress = progress or Progress()
    ranks = join_ranks(config.model.device)
    with progress.phase("load"):
        loaded = loaded or load_model(config, ranks)
        decoder = open_streamed(config, loaded, load_plugins(config.run.plugins)) if config.model.stream else None
        sets = open_evaluation_sets(config, loaded)
    forward_options = ForwardOptions(spill=config.run.spill, ranks=ranks)
    with progress.phase("evaluate"):
        return [(data, perplexity(decoder or loaded.model, data, progress, forward_options)) for data in sets]


def drop_attention(context: RunContext, plan: PruningPlan | None = None) -> None:
    """Take out the attentions the plan names, or those missed least; what is measured afterwards knows about it."""
    config, decoder = context.config, context.decoder
    if plan is not None:
        surgery.drop_attention(decoder, plan.dropped_attention)
        return
    if config.budget.drop_attention == 0 or context.windows is None:
        return
    if config.budget.drop_attention == "auto" and config.budget.unit != "parameters":
        raise ConfigError("--drop-attention auto needs --budget parameters: its rule is about all parameters.")
    with context.progress.phase("attention"):
        count = (
            count_to_drop(decoder, config.budget.ratio)
            if config.budget.drop_attention == "auto"
            else config.budget.drop_attention
        )
        surgery.drop_attention(decoder, choose_attentions(decoder, context.windows, count, context.progress))


def measure(context: RunContext, *, planned: bool = False) -> tuple[FeedForwardMeasurement, ...]:
    """Run the blocks once over the calibration windows; without a collector nothing runs."""
    config, selection = context.config, context.selection
    curve = None if planned else curve_of(selection.allocator)
    finished = None
    if config.run.resume and not planned:
        finished = MeasurementCache(config.run.resume, collection_key(context), context.ranks)
    with context.progress.phase("collect"):
        return collect(
            context.decoder,
            context.windows_to_select,
            {} if planned else {CRITERION: selection.criterion},
            selection.collectors,
            curves={CRITERION: (CRITERION, curve)} if curve else {},
            forward_options=context.forward_options,
            seed=config.run.seed,
            progress=context.progress,
            finished=finished,
        )


def make_plan(context: RunContext, measurements: Sequence[FeedForwardMeasurement]) -> PruningPlan:
    """Spread the budget over the blocks and pick each block's channels; every process gets the first one's plan."""
    config, decoder = context.config, context.decoder
    torch.manual_seed(config.run.seed)  # for allocators that draw
    with context.progress.phase("plan"):
        ratio = config.budget.ratio
        if config.budget.unit == "parameters":
            gone = context.parameters - measure_size(decoder.model).parameters
            ratio = channel_ratio(ratio, context.parameters, decoder.channel_parameters, gone)
        summaries = summarise(decoder, measurements, CRITERION)
        blocks = plan_blocks(
            summaries,
            context.selection.allocator,
            Budget(ratio, width_step(config.budget.round_to, config.budget.tensor_parallel)),
            rebalance=config.budget.rebalance,
        )
        plan = PruningPlan(
            model=ModelIdentity(
                source=config.model.source,
                family=decoder.architecture.family,
                fingerprint=context.loaded.fingerprint,
                parameters=context.parameters,
            ),
            calibration=identify(config.calibration.data, context.windows, config.run.seed)
            if context.windows is not None
            else None,
            ratio=config.budget.ratio,
            budget=config.budget.unit,
            round_to=config.budget.round_to,
            tensor_parallel=config.budget.tensor_parallel,
            seed=config.run.seed,
            components=context.selection.describe(),
            versions=versions(context.selection),
            dropped_attention=tuple(surgery.dropped_attention(decoder.config)),
            blocks=blocks,
        )
        return context.ranks.agree(plan)


def check_plan(context: RunContext, plan: PruningPlan) -> None:
    """Refuse a plan made for other weights or other shapes."""
    surgery.check_fits(context.decoder, plan)
    if plan.model.fingerprint != context.loaded.fingerprint:
        raise PlanError(
            f"the plan was made for another model than {context.config.model.source!r}: {plan.model.source!r}, "
            f"fingerprint {plan.model.fingerprint[:12]} against {context.loaded.fingerprint[:12]}."
        )
    check_shared([(one.block, one.path, len(one.kept)) for one in plan.blocks], context.config.budget.tensor_parallel)


def evaluate(context: RunContext, decoder: Decoder) -> list[Perplexity]:
    """Perplexity of a model as it is now, on every evaluation set."""
    model = decoder if context.config.model.stream else decoder.model
    with context.progress.phase("evaluate"):
        return [perplexity(model, data, context.progress, context.forward_options) for data in context.evaluation_sets]


@dataclass(frozen=True)
class Cut:
    """What is left to know of a model that was cut."""

    updates: Mapping[tuple[int, str], Update]
    """What the compensator answered for each feed-forward that lost some channels, by block and path."""
    expected: Tensor  # (1, T, V): the logits of the sample, which the checkpoint has to give again
    writer: ShardWriter | None
    """Has the blocks on disk already, where they are streamed."""


def cut(context: RunContext, plan: PruningPlan, measurements: Sequence[FeedForwardMeasurement], folder: Path) -> Cut:
    """Narrow the model and compensate, block by block; a streamed block is written before the next one is read."""
    decoder = context.decoder
    writer = ShardWriter(decoder.model, decoder.architecture.blocks, folder) if context.config.model.stream else None
    sample: list[Batch] = embed(decoder, sample_ids(context), ForwardOptions(batch_size=1)) if writer else []

    def write(index: int) -> None:
        if writer is not None:
            pass_block(decoder, index, sample)
            if context.ranks.first:
                writer.write_block(index)

    with context.progress.phase(cutting_phase(context)):
        updates = narrow(context, plan, measurements, write)
        ids = sample_ids(context)
        expected = finish(decoder, ids, sample[0].hidden) if writer else logits(decoder, ids)
    return Cut(updates, expected, writer)


def narrow(
    context: RunContext,
    plan: PruningPlan,
    measurements: Sequence[FeedForwardMeasurement],
    advance: Callable[[int], None] = lambda index: None,
) -> dict[tuple[int, str], Update]:
    """Narrow the model and compensate, and nothing else; ``advance(block)`` is called while the block is resident and done.

    Returns what the compensator answered for each feed-forward that lost some channels, by block and path.
    """
    decoder = context.decoder
    updates: dict[tuple[int, str], Update] = {}
    phase = cutting_phase(context)
    torch.manual_seed(context.config.run.seed)  # for compensators that draw and bring no generator
    with context.progress.bar(phase, total=len(decoder.blocks)) as step:
        answer = compensation(context, plan, measurements)

        def compensate(index: int, kept: Sequence[Tensor]) -> Sequence[Update]:
            found = answer(index, kept)
            parts = decoder.feed_forwards(index)
            report = zip(parts, kept, found, strict=True)
            updates.update({(one.block, one.path): update for one, k, update in report if len(k) < one.width})
            return found

        def passed(index: int) -> None:
            if index + 1 < len(decoder.blocks):
                answer.advance(index)
            advance(index)
            step()
            context.progress.notify(BlockFinished(phase, index, len(decoder.blocks)))

        surgery.apply_plan(decoder, plan, compensate, passed)
    return updates


def cutting_phase(context: RunContext) -> str:
    """What reports call the time cutting takes, which measuring blocks again makes long."""
    return "compensate" if context.selection.second_pass else "cut"


def compensation(
    context: RunContext, plan: PruningPlan, measurements: Sequence[FeedForwardMeasurement]
) -> FirstPass | SecondPass:
    """What answers for each block how its kept weights change."""
    config, selection = context.config, context.selection
    if context.windows_to_compensate is None:
        statistics = {(measured.block, measured.path): measured.statistics for measured in measurements}
        return FirstPass(context.decoder, statistics, selection.compensator, seed=config.run.seed)
    return SecondPass(
        context.decoder,
        context.windows_to_compensate,
        selection.compensator,
        selection.second_pass,
        seed=config.run.seed,
        forward_options=context.forward_options,
        finished=FinishedBlocks(config.run.resume, second_pass_key(context, plan)) if config.run.resume else None,
    )


def schedule(
    context: RunContext, plan: PruningPlan, measurements: Sequence[FeedForwardMeasurement]
) -> RecoveryTask | None:
    """What is to be trained after the cut, if anything; whatever cannot be done is refused here."""
    scored = all(CRITERION in measured.scores for measured in measurements)
    return plan_recovery(context, plan, summarise(context.decoder, measurements, CRITERION) if scored else ())


def train(context: RunContext, plan: PruningPlan, task: RecoveryTask, folder: Path) -> Training:
    """Train what was scheduled; the model is then what is to be written, and an adapter that is kept lies in ``folder``."""
    pruned = evaluate(context, context.decoder)
    return Training(task.plan, pruned, train_model(context, plan, task, folder))


def save(context: RunContext, plan: PruningPlan, made: Cut, folder: Path, training: Training | None = None) -> None:
    """Write the checkpoint, or what is left of it, and the plans; the first process does."""
    with context.progress.phase("save"):
        if context.ranks.first:
            if made.writer is None:
                save_model(context.decoder, context.loaded, folder)
            else:
                save_streamed(context.decoder, context.loaded, made.writer, folder)
            (folder / PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")
            if training is not None:
                save_recovery_plan(training.plan, folder, kept=context.config.recovery.keep_adapter)
        context.ranks.wait()


def reopen(context: RunContext, expected: Tensor, folder: Path, *, adapter: bool = False) -> tuple[Decoder, float]:
    """Open the checkpoint as anybody would and compare: the pruned model, and the largest difference of a logit."""
    config, decoder, dtype = context.config, context.decoder, context.decoder.model.dtype
    with context.progress.phase("verify"):
        if isinstance(decoder.loaded, Streamed):
            decoder.loaded.close()  # its embeddings, before others come
            folder = context.ranks.agree(folder)
            decoder = open_streamed(
                config, replace(context.loaded, model=open_skeleton(folder)), context.plugins, folder
            )
            return decoder, verify(decoder, expected, sample_ids(context), dtype)
        if adapter:
            decoder = open_with_adapter(context, context.ranks.agree(folder))
            return decoder, verify(decoder, expected, sample_ids(context), dtype)
        difference = 0.0
        if context.ranks.first:
            written = replace(decoder, model=open_model(folder, device=decoder.device))
            difference = verify(written, expected, sample_ids(context), dtype)
        return decoder, context.ranks.agree(difference)
