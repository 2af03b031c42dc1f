"""Compute the parts of a run's report: widths of the blocks, peak memory, the sentence on training, statistics."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from cfsp_framework.api.data import Update
from cfsp_framework.api.records import (
    BlockPlan,
    BlockReport,
    PruningPlan,
    RecoveryReport,
    feed_forward_path,
)

if TYPE_CHECKING:
    from cfsp_framework.engine.measurements import FeedForwardMeasurement


def describe_training(recovery: RecoveryReport) -> str:
    """Describe a training in one sentence without its full stop: ``Trained 61,440 parameters for 200 steps ...``."""
    losses = [point.loss for point in recovery.curve if point.loss is not None]
    change = f"; loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else ""
    adapter = ", kept as an adapter," if recovery.adapter else ""
    return (
        f"Trained {recovery.parameters:,} parameters{adapter} for {recovery.steps} steps, {recovery.tokens:,} tokens of "
        f"{recovery.data}{change}"
    )


def is_mixed(blocks: Sequence[BlockReport]) -> bool:
    """Return whether some block has experts or several feed-forwards, so that its index alone does not name a width."""
    return any(report.experts > 1 for report in blocks) or len({report.block for report in blocks}) < len(blocks)


def describe_feed_forward(block: BlockReport) -> str:
    """Name a feed-forward within its block: ``mlp.experts x 8``."""
    return f"{block.path} x {block.experts}" if block.experts > 1 else block.path


def block_reports(
    plan: PruningPlan, updates: Mapping[tuple[int, str], Update] | None = None
) -> tuple[BlockReport, ...]:
    """Return the widths of a plan and the errors of compensation by feed-forward; experts of a mixture are one entry."""
    updates = updates or {}
    together: dict[tuple[int, str], list[BlockPlan]] = {}
    for entry in plan.blocks:
        together.setdefault((entry.block, feed_forward_path(entry.path)), []).append(entry)
    return tuple(
        BlockReport(
            block=block,
            path=path,
            experts=len(entries),
            importance=entries[0].importance,
            width_before=entries[0].width,
            width_after=len(entries[0].kept),
            error_plain=_mean([u.error_plain for e in entries if (u := updates.get((e.block, e.path)))]),
            error=_mean([u.error for e in entries if (u := updates.get((e.block, e.path)))]),
        )
        for (block, path), entries in together.items()
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def peak_memory() -> int:
    """Return the peak of this process's memory in bytes, plus that of PyTorch's tensors on the GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return host + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def save_statistics(path: Path, measurements: Sequence[FeedForwardMeasurement], metadata: Mapping[str, str]) -> None:
    """Write statistics and scores, named ``blocks.INDEX.NAME``, or ``blocks.INDEX.PATH.NAME`` in blocks with several."""
    several = {block for block, count in Counter(measured.block for measured in measurements).items() if count > 1}
    tensors: dict[str, torch.Tensor] = {}
    for measured in measurements:
        prefix = f"blocks.{measured.block}" + (f".{measured.path}" if measured.block in several else "")
        # Cloned: experts share the statistics of their block, and safetensors refuses to write shared tensors.
        tensors |= {f"{prefix}.{s.name}": value.clone() for s, value in measured.statistics.items()}
        tensors |= {f"{prefix}.scores.{label}": value.contiguous() for label, value in measured.scores.items()}
    save_file(tensors, path, dict(metadata))
