"""The built-in collectors, one family a file."""

from __future__ import annotations

from cfsp_framework import Collector

from .activations import DownInputMean, DownInputSquares, DownInputVariance
from .distances import AngularDistance, CosineDistance, MaeDistance, MseDistance
from .fluctuation import DownInputFluctuation
from .second_moments import BlockOutputSquares, DownCross, DownInputGram, DownTargetSquares
from .sums import held_out
from .taylor import DownInputTaylor, DownInputTaylorSquared
from .tokens import FeedForwardInputs, FeedForwardTargets

ALSO_HELD_OUT: tuple[type[Collector], ...] = (
    DownInputMean,
    DownInputGram,
    DownCross,
    DownTargetSquares,
    FeedForwardInputs,
    FeedForwardTargets,
)
"""Collectors that are also offered for held-out windows."""

COLLECTORS: tuple[type[Collector], ...] = (
    DownInputSquares,
    DownInputVariance,
    DownInputFluctuation,
    DownInputTaylor,
    DownInputTaylorSquared,
    AngularDistance,
    CosineDistance,
    MseDistance,
    MaeDistance,
    BlockOutputSquares,
    *ALSO_HELD_OUT,
    *map(held_out, ALSO_HELD_OUT),
)
"""Every built-in collector."""

__all__ = [
    "COLLECTORS",
    "AngularDistance",
    "BlockOutputSquares",
    "CosineDistance",
    "DownCross",
    "DownInputFluctuation",
    "DownInputGram",
    "DownInputMean",
    "DownInputSquares",
    "DownInputTaylor",
    "DownInputTaylorSquared",
    "DownInputVariance",
    "DownTargetSquares",
    "FeedForwardInputs",
    "FeedForwardTargets",
    "MaeDistance",
    "MseDistance",
    "held_out",
]
