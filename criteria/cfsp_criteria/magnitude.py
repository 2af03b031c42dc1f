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
        norm: Tensor = torch.linalg.vector_norm(feed_forward.down.float(), dim=0)  # (F,)
        return norm
