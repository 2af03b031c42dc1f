"""Measure perplexity: the whole text is tokenised once and cut into windows without overlap; the tail is dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from cfsp_framework.api.records import Perplexity
from cfsp_framework.data.sources import parse_mixture, read_text
from cfsp_framework.data.windows import tokenize
from cfsp_framework.engine.replay import ForwardOptions, embed, finish, pass_block
from cfsp_framework.errors import DataError, ModelError
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.runtime.progress import Progress

LOGITS_PER_BATCH = 1 << 23
"""Limit of a batch, 32 MiB in float32."""


@dataclass(frozen=True)
class EvaluationSet:
    """Windows to evaluate on, ``(N, T)``, and the bytes of text behind each token."""

    spec: str
    windows: Tensor
    bytes_per_token: float


def evaluation_set(spec: str, tokenizer: Any, seqlen: int, limit: int | None = None) -> EvaluationSet:
    """Return the first ``limit`` windows of a data SPEC's evaluation text, or all of them.

    Raises:
        DataError: the text cannot be read or is shorter than one window.
    """
    (name, _), *others = parse_mixture(spec)
    if others:
        raise DataError(f"data {spec!r}: a mixture is for calibration; evaluate on each of its parts.")
    text = read_text(name, "evaluation")
    ids = tokenize(text, tokenizer)
    if len(ids) < seqlen:
        raise DataError(
            f"data {spec!r} has {len(ids)} tokens; one evaluation window of {seqlen} needs more. "
            "Give more text or a smaller --seqlen."
        )
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)[:limit]  # (N, T)
    return EvaluationSet(spec, windows, len(text.encode()) / len(ids))


@torch.no_grad()
def perplexity(
    model: PreTrainedModel | Decoder,
    data: EvaluationSet,
    progress: Progress,
    forward_options: ForwardOptions | None = None,
) -> Perplexity:
    """Return ``exp`` of the mean over windows of the mean cross-entropy of their T - 1 predictions, logits in float32.

    A ``Decoder`` runs with one block in memory at a time. Several processes share the windows.

    Raises:
        ModelError: the loss is not finite.
    """
    forward_options = forward_options or ForwardOptions()
    ranks = forward_options.ranks
    windows = data.windows[ranks.rank :: ranks.world]  # (n, T), those of this process
    if isinstance(model, Decoder):
        losses = _losses_by_blocks(model, windows, progress, forward_options, data.spec)  # (n,)
    else:
        losses = _losses(model, windows, progress, data.spec)  # (n,)
    order = torch.cat([torch.arange(rank, len(data.windows), ranks.world) for rank in range(ranks.world)])  # (N,)
    losses = ranks.gather(losses)[order.argsort()]  # (N,), in the order of the windows
    nll = losses.mean().item()
    if not math.isfinite(nll):
        raise ModelError(f"the model's loss on {data.spec!r} is {nll}: its weights or its dtype overflow.")
    return Perplexity(
        perplexity=math.exp(min(nll, 700)), nll=nll, bits_per_byte=nll / math.log(2) / data.bytes_per_token
    )


def _losses(model: PreTrainedModel, windows: Tensor, progress: Progress, name: str) -> Tensor:
    """Return the mean cross-entropy of every window ``(N, T)``: ``(N,)`` float64, CPU."""
    losses: list[Tensor] = [torch.empty(0, dtype=torch.float64)]
    batches = windows.split(_windows_per_batch(model, windows.shape[1])) if len(windows) else ()
    with progress.bar(f"perplexity on {name}", total=len(batches)) as step:
        for ids in batches:
            losses.append(_cross_entropy(model(ids.to(model.device), use_cache=False).logits, ids))
            step()
    return torch.cat(losses)  # (N,)


def _losses_by_blocks(
    decoder: Decoder, windows: Tensor, progress: Progress, forward_options: ForwardOptions, name: str
) -> Tensor:
    """Return the losses of ``_losses``, computed for all windows block by block."""
    if not len(windows):
        return torch.empty(0, dtype=torch.float64)
    size = _windows_per_batch(decoder.model, windows.shape[1])
    batches = embed(decoder, windows, ForwardOptions(batch_size=size, spill=forward_options.spill))
    with progress.bar(f"perplexity on {name}", total=len(batches) * len(decoder.blocks)) as step:
        for index in range(len(decoder.blocks)):
            with decoder.loaded(index):
                pass_block(decoder, index, batches, step)
    pairs = zip(batches, windows.split(size), strict=True)
    return torch.cat([_cross_entropy(finish(decoder, ids, batch.hidden), ids) for batch, ids in pairs])


def _windows_per_batch(model: PreTrainedModel, seqlen: int) -> int:
    vocabulary: int = model.config.get_text_config().vocab_size
    return max(1, LOGITS_PER_BATCH // (seqlen * vocabulary))


def _cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean loss of each window, logits ``(B, T, V)`` against the next of ``ids (B, T)``: ``(B,)`` float64, CPU."""
    predicted, ids = logits[:, :-1].float(), ids.to(logits.device)  # (B, T - 1, V)
    loss = functional.cross_entropy(predicted.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")  # (B * (T - 1),)
    return loss.view(len(ids), -1).mean(1).double().cpu()
