"""Leave the kept weights, or correct the output by a constant."""

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
    """Add the removed channels' mean output to the down projection's bias (FLAP, arXiv 2312.11983).

    This is the best constant correction of the output. A family without that bias gets one: D parameters a block.
    """

    name: ClassVar[str] = "bias"
    requires: ClassVar[frozenset[Statistic]] = frozenset({DOWN_INPUT_MEAN})

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        removed = torch.ones(feed_forward.width, dtype=torch.bool, device=kept.device)
        removed[kept] = False
        mean = statistics[DOWN_INPUT_MEAN] * removed  # (F,)
        correction = feed_forward.down.float() @ mean  # (D,)
        bias = feed_forward.down_bias
        return Update(down_bias=correction if bias is None else bias.float() + correction)
