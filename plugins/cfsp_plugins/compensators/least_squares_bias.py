"""Re-fit the kept down weights and the bias to the output of the whole feed-forward."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cfsp_framework import BlockStatistics, Compensator, FeedForward, Statistic, Update
from cfsp_framework.linalg import least_squares, output_error, output_square
from cfsp_framework.statistics import DOWN_INPUT_GRAM, DOWN_INPUT_MEAN

from .held_out_guard import DAMPING, guarded


class LeastSquaresBias(Compensator):
    """Least squares of the centred activations, and a bias for the part that their means leave.

    The Gram matrix is replaced by the covariance, and the down projection's bias takes ``W mu - W'_K mu_K``. A family
    without that bias gets one: D parameters a block. FLAP's bias on top of plain least squares would count means twice.
    """

    name: ClassVar[str] = "least-squares-bias"
    requires: ClassVar[frozenset[Statistic]] = frozenset(
        {DOWN_INPUT_GRAM, DOWN_INPUT_GRAM.held_out(), DOWN_INPUT_MEAN, DOWN_INPUT_MEAN.held_out()}
    )

    damping: float = Field(default=1e-3, gt=0, description=DAMPING)

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        weight = feed_forward.down.double()  # (D, F)
        count, held_out = statistics.tokens, statistics.held_out_tokens
        mean = statistics[DOWN_INPUT_MEAN].double()  # (F,)
        mean_held_out = statistics[DOWN_INPUT_MEAN.held_out()].double()  # (F,)
        gram = statistics[DOWN_INPUT_GRAM].double()  # (F, F)
        judge, judge_mean, judged = gram, mean, count
        if held_out:
            judge, judge_mean, judged = statistics[DOWN_INPUT_GRAM.held_out()].double(), mean_held_out, held_out
            gram = gram - judge
            mean = (count * mean - held_out * mean_held_out) / (count - held_out)
            count -= held_out
        covariance = gram - count * torch.outer(mean, mean)  # (F, F)
        about_mean = judge - judged * (
            torch.outer(mean, judge_mean) + torch.outer(judge_mean, mean) - torch.outer(mean, mean)
        )  # (F, F): sum of (h - mean)(h - mean)^T over the held-out tokens
        cross = weight @ covariance  # (D, F)
        update = guarded(
            lambda damping: least_squares(weight, covariance, cross, kept, damping),
            lambda down: output_error(weight, down, kept, about_mean),
            output_error(weight, weight[:, kept], kept, judge),
            output_square(weight, judge),
            self.damping,
        )
        if update.down is None:
            return update
        bias = weight @ mean - update.down @ mean[kept]  # (D,)
        native = 0 if feed_forward.down_bias is None else feed_forward.down_bias.double()
        return replace(update, down_bias=native + bias)
