"""What a model has to train: the matrices of its blocks, the parameters behind them, and their precision meanwhile."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from cfsp_framework.api.data import BlockRecovery, RecoveryPlan, TrainableBlock
from cfsp_framework.api.records import PruningPlan
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.feed_forwards import DenseFeedForward, FeedForwardModule, Projection, matrix


def trainable_blocks(decoder: Decoder, plan: PruningPlan) -> tuple[TrainableBlock, ...]:
    """What each block holds once it is cut by the plan; the model may be cut already."""
    kept = {(entry.block, entry.path): len(entry.kept) for entry in plan.blocks}
    found: list[TrainableBlock] = []
    for index, block in enumerate(decoder.blocks):
        feed_forward: dict[str, tuple[int, ...]] = {}
        for module in decoder.feed_forward_modules(index):
            feed_forward |= _matrices(module, kept[index, module.paths[0]])
        found.append(TrainableBlock(index, feed_forward, _attention(block, feed_forward)))
    return tuple(found)


def _matrices(module: FeedForwardModule, width: int) -> dict[str, tuple[int, ...]]:
    """The matrices of a module whose feed-forwards have ``width`` channels, by path inside the block."""
    layout, experts = module.layout, (len(module.paths),) if module.experts else ()
    down = module.weights(0)["down"]
    assert down is not None
    hidden = down.shape[0]
    up = (*experts, width * (1 + layout.fused), hidden)
    shapes = {layout.gate: up, layout.up: up, layout.down: (*experts, hidden, width)}
    return {f"{layout.path}.{name}".removeprefix("."): shape for name, shape in shapes.items() if name is not None}


def _attention(block: nn.Module, others: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """The projections ``(out, in)`` of a block's attention, known by its name."""
    return {
        path: tuple(matrix(module).shape)
        for path, module in block.named_modules()
        if isinstance(module, Projection) and path not in others and re.search(r"attn|attention", path)
    }


def adapted(decoder: Decoder, wanted: RecoveryPlan, blocks: Sequence[TrainableBlock]) -> dict[str, BlockRecovery]:
    """The full names of the matrices that get adapters, with what their block's plan says."""
    found: dict[str, BlockRecovery] = {}
    for one in wanted.blocks:
        block = blocks[one.block]
        there = {*block.feed_forward, *block.attention}
        for path in wanted.targets or block.feed_forward:
            if one.rank and path in there:
                found[f"{decoder.architecture.blocks}.{one.block}.{path}"] = one
    return found


def feed_forward_parameters(decoder: Decoder, plan: RecoveryPlan) -> list[nn.Parameter]:
    """The parameters of the feed-forwards in the blocks that are trained."""
    found: dict[int, nn.Parameter] = {}
    for one in plan.blocks:
        for module in decoder.feed_forward_modules(one.block) if one.rank else ():
            for parameter in _parameters(module):
                found[id(parameter)] = parameter
    return list(found.values())


def _parameters(module: FeedForwardModule) -> Generator[nn.Parameter]:
    if isinstance(module, DenseFeedForward):
        for projection in module.projections.values():
            yield from projection.parameters()
        return
    names = {module.layout.up, module.layout.down, module.layout.gate}
    for name, parameter in module.module.named_parameters(recurse=False):
        if name.removesuffix("_bias") in names:
            yield parameter


@contextmanager
def trained_precision(decoder: Decoder, plan: RecoveryPlan) -> Generator[bool]:
    """While open, what is trained is float32, and all else too unless the device computes in bfloat16: yields that.

    Afterwards every parameter and buffer has its own dtype again. What was not trained comes back to the last bit.
    """
    model = decoder.model
    autocast = decoder.device.type == "cuda" and torch.cuda.is_bf16_supported()
    own = {id(tensor): tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    wide = feed_forward_parameters(decoder, plan) if plan.full else []
    for tensor in wide if autocast else (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    try:
        yield autocast
    finally:
        for tensor in (*model.parameters(), *model.buffers()):
            dtype = own.get(id(tensor), tensor.dtype)
            if tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
