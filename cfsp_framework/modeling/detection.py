"""Finds blocks and feed-forwards in a model of a family nobody described, and the configuration keys of their widths.

Names and shapes say where the feed-forwards are; which key sets their width is found by trying: a model is built
without weights from the changed configuration, and its shapes compared.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cfsp_framework.api.data import Architecture, FeedForwardLayout
from cfsp_framework.errors import ModelError
from cfsp_framework.modeling.feed_forwards import ExpertFeedForwards, Projection, matrix
from cfsp_framework.modeling.meta_init import without_weights

_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),
    (None, "up_proj", "down_proj"),
    (None, "fc1", "fc2"),
    (None, "fc_in", "fc_out"),
    (None, "c_fc", "c_proj"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
    (None, "dense_in", "dense_out"),
    (None, "wi", "wo"),
)
_WIDTH_NAMES = re.compile(r"intermediate|inner|ffn|ff_dim|mlp|expert.*dim|expansion")
_TRIED = 8
"""How much a width is changed by to see whether a key sets it; survives rounding to multiples of 8."""


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Where ``model`` keeps its blocks and feed-forwards.

    Raises:
        ModelError: it has no recognisable blocks or feed-forwards, or nothing in its configuration sets their width.
    """
    family = model.config.get_text_config().model_type
    path, blocks = _blocks(model)
    layouts = {layout.path: layout for block in blocks for layout in _layouts(block)}
    if model.config.get_text_config().to_dict().get("per_layer_config"):
        model = _rebuilt(model) or model  # the dense one: the values of this one's configuration are not its widths
    if not layouts:
        raise ModelError(
            f"no feed-forward is recognised in the blocks of this {family} model; a plugin can describe it."
        )
    keyed = tuple(_with_key(model, path, layout, tuple(layouts.values())) for layout in layouts.values())
    for layout in keyed:
        if min(other.times for other in keyed if other.width_key == layout.width_key) > 1:
            raise ModelError(
                f"the width of {layout.path} in {family} models is {layout.times} times {layout.width_key}: it cannot be "
                "any other number."
            )
    if not _widths_can_differ(model, path, keyed):
        raise ModelError(
            f"Transformers cannot build a {family} model whose blocks differ in width; a plugin can describe it."
        )
    return Architecture(family=family, base=_base(model, path), blocks=path, feed_forwards=keyed, attention=None)


def _blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its path: as long as the configuration says, of classes that are not split."""
    classes = set(model._no_split_modules or ())
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and all(type(block).__name__ in classes for block in module)
            and not re.search(r"vision|audio|encoder\.", name)
        ):
            return name, module
    raise ModelError(
        f"no list of {count} decoder blocks is recognised in this {model.config.model_type} model: Transformers does not "
        "say of which class they are. A plugin can describe it, with the hook cfsp_architecture."
    )


def _base(model: PreTrainedModel, blocks: str) -> str:
    """The model without its head: what the family calls so, or the first step of the way to the blocks."""
    prefix = model.base_model_prefix
    return prefix if prefix and blocks.startswith(f"{prefix}.") else blocks.partition(".")[0]


def _layouts(block: nn.Module) -> Iterator[FeedForwardLayout]:
    """Every feed-forward of a block, by names and by shape: what goes up comes down."""
    for path, module in block.named_modules():
        for gate, up, down in _NAMES:
            layout = FeedForwardLayout(path=path, up=up, down=down, gate=gate, additive=False)
            if isinstance(getattr(module, down, None), nn.Parameter) and isinstance(
                getattr(module, up, None), nn.Parameter
            ):
                yield replace(layout, experts=True)
                break
            if _fits(module, layout):
                yield layout
                break


def _fits(module: nn.Module, layout: FeedForwardLayout) -> bool:
    parts: Mapping[str | None, Any] = dict(module.named_children())
    names = {layout.gate, layout.up, layout.down} - {None}
    if not names <= parts.keys() or not all(isinstance(parts[name], Projection) for name in names):
        return False
    width = matrix(parts[layout.down]).shape[1]
    return all(matrix(parts[name]).shape[0] == width * (1 + layout.fused) for name in names - {layout.down})


def _width(model: nn.Module, blocks: str, layout: FeedForwardLayout) -> int | None:
    """Channels of the layout's feed-forward in the first block that has it."""
    widths = (_width_of(block, layout) for block in model.get_submodule(blocks).children())
    return next((width for width in widths if width is not None), None)


