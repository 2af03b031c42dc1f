"""Compensate blocks for their removed channels, from kept statistics or by measuring each block a second time."""

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
from cfsp_framework.engine.measure import DenseStream, measure_block, read_only_inputs
from cfsp_framework.engine.replay import ForwardOptions, embed, pass_block
from cfsp_framework.errors import PluginError
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.host.sandbox import find_tensor_problem
from cfsp_framework.host.selection import get_stream, get_target_mix
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.runtime.atomic_files import save_tensors
from cfsp_framework.runtime.distributed import Ranks


class Compensation:
    """Give the weight changes of each block while a model is cut; this base class changes nothing."""

    def compensate(self, index: int, kept: Sequence[Tensor]) -> Sequence[Update]:
        """Return one change for each feed-forward of block ``index``, still dense, that keeps channels ``kept[i] (K,)``."""
        return [Update() for _ in kept]

    def advance(self, index: int) -> None:
        """Move hidden states on through block ``index``, which is cut by now."""


class FirstPassCompensation(Compensation):
    """Compensate from the light statistics of the first pass."""

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

    def compensate(self, index: int, kept: Sequence[Tensor]) -> list[Update]:
        """Compensate each feed-forward of block ``index`` from its statistics."""
        return [
            compensate(
                self._compensator, feed_forward, channels, self._statistics[feed_forward.block, feed_forward.path]
            )
            for feed_forward, channels in zip(self._decoder.feed_forwards(index, self._seed), kept, strict=True)
        ]


class CachedCompensation(Compensation):
    """Compensate by the kept changes of a cut that was finished before; the model does not run."""

    def __init__(self, cache: UpdateCache, ranks: Ranks) -> None:
        self._cache = cache
        self._ranks = ranks

    def compensate(self, index: int, kept: Sequence[Tensor]) -> list[Update]:
        """Return the kept changes of block ``index``."""
        updates = self._ranks.agree(self._cache.load(index, len(kept)) if self._ranks.first else None)
        assert updates is not None, "the caller has seen that every block's changes are kept"
        return updates


