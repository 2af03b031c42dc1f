"""Collectors of how far a block moves the residual stream: a mean over tokens, in float32 (CFSP, lib/block_metrics.py).

The published code builds a T x T matrix to read its diagonal and lets a rounded cosine above 1 become NaN; here each
token's product is taken alone and the cosine clamped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework import Accumulator, Collector, Site, Statistic
from cfsp_framework.statistics import ANGULAR_DISTANCE, COSINE_DISTANCE, MAE_DISTANCE, MSE_DISTANCE


def cosine(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of each token's input and output ``(T, D)`` -> ``(T,)`` in [-1, 1]; 0.5 where one of them is zero."""
    norms: Tensor = torch.linalg.vector_norm(before, dim=-1) * torch.linalg.vector_norm(after, dim=-1)  # (T,)
    product: Tensor = torch.linalg.vecdot(before, after)  # (T,)
    return (product / norms.where(norms > 0, 1)).where(norms > 0, 0.5).clamp(-1, 1)


def angular_distance(before: Tensor, after: Tensor) -> Tensor:
    """Angle between each token's input and output over pi, ``(T,)`` in [0, 1]."""
    return cosine(before, after).arccos() / math.pi


def cosine_distance(before: Tensor, after: Tensor) -> Tensor:
    """One minus the cosine, ``(T,)`` in [0, 2]."""
    return 1 - cosine(before, after)


def mse_distance(before: Tensor, after: Tensor) -> Tensor:
    """Mean squared difference over the hidden units, ``(T,)``."""
    return (before - after).square().mean(-1)


def mae_distance(before: Tensor, after: Tensor) -> Tensor:
    """Mean absolute difference over the hidden units, ``(T,)``."""
    return (before - after).abs().mean(-1)


class AngularDistance(Collector):
    """Mean angle between a block's input and output."""

    name: ClassVar[str] = "angular-distance"
    provides: ClassVar[Statistic] = ANGULAR_DISTANCE
    site: ClassVar[Site] = Site.BLOCK

    def start(self) -> Accumulator:
        return _TokenMean(angular_distance)


class CosineDistance(Collector):
    """Mean of one minus the cosine of a block's input and output."""

    name: ClassVar[str] = "cosine-distance"
    provides: ClassVar[Statistic] = COSINE_DISTANCE
    site: ClassVar[Site] = Site.BLOCK

    def start(self) -> Accumulator:
        return _TokenMean(cosine_distance)


class MseDistance(Collector):
    """Mean squared difference of a block's input and output."""

    name: ClassVar[str] = "mse-distance"
    provides: ClassVar[Statistic] = MSE_DISTANCE
    site: ClassVar[Site] = Site.BLOCK

    def start(self) -> Accumulator:
        return _TokenMean(mse_distance)


class MaeDistance(Collector):
    """Mean absolute difference of a block's input and output."""

    name: ClassVar[str] = "mae-distance"
    provides: ClassVar[Statistic] = MAE_DISTANCE
    site: ClassVar[Site] = Site.BLOCK

    def start(self) -> Accumulator:
        return _TokenMean(mae_distance)


class _TokenMean:
    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.sums: dict[str, Tensor] = {}
        self._distance = distance

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        total = self._distance(inputs.float(), outputs.float()).sum(dtype=torch.float64)  # ()
        self.sums["distance"] = self.sums["distance"] + total if "distance" in self.sums else total

    def value(self, tokens: int) -> Tensor:
        return self.sums["distance"] / tokens
