"""Measure statistics of gradients with one backward pass through the whole model per window."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cfsp_framework.api.components import Collector
from cfsp_framework.api.data import BlockStatistics, Site
from cfsp_framework.data.windows import PADDING
from cfsp_framework.engine.measure import BlockCollectors, observed_feed_forwards
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
    """Measure every block's feed-forwards at ``Site.GRADIENT``, one window of ``windows (N, T)`` at a time.

    Inputs are the channel activations ``(T, F)``, outputs the gradients of the window's mean next-token cross-entropy
    with respect to them, ``(T, F)``. No weight gradient is computed or stored.
    """
    options = forward_options or ForwardOptions()
    states = [
        BlockCollectors(collectors, [feed_forward.path for feed_forward in decoder.feed_forwards(index)])
        for index in range(len(decoder.blocks))
    ]
    numbers = options.ranks.share(len(windows))
    with _frozen_parameters(decoder), progress.bar("gradients", total=len(numbers)) as step:
        for number in numbers:
            ids = windows[number]  # (T,)
            ids = ids[ids != PADDING].to(decoder.device)[None]  # (1, T)
            skipped = torch.isin(ids, torch.tensor(sorted(options.skip), dtype=ids.dtype, device=ids.device))  # (1, T)
            batch = Batch(ids[..., None], (), (number,), ~skipped if skipped.any() else None)
            weights = torch.ones(ids.shape[1], device=decoder.device)  # (T,): gradients weigh tokens themselves
            for index, member, io, gradient in _backward(decoder, ids):
                rows = io.activations.detach().flatten(0, -2), gradient.flatten(0, -2)  # (n, F) each
                states[index].add_feed_forward(member, [(Site.GRADIENT, *rows)], weights, io.tokens, batch)
            step()
    return tuple(block.values(index, options.ranks) for index, block in enumerate(states))


@contextmanager
def _frozen_parameters(decoder: Decoder) -> Generator[None]:
    """Ask for no weight gradients while the context is open."""
    trainable = [parameter for parameter in decoder.model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _backward(decoder: Decoder, ids: Tensor) -> Sequence[tuple[int, int, FeedForwardIO, Tensor]]:
    """Run one window ``ids (1, T)`` forward and backward.

    Returns block, number of the feed-forward, its inputs and outputs, and the loss's gradient with respect to its
    activations.
    """
    embeddings: Any = decoder.model.get_input_embeddings()
    with torch.enable_grad(), ExitStack() as hooks:
        # Weights are frozen, so the graph starts at the embeddings' output.
        handle = embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        hooks.callback(handle.remove)
        blocks = [hooks.enter_context(observed_feed_forwards(decoder, index)) for index in range(len(decoder.blocks))]
        logits = decoder.model(ids, use_cache=False).logits[0, :-1].float()  # (T - 1, V)
        loss = functional.cross_entropy(logits, ids[0, 1:])
        observed = [(index, member, io) for index, block in enumerate(blocks) for member, io in block]
        gradients = torch.autograd.grad(loss, [io.activations for _, _, io in observed], materialize_grads=True)
    return [(*entry, gradient) for entry, gradient in zip(observed, gradients, strict=True)]
