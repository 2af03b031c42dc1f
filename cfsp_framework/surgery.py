"""The only module that changes shapes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .api import Update
from .architectures import Decoder
from .errors import ConfigError, ModelError, PlanError
from .heterogeneous import StandIn
from .planning import PruningPlan


def check_fits(decoder: Decoder, plan: PruningPlan) -> None:
    """Refuse a plan for a model of other shapes."""
    if plan.model.family != decoder.architecture.family or len(plan.blocks) != len(decoder.blocks):
        raise PlanError(
            f"the plan is for a {plan.model.family} model of {len(plan.blocks)} blocks; "
            f"this is a {decoder.architecture.family} model of {len(decoder.blocks)}."
        )
    for index, (block, width) in enumerate(zip(plan.blocks, decoder.widths, strict=True)):
        if (block.block, block.path, block.width) != (index, decoder.architecture.feed_forward.path, width):
            raise PlanError(
                f"the plan's entry {index} is block {block.block}, {block.path}, width {block.width}; "
                f"the model has {decoder.architecture.feed_forward.path} of width {width} there."
            )


def apply_plan(decoder: Decoder, plan: PruningPlan, compensate: Callable[[int, Tensor], Update]) -> None:
    """Cut every block to its kept channels and write what ``compensate(block, kept)`` answers, block by block.

    Raises:
        PlanError: the plan is for a model of other shapes; nothing is changed.
    """
    check_fits(decoder, plan)
    lacking = [name for name, linear in decoder.projections(0).items() if linear.bias is None]
    for index, block in enumerate(plan.blocks):
        if len(block.kept) < block.width:
            kept = torch.tensor(block.kept)  # (K,)
            update = compensate(index, kept)
            cut_block(decoder, index, kept)
            apply_update(decoder, index, update)
    _align_biases(decoder, lacking)
    _describe_widths(decoder)


def drop_attention(decoder: Decoder, blocks: Sequence[int]) -> None:
    """Take the attention out of some blocks, and say so in the configuration."""
    path = decoder.architecture.attention
    if not blocks or path is None:
        return
    for block in blocks:
        decoder.blocks[block].set_submodule(path, StandIn())
    decoder.config.dropped_attention = {"path": path, "blocks": sorted({*blocks, *dropped_attention(decoder.config)})}


@contextmanager
def without_attention(decoder: Decoder, blocks: Sequence[int]) -> Generator[None]:
    """While open, some blocks do without their attention."""
    path = decoder.architecture.attention
    if path is None:
        raise ModelError(f"the attention of {decoder.architecture.family} models cannot be dropped.")
    own = {block: decoder.blocks[block].get_submodule(path) for block in blocks}
    try:
        for block in blocks:
            decoder.blocks[block].set_submodule(path, StandIn())
        yield
    finally:
        for block, attention in own.items():
            decoder.blocks[block].set_submodule(path, attention)


def dropped_attention(config: PreTrainedConfig) -> list[int]:
    """Blocks without attention."""
    return list((config.to_dict().get("dropped_attention") or {}).get("blocks", ()))


def added_biases(config: PreTrainedConfig) -> list[str]:
    """Dotted paths, inside a block, of the projections that were given a bias their family lacks."""
    return list(config.to_dict().get("added_biases") or ())


@torch.no_grad()
def cut_block(decoder: Decoder, index: int, kept: Tensor) -> None:
    """Keep the channels ``kept (K,)`` of block ``index``'s feed-forward: ``F`` becomes ``K`` in every projection."""
    layout, width = decoder.architecture.feed_forward, decoder.widths[index]
    for name, linear in decoder.projections(index).items():
        where = kept.to(linear.weight.device)
        if name == layout.down:
            linear.weight = _parameter(linear.weight[:, where], linear.weight)  # (D, K)
            linear.in_features = len(kept)
            continue
        rows = torch.cat([where, where + width]) if layout.fused else where  # [gate; up], or one of them
        linear.weight = _parameter(linear.weight[rows], linear.weight)  # (K or 2K, D)
        if linear.bias is not None:
            linear.bias = _parameter(linear.bias[rows], linear.bias)  # (K or 2K,)
        linear.out_features = len(rows)
    parent = decoder.blocks[index].get_submodule(layout.path)
    if getattr(parent, decoder.architecture.width_key, None) == width:
        setattr(parent, decoder.architecture.width_key, len(kept))


@torch.no_grad()
def apply_update(decoder: Decoder, index: int, update: Update) -> None:
    """Write a compensator's change into block ``index``, which is cut already, in the model's dtype."""
    layout, projections = decoder.architecture.feed_forward, decoder.projections(index)
    up = projections[layout.up]
    first = len(up.weight) // 2 if layout.fused else 0  # of the rows [gate; up], or of up alone
    _write(projections[layout.down], update.down, update.down_bias)
    _write(up, update.up, update.up_bias, slice(first, None))
    if layout.gate is not None:
        rows = slice(first) if layout.fused else slice(None)
        _write(projections[layout.gate], update.gate, update.gate_bias, rows)


def _write(linear: nn.Linear, weight: Tensor | None, bias: Tensor | None, rows: slice = slice(None)) -> None:
    if weight is not None:
        linear.weight[rows].copy_(weight)
    if bias is not None:
        if linear.bias is None:
            linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))  # (out,)
        linear.bias[rows].copy_(bias)


def _align_biases(decoder: Decoder, lacking: Sequence[str]) -> None:
    """Where a compensator gave some block a bias the family lacks, give a zero one to the others, and say so.

    A configuration describes one setting for all blocks: either all of them have the bias or none.
    """
    added = added_biases(decoder.config)
    for name in lacking:
        linears = [decoder.projections(index)[name] for index in range(len(decoder.blocks))]
        if all(linear.bias is None for linear in linears):
            continue
        for linear in linears:
            if linear.bias is None:
                linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))  # (out,)
        added.append(f"{decoder.architecture.feed_forward.path}.{name}")
    if added:
        decoder.config.added_biases = added


def _describe_widths(decoder: Decoder) -> None:
    """Write the widths the modules have into the configuration.

    Equal widths make an ordinary configuration. Else the global value stays what it was and every block that differs
    from it is listed, so that a program that cannot read the list fails loudly. The same is done where biases were
    added or attention dropped: else such a checkpoint would load as something else and nobody would be told.
    """
    config, key = decoder.config, decoder.architecture.width_key
    widths = decoder.widths
    config.per_layer_config = None
    special = added_biases(config) or dropped_attention(config)
    if special and set(widths) == {config.to_dict()[key]}:
        raise ConfigError(
            "a model without some attention needs a narrower feed-forward too, or nothing tells it apart."
        )
    if len(set(widths)) == 1 and not special:
        setattr(config, key, widths[0])
    else:
        config.per_layer_config = {index: {key: width} for index, width in enumerate(widths)}


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=like.requires_grad)
