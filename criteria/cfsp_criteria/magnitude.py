"""Score channels by the norm of their down weights, without data."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from cfsp_framework import BlockStatistics, Criterion, FeedForward

from .norms import down_norm


class Magnitude(Criterion):
    """L2 norm of a channel's down weights: the weight-only baseline of wyxscir/CFSP, lib/prune.py."""

    name: ClassVar[str] = "magnitude"

    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        return down_norm(feed_forward)  # (F,)
