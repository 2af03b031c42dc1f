"""Change the shapes of a model: the only module that does."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from cfsp_framework.api.data import Update
from cfsp_framework.api.records import PruningPlan
from cfsp_framework.errors import ConfigError, ModelError, PlanError
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.feed_forwards import (
    DenseFeedForward,
    ExpertFeedForwards,
    FeedForwardModule,
    Projection,
    matrix,
)
from cfsp_framework.modeling.variable_width import ZeroResidual


def check_fits(decoder: Decoder, plan: PruningPlan) -> None:
    """Refuse a plan for a model of other shapes.

    Raises:
        PlanError: family, blocks, feed-forwards or widths differ, or Transformers could not build the result.
    """
    if plan.model.family != decoder.architecture.family or plan.last_block != len(decoder.blocks) - 1:
        raise PlanError(
            f"the plan is for a {plan.model.family} model of {plan.last_block + 1} blocks; "
            f"this is a {decoder.architecture.family} model of {len(decoder.blocks)}."
        )
    places = decoder.places
    for entry, planned in enumerate(plan.blocks):
        place = places[entry] if entry < len(places) else None
        if (planned.block, planned.path, planned.width) != place:
            actual = f"{place[1] or 'the block itself'} of width {place[2]} in block {place[0]}" if place else "nothing"
            raise PlanError(
                f"the plan's entry {entry} is block {planned.block}, {planned.path}, width {planned.width}; "
                f"the model has {actual} in its place."
            )
    if len(places) != len(plan.blocks):
        raise PlanError(f"the plan has {len(plan.blocks)} feed-forwards; the model has {len(places)}.")
    for index, entries in plan.by_block().items():
        for group in decoder.groups(index):
            members = [entries.pop(0) for module in group.modules for _ in module.paths]
            if len({Fraction(len(entry.kept), entry.width) for entry in members}) > 1:
                raise PlanError(
                    f"the plan keeps different shares of {members[0].path} and others in block {index}, whose widths are "
                    f"set by one value, {group.key}."
                )
    _check_buildable(decoder, plan)


def _check_buildable(decoder: Decoder, plan: PruningPlan) -> None:
    """Refuse widths that Transformers cannot build or run."""
    model = decoder.model
    if not model._no_split_modules and len(set(plan.widths)) > 1:
        raise PlanError(
            f"Transformers cannot build {plan.model.family} blocks of different widths, and the plan's differ; use "
            "--allocator uniform and a ratio that leaves them equal."
        )
    step = expert_step(decoder)
    experts = [entry for entry in plan.blocks if entry.path[-1:].isdigit()] if step > 1 else []
    odd = [entry for entry in experts if len(entry.kept) % step and len(entry.kept) < entry.width]
    if odd:
        raise PlanError(
            f"the plan leaves {len(odd[0].kept)} channels in {odd[0].path} of block {odd[0].block}; the products of experts "
            f"need multiples of {step} in {str(model.dtype).removeprefix('torch.')}. Use a multiple of {step} as --round-to."
        )


def expert_step(decoder: Decoder) -> int:
    """Return the number that widths must be multiples of: rows of experts start at multiples of 16 bytes (grouped_mm)."""
    mixed = any(
        isinstance(module, ExpertFeedForwards)
        for index in range(len(decoder.blocks))
        for module in decoder.feed_forward_modules(index)
    )
    return max(1, 16 // decoder.model.dtype.itemsize) if mixed else 1


def drop_attention(decoder: Decoder, blocks: Sequence[int]) -> None:
    """Remove the attention of some blocks and list them in the configuration."""
    path = decoder.architecture.attention
    if not blocks or path is None:
        return
    for block in blocks:
        decoder.blocks[block].set_submodule(path, ZeroResidual())
    decoder.config.dropped_attention = {"path": path, "blocks": sorted({*blocks, *dropped_attention(decoder.config)})}


@contextmanager
def without_attention(decoder: Decoder, blocks: Sequence[int]) -> Generator[None]:
    """Run without the attention of some blocks while the context is open.

    Raises:
        ModelError: the family cannot run without its attention.
    """
    path = decoder.architecture.attention
    if path is None:
        raise ModelError(f"the attention of {decoder.architecture.family} models cannot be dropped.")
    attentions = {block: decoder.blocks[block].get_submodule(path) for block in blocks}
    try:
        for block in blocks:
            decoder.blocks[block].set_submodule(path, ZeroResidual())
        yield
    finally:
        for block, attention in attentions.items():
            decoder.blocks[block].set_submodule(path, attention)


def dropped_attention(config: PreTrainedConfig) -> list[int]:
    """Return the blocks without attention."""
    return list((config.to_dict().get("dropped_attention") or {}).get("blocks", ()))


def added_biases(config: PreTrainedConfig) -> list[str]:
    """Return the dotted paths, inside a block, of projections with a bias that their family lacks."""
    return list(config.to_dict().get("added_biases") or ())


@torch.no_grad()
def cut_block(decoder: Decoder, index: int, kept: Sequence[Tensor]) -> None:
    """Keep the channels ``kept[i] (K,)`` of block ``index``'s feed-forward ``i``: ``F`` becomes ``K`` everywhere."""
    remaining = list(kept)
    for group in decoder.groups(index):
        for module in group.modules:
            channels, width = remaining[: len(module.paths)], module.width
            del remaining[: len(module.paths)]
            if isinstance(module, DenseFeedForward):
                _cut_dense(module, channels[0])
            elif isinstance(module, ExpertFeedForwards):
                _cut_experts(module, channels)
            set_width_attributes(module.module, width, len(channels[0]))


