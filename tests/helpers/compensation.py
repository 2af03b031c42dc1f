"""Compensate a cut with changes that a test gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from cfsp_framework.api.data import Update
from cfsp_framework.pruning.compensation import Compensation

Updates = Callable[[int, Sequence[Tensor]], Sequence[Update]]


class GivenUpdates(Compensation):
    """Return what a function of the block and its kept channels gives."""

    def __init__(self, updates: Updates) -> None:
        self._updates = updates

    def compensate(self, index: int, kept: Sequence[Tensor]) -> Sequence[Update]:
        """Return the function's updates."""
        return self._updates(index, kept)
