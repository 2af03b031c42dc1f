"""What a user should know about a finished run beyond its numbers: each note is one sentence in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from . import surgery
from .api import Update
from .planning import PruningPlan

if TYPE_CHECKING:
    from .collect import BlockMeasurement
    from .pipeline import Bench

_ENOUGH_TOKENS = 10
"""Calibration tokens per channel below which second moments are not to be trusted."""


def gather_notes(
    bench: Bench,
    plan: PruningPlan,
    measurements: Sequence[BlockMeasurement],
    updates: Mapping[int, Update],
    biases_before: Sequence[str],
) -> tuple[str, ...]:
    """All notes of a run whose model is cut and compensated."""
    return (
        *_on_attention(plan),
        *_on_tokens(bench, measurements),
        *_on_biases(bench, biases_before),
        *_on_updates(bench, updates),
    )


def _on_attention(plan: PruningPlan) -> list[str]:
    """Which blocks lost their attention."""
    dropped = ", ".join(map(str, plan.dropped_attention))
    return [f"block {dropped} lost its attention"] if dropped else []


def _on_biases(bench: Bench, before: Sequence[str]) -> list[str]:
    """What a user should know about parameters the family does not have."""
    decoder, name = bench.decoder, bench.selection.compensator.component.name
    added = [path for path in surgery.added_biases(decoder.config) if path not in before]
    return [
        f"{name} gave {path} of every block a bias the family lacks: "
        f"{sum(block.get_parameter(f'{path}.bias').numel() for block in decoder.blocks)} parameters in all"
        for path in added
    ]


def _on_tokens(bench: Bench, measurements: Sequence[BlockMeasurement]) -> list[str]:
    """A warning where second moments are fitted on few tokens."""
    chosen = (*bench.selection.collectors, *bench.selection.second_pass)
    if not measurements or not any(c.component.provides.heavy for c in chosen) or bench.windows is None:
        return []
    tokens = min(w.numel() for w in (bench.windows_to_select, bench.windows_to_compensate) if w is not None)
    width = max(measured.width for measured in measurements)
    if tokens >= _ENOUGH_TOKENS * width:
        return []
    return [
        f"{tokens} calibration tokens are few for blocks of {width} channels; {_ENOUGH_TOKENS} a channel are advised"
    ]


def _on_updates(bench: Bench, updates: Mapping[int, Update]) -> list[str]:
    """Which blocks the compensator's guard left as they were."""
    refused = [
        str(index)
        for index, update in updates.items()
        if update.error is not None and update.down is None and update.up is None
    ]
    name = bench.selection.compensator.component.name
    return (
        [f"{name} did not help on held-out tokens in block {', '.join(refused)}: plain pruning there"]
        if refused
        else []
    )
