"""Run any decoder block by block: record the arguments each block is called with, then replay the blocks one by one.

While recording only embeddings, rotary tables and masks are computed. Every block keeps its own arguments, since masks
differ between blocks in models with sliding windows.
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

# Enough tokens to keep a processor busy while activations stay in its cache, or a GPU without filling its memory.
_TOKENS_PER_BATCH = 512
_TOKENS_PER_BATCH_GPU = 16384


@dataclass(frozen=True)
class ForwardOptions:
    """Options of passing windows through the blocks."""

    batch_size: int | None = None
    """Windows per batch; None for ``tokens_per_batch`` tokens."""
    skip: frozenset[int] = field(default_factory=frozenset)
    """Token ids that no statistic counts."""
    spill: Path | None = None
    """Folder for the hidden states; None keeps them in memory."""
    ranks: Ranks = SOLO
    """The processes that share the windows."""


@dataclass(frozen=True)
class Call:
    """Arguments of a block's forward beside the hidden states."""

    positional: tuple[Any, ...]
    keyword: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """Calibration windows on their way through the blocks."""

    hidden: Tensor  # (B, T, D), a view of one buffer that holds all windows
    calls: tuple[Call, ...]  # one per block
    numbers: tuple[int, ...] = ()
    """Number of each window among those of all processes."""
    counted: Tensor | None = None  # (B, T) bool: the tokens statistics count; None for all


@torch.no_grad()
def embed(decoder: Decoder, windows: Tensor, forward_options: ForwardOptions | None = None) -> list[Batch]:
    """Return this process's share of the windows ``(N, T)`` as batches that enter the first block.

    All batches share one buffer; batches of a family whose hidden states are not ``(B, T, D)`` have their own.

    Raises:
        ModelError: the model does not call each of its blocks exactly once.
    """
    forward_options = forward_options or ForwardOptions()
    numbers = forward_options.ranks.share(len(windows))
    windows = windows[list(numbers)]
    batch_size = forward_options.batch_size or max(1, tokens_per_batch(decoder.device) // windows.shape[1])
    padded = bool((windows == PADDING).any())
    batches: list[Batch] = []
    buffer: Tensor | None = None  # (N, T, D): one allocation, rewritten by every block, so memory does not fragment
    with _recording(decoder.blocks) as record:
        for ids, window_numbers in zip(windows.split(batch_size), _chunks(numbers, batch_size), strict=True):
            record.clear()
            tokens = ids.clamp(min=0).to(decoder.device)  # (B, T)
            mask = {"attention_mask": (ids != PADDING).long().to(decoder.device)} if padded else {}
            decoder.base(tokens, use_cache=False, **mask)  # else a key-value cache is filled
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
            batches.append(Batch(hidden, calls, window_numbers, _counted_tokens(ids, forward_options.skip)))
    return batches


@torch.no_grad()
def run_block(decoder: Decoder, index: int, batch: Batch) -> Tensor:
    """Return block ``index``'s output for the batch, ``(B, T, D)``; copy it into ``batch.hidden`` to advance."""
    call = batch.calls[index]
    entering = batch.hidden.to(decoder.device, non_blocking=True)
    output: Any = decoder.blocks[index](entering, *call.positional, **call.keyword)
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


@torch.no_grad()
def finish(decoder: Decoder, ids: Tensor, hidden: Tensor) -> Tensor:
    """Return the logits ``(B, T, V)`` of ``ids (B, T)`` whose hidden states after the last block are ``hidden``."""
    with _recording(decoder.blocks, output=hidden.to(decoder.device)):
        logits: Tensor = decoder.model(ids.to(decoder.device), use_cache=False).logits  # (B, T, V)
    return logits


@torch.no_grad()
def logits(decoder: Decoder, ids: Tensor) -> Tensor:
    """Return the logits ``(B, T, V)`` of the tokens ``ids (B, T)``, with one block loaded at a time."""
    batches = embed(decoder, ids, ForwardOptions(batch_size=len(ids)))
    for index in range(len(decoder.blocks)):
        with decoder.loaded(index):
            pass_block(decoder, index, batches)
    return finish(decoder, ids, batches[0].hidden)


@torch.no_grad()
def check_replay(decoder: Decoder, ids: Tensor) -> None:
    """Compare the blocks, run one by one, with the model's own forward on ``ids (1, T)``.

    Raises:
        ModelError: the logits differ by more than rounding, for example because a block reads what earlier ones left.
    """
    real = decoder.model(ids.to(decoder.device), use_cache=False).logits.float()  # (1, T, V)
    difference = (logits(decoder, ids).float().to(real.device) - real).abs().max().item()
    if not bool(real.isfinite().all()):
        return  # the collection names the block
    rounding = max(1e-3, 4 * torch.finfo(decoder.model.dtype).eps)
    if not difference <= rounding * real.abs().max().item():
        raise ModelError(
            f"the blocks of {type(decoder.model).__name__}, run one by one, do not compute what the model does: logits "
            f"differ by {difference:.3g}. Such a family cannot be measured."
        )


def pass_block(decoder: Decoder, index: int, batches: Sequence[Batch], step: Callable[[], None] = lambda: None) -> None:
    """Advance the batches through block ``index`` without measuring."""
    for batch in batches:
        batch.hidden.copy_(run_block(decoder, index, batch))
        step()


def tokens_per_batch(device: torch.device) -> int:
    """Return the default number of tokens of a batch."""
    return _TOKENS_PER_BATCH_GPU if device.type == "cuda" else _TOKENS_PER_BATCH


def _chunks(numbers: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(numbers[start : start + size]) for start in range(0, len(numbers), size)]


def _counted_tokens(ids: Tensor, skip: frozenset[int]) -> Tensor | None:
    """Mark the tokens of ``ids (B, T)`` that statistics count; None if all do."""
    left_out = torch.isin(ids, torch.tensor([PADDING, *sorted(skip)]))  # (B, T)
    return ~left_out if left_out.any() else None


@contextmanager
def _recording(
    blocks: Sequence[nn.Module], output: Tensor | None = None
) -> Generator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Replace each block's forward by one that appends its arguments to the yielded list.

    A block then returns its input unchanged, or ``output`` if that is given.
    """
    record: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stub(block: nn.Module) -> Callable[..., Any]:
        as_tuple = _returns_tuple(type(block).forward)

        def forward(*arguments: Any, **keywords: Any) -> Any:
            record.append((arguments, keywords))
            passed = arguments[0] if output is None else output
            return (passed, None, None, None) if as_tuple else passed

        return forward

    originals = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.__dict__["forward"] = stub(block)
        yield record
    finally:
        for block, original in zip(blocks, originals, strict=True):
            if original is None:
                block.__dict__.pop("forward", None)  # the forward of the class is visible again
            else:
                block.__dict__["forward"] = original


@cache
def _returns_tuple(forward: Callable[..., Any]) -> bool:
    """Decide whether a block returns a tuple; such families lack return annotations, so the source decides."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))
    except (OSError, TypeError):
        return False
    returned = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Return)][-1:]
    return any(
        isinstance(value, ast.Tuple) or (isinstance(value, ast.Name) and value.id == "outputs") for value in returned
    )


def _equal(left: Any, right: Any) -> bool:
    """Compare two recorded calls, tensors by value."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left is right or (left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right))
    if isinstance(left, Call) and isinstance(right, Call):
        return _equal(left.positional, right.positional) and _equal(left.keyword, right.keyword)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(map(_equal, left, right))
    return left is right or (type(left) is type(right) and not isinstance(left, Tensor) and bool(left == right))
