"""Run one block on all its batches and measure what collectors ask for."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from cfsp_framework.api.components import Accumulator, Collector
from cfsp_framework.api.data import BlockStatistics, FeedForward, Site, Statistic, Windows
from cfsp_framework.engine.replay import Batch, run_block
from cfsp_framework.errors import ModelError, PluginError
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.host.sandbox import find_tensor_problem
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.feed_forwards import DenseFeedForward, FeedForwardIO
from cfsp_framework.runtime.distributed import SOLO, Ranks

_WEIGHTS = ("up", "down", "gate", "up_bias", "gate_bias", "down_bias")
_IN_FEED_FORWARDS = frozenset({Site.FEED_FORWARD, Site.DOWN_PROJECTION})


@dataclass(frozen=True)
class DenseStream:
    """Hidden states of the dense model, run beside those of the pruned one as a target.

    ``mix`` in [0, 1] weighs what restores the dense block's output against the feed-forward's own output.
    """

    batches: Sequence[Batch]
    mix: float


@dataclass(frozen=True)
class WindowRows:
    """The rows of one window at a site."""

    number: int
    """Of the window, counted from 0 over all processes."""
    inputs: Tensor  # (T, F or D)
    outputs: Tensor  # (T, D or F)
    weights: Tensor  # (T,) float32: 1 / the squared norm of each token's residual stream after the block


class TokenCounts:
    """Count tokens, and those of held-out windows among them."""

    def __init__(self) -> None:
        self.all = 0
        self.held_out = 0

    def add(self, rows: WindowRows) -> None:
        """Count one window's rows."""
        self.all += len(rows.inputs)
        self.held_out += len(rows.inputs) * Windows.HELD_OUT.include(rows.number)

    def of(self, windows: Windows) -> int:
        """Return the number of tokens in a kind of windows."""
        return {Windows.ALL: self.all, Windows.HELD_OUT: self.held_out}.get(windows, self.all - self.held_out)


class CollectorState:
    """Run one collector on one feed-forward or block."""

    def __init__(self, collector: ConfiguredComponent[Collector]) -> None:
        self.collector = collector
        self.site = collector.component.site
        self._relative = collector.component.relative
        self._updated = False
        self._sizes: dict[str, int] = {}
        with collector.call_component("start()") as component:
            self.accumulator: Accumulator = component.start()
        missing = [name for name in ("sums", "update", "value") if not hasattr(self.accumulator, name)]
        if missing:
            kind = type(self.accumulator).__name__
            raise PluginError(
                f"{collector}: start() returned a {kind}, which has no `{missing[0]}`; it must return an Accumulator."
            )

    def add(self, rows: WindowRows) -> None:
        """Pass one window to the accumulator if the collector measures it.

        The first call passes at least zero rows, so that the accumulator allocates its sums.
        """
        measured = self.collector.component.windows.include(rows.number)
        if not measured and self._updated:
            return
        if not self._updated:
            self._sizes = _sizes(self.site, rows)
        part = slice(None) if measured else slice(0)
        tensors = {"inputs": rows.inputs[part], "outputs": rows.outputs[part]}
        if self._relative:
            tensors["weights"] = rows.weights[part]
        with self.collector.call_component("update()", tensors, thorough=not self._updated):
            cast("Callable[..., None]", self.accumulator.update)(*tensors.values())
        self._updated = True

    def value(self, tokens: TokenCounts, place: str, ranks: Ranks) -> Tensor:
        """Return the statistic over all processes, float32; ``Statistic.unseen`` if no token was counted."""
        action = f"value() at {place}"
        with self.collector.call_component(f"its sums at {place}"):
            ranks.add(self.accumulator.sums)
        with self.collector.call_component(action) as component:
            value: object = self.accumulator.value(max(tokens.of(component.windows), 1))
        statistic = component.provides
        problem = find_tensor_problem(value, _expected_shape(statistic.shape, self._sizes), finite=False)
        if problem is not None:
            raise PluginError(
                f"{self.collector}: {action} {problem}; {statistic.name} has the shape {statistic.shape}."
            )
        assert isinstance(value, Tensor)
        value = value.detach().float()
        return value if tokens.all else _unseen_value(statistic, value)


