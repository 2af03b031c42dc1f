"""Makes a pruned model ordinary again: one width for all blocks, what is missing filled with channels that do nothing.

A channel whose weights and biases are all zero adds ``activation(0) * 0`` times a column of zeros: exactly nothing. So
the result computes what the pruned model computes, and any program that knows the family can open it.
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
"""What the configurations that have a setting for biases of the feed-forward call it."""


def choose_widths(decoder: Decoder, width: int | None = None) -> dict[str, int]:
    """The width that every block is to have, by the configuration's key: the widest block's, or ``width``.

    One that experts share is rounded up to what their products need.

    Raises:
        ConfigError: ``width`` is too small, or there are several keys it could be meant for.
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
        raise ConfigError(f"--width {width}: this model has several widths, {', '.join(sorted(widest))}; leave it out.")
    ((key, least),) = widest.items()
    if width < least:
        raise ConfigError(f"--width {width}: the widest block has {least} channels, and none of them may go.")
    return {key: width}


@torch.no_grad()
def pad_model(decoder: Decoder, widths: Mapping[str, int]) -> None:
    """Give all blocks the ``widths`` and the configuration nothing out of the ordinary; the model computes the same.

    Raises:
        ModelError: the family's own configuration cannot describe the model, whatever its widths.
    """
    _settle_biases(decoder)
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


def _settle_biases(decoder: Decoder) -> None:
    """Biases the family lacks become an ordinary setting, with zeros where there are none; or are refused."""
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
    """Put an attention of zeros where there is none: its output is exactly zero, as that of none."""
    path, block = decoder.architecture.attention, decoder.blocks[index]
    assert path is not None, "an attention was dropped, so the architecture knows where it is"
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
    before = module.width
    missing = width - before
    if missing and isinstance(module, DenseFeedForward):
        _pad_single(module, missing)
    elif missing and isinstance(module, ExpertFeedForwards):
        _pad_experts(module, missing)
    set_width_attributes(module.module, before, width)


def _pad_single(module: DenseFeedForward, missing: int) -> None:
    layout = module.layout
    for name, projection in module.projections.items():
        parts = 2 if layout.fused and name != layout.down else 1  # [gate; up], each of which grows at its end
        wide = _longer(matrix(projection), missing, axis=1 if name == layout.down else 0, parts=parts)
        if projection.bias is not None and name != layout.down:
            projection.bias = _parameter(_longer(projection.bias, missing, axis=0, parts=parts), projection.bias)
        projection.weight = _parameter(wide.mT if isinstance(projection, Conv1D) else wide, projection.weight)
        if isinstance(projection, Conv1D):
            projection.nx, projection.nf = projection.weight.shape
        else:
            projection.out_features, projection.in_features = projection.weight.shape


def _pad_experts(experts: ExpertFeedForwards, missing: int) -> None:
    layout, module = experts.layout, experts.module
    both = 2 if layout.fused else 1
    parts = both if experts.concatenated else 1  # alternating gates and ups grow together
    more = missing * both // parts
    up_axis, down_axis = (2, 1) if experts.transposed else (1, 2)  # (E, ...)
    for name, axis, count, cut in (
        (layout.up, up_axis, more, parts),
        *([(f"{layout.up}_bias", 1, more, parts)] if experts.biased else []),
        (layout.down, down_axis, missing, 1),
    ):
        parameter = module.get_parameter(name)
        setattr(module, name, _parameter(_longer(parameter, count, axis=axis, parts=cut), parameter))


def _longer(tensor: Tensor, count: int, *, axis: int, parts: int) -> Tensor:
    """``count`` zeros more along ``axis`` at the end of each of its equal ``parts``."""
    shape = list(tensor.shape)
    shape[axis] = count
    zeros = tensor.new_zeros(shape)
    return torch.cat([piece for part in tensor.chunk(parts, axis) for piece in (part, zeros)], axis)


def _check_ordinary(decoder: Decoder) -> None:
    """Refuse what the family's own classes do not build from the configuration."""
    build: Any = type(decoder.model)
    with without_weights():
        stock = build(copy.deepcopy(decoder.model.config))
    stock.tie_weights()
    found, expected = _shapes(decoder.model), _shapes(stock)
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"a plain {decoder.architecture.family} checkpoint cannot hold this model: {name} is "
            f"{found.get(name, 'not there')} where the family has {expected.get(name, 'nothing')}."
        )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=like.requires_grad)
