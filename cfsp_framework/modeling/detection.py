"""Detect the blocks and feed-forwards of a family that no plugin describes.

1. ``find_blocks``: the list of decoder blocks, by its length and the classes of its modules.
2. ``_find_layouts``: the feed-forwards of a block, by names and shapes of their projections.
3. ``_find_width_key``: the configuration key that sets their width. One key after another is changed, the model built
   again without weights, and shapes compared.
4. ``_widths_can_differ``: whether a model can be built whose blocks differ in width.
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

_PROJECTION_NAMES = (  # gate, up, down
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
_WIDTH_KEYS = re.compile(r"intermediate|inner|ffn|ff_dim|mlp|expert.*dim|expansion")
_CHANGE = 8
"""Added to a width to see whether a key sets it; survives rounding to multiples of 8."""


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Find where ``model`` keeps its blocks and feed-forwards.

    Raises:
        ModelError: it has no recognisable blocks or feed-forwards, or nothing in its configuration sets their width.
    """
    config = model.config.get_text_config()
    family = config.model_type
    path, blocks = find_blocks(model)
    layouts = {layout.path: layout for block in blocks for layout in _find_layouts(block)}
    if not layouts:
        raise ModelError(
            f"no feed-forward is recognised in the blocks of this {family} model; a plugin can describe it."
        )
    if config.to_dict().get("per_layer_config"):  # its blocks are narrower than the key says
        model = _rebuild(model) or model
    keyed = tuple(_find_width_key(model, path, layout, tuple(layouts.values())) for layout in layouts.values())
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
    prefix = model.base_model_prefix
    base = prefix if prefix and path.startswith(f"{prefix}.") else path.partition(".")[0]
    return Architecture(family=family, base=base, blocks=path, feed_forwards=keyed, attention=None)


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the path of the decoder blocks, and the blocks.

    They are the list as long as the configuration says, of classes that Transformers keeps whole on one device.

    Raises:
        ModelError: the model has no such list.
    """
    classes = set(model._no_split_modules or ())
    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and all(type(block).__name__ in classes for block in module)
            and not re.search(r"vision|audio|encoder\.", path)
        ):
            return path, module
    raise ModelError(
        f"no list of {count} decoder blocks is recognised in this {model.config.model_type} model: Transformers does not "
        "say of which class they are. A plugin can describe it, with the hook cfsp_architecture."
    )


def _find_layouts(block: nn.Module) -> Iterator[FeedForwardLayout]:
    """Yield every feed-forward of a block: the first names of projections that fit a module."""
    for path, module in block.named_modules():
        for gate, up, down in _PROJECTION_NAMES:
            layout = FeedForwardLayout(path=path, up=up, down=down, gate=gate, additive=False)
            if all(isinstance(getattr(module, name, None), nn.Parameter) for name in (up, down)):
                yield replace(layout, experts=True)
                break
            if _projections_fit(module, layout):
                yield layout
                break


def _projections_fit(module: nn.Module, layout: FeedForwardLayout) -> bool:
    """Return whether the projections exist and those up are as wide as the one down."""
    children: Mapping[str | None, Any] = dict(module.named_children())
    names = {layout.gate, layout.up, layout.down} - {None}
    if not all(isinstance(children.get(name), Projection) for name in names):
        return False
    width = matrix(children[layout.down]).shape[1]
    return all(matrix(children[name]).shape[0] == width * (1 + layout.fused) for name in names - {layout.down})


def _block_width(block: nn.Module, layout: FeedForwardLayout) -> int | None:
    """Return the channels of the layout's feed-forward in a block, if the block has one."""
    try:
        module = block.get_submodule(layout.path)
    except AttributeError:
        return None
    down: Any = getattr(module, layout.down, None)
    if down is None or isinstance(down, nn.Parameter) is not layout.experts:
        return None
    return ExpertFeedForwards(module, layout).width if layout.experts else matrix(down).shape[1]


def _model_width(model: nn.Module, blocks: str, layout: FeedForwardLayout) -> int | None:
    """Return the channels of the layout's feed-forward in the first block that has one."""
    widths = (_block_width(block, layout) for block in model.get_submodule(blocks).children())
    return next((width for width in widths if width is not None), None)


