"""Allocate by one threshold over the standardised scores of all blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework import Allocator, BlockSummary, Budget


class GlobalZscore(Allocator):
    """Keep the channels with the highest z-scores of all blocks, as Wanda-SP and FLAP do (arXiv 2312.11983).

    Scores are standardised inside their block (divisor F - 1); a block whose scores are all equal gets 0 everywhere.
    """

    name: ClassVar[str] = "global-zscore"

    def allocate(self, summaries: Sequence[BlockSummary], budget: Budget) -> list[float]:
        z = torch.cat([_standardised(summary.scores) for summary in summaries])  # (sum F,)
        kept = torch.zeros_like(z, dtype=torch.bool)
        kept[z.argsort(descending=True, stable=True)[: int(len(z) * (1 - budget.ratio))]] = True
        counts = [int(part.sum()) for part in kept.split([summary.width for summary in summaries])]
        return [max(count, 1) / summary.width for count, summary in zip(counts, summaries, strict=True)]


def _standardised(scores: Tensor) -> Tensor:
    if scores.amin() == scores.amax():  # compared exactly: the mean of equal scores may round and leave a deviation
        return torch.zeros_like(scores)
    return (scores - scores.mean()) / scores.std()  # (F,)
