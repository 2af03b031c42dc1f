"""One pass over the calibration windows, block by block: measure, score, forget what is heavy."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .api import Accumulator, BlockStatistics, BlockSummary, Collector, Criterion, FeedForward, Site, Statistic
from .architectures import Decoder
from .blocks import Batch, embed, listening, run_block
from .errors import PluginError
from .plugins import Chosen
from .progress import Progress


@dataclass(frozen=True)
class BlockMeasurement:
    """What is kept of one block: its light statistics, and the scores of every criterion asked for."""

    feed_forward: str
    width: int
    statistics: BlockStatistics
    scores: Mapping[str, Tensor]  # label -> (F,) float32, CPU

    def summary(self, block: int, label: str) -> BlockSummary:
        """What an allocator sees of this block under the criterion called ``label``."""
        scalars = {s: value.item() for s, value in self.statistics.items() if value.ndim == 0}
        return BlockSummary(block, self.feed_forward, self.width, self.statistics.tokens, scalars, self.scores[label])


def collect(
    decoder: Decoder,
    windows: Tensor | None,
    criteria: Mapping[str, Chosen[Criterion]],
    collectors: Sequence[Chosen[Collector]],
    *,
    batch_size: int | None,
    seed: int,
    progress: Progress,
) -> tuple[BlockMeasurement, ...]:
    """Measure every block on ``windows (N, T)`` and score its channels with every criterion.

    Each block runs exactly once per batch and the head never. Where no collector is needed nothing runs at all, and
    the windows may be None.
    """
    batches = embed(decoder, windows, batch_size) if collectors and windows is not None else []
    measurements: list[BlockMeasurement] = []
    with progress.bar("collect", total=len(decoder.blocks) * len(batches)) as step:
        for index in range(len(decoder.blocks)):
            statistics = _measure(decoder, index, batches, collectors, step)
            feed_forward = decoder.feed_forward(index, seed)
            scores = {label: score(criterion, feed_forward, statistics) for label, criterion in criteria.items()}
            measurements.append(BlockMeasurement(feed_forward.path, feed_forward.width, _light(statistics), scores))
    return tuple(measurements)


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


def _measure(
    decoder: Decoder,
    index: int,
    batches: Sequence[Batch],
    collectors: Sequence[Chosen[Collector]],
    step: Callable[[], None],
) -> BlockStatistics:
    """Advance all batches through block ``index`` while the collectors listen."""
    running = [(chosen, _start(chosen)) for chosen in collectors]
    tokens = 0
    with _listening(decoder, index, running):
        for batch in batches:
            output = run_block(decoder.blocks[index], index, batch)  # (B, T, D)
            _feed(running, Site.BLOCK, batch.hidden, output)
            batch.hidden.copy_(output)
            tokens += output.shape[0] * output.shape[1]
            step()
    values: dict[Statistic, Tensor] = {}
    for chosen, accumulator in running:
        with chosen.blamed(f"value() at block {index}") as component:
            values[component.provides] = accumulator.value(tokens).float()
    return BlockStatistics(values, tokens)


def _start(chosen: Chosen[Collector]) -> Accumulator:
    with chosen.blamed("start()") as component:
        return component.start()


@contextmanager
def _listening(
    decoder: Decoder, index: int, running: Sequence[tuple[Chosen[Collector], Accumulator]]
) -> Generator[None]:
    """Hooks only where somebody listens."""
    with ExitStack() as stack:
        if any(chosen.component.site is Site.DOWN_PROJECTION for chosen, _ in running):

            def hear(inputs: Tensor, outputs: Tensor) -> None:
                _feed(running, Site.DOWN_PROJECTION, inputs, outputs)

            stack.enter_context(listening(decoder.down_projection(index), hear))
        yield


def _feed(
    running: Sequence[tuple[Chosen[Collector], Accumulator]], site: Site, inputs: Tensor, outputs: Tensor
) -> None:
    """Hand one batch to the accumulators of a site, window by window: no batch size changes a statistic."""
    for chosen, accumulator in running:
        if chosen.component.site is site:
            with chosen.blamed("update()"):
                for window_in, window_out in zip(inputs, outputs, strict=True):  # (T, F or D), (T, D)
                    accumulator.update(window_in, window_out)


def _light(statistics: BlockStatistics) -> BlockStatistics:
    """What may outlive the block, on the CPU."""
    return BlockStatistics({s: v.cpu() for s, v in statistics.items() if not s.heavy}, statistics.tokens)
