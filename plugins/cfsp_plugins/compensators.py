"""What changes in the kept weights once the channels are chosen."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework import BlockStatistics, Compensator, FeedForward, Statistic, Update
from cfsp_framework.statistics import DOWN_INPUT_MEAN


class NoCompensation(Compensator):
    """Leave the kept weights as they are."""

    name: ClassVar[str] = "none"

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        return Update()


class Bias(Compensator):
    """Add what the removed channels output on average to the down projection's bias (FLAP, arXiv 2312.11983).

    That is the best constant correction of the output. A family without that bias gets one: D parameters a block.
    """

    name: ClassVar[str] = "bias"
    requires: ClassVar[frozenset[Statistic]] = frozenset({DOWN_INPUT_MEAN})

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        removed = torch.ones(feed_forward.width, dtype=torch.bool, device=kept.device)
        removed[kept] = False
        mean = statistics[DOWN_INPUT_MEAN] * removed  # (F,)
        lost = feed_forward.down.float() @ mean  # (D,)
        return Update(down_bias=lost if feed_forward.down_bias is None else feed_forward.down_bias.float() + lost)
