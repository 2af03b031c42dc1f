"""Runs any decoder one block at a time: what each block was called with is recorded, then replayed block by block.

Only embeddings, rotary tables and masks run while recording. Every block keeps its own call: masks differ between
blocks on models with sliding windows.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfsp_framework.data.windows import PADDING
from cfsp_framework.engine.hidden_states import allocate
from cfsp_framework.errors import ModelError
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.runtime.distributed import SOLO, Ranks

# What keeps a processor busy without its intermediate activations leaving the cache, or a GPU without filling it.
_TOKENS_PER_BATCH = 512
_TOKENS_PER_BATCH_GPU = 16384


@dataclass(frozen=True)
class ForwardOptions:
    """How windows pass through the blocks, whatever is measured on the way."""

    batch_size: int | None = None
    """Windows per batch; None: what keeps a batch small."""
    skip: frozenset[int] = field(default_factory=frozenset)
    """Token ids no statistic counts."""
    spill: Path | None = None
    """A folder for the hidden states; None: they stay in memory."""
    ranks: Ranks = SOLO


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
    numbers: tuple[int, ...] = ()
    """Which windows these are among those of all processes."""
    counted: Tensor | None = None  # (B, T) bool: the tokens statistics count; None for all


@torch.no_grad()
def embed(decoder: Decoder, windows: Tensor, forward_options: ForwardOptions | None = None) -> list[Batch]:
    """This process's share of the windows ``(N, T)`` as they enter the first block, in batches, with every block's call.

    Where the hidden states of a family are more than ``(B, T, D)``, every batch keeps its own.
    """
    forward_options = forward_options or ForwardOptions()
    numbers = forward_options.ranks.share(len(windows))
    windows = windows[list(numbers)]
    batch_size = forward_options.batch_size or max(1, tokens_per_batch(decoder.device) // windows.shape[1])
    padded = bool((windows == PADDING).any())
    batches: list[Batch] = []
    buffer: Tensor | None = (
        None  # (N, T, D): one allocation, rewritten by every block, so that memory does not fragment
    )
    with _recording(decoder.blocks) as record:
        for ids, mine in zip(windows.split(batch_size), _chunks(numbers, batch_size), strict=True):
            record.clear()
            tokens = ids.clamp(min=0).to(decoder.device)  # (B, T)
            mask = {"attention_mask": (ids != PADDING).long().to(decoder.device)} if padded else {}
            # Without use_cache=False a cache is made and filled.
            decoder.base(tokens, use_cache=False, **mask)
            if len(record) != len(decoder.blocks):
                raise ModelError(f"the model called {len(record)} of its {len(decoder.blocks)} blocks once each.")
            entering: Tensor = record[0][0][0]  # (B, T, D)
            if entering.ndim == 3 and entering.shape[:2] == ids.shape:
                if buffer is None:
                    buffer = allocate((len(windows), *entering.shape[1:]), entering, forward_options.spill)
                start = sum(len(batch.numbers) for batch in batches)
                hidden = buffer[start : start + len(ids)].copy_(entering)
            else:
                hidden = entering.clone()
            calls = tuple(Call(arguments[1:], keywords) for arguments, keywords in record)
            if batches and _equal(calls, batches[-1].calls):
                calls = batches[-1].calls  # windows of one length share masks and rotary tables: keep one copy
            batches.append(Batch(hidden, calls, mine, _counted(ids, forward_options.skip)))
    return batches


@torch.no_grad()
def run_block(decoder: Decoder, index: int, batch: Batch) -> Tensor:
    """What block ``index`` makes of the batch, ``(B, T, D)``; copy it into ``batch.hidden`` to go on to the next."""
    call = batch.calls[index]
    entering = batch.hidden.to(decoder.device, non_blocking=True)
    output: Any = decoder.blocks[index](entering, *call.positional, **call.keyword)
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


@torch.no_grad()
def finish(decoder: Decoder, ids: Tensor, hidden: Tensor) -> Tensor:
    """The logits ``(B, T, V)`` of the tokens ``ids (B, T)`` whose hidden states after the last block are ``hidden``."""
    with _recording(decoder.blocks, leaving=hidden.to(decoder.device)):
        found: Tensor = decoder.model(ids.to(decoder.device), use_cache=False).logits
    return found


@torch.no_grad()
def logits(decoder: Decoder, ids: Tensor) -> Tensor:
    """The logits ``(B, T, V)`` of the tokens ``ids (B, T)``, with one block resident at a time."""
    batches = embed(decoder, ids, ForwardOptions(batch_size=len(ids)))
    for index in range(len(decoder.blocks)):
        with decoder.loaded(index):
            pass_block(decoder, index, batches)
    return finish(decoder, ids, batches[0].hidden)


def pass_block(decoder: Decoder, index: int, batches: Sequence[Batch], step: Callable[[], None] = lambda: None) -> None:
    """Move the batches through block ``index`` and measure nothing."""
    for batch in batches:
        batch.hidden.copy_(run_block(decoder, index, batch))
        step()


def tokens_per_batch(device: torch.device) -> int:
    """Tokens of a batch where the user leaves it open."""
    return _TOKENS_PER_BATCH_GPU if device.type == "cuda" else _TOKENS_PER_BATCH


def _chunks(numbers: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(numbers[start : start + size]) for start in range(0, len(numbers), size)]


def _counted(ids: Tensor, skip: frozenset[int]) -> Tensor | None:
    """Which tokens of ``ids (B, T)`` count, or None where all do."""
    left_out = torch.isin(ids, torch.tensor([PADDING, *sorted(skip)]))  # (B, T)
    return ~left_out if left_out.any() else None


@contextmanager
def _recording(
    blocks: Sequence[nn.Module], leaving: Tensor | None = None
) -> Generator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """While open, a block returns its input unchanged and its call is appended to the yielded list.

    With ``leaving`` the blocks return that.
    """
    record: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stub(block: nn.Module) -> Callable[..., Any]:
        as_tuple = _returns_tuple(type(block).forward)

        def forward(*arguments: Any, **keywords: Any) -> Any:
            record.append((arguments, keywords))
            passed = arguments[0] if leaving is None else leaving
            return (passed, None, None, None) if as_tuple else passed

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


@cache
def _returns_tuple(forward: Callable[..., Any]) -> bool:
    """Whether a block's caller unpacks what it returns; annotations are missing where it does, so the code decides."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))
    except (OSError, TypeError):
        return False
    returned = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Return)][-1:]
    return any(
        isinstance(value, ast.Tuple) or (isinstance(value, ast.Name) and value.id == "outputs") for value in returned
    )


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
