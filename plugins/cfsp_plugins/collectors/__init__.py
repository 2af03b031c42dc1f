"""The built-in collectors, one family a file."""

from __future__ import annotations

from cfsp_framework import Collector

from .activations import DownInputMean, DownInputSquares, DownInputVariance
from .distances import AngularDistance, CosineDistance, MaeDistance, MseDistance
from .fluctuation import DownInputFluctuation
from .second_moments import BlockOutputSquares, DownCross, DownInputGram, DownTargetSquares
from .sums import held_out, relative
from .taylor import DownInputTaylor, DownInputTaylorSquared
from .tokens import FeedForwardInputs, FeedForwardTargets, TokenWeights

ALSO_RELATIVE: tuple[type[Collector], ...] = (DownInputGram, DownCross, DownTargetSquares)
"""Collectors of products that are also offered with every token over its squared residual norm."""

ALSO_HELD_OUT: tuple[type[Collector], ...] = (
    DownInputMean,
    *ALSO_RELATIVE,
    *map(relative, ALSO_RELATIVE),
    FeedForwardInputs,
    FeedForwardTargets,
    TokenWeights,
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
    "TokenWeights",
    "held_out",
    "relative",
]
