"""Build a model without the memory its parameters would take."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode

_FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn})
_LARGE = 1 << 26
"""Values of a tensor; buffers, such as tables of angles and causal masks, are smaller."""


@contextmanager
def without_weights() -> Generator[None]:
    """Put parameters of modules built inside the context on the meta device; buffers are real.

    accelerate moves a parameter there after allocating it; the experts of a block together may not fit even once.
    """
    with init_empty_weights(include_buffers=False), _LargeOnMeta():
        yield


class _LargeOnMeta(TorchFunctionMode):
    """Allocate large tensors on the meta device where the call names no device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FACTORIES and kwargs.get("device") is None:
            given = kwargs.get("size") or (args[0] if args and not isinstance(args[0], int) else args)
            if math.prod(int(length) for length in given) > _LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)
