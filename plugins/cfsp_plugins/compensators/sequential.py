"""Re-fit the kept down weights on the hidden states of the pruned model."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from cfsp_framework import BlockStatistics, Compensator, FeedForward, Statistic, Stream, Update
from cfsp_framework.linalg import least_squares, output_error
from cfsp_framework.statistics import (
    DOWN_CROSS_RELATIVE,
    DOWN_INPUT_GRAM_RELATIVE,
    DOWN_TARGET_SQUARES_RELATIVE,
)

from .held_out_guard import DAMPING, guarded, split


class Sequential(Compensator):
    """Least squares block by block on the hidden states of the pruned model, which also compensates for earlier blocks.

    The target lies between the feed-forward's own output there (``mix = 0``) and what would restore the dense model's
    residual stream (``mix = 1``; OSSCAR, arXiv 2403.12983, aims at the dense output).
    """

    name: ClassVar[str] = "sequential"
    requires: ClassVar[frozenset[Statistic]] = frozenset(
        statistic
        for total in (DOWN_INPUT_GRAM_RELATIVE, DOWN_CROSS_RELATIVE, DOWN_TARGET_SQUARES_RELATIVE)
        for statistic in (total, total.held_out())
    )

    damping: float = Field(default=1e-3, gt=0, description=DAMPING)
    mix: float = Field(default=0.7, ge=0, le=1, description="0: the block's own output; 1: the dense residual stream")

    def stream(self) -> Stream:
        return Stream.PRUNED

    def target_mix(self) -> float:
        return self.mix

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        weight = feed_forward.down  # (D, F)
        fit, judge = split(statistics, DOWN_INPUT_GRAM_RELATIVE)  # (F, F) each
        cross, judge_cross = split(statistics, DOWN_CROSS_RELATIVE)  # (D, F) each
        scale = split(statistics, DOWN_TARGET_SQUARES_RELATIVE)[1].item()

        def error(down: Tensor) -> float:
            return output_error(weight, down, kept, judge, judge_cross) + scale

        return guarded(
            lambda damping: least_squares(weight, fit, cross, kept, damping),
            error,
            error(weight[:, kept]),
            scale,
            self.damping,
        )
