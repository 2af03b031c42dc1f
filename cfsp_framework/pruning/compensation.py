"""Asks the compensator about each block: with what the first pass kept, or measuring the block a second time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cfsp_framework.api.components import Collector, Compensator
from cfsp_framework.api.data import BlockStatistics, FeedForward, Stream, Update
from cfsp_framework.engine.measure import Teacher, measure_block, read_only_inputs
from cfsp_framework.engine.replay import ForwardOptions, embed, pass_block
from cfsp_framework.errors import PluginError
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.host.sandbox import tensor_problem
from cfsp_framework.host.selection import stream_of, target_mix_of
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.runtime.atomic_files import save_aside


def compensate(
    compensator: ConfiguredComponent[Compensator], feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics
) -> Update:
    """The compensator's answer for one feed-forward, checked: right shapes, all finite.

    It is not asked about one that loses nothing, or whose tokens it would have to know and nobody saw.
    """
    if len(kept) == feed_forward.width or (statistics.unseen and compensator.required()):
        return Update()
    down = feed_forward.down
    kept, seen = kept.to(down.device), statistics.only(compensator.required()).to(down.device)
    action = f"compensate() at block {feed_forward.block}, {feed_forward.path}"
    with (
        torch.no_grad(),
        compensator.call_component(action, {**read_only_inputs(feed_forward, seen), "kept": kept}) as component,
    ):
        found: object = component.compensate(feed_forward, kept, seen)
    if not isinstance(found, Update):
        raise PluginError(f"{compensator}: compensate() returned {type(found).__name__}, not an Update.")
    hidden, count = feed_forward.hidden, len(kept)
    shapes = {"down": (hidden, count), "down_bias": (hidden,), "up": (count, hidden), "gate": (count, hidden)}
    for name, shape in {**shapes, "up_bias": (count,), "gate_bias": (count,)}.items():
        value: object = getattr(found, name)
        problem = None if value is None else tensor_problem(value, shape, down.dtype)
        if problem:
            raise PluginError(f"{compensator}: `{name}` at block {feed_forward.block} {problem}.")
    for name, error in {"error_plain": found.error_plain, "error": found.error}.items():
        if error is not None and not (isinstance(error, int | float) and math.isfinite(error)):
            raise PluginError(f"{compensator}: `{name}` at block {feed_forward.block} is {error!r}.")
    return _settled(found)


def _settled(update: Update) -> Update:
    """The update without a graph, which one that was trained may come with."""
    graphs: dict[str, Any] = {
        one.name: value.detach()
        for one in fields(update)
        if isinstance(value := getattr(update, one.name), Tensor) and value.requires_grad
    }
    return replace(update, **graphs) if graphs else update


class FirstPass:
    """Answers ``(block, kept channels)`` from the light statistics of the first pass."""

    def __init__(
        self,
        decoder: Decoder,
        statistics: Mapping[tuple[int, str], BlockStatistics],
        compensator: ConfiguredComponent[Compensator],
        *,
        seed: int,
    ) -> None:
        self._decoder = decoder
        self._statistics = statistics
        self._compensator = compensator
        self._seed = seed

    def __call__(self, index: int, kept: Sequence[Tensor]) -> list[Update]:
        """Compensate block ``index``, which is still dense, for keeping the channels ``kept[i] (K,)`` of each part."""
        return [
            compensate(self._compensator, one, mine, self._statistics[one.block, one.path])
            for one, mine in zip(self._decoder.feed_forwards(index, self._seed), kept, strict=True)
        ]

    def advance(self, index: int) -> None:
        """Nothing passes the blocks."""


class FinishedBlocks:
    """What the compensator answered for finished blocks, kept in a folder so that a killed run goes on after them.

    Answers are filed under ``key``, a hash of all that decides them: another model, plan, data or option finds nothing.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder / key[:32]

    def load(self, index: int, count: int) -> list[Update] | None:
        """The answers for block ``index``'s ``count`` feed-forwards, or None if it was not finished."""
        path = self._path(index)
        if not path.exists():
            return None
        values: list[dict[str, Any]] = [{} for _ in range(count)]
        try:
            with safe_open(path, framework="pt") as file:
                found: dict[str, Any] = {name: float(value) for name, value in (file.metadata() or {}).items()}
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except SafetensorError:  # the file is not whole: the block is done again
            return None
        for key, value in found.items():
            member, _, name = key.partition(".")
            values[int(member)][name] = value
        return [Update(**one) for one in values]

    def store(self, index: int, updates: Sequence[Update]) -> None:
        """File block ``index``'s answers, whole or not at all."""
        values = {
            f"{member}.{field.name}": getattr(update, field.name)
            for member, update in enumerate(updates)
            for field in fields(update)
        }
        tensors = {name: value.contiguous().cpu() for name, value in values.items() if isinstance(value, Tensor)}
        errors = {name: repr(value) for name, value in values.items() if isinstance(value, float)}
        save_aside(self._path(index), tensors, errors)

    def _path(self, index: int) -> Path:
        return self._folder / f"block_{index}.safetensors"


class SecondPass:
    """Answers ``(block, kept channels)`` in the blocks' order, with statistics measured when they are asked for.

    On the pruned stream the hidden states have gone through the blocks as they were cut and compensated before. Nothing
    heavy outlives its block.
    """

    def __init__(
        self,
        decoder: Decoder,
        windows: Tensor,
        compensator: ConfiguredComponent[Compensator],
        collectors: Sequence[ConfiguredComponent[Collector]],
        *,
        seed: int,
        forward_options: ForwardOptions | None = None,
        finished: FinishedBlocks | None = None,
    ) -> None:
        self._decoder = decoder
        self._compensator = compensator
        self._collectors = collectors
        self._finished = finished
        self._seed = seed
        self._ranks = (forward_options or ForwardOptions()).ranks
        self._pruned = stream_of(compensator) is Stream.PRUNED
        additive = all(layout.additive and not layout.experts for layout in decoder.architecture.feed_forwards)
        mix = target_mix_of(compensator) if additive else 0.0
        self._batches = embed(decoder, windows, forward_options)
        self._teacher = Teacher(embed(decoder, windows, forward_options), mix) if self._pruned and mix else None
        self._passed = False

    def __call__(self, index: int, kept: Sequence[Tensor]) -> list[Update]:
        """Measure block ``index``, which is still dense, and compensate it for keeping ``kept[i] (K,)`` of each part."""
        known = self._finished.load(index, len(kept)) if self._finished and self._ranks.first else None
        known = self._ranks.agree(known)
        statistics = measure_block(
            self._decoder,
            index,
            self._batches,
            self._collectors if known is None else (),  # the streams have to pass the dense block all the same
            advance=not self._pruned,
            teacher=self._teacher,
            ranks=self._ranks,
        )
        self._passed = True
        if known is not None:
            return known
        parts = zip(self._decoder.feed_forwards(index, self._seed), kept, statistics, strict=True)
        updates = [compensate(self._compensator, one, mine, seen) for one, mine, seen in parts]
        updates = self._ranks.agree(updates)
        if self._finished and self._ranks.first:
            self._finished.store(index, updates)
        return updates

    def advance(self, index: int) -> None:
        """Move the streams on through block ``index`` as it is now."""
        if self._pruned or not self._passed:
            pass_block(self._decoder, index, self._batches)
        if self._teacher is not None and not self._passed:  # else it passed the block while that was dense
            pass_block(self._decoder, index, self._teacher.batches)
        self._passed = False
