"""Magnitude: the norm of the down weights, without any data."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework import BlockStatistics, Criterion, FeedForward


class Magnitude(Criterion):
    """L2 norm of a channel's down weights: the weight-only baseline of wyxscir/CFSP, lib/prune.py."""

    name: ClassVar[str] = "magnitude"

    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        return torch.linalg.vector_norm(feed_forward.down, dim=0, dtype=torch.float32)  # (F,)