class SecondPassCompensation(Compensation):
    """Compensate from statistics that are measured block by block, in order, while the model is cut.

    On the pruned stream the hidden states pass each block as it is after the cut. Nothing heavy outlives its block.
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
        cache: UpdateCache | None = None,
    ) -> None:
        self._decoder = decoder
        self._compensator = compensator
        self._collectors = collectors
        self._cache = cache
        self._seed = seed
        self._ranks = (forward_options or ForwardOptions()).ranks
        self._pruned = get_stream(compensator) is Stream.PRUNED
        additive = all(layout.additive and not layout.experts for layout in decoder.architecture.feed_forwards)
        mix = get_target_mix(compensator) if additive else 0.0
        self._batches = embed(decoder, windows, forward_options)
        self._dense = DenseStream(embed(decoder, windows, forward_options), mix) if self._pruned and mix else None
        self._measured = False
        """Whether the current block was run while it was dense."""

    def compensate(self, index: int, kept: Sequence[Tensor]) -> list[Update]:
        """Measure block ``index`` and compensate each of its feed-forwards; cached changes are returned as they are."""
        cached = self._cache.load(index, len(kept)) if self._cache and self._ranks.first else None
        cached = self._ranks.agree(cached)
        statistics = measure_block(
            self._decoder,
            index,
            self._batches,
            self._collectors if cached is None else (),  # the streams pass the dense block all the same
            advance=not self._pruned,
            dense=self._dense,
            ranks=self._ranks,
        )
        self._measured = True
        if cached is not None:
            return cached
        members = zip(self._decoder.feed_forwards(index, self._seed), kept, statistics, strict=True)
        updates = [compensate(self._compensator, *member) for member in members]
        updates = self._ranks.agree(updates)
        if self._cache and self._ranks.first:
            self._cache.store(index, updates)
        return updates

    def advance(self, index: int) -> None:
        """Move the pruned and the dense stream through block ``index``, each unless it passed while the block was dense."""
        if self._pruned or not self._measured:
            pass_block(self._decoder, index, self._batches)
        if self._dense is not None and not self._measured:
            pass_block(self._decoder, index, self._dense.batches)
        self._measured = False


def compensate(
    compensator: ConfiguredComponent[Compensator], feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics
) -> Update:
    """Return the compensator's change of one feed-forward that keeps the channels ``kept (K,)``, checked.

    The compensator is not called for a feed-forward that loses nothing, nor for an expert without tokens if it
    requires statistics.

    Raises:
        PluginError: the compensator failed, or its change has the wrong shapes or is not finite.
    """
    if len(kept) == feed_forward.width or (statistics.unseen and compensator.required()):
        return Update()
    device = feed_forward.down.device
    kept, required = kept.to(device), statistics.only(compensator.required()).to(device)
    action = f"compensate() at block {feed_forward.block}, {feed_forward.path}"
    inputs = {**read_only_inputs(feed_forward, required), "kept": kept}
    with torch.no_grad(), compensator.call_component(action, inputs) as component:
        update: object = component.compensate(feed_forward, kept, required)
    if not isinstance(update, Update):
        raise PluginError(f"{compensator}: compensate() returned {type(update).__name__}, not an Update.")
    _check_update(compensator, feed_forward, len(kept), update)
    return _detached(update)


def _check_update(
    compensator: ConfiguredComponent[Compensator], feed_forward: FeedForward, count: int, update: Update
) -> None:
    """Refuse a change with tensors of wrong shape or dtype, or with values that are not finite."""
    hidden = feed_forward.hidden
    shapes = {
        "down": (hidden, count),
        "down_bias": (hidden,),
        "up": (count, hidden),
        "gate": (count, hidden),
        "up_bias": (count,),
        "gate_bias": (count,),
    }
    for name, shape in shapes.items():
        value: object = getattr(update, name)
        problem = None if value is None else find_tensor_problem(value, shape, feed_forward.down.dtype)
        if value is not None and name.startswith("gate") and feed_forward.gate is None:
            problem = "is for a gate, which this feed-forward does not have; leave it None"
        if problem:
            raise PluginError(f"{compensator}: `{name}` at block {feed_forward.block} {problem}.")
    for name, error in {"error_plain": update.error_plain, "error": update.error}.items():
        if error is not None and not (isinstance(error, int | float) and math.isfinite(error)):
            raise PluginError(f"{compensator}: `{name}` at block {feed_forward.block} is {error!r}.")


def _detached(update: Update) -> Update:
    """Drop the graphs of trained tensors."""
    tensors: dict[str, Any] = {
        field.name: value.detach()
        for field in fields(update)
        if isinstance(value := getattr(update, field.name), Tensor) and value.requires_grad
    }
    return replace(update, **tensors) if tensors else update


class UpdateCache:
    """Keep the changes of finished blocks in a folder, so that a killed run goes on after them.

    They are filed under ``key``, a hash of everything that decides them: another model, plan, data or option has
    another folder.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder / key[:32]

    def load(self, index: int, count: int) -> list[Update] | None:
        """Return the changes of block ``index``'s ``count`` feed-forwards, or None if the block is not finished."""
        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                values: dict[str, Any] = {name: float(value) for name, value in (file.metadata() or {}).items()}
                values |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except SafetensorError:  # incomplete: the block is done again
            return None
        members: list[dict[str, Any]] = [{} for _ in range(count)]
        for key, value in values.items():
            member, _, name = key.partition(".")
            members[int(member)][name] = value
        return [Update(**member) for member in members]

    def store(self, index: int, updates: Sequence[Update]) -> None:
        """Write the changes of block ``index``, completely or not at all."""
        values = {
            f"{member}.{field.name}": getattr(update, field.name)
            for member, update in enumerate(updates)
            for field in fields(update)
        }
        tensors = {name: value.contiguous().cpu() for name, value in values.items() if isinstance(value, Tensor)}
        errors = {name: repr(value) for name, value in values.items() if isinstance(value, float)}
        save_tensors(self._path(index), tensors, errors)

    def _path(self, index: int) -> Path:
        return self._folder / f"block_{index}.safetensors"
