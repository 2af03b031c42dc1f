"""Score channels at random: the control that every criterion has to beat."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework import BlockStatistics, Criterion, FeedForward


class Random(Criterion):
    """Uniform random scores, drawn anew for every block from the run's seed."""

    name: ClassVar[str] = "random"

    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        return torch.rand(feed_forward.width, generator=feed_forward.generator())  # (F,)
