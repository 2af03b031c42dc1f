"""Allocate by outliers: blocks with more outlying channels keep more (OWL)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import ClassVar

from pydantic import Field

from cfsp_framework import Allocator, BlockSummary, Budget


class Owl(Allocator):
    """Share kept ``1 - ratio + u - mean(u)``, ``u`` the rescaled share of outliers of each block (arXiv 2310.05175).

    OWL counts single weights times activations that exceed ``outlier`` times their block's mean; structured pruning
    has one score for each channel, so channels are counted, by the chosen criterion's scores. Use it with criteria whose
    scores are magnitudes (wanda-sp, wanda-l2, flap); the ranks of obs have no outliers.
    """

    name: ClassVar[str] = "owl"

    outlier: float = Field(default=5.0, gt=0, description="how many times the mean score makes an outlier")
    spread: float = Field(default=0.08, ge=0, lt=0.5, description="shares differ by at most twice this (lambda)")

    def importance(self, summaries: Sequence[BlockSummary]) -> list[float]:
        return [(s.scores > self.outlier * s.scores.mean()).float().mean().item() for s in summaries]

    def allocate(self, summaries: Sequence[BlockSummary], budget: Budget) -> list[float]:
        shares = self.importance(summaries)
        least, most = min(shares), max(shares)
        spread = min(self.spread, budget.ratio / 2, 0.49 * (1 - budget.ratio))
        raised = [2 * spread * (share - least) / (most - least) if most > least else 0.0 for share in shares]
        return [1 - budget.ratio + value - fmean(raised) for value in raised]
