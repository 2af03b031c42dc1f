"""Score channels by the output error of removing them alone: Wanda with the Euclidean norm."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from cfsp_framework import BlockStatistics, Criterion, FeedForward, Statistic
from cfsp_framework.statistics import DOWN_INPUT_SQUARES

from .norms import activation_norm, down_norm


class WandaL2(Criterion):
    """L2 norm of a channel's down weights times its activation norm.

    Its square, times the tokens, is exactly the squared error of the feed-forward's output when that channel alone is
    removed and nothing else changes.
    """

    name: ClassVar[str] = "wanda-l2"
    requires: ClassVar[frozenset[Statistic]] = frozenset({DOWN_INPUT_SQUARES})

    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        return down_norm(feed_forward) * activation_norm(statistics)  # (F,)
