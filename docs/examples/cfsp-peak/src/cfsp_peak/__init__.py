"""The statistic `peak` for cfsp-framework, the largest activation of every channel, and a criterion that reads it."""

from __future__ import annotations

from typing import ClassVar

from cfsp_framework import (
    Accumulator,
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
"""The version of the plugin API this is written for."""

PEAK = Statistic("peak", shape="(F,)", summary="largest |h| over tokens", unseen=1.0)
"""Other packages import it to require it. An expert that saw no token is judged by its weights alone: `unseen`."""


class PeakCollector(Collector):
    """Largest absolute activation of every channel."""

    name: ClassVar[str] = "peak"
    provides: ClassVar[Statistic] = PEAK
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    ordered: ClassVar[bool] = True  # a maximum is no sum: windows cannot be shared out over processes

    def start(self) -> Accumulator:
        return _Peak()


class _Peak:
    """The maximum so far, ``(F,)`` float32."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.peak: Tensor | None = None

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        if self.peak is None:
            self.peak = inputs.new_zeros(inputs.shape[1]).float()  # (F,)
        if len(inputs):  # (T, F); an expert may have got none of the window's tokens
            self.peak = self.peak.maximum(inputs.abs().amax(0).float())

    def value(self, tokens: int) -> Tensor:
        assert self.peak is not None  # there is at least one update
        return self.peak


class PeakCriterion(Criterion):
    """The most that removing a channel can change the output by, on any token that was seen.

    That is the norm of its down weights times its largest activation. Rare but large activations count here as much as
    frequent ones, which sums of squares hide.
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
