"""Allocate by a softmax of block influence: blocks that turn the residual stream least lose most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from cfsp_framework import Allocator, BlockSummary, Budget, Statistic
from cfsp_framework.statistics import COSINE_DISTANCE


class SoftmaxBi(Allocator):
    """Removed share ``L * ratio * softmax(-S / temperature)``, S one minus the mean cosine (MoDeGPT, arXiv 2408.09632).

    Shares above ``largest`` are set to it and the remainder is spread over the others in proportion. MoDeGPT's own
    temperature is not known here; re-implementations use 0.1 and 0.015.
    """

    name: ClassVar[str] = "softmax-bi"
    requires: ClassVar[frozenset[Statistic]] = frozenset({COSINE_DISTANCE})

    temperature: float = Field(default=0.1, gt=0, description="the smaller, the more blocks differ")
    largest: float = Field(
        default=0.8, gt=0, lt=1, description="largest share a block may lose, if the ratio allows it"
    )

    def importance(self, summaries: Sequence[BlockSummary]) -> list[float]:
        return [summary.statistics[COSINE_DISTANCE] for summary in summaries]

    def allocate(self, summaries: Sequence[BlockSummary], budget: Budget) -> list[float]:
        influence = self.importance(summaries)
        exponents = [-value / self.temperature for value in influence]
        removed = capped(exponents, budget.ratio * len(exponents), max(self.largest, (1 + budget.ratio) / 2))
        return [1 - share for share in removed]


def capped(exponents: Sequence[float], total: float, largest: float) -> list[float]:
    """Split ``total`` in proportion to ``exp(exponents)``, none above ``largest``; needs ``total < largest * len(exponents)``."""
    full: set[int] = set()
    while True:
        # Relative to the greatest that is not full, so that not all weights underflow to 0.
        greatest = max(exponent for block, exponent in enumerate(exponents) if block not in full)
        weights = [0.0 if block in full else math.exp(value - greatest) for block, value in enumerate(exponents)]
        rest = total - largest * len(full)
        shares = [largest if block in full else rest * weight / sum(weights) for block, weight in enumerate(weights)]
        over = {block for block, share in enumerate(shares) if share > largest}
        if not over:
            return shares
        full |= over
