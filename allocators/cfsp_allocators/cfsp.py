"""Allocate by CFSP's coarse importance: blocks that change the residual stream more keep more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import ClassVar, Literal

from pydantic import Field

from cfsp_framework import Allocator, BlockSummary, Budget, Statistic
from cfsp_framework.statistics import ANGULAR_DISTANCE, COSINE_DISTANCE, MAE_DISTANCE, MSE_DISTANCE

Distance = Literal["angular", "cosine", "mse", "mae", "uniform"]
_STATISTIC: dict[Distance, Statistic] = {
    "angular": ANGULAR_DISTANCE,
    "cosine": COSINE_DISTANCE,
    "mse": MSE_DISTANCE,
    "mae": MAE_DISTANCE,
}
RELEASED_TOKENS = 128 * 1024


class Cfsp(Allocator):
    """Share kept in proportion to ``z = sigmoid(a * temperature * (S - mean S))``, ``S`` a block's distance.

    The published code (wyxscir/CFSP, lib/prune.py) sums the distances over all tokens and divides by 1e4, so its
    allocation changes with the size of the calibration set; here the distance is a mean per token and the temperature
    explicit, by default that of the released code at its 128 x 1024 tokens. If the largest share would reach 1, the
    spread around the mean is shrunk until the largest is ``(1 - ratio) + ratio / 1.05``.
    """

    name: ClassVar[str] = "cfsp"

    distance: Distance = Field(
        default="angular", description="between a block's input and output; uniform: the same for all"
    )
    a: float = Field(default=1.0, description="intensity: how far shares spread around their mean")
    temperature: float | None = Field(
        default=None, description=f"default: {RELEASED_TOKENS / 1e4}; with released: calibration tokens / 1e4"
    )
    released: bool = Field(
        default=False,
        description="temperature and channel count as in the authors' code (docs/method.md), for comparison",
    )

    def required(self) -> frozenset[Statistic]:
        return frozenset() if self.distance == "uniform" else frozenset({_STATISTIC[self.distance]})

    def importance(self, summaries: Sequence[BlockSummary]) -> list[float]:
        if self.distance == "uniform":
            return [0.0] * len(summaries)
        return [summary.statistics[_STATISTIC[self.distance]] for summary in summaries]

    def allocate(self, summaries: Sequence[BlockSummary], budget: Budget) -> list[float]:
        if budget.ratio == 0:
            return [1.0] * len(summaries)
        shares = spread(self.importance(summaries), self.a * self._temperature(summaries), budget.ratio)
        if self.released and budget.round_to == 1:  # its threshold index is int(F * share), compared with >=
            return [
                min(int(summary.width * share) + 1, summary.width) / summary.width
                for summary, share in zip(summaries, shares, strict=True)
            ]
        return shares

    def _temperature(self, summaries: Sequence[BlockSummary]) -> float:
        if self.temperature is not None:
            return self.temperature
        return (summaries[0].tokens if self.released else RELEASED_TOKENS) / 1e4


def spread(importance: Sequence[float], temperature: float, ratio: float) -> list[float]:
    """Return shares in (0, 1) with mean ``1 - ratio``, increasing in ``importance``; ``ratio`` in (0, 1)."""
    centre = fmean(importance)
    z = [_sigmoid(temperature * (value - centre)) for value in importance]
    mean, largest = fmean(z), max(z)
    if largest > mean and largest / mean * (1 - ratio) >= 1:
        shrink = mean * (1 / (1 - ratio) - 1) / (1.05 * (largest - mean))
        z = [mean + (value - mean) * shrink for value in z]
        mean = fmean(z)
    return [value / mean * (1 - ratio) for value in z]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(min(-x, 700)))
