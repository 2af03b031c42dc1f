"""Collectors of second moments: Gram matrices of the channel activations and their products with a target."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework import Accumulator, Collector, Site, Statistic, Windows
from cfsp_framework.statistics import (
    BLOCK_OUTPUT_SQUARES,
    DOWN_CROSS,
    DOWN_CROSS_HELD_OUT,
    DOWN_INPUT_GRAM,
    DOWN_INPUT_GRAM_HELD_OUT,
    DOWN_TARGET_SQUARES,
    DOWN_TARGET_SQUARES_HELD_OUT,
    FEED_FORWARD_INPUTS,
    FEED_FORWARD_INPUTS_HELD_OUT,
    FEED_FORWARD_TARGETS,
    FEED_FORWARD_TARGETS_HELD_OUT,
)

_PANELS = 8


class DownInputGram(Collector):
    """Gram matrix of the channel activations: the sum of their outer products over all tokens."""

    name: ClassVar[str] = "down-input-gram"
    provides: ClassVar[Statistic] = DOWN_INPUT_GRAM
    site: ClassVar[Site] = Site.DOWN_PROJECTION

    def start(self) -> Accumulator:
        return _Gram()


class DownInputGramHeldOut(Collector):
    """Gram matrix of the channel activations over the held-out windows alone."""

    name: ClassVar[str] = "down-input-gram-held-out"
    provides: ClassVar[Statistic] = DOWN_INPUT_GRAM_HELD_OUT
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    windows: ClassVar[Windows] = Windows.HELD_OUT

    def start(self) -> Accumulator:
        return _Gram()


class DownCross(Collector):
    """Products of the down projection's target output with its input, summed over all tokens."""

    name: ClassVar[str] = "down-cross"
    provides: ClassVar[Statistic] = DOWN_CROSS
    site: ClassVar[Site] = Site.DOWN_PROJECTION

    def start(self) -> Accumulator:
        return _Cross()


class DownCrossHeldOut(Collector):
    """Products of target and activations over the held-out windows alone."""

    name: ClassVar[str] = "down-cross-held-out"
    provides: ClassVar[Statistic] = DOWN_CROSS_HELD_OUT
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    windows: ClassVar[Windows] = Windows.HELD_OUT

    def start(self) -> Accumulator:
        return _Cross()


class DownTargetSquares(Collector):
    """Sum of squares of what the down projection should give."""

    name: ClassVar[str] = "down-target-squares"
    provides: ClassVar[Statistic] = DOWN_TARGET_SQUARES
    site: ClassVar[Site] = Site.DOWN_PROJECTION

    def start(self) -> Accumulator:
        return _OutputSquares()


class DownTargetSquaresHeldOut(Collector):
    """Sum of squares of the target over the held-out windows alone."""

    name: ClassVar[str] = "down-target-squares-held-out"
    provides: ClassVar[Statistic] = DOWN_TARGET_SQUARES_HELD_OUT
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    windows: ClassVar[Windows] = Windows.HELD_OUT

    def start(self) -> Accumulator:
        return _OutputSquares()


class FeedForwardInputs(Collector):
    """The feed-forward's inputs themselves, in the windows that are not held out."""

    name: ClassVar[str] = "feed-forward-inputs"
    provides: ClassVar[Statistic] = FEED_FORWARD_INPUTS
    site: ClassVar[Site] = Site.FEED_FORWARD
    windows: ClassVar[Windows] = Windows.FITTED
    ordered: ClassVar[bool] = True

    def start(self) -> Accumulator:
        return _Kept(outputs=False)


class FeedForwardInputsHeldOut(Collector):
    """The feed-forward's inputs themselves, in held-out windows."""

    name: ClassVar[str] = "feed-forward-inputs-held-out"
    provides: ClassVar[Statistic] = FEED_FORWARD_INPUTS_HELD_OUT
    site: ClassVar[Site] = Site.FEED_FORWARD
    windows: ClassVar[Windows] = Windows.HELD_OUT
    ordered: ClassVar[bool] = True

    def start(self) -> Accumulator:
        return _Kept(outputs=False)


class FeedForwardTargets(Collector):
    """What the feed-forward should give for its inputs, in the windows that are not held out."""

    name: ClassVar[str] = "feed-forward-targets"
    provides: ClassVar[Statistic] = FEED_FORWARD_TARGETS
    site: ClassVar[Site] = Site.FEED_FORWARD
    windows: ClassVar[Windows] = Windows.FITTED
    ordered: ClassVar[bool] = True

    def start(self) -> Accumulator:
        return _Kept(outputs=True)


class FeedForwardTargetsHeldOut(Collector):
    """What the feed-forward should give for its inputs, in held-out windows."""

    name: ClassVar[str] = "feed-forward-targets-held-out"
    provides: ClassVar[Statistic] = FEED_FORWARD_TARGETS_HELD_OUT
    site: ClassVar[Site] = Site.FEED_FORWARD
    windows: ClassVar[Windows] = Windows.HELD_OUT
    ordered: ClassVar[bool] = True

    def start(self) -> Accumulator:
        return _Kept(outputs=True)


class BlockOutputSquares(Collector):
    """Sum of squares of the block's output, the residual stream that leaves it."""

    name: ClassVar[str] = "block-output-squares"
    provides: ClassVar[Statistic] = BLOCK_OUTPUT_SQUARES
    site: ClassVar[Site] = Site.BLOCK

    def start(self) -> Accumulator:
        return _OutputSquares()


class _Gram:
    """Float32: float64 would double what one block holds. Only the upper triangle is summed, in panels of rows: little
    more than half of the products."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        activations, width = inputs.float(), inputs.shape[1]  # (T, F)
        if not self.sums:
            self.sums["products"] = activations.new_zeros(width, width)  # (F, F)
        height = -(-width // _PANELS)
        for start in range(0, width, height):
            rows = activations[:, start : start + height]  # (T, panel)
            self.sums["products"][start : start + height, start:].addmm_(rows.mT, activations[:, start:])

    def value(self, tokens: int) -> Tensor:
        gram = self.sums["products"]
        return gram.triu() + gram.triu(1).mT


class _Cross:
    """Float32 sum of products of outputs and inputs."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        if not self.sums:
            self.sums["products"] = inputs.new_zeros(outputs.shape[1], inputs.shape[1], dtype=torch.float32)  # (D, F)
        self.sums["products"].addmm_(outputs.float().mT, inputs.float())

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
        return torch.cat(self._windows)  # (n, D)


class _OutputSquares:
    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        squares = outputs.float().square().sum(dtype=torch.float64)  # ()
        self.sums["squares"] = self.sums["squares"] + squares if "squares" in self.sums else squares

    def value(self, tokens: int) -> Tensor:
        return self.sums["squares"]
