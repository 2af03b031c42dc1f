"""Let Transformers build models whose feed-forward widths differ between blocks.

Transformers' configurations understand ``per_layer_config`` since 5.14; most of its modelling code does not build from
it. A decoder layer class is patched the first time such a configuration needs it; nothing changes for any other
configuration, nor for architectures that read ``per_layer_config`` themselves.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_INDEX_ARGUMENTS = ("layer_idx", "layer_id", "layer_number")


class ZeroResidual(nn.Module):
    """Replace a dropped attention: add nothing to the residual stream.

    The name of the class avoids "Attention": Transformers ignores set_attn_implementation on a model whose file defines
    a module of that name which does not dispatch to the implementations.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Return zeros ``(B, T, D)`` and no attention weights."""
        return torch.zeros_like(hidden_states), None


def finish_block(block: nn.Module, index: int, layer_config: Any, config: Any) -> None:
    """Complete a block built from its own layer's configuration."""
    for module in block.modules():
        if getattr(module, "config", None) is layer_config:  # a copy: set_attn_implementation would miss this module
            module.config = config
    for path in config.to_dict().get("added_biases") or ():
        linear: Any = block.get_submodule(path)
        linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
    dropped = config.to_dict().get("dropped_attention")
    if dropped and index in dropped["blocks"]:
        block.set_submodule(dropped["path"], ZeroResidual())


def install() -> None:
    """Make every model class build from ``per_layer_config``; a second call changes nothing."""
    original = PreTrainedModel.__init__
    if getattr(original, "_per_layer", False):
        return

    @functools.wraps(original)
    def __init__(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(config, "is_heterogeneous", False):
            _patch_layers(type(self))
        original(self, config, *args, **kwargs)

    __init__._per_layer = True  # type: ignore[attr-defined]
    PreTrainedModel.__init__ = __init__  # type: ignore[method-assign]


def _patch_layers(model_class: type[PreTrainedModel]) -> None:
    native = next((c for c in model_class.__mro__ if c.__module__.startswith("transformers.models.")), None)
    if native is None:
        return
    module = importlib.import_module(native.__module__)
    if "per_layer_config" in inspect.getsource(module):
        return  # this architecture builds from it without help
    for name in model_class._no_split_modules or ():
        if hasattr(module, name):
            _patch_layer(getattr(module, name))


def _patch_layer(layer_class: type[nn.Module]) -> None:
    original = layer_class.__init__
    if getattr(original, "_per_layer", False):
        return
    signature = inspect.signature(original)

    # Patched in place: replacing the class would break output_hidden_states and pickling.
    @functools.wraps(original)
    def __init__(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        if not getattr(config, "is_heterogeneous", False):
            original(self, config, *args, **kwargs)
            return
        bound = signature.bind(self, config, *args, **kwargs).arguments
        index = next(bound[name] for name in _INDEX_ARGUMENTS if bound.get(name) is not None)
        layer_config = config.per_layer_config[index]
        original(self, layer_config, *args, **kwargs)
        finish_block(self, index, layer_config, config)

    __init__._per_layer = True  # type: ignore[attr-defined]
    layer_class.__init__ = __init__  # type: ignore[method-assign]