class BlockCollectors:
    """Run all collectors on one block and on each of its feed-forwards."""

    def __init__(self, collectors: Sequence[ConfiguredComponent[Collector]], paths: Sequence[str]) -> None:
        of_block = [collector for collector in collectors if collector.component.site is Site.BLOCK]
        of_feed_forward = [collector for collector in collectors if collector.component.site is not Site.BLOCK]
        self._paths = paths
        self._block = [CollectorState(collector) for collector in of_block]
        self._members = [[CollectorState(collector) for collector in of_feed_forward] for _ in paths]
        self._block_tokens = TokenCounts()
        self._member_tokens = [TokenCounts() for _ in paths]

    def add_block(self, batch: Batch, output: Tensor) -> None:
        """Add a batch's hidden states as they enter the block, and its ``output (B, T, D)``."""
        hidden = batch.hidden.to(output.device)
        if hidden.ndim == 4:  # Gemma 3n carries several streams; the first is the prediction
            hidden, output = hidden[0], output[0]
        for rows in rows_by_window(hidden.flatten(0, 1), output.flatten(0, 1), token_weights(output), None, batch):
            self._block_tokens.add(rows)
            for state in self._block:
                state.add(rows)

    def add_feed_forward(
        self,
        member: int,
        sites: Sequence[tuple[Site, Tensor, Tensor]],
        weights: Tensor,
        positions: Tensor | None,
        batch: Batch,
    ) -> None:
        """Add inputs and outputs at each site of one feed-forward, of the tokens at ``positions (n,)``.

        ``weights (B * T,)`` are those of all tokens of the batch.
        """
        weights = weights if positions is None else weights[positions]  # (n,)
        for number, (site, inputs, outputs) in enumerate(sites):
            for rows in rows_by_window(inputs, outputs, weights, positions, batch):
                if number == 0:
                    self._member_tokens[member].add(rows)
                for state in self._members[member]:
                    if state.site is site:
                        state.add(rows)

    def values(self, index: int, ranks: Ranks = SOLO) -> tuple[BlockStatistics, ...]:
        """Return each feed-forward's statistics, the block's own among them, over all processes."""
        for tokens in (self._block_tokens, *self._member_tokens):
            tokens.all, tokens.held_out = ranks.total((tokens.all, tokens.held_out))
        block_values = {
            state.collector.component.provides: state.value(self._block_tokens, f"block {index}", ranks)
            for state in self._block
        }
        statistics: list[BlockStatistics] = []
        for path, states, member_tokens in zip(self._paths, self._members, self._member_tokens, strict=True):
            tokens = member_tokens if states else self._block_tokens
            place = f"block {index}, {path}"
            values = {state.collector.component.provides: state.value(tokens, place, ranks) for state in states}
            statistics.append(BlockStatistics(block_values | values, tokens.all, tokens.held_out))
        return tuple(statistics)


def measure_block(
    decoder: Decoder,
    index: int,
    batches: Sequence[Batch],
    collectors: Sequence[ConfiguredComponent[Collector]],
    step: Callable[[], None] = lambda: None,
    *,
    advance: bool = True,
    dense: DenseStream | None = None,
    ranks: Ranks = SOLO,
) -> tuple[BlockStatistics, ...]:
    """Run block ``index`` once per batch and return what the collectors measured of each feed-forward, float32.

    ``advance`` moves the batches on to the next block. With a ``dense`` stream the block also runs on that, and the
    collectors of a feed-forward get targets as outputs: ``own output + mix * (dense block output - block output)``.
    In a block of several feed-forwards the difference cannot be attributed to one of them, and all get their own output.
    """
    modules = [module for group in decoder.groups(index) for module in group.modules]
    paths = [path for module in modules for path in module.paths]
    states = BlockCollectors(collectors, paths)
    sites = sorted({c.component.site for c in collectors} & _IN_FEED_FORWARDS, key=lambda site: site.value)
    single = len(modules) == 1 and isinstance(modules[0], DenseFeedForward)
    for number, batch in enumerate(batches):
        with observed_feed_forwards(decoder, index, active=bool(sites)) as observed:
            output = run_block(decoder, index, batch)  # (B, T, D)
        correction, target = None, output
        if dense is not None:
            target = run_block(decoder, index, dense.batches[number])  # (B, T, D)
            correction = ((target - output) * dense.mix).flatten(0, 1) if single else None  # (B * T, D)
            dense.batches[number].hidden.copy_(target)
        states.add_block(batch, output)
        weights = token_weights(target) if observed else None  # (B * T,)
        for member, io in observed:
            at_sites = [(site, *io.at(site)) for site in sites]
            if correction is not None:
                at_sites = [(site, inputs, outputs + correction) for site, inputs, outputs in at_sites]
            assert weights is not None
            states.add_feed_forward(member, at_sites, weights, io.tokens, batch)
        if advance:
            batch.hidden.copy_(output)
        step()
    measured = states.values(index, ranks)
    for path, statistics in zip(paths, measured, strict=True):
        _check_finite(decoder, f"block {index}, {path or 'its feed-forward'}", statistics, collectors, batches)
    return measured


