"""Writes a pruned model as a checkpoint that plain Transformers opens.

Three ways to open it: with ``import cfsp_framework`` beforehand; with ``trust_remote_code=True`` and nothing of ours;
with neither, a loud error where widths differ. Equal widths make an ordinary checkpoint without code.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from string import Template

import torch
from torch import Tensor, nn

from .architectures import Decoder
from .errors import CfspError, ModelError, OutputError
from .heterogeneous import StandIn, finish_block
from .models import LoadedModel, open_model

PLAN_FILE = "pruning_plan.json"
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
CARD_FILE = "README.md"
STATISTICS_FILE = "statistics.safetensors"
CODE_FILE = "modeling_pruned.py"


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Refuse, before any work is done, a folder that exists or cannot be made."""
    if folder.exists() and not overwrite:
        raise OutputError(f"{folder} exists; give another folder or --overwrite.")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists()):
        raise OutputError(f"{folder} exists and is no checkpoint; --overwrite does not remove it.")
    parent = folder.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{folder} cannot be made: {parent} is no folder one can write to.")


def save_model(decoder: Decoder, loaded: LoadedModel, folder: Path, *, max_shard_size: str = "5GB") -> None:
    """Write weights, configuration, tokenizer and, where widths differ, the code that builds them."""
    model = decoder.model
    model.config.__dict__.pop("auto_map", None)
    code = _modeling_code(decoder) if decoder.config.to_dict().get("per_layer_config") else None
    if code:
        model.config.auto_map = {
            "AutoModel": f"{CODE_FILE.removesuffix('.py')}.{type(decoder.base).__name__}",
            "AutoModelForCausalLM": f"{CODE_FILE.removesuffix('.py')}.{type(model).__name__}",
        }
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if code:
        (folder / CODE_FILE).write_text(code, encoding="utf-8")
    elif (folder / CODE_FILE).exists():  # copied by Transformers: the model was opened by the code of its checkpoint
        (folder / CODE_FILE).unlink()
        model.config.__dict__.pop("auto_map", None)
        model.config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


@torch.no_grad()
def verify(folder: Path, decoder: Decoder, ids: Tensor) -> float:
    """Open what was written and compare its logits on ``ids (1, T)``: the largest difference, near 0.

    Raises:
        CfspError: the checkpoint does not compute what the model in memory computes.
    """
    model = decoder.model
    written = open_model(folder, device=model.device)
    ids = ids.to(model.device)
    expected = model(ids, use_cache=False).logits  # (1, T, V)
    found = written(ids, use_cache=False).logits
    difference: float = (found.float() - expected.float()).abs().max().item()
    if written.dtype != model.dtype or not difference <= 1e-3 * expected.float().abs().max().item():
        raise CfspError(
            f"the checkpoint written does not compute what the model in memory does: dtype {written.dtype} against "
            f"{model.dtype}, logits off by {difference:.3g}. Nothing was kept; please report this."
        )
    return difference


def _modeling_code(decoder: Decoder) -> str:
    """The Python file that makes the checkpoint open where this package is not installed."""
    head, base = type(decoder.model), type(decoder.base)
    return Template(_CODE).substitute(
        module=_native(head).__module__,
        head=head.__name__,
        base=base.__name__,
        stand_in=inspect.getsource(StandIn),
        finish_block=inspect.getsource(finish_block),
    )


def _native(model_class: type[nn.Module]) -> type[nn.Module]:
    """The Transformers class behind a class that a checkpoint's own code derived from it."""
    native = next((c for c in model_class.__mro__ if c.__module__.startswith("transformers.models.")), None)
    if native is None:
        raise ModelError(
            f"{model_class.__name__} is no class of Transformers but of the model's own code, which cannot build blocks "
            "of different widths; prune all blocks alike, with --allocator uniform."
        )
    return native


_CODE = '''"""Builds a model whose feed-forward widths differ between blocks; written by cfsp-framework (Apache-2.0).

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

    def __init__(self, config, *args, **kwargs):
        widths = config.to_dict().get("per_layer_config")
        config.per_layer_config = None
        super().__init__(config, *args, **kwargs)
        if not widths:
            return
        config.per_layer_config = widths
        blocks = next(
            module
            for module in self.modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == config.num_hidden_layers
            and type(module[0]).__name__ in self._no_split_modules
        )
        for index, stock in enumerate(blocks):
            layer_config = config.per_layer_config[index]
            blocks[index] = type(stock)(layer_config, index)
            finish_block(blocks[index], index, layer_config, config)
        self.post_init()


# The native names: conversions of checkpoint keys are looked up by class name.
class $base(_PerLayer, _$base):
    pass


class $head(_PerLayer, _$head):
    pass
'''
