"""Score channels by greedy removal with re-fitting (optimal brain surgeon)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cfsp_framework import BlockStatistics, Criterion, FeedForward, Statistic
from cfsp_framework.linalg import greedy_removal
from cfsp_framework.statistics import DOWN_INPUT_GRAM_RELATIVE


class Obs(Criterion):
    """Order of removal by the optimal brain surgeon, in batches: a channel's score is the step that removes it.

    Every step re-fits the remaining channels, so use it with a least-squares compensator (SlimGPT, arXiv 2412.18110).
    The order is nested: one pass serves every ratio. Each token counts relative to its residual stream, so that massive
    activations do not decide alone.
    """

    name: ClassVar[str] = "obs"
    requires: ClassVar[frozenset[Statistic]] = frozenset({DOWN_INPUT_GRAM_RELATIVE})

    damping: float = Field(default=1e-2, gt=0, description="share of the mean squared activation added for stability")
    batch: int | None = Field(default=None, ge=1, description="channels removed a step; default: F / 128")

    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        batch = self.batch or max(1, feed_forward.width // 128)
        order, _ = greedy_removal(feed_forward.down, statistics[DOWN_INPUT_GRAM_RELATIVE], self.damping, batch)  # (F,)
        return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).float()
