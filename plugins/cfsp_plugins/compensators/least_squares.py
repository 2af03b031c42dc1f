"""Re-fit the kept down weights to the output of the whole feed-forward."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from cfsp_framework import BlockStatistics, Compensator, FeedForward, Statistic, Update
from cfsp_framework.linalg import least_squares, output_error, output_square
from cfsp_framework.statistics import DOWN_INPUT_GRAM_RELATIVE

from .held_out_guard import DAMPING, guarded, split


class LeastSquares(Compensator):
    """Least squares on the dense model's activations: ``W'_K = W_K + W_P G_PK (G_KK + damping)^-1``.

    Damped toward the original weights, so that a large damping is plain pruning. A block whose error on held-out
    windows does not fall is tried with ten times the damping, up to five times, and else left as plain pruning.
    """

    name: ClassVar[str] = "least-squares"
    requires: ClassVar[frozenset[Statistic]] = frozenset(
        {DOWN_INPUT_GRAM_RELATIVE, DOWN_INPUT_GRAM_RELATIVE.held_out()}
    )

    damping: float = Field(default=1e-3, gt=0, description=DAMPING)

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        weight = feed_forward.down  # (D, F)
        fit, judge = split(statistics, DOWN_INPUT_GRAM_RELATIVE)  # (F, F) each
        cross = weight.double() @ fit.double()  # (D, F): the target is the dense output
        return guarded(
            lambda damping: least_squares(weight, fit, cross, kept, damping),
            lambda down: output_error(weight, down, kept, judge),
            output_error(weight, weight[:, kept], kept, judge),
            output_square(weight, judge),
            self.damping,
        )
