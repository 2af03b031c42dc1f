"""Collect first and second moments of each channel's activation ``h (T, F)``, the input of the down projection."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework import AccumulatorFactory, Collector, Site, Statistic
from cfsp_framework.statistics import DOWN_INPUT_MEAN, DOWN_INPUT_SQUARES, DOWN_INPUT_VARIANCE

from .sums import Sums


class _Squares(Sums):
    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        self.add("total", inputs.float().square().sum(0))  # (F,); vector_norm over rows takes six times as long


class _Mean(Sums):
    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        self.add("total", inputs.sum(0, dtype=torch.float32))  # (F,)

    def value(self, tokens: int) -> Tensor:
        return self.sums["total"] / tokens


class _Variance(Sums):
    """Take both moments in float64, since their difference loses the digits that their squares share."""

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        exact = inputs.double()  # (T, F)
        self.add("sum", exact.sum(0))  # (F,)
        self.add("squares", exact.square().sum(0))  # (F,)

    def value(self, tokens: int) -> Tensor:
        return (self.sums["squares"] / tokens - (self.sums["sum"] / tokens).square()).clamp(min=0)


class DownInputSquares(Collector):
    """Sum of squares of every channel's activation."""

    name: ClassVar[str] = "down-input-squares"
    provides: ClassVar[Statistic] = DOWN_INPUT_SQUARES
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    accumulator: ClassVar[AccumulatorFactory] = _Squares


class DownInputMean(Collector):
    """Mean of every channel's activation."""

    name: ClassVar[str] = "down-input-mean"
    provides: ClassVar[Statistic] = DOWN_INPUT_MEAN
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    accumulator: ClassVar[AccumulatorFactory] = _Mean


class DownInputVariance(Collector):
    """Variance of every channel's activation."""

    name: ClassVar[str] = "down-input-variance"
    provides: ClassVar[Statistic] = DOWN_INPUT_VARIANCE
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    accumulator: ClassVar[AccumulatorFactory] = _Variance
