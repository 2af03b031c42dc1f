"""Where a block's parameters are while they are needed: always in memory, or read for a moment from a checkpoint."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class Residency(Protocol):
    """Makes one block's parameters present."""

    device: torch.device | None
    """Where blocks run; None: where the model is."""

    def __call__(self, index: int) -> AbstractContextManager[None]:
        """A context in which block ``index`` can be run, read and changed."""
        ...


class InMemory:
    """Every block is there all the time."""

    device: torch.device | None = None

    def __call__(self, index: int) -> AbstractContextManager[None]:
        return nullcontext()
