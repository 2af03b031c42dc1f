"""Collectors of second moments: Gram matrices of the channel activations and their products with a target."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework import HELD_OUT_EVERY, Accumulator, Collector, Site, Statistic
from cfsp_framework.statistics import (
    BLOCK_OUTPUT_SQUARES,
    DOWN_CROSS,
    DOWN_CROSS_HELD_OUT,
    DOWN_INPUT_GRAM,
    DOWN_INPUT_GRAM_HELD_OUT,
    DOWN_TARGET_SQUARES,
    DOWN_TARGET_SQUARES_HELD_OUT,
    FEED_FORWARD_INPUTS,
    FEED_FORWARD_TARGETS,
)

_PANELS = 8


class DownInputGram(Collector):
    """Gram matrix of the channel activations: the sum of their outer products over all tokens."""

    name: ClassVar[str] = "down-input-gram"
    provides: ClassVar[Statistic] = DOWN_INPUT_GRAM
    site: ClassVar[Site] = Site.DOWN_PROJECTION

    def start(self) -> Accumulator:
        return _Gram(every=1)


class DownInputGramHeldOut(Collector):
    """Gram matrix of the channel activations over the held-out windows alone."""

    name: ClassVar[str] = "down-input-gram-held-out"
    provides: ClassVar[Statistic] = DOWN_INPUT_GRAM_HELD_OUT
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    ordered: ClassVar[bool] = True

    def start(self) -> Accumulator:
        return _Gram(every=HELD_OUT_EVERY)


class DownCross(Collector):
    """Products of the down projection's target output with its input, summed over all tokens."""

    name: ClassVar[str] = "down-cross"
    provides: ClassVar[Statistic] = DOWN_CROSS
    site: ClassVar[Site] = Site.DOWN_PROJECTION

    def start(self) -> Accumulator:
        return _Cross(every=1)


class DownCrossHeldOut(Collector):
    """Products of target and activations over the held-out windows alone."""

    name: ClassVar[str] = "down-cross-held-out"
    provides: ClassVar[Statistic] = DOWN_CROSS_HELD_OUT
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    ordered: ClassVar[bool] = True

    def start(self) -> Accumulator:
        return _Cross(every=HELD_OUT_EVERY)


class DownTargetSquares(Collector):
    """Sum of squares of what the down projection should give."""

    name: ClassVar[str] = "down-target-squares"
    provides: ClassVar[Statistic] = DOWN_TARGET_SQUARES
    site: ClassVar[Site] = Site.DOWN_PROJECTION

    def start(self) -> Accumulator:
        return _OutputSquares(every=1)


class DownTargetSquaresHeldOut(Collector):
    """Sum of squares of the target over the held-out windows alone."""

    name: ClassVar[str] = "down-target-squares-held-out"
    provides: ClassVar[Statistic] = DOWN_TARGET_SQUARES_HELD_OUT
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    ordered: ClassVar[bool] = True

    def start(self) -> Accumulator:
        return _OutputSquares(every=HELD_OUT_EVERY)


class FeedForwardInputs(Collector):
    """The feed-forward's inputs themselves, window by window."""

    name: ClassVar[str] = "feed-forward-inputs"
    provides: ClassVar[Statistic] = FEED_FORWARD_INPUTS
    site: ClassVar[Site] = Site.FEED_FORWARD
    ordered: ClassVar[bool] = True

    def start(self) -> Accumulator:
        return _Kept(outputs=False)


class FeedForwardTargets(Collector):
    """What the feed-forward should give for its inputs, window by window."""

    name: ClassVar[str] = "feed-forward-targets"
    provides: ClassVar[Statistic] = FEED_FORWARD_TARGETS
    site: ClassVar[Site] = Site.FEED_FORWARD
    ordered: ClassVar[bool] = True

    def start(self) -> Accumulator:
        return _Kept(outputs=True)


class BlockOutputSquares(Collector):
    """Sum of squares of the block's output, the residual stream that leaves it."""

    name: ClassVar[str] = "block-output-squares"
    provides: ClassVar[Statistic] = BLOCK_OUTPUT_SQUARES
    site: ClassVar[Site] = Site.BLOCK

    def start(self) -> Accumulator:
        return _OutputSquares(every=1)


class _Products:
    """A float32 sum of products over every so many windows: float64 would double what one block holds."""

    def __init__(self, every: int) -> None:
        self.sums: dict[str, Tensor] = {}
        self._every = every
        self._windows = 0

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        self._windows += 1
        if self._windows % self._every == 0:
            self._add(inputs.float(), outputs.float())
        elif not self.sums:
            self.sums["products"] = self._empty(inputs, outputs)

    def _empty(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        raise NotImplementedError

    def _add(self, inputs: Tensor, outputs: Tensor) -> None:
        raise NotImplementedError


class _Gram(_Products):
    """Only the upper triangle is summed, in panels of rows: little more than half of the products."""

    def _empty(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        return inputs.new_zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float32)  # (F, F)

    def _add(self, inputs: Tensor, outputs: Tensor) -> None:
        gram = self.sums.setdefault("products", self._empty(inputs, outputs))
        width = inputs.shape[1]
        height = -(-width // _PANELS)
        for start in range(0, width, height):
            rows = inputs[:, start : start + height]  # (T, panel)
            gram[start : start + height, start:].addmm_(rows.mT, inputs[:, start:])

    def value(self, tokens: int) -> Tensor:
        gram = self.sums["products"]
        return gram.triu() + gram.triu(1).mT


class _Cross(_Products):
    def _empty(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        return inputs.new_zeros(outputs.shape[1], inputs.shape[1], dtype=torch.float32)  # (D, F)

    def _add(self, inputs: Tensor, outputs: Tensor) -> None:
        self.sums.setdefault("products", self._empty(inputs, outputs)).addmm_(outputs.mT, inputs)

    def value(self, tokens: int) -> Tensor:
        return self.sums["products"]


class _Kept:
    def __init__(self, outputs: bool) -> None:
        self.sums: dict[str, Tensor] = {}
        self._outputs = outputs
        self._windows: list[Tensor] = []

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        self._windows.append((outputs if self._outputs else inputs).clone())

    def value(self, tokens: int) -> Tensor:
        return torch.stack(self._windows)  # (N, T, D)


class _OutputSquares:
    def __init__(self, every: int) -> None:
        self.sums: dict[str, Tensor] = {}
        self._every = every
        self._windows = 0

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        self._windows += 1
        counted = self._windows % self._every == 0
        squares = outputs.float().square().sum(dtype=torch.float64) * counted  # ()
        self.sums["squares"] = self.sums["squares"] + squares if "squares" in self.sums else squares

    def value(self, tokens: int) -> Tensor:
        return self.sums["squares"]
