"""Collect second moments: Gram matrices of the channel activations, their products with a target, sums of squares."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework import AccumulatorFactory, Collector, Site, Statistic
from cfsp_framework.statistics import BLOCK_OUTPUT_SQUARES, DOWN_CROSS, DOWN_INPUT_GRAM, DOWN_TARGET_SQUARES

from .sums import OutputSquares

_PANELS = 8


class _Gram:
    """Sum in float32, since float64 would double what one block holds.

    Only the upper triangle is summed, in panels of rows: little more than half of the products.
    """

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
    """Sum products of outputs and inputs in float32."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        if not self.sums:
            self.sums["products"] = inputs.new_zeros(outputs.shape[1], inputs.shape[1], dtype=torch.float32)  # (D, F)
        self.sums["products"].addmm_(outputs.float().mT, inputs.float())

    def value(self, tokens: int) -> Tensor:
        return self.sums["products"]


class DownInputGram(Collector):
    """Gram matrix of the channel activations: the sum of their outer products over tokens."""

    name: ClassVar[str] = "down-input-gram"
    provides: ClassVar[Statistic] = DOWN_INPUT_GRAM
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    accumulator: ClassVar[AccumulatorFactory] = _Gram


class DownCross(Collector):
    """Products of the down projection's target output with its input, summed over tokens."""

    name: ClassVar[str] = "down-cross"
    provides: ClassVar[Statistic] = DOWN_CROSS
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    accumulator: ClassVar[AccumulatorFactory] = _Cross


class DownTargetSquares(Collector):
    """Sum of squares of the down projection's target output."""

    name: ClassVar[str] = "down-target-squares"
    provides: ClassVar[Statistic] = DOWN_TARGET_SQUARES
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    accumulator: ClassVar[AccumulatorFactory] = OutputSquares


class BlockOutputSquares(Collector):
    """Sum of squares of the block's output, the residual stream that leaves it."""

    name: ClassVar[str] = "block-output-squares"
    provides: ClassVar[Statistic] = BLOCK_OUTPUT_SQUARES
    site: ClassVar[Site] = Site.BLOCK
    accumulator: ClassVar[AccumulatorFactory] = OutputSquares
