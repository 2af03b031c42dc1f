"""Allocate by depth: deeper blocks lose more, along a logarithm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import ClassVar

from pydantic import Field

from cfsp_framework import Allocator, BlockSummary, Budget


class LogIncrease(Allocator):
    """Removed share ``p0 + spread * log(i + 1) / log(L)`` of block i of L, with the ratio as its mean (SlimGPT).

    It needs no data. SlimGPT's own spread (arXiv 2412.18110) is not known here; it is limited so that every share stays
    between 0 and 1.
    """

    name: ClassVar[str] = "log-increase"

    spread: float = Field(
        default=0.2, ge=0, le=1, description="additional share that the last block loses beyond the first"
    )

    def allocate(self, summaries: Sequence[BlockSummary], budget: Budget) -> list[float]:
        count = len(summaries)
        depth = [math.log(block + 1) / math.log(max(count, 2)) for block in range(count)]
        centre = fmean(depth)
        least, most = centre, max(max(depth) - centre, 1e-12)
        spread = min(self.spread, budget.ratio / least if least else 0.0, 0.99 * (1 - budget.ratio) / most)
        return [1 - budget.ratio - spread * (value - centre) for value in depth]
