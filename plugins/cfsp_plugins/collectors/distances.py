"""Collect the distance between a block's input and output: means over tokens, in float32 (CFSP, lib/block_metrics.py).

The published code builds a T x T matrix to read its diagonal and lets a rounded cosine above 1 become NaN; here each
token's product is computed alone and the cosine is clamped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework import AccumulatorFactory, Collector, Site, Statistic
from cfsp_framework.statistics import ANGULAR_DISTANCE, COSINE_DISTANCE, MAE_DISTANCE, MSE_DISTANCE

from .sums import Sums

Distance = Callable[[Tensor, Tensor], Tensor]


def cosine(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the cosine of each token's input and output ``(T, D)``: ``(T,)`` in [-1, 1]; 0.5 where one is zero."""
    norms: Tensor = torch.linalg.vector_norm(inputs, dim=-1) * torch.linalg.vector_norm(outputs, dim=-1)  # (T,)
    product: Tensor = torch.linalg.vecdot(inputs, outputs)  # (T,)
    return (product / norms.where(norms > 0, 1)).where(norms > 0, 0.5).clamp(-1, 1)


def angular_distance(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the angle between each token's input and output over pi, ``(T,)`` in [0, 1]."""
    return cosine(inputs, outputs).arccos() / math.pi


def cosine_distance(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return one minus the cosine, ``(T,)`` in [0, 2]."""
    return 1 - cosine(inputs, outputs)


def mse_distance(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the mean squared difference over the hidden units, ``(T,)``."""
    return (inputs - outputs).square().mean(-1)


def mae_distance(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the mean absolute difference over the hidden units, ``(T,)``."""
    return (inputs - outputs).abs().mean(-1)


class _TokenMean(Sums):
    def __init__(self, distance: Distance) -> None:
        super().__init__()
        self._distance = distance

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        self.add("total", self._distance(inputs.float(), outputs.float()).sum(dtype=torch.float64))  # ()

    def value(self, tokens: int) -> Tensor:
        return self.sums["total"] / tokens


class AngularDistance(Collector):
    """Mean angle between a block's input and output, over pi."""

    name: ClassVar[str] = "angular-distance"
    provides: ClassVar[Statistic] = ANGULAR_DISTANCE
    site: ClassVar[Site] = Site.BLOCK
    accumulator: ClassVar[AccumulatorFactory] = partial(_TokenMean, angular_distance)


class CosineDistance(Collector):
    """Mean of one minus the cosine of a block's input and output."""

    name: ClassVar[str] = "cosine-distance"
    provides: ClassVar[Statistic] = COSINE_DISTANCE
    site: ClassVar[Site] = Site.BLOCK
    accumulator: ClassVar[AccumulatorFactory] = partial(_TokenMean, cosine_distance)


class MseDistance(Collector):
    """Mean squared difference of a block's input and output."""

    name: ClassVar[str] = "mse-distance"
    provides: ClassVar[Statistic] = MSE_DISTANCE
    site: ClassVar[Site] = Site.BLOCK
    accumulator: ClassVar[AccumulatorFactory] = partial(_TokenMean, mse_distance)


class MaeDistance(Collector):
    """Mean absolute difference of a block's input and output."""

    name: ClassVar[str] = "mae-distance"
    provides: ClassVar[Statistic] = MAE_DISTANCE
    site: ClassVar[Site] = Site.BLOCK
    accumulator: ClassVar[AccumulatorFactory] = partial(_TokenMean, mae_distance)
