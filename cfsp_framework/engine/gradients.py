"""One backward through the whole model for statistics of gradients; only collectors of Site.GRADIENT ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cfsp_framework.api.components import Collector
from cfsp_framework.api.data import BlockStatistics, Site
from cfsp_framework.data.windows import PADDING
from cfsp_framework.engine.measure import BlockCollectors, listening
from cfsp_framework.engine.replay import Batch, ForwardOptions
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.feed_forwards import FeedForwardIO
from cfsp_framework.runtime.progress import Progress


def measure_gradients(
    decoder: Decoder,
    windows: Tensor,
    collectors: Sequence[ConfiguredComponent[Collector]],
    progress: Progress,
    forward_options: ForwardOptions | None = None,
) -> tuple[tuple[BlockStatistics, ...], ...]:
    """What the collectors measured of every block's feed-forwards, one window ``(T,)`` of ``windows (N, T)`` at a time.

    Their inputs are the channel activations ``(T, F)`` and their outputs the gradients of the window's mean next-token
    cross-entropy with respect to them, ``(T, F)``. No weight gradient is computed or stored.
    """
    forward_options = forward_options or ForwardOptions()
    count = len(decoder.blocks)
    running = [
        BlockCollectors(collectors, [one.path for one in decoder.feed_forwards(block)]) for block in range(count)
    ]
    needing = [parameter for parameter in decoder.model.parameters() if parameter.requires_grad]
    for parameter in needing:
        parameter.requires_grad_(False)
    numbers = forward_options.ranks.share(len(windows))
    try:
        with progress.bar("gradients", total=len(numbers)) as step:
            for number in numbers:
                ids = windows[number]  # (T,)
                ids = ids[ids != PADDING].to(decoder.device)[None]  # (1, T)
                _hear(_backward(decoder, ids), running, number, ids, forward_options)
                step()
    finally:
        for parameter in needing:
            parameter.requires_grad_(True)
    return tuple(tallies.values(block, forward_options.ranks) for block, tallies in enumerate(running))


Gradients = Sequence[tuple[int, int, FeedForwardIO, Tensor]]
"""Block, feed-forward, what it saw, and the gradient with respect to its activations."""


def _hear(
    found: Gradients, running: Sequence[BlockCollectors], number: int, ids: Tensor, forward_options: ForwardOptions
) -> None:
    skipped = torch.isin(ids, torch.tensor(sorted(forward_options.skip), dtype=ids.dtype, device=ids.device))  # (1, T)
    counted = ~skipped if skipped.any() else None
    batch = Batch(ids[..., None], (), (number,), counted)
    for block, member, heard, gradient in found:
        rows = heard.activations.detach().flatten(0, -2), gradient.flatten(0, -2)  # (n, F) each
        running[block].hear(member, [(Site.GRADIENT, *rows, heard.tokens)], batch)


def _backward(decoder: Decoder, ids: Tensor) -> Gradients:
    """One window ``ids (1, T)`` forward and back: what every feed-forward saw, and the loss's gradient there."""
    embeddings: Any = decoder.model.get_input_embeddings()
    with torch.enable_grad(), ExitStack() as hooks:
        # Nothing else asks for gradients, so the graph starts at the embeddings' output.
        handle = embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        hooks.callback(handle.remove)
        seen = [hooks.enter_context(listening(decoder, index)) for index in range(len(decoder.blocks))]
        logits = decoder.model(ids, use_cache=False).logits[0, :-1].float()  # (T - 1, V)
        loss = functional.cross_entropy(logits, ids[0, 1:])
        heard = [(block, member, one) for block, found in enumerate(seen) for member, one in found]
        gradients = torch.autograd.grad(loss, [one.activations for _, _, one in heard], materialize_grads=True)
    return [(*told, gradient) for told, gradient in zip(heard, gradients, strict=True)]
