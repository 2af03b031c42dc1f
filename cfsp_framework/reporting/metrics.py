"""What a run tells: ``report.json``, the model card, and the statistics where they were asked for."""

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


def describe_training(found: RecoveryReport) -> str:
    """What was trained, in one sentence without its full stop: ``Trained 61,440 parameters for 200 steps ...``."""
    losses = [point.loss for point in found.curve if point.loss is not None]
    fell = f"; loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else ""
    kept = ", kept as an adapter," if found.adapter else ""
    return (
        f"Trained {found.parameters:,} parameters{kept} for {found.steps} steps, {found.tokens:,} tokens of "
        f"{found.data}{fell}"
    )


def is_mixed(blocks: Sequence[BlockReport]) -> bool:
    """Whether there is more to say of a width than its block: experts, or several feed-forwards."""
    return any(one.experts > 1 for one in blocks) or len({one.block for one in blocks}) < len(blocks)


def place(block: BlockReport) -> str:
    """Which feed-forward of its block this is: ``mlp.experts x 8``."""
    return f"{block.path} x {block.experts}" if block.experts > 1 else block.path


def block_reports(
    plan: PruningPlan, updates: Mapping[tuple[int, str], Update] | None = None
) -> tuple[BlockReport, ...]:
    """The plan's widths without the indices, and what compensation was worth; experts of a mixture together."""
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
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def peak_memory() -> int:
    """The most memory this process held, and with a GPU the most tensors took there."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return host + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def save_statistics(path: Path, measurements: Sequence[FeedForwardMeasurement], metadata: Mapping[str, str]) -> None:
    """Light statistics and scores, named ``blocks.INDEX.NAME``, or ``blocks.INDEX.PATH.NAME`` in blocks with several."""
    several = {block for block, count in Counter(one.block for one in measurements).items() if count > 1}
    tensors: dict[str, torch.Tensor] = {}
    for one in measurements:
        place = f"blocks.{one.block}.{one.path}" if one.block in several else f"blocks.{one.block}"
        # Cloned: experts share their block's own, and safetensors refuses to write what is shared.
        tensors |= {f"{place}.{s.name}": value.clone() for s, value in one.statistics.items()}
        tensors |= {f"{place}.scores.{label}": value.contiguous() for label, value in one.scores.items()}
    save_file(tensors, path, dict(metadata))
