"""Pad all blocks of a pruned model to one width with channels of zeros.

A channel with zero weights and biases adds ``activation(0) * 0`` times a column of zeros, which is exactly zero. So the
result computes what the pruned model computes, and any program that supports the family can open it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cfsp_framework.errors import ConfigError, ModelError
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.feed_forwards import DenseFeedForward, ExpertFeedForwards, FeedForwardModule, matrix
from cfsp_framework.modeling.meta_init import without_weights
from cfsp_framework.pruning.surgery import (
    added_biases,
    describe_widths,
    dropped_attention,
    expert_step,
    set_width_attributes,
)

_BIAS_SETTING = "mlp_bias"
"""Key of configurations with a setting for biases of the feed-forward."""


def choose_widths(decoder: Decoder, width: int | None = None) -> dict[str, int]:
    """Return the width of all blocks for each key of the configuration: that of the widest block, or ``width``.

    The width of experts is rounded up to the step their products need.

    Raises:
        ConfigError: ``width`` is too small, or the configuration has several widths.
    """
    experts_need = expert_step(decoder)
    widest, steps = dict[str, int](), dict[str, int]()
    for index in range(len(decoder.blocks)):
        for group in decoder.groups(index):
            step = experts_need if any(module.experts for module in group.modules) else 1
            steps[group.key] = max(step, steps.get(group.key, 1))
            widest[group.key] = max(widest.get(group.key, 0), group.width)
    widest = {key: steps[key] * math.ceil(least / steps[key]) for key, least in widest.items()}
    if width is None:
        return widest
    if len(widest) > 1:
        raise ConfigError(f"--width {width}: this model has several widths, {', '.join(sorted(widest))}; omit --width.")
    ((key, least),) = widest.items()
    if width < least:
        raise ConfigError(f"--width {width}: the widest block has {least} channels; give at least as many.")
    return {key: width}


@torch.no_grad()
def pad_model(decoder: Decoder, widths: Mapping[str, int]) -> None:
    """Pad all blocks to ``widths`` and describe them in the family's own configuration; the model computes the same.

    Raises:
        ModelError: the family's own configuration cannot describe the model.
    """
    _convert_biases(decoder)
    for index in range(len(decoder.blocks)):
        for group in decoder.groups(index):
            for module in group.modules:
                _pad_module(module, widths[group.key] * module.layout.times)
    blocks = dropped_attention(decoder.config)
    decoder.config.__dict__.pop("dropped_attention", None)
    describe_widths(decoder)
    for index in blocks:
        _restore_attention(decoder, index)
    _check_ordinary(decoder)


def _convert_biases(decoder: Decoder) -> None:
    """Turn added biases into a setting of the family, with zeros in other blocks.

    Raises:
        ModelError: the family has no such setting.
    """
    added = added_biases(decoder.config)
    if not added:
        return
    if decoder.config.to_dict().get(_BIAS_SETTING) is not False:
        raise ModelError(
            f"a compensator gave this model biases ({', '.join(added)}) that no {decoder.architecture.family} "
            "checkpoint has without code; prune with another compensator, or serve the checkpoint with its code."
        )
    setattr(decoder.config, _BIAS_SETTING, True)
    decoder.config.__dict__.pop("added_biases", None)
    for index in range(len(decoder.blocks)):
        for module in decoder.feed_forward_modules(index):
            for projection in module.projections.values() if isinstance(module, DenseFeedForward) else ():
                if projection.bias is None:
                    projection.bias = nn.Parameter(torch.zeros_like(matrix(projection)[:, 0]))  # (out,)


def _restore_attention(decoder: Decoder, index: int) -> None:
    """Insert an attention of zeros in place of a dropped one; its output is exactly zero."""
    path, block = decoder.architecture.attention, decoder.blocks[index]
    assert path is not None, "an attention was dropped, so the architecture has its path"
    build: Any = type(block)
    with without_weights():
        attention = build(decoder.config, index).get_submodule(path)
    dtype, device = decoder.model.dtype, decoder.device
    for module in attention.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device)))
    block.set_submodule(path, attention)


def _pad_module(module: FeedForwardModule, width: int) -> None:
    """Append channels of zeros to every feed-forward of a module until it is ``width`` wide."""
    pruned_width = module.width
    missing = width - pruned_width
    if missing and isinstance(module, DenseFeedForward):
        _pad_dense(module, missing)
    elif missing and isinstance(module, ExpertFeedForwards):
        _pad_experts(module, missing)
    set_width_attributes(module.module, pruned_width, width)


def _pad_dense(module: DenseFeedForward, missing: int) -> None:
    layout = module.layout
    for name, projection in module.projections.items():
        parts = 2 if layout.fused and name != layout.down else 1  # [gate; up], each padded at its end
        wide = append_zeros(matrix(projection), missing, axis=1 if name == layout.down else 0, parts=parts)
        if projection.bias is not None and name != layout.down:
            projection.bias = _parameter(append_zeros(projection.bias, missing, axis=0, parts=parts), projection.bias)
        projection.weight = _parameter(wide.mT if isinstance(projection, Conv1D) else wide, projection.weight)
        if isinstance(projection, Conv1D):
            projection.nx, projection.nf = projection.weight.shape
        else:
            projection.out_features, projection.in_features = projection.weight.shape


def _pad_experts(experts: ExpertFeedForwards, missing: int) -> None:
    layout, module = experts.layout, experts.module
    both = 2 if layout.fused else 1
    parts = both if experts.concatenated else 1  # alternating gates and ups are padded together
    more = missing * both // parts
    up_axis, down_axis = (2, 1) if experts.transposed else (1, 2)  # (E, ...)
    for name, axis, count, cut in (
        (layout.up, up_axis, more, parts),
        *([(f"{layout.up}_bias", 1, more, parts)] if experts.biased else []),
        (layout.down, down_axis, missing, 1),
    ):
        parameter = module.get_parameter(name)
        setattr(module, name, _parameter(append_zeros(parameter, count, axis=axis, parts=cut), parameter))


def append_zeros(tensor: Tensor, count: int, *, axis: int, parts: int) -> Tensor:
    """Append ``count`` zeros along ``axis`` to each of the equal ``parts`` of a tensor."""
    shape = list(tensor.shape)
    shape[axis] = count
    zeros = tensor.new_zeros(shape)
    return torch.cat(
        [piece for part in tensor.chunk(parts, axis) for piece in (part, zeros)], axis
    )  # axis + parts * count


def _check_ordinary(decoder: Decoder) -> None:
    """Refuse a model that the family's own classes do not build from the configuration."""
    build: Any = type(decoder.model)
    with without_weights():
        stock = build(copy.deepcopy(decoder.model.config))
    stock.tie_weights()
    shapes, expected = _shapes(decoder.model), _shapes(stock)
    wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"a plain {decoder.architecture.family} checkpoint cannot hold this model: {name} has the shape "
            f"{shapes.get(name)}, in the family {expected.get(name)}."
        )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=like.requires_grad)
