"""Closed-form compensation: the kept down weights are re-fitted to what the whole feed-forward gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from cfsp_framework import BlockStatistics, Compensator, FeedForward, Statistic, Stream, Update
from cfsp_framework.algebra import least_squares, output_error
from cfsp_framework.statistics import DOWN_CROSS, DOWN_CROSS_HELD_OUT, DOWN_INPUT_GRAM, DOWN_INPUT_GRAM_HELD_OUT

_RAISES = 5


class LeastSquares(Compensator):
    """Least squares on the dense model's activations: ``W'_K = W_K + W_P G_PK (G_KK + damping)^-1``.

    Damped toward the original weights, so that a large damping is plain pruning. A block whose error on held-out
    windows does not fall is tried with ten times the damping, up to five times, and else left as plain pruning.
    """

    name: ClassVar[str] = "least-squares"
    requires: ClassVar[frozenset[Statistic]] = frozenset({DOWN_INPUT_GRAM, DOWN_INPUT_GRAM_HELD_OUT})

    damping: float = Field(default=1e-3, gt=0, description="share of the mean squared activation added for stability")

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        held_out = statistics[DOWN_INPUT_GRAM_HELD_OUT]  # (F, F)
        fitted = statistics[DOWN_INPUT_GRAM] - held_out  # (F, F)
        weight = feed_forward.down  # (D, F)
        cross = weight.double() @ fitted.double()  # (D, F): the target is the dense output

        def error(down: Tensor) -> float:
            return output_error(weight, down, kept, held_out if held_out.any() else fitted)

        whole = output_error(weight, weight[:, :0], kept[:0], held_out if held_out.any() else fitted)
        return guarded(
            lambda damping: least_squares(weight, fitted, cross, kept, damping),
            error,
            weight[:, kept],
            whole,
            self.damping,
        )


class Sequential(Compensator):
    """Least squares block by block on the stream of the model pruned so far, which also makes up for earlier blocks.

    The target lies between the feed-forward's own output there (``mix = 0``) and what would restore the dense model's
    residual stream (``mix = 1``, OSSCAR's and SparseGPT-like asymmetric targets, arXiv 2403.12983).
    """

    name: ClassVar[str] = "sequential"
    requires: ClassVar[frozenset[Statistic]] = frozenset(
        {DOWN_INPUT_GRAM, DOWN_INPUT_GRAM_HELD_OUT, DOWN_CROSS, DOWN_CROSS_HELD_OUT}
    )

    damping: float = Field(default=1e-3, gt=0, description="share of the mean squared activation added for stability")
    mix: float = Field(default=0.7, ge=0, le=1, description="0: the block's own output; 1: the dense residual stream")

    def stream(self) -> Stream:
        return Stream.PRUNED

    def target_mix(self) -> float:
        return self.mix

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        held_out, held_out_cross = statistics[DOWN_INPUT_GRAM_HELD_OUT], statistics[DOWN_CROSS_HELD_OUT]
        fitted = statistics[DOWN_INPUT_GRAM] - held_out  # (F, F)
        cross = statistics[DOWN_CROSS] - held_out_cross  # (D, F)
        weight = feed_forward.down  # (D, F)
        judge = (held_out, held_out_cross) if held_out.any() else (fitted, cross)
        # The target's own square is unknown; about the dense weights' output it is what the error is measured from.
        whole = output_error(weight, weight[:, :0], kept[:0], judge[0])

        def error(down: Tensor) -> float:
            return output_error(weight, down, kept, *judge) + whole

        return guarded(
            lambda damping: least_squares(weight, fitted, cross, kept, damping),
            error,
            weight[:, kept],
            whole,
            self.damping,
        )


def guarded(
    fit: Callable[[float], Tensor], error: Callable[[Tensor], float], plain: Tensor, whole: float, damping: float
) -> Update:
    """The first fit whose held-out error is below that of the ``plain`` weights; relative to ``whole``."""
    before = error(plain)
    found = before
    for attempt in range(_RAISES + 1):
        try:
            down = fit(damping * 10**attempt)  # (D, K)
        except RuntimeError:  # torch.linalg.LinAlgError: not positive definite
            continue
        found = error(down)
        if found < before:
            return Update(down=down, error_plain=before / whole, error=found / whole)
    return Update(error_plain=before / whole, error=found / whole)
