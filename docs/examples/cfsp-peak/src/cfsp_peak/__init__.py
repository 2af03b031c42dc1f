"""The statistic `peak` for cfsp-framework, the largest activation of each channel, and a criterion that reads it."""

from __future__ import annotations

from typing import ClassVar

from cfsp_framework import (
    AccumulatorFactory,
    BlockStatistics,
    Collector,
    Criterion,
    FeedForward,
    Site,
    Statistic,
    hookimpl,
)
from pydantic import Field
from torch import Tensor

cfsp_api = 1
"""Version of the plugin API that this module is written for."""

PEAK = Statistic("peak", shape="(F,)", summary="largest |h| over tokens", unseen=1.0)
"""Other packages import it to require it. With `unseen=1`, the weights alone decide in an expert without tokens."""


class _Peak:
    """The maximum so far, ``(F,)`` float32."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.peak: Tensor | None = None

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        if self.peak is None:
            self.peak = inputs.new_zeros(inputs.shape[1]).float()  # (F,)
        if len(inputs):  # (T, F); an expert may get no token of the window
            self.peak = self.peak.maximum(inputs.abs().amax(0).float())

    def value(self, tokens: int) -> Tensor:
        assert self.peak is not None  # there is at least one update
        return self.peak


class PeakCollector(Collector):
    """Largest absolute activation of every channel."""

    name: ClassVar[str] = "peak"
    provides: ClassVar[Statistic] = PEAK
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    ordered: ClassVar[bool] = True  # a maximum does not add up, so that processes cannot share windows
    accumulator: ClassVar[AccumulatorFactory] = _Peak


class PeakCriterion(Criterion):
    """Largest change of the output that removing a channel causes on any calibration token.

    It is the norm of the channel's down weights times its largest activation. Rare large activations, which sums of
    squares hide, count as much as frequent ones.
    """

    name: ClassVar[str] = "peak"
    requires: ClassVar[frozenset[Statistic]] = frozenset({PEAK})

    exponent: float = Field(default=1.0, ge=0, description="of the peak; 0 leaves it out")

    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        norms = feed_forward.down.float().square().sum(0).sqrt()  # (F,)
        return statistics[PEAK] ** self.exponent * norms


@hookimpl
def cfsp_collectors() -> list[type[Collector]]:
    return [PeakCollector]


@hookimpl
def cfsp_criteria() -> list[type[Criterion]]:
    return [PeakCriterion]
