"""Runs one block over all batches while collectors listen."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from .api import HELD_OUT_EVERY, Accumulator, BlockStatistics, Collector, Site, Statistic
from .architectures import Decoder
from .blocks import Batch, listening, run_block
from .plugins import Chosen


@dataclass(frozen=True)
class Teacher:
    """The dense model's stream, run beside the pruned one, and how far targets lean to it."""

    batches: Sequence[Batch]
    mix: float


def measure_block(
    decoder: Decoder,
    index: int,
    batches: Sequence[Batch],
    collectors: Sequence[Chosen[Collector]],
    step: Callable[[], None] = lambda: None,
    *,
    advance: bool = True,
    teacher: Teacher | None = None,
) -> BlockStatistics:
    """Run block ``index`` once per batch and return what the collectors measured, float32.

    ``advance`` moves the batches on to the next block. With a ``teacher`` the block also runs on the dense stream, and
    the collectors of the feed-forward see targets: ``own output + mix * (dense block output - block output)``.
    """
    block = decoder.blocks[index]
    running = [(chosen, start(chosen)) for chosen in collectors]
    lengths: list[int] = []  # of every window
    for number, batch in enumerate(batches):
        with _watching(decoder, index, {chosen.component.site for chosen in collectors}) as seen:
            output = run_block(block, index, batch)  # (B, T, D)
        correction: Tensor | None = None
        if teacher is not None:
            wanted = run_block(block, index, teacher.batches[number])  # (B, T, D)
            correction = (wanted - output) * teacher.mix
            teacher.batches[number].hidden.copy_(wanted)
        feed(running, Site.BLOCK, batch.hidden, output)
        bias = decoder.down_projection(index).bias
        if bias is not None and Site.DOWN_PROJECTION in seen:
            inputs, own = seen[Site.DOWN_PROJECTION]
            seen[Site.DOWN_PROJECTION] = inputs, own - bias  # (B, T, D): the product alone
        for site, (inputs, own) in seen.items():
            feed(running, site, inputs, own if correction is None else own + correction)
        if advance:
            batch.hidden.copy_(output)
        lengths += [output.shape[1]] * len(output)
        step()
    tokens, held_out_tokens = sum(lengths), sum(lengths[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    values: dict[Statistic, Tensor] = {}
    for chosen, accumulator in running:
        with chosen.blamed(f"value() at block {index}") as component:
            values[component.provides] = accumulator.value(tokens).float()
    return BlockStatistics(values, tokens, held_out_tokens)


def start(chosen: Chosen[Collector]) -> Accumulator:
    """A fresh accumulator."""
    with chosen.blamed("start()") as component:
        return component.start()


@contextmanager
def _watching(decoder: Decoder, index: int, sites: set[Site]) -> Generator[dict[Site, tuple[Tensor, Tensor]]]:
    """While open, what goes in and out at the feed-forward's sites lands in the yielded mapping; hooks only where asked."""
    modules: dict[Site, nn.Module] = {
        Site.FEED_FORWARD: decoder.blocks[index].get_submodule(decoder.architecture.feed_forward.path),
        Site.DOWN_PROJECTION: decoder.down_projection(index),
    }
    seen: dict[Site, tuple[Tensor, Tensor]] = {}

    def hear(site: Site) -> Callable[[Tensor, Tensor], None]:
        def remember(inputs: Tensor, outputs: Tensor) -> None:
            seen[site] = inputs, outputs

        return remember

    with ExitStack() as stack:
        for site in sites & modules.keys():
            stack.enter_context(listening(modules[site], hear(site)))
        yield seen


def feed(running: Sequence[tuple[Chosen[Collector], Accumulator]], site: Site, inputs: Tensor, outputs: Tensor) -> None:
    """Hand one batch to the accumulators of a site, window by window: no batch size changes a statistic."""
    for chosen, accumulator in running:
        if chosen.component.site is site:
            with chosen.blamed("update()"):
                for window_in, window_out in zip(inputs, outputs, strict=True):  # (T, F or D), (T, D)
                    accumulator.update(window_in, window_out)
