"""Build a run's report from its measurements, and write it for programs and for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfsp_framework.api.data import Update
from cfsp_framework.api.records import Evaluation, Perplexity, PruningPlan, Report, Size
from cfsp_framework.checkpoint.save import CARD_FILE, CODE_FILE, PAGE_FILE, REPORT_FILE
from cfsp_framework.evaluation.perplexity import EvaluationSet
from cfsp_framework.modeling.size import measure_size
from cfsp_framework.recovery.recover import FinishedTraining
from cfsp_framework.reporting.html import html_report, model_card
from cfsp_framework.reporting.metrics import block_reports, peak_memory
from cfsp_framework.reporting.model_card import read_base
from cfsp_framework.run.cache_keys import versions
from cfsp_framework.run.context import RunContext, sequence_length


def build_report(
    context: RunContext,
    plan: PruningPlan,
    updates: Mapping[tuple[int, str], Update],
    perplexities: tuple[list[Perplexity], list[Perplexity]],
    before: Size,
    notes: tuple[str, ...],
    difference: float,
    training: FinishedTraining | None = None,
) -> Report:
    """Build the report of a run; ``perplexities`` are those of the dense model and of the written one."""
    config, decoder = context.config, context.decoder
    after = measure_size(decoder.model)
    in_blocks = sum(parameter.numel() for block in decoder.blocks for parameter in block.parameters())
    return Report(
        model=config.model.source,
        fingerprint=context.loaded.fingerprint,
        family=decoder.architecture.family,
        dtype=str(decoder.model.dtype).removeprefix("torch."),
        device=str(decoder.device),
        processes=context.ranks.world,
        streamed=config.model.stream,
        calibration=plan.calibration.spec if plan.calibration else None,
        samples=plan.calibration.samples if plan.calibration else 0,
        seqlen=sequence_length(config, context.loaded),
        seed=config.run.seed,
        components=plan.components,
        ratio_requested=plan.ratio,
        budget=plan.budget,
        round_to=plan.round_to,
        tensor_parallel=plan.tensor_parallel,
        channels_before=sum(block.width for block in plan.blocks),
        channels_after=sum(plan.widths),
        channel_ratio=plan.achieved_ratio,
        block_parameter_ratio=1 - in_blocks / (in_blocks + before.parameters - after.parameters),
        parameter_ratio=1 - after.parameters / before.parameters,
        dense=before,
        pruned=after,
        evaluations=tuple(
            _evaluation(data, dense, written, training.pruned[number] if training else None)
            for number, (data, dense, written) in enumerate(zip(context.evaluation_sets, *perplexities, strict=True))
        ),
        recovery=training.outcome.report if training else None,
        blocks=block_reports(plan, updates),
        notes=notes,
        reload_difference=difference,
        **_costs(context),
    )


def update_report(
    context: RunContext,
    plan: PruningPlan,
    earlier: Report,
    written: list[Perplexity],
    difference: float,
    training: FinishedTraining,
) -> Report:
    """Return the report of a pruned model, ``earlier``, with the results of its training."""
    recovery = training.outcome.report
    if recovery is None and earlier.recovery is not None:
        recovery = earlier.recovery.model_copy(update={"adapter": False})
    dense = {(known.data, known.seqlen, known.windows): known.dense for known in earlier.evaluations}
    return earlier.model_copy(
        update={
            "device": str(context.decoder.device),
            "processes": context.ranks.world,
            "components": plan.components,
            "evaluations": tuple(
                _evaluation(data, dense.get((data.spec, data.windows.shape[1], len(data.windows))), last, pruned)
                for data, last, pruned in zip(context.evaluation_sets, written, training.pruned, strict=True)
            ),
            "recovery": recovery,
            "reload_difference": difference,
            **_costs(context),
        }
    )


def _costs(context: RunContext) -> dict[str, Any]:
    return {
        "seconds": {name: round(seconds, 3) for name, seconds in context.progress.seconds.items()},
        "component_seconds": {name: round(seconds, 3) for name, seconds in context.selection.seconds().items()},
        "peak_memory_bytes": peak_memory(),
        "versions": versions(context.selection),
    }


def _evaluation(
    data: EvaluationSet, dense: Perplexity | None, written: Perplexity, pruned: Perplexity | None
) -> Evaluation:
    """Return one text's perplexities; ``pruned`` is that before training, None without training."""
    before = pruned or written
    return Evaluation(
        data=data.spec,
        seqlen=data.windows.shape[1],
        windows=len(data.windows),
        dense=dense,
        pruned=before,
        recovered=written if pruned else None,
        excess_nll=before.nll - dense.nll if dense else None,
        recovered_excess_nll=written.nll - dense.nll if dense and pruned else None,
    )


def write_report(report: Report, folder: Path, base: Path | None = None) -> None:
    """Write the report as JSON and HTML, and the model card; ``base`` is the folder of the dense model."""
    code = (folder / CODE_FILE).exists()
    for name, text in (
        (REPORT_FILE, report.to_json()),
        (PAGE_FILE, html_report(report)),
        (CARD_FILE, model_card(report, code=code, base=read_base(report.model, base) if base else None)),
    ):
        (folder / name).write_text(text, encoding="utf-8")
