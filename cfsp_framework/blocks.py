"""Runs any decoder one block at a time: what each block was called with is recorded, then replayed block by block.

Only embeddings, rotary tables and masks run while recording. Every block keeps its own call: masks differ between
blocks on models with sliding windows.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import Decoder
from .errors import ModelError

# Blocks whose caller unpacks a tuple; all others return the hidden states alone.
_RETURN_TUPLES = frozenset({"BloomBlock", "FalconDecoderLayer", "GPTJBlock", "GPTNeoBlock", "MptBlock"})

# What keeps a processor busy without its intermediate activations leaving the cache, or a GPU without filling it.
_TOKENS_PER_BATCH = 512
_TOKENS_PER_BATCH_GPU = 16384


@dataclass(frozen=True)
class Call:
    """What a block is called with, beside the hidden states."""

    positional: tuple[Any, ...]
    keyword: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """Some calibration windows on their way through the blocks."""

    hidden: Tensor  # (B, T, D), a view of one buffer that holds all windows
    calls: tuple[Call, ...]  # one per block


@torch.no_grad()
def embed(decoder: Decoder, windows: Tensor, batch_size: int | None = None) -> list[Batch]:
    """The windows ``(N, T)`` as they enter the first block, in batches, with every block's call."""
    if batch_size is None:
        tokens = _TOKENS_PER_BATCH_GPU if decoder.model.device.type == "cuda" else _TOKENS_PER_BATCH
        batch_size = max(1, tokens // windows.shape[1])
    batches: list[Batch] = []
    buffer: Tensor | None = (
        None  # (N, T, D): one allocation, rewritten by every block, so that memory does not fragment
    )
    with _recording(decoder.blocks) as record:
        for ids in windows.split(batch_size):
            record.clear()
            # Without use_cache=False a cache is made and filled.
            decoder.base(ids.to(decoder.model.device), use_cache=False)
            if len(record) != len(decoder.blocks):
                raise ModelError(f"the model called {len(record)} of its {len(decoder.blocks)} blocks once each.")
            entering: Tensor = record[0][0][0]  # (B, T, D)
            if buffer is None:
                buffer = entering.new_empty(len(windows), *entering.shape[1:])
            start = sum(len(batch.hidden) for batch in batches)
            hidden = buffer[start : start + len(ids)].copy_(entering)
            calls = tuple(Call(arguments[1:], keywords) for arguments, keywords in record)
            if batches and _equal(calls, batches[-1].calls):
                calls = batches[-1].calls  # windows of one length share masks and rotary tables: keep one copy
            batches.append(Batch(hidden, calls))
    return batches


@torch.no_grad()
def run_block(block: nn.Module, index: int, batch: Batch) -> Tensor:
    """What block ``index`` makes of the batch, ``(B, T, D)``; copy it into ``batch.hidden`` to go on to the next."""
    call = batch.calls[index]
    output: Any = block(batch.hidden, *call.positional, **call.keyword)
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


@contextmanager
def listening(module: nn.Module, hear: Callable[[Tensor, Tensor], None]) -> Generator[None]:
    """Call ``hear(input, output)`` on every forward of ``module``; the hook never outlives the context."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        hear(inputs[0], output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _recording(blocks: Sequence[nn.Module]) -> Generator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """While open, a block returns its input unchanged and its call is appended to the yielded list."""
    record: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stub(block: nn.Module) -> Callable[..., Any]:
        as_tuple = type(block).__name__ in _RETURN_TUPLES

        def forward(*arguments: Any, **keywords: Any) -> Any:
            record.append((arguments, keywords))
            return (arguments[0], None, None, None) if as_tuple else arguments[0]

        return forward

    replaced = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.__dict__["forward"] = stub(block)
        yield record
    finally:
        for block, own in replaced:
            if own is None:
                block.__dict__.pop("forward", None)  # the class's own forward is visible again
            else:
                block.__dict__["forward"] = own


def _equal(left: Any, right: Any) -> bool:
    """Whether two recorded calls are the same, tensors compared by value."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left is right or (left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right))
    if isinstance(left, Call) and isinstance(right, Call):
        return _equal(left.positional, right.positional) and _equal(left.keyword, right.keyword)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(map(_equal, left, right))
    return left is right or (type(left) is type(right) and not isinstance(left, Tensor) and bool(left == right))
