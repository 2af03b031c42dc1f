"""What collectors measure while one block runs on all its batches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from cfsp_framework.api.components import Accumulator, Collector
from cfsp_framework.api.data import BlockStatistics, FeedForward, Site, Statistic, Windows
from cfsp_framework.engine.replay import Batch, run_block
from cfsp_framework.errors import ModelError, PluginError
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.host.sandbox import tensor_problem
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.feed_forwards import DenseFeedForward, FeedForwardIO
from cfsp_framework.runtime.distributed import SOLO, Ranks

_WEIGHTS = ("up", "down", "gate", "up_bias", "gate_bias", "down_bias")
_IN_FEED_FORWARDS = frozenset({Site.FEED_FORWARD, Site.DOWN_PROJECTION})


@dataclass(frozen=True)
class Teacher:
    """The dense model's stream, run beside the pruned one, and how far targets lean to it."""

    batches: Sequence[Batch]
    mix: float


@dataclass(frozen=True)
class Window:
    """One window's rows at a site."""

    number: int
    inputs: Tensor  # (T, F or D)
    outputs: Tensor  # (T, D or F)


class TokenCounts:
    """How many tokens were counted, and how many of them lie in held-out windows."""

    def __init__(self) -> None:
        self.all = 0
        self.held_out = 0

    def add(self, window: Window) -> None:
        """Count one window's rows."""
        self.all += len(window.inputs)
        self.held_out += len(window.inputs) * Windows.HELD_OUT.include(window.number)

    def of(self, windows: Windows) -> int:
        """The tokens of some of the windows."""
        return {Windows.ALL: self.all, Windows.HELD_OUT: self.held_out}.get(windows, self.all - self.held_out)


class CollectorState:
    """A running statistic."""

    def __init__(self, chosen: ConfiguredComponent[Collector]) -> None:
        self.chosen = chosen
        self._fed = False
        self._sizes: dict[str, int] = {}
        with chosen.call_component("start()") as component:
            self._accumulator: Accumulator = component.start()
        missing = [name for name in ("sums", "update", "value") if not hasattr(self._accumulator, name)]
        if missing:
            found = type(self._accumulator).__name__
            raise PluginError(f"{chosen}: start() returned a {found}, which has no `{missing[0]}`: no Accumulator.")

    def add(self, window: Window) -> None:
        """Feed one window, if the collector wants it; without its rows the first time, so that sums exist."""
        wanted = self.chosen.component.windows.include(window.number)
        if not wanted and self._fed:
            return
        rows = slice(None) if wanted else slice(0)
        if not self._fed:
            self._sizes = _sizes(self.chosen.component.site, window)
        inputs, outputs = window.inputs[rows], window.outputs[rows]
        with self.chosen.call_component("update()", {"inputs": inputs, "outputs": outputs}, thorough=not self._fed):
            self._accumulator.update(inputs, outputs)
        self._fed = True

    def value(self, tokens: TokenCounts, where: str, ranks: Ranks) -> Tensor:
        """The statistic over all processes, float32; what it says of itself where no token was seen."""
        action = f"value() at {where}"
        with self.chosen.call_component(f"its sums at {where}"):
            ranks.add(self._accumulator.sums)
        with self.chosen.call_component(action) as component:
            value: object = self._accumulator.value(max(tokens.of(component.windows), 1))
        shape = _expected(component.provides.shape, self._sizes)
        problem = tensor_problem(value, shape, finite=False)
        if problem is not None:
            told = component.provides
            raise PluginError(f"{self.chosen}: {action} {problem}; {told.name} has the shape {told.shape}.")
        assert isinstance(value, Tensor)
        value = value.detach().float()
        return value if tokens.all else _unseen(component.provides, value)


