"""Find what a user should know about a finished run beyond its numbers; each note is one sentence of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cfsp_framework.api.data import Update
from cfsp_framework.api.records import PruningPlan
from cfsp_framework.data.windows import PADDING
from cfsp_framework.pruning import surgery
from cfsp_framework.statistics import ANGULAR_DISTANCE, COSINE_DISTANCE, DOWN_INPUT_SQUARES, MAE_DISTANCE, MSE_DISTANCE

if TYPE_CHECKING:
    from cfsp_framework.engine.measurements import FeedForwardMeasurement
    from cfsp_framework.run.context import RunContext

_ENOUGH_TOKENS = 10
"""Calibration tokens per channel below which second moments are not to be trusted."""
_MASSIVE = 0.5
"""Share of a feed-forward's squared activations in one channel above which a note names it."""
_ROUNDING = {ANGULAR_DISTANCE: 2e-4, COSINE_DISTANCE: 1e-6, MSE_DISTANCE: 0.0, MAE_DISTANCE: 0.0}
"""Largest distance between a block's input and output that is rounding only."""
_LONG = (10.0, 0.5)
"""Seconds, and share of the run, above which a note names a component's code."""
_NAMED = 8
"""Blocks that a note names; it counts the others."""


def gather_notes(
    context: RunContext,
    plan: PruningPlan,
    measurements: Sequence[FeedForwardMeasurement],
    updates: Mapping[tuple[int, str], Update],
    biases_before: Sequence[str],
) -> tuple[str, ...]:
    """Return all notes of a run whose model is cut and compensated."""
    return (
        *_on_attention(plan),
        *_on_tokens(context, measurements),
        *_on_experts(measurements),
        *_on_channels(measurements),
        *_on_blocks(measurements),
        *_on_biases(context, biases_before),
        *_on_updates(context, updates),
        *_on_time(context),
    )


def _on_attention(plan: PruningPlan) -> list[str]:
    """Name the blocks that lost their attention."""
    dropped = ", ".join(map(str, plan.dropped_attention))
    return [f"block {dropped} lost its attention"] if dropped else []


def _on_biases(context: RunContext, before: Sequence[str]) -> list[str]:
    """Name biases that the compensator added and the model's family lacks."""
    decoder, name = context.decoder, context.selection.compensator.component.name
    added = [path for path in surgery.added_biases(decoder.config) if path not in before]
    return [
        f"{name} gave {path} of every block a bias the family lacks: "
        f"{sum(b.get_submodule(path).get_parameter('bias').numel() for b in decoder.blocks)} parameters in all"
        for path in added
    ]


def _on_tokens(context: RunContext, measurements: Sequence[FeedForwardMeasurement]) -> list[str]:
    """Warn where second moments are fitted on few tokens."""
    chosen = (*context.selection.collectors, *context.selection.second_pass)
    if not measurements or not any(c.component.provides.heavy for c in chosen) or context.windows is None:
        return []
    tokens = min(
        int((w != PADDING).sum()) for w in (context.windows_to_select, context.windows_to_compensate) if w is not None
    )
    width = max(measured.width for measured in measurements)
    if tokens >= _ENOUGH_TOKENS * width:
        return []
    return [
        f"{tokens} calibration tokens are few for blocks of {width} channels; {_ENOUGH_TOKENS} a channel are advised"
    ]


def _on_experts(measurements: Sequence[FeedForwardMeasurement]) -> list[str]:
    """Name experts that were scored on few tokens or none."""
    experts = [measured for measured in measurements if measured.path[-1:].isdigit() and measured.statistics]
    unseen, few = list[str](), list[str]()
    for expert in experts:
        if expert.statistics.unseen:
            unseen.append(f"{expert.block} ({expert.path})")
        elif expert.statistics.tokens < expert.width:
            few.append(f"{expert.block} ({expert.path})")
    notes: list[str] = []
    if unseen:
        notes.append(
            f"no calibration token reached {len(unseen)} experts, which are scored by weights alone: block {_join(unseen)}"
        )
    if few:
        notes.append(f"fewer calibration tokens than channels reached {len(few)} experts: block {_join(few)}")
    return notes


def _on_channels(measurements: Sequence[FeedForwardMeasurement]) -> list[str]:
    """Name channels that never fire, and single channels with most of a feed-forward's activation."""
    dead, massive = list[str](), list[str]()
    for measured in measurements:
        squares = measured.statistics.get(DOWN_INPUT_SQUARES)  # (F,)
        if squares is None or measured.statistics.unseen:
            continue
        silent = (squares == 0).nonzero()[:, 0].tolist()
        if silent:
            dead.append(f"{_place(measured)}: {len(silent)} (first {silent[0]})")
        share = squares.max() / squares.sum().clamp(min=1e-30)
        if share > _MASSIVE and len(squares) > 2:
            massive.append(f"{_place(measured)} channel {int(squares.argmax())} ({share:.0%})")
    notes = [f"channels that never fire on the calibration tokens, block {_join(dead)}"] if dead else []
    return (
        [*notes, f"massive activations, more than half of a feed-forward's: block {_join(massive)}"]
        if massive
        else notes
    )


def _on_blocks(measurements: Sequence[FeedForwardMeasurement]) -> list[str]:
    """Name blocks whose output is their input."""
    still = [
        str(measured.block)
        for measured in measurements
        for statistic, rounding in _ROUNDING.items()
        if statistic in measured.statistics and measured.statistics[statistic].item() <= rounding
    ]
    return [f"block {_join(list(dict.fromkeys(still)))} does not change its input at all"] if still else []


def _place(measured: FeedForwardMeasurement) -> str:
    return f"{measured.block}, {measured.path}" if measured.path[-1:].isdigit() else str(measured.block)


def _join(names: Sequence[str]) -> str:
    """Join the first few names, and count the others."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return "; ".join(names[:_NAMED]) + more


def _on_updates(context: RunContext, updates: Mapping[tuple[int, str], Update]) -> list[str]:
    """Name the blocks whose update was rejected because it did not help on held-out tokens."""
    refused = [
        str(block) + (f" ({path})" if path[-1:].isdigit() else "")
        for (block, path), update in updates.items()
        if update.error is not None and update.down is None and update.up is None
    ]
    name = context.selection.compensator.component.name
    return (
        [f"{name} did not help on held-out tokens in block {', '.join(refused)}: plain pruning there"]
        if refused
        else []
    )


def _on_time(context: RunContext) -> list[str]:
    """Name components whose code took most of the time."""
    seconds, share = _LONG
    total = sum(context.progress.seconds.values())
    return [
        f"{chosen} took {chosen.usage.seconds:.0f} s of {total:.0f} s"
        for chosen in context.selection.chosen
        if chosen.usage.seconds > max(seconds, share * total)
    ]
