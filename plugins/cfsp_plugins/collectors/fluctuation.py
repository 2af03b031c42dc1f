"""Collect the running fluctuation of FLAP's released code."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from cfsp_framework import AccumulatorFactory, Collector, Site, Statistic
from cfsp_framework.statistics import DOWN_INPUT_FLUCTUATION

from .sums import Sums


class _Fluctuation(Sums):
    def __init__(self) -> None:
        super().__init__()
        self._windows = 0

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        activation = inputs.float()  # (T, F)
        if not len(activation):  # an expert that no token of the window was routed to
            activation = activation.new_zeros(1, activation.shape[1])
        self.add("means", activation.mean(0))  # (F,)
        mean = (self.sums["means"] / (self._windows + 1)).float()  # (F,): of all windows up to this one
        weight = self._windows / (self._windows + 1)
        self.add("fluctuation", weight * (activation - mean).square().sum(0))  # (F,)
        self._windows += 1

    def value(self, tokens: int) -> Tensor:
        return self.sums["fluctuation"] / max(self._windows - 1, 1)


class DownInputFluctuation(Collector):
    """Running quantity that FLAP's released code uses as a variance; it depends on the order of the windows.

    With N windows, ``1/(N-1) * sum_s s/(s+1) * sum_t (h[s,t] - mu_s)^2``, ``mu_s`` the mean of windows 0..s
    (CASIA-LMC-Lab/FLAP, lib/layerwrapper.py: its old mean is the same tensor as its new one, and it skips window 0).
    """

    name: ClassVar[str] = "down-input-fluctuation"
    provides: ClassVar[Statistic] = DOWN_INPUT_FLUCTUATION
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    ordered: ClassVar[bool] = True
    accumulator: ClassVar[AccumulatorFactory] = _Fluctuation
