"""A run from top to bottom: open, measure, plan, cut, train, save, reopen, evaluate, report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from cfsp_framework.api.events import RunFinished
from cfsp_framework.api.records import Perplexity, PruningPlan, RunResult
from cfsp_framework.checkpoint.save import (
    PLAN_FILE,
    ROUNDS_FOLDER,
    STATISTICS_FILE,
    check_output,
    read_pruned,
    save_model,
    save_streamed,
    verify,
)
from cfsp_framework.config import RunConfig
from cfsp_framework.engine.measurements import FeedForwardMeasurement, summarise
from cfsp_framework.engine.replay import ForwardOptions
from cfsp_framework.errors import ConfigError
from cfsp_framework.evaluation.perplexity import EvaluationSet, perplexity
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.loading import LoadedModel, load_model, open_model, open_on_meta, resolve
from cfsp_framework.modeling.size import measure_size
from cfsp_framework.modeling.streaming import ShardWriter, Streamed
from cfsp_framework.pruning import surgery
from cfsp_framework.recovery.plan import RecoveryTask, check_recovery_options, plan_recovery, require_task
from cfsp_framework.recovery.recover import (
    FinishedTraining,
    merge_kept_adapter,
    open_with_adapter,
    read_adapter_plan,
    save_recovery_plan,
    train_model,
)
from cfsp_framework.reporting.build import build_report, update_report, write_report
from cfsp_framework.reporting.findings import gather_notes
from cfsp_framework.reporting.metrics import save_statistics
from cfsp_framework.run.checks import input_paths
from cfsp_framework.run.context import RunContext, open_evaluation_sets, open_streamed, sample_ids, set_up
from cfsp_framework.run.rounds import RoundsResult, plan_rounds
from cfsp_framework.run.steps import CRITERION, adopt_plan, cut, drop_attention, evaluate, measure
from cfsp_framework.runtime.atomic_files import staged_folder
from cfsp_framework.runtime.distributed import join_ranks
from cfsp_framework.runtime.progress import Progress


def prune(
    config: RunConfig,
    out: Path,
    *,
    plan: PruningPlan | None = None,
    overwrite: bool = False,
    keep_statistics: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Prune a model into the checkpoint folder ``out``; the folder appears only if everything succeeds.

    1. Open: select the components, check every option, open the model, read the data (``set_up``).
    2. Evaluate the dense model.
    3. Drop attentions, if asked for.
    4. Collect: one pass over the calibration windows measures each block and scores its channels (``measure``).
    5. Plan: the allocator spreads the budget, the highest scores stay; with several rounds the model is cut and measured
       again before the last one (``plan_rounds``).
    6. Schedule what is trained afterwards (``schedule``).
    7. Cut block by block, and compensate (``cut``).
    8. Train, if scheduled (``train``).
    9. Save the checkpoint, open it again and compare logits (``save``, ``reopen``).
    10. Evaluate the checkpoint and write the report.

    With a ``plan`` the channels are taken from it, and data is only needed by a compensator that requires some.
    """
    check_output(out, overwrite=overwrite, inputs=input_paths(config))
    if plan is not None and config.budget.rounds > 1:
        raise ConfigError("--plan and --rounds cannot be combined: a plan names the channels that stay in the end.")
    progress, ranks = progress or Progress(), join_ranks(config.model.device)
    with progress.report_failure(), staged_folder(out) if ranks.first else nullcontext(out) as folder:
        check = partial(check_recovery_options, plan=plan)
        context = set_up(config, progress, planned=plan is not None, ranks=ranks, check=check)
        given = adopt_plan(context, plan) if plan else None
        dense, dense_size = evaluate(context, context.decoder), measure_size(context.decoder.model)
        drop_attention(context, given)
        measurements = measure(context, planned=given is not None)
        native_biases = surgery.added_biases(context.decoder.config)
        last = RoundsResult(context, measurements, given, given) if given else plan_rounds(context, measurements)
        plan = last.plan
        task = schedule(context, last.step, last.measurements)
        cut_result = cut(last.context, last.step, last.measurements, folder)
        notes = gather_notes(context, plan, measurements, cut_result.updates, native_biases)
        training = train(context, plan, task, folder) if task else None
        save(context, plan, cut_result.writer, folder, training, last.earlier)
        expected = training.outcome.expected if training else cut_result.expected
        adapter = training is not None and config.recovery.keep_adapter
        written, difference = reopen(context, expected, folder, adapter=adapter)
        perplexities = dense, evaluate(context, written)
        report = build_report(context, plan, cut_result.updates, perplexities, dense_size, notes, difference, training)
        if ranks.first:
            write_report(report, folder, context.loaded.folder)
            if keep_statistics:
                metadata = {"model": context.loaded.fingerprint, **plan.components}
                save_statistics(folder / STATISTICS_FILE, measurements, metadata)
        ranks.wait()
    return finish(context, RunResult(config, plan, report, out))


