"""Variance times weight and activation norms."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework import BlockStatistics, Criterion, FeedForward, Statistic
from cfsp_framework.statistics import DOWN_INPUT_SQUARES, DOWN_INPUT_VARIANCE


class VarianceWeighted(Criterion):
    """Variance of the activation times the norm of its down weights times its own norm (RCPU, arXiv 2510.07782)."""

    name: ClassVar[str] = "variance-weighted"
    requires: ClassVar[frozenset[Statistic]] = frozenset({DOWN_INPUT_VARIANCE, DOWN_INPUT_SQUARES})

    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        activation = (statistics[DOWN_INPUT_SQUARES] / statistics.tokens).sqrt()  # (F,)
        weight: Tensor = torch.linalg.vector_norm(feed_forward.down.float(), dim=0)  # (F,)
        return statistics[DOWN_INPUT_VARIANCE] * weight * activation
