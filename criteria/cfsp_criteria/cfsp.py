"""Score channels by CFSP's fine criterion, in three readings (docs/method.md explains why there are three)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cfsp_framework import BlockStatistics, Criterion, FeedForward, Statistic
from cfsp_framework.statistics import DOWN_INPUT_SQUARES

from .norms import activation_norm

Variant = Literal["rel", "act", "eq8"]
_DEFAULT_C: dict[Variant, float] = {"rel": 1.0, "act": 1.0, "eq8": 0.0}


class Cfsp(Criterion):
    """Relative weight and activation magnitudes (arXiv 2409.13199, Eq. 8), read in one of three ways.

    With the activation norm ``a (F,)``, each as ``F_i * a_i ** c``:

    * ``rel`` sums three shares, each normalised over the channels: ``|down| * a ** b``, ``|up|`` and ``|gate|``. This
      project's reading, in which the weights matter.
    * ``act`` is ``F_i = 1``, the ranking of the authors' released code (wyxscir/CFSP, lib/prune.py,
      ``three_w_one_wa``), whose weight terms cancel.
    * ``eq8`` is the printed formula in a third party's transcription (peremartra/optipfair 0.2.0). Uncertain in it:
      whether the norm of the denominators is L1, as here, or L2; which index of up and gate is the channel; whether an
      outer activation norm follows (``c = 0`` here); and b and c themselves, which come from the released command line.
      Its up and gate terms are 1 for every channel with a non-zero row, so they cancel too.
    """

    name: ClassVar[str] = "cfsp"
    requires: ClassVar[frozenset[Statistic]] = frozenset({DOWN_INPUT_SQUARES})

    variant: Variant = Field(default="rel", description="rel, act (as the released code computes) or eq8 (as printed)")
    b: float = Field(default=1.0, description="exponent of the activation norm beside the down projection")
    c: float | None = Field(default=None, description="exponent of the outer activation norm; default: 1, or 0 for eq8")

    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        norm = activation_norm(statistics)  # (F,)
        outer = norm ** (_DEFAULT_C[self.variant] if self.c is None else self.c)  # (F,)
        if self.variant == "act":
            return outer
        fine = _relative if self.variant == "rel" else _printed
        return fine(feed_forward, norm**self.b) * outer


def _relative(feed_forward: FeedForward, activation: Tensor) -> Tensor:
    """Return the mean over hidden units of each channel's share of the unit's weights, down weights times ``activation (F,)``."""
    down = feed_forward.down.abs().float() * activation  # (D, F)
    shares = _inverse(down.sum(1)) @ down  # (F,)
    for weight in (feed_forward.up, feed_forward.gate):
        if weight is not None:
            magnitude = weight.abs().float()  # (F, D)
            shares = shares + magnitude @ _inverse(magnitude.sum(0))  # (F,)
    return shares / feed_forward.hidden


def _printed(feed_forward: FeedForward, activation: Tensor) -> Tensor:
    """Compute Eq. 8 as transcribed: row-normalised down weights times relative ``activation (F,)``, plus up and gate shares."""
    down = feed_forward.down.abs().float()  # (D, F)
    shares = (_inverse(down.sum(1)) @ down) * activation * _inverse(activation.sum())  # (F,)
    for weight in (feed_forward.up, feed_forward.gate):
        if weight is not None:
            shares = shares + (weight != 0).any(1)  # each row over its own L1 norm sums to 1, or to 0 if it is empty
    return shares


def _inverse(total: Tensor) -> Tensor:
    """Return one over each total, and 0 for a total too small to invert: a zero weight has no share."""
    positive = total > torch.finfo(total.dtype).tiny
    return positive / total.where(positive, 1)
