"""Wanda with the Euclidean norm: the output error of removing one channel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework import BlockStatistics, Criterion, FeedForward, Statistic
from cfsp_framework.statistics import DOWN_INPUT_SQUARES


class WandaL2(Criterion):
    """L2 norm of a channel's down weights times its activation norm.

    Its square, times the tokens, is exactly the squared error of the feed-forward's output when that channel alone is
    removed and nothing else changes.
    """

    name: ClassVar[str] = "wanda-l2"
    requires: ClassVar[frozenset[Statistic]] = frozenset({DOWN_INPUT_SQUARES})

    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        activation = (statistics[DOWN_INPUT_SQUARES] / statistics.tokens).sqrt()  # (F,)
        weight: Tensor = torch.linalg.vector_norm(feed_forward.down.float(), dim=0)  # (F,)
        return weight * activation
