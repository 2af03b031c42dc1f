"""Training targets: the matrices of a model's blocks, the parameters behind them, and their precision."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from cfsp_framework.api.data import BlockRecovery, RecoveryPlan, TrainableBlock
from cfsp_framework.api.records import PruningPlan
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.feed_forwards import DenseFeedForward, FeedForwardModule, Projection, matrix


def list_trainable_blocks(decoder: Decoder, plan: PruningPlan) -> tuple[TrainableBlock, ...]:
    """List the matrices of each block at the widths of the plan; the model may be cut already."""
    widths = {(entry.block, entry.path): len(entry.kept) for entry in plan.blocks}
    blocks: list[TrainableBlock] = []
    for index, block in enumerate(decoder.blocks):
        feed_forward: dict[str, tuple[int, ...]] = {}
        for module in decoder.feed_forward_modules(index):
            feed_forward |= _feed_forward_shapes(module, widths[index, module.paths[0]])
        attention = {
            path: tuple(matrix(projection).shape)  # (out, in)
            for path, projection in block.named_modules()
            if isinstance(projection, Projection) and path not in feed_forward and re.search(r"attn|attention", path)
        }
        blocks.append(TrainableBlock(index, feed_forward, attention))
    return tuple(blocks)


def _feed_forward_shapes(module: FeedForwardModule, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's matrices, by path inside the block, if its feed-forwards have ``width`` channels."""
    layout, experts = module.layout, (len(module.paths),) if module.experts else ()
    down = module.weights(0)["down"]
    assert down is not None
    hidden = down.shape[0]
    up = (*experts, width * (1 + layout.fused), hidden)
    shapes = {layout.gate: up, layout.up: up, layout.down: (*experts, hidden, width)}
    return {f"{layout.path}.{name}".removeprefix("."): shape for name, shape in shapes.items() if name is not None}


def select_matrices(decoder: Decoder, plan: RecoveryPlan, blocks: Sequence[TrainableBlock]) -> dict[str, BlockRecovery]:
    """Return the full name of every matrix that gets an adapter, with the plan of its block."""
    matrices: dict[str, BlockRecovery] = {}
    for entry in plan.blocks:
        block = blocks[entry.block]
        paths = {*block.feed_forward, *block.attention}
        for path in plan.targets or block.feed_forward:
            if entry.rank and path in paths:
                matrices[f"{decoder.architecture.blocks}.{entry.block}.{path}"] = entry
    return matrices


def list_parameters(decoder: Decoder, plan: RecoveryPlan) -> list[nn.Parameter]:
    """List the feed-forward parameters of the blocks that are trained."""
    parameters: dict[nn.Parameter, None] = {}  # a set that keeps the order
    for entry in plan.blocks:
        for module in decoder.feed_forward_modules(entry.block) if entry.rank else ():
            parameters |= dict.fromkeys(_module_parameters(module))
    return list(parameters)


def _module_parameters(module: FeedForwardModule) -> Generator[nn.Parameter]:
    if isinstance(module, DenseFeedForward):
        for projection in module.projections.values():
            yield from projection.parameters()
        return
    names = {module.layout.up, module.layout.down, module.layout.gate}
    for name, parameter in module.module.named_parameters(recurse=False):
        if name.removesuffix("_bias") in names:
            yield parameter


@contextmanager
def training_precision(decoder: Decoder, plan: RecoveryPlan) -> Generator[bool]:
    """Cast the model to float32, or only the trained weights where the device computes in bfloat16: yields which.

    On exit every parameter and buffer has its dtype again, and those that were not trained are unchanged to the last bit.
    """
    model = decoder.model
    autocast = decoder.device.type == "cuda" and torch.cuda.is_bf16_supported()
    dtypes = {id(tensor): tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    trained = list_parameters(decoder, plan) if plan.full else []
    for tensor in trained if autocast else (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    try:
        yield autocast
    finally:
        for tensor in (*model.parameters(), *model.buffers()):
            dtype = dtypes.get(id(tensor), tensor.dtype)
            if tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
