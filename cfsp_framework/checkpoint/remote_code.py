"""The Python file written into a checkpoint, which opens it where this package is not installed."""

from __future__ import annotations

import inspect
from string import Template

from torch import nn

from cfsp_framework.errors import ModelError
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.variable_width import ZeroResidual, finish_block


def write_modeling_code(decoder: Decoder) -> str:
    """Return the code that builds blocks of different widths.

    Raises:
        ModelError: the model's class comes from the code of its checkpoint.
    """
    head, base = type(decoder.model), type(decoder.base)
    blocks = decoder.architecture.blocks
    return _TEMPLATE.substitute(
        blocks=blocks,
        base_blocks=blocks.removeprefix(f"{decoder.architecture.base}."),
        module=_native_class(head).__module__,
        head=head.__name__,
        base=base.__name__,
        stand_in=inspect.getsource(ZeroResidual),
        finish_block=inspect.getsource(finish_block),
    )


def _native_class(model_class: type[nn.Module]) -> type[nn.Module]:
    """Return the class of Transformers that a model's class is or derives from."""
    native = next((c for c in model_class.__mro__ if c.__module__.startswith("transformers.models.")), None)
    if native is None:
        raise ModelError(
            f"{model_class.__name__} is not a class of Transformers but of the checkpoint's code, which cannot build "
            "blocks of different widths; prune all blocks alike, with --allocator uniform."
        )
    return native


_TEMPLATE = Template('''"""Builds a model whose feed-forward widths differ between blocks; written by cfsp-framework (Apache-2.0).

Open the checkpoint with trust_remote_code=True, or without it after `import cfsp_framework`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from $module import $base as _$base
from $module import $head as _$head


$stand_in

$finish_block

class _PerLayer:
    @classmethod
    def is_custom_code(cls):
        return False  # else Transformers skips the conversions of checkpoint keys this family needs

    @classmethod
    def _can_set_experts_implementation(cls):
        # Transformers looks for words in the file that defines a class, which here is not the family's own.
        native = next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))
        return native._can_set_experts_implementation()

    def __init__(self, config, *args, **kwargs):
        decoder = config.get_text_config()
        widths = decoder.to_dict().get("per_layer_config")
        decoder.per_layer_config = None
        super().__init__(config, *args, **kwargs)
        if not widths:
            return
        decoder.per_layer_config = widths
        blocks = self.get_submodule(self._blocks)
        for index, stock in enumerate(blocks):
            layer_config = decoder.per_layer_config[index]
            blocks[index] = type(stock)(layer_config, index)
            finish_block(blocks[index], index, layer_config, decoder)
        self.post_init()


# The native names: conversions of checkpoint keys are looked up by class name.
class $base(_PerLayer, _$base):
    _blocks = "$base_blocks"


class $head(_PerLayer, _$head):
    _blocks = "$blocks"
''')
