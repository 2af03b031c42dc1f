"""Fit on some tokens, accept a fit only if it lowers the error on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cfsp_framework import BlockStatistics, Statistic, Update

_ATTEMPTS = 6
"""Fits with tenfold growing damping."""
DAMPING = "share of the mean squared activation added for stability"
"""Description of the option ``damping``."""


def guarded(
    fit: Callable[[float], Tensor], error: Callable[[Tensor], float], plain: float, scale: float, damping: float
) -> Update:
    """Return the first fit whose held-out error is below ``plain``, that of plain pruning.

    ``fit(damping)`` gives down weights ``(D, K)``; the damping grows tenfold with each attempt. The errors in the result
    are relative to ``scale``, the squared target; without an accepted fit the result holds no tensors.
    """
    scale = scale or 1.0  # a feed-forward whose output is 0 has nothing to lose
    refused = plain
    for attempt in range(_ATTEMPTS if damping else 1):
        try:
            down = fit(damping * 10**attempt)  # (D, K)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not positive definite
            continue
        fitted = error(down)
        if fitted < plain:
            return Update(down=down, error_plain=plain / scale, error=fitted / scale)
        refused = fitted if math.isfinite(fitted) else refused
    return Update(error_plain=plain / scale, error=refused / scale)


def split(statistics: BlockStatistics, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """Return a sum over the tokens to fit on and over those to judge by; both are all tokens if none are held out."""
    total = statistics[statistic]
    if statistics.held_out_tokens == 0:
        return total, total
    held_out = statistics[statistic.held_out()]
    return total - held_out, held_out
