"""One backward through the whole model for statistics of gradients; only collectors of Site.GRADIENT ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .api import Collector, Statistic
from .architectures import Decoder
from .blocks import listening
from .measure import feed, start
from .plugins import Chosen
from .progress import Progress


def measure_gradients(
    decoder: Decoder, windows: Tensor, collectors: Sequence[Chosen[Collector]], progress: Progress
) -> tuple[dict[Statistic, Tensor], ...]:
    """What the collectors measured in every block, one window ``(T,)`` of ``windows (N, T)`` at a time.

    Their inputs are the channel activations ``(T, F)`` and their outputs the gradients of the window's mean next-token
    cross-entropy with respect to them, ``(T, F)``. No weight gradient is computed or stored.
    """
    count = len(decoder.blocks)
    running = [[(chosen, start(chosen)) for chosen in collectors] for _ in range(count)]
    needing = [parameter for parameter in decoder.model.parameters() if parameter.requires_grad]
    for parameter in needing:
        parameter.requires_grad_(False)
    try:
        with progress.bar("gradients", total=len(windows)) as step:
            for window in windows.split(1):  # (1, T)
                activations, gradients = _backward(decoder, window.to(decoder.model.device))
                for block in range(count):
                    feed(running[block], collectors[0].component.site, activations[block], gradients[block])
                step()
    finally:
        for parameter in needing:
            parameter.requires_grad_(True)
    values: list[dict[Statistic, Tensor]] = [{} for _ in range(count)]
    for block, accumulators in enumerate(running):
        for chosen, accumulator in accumulators:
            with chosen.blamed(f"value() at block {block}") as component:
                values[block][component.provides] = accumulator.value(windows.numel()).float()
    return tuple(values)


def _backward(decoder: Decoder, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Every block's channel activations ``(1, T, F)`` and the loss's gradients with respect to them."""
    activations: list[Tensor] = []

    def remember(inputs: Tensor, _: Tensor) -> None:
        activations.append(inputs)

    embeddings: Any = decoder.model.get_input_embeddings()
    with torch.enable_grad(), ExitStack() as hooks:
        # Nothing else asks for gradients, so the graph starts at the embeddings' output.
        handle = embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        hooks.callback(handle.remove)
        for index in range(len(decoder.blocks)):
            hooks.enter_context(listening(decoder.down_projection(index), remember))
        logits = decoder.model(ids, use_cache=False).logits[0, :-1].float()  # (T - 1, V)
        loss = functional.cross_entropy(logits, ids[0, 1:])
        gradients = torch.autograd.grad(loss, activations)
    return [activation.detach() for activation in activations], list(gradients)
