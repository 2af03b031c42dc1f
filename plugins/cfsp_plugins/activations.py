"""Collectors of the channel activations ``h (T, F)``, the input of the down projection. Sums are float64."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework import Accumulator, Collector, Site, Statistic, Windows
from cfsp_framework.statistics import (
    DOWN_INPUT_FLUCTUATION,
    DOWN_INPUT_MEAN,
    DOWN_INPUT_MEAN_HELD_OUT,
    DOWN_INPUT_SQUARES,
    DOWN_INPUT_TAYLOR,
    DOWN_INPUT_TAYLOR_SQUARED,
    DOWN_INPUT_VARIANCE,
)


class DownInputSquares(Collector):
    """Sum of squares of every channel's activation."""

    name: ClassVar[str] = "down-input-squares"
    provides: ClassVar[Statistic] = DOWN_INPUT_SQUARES
    site: ClassVar[Site] = Site.DOWN_PROJECTION

    def start(self) -> Accumulator:
        return _Squares()


class DownInputMean(Collector):
    """Mean of every channel's activation."""

    name: ClassVar[str] = "down-input-mean"
    provides: ClassVar[Statistic] = DOWN_INPUT_MEAN
    site: ClassVar[Site] = Site.DOWN_PROJECTION

    def start(self) -> Accumulator:
        return _Mean()


class DownInputMeanHeldOut(Collector):
    """Mean of every channel's activation over the held-out windows alone."""

    name: ClassVar[str] = "down-input-mean-held-out"
    provides: ClassVar[Statistic] = DOWN_INPUT_MEAN_HELD_OUT
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    windows: ClassVar[Windows] = Windows.HELD_OUT

    def start(self) -> Accumulator:
        return _Mean()


class DownInputVariance(Collector):
    """Variance of every channel's activation."""

    name: ClassVar[str] = "down-input-variance"
    provides: ClassVar[Statistic] = DOWN_INPUT_VARIANCE
    site: ClassVar[Site] = Site.DOWN_PROJECTION

    def start(self) -> Accumulator:
        return _Variance()


class DownInputFluctuation(Collector):
    """The running quantity FLAP's released code takes for a variance; it depends on the order of the windows.

    With N windows, ``1/(N-1) * sum_s s/(s+1) * sum_t (h[s,t] - mu_s)^2``, ``mu_s`` the mean of windows 0..s
    (CASIA-LMC-Lab/FLAP, lib/layerwrapper.py: its old mean is the same tensor as its new one, and it skips window 0).
    """

    name: ClassVar[str] = "down-input-fluctuation"
    provides: ClassVar[Statistic] = DOWN_INPUT_FLUCTUATION
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    ordered: ClassVar[bool] = True

    def start(self) -> Accumulator:
        return _Fluctuation()


class DownInputTaylor(Collector):
    """Sum of the absolute first-order effect of every channel's activation on the loss; needs a backward pass."""

    name: ClassVar[str] = "down-input-taylor"
    provides: ClassVar[Statistic] = DOWN_INPUT_TAYLOR
    site: ClassVar[Site] = Site.GRADIENT

    def start(self) -> Accumulator:
        return _Taylor(power=1)


class DownInputTaylorSquared(Collector):
    """Sum of the squared first-order effect of every channel's activation on the loss; needs a backward pass."""

    name: ClassVar[str] = "down-input-taylor-squared"
    provides: ClassVar[Statistic] = DOWN_INPUT_TAYLOR_SQUARED
    site: ClassVar[Site] = Site.GRADIENT

    def start(self) -> Accumulator:
        return _Taylor(power=2)


class _Sums:
    """Named float64 sums that take their shape from what is first added."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def _add(self, name: str, value: Tensor) -> None:
        value = value.double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value


class _Squares(_Sums):
    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        self._add("squares", inputs.float().square().sum(0))  # (F,); vector_norm over rows takes six times as long

    def value(self, tokens: int) -> Tensor:
        return self.sums["squares"]


class _Taylor(_Sums):
    def __init__(self, power: int) -> None:
        super().__init__()
        self._power = power

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        self._add("effect", (inputs.float() * outputs.float()).abs().pow(self._power).sum(0))  # (F,)

    def value(self, tokens: int) -> Tensor:
        return self.sums["effect"]


class _Mean(_Sums):
    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        self._add("sum", inputs.sum(0, dtype=torch.float32))  # (F,)

    def value(self, tokens: int) -> Tensor:
        return self.sums["sum"] / tokens


class _Variance(_Sums):
    """The two moments are taken in float64: their difference loses the digits their squares share."""

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        exact = inputs.double()  # (T, F)
        self._add("sum", exact.sum(0))  # (F,)
        self._add("squares", exact.square().sum(0))  # (F,)

    def value(self, tokens: int) -> Tensor:
        return (self.sums["squares"] / tokens - (self.sums["sum"] / tokens).square()).clamp(min=0)


class _Fluctuation(_Sums):
    def __init__(self) -> None:
        super().__init__()
        self._windows = 0

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        activation = inputs.float()  # (T, F)
        if not len(activation):  # an expert none of the window's tokens went to
            activation = activation.new_zeros(1, activation.shape[1])
        self._add("means", activation.mean(0))  # (F,)
        mean = (self.sums["means"] / (self._windows + 1)).float()  # (F,) mean of the windows so far, this one included
        weight = self._windows / (self._windows + 1)
        self._add("fluctuation", weight * (activation - mean).square().sum(0))  # (F,)
        self._windows += 1

    def value(self, tokens: int) -> Tensor:
        return self.sums["fluctuation"] / max(self._windows - 1, 1)
