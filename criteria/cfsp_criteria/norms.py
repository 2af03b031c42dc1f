"""Norms that several criteria use."""

from __future__ import annotations

import torch
from torch import Tensor

from cfsp_framework import BlockStatistics, FeedForward
from cfsp_framework.statistics import DOWN_INPUT_SQUARES


def activation_norm(statistics: BlockStatistics) -> Tensor:
    """Return each channel's root mean square activation, ``(F,)`` float32."""
    return (statistics[DOWN_INPUT_SQUARES] / statistics.tokens).sqrt()


def down_norm(feed_forward: FeedForward) -> Tensor:
    """Return the L2 norm of each channel's down weights, ``(F,)`` float32."""
    norm: Tensor = torch.linalg.vector_norm(feed_forward.down.float(), dim=0)  # (F,)
    return norm
