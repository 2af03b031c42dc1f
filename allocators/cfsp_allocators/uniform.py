"""Allocate the same share to every block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from cfsp_framework import Allocator, BlockSummary, Budget


class Uniform(Allocator):
    """Keep the same share of every block; it needs no data."""

    name: ClassVar[str] = "uniform"

    released: bool = Field(
        default=False, description="keep F - int(F * ratio) channels, as the released magnitude baseline"
    )

    def allocate(self, summaries: Sequence[BlockSummary], budget: Budget) -> list[float]:
        if self.released:
            return [(summary.width - int(summary.width * budget.ratio)) / summary.width for summary in summaries]
        return [1 - budget.ratio] * len(summaries)
