"""Find what a user should know about a finished run beyond its numbers; each note is one sentence of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
_STARVED = 0.1
"""Share of the average share of channels kept below which a note names a block."""
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
        *_note("block {} lost its attention", [str(block) for block in plan.dropped_attention], ", "),
        *_on_tokens(context, measurements),
        *_on_experts(measurements),
        *_on_channels(measurements),
        *_on_blocks(measurements),
        *_on_widths(plan),
        *_on_biases(context, biases_before),
        *_on_search(plan),
        *_on_updates(context, updates),
        *_on_time(context),
    )


def _on_search(plan: PruningPlan) -> Iterator[str]:
    """Say what a search found and what it took."""
    search = plan.search
    if search is None:
        return
    starts = ", ".join(f"{name} {value:.4g}" for name, value in search.starts.items())
    yield (
        f"the search measured {search.evaluations} widths on {search.windows} held-out windows, uncompensated, in "
        f"{search.block_forwards} block forwards: {search.metric} {search.fitness:.4g}"
        + f" (from {starts})"
        * bool(starts)
    )


def _note(text: str, names: Sequence[str], separator: str = "; ", most: int | None = None) -> Iterator[str]:
    """Yield a note with the names, at most so many and a count of the others; nothing without names."""
    if names:
        more = f" and {len(names) - most} more" if most and len(names) > most else ""
        yield text.format(separator.join(names[:most]) + more)


def _place(block: int, path: str, form: str = "{}, {}") -> str:
    """Name a block, and the expert in it."""
    return form.format(block, path) if path[-1:].isdigit() else str(block)


def _on_biases(context: RunContext, before: Sequence[str]) -> Iterator[str]:
    """Name biases that the compensator added and the model's family lacks."""
    decoder, name = context.decoder, context.selection.compensator.component.name
    for path in surgery.added_biases(decoder.config):
        if path not in before:
            count = sum(block.get_submodule(path).get_parameter("bias").numel() for block in decoder.blocks)
            yield f"{name} gave {path} of every block a bias the family lacks: {count} parameters in all"


def _on_tokens(context: RunContext, measurements: Sequence[FeedForwardMeasurement]) -> Iterator[str]:
    """Warn where second moments are fitted on few tokens."""
    chosen = (*context.selection.collectors, *context.selection.second_pass)
    if not measurements or not any(c.component.provides.heavy for c in chosen) or context.windows is None:
        return
    windows = (context.windows_to_select, context.windows_to_compensate)  # (N, T) each
    tokens = min(int((w != PADDING).sum()) for w in windows if w is not None)
    width = max(measured.width for measured in measurements)
    if tokens < _ENOUGH_TOKENS * width:
        yield f"{tokens} calibration tokens are few for blocks of {width} channels; {_ENOUGH_TOKENS} a channel are advised"


def _on_experts(measurements: Sequence[FeedForwardMeasurement]) -> Iterator[str]:
    """Name experts that were scored on few tokens or none."""
    unseen, few = list[str](), list[str]()
    for expert in measurements:
        if expert.path[-1:].isdigit() and expert.statistics:
            if expert.statistics.unseen:
                unseen.append(f"{expert.block} ({expert.path})")
            elif expert.statistics.tokens < expert.width:
                few.append(f"{expert.block} ({expert.path})")
    text = f"no calibration token reached {len(unseen)} experts, which are scored by weights alone: block {{}}"
    yield from _note(text, unseen, most=_NAMED)
    yield from _note(f"fewer calibration tokens than channels reached {len(few)} experts: block {{}}", few, most=_NAMED)


def _on_channels(measurements: Sequence[FeedForwardMeasurement]) -> Iterator[str]:
    """Name channels that never fire, and single channels with most of a feed-forward's activation."""
    dead, massive = list[str](), list[str]()
    for measured in measurements:
        squares = measured.statistics.get(DOWN_INPUT_SQUARES)  # (F,)
        if squares is None or measured.statistics.unseen:
            continue
        place = _place(measured.block, measured.path)
        silent = (squares == 0).nonzero()[:, 0].tolist()
        if silent:
            dead.append(f"{place}: {len(silent)} (first {silent[0]})")
        share = squares.max() / squares.sum().clamp(min=1e-30)  # ()
        if share > _MASSIVE and len(squares) > 2:
            massive.append(f"{place} channel {int(squares.argmax())} ({share:.0%})")
    yield from _note("channels that never fire on the calibration tokens, block {}", dead, most=_NAMED)
    yield from _note(
        "massive activations, one channel with more than half of the squares of its feed-forward: block {}",
        massive,
        most=_NAMED,
    )


def _on_blocks(measurements: Sequence[FeedForwardMeasurement]) -> Iterator[str]:
    """Name blocks whose output is their input."""
    still = [
        str(measured.block)
        for measured in measurements
        for statistic, rounding in _ROUNDING.items()
        if statistic in measured.statistics and measured.statistics[statistic].item() <= rounding
    ]
    yield from _note("block {} does not change its input at all", list(dict.fromkeys(still)), most=_NAMED)


def _on_widths(plan: PruningPlan) -> Iterator[str]:
    """Name blocks that keep next to nothing while others keep most."""
    shares = [(entry, len(entry.kept) / entry.width) for entry in plan.blocks]
    starved = [
        f"{_place(entry.block, entry.path)} ({len(entry.kept)} of {entry.width})"
        for entry, share in shares
        if share < _STARVED * (1 - plan.ratio)
    ]
    name = plan.components.get("allocator", "").partition(":")[0]
    yield from _note(
        f"the allocator {name} leaves some blocks less than a tenth of the average share, block {{}}: compare with "
        "--allocator cfsp",
        starved,
        most=_NAMED,
    )


def _on_updates(context: RunContext, updates: Mapping[tuple[int, str], Update]) -> Iterator[str]:
    """Name the blocks whose update was rejected because it did not help on held-out tokens."""
    refused = [
        _place(block, path, "{} ({})")
        for (block, path), update in updates.items()
        if update.error is not None and update.down is None and update.up is None
    ]
    name = context.selection.compensator.component.name
    yield from _note(f"{name} did not help on held-out tokens in block {{}}: plain pruning there", refused, ", ")


def _on_time(context: RunContext) -> list[str]:
    """Name components whose code took most of the time."""
    seconds, share = _LONG
    total = sum(context.progress.seconds.values())
    return [
        f"{chosen} took {chosen.usage.seconds:.0f} s of {total:.0f} s"
        for chosen in context.selection.chosen
        if chosen.usage.seconds > max(seconds, share * total)
    ]
