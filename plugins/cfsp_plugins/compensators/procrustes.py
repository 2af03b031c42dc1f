"""Rotate and scale the output of the kept channels."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework import BlockStatistics, Compensator, FeedForward, Statistic, Update
from cfsp_framework.linalg import output_error, output_square
from cfsp_framework.statistics import DOWN_INPUT_GRAM_RELATIVE

from .held_out_guard import guarded, split


class Procrustes(Compensator):
    """Rotate and scale the kept output: ``s Q W_K``, the closest to the dense output among rotations of the hidden space.

    It has few degrees of freedom and hardly overfits, for calibration sets too small for least squares (arXiv 2510.07782
    uses rotations in this way).
    """

    name: ClassVar[str] = "procrustes"
    requires: ClassVar[frozenset[Statistic]] = frozenset(
        {DOWN_INPUT_GRAM_RELATIVE, DOWN_INPUT_GRAM_RELATIVE.held_out()}
    )

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        weight = feed_forward.down.double()  # (D, F)
        fit, judge = split(statistics, DOWN_INPUT_GRAM_RELATIVE)  # (F, F) each
        kept_weight = weight[:, kept]  # (D, K)

        def rotate(damping: float) -> Tensor:
            left, values, right = torch.linalg.svd(
                weight @ fit.double()[:, kept] @ kept_weight.mT
            )  # (D, D), (D,), (D, D)
            scale = values.sum() / output_square(kept_weight, fit[kept][:, kept])
            rotated: Tensor = scale * (left @ right) @ kept_weight  # (D, K)
            return rotated

        def error(down: Tensor) -> float:
            return output_error(weight, down, kept, judge)

        return guarded(rotate, error, error(kept_weight), output_square(weight, judge), 0.0)
