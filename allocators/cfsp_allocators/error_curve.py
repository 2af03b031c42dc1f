"""Allocate along measured removal-error curves: remove channels where the error grows least."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from statistics import median
from typing import ClassVar, Literal

from pydantic import Field

from cfsp_framework import Allocator, BlockSummary, Budget


class ErrorCurve(Allocator):
    """Minimise the sum of all blocks' removal errors at multiples of the rounding, each times its block's sensitivity.

    A token's error is relative to its residual stream, and the sensitivity is what a unit of that error in one block's
    output was measured to add to the loss: the sum estimates the loss of the whole cut. Curves are replaced by their
    lower convex hulls, on which taking the cheapest step repeatedly is exact.
    """

    name: ClassVar[str] = "error-curve"

    compensated: bool = Field(default=True, description="curves with the kept weights re-fitted, or as they are")
    measured: bool = Field(default=True, description="measure each block's sensitivity; else all count the same")

    def curve(self) -> Literal["plain", "compensated"]:
        return "compensated" if self.compensated else "plain"

    def sensitivity(self) -> bool:
        return self.measured

    def allocate(self, summaries: Sequence[BlockSummary], budget: Budget) -> list[float]:
        widths = [summary.width for summary in summaries]
        weights = _weights([summary.sensitivity for summary in summaries])
        hulls = [
            _hull(_points(summary, weight, budget.round_to)) for summary, weight in zip(summaries, weights, strict=True)
        ]
        removed = cheapest(hulls, round(budget.ratio * sum(widths)))
        return [(width - count) / width for width, count in zip(widths, removed, strict=True)]


Point = tuple[int, float]
"""Channels removed from a block, and the error they cause."""


def cheapest(hulls: Sequence[Sequence[Point]], total: int) -> list[int]:
    """Return the channels to remove from each block, about ``total`` together, along the hulls' cheapest slopes."""
    removed = [0] * len(hulls)
    heap = [(_slope(hull[0], hull[1]), block, 1) for block, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(heap)
    left = total
    while heap and left > 0:
        _, block, position = heapq.heappop(heap)
        hull = hulls[block]
        step = min(hull[position][0] - hull[position - 1][0], left)
        removed[block] += step
        left -= step
        if position + 1 < len(hull):
            heapq.heappush(heap, (_slope(hull[position], hull[position + 1]), block, position + 1))
    return removed


def _weights(sensitivities: Sequence[float | None]) -> list[float]:
    """Return a positive weight for each block: its sensitivity, not below a tenth of the median; that if unknown."""
    typical = median([value for value in sensitivities if value is not None] or [1.0])
    return [max(typical if value is None else value, typical / 10) or 1.0 for value in sensitivities]


def _points(summary: BlockSummary, weight: float, step: int) -> list[Point]:
    """Return the weighted curve at the widths the rounding allows, keeping at least one multiple."""
    assert summary.curve is not None, "the host computes the curve this allocator asks for"
    kept = [summary.width, *range(summary.width - 1 - (summary.width - 1) % step, 0, -step)]
    return [(summary.width - width, weight * summary.curve[summary.width - width].item()) for width in kept]


def _hull(points: Sequence[Point]) -> list[Point]:
    """Return the lower convex hull, from left to right."""
    hull: list[Point] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(left: Point, right: Point) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
