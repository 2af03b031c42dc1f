"""Puts what a run found out into one report, and writes it for programs and for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from . import checkpoint, report
from .api import Update
from .bench import Bench, sequence_length
from .evaluation import Perplexity
from .keys import versions
from .pages import html_report, model_card
from .planning import PruningPlan
from .report import Evaluation, Report, Size


def tell(
    bench: Bench,
    plan: PruningPlan,
    updates: Mapping[tuple[int, str], Update],
    perplexities: tuple[list[Perplexity], list[Perplexity]],
    before: Size,
    notes: tuple[str, ...],
    difference: float,
) -> Report:
    """Put what was measured into one report."""
    config, decoder = bench.config, bench.decoder
    after = report.measure_size(decoder.model)
    in_blocks = sum(parameter.numel() for block in decoder.blocks for parameter in block.parameters())
    return Report(
        model=config.model,
        fingerprint=bench.loaded.fingerprint,
        family=decoder.architecture.family,
        dtype=str(decoder.model.dtype).removeprefix("torch."),
        device=str(decoder.device),
        processes=bench.ranks.world,
        streamed=config.stream,
        calibration=plan.calibration.spec if plan.calibration else None,
        samples=plan.calibration.samples if plan.calibration else 0,
        seqlen=sequence_length(config, bench.loaded),
        seed=config.seed,
        components=plan.components,
        ratio_requested=plan.ratio,
        budget=plan.budget,
        round_to=plan.round_to,
        channels_before=sum(block.width for block in plan.blocks),
        channels_after=sum(plan.widths),
        channel_ratio=plan.achieved_ratio,
        block_parameter_ratio=1 - in_blocks / (in_blocks + before.parameters - after.parameters),
        parameter_ratio=1 - after.parameters / before.parameters,
        dense=before,
        pruned=after,
        evaluations=tuple(
            Evaluation(
                data=data.spec,
                seqlen=data.windows.shape[1],
                windows=len(data.windows),
                dense=dense,
                pruned=pruned,
                excess_nll=pruned.nll - dense.nll,
            )
            for data, dense, pruned in zip(bench.evaluation_sets, *perplexities, strict=True)
        ),
        blocks=report.block_reports(plan, updates),
        notes=notes,
        reload_difference=difference,
        seconds={name: round(seconds, 3) for name, seconds in bench.progress.seconds.items()},
        peak_memory_bytes=report.peak_memory(),
        versions=versions(bench.selection),
    )


def write_report(told: Report, folder: Path) -> None:
    """The report for programs and for people, and the model card."""
    code = (folder / checkpoint.CODE_FILE).exists()
    for name, text in (
        (checkpoint.REPORT_FILE, told.to_json()),
        (checkpoint.PAGE_FILE, html_report(told)),
        (checkpoint.CARD_FILE, model_card(told, code=code)),
    ):
        (folder / name).write_text(text, encoding="utf-8")
