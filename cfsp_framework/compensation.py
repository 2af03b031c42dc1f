"""Asks the compensator about each block: with what the first pass kept, or measuring the block a second time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .api import BlockStatistics, Collector, Compensator, FeedForward, Stream, Update
from .architectures import Decoder
from .blocks import Batch, embed, run_block
from .errors import PluginError
from .measure import Teacher, measure_block
from .plugins import Chosen


def compensate(
    compensator: Chosen[Compensator], feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics
) -> Update:
    """The compensator's answer for one feed-forward, checked: right shapes, all finite."""
    with torch.no_grad(), compensator.blamed(f"compensate() at block {feed_forward.block}") as component:
        found: object = component.compensate(
            feed_forward,
            kept.to(feed_forward.down.device),
            statistics.only(component.required()).to(feed_forward.down.device),
        )
    if not isinstance(found, Update):
        raise PluginError(f"{compensator}: compensate() returned {type(found).__name__}, not an Update.")
    hidden, count = feed_forward.hidden, len(kept)
    shapes = {"down": (hidden, count), "down_bias": (hidden,), "up": (count, hidden), "gate": (count, hidden)}
    for name, shape in {**shapes, "up_bias": (count,), "gate_bias": (count,)}.items():
        problem = _problem(getattr(found, name), shape, feed_forward.down.dtype)
        if problem:
            raise PluginError(f"{compensator}: `{name}` at block {feed_forward.block} {problem}.")
    for name, error in {"error_plain": found.error_plain, "error": found.error}.items():
        if error is not None and not math.isfinite(error):
            raise PluginError(f"{compensator}: `{name}` at block {feed_forward.block} is {error}.")
    return found


def _problem(value: object, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """What is wrong with one tensor of an update, which the model will hold in ``dtype``."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    if value.shape != shape:
        return f"has shape {tuple(value.shape)}, not {shape}"
    if not bool(value.to(dtype).isfinite().all()):
        return f"has values that are not finite in {str(dtype).removeprefix('torch.')}"
    return None


class FirstPass:
    """Answers ``(block, kept channels)`` from the light statistics of the first pass."""

    def __init__(
        self,
        decoder: Decoder,
        statistics: Sequence[BlockStatistics],
        compensator: Chosen[Compensator],
        *,
        seed: int,
    ) -> None:
        self._decoder = decoder
        self._statistics = statistics
        self._compensator = compensator
        self._seed = seed

    def __call__(self, index: int, kept: Tensor) -> Update:
        """Compensate block ``index``, which is still dense, for keeping the channels ``kept (K,)``."""
        feed_forward = self._decoder.feed_forward(index, self._seed)
        return compensate(self._compensator, feed_forward, kept, self._statistics[index])


class FinishedBlocks:
    """What the compensator answered for finished blocks, kept in a folder so that a killed run goes on after them.

    Answers are filed under ``key``, a hash of all that decides them: another model, plan, data or option finds nothing.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder / key[:32]

    def load(self, index: int) -> Update | None:
        """Block ``index``'s answer, or None if it was not finished."""
        path = self._path(index)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            values: dict[str, Any] = {name: float(value) for name, value in (file.metadata() or {}).items()}
            values |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        return Update(**values)

    def store(self, index: int, update: Update) -> None:
        """File block ``index``'s answer, whole or not at all."""
        values = {field.name: getattr(update, field.name) for field in fields(update)}
        tensors = {name: value.contiguous().cpu() for name, value in values.items() if isinstance(value, Tensor)}
        errors = {name: repr(value) for name, value in values.items() if isinstance(value, float)}
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = self._path(index).with_suffix(".partial")
        save_file(tensors, aside, errors)
        aside.replace(self._path(index))

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
        compensator: Chosen[Compensator],
        collectors: Sequence[Chosen[Collector]],
        *,
        batch_size: int | None,
        seed: int,
        finished: FinishedBlocks | None = None,
    ) -> None:
        self._decoder = decoder
        self._compensator = compensator
        self._collectors = collectors
        self._finished = finished
        self._seed = seed
        with compensator.blamed("stream()") as component:
            self._pruned = component.stream() is Stream.PRUNED
            mix = component.target_mix() if decoder.architecture.feed_forward.additive else 0.0
        self._batches = embed(decoder, windows, batch_size)
        self._teacher = Teacher(embed(decoder, windows, batch_size), mix) if self._pruned and mix else None
        self._reached = self._teacher_reached = 0

    def __call__(self, index: int, kept: Tensor) -> Update:
        """Measure block ``index``, which is still dense, and compensate it for keeping the channels ``kept (K,)``."""
        self._catch_up(index)
        known = self._finished.load(index) if self._finished else None
        statistics = measure_block(
            self._decoder,
            index,
            self._batches,
            self._collectors if known is None else (),  # the streams have to pass the dense block all the same
            advance=not self._pruned,
            teacher=self._teacher,
        )
        self._reached = index if self._pruned else index + 1
        self._teacher_reached = index + 1
        if known is not None:
            return known
        update = compensate(self._compensator, self._decoder.feed_forward(index, self._seed), kept, statistics)
        if self._finished:
            self._finished.store(index, update)
        return update

    def _catch_up(self, index: int) -> None:
        """Move the streams to block ``index``: through the block just cut, and through those that lose nothing."""
        for block in range(self._reached, index):
            self._run(block, self._batches)
        if self._teacher is not None:  # it passed the block just cut while that was dense
            for block in range(self._teacher_reached, index):
                self._run(block, self._teacher.batches)

    def _run(self, block: int, batches: Sequence[Batch]) -> None:
        for batch in batches:
            batch.hidden.copy_(run_block(self._decoder.blocks[block], block, batch))