def _find_width_key(
    model: PreTrainedModel, blocks: str, layout: FeedForwardLayout, layouts: Sequence[FeedForwardLayout]
) -> FeedForwardLayout:
    """Return the layout with the configuration key that sets its width, and the factor between both."""
    config = model.config.get_text_config()
    width = _model_width(model, blocks, layout)
    assert width is not None, "the layout comes from a block"
    for key, value in _rank_keys(config.to_dict(), width):
        base = width if value is None else value
        changed = _rebuild(model, **{key: base + _CHANGE})
        changed_width = None if changed is None else _model_width(changed, blocks, layout)
        if changed is None or changed_width is None or changed_width == width:
            continue
        times, rest = divmod(changed_width - width, _CHANGE)
        if rest == 0 and times * base == width:
            _check_only_projections_widen(model.get_submodule(blocks), changed.get_submodule(blocks), layout, layouts)
            return replace(layout, width_key=key, times=times)
    raise ModelError(
        f"the width of {layout.path or 'the feed-forward'} in {config.model_type} models is set by nothing in their "
        "configuration, so a narrower one could not be opened again."
    )


def _rank_keys(values: Mapping[str, Any], width: int) -> list[tuple[str, int | None]]:
    """Return keys that may set a width, likeliest first: the right value and name, the right value, the right name."""
    ranked: list[tuple[int, str, int | None]] = []
    for key, value in values.items():
        named = bool(_WIDTH_KEYS.search(key))
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and (value == width or (named and value > 1 and width % value == 0)):
            ranked.append((2 * (value != width) + (not named), key, value))
        elif value is None and named:
            ranked.append((3, key, None))
    return [(key, value) for _, key, value in sorted(ranked, key=lambda entry: entry[0])]


def _check_only_projections_widen(
    blocks: nn.Module, wider: nn.Module, layout: FeedForwardLayout, layouts: Sequence[FeedForwardLayout]
) -> None:
    """Refuse a feed-forward with another parameter along its channels, such as a norm over them.

    Cutting would change its result. A parameter that is larger in the ``wider`` blocks lies along the channels.
    """
    projections = {
        f"{part.path}.{name}{suffix}".removeprefix(".")
        for part in layouts
        for name in (part.gate, part.up, part.down)
        for suffix in ("", ".weight", ".bias", "_bias")
    }
    wider_parameters = dict(wider.named_parameters())
    for path, parameter in blocks.named_parameters():
        name = path.partition(".")[2]  # inside a block
        if name not in projections and path in wider_parameters and wider_parameters[path].shape != parameter.shape:
            raise ModelError(
                f"{layout.path or 'the feed-forward'} has {name.removeprefix(f'{layout.path}.')} over all of its "
                "channels; it cannot be cut exactly."
            )


def _widths_can_differ(model: PreTrainedModel, blocks: str, layouts: Sequence[FeedForwardLayout]) -> bool:
    """Return whether a wider setting for the last block alone widens what is built there."""
    last = model.config.get_text_config().num_hidden_layers - 1
    path = f"{blocks}.{last}"
    widths = {layout: _block_width(model.get_submodule(path), layout) for layout in layouts}
    wider = {layout.width_key: width // layout.times + _CHANGE for layout, width in widths.items() if width is not None}
    changed = _rebuild(model, per_layer_config={last: wider})
    return changed is not None and all(
        _block_width(changed.get_submodule(path), layout) == (None if width is None else width + _CHANGE * layout.times)
        for layout, width in widths.items()
    )


def _rebuild(model: PreTrainedModel, **changes: Any) -> PreTrainedModel | None:
    """Build the model without weights from its configuration with some values changed; None if that fails."""
    config = copy.deepcopy(model.config)
    try:
        for key, value in {"per_layer_config": None, **changes}.items():
            setattr(config.get_text_config(), key, value)
        with without_weights():
            return type(model)(config)
    except Exception:  # noqa: BLE001  # each family raises its own errors on values that do not suit it
        return None