class BlockCollectors:
    """Everything that runs on one block: its own statistics, and those of each of its feed-forwards."""

    def __init__(self, collectors: Sequence[ConfiguredComponent[Collector]], paths: Sequence[str]) -> None:
        self._paths = paths
        self._block = [CollectorState(chosen) for chosen in collectors if chosen.component.site is Site.BLOCK]
        self._members = [
            [CollectorState(chosen) for chosen in collectors if chosen.component.site is not Site.BLOCK] for _ in paths
        ]
        self._tokens = [TokenCounts() for _ in paths]
        self._block_tokens = TokenCounts()

    def hear_block(self, batch: Batch, output: Tensor) -> None:
        """Feed what entered and left the block."""
        stream = batch.hidden.to(output.device)
        if stream.ndim == 4:  # Gemma 3n predicts several streams beside the one it means, which is the first
            stream, output = stream[0], output[0]
        for window in split(stream.flatten(0, 1), output.flatten(0, 1), None, batch):
            self._block_tokens.add(window)
            for state in self._block:
                state.add(window)

    def hear(self, member: int, heard: Sequence[tuple[Site, Tensor, Tensor, Tensor | None]], batch: Batch) -> None:
        """Feed what one feed-forward saw at its sites."""
        for number, (site, inputs, outputs, places) in enumerate(heard):
            for window in split(inputs, outputs, places, batch):
                if number == 0:
                    self._tokens[member].add(window)
                for state in self._members[member]:
                    if state.chosen.component.site is site:
                        state.add(window)

    def values(self, index: int, ranks: Ranks = SOLO) -> tuple[BlockStatistics, ...]:
        """What was measured of every feed-forward, the block's own statistics with each, over all processes."""
        for tokens in (self._block_tokens, *self._tokens):
            tokens.all, tokens.held_out = ranks.total((tokens.all, tokens.held_out))
        own = {
            state.chosen.component.provides: state.value(self._block_tokens, f"block {index}", ranks)
            for state in self._block
        }
        found: list[BlockStatistics] = []
        for path, tallies, seen in zip(self._paths, self._members, self._tokens, strict=True):
            tokens = seen if tallies else self._block_tokens
            where = f"block {index}, {path}"
            values = {state.chosen.component.provides: state.value(tokens, where, ranks) for state in tallies}
            found.append(BlockStatistics(own | values, tokens.all, tokens.held_out))
        return tuple(found)


def measure_block(
    decoder: Decoder,
    index: int,
    batches: Sequence[Batch],
    collectors: Sequence[ConfiguredComponent[Collector]],
    step: Callable[[], None] = lambda: None,
    *,
    advance: bool = True,
    teacher: Teacher | None = None,
    ranks: Ranks = SOLO,
) -> tuple[BlockStatistics, ...]:
    """Run block ``index`` once per batch and return what the collectors measured of each feed-forward, float32.

    ``advance`` moves the batches on to the next block. With a ``teacher`` the block also runs on the dense stream, and
    the collectors of a feed-forward see targets: ``own output + mix * (dense block output - block output)``; where the
    block has several feed-forwards nobody could say which of them should give what, and they see their own output.
    """
    modules = [module for group in decoder.groups(index) for module in group.modules]
    paths = [path for module in modules for path in module.paths]
    tallies = BlockCollectors(collectors, paths)
    sites = {chosen.component.site for chosen in collectors} & _IN_FEED_FORWARDS
    alone = len(modules) == 1 and isinstance(modules[0], DenseFeedForward)
    for number, batch in enumerate(batches):
        with listening(decoder, index, wanted=bool(sites)) as heard:
            output = run_block(decoder, index, batch)  # (B, T, D)
        correction: Tensor | None = None
        if teacher is not None:
            wanted = run_block(decoder, index, teacher.batches[number])  # (B, T, D)
            correction = ((wanted - output) * teacher.mix).flatten(0, 1) if alone else None
            teacher.batches[number].hidden.copy_(wanted)
        tallies.hear_block(batch, output)
        for member, one in heard:
            seen = [(site, *one.at(site)) for site in sorted(sites, key=lambda site: site.value)]
            tallies.hear(
                member,
                [(site, i, o if correction is None else o + correction, one.tokens) for site, i, o in seen],
                batch,
            )
        if advance:
            batch.hidden.copy_(output)
        step()
    found = tallies.values(index, ranks)
    for path, statistics in zip(paths, found, strict=True):
        _check_finite(decoder, f"block {index}, {path or 'its feed-forward'}", statistics, collectors, batches)
    return found