def _width_of(block: nn.Module, layout: FeedForwardLayout) -> int | None:
    """Channels of the layout's feed-forward in a block, if it has one."""
    try:
        module = block.get_submodule(layout.path)
    except AttributeError:
        return None
    down: Any = getattr(module, layout.down, None)
    if down is None or isinstance(down, nn.Parameter) is not layout.experts:
        return None
    return ExpertFeedForwards(module, layout).width if layout.experts else matrix(down).shape[1]


def _with_key(
    model: PreTrainedModel, blocks: str, layout: FeedForwardLayout, layouts: Sequence[FeedForwardLayout]
) -> FeedForwardLayout:
    """The layout with the configuration key that sets its width, found by changing one key after another."""
    config = model.config.get_text_config()
    width = _width(model, blocks, layout)
    assert width is not None, "the layout was found in a block"
    for key, value in _candidates(config.to_dict(), width):
        base = width if value is None else value
        changed = _rebuilt(model, key, base + _TRIED)
        found = None if changed is None else _width(changed, blocks, layout)
        if changed is not None and found is not None and found != width and (found - width) % _TRIED == 0:
            times = (found - width) // _TRIED
            if times * base == width:
                _check_channels_apart(model.get_submodule(blocks), changed.get_submodule(blocks), layout, layouts)
                return replace(layout, width_key=key, times=times)
    raise ModelError(
        f"the width of {layout.path or 'the feed-forward'} in {config.model_type} models is set by nothing in their "
        "configuration, so a narrower one could not be opened again."
    )


def _check_channels_apart(
    blocks: nn.Module, wider: nn.Module, layout: FeedForwardLayout, layouts: Sequence[FeedForwardLayout]
) -> None:
    """Refuse a feed-forward with anything else along its channels, such as a norm over them: cutting would change it.

    What grows with the width in the ``wider`` blocks, beside the projections, is along the channels.
    """
    projections = {
        f"{one.path}.{name}{part}".removeprefix(".")
        for one in layouts
        for name in (one.gate, one.up, one.down)
        for part in ("", ".weight", ".bias", "_bias")
    }
    grown = dict(wider.named_parameters())
    for path, parameter in blocks.named_parameters():
        name = path.partition(".")[2]  # inside a block
        if name not in projections and path in grown and grown[path].shape != parameter.shape:
            raise ModelError(
                f"{layout.path or 'the feed-forward'} has {name.removeprefix(f'{layout.path}.')} over all of its "
                "channels; it cannot be cut exactly."
            )


def _candidates(values: Mapping[str, Any], width: int) -> list[tuple[str, int | None]]:
    """Keys that may set a width, likeliest first: the right value and name, the right value, the right name."""
    found: list[tuple[int, str, int | None]] = []
    for key, value in values.items():
        named = bool(_WIDTH_NAMES.search(key))
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and (value == width or (named and value > 1 and width % value == 0)):
            found.append((2 * (value != width) + (not named), key, value))
        elif value is None and named:
            found.append((3, key, None))
    return [(key, value) for _, key, value in sorted(found, key=lambda one: one[0])]


def _widths_can_differ(model: PreTrainedModel, blocks: str, layouts: Sequence[FeedForwardLayout]) -> bool:
    """Whether a setting of the last block changes what is built there."""
    last = len(model.get_submodule(blocks)) - 1  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    dense = [_width_of(model.get_submodule(f"{blocks}.{last}"), layout) for layout in layouts]
    wider = {
        layout.width_key: width // layout.times + _TRIED
        for layout, width in zip(layouts, dense, strict=True)
        if width is not None
    }
    changed = _rebuilt(model, per_layer={last: wider})
    if changed is None:
        return False
    found = [_width_of(changed.get_submodule(f"{blocks}.{last}"), layout) for layout in layouts]
    return all(
        now == (None if before is None else before + _TRIED * layout.times)
        for layout, before, now in zip(layouts, dense, found, strict=True)
    )


def _rebuilt(
    model: PreTrainedModel,
    key: str | None = None,
    value: int = 0,
    per_layer: dict[int | str, dict[str, Any]] | None = None,
) -> PreTrainedModel | None:
    """The model without weights from its configuration with something changed; None where that cannot be built."""
    config = copy.deepcopy(model.config)
    config.get_text_config().per_layer_config = None
    try:
        if key is not None:
            setattr(config.get_text_config(), key, value)
        if per_layer is not None:
            config.get_text_config().per_layer_config = per_layer
        with without_weights():
            return type(model)(config)
    except Exception:  # noqa: BLE001  # whatever a family raises on a value that does not suit it
        return None