def _cut_dense(module: DenseFeedForward, kept: Tensor) -> None:
    layout, width = module.layout, module.width
    for name, projection in module.projections.items():
        rows = kept.to(projection.weight.device)
        if name == layout.down:
            weight = matrix(projection)[:, rows]  # (D, K)
        else:
            rows = torch.cat([rows, rows + width]) if layout.fused else rows  # [gate; up], or one of them
            weight = matrix(projection)[rows]  # (K or 2K, D)
            if projection.bias is not None:
                projection.bias = _parameter(projection.bias[rows], projection.bias)  # (K or 2K,)
        projection.weight = _parameter(weight.mT if isinstance(projection, Conv1D) else weight, projection.weight)
        if isinstance(projection, Conv1D):
            projection.nx, projection.nf = projection.weight.shape
        else:
            projection.out_features, projection.in_features = projection.weight.shape


def _cut_experts(experts: ExpertFeedForwards, kept: Sequence[Tensor]) -> None:
    layout, width, module = experts.layout, experts.width, experts.module
    down = module.get_parameter(layout.down)
    channels = torch.stack(list(kept)).to(down.device)  # (E, K)
    rows = channels
    if layout.fused:
        pairs = (channels, channels + width) if experts.concatenated else (2 * channels, 2 * channels + 1)
        rows = torch.cat(pairs, 1) if experts.concatenated else torch.stack(pairs, 2).flatten(1)  # (E, 2K)
    up_axis, down_axis = (1, 0) if experts.transposed else (0, 1)  # of one expert's matrix
    setattr(module, layout.up, _select(module.get_parameter(layout.up), rows, up_axis))
    if experts.biased:
        name = f"{layout.up}_bias"
        setattr(module, name, _select(module.get_parameter(name), rows, 0))
    setattr(module, layout.down, _select(down, channels, down_axis))


def _select(parameter: nn.Parameter, indices: Tensor, axis: int) -> nn.Parameter:
    """Select ``indices (E, K)`` of every expert along ``axis`` of its own part of ``parameter (E, ...)``."""
    selected = [expert.index_select(axis, index) for expert, index in zip(parameter, indices, strict=True)]
    return _parameter(torch.stack(selected), parameter)


_WIDTH_ATTRIBUTES = ("intermediate_size", "ffn_dim", "hidden_dim", "expert_dim", "intermediate_dim", "ffn_hidden_size")


def set_width_attributes(module: nn.Module, width: int, kept: int) -> None:
    """Replace ``width`` by ``kept`` in the attributes that a module keeps its width in."""
    for name in _WIDTH_ATTRIBUTES:
        if module.__dict__.get(name) == width:
            setattr(module, name, kept)


@torch.no_grad()
def apply_updates(decoder: Decoder, index: int, updates: Sequence[Update]) -> None:
    """Write a compensator's changes into block ``index`` after its cut, in the model's dtype.

    Raises:
        ConfigError: a change gives experts a bias that they lack.
    """
    remaining = list(updates)
    for group in decoder.groups(index):
        for module in group.modules:
            for member in range(len(module.paths)):
                _apply_update(module, member, remaining.pop(0))


