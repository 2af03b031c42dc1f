"""Score channels by ridge leverage: the part of their activation that the others cannot reproduce."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from cfsp_framework import BlockStatistics, Criterion, FeedForward, Statistic
from cfsp_framework.linalg import damped_inverse
from cfsp_framework.statistics import DOWN_INPUT_GRAM_RELATIVE


class Leverage(Criterion):
    """Diagonal of ``G (G + damping)^-1`` (MoDeGPT, arXiv 2408.09632): 1 if no other channel carries the same."""

    name: ClassVar[str] = "leverage"
    requires: ClassVar[frozenset[Statistic]] = frozenset({DOWN_INPUT_GRAM_RELATIVE})

    damping: float = Field(default=1e-2, gt=0, description="share of the mean squared activation added to the diagonal")

    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        gram = statistics[DOWN_INPUT_GRAM_RELATIVE].double()  # (F, F)
        return (damped_inverse(gram, self.damping) * gram).sum(1)  # (F,)
