"""Collect the first-order effect of each channel's activation on the loss; both collectors need a backward pass."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import Tensor

from cfsp_framework import AccumulatorFactory, Collector, Site, Statistic
from cfsp_framework.statistics import DOWN_INPUT_TAYLOR, DOWN_INPUT_TAYLOR_SQUARED

from .sums import Sums


class _Effect(Sums):
    def __init__(self, power: int) -> None:
        super().__init__()
        self._power = power

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        self.add("total", (inputs.float() * outputs.float()).abs().pow(self._power).sum(0))  # (F,)


class DownInputTaylor(Collector):
    """Sum over tokens of the absolute first-order effect of every channel's activation on the loss."""

    name: ClassVar[str] = "down-input-taylor"
    provides: ClassVar[Statistic] = DOWN_INPUT_TAYLOR
    site: ClassVar[Site] = Site.GRADIENT
    accumulator: ClassVar[AccumulatorFactory] = partial(_Effect, power=1)


class DownInputTaylorSquared(Collector):
    """Sum over tokens of the squared first-order effect of every channel's activation on the loss."""

    name: ClassVar[str] = "down-input-taylor-squared"
    provides: ClassVar[Statistic] = DOWN_INPUT_TAYLOR_SQUARED
    site: ClassVar[Site] = Site.GRADIENT
    accumulator: ClassVar[AccumulatorFactory] = partial(_Effect, power=2)
