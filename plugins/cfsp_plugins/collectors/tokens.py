"""Collect a feed-forward's inputs, targets and weights token by token, for compensators that train."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework import AccumulatorFactory, Collector, Site, Statistic, Windows
from cfsp_framework.statistics import FEED_FORWARD_INPUTS, FEED_FORWARD_TARGETS, TOKEN_WEIGHTS


class _Rows:
    def __init__(self, *, outputs: bool) -> None:
        self.sums: dict[str, Tensor] = {}
        self._outputs = outputs
        self._windows: list[Tensor] = []

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        self._windows.append((outputs if self._outputs else inputs).clone())

    def value(self, tokens: int) -> Tensor:
        return torch.cat(self._windows)  # (n, D)


class _Weights:
    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._windows: list[Tensor] = []

    def update(self, inputs: Tensor, outputs: Tensor, weights: Tensor | None = None) -> None:
        assert weights is not None, "the collector is relative"
        self._windows.append(weights.clone())

    def value(self, tokens: int) -> Tensor:
        return torch.cat(self._windows)  # (n,)


class FeedForwardInputs(Collector):
    """Inputs of the feed-forward, token by token.

    Held-out windows are excluded; the collector for those is separate.
    """

    name: ClassVar[str] = "feed-forward-inputs"
    provides: ClassVar[Statistic] = FEED_FORWARD_INPUTS
    site: ClassVar[Site] = Site.FEED_FORWARD
    windows: ClassVar[Windows] = Windows.FITTED
    ordered: ClassVar[bool] = True
    accumulator: ClassVar[AccumulatorFactory] = partial(_Rows, outputs=False)


class FeedForwardTargets(Collector):
    """Target outputs of the feed-forward, token by token.

    Held-out windows are excluded; the collector for those is separate.
    """

    name: ClassVar[str] = "feed-forward-targets"
    provides: ClassVar[Statistic] = FEED_FORWARD_TARGETS
    site: ClassVar[Site] = Site.FEED_FORWARD
    windows: ClassVar[Windows] = Windows.FITTED
    ordered: ClassVar[bool] = True
    accumulator: ClassVar[AccumulatorFactory] = partial(_Rows, outputs=True)


class TokenWeights(Collector):
    """Weight of every token at the feed-forward: 1 / the squared norm of its residual stream after the block.

    Held-out windows are excluded; the collector for those is separate.
    """

    name: ClassVar[str] = "token-weights"
    provides: ClassVar[Statistic] = TOKEN_WEIGHTS
    site: ClassVar[Site] = Site.FEED_FORWARD
    windows: ClassVar[Windows] = Windows.FITTED
    ordered: ClassVar[bool] = True
    relative: ClassVar[bool] = True
    accumulator: ClassVar[AccumulatorFactory] = _Weights
