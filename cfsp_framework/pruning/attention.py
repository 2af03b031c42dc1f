"""Choose blocks that lose their attention, for budgets that feed-forwards alone cannot meet (2SSP, arXiv 2501.17771)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cfsp_framework.data.windows import PADDING
from cfsp_framework.errors import ConfigError
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.pruning.surgery import dropped_attention, without_attention
from cfsp_framework.runtime.progress import Progress

_WINDOWS = 4
"""Calibration windows that each candidate's loss is measured on."""


def count_to_drop(decoder: Decoder, ratio: float) -> int:
    """Return 2SSP's number of attentions to drop for a share ``ratio`` of all parameters.

    ``round(L * s ** (P_ffn / P_att / 1.5))`` with s the share of the blocks' parameters to remove, P_ffn and P_att the
    parameters of one feed-forward and one attention.

    Raises:
        ConfigError: the blocks hold fewer parameters than are to be removed.
    """
    blocks = len(decoder.blocks)
    attention = decoder.attention_parameters(0)
    feed_forward = decoder.channel_parameters / blocks
    share: float = ratio * decoder.model.num_parameters() / (blocks * (attention + feed_forward))
    if share >= 1:
        raise ConfigError(f"--ratio {ratio} of all parameters is more than the blocks hold.")
    count: int = round(blocks * share ** (feed_forward / attention / 1.5))
    return count


def choose_attentions(decoder: Decoder, windows: Tensor, count: int, progress: Progress) -> tuple[int, ...]:
    """Choose ``count`` blocks greedily by the loss on ``windows (N, T)`` without their attention.

    The first block keeps its attention: key-value caches take the length of the text from it.

    Raises:
        ConfigError: the model has fewer attentions to drop.
    """
    candidates = [block for block in range(1, len(decoder.blocks)) if block not in dropped_attention(decoder.config)]
    if count > len(candidates):
        raise ConfigError(f"--drop-attention {count}: this model can lose at most {len(candidates)}.")
    dropped: list[int] = []
    with progress.bar("attention", total=count) as step:
        for _ in range(count):
            losses = {block: _loss(decoder, windows[:_WINDOWS], [*dropped, block]) for block in candidates}
            dropped.append(min(candidates, key=losses.__getitem__))
            candidates.remove(dropped[-1])
            step()
    return tuple(sorted(dropped))


@torch.no_grad()
def _loss(decoder: Decoder, windows: Tensor, dropped: Sequence[int]) -> float:
    """Return the mean next-token cross-entropy on ``windows (N, T)`` without some blocks' attention."""
    total = 0.0
    with without_attention(decoder, dropped):
        for window in windows:
            ids = window[window != PADDING].to(decoder.model.device)  # (T,)
            logits = decoder.model(ids[None], use_cache=False).logits[0, :-1].float()  # (T - 1, V)
            total += functional.cross_entropy(logits, ids[1:]).item()
    return total / len(windows)
