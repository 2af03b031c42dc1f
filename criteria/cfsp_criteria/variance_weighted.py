"""Score channels by the variance of their activation times weight and activation norms."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from cfsp_framework import BlockStatistics, Criterion, FeedForward, Statistic
from cfsp_framework.statistics import DOWN_INPUT_SQUARES, DOWN_INPUT_VARIANCE

from .norms import activation_norm, down_norm


class VarianceWeighted(Criterion):
    """Variance of the activation times the norm of its down weights times its own norm (RCPU, arXiv 2510.07782)."""

    name: ClassVar[str] = "variance-weighted"
    requires: ClassVar[frozenset[Statistic]] = frozenset({DOWN_INPUT_VARIANCE, DOWN_INPUT_SQUARES})

    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        return statistics[DOWN_INPUT_VARIANCE] * down_norm(feed_forward) * activation_norm(statistics)  # (F,)
