"""Score channels by the first-order change of the loss if they were zero."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from cfsp_framework import BlockStatistics, Criterion, FeedForward, Statistic
from cfsp_framework.statistics import DOWN_INPUT_TAYLOR, DOWN_INPUT_TAYLOR_SQUARED


class Taylor(Criterion):
    """Sum over tokens of ``|h dLoss/dh|``, or of its square, with the next-token loss (LLM-Pruner, arXiv 2305.11627).

    Needs one backward pass through the whole model, so the model has to fit in memory with its activations.
    """

    name: ClassVar[str] = "taylor"

    squared: bool = Field(default=False, description="sum squares, a diagonal Fisher estimate, instead of magnitudes")

    def required(self) -> frozenset[Statistic]:
        return frozenset({self._effect})

    @property
    def _effect(self) -> Statistic:
        return DOWN_INPUT_TAYLOR_SQUARED if self.squared else DOWN_INPUT_TAYLOR

    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        return statistics[self._effect]  # (F,)
