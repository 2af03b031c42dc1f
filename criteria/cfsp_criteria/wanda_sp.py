"""Score channels by Wanda's weight times activation, averaged over a channel's down weights."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from cfsp_framework import BlockStatistics, Criterion, FeedForward, Statistic
from cfsp_framework.statistics import DOWN_INPUT_SQUARES

from .norms import activation_norm


class WandaSp(Criterion):
    """Mean absolute down weight of a channel times its activation norm.

    The structured form of Wanda (arXiv 2306.11695) as in CASIA-LMC-Lab/FLAP and wyxscir/CFSP, lib/prune.py.
    """

    name: ClassVar[str] = "wanda-sp"
    requires: ClassVar[frozenset[Statistic]] = frozenset({DOWN_INPUT_SQUARES})

    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        return feed_forward.down.abs().float().mean(0) * activation_norm(statistics)  # (F,)