def _check_finite(
    decoder: Decoder,
    where: str,
    statistics: BlockStatistics,
    collectors: Sequence[ConfiguredComponent[Collector]],
    batches: Sequence[Batch],
) -> None:
    """Refuse statistics that are not finite: the model's fault where its own hidden states are not, else a plugin's."""
    for chosen in collectors:
        value = statistics.get(chosen.component.provides)
        if value is None or bool(value.isfinite().all()):
            continue
        place = value.isfinite().logical_not().nonzero()[0].tolist()
        told = f"{where}: {chosen.component.provides.name}{place or ''} is {value[tuple(place)].item()}"
        if any(not bool(batch.hidden.isfinite().all()) for batch in batches):
            overflow = decoder.model.dtype == torch.float16
            advice = (
                "they overflow in float16, try --dtype bfloat16 or float32" if overflow else "its weights are damaged"
            )
            raise ModelError(f"{told}: the model's own activations are not finite there; {advice}.")
        raise PluginError(f"{chosen}: value() is not finite. {told}.")


def read_only_inputs(feed_forward: FeedForward, statistics: BlockStatistics) -> dict[str, Tensor | None]:
    """Everything a component is shown of a feed-forward, and must not write to."""
    weights = {name: getattr(feed_forward, name) for name in _WEIGHTS}
    return {**weights, **{statistic.name: value for statistic, value in statistics.items()}}


@contextmanager
def listening(decoder: Decoder, index: int, *, wanted: bool = True) -> Generator[list[tuple[int, FeedForwardIO]]]:
    """While open, what block ``index``'s feed-forwards see lands in the yielded list, each with its number."""
    seen: list[tuple[int, FeedForwardIO]] = []

    def hear(first: int) -> Callable[[FeedForwardIO], None]:
        return lambda heard: seen.append((first + heard.member, heard))

    with ExitStack() as stack:
        first = 0
        for group in decoder.groups(index) if wanted else ():
            for module in group.modules:
                stack.enter_context(module.watching(hear(first)))
                first += len(module.paths)
        yield seen


def split(inputs: Tensor, outputs: Tensor, places: Tensor | None, batch: Batch) -> Iterator[Window]:
    """The rows of a batch window by window: no batch size changes a statistic.

    ``places (n,)`` are the rows' places in the flattened batch, ascending; None where all are there. Rows of tokens
    that do not count are left out.
    """
    windows = len(batch.numbers)
    length = len(inputs) // windows if places is None else batch.hidden.shape[-2]
    if places is None and batch.counted is None:
        sizes = [length] * windows
    else:
        rows = torch.arange(len(inputs), device=inputs.device) if places is None else places  # (n,)
        if batch.counted is not None:
            counts = batch.counted.flatten().to(rows.device)[rows]  # (n,)
            rows, inputs, outputs = rows[counts], inputs[counts], outputs[counts]
        sizes = torch.bincount(rows // length, minlength=windows).tolist()
    parts = zip(batch.numbers, inputs.split(sizes), outputs.split(sizes), strict=True)
    return (Window(number, mine, its) for number, mine, its in parts)


_COLUMNS = {
    Site.BLOCK: ("D", "D"),
    Site.FEED_FORWARD: ("D", "D"),
    Site.DOWN_PROJECTION: ("F", "D"),
    Site.GRADIENT: ("F", "F"),
}
"""What the columns of the inputs and the outputs of a site are."""


def _sizes(site: Site, window: Window) -> dict[str, int]:
    """How many channels and hidden values there are, as far as the site shows it."""
    (name, count), (other, size) = zip(_COLUMNS[site], (window.inputs.shape[-1], window.outputs.shape[-1]), strict=True)
    return {name: count, other: size} if name != other or count == size else {}


def _expected(shape: str, sizes: Mapping[str, int]) -> tuple[int | None, ...]:
    """``(F, D)`` in numbers; None for a letter that stands for nothing known at the site."""
    names = [name.strip() for name in shape.strip("()").split(",") if name.strip()]
    return tuple(int(name) if name.isdigit() else sizes.get(name) for name in names)


def _unseen(statistic: Statistic, like: Tensor) -> Tensor:
    """What a statistic is taken for where nothing was seen, in the shape of ``like``."""
    if like.ndim == 1:
        return torch.full_like(like, statistic.unseen)
    if like.ndim == 2 and like.shape[0] == like.shape[1] and statistic.unseen:
        return torch.eye(len(like), dtype=like.dtype, device=like.device) * statistic.unseen
    return like
