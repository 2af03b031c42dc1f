"""The only module that changes shapes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from cfsp_framework.api.data import Update
from cfsp_framework.api.records import BlockPlan, PruningPlan
from cfsp_framework.errors import ConfigError, ModelError, PlanError
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.feed_forwards import DenseFeedForward, ExpertFeedForwards, FeedForwardModule, matrix
from cfsp_framework.modeling.variable_width import ZeroResidual

Compensate = Callable[[int, Sequence[Tensor]], Sequence[Update]]
"""Answers ``(block, kept channels of each of its feed-forwards)`` with a change for each."""


def check_fits(decoder: Decoder, plan: PruningPlan) -> None:
    """Refuse a plan for a model of other shapes."""
    if plan.model.family != decoder.architecture.family or plan.last_block != len(decoder.blocks) - 1:
        raise PlanError(
            f"the plan is for a {plan.model.family} model of {plan.last_block + 1} blocks; "
            f"this is a {decoder.architecture.family} model of {len(decoder.blocks)}."
        )
    places = decoder.places
    for entry, planned in enumerate(plan.blocks):
        place = places[entry] if entry < len(places) else None
        if (planned.block, planned.path, planned.width) != place:
            there = f"{place[1] or 'the block itself'} of width {place[2]} in block {place[0]}" if place else "nothing"
            raise PlanError(
                f"the plan's entry {entry} is block {planned.block}, {planned.path}, width {planned.width}; "
                f"the model has {there} there."
            )
    if len(places) != len(plan.blocks):
        raise PlanError(f"the plan has {len(plan.blocks)} feed-forwards; the model has {len(places)}.")
    for index, entries in _by_block(plan).items():
        for group in decoder.groups(index):
            mine = [entries.pop(0) for module in group.modules for _ in module.paths]
            if len({Fraction(len(entry.kept), entry.width) for entry in mine}) > 1:
                raise PlanError(
                    f"the plan keeps different shares of {mine[0].path} and others in block {index}, whose width is one "
                    f"value, {group.key}."
                )
    _check_buildable(decoder, plan)


def _check_buildable(decoder: Decoder, plan: PruningPlan) -> None:
    """Refuse widths that Transformers could not build or run."""
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
            f"need multiples of {step} in {str(model.dtype).removeprefix('torch.')}. Use a --round-to that is one."
        )


def expert_step(decoder: Decoder) -> int:
    """What widths have to be multiples of: rows of experts' matrices start at multiples of 16 bytes (grouped_mm)."""
    mixed = any(
        isinstance(module, ExpertFeedForwards)
        for index in range(len(decoder.blocks))
        for module in decoder.feed_forward_modules(index)
    )
    return max(1, 16 // decoder.model.dtype.itemsize) if mixed else 1


def _by_block(plan: PruningPlan) -> dict[int, list[BlockPlan]]:
    """The entries of every block."""
    entries: dict[int, list[BlockPlan]] = {}
    for entry in plan.blocks:
        entries.setdefault(entry.block, []).append(entry)
    return entries


def apply_plan(
    decoder: Decoder, plan: PruningPlan, compensate: Compensate, advance: Callable[[int], None] = lambda index: None
) -> None:
    """Cut every block to its kept channels and write what ``compensate(block, kept)`` answers, block by block.

    ``advance(block)`` is called while the block is still resident and is what it will be.

    Raises:
        PlanError: the plan is for a model of other shapes; nothing is changed.
    """
    check_fits(decoder, plan)
    lacking = _lacking_biases(decoder)
    for index, entries in _by_block(plan).items():
        with decoder.loaded(index):
            if any(len(entry.kept) < entry.width for entry in entries):
                kept = [torch.tensor(entry.kept) for entry in entries]  # (K,) each
                updates = compensate(index, kept)
                cut_block(decoder, index, kept)
                apply_updates(decoder, index, updates)
            advance(index)
    _align_biases(decoder, lacking)
    describe_widths(decoder)


def drop_attention(decoder: Decoder, blocks: Sequence[int]) -> None:
    """Take the attention out of some blocks, and say so in the configuration."""
    path = decoder.architecture.attention
    if not blocks or path is None:
        return
    for block in blocks:
        decoder.blocks[block].set_submodule(path, ZeroResidual())
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
            decoder.blocks[block].set_submodule(path, ZeroResidual())
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
def cut_block(decoder: Decoder, index: int, kept: Sequence[Tensor]) -> None:
    """Keep the channels ``kept[i] (K,)`` of block ``index``'s feed-forward ``i``: ``F`` becomes ``K`` everywhere."""
    remaining = list(kept)
    for group in decoder.groups(index):
        for module in group.modules:
            mine, width = remaining[: len(module.paths)], module.width
            del remaining[: len(module.paths)]
            if isinstance(module, DenseFeedForward):
                _cut_single(module, mine[0])
            elif isinstance(module, ExpertFeedForwards):
                _cut_experts(module, mine)
            set_width_attributes(module.module, width, len(mine[0]))


def _cut_single(module: DenseFeedForward, kept: Tensor) -> None:
    layout, width = module.layout, module.width
    for name, projection in module.projections.items():
        where = kept.to(projection.weight.device)
        if name == layout.down:
            narrow = matrix(projection)[:, where]  # (D, K)
        else:
            where = torch.cat([where, where + width]) if layout.fused else where  # [gate; up], or one of them
            narrow = matrix(projection)[where]  # (K or 2K, D)
            if projection.bias is not None:
                projection.bias = _parameter(projection.bias[where], projection.bias)  # (K or 2K,)
        stored = narrow.mT if isinstance(projection, Conv1D) else narrow
        projection.weight = _parameter(stored, projection.weight)
        if isinstance(projection, Conv1D):
            projection.nx, projection.nf = projection.weight.shape
        else:
            projection.out_features, projection.in_features = projection.weight.shape


def _cut_experts(experts: ExpertFeedForwards, kept: Sequence[Tensor]) -> None:
    layout, width, module = experts.layout, experts.width, experts.module
    down = module.get_parameter(layout.down)
    where = torch.stack(list(kept)).to(down.device)  # (E, K)
    rows = where
    if layout.fused:
        rows = (
            torch.cat([where, where + width], 1) if experts.concatenated else torch.stack([2 * where, 2 * where + 1], 2)
        ).flatten(1)  # (E, 2K)
    up_axis, down_axis = (1, 0) if experts.transposed else (0, 1)  # of one expert's matrix
    setattr(module, layout.up, _taken(module.get_parameter(layout.up), rows, up_axis))
    if experts.biased:
        name = f"{layout.up}_bias"
        setattr(module, name, _taken(module.get_parameter(name), rows, 0))
    setattr(module, layout.down, _taken(down, where, down_axis))


def _taken(parameter: nn.Parameter, index: Tensor, axis: int) -> nn.Parameter:
    """The entries ``index (E, K)`` of every expert along ``axis`` of its own part of ``parameter (E, ...)``."""
    return _parameter(
        torch.stack([one.index_select(axis, mine) for one, mine in zip(parameter, index, strict=True)]), parameter
    )


_WIDTH_ATTRIBUTES = ("intermediate_size", "ffn_dim", "hidden_dim", "expert_dim", "intermediate_dim", "ffn_hidden_size")


def set_width_attributes(module: nn.Module, width: int, kept: int) -> None:
    """Where a module keeps its width as an attribute, that changes too."""
    for name in _WIDTH_ATTRIBUTES:
        if module.__dict__.get(name) == width:
            setattr(module, name, kept)


@torch.no_grad()
def apply_updates(decoder: Decoder, index: int, updates: Sequence[Update]) -> None:
    """Write a compensator's changes into block ``index``, which is cut already, in the model's dtype."""
    remaining = list(updates)
    for group in decoder.groups(index):
        for module in group.modules:
            for member in range(len(module.paths)):
                _write(module, member, remaining.pop(0))


def _write(module: FeedForwardModule, member: int, update: Update) -> None:
    for name in ("down", "down_bias", "up", "gate", "up_bias", "gate_bias"):
        value: Tensor | None = getattr(update, name)
        if value is None:
            continue
        if module.weights(member).get(name) is None:
            _give_bias(module, name)
        view = module.weights(member)[name]
        assert view is not None, "biases were added, and the host checked that there is a gate"
        view.copy_(value)


def _give_bias(module: FeedForwardModule, name: str) -> None:
    """Give a projection the bias ``name`` that its family lacks, of zeros."""
    if not isinstance(module, DenseFeedForward):
        raise ConfigError(
            f"{module.layout.path}: these experts have no biases and cannot be given any; choose a compensator without."
        )
    projection = module.projections[_projection_of(module, name)]
    projection.bias = nn.Parameter(torch.zeros_like(matrix(projection)[:, 0]))  # (out,)


def _projection_of(module: FeedForwardModule, name: str) -> str:
    """The attribute of the projection that a bias called as in ``Update`` belongs to."""
    attribute = {"down_bias": module.layout.down, "up_bias": module.layout.up}.get(name, module.layout.gate)
    assert attribute is not None, "a feed-forward without a gate has no gate bias"
    return attribute


def _lacking_biases(decoder: Decoder) -> set[tuple[str, str]]:
    """Path and attribute of every projection without a bias."""
    return {
        (module.layout.path, name)
        for index in range(len(decoder.blocks))
        for module in decoder.feed_forward_modules(index)
        if isinstance(module, DenseFeedForward)
        for name, projection in module.projections.items()
        if projection.bias is None
    }


def _align_biases(decoder: Decoder, lacking: set[tuple[str, str]]) -> None:
    """Where a compensator gave some block a bias the family lacks, give a zero one to the others, and say so.

    A configuration describes one setting for all blocks: either all of them have the bias or none.
    """
    added = added_biases(decoder.config)
    for path, name in sorted(lacking - _lacking_everywhere(decoder, lacking)):
        for index in range(len(decoder.blocks)):
            for module in decoder.feed_forward_modules(index):
                if isinstance(module, DenseFeedForward) and module.layout.path == path:
                    projection = module.projections[name]
                    if projection.bias is None:
                        rows = matrix(projection)[:, 0]  # (out,), perhaps of a block that is not resident
                        device = "cpu" if rows.is_meta else rows.device
                        projection.bias = nn.Parameter(torch.zeros_like(rows, device=device))
        added.append(f"{path}.{name}".removeprefix("."))
    if added:
        decoder.config.added_biases = added


def _lacking_everywhere(decoder: Decoder, lacking: set[tuple[str, str]]) -> set[tuple[str, str]]:
    there = {
        (module.layout.path, name)
        for index in range(len(decoder.blocks))
        for module in decoder.feed_forward_modules(index)
        if isinstance(module, DenseFeedForward)
        for name, projection in module.projections.items()
        if projection.bias is not None
    }
    return lacking - there


def describe_widths(decoder: Decoder) -> None:
    """Write the widths the modules have into the configuration.

    Equal widths make an ordinary configuration. Else the global values stay what they were and every block that differs
    from them is listed, so that a program that cannot read the list fails loudly. The same is done where biases were
    added or attention dropped: else such a checkpoint would load as something else and nobody would be told.
    """
    config = decoder.config
    blocks = [{group.key: group.width for group in decoder.groups(index)} for index in range(len(decoder.blocks))]
    widths: dict[str, set[int]] = {}
    for block in blocks:
        for key, width in block.items():
            widths.setdefault(key, set()).add(width)
    config.per_layer_config = None
    own = config.to_dict()
    special = added_biases(config) or dropped_attention(config)
    if special and all(found == {own[key]} for key, found in widths.items()):
        raise ConfigError(
            "a model without some attention needs a narrower feed-forward too, or nothing tells it apart."
        )
    lists = [key for key in widths if isinstance(own[key], list)]
    if lists:  # Gemma 3n has a width per block of its own accord
        for key in lists:
            setattr(config, key, [block[key] for block in blocks])
    elif all(len(found) == 1 for found in widths.values()) and not special:
        for key, (width,) in widths.items():
            setattr(config, key, width)
    else:
        config.per_layer_config = dict(enumerate(blocks))


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=like.requires_grad)