def recover(
    config: RunConfig,
    out: Path,
    *,
    adapter: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Train a pruned checkpoint, ``config.model.source``, and write the result with its plan and report to ``out``.

    With an ``adapter``, a folder that was kept earlier, nothing is trained: the adapter is merged.

    Raises:
        ModelError: the model is not a checkpoint of ``prune``, or the adapter belongs to another one.
        ConfigError: there is nothing to train, or nothing to train on.
    """
    check_output(out, overwrite=overwrite, inputs=(*input_paths(config), *([adapter] if adapter else [])))
    if adapter and config.recovery.keep_adapter:
        raise ConfigError("--adapter (merge one) and --keep-adapter (keep one apart) cannot be combined.")
    progress, ranks = progress or Progress(), join_ranks(config.model.device)
    with progress.report_failure(), staged_folder(out) if ranks.first else nullcontext(out) as folder:
        plan, pruned_report = read_pruned(resolve(config.model.source))
        check = None if adapter else partial(check_recovery_options, plan=plan)
        context = set_up(config, progress, planned=True, ranks=ranks, check=check)
        if adapter is None:
            recovery = context.selection.describe()["recovery"]
            plan = plan.model_copy(update={"components": plan.components | {"recovery": recovery}})
            training = train(context, plan, require_task(context, plan_recovery(context, plan)), folder)
        else:
            pruned = evaluate(context, context.decoder)
            training = FinishedTraining(
                read_adapter_plan(context, adapter), pruned, merge_kept_adapter(context, adapter)
            )
        save(context, plan, None, folder, training)
        written, difference = reopen(context, training.outcome.expected, folder, adapter=config.recovery.keep_adapter)
        report = update_report(context, plan, pruned_report, evaluate(context, written), difference, training)
        if ranks.first:
            write_report(report, folder, context.loaded.folder)
        ranks.wait()
    return finish(context, RunResult(config, plan, report, out))


def plan_only(config: RunConfig, progress: Progress | None = None) -> PruningPlan:
    """Return the plan that ``prune`` would cut by."""
    progress, ranks = progress or Progress(), join_ranks(config.model.device)
    with progress.report_failure():
        context = set_up(config.replace(evaluate=()), progress, ranks=ranks)
        drop_attention(context)
        plan = plan_rounds(context, measure(context)).plan
    progress.notify(RunFinished(plan))
    return plan


def evaluate_only(
    config: RunConfig, progress: Progress | None = None, loaded: LoadedModel | None = None
) -> list[tuple[EvaluationSet, Perplexity]]:
    """Return a model's perplexity on every data SPEC of ``config.evaluation``; ``loaded`` is used if it is open."""
    progress, ranks = progress or Progress(), join_ranks(config.model.device)
    with progress.phase("load"):
        loaded = loaded or load_model(config, ranks)
        decoder = open_streamed(loaded, load_plugins(config.run.plugins)) if config.model.stream else None
        sets = open_evaluation_sets(config, loaded)
    options = ForwardOptions(spill=config.run.spill, ranks=ranks)
    with progress.phase("evaluate"):
        return [(data, perplexity(decoder or loaded.model, data, progress, options)) for data in sets]


def schedule(
    context: RunContext, plan: PruningPlan, measurements: Sequence[FeedForwardMeasurement]
) -> RecoveryTask | None:
    """Return the training to do after the cut, checked against the model, or None."""
    scored = all(CRITERION in measurement.scores for measurement in measurements)
    return plan_recovery(context, plan, summarise(context.decoder, measurements, CRITERION) if scored else ())


def train(context: RunContext, plan: PruningPlan, task: RecoveryTask, folder: Path) -> FinishedTraining:
    """Train the model in place; an adapter that is kept is written to ``folder`` instead."""
    pruned = evaluate(context, context.decoder)
    return FinishedTraining(task.plan, pruned, train_model(context, plan, task, folder))


def save(
    context: RunContext,
    plan: PruningPlan,
    writer: ShardWriter | None,
    folder: Path,
    training: FinishedTraining | None,
    earlier: Sequence[PruningPlan] = (),
) -> None:
    """Write the checkpoint, or the rest of a streamed one, and the plans; only the first process writes."""
    with context.progress.phase("save"):
        if context.ranks.first:
            if writer is None:
                save_model(context.decoder, context.loaded, folder)
            else:
                save_streamed(context.decoder, context.loaded, writer, folder)
            (folder / PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")
            for number, nested in enumerate(earlier, start=1):
                (folder / ROUNDS_FOLDER).mkdir(exist_ok=True)
                (folder / ROUNDS_FOLDER / f"round-{number}.json").write_text(nested.to_json(), encoding="utf-8")
            if training is not None:
                save_recovery_plan(training.plan, folder, kept=context.config.recovery.keep_adapter)
        context.ranks.wait()


def reopen(context: RunContext, expected: Tensor, folder: Path, *, adapter: bool = False) -> tuple[Decoder, float]:
    """Open the written checkpoint and compare its logits with ``expected (1, T, V)``.

    Returns the model to evaluate and the largest difference of a logit. A model in memory is evaluated as it is, since
    the checkpoint computes the same.

    Raises:
        CfspError: the checkpoint computes something else.
    """
    decoder, dtype = context.decoder, context.decoder.model.dtype
    with context.progress.phase("verify"):
        if isinstance(decoder.loaded, Streamed):
            decoder.loaded.close()  # free its embeddings before others are read
            folder = context.ranks.agree(folder)
            decoder = open_streamed(replace(context.loaded, model=open_on_meta(folder)), context.plugins, folder)
        elif adapter:
            decoder = open_with_adapter(context, context.ranks.agree(folder))
        else:
            difference = 0.0
            if context.ranks.first:
                written = replace(decoder, model=open_model(folder, device=decoder.device))
                difference = verify(written, expected, sample_ids(context), dtype)
            return decoder, context.ranks.agree(difference)
        return decoder, verify(decoder, expected, sample_ids(context), dtype)


def finish(context: RunContext, result: RunResult) -> RunResult:
    """Notify the observers and every plugin with ``cfsp_run_finished``."""
    if context.ranks.first:
        context.progress.notify(RunFinished(result.plan, result.report, result.folder))
        context.plugins.run_finished(result)
    return result