def _check_finite(
    decoder: Decoder,
    place: str,
    statistics: BlockStatistics,
    collectors: Sequence[ConfiguredComponent[Collector]],
    batches: Sequence[Batch],
) -> None:
    """Refuse statistics that are not finite: the model's fault if its own hidden states are not, else the plugin's."""
    for collector in collectors:
        value = statistics.get(collector.component.provides)
        if value is None or bool(value.isfinite().all()):
            continue
        position = value.isfinite().logical_not().nonzero()[0].tolist()
        problem = f"{place}: {collector.component.provides.name}{position or ''} is {value[tuple(position)].item()}"
        if any(not bool(batch.hidden.isfinite().all()) for batch in batches):
            overflow = decoder.model.dtype == torch.float16
            advice = (
                "they overflow in float16, try --dtype bfloat16 or float32" if overflow else "its weights are damaged"
            )
            raise ModelError(f"{problem}: the model's own activations are not finite there; {advice}.")
        raise PluginError(f"{collector}: value() is not finite. {problem}.")


def read_only_inputs(feed_forward: FeedForward, statistics: BlockStatistics) -> dict[str, Tensor | None]:
    """Return every tensor a component gets of a feed-forward and must not write to, by name."""
    weights = {name: getattr(feed_forward, name) for name in _WEIGHTS}
    return {**weights, **{statistic.name: value for statistic, value in statistics.items()}}


@contextmanager
def observed_feed_forwards(
    decoder: Decoder, index: int, *, active: bool = True
) -> Generator[list[tuple[int, FeedForwardIO]]]:
    """Yield a list that block ``index``'s feed-forwards add their inputs and outputs to, each with its number."""
    observed: list[tuple[int, FeedForwardIO]] = []

    def listener(first: int) -> Callable[[FeedForwardIO], None]:
        return lambda io: observed.append((first + io.member, io))

    with ExitStack() as stack:
        first = 0
        for group in decoder.groups(index) if active else ():
            for module in group.modules:
                stack.enter_context(module.observed(listener(first)))
                first += len(module.paths)
        yield observed


def token_weights(output: Tensor) -> Tensor:
    """Return 1 / the squared norm of each token of a block's ``output (B, T, D)``, ``(B * T,)`` float32; 0 for a zero."""
    streams = output[0] if output.ndim == 4 else output  # Gemma 3n carries several; the first is the prediction
    squares = streams.flatten(0, 1).float().square().sum(-1)  # (B * T,)
    return torch.where(squares > 0, squares.reciprocal(), 0.0)


def rows_by_window(
    inputs: Tensor, outputs: Tensor, weights: Tensor, positions: Tensor | None, batch: Batch
) -> Iterator[WindowRows]:
    """Split the rows of a batch by window, so that the batch size changes no statistic.

    ``positions (n,)`` are the rows' positions in the flattened batch, ascending; None if all rows are present. Rows of
    tokens that do not count are left out.
    """
    windows = len(batch.numbers)
    length = len(inputs) // windows if positions is None else batch.hidden.shape[-2]
    if positions is None and batch.counted is None:
        sizes = [length] * windows
    else:
        rows = torch.arange(len(inputs), device=inputs.device) if positions is None else positions  # (n,)
        if batch.counted is not None:
            counts = batch.counted.flatten().to(rows.device)[rows]  # (n,)
            rows, inputs, outputs, weights = rows[counts], inputs[counts], outputs[counts], weights[counts]
        sizes = torch.bincount(rows // length, minlength=windows).tolist()
    return map(WindowRows, batch.numbers, inputs.split(sizes), outputs.split(sizes), weights.split(sizes))


_COLUMNS = {
    Site.BLOCK: ("D", "D"),
    Site.FEED_FORWARD: ("D", "D"),
    Site.DOWN_PROJECTION: ("F", "D"),
    Site.GRADIENT: ("F", "F"),
}
"""The letters of the columns of a site's inputs and outputs."""


def _sizes(site: Site, rows: WindowRows) -> dict[str, int]:
    """Return the numbers of channels and hidden values, as far as the site shows them."""
    letters, widths = _COLUMNS[site], (rows.inputs.shape[-1], rows.outputs.shape[-1])
    return {} if letters[0] == letters[1] and widths[0] != widths[1] else dict(zip(letters, widths, strict=True))


def _expected_shape(shape: str, sizes: Mapping[str, int]) -> tuple[int | None, ...]:
    """Return ``(F, D)`` in numbers; None for a letter that is unknown at the site."""
    names = [name.strip() for name in shape.strip("()").split(",") if name.strip()]
    return tuple(int(name) if name.isdigit() else sizes.get(name) for name in names)


def _unseen_value(statistic: Statistic, like: Tensor) -> Tensor:
    """Return the value of a statistic that no token was counted for, in the shape of ``like``."""
    if like.ndim == 1:
        return torch.full_like(like, statistic.unseen)
    if like.ndim == 2 and like.shape[0] == like.shape[1] and statistic.unseen:
        return torch.eye(len(like), dtype=like.dtype, device=like.device) * statistic.unseen
    return like
