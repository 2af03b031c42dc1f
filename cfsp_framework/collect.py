"""One pass over the calibration windows, block by block: measure, score, forget what is heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .algebra import removal_curve
from .api import (
    HELD_OUT_EVERY,
    BlockStatistics,
    BlockSummary,
    Collector,
    Criterion,
    FeedForward,
    Site,
    Statistic,
)
from .architectures import Decoder
from .blocks import Batch, embed
from .errors import PluginError
from .gradients import measure_gradients
from .measure import measure_block
from .plugins import Chosen
from .progress import Progress
from .statistics import DOWN_INPUT_GRAM


@dataclass(frozen=True)
class BlockMeasurement:
    """What is kept of one block: its light statistics, and the scores of every criterion asked for."""

    feed_forward: str
    width: int
    statistics: BlockStatistics
    scores: Mapping[str, Tensor]  # label -> (F,) float32, CPU
    curves: Mapping[str, Tensor]  # label -> (F + 1,) float64, CPU; empty where no allocator asked

    def summary(self, block: int, label: str) -> BlockSummary:
        """What an allocator sees of this block under the criterion called ``label``."""
        scalars = {s: value.item() for s, value in self.statistics.items() if value.ndim == 0}
        return BlockSummary(
            block,
            self.feed_forward,
            self.width,
            self.statistics.tokens,
            scalars,
            self.scores[label],
            self.curves.get(label),
        )


def collect(
    decoder: Decoder,
    windows: Tensor | None,
    criteria: Mapping[str, Chosen[Criterion]],
    collectors: Sequence[Chosen[Collector]],
    *,
    curve: Literal["plain", "compensated"] | None = None,
    batch_size: int | None,
    seed: int,
    progress: Progress,
) -> tuple[BlockMeasurement, ...]:
    """Measure every block on ``windows (N, T)`` and score its channels with every criterion.

    Each block runs exactly once per batch and the head never. Where no collector is needed nothing runs at all, and
    the windows may be None.
    """
    gradients: Sequence[Mapping[Statistic, Tensor]] = [{}] * len(decoder.blocks)
    batches: Sequence[Batch] = []
    nothing = BlockStatistics({}, 0)
    if windows is not None:
        backward = [chosen for chosen in collectors if chosen.component.site is Site.GRADIENT]
        collectors = [chosen for chosen in collectors if chosen.component.site is not Site.GRADIENT]
        if backward:
            gradients = measure_gradients(decoder, windows, backward, progress)
            nothing = BlockStatistics({}, windows.numel(), windows[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY].numel())
        batches = embed(decoder, windows, batch_size) if collectors else batches
    measurements: list[BlockMeasurement] = []
    with progress.bar("collect", total=len(decoder.blocks) * len(batches)) as step:
        for index in range(len(decoder.blocks)):
            # No name here holds what a block measured: it would live on while the next one is measured.
            measurements.append(
                _judge(
                    decoder.feed_forward(index, seed),
                    (measure_block(decoder, index, batches, collectors, step) if batches else nothing)
                    | gradients[index],
                    criteria,
                    curve,
                )
            )
    return tuple(measurements)


def _judge(
    feed_forward: FeedForward,
    statistics: BlockStatistics,
    criteria: Mapping[str, Chosen[Criterion]],
    curve: Literal["plain", "compensated"] | None,
) -> BlockMeasurement:
    """Score one block's channels with every criterion, and keep what may outlive the block."""
    scores = {label: score(criterion, feed_forward, statistics) for label, criterion in criteria.items()}
    curves = {label: error_curve(feed_forward, statistics, found, curve) for label, found in scores.items() if curve}
    return BlockMeasurement(feed_forward.path, feed_forward.width, statistics.light(), scores, curves)


def score(criterion: Chosen[Criterion], feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
    """The criterion's scores, ``(F,)`` float32 on the CPU, checked: right shape, all finite."""
    where = f"block {feed_forward.block}, {feed_forward.path}"
    with torch.no_grad(), criterion.blamed(f"score() at {where}") as component:
        scores: object = component.score(feed_forward, statistics.only(component.required()))
    if not isinstance(scores, Tensor) or scores.shape != (feed_forward.width,):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise PluginError(f"{criterion}: score() at {where} returned {found}, not a tensor ({feed_forward.width},).")
    bad = scores.isfinite().logical_not().nonzero()
    if len(bad):
        channel = int(bad[0])
        raise PluginError(
            f"{criterion}: score() at {where} returned {scores[channel].item()} for channel {channel}"
            f" ({len(bad)} of {feed_forward.width} are not finite)."
        )
    return scores.detach().float().cpu()


CURVE_DAMPING = 1e-2


def error_curve(
    feed_forward: FeedForward,
    statistics: BlockStatistics,
    scores: Tensor,
    kind: Literal["plain", "compensated"],
) -> Tensor:
    """Squared output error after removing the k lowest of ``scores (F,)``, for every k: ``(F + 1,)`` float64, CPU."""
    order = (
        scores.to(feed_forward.down.device).neg().argsort(stable=True).flip(0)
    )  # (F,): of equals the last goes first
    damping = CURVE_DAMPING if kind == "compensated" else None
    return removal_curve(feed_forward.down, statistics[DOWN_INPUT_GRAM], order, damping).cpu()
