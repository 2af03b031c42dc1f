"""Closed-form compensation: the kept down weights are re-fitted to what the whole feed-forward gave."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cfsp_framework import BlockStatistics, Compensator, FeedForward, Statistic, Stream, Update
from cfsp_framework.linalg import least_squares, output_error, output_square
from cfsp_framework.statistics import (
    DOWN_CROSS,
    DOWN_CROSS_HELD_OUT,
    DOWN_INPUT_GRAM,
    DOWN_INPUT_GRAM_HELD_OUT,
    DOWN_INPUT_MEAN,
    DOWN_INPUT_MEAN_HELD_OUT,
    DOWN_TARGET_SQUARES,
    DOWN_TARGET_SQUARES_HELD_OUT,
)

_RAISES = 5
DAMPING = "share of the mean squared activation added for stability"


class LeastSquares(Compensator):
    """Least squares on the dense model's activations: ``W'_K = W_K + W_P G_PK (G_KK + damping)^-1``.

    Damped toward the original weights, so that a large damping is plain pruning. A block whose error on held-out
    windows does not fall is tried with ten times the damping, up to five times, and else left as plain pruning.
    """

    name: ClassVar[str] = "least-squares"
    requires: ClassVar[frozenset[Statistic]] = frozenset({DOWN_INPUT_GRAM, DOWN_INPUT_GRAM_HELD_OUT})

    damping: float = Field(default=1e-3, gt=0, description=DAMPING)

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        weight = feed_forward.down  # (D, F)
        fit, judge = _split(statistics, DOWN_INPUT_GRAM, DOWN_INPUT_GRAM_HELD_OUT)  # (F, F) each
        cross = weight.double() @ fit.double()  # (D, F): the target is the dense output
        return guarded(
            lambda damping: least_squares(weight, fit, cross, kept, damping),
            lambda down: output_error(weight, down, kept, judge),
            output_error(weight, weight[:, kept], kept, judge),
            output_square(weight, judge),
            self.damping,
        )


class LeastSquaresBias(Compensator):
    """Least squares of the centred activations, and a bias for what their means leave.

    The Gram matrix is replaced by the covariance, and the down projection's bias takes ``W mu - W'_K mu_K``. A family
    without that bias gets one: D parameters a block. FLAP's bias on top of plain least squares would count means twice.
    """

    name: ClassVar[str] = "least-squares-bias"
    requires: ClassVar[frozenset[Statistic]] = frozenset(
        {DOWN_INPUT_GRAM, DOWN_INPUT_GRAM_HELD_OUT, DOWN_INPUT_MEAN, DOWN_INPUT_MEAN_HELD_OUT}
    )

    damping: float = Field(default=1e-3, gt=0, description=DAMPING)

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        weight = feed_forward.down.double()  # (D, F)
        count, held_out = statistics.tokens, statistics.held_out_tokens
        mean, mean_held_out = (
            statistics[DOWN_INPUT_MEAN].double(),
            statistics[DOWN_INPUT_MEAN_HELD_OUT].double(),
        )  # (F,)
        gram = statistics[DOWN_INPUT_GRAM].double()  # (F, F)
        judge, judge_mean, judged = gram, mean, count
        if held_out:
            judge, judge_mean, judged = statistics[DOWN_INPUT_GRAM_HELD_OUT].double(), mean_held_out, held_out
            gram = gram - judge
            mean = (count * mean - held_out * mean_held_out) / (count - held_out)
            count -= held_out
        covariance = gram - count * torch.outer(mean, mean)  # (F, F)
        about_mean = judge - judged * (
            torch.outer(mean, judge_mean) + torch.outer(judge_mean, mean) - torch.outer(mean, mean)
        )  # (F, F): sum of (h - mean)(h - mean)^T over the held-out tokens
        cross = weight @ covariance  # (D, F)
        found = guarded(
            lambda damping: least_squares(weight, covariance, cross, kept, damping),
            lambda down: output_error(weight, down, kept, about_mean),
            output_error(weight, weight[:, kept], kept, judge),
            output_square(weight, judge),
            self.damping,
        )
        if found.down is None:
            return found
        bias = weight @ mean - found.down @ mean[kept]  # (D,)
        own = 0 if feed_forward.down_bias is None else feed_forward.down_bias.double()
        return replace(found, down_bias=own + bias)


class Procrustes(Compensator):
    """Rotate and scale the kept output: ``s Q W_K``, the closest to the dense output among rotations of the hidden space.

    Few degrees of freedom: it cannot overfit, for calibration sets too small for least squares (arXiv 2510.07782 uses
    rotations so).
    """

    name: ClassVar[str] = "procrustes"
    requires: ClassVar[frozenset[Statistic]] = frozenset({DOWN_INPUT_GRAM, DOWN_INPUT_GRAM_HELD_OUT})

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        weight = feed_forward.down.double()  # (D, F)
        fit, judge = _split(statistics, DOWN_INPUT_GRAM, DOWN_INPUT_GRAM_HELD_OUT)  # (F, F) each
        own = weight[:, kept]  # (D, K)

        def rotate(damping: float) -> Tensor:
            left, values, right = torch.linalg.svd(weight @ fit.double()[:, kept] @ own.mT)  # (D, D), (D,), (D, D)
            scale = values.sum() / output_square(own, fit[kept][:, kept])
            rotated: Tensor = scale * (left @ right) @ own  # (D, K)
            return rotated

        def error(down: Tensor) -> float:
            return output_error(weight, down, kept, judge)

        return guarded(rotate, error, error(own), output_square(weight, judge), 0.0)


class Sequential(Compensator):
    """Least squares block by block on the stream of the model pruned so far, which also makes up for earlier blocks.

    The target lies between the feed-forward's own output there (``mix = 0``) and what would restore the dense model's
    residual stream (``mix = 1``; OSSCAR, arXiv 2403.12983, aims at the dense output).
    """

    name: ClassVar[str] = "sequential"
    requires: ClassVar[frozenset[Statistic]] = frozenset(
        {
            DOWN_INPUT_GRAM,
            DOWN_INPUT_GRAM_HELD_OUT,
            DOWN_CROSS,
            DOWN_CROSS_HELD_OUT,
            DOWN_TARGET_SQUARES,
            DOWN_TARGET_SQUARES_HELD_OUT,
        }
    )

    damping: float = Field(default=1e-3, gt=0, description=DAMPING)
    mix: float = Field(default=0.7, ge=0, le=1, description="0: the block's own output; 1: the dense residual stream")

    def stream(self) -> Stream:
        return Stream.PRUNED

    def target_mix(self) -> float:
        return self.mix

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        weight = feed_forward.down  # (D, F)
        fit, judge = _split(statistics, DOWN_INPUT_GRAM, DOWN_INPUT_GRAM_HELD_OUT)  # (F, F) each
        cross, judge_cross = _split(statistics, DOWN_CROSS, DOWN_CROSS_HELD_OUT)  # (D, F) each
        whole = _split(statistics, DOWN_TARGET_SQUARES, DOWN_TARGET_SQUARES_HELD_OUT)[1].item()

        def error(down: Tensor) -> float:
            return output_error(weight, down, kept, judge, judge_cross) + whole

        return guarded(
            lambda damping: least_squares(weight, fit, cross, kept, damping),
            error,
            error(weight[:, kept]),
            whole,
            self.damping,
        )


def guarded(
    fit: Callable[[float], Tensor], error: Callable[[Tensor], float], plain: float, whole: float, damping: float
) -> Update:
    """The first fit whose held-out error is below ``plain``, that of plain pruning; errors relative to ``whole``."""
    whole = whole or 1.0  # a feed-forward that outputs nothing has nothing to lose
    refused = plain
    for attempt in range(_RAISES + 1 if damping else 1):
        try:
            down = fit(damping * 10**attempt)  # (D, K)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not positive definite
            continue
        found = error(down)
        if found < plain:
            return Update(down=down, error_plain=plain / whole, error=found / whole)
        refused = found if math.isfinite(found) else refused
    return Update(error_plain=plain / whole, error=refused / whole)


def _split(statistics: BlockStatistics, all_tokens: Statistic, held_out: Statistic) -> tuple[Tensor, Tensor]:
    """What to fit on and what to judge by: without held-out windows both are everything."""
    if statistics.held_out_tokens == 0:
        return statistics[all_tokens], statistics[all_tokens]
    return statistics[all_tokens] - statistics[held_out], statistics[held_out]
