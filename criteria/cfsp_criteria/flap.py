"""Score channels by the variance of their activation times their down weights (FLAP's WIFV, arXiv 2312.11983)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from cfsp_framework import BlockStatistics, Criterion, FeedForward, Statistic
from cfsp_framework.statistics import DOWN_INPUT_FLUCTUATION, DOWN_INPUT_VARIANCE


class Flap(Criterion):
    """Variance of the activation times the squared norm of its down weights.

    This is the exact squared output error per token of removing the channel alone, after the best constant correction;
    use it with the compensator ``bias``. ``released`` replaces the variance by the running quantity of the released code
    (CASIA-LMC-Lab/FLAP, lib/layerwrapper.py).
    """

    name: ClassVar[str] = "flap"

    released: bool = Field(default=False, description="use the released code's fluctuation in place of the variance")

    def required(self) -> frozenset[Statistic]:
        return frozenset({self._spread})

    @property
    def _spread(self) -> Statistic:
        return DOWN_INPUT_FLUCTUATION if self.released else DOWN_INPUT_VARIANCE

    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        return statistics[self._spread] * feed_forward.down.float().square().sum(0)  # (F,)