def _apply_update(module: FeedForwardModule, member: int, update: Update) -> None:
    for name in ("down", "down_bias", "up", "gate", "up_bias", "gate_bias"):
        value: Tensor | None = getattr(update, name)
        if value is None:
            continue
        if module.weights(member).get(name) is None:
            _add_bias(module, name)
        weight = module.weights(member)[name]
        assert weight is not None, "the bias exists by now, and the host checked that there is a gate"
        weight.copy_(value)


def _add_bias(module: FeedForwardModule, name: str) -> None:
    """Add the bias ``name`` of zeros to a projection whose family lacks it."""
    if not isinstance(module, DenseFeedForward):
        raise ConfigError(f"{module.layout.path}: these experts have no biases; choose a compensator that adds none.")
    projection = module.projections[_projection_of(module, name)]
    projection.bias = nn.Parameter(torch.zeros_like(matrix(projection)[:, 0]))  # (out,)


def _projection_of(module: FeedForwardModule, name: str) -> str:
    """Return the attribute of the projection that a bias, named as in ``Update``, belongs to."""
    attribute = {"down_bias": module.layout.down, "up_bias": module.layout.up}.get(name, module.layout.gate)
    assert attribute is not None, "a feed-forward without a gate has no gate bias"
    return attribute


def projections_without_bias(decoder: Decoder) -> set[tuple[str, str]]:
    """Return path and attribute of every projection that lacks a bias in some block."""
    return {place for place, projection in _dense_projections(decoder) if projection.bias is None}


def align_biases(decoder: Decoder, without_bias: set[tuple[str, str]]) -> None:
    """Give all blocks a zero bias where a compensator added one in some block, and list it in the configuration.

    A configuration describes one setting for all blocks: either all of them have the bias or none.
    """
    with_bias = {place for place, projection in _dense_projections(decoder) if projection.bias is not None}
    added = added_biases(decoder.config)
    for place in sorted(without_bias & with_bias):
        for _, projection in (entry for entry in _dense_projections(decoder) if entry[0] == place):
            if projection.bias is None:
                rows = matrix(projection)[:, 0]  # (out,), on the meta device in a block that is not loaded
                device = "cpu" if rows.is_meta else rows.device
                projection.bias = nn.Parameter(torch.zeros_like(rows, device=device))
        added.append(".".join(place).removeprefix("."))
    if added:
        decoder.config.added_biases = added


def _dense_projections(decoder: Decoder) -> Iterator[tuple[tuple[str, str], Projection]]:
    """Yield path and attribute of every projection outside mixtures, and the projection, block by block."""
    for index in range(len(decoder.blocks)):
        for module in decoder.feed_forward_modules(index):
            if isinstance(module, DenseFeedForward):
                for name, projection in module.projections.items():
                    yield (module.layout.path, name), projection


def describe_widths(decoder: Decoder) -> None:
    """Write the widths of the modules into the configuration.

    Equal widths give an ordinary configuration. Else the global values stay and every block's widths are listed, so
    that a program that cannot read the list fails loudly. The list is also written where biases were added or attention
    was dropped, since the checkpoint would otherwise load, silently, as another model.

    Raises:
        ConfigError: attention was dropped but no width changed.
    """
    config = decoder.config
    blocks = [{group.key: group.width for group in decoder.groups(index)} for index in range(len(decoder.blocks))]
    widths: dict[str, set[int]] = {}
    for block in blocks:
        for key, width in block.items():
            widths.setdefault(key, set()).add(width)
    config.per_layer_config = None
    values = config.to_dict()
    special = added_biases(config) or dropped_attention(config)
    if special and all(distinct == {values[key]} for key, distinct in widths.items()):
        raise ConfigError(
            "a model that loses attention needs a narrower feed-forward too, or a loader could not distinguish it."
        )
    listed = [key for key in widths if isinstance(values[key], list)]
    if listed:  # Gemma 3n's own configuration has a width for each block
        for key in listed:
            setattr(config, key, [block[key] for block in blocks])
    elif all(len(distinct) == 1 for distinct in widths.values()) and not special:
        for key, (width,) in widths.items():
            setattr(config, key, width)
    else:
        config.per_layer_config = dict(enumerate(blocks))


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=like.requires_grad)
