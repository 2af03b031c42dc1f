"""Writes a pruned model as a checkpoint that plain Transformers opens.

Three ways to open it: with ``import cfsp_framework`` beforehand; with ``trust_remote_code=True`` and nothing of ours;
with neither, a loud error where widths differ. Equal widths make an ordinary checkpoint without code.
"""

from __future__ import annotations

import inspect
import os
import shutil
from pathlib import Path
from string import Template
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cfsp_framework.api.records import PruningPlan, Report
from cfsp_framework.engine.replay import logits
from cfsp_framework.errors import CfspError, ModelError, OutputError
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.loading import LoadedModel
from cfsp_framework.modeling.streaming import ShardWriter
from cfsp_framework.modeling.variable_width import ZeroResidual, finish_block
from cfsp_framework.runtime.atomic_files import licence_files

PLAN_FILE = "pruning_plan.json"
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
CARD_FILE = "README.md"
STATISTICS_FILE = "statistics.safetensors"
CODE_FILE = "modeling_pruned.py"
# How a model that also sees or hears prepares what it is given; nothing in them is about widths.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


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
    code = _announce_code(decoder)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if code is None and (folder / CODE_FILE).exists():
        # Copied by Transformers: the model was opened by the code of its checkpoint.
        (folder / CODE_FILE).unlink()
        model.config.__dict__.pop("auto_map", None)
        model.config.save_pretrained(folder)
    _save_beside(code, loaded, folder)


def save_streamed(decoder: Decoder, loaded: LoadedModel, writer: ShardWriter, folder: Path) -> None:
    """Write what belongs beside blocks that were written one by one: everything else."""
    model: Any = decoder.model
    code = _announce_code(decoder)
    writer.write_rest()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    _save_beside(code, loaded, folder)


def _announce_code(decoder: Decoder) -> str | None:
    """The code the checkpoint needs, named in the configuration; None where widths are equal."""
    model = decoder.model
    model.config.__dict__.pop("auto_map", None)
    if not decoder.config.to_dict().get("per_layer_config"):
        return None
    code = _modeling_code(decoder)
    stem = CODE_FILE.removesuffix(".py")
    causal = type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING
    head = "AutoModelForCausalLM" if causal else "AutoModelForImageTextToText"
    model.config.auto_map = {
        "AutoModel": f"{stem}.{type(decoder.base).__name__}",
        head: f"{stem}.{type(model).__name__}",
    }
    return code


def _save_beside(code: str | None, loaded: LoadedModel, folder: Path) -> None:
    if code:
        (folder / CODE_FILE).write_text(code, encoding="utf-8")
    loaded.tokenizer.save_pretrained(folder)
    for name in _PROCESSOR_FILES:
        if (loaded.folder / name).exists():
            shutil.copyfile(loaded.folder / name, folder / name)
    for path in licence_files(loaded.folder):
        shutil.copyfile(path, folder / path.name)


@torch.no_grad()
def verify(written: Decoder, expected: Tensor, ids: Tensor, dtype: torch.dtype) -> float:
    """Compare the logits of what was written, opened again, on ``ids (1, T)``: the largest difference, near 0.

    ``expected (1, T, V)`` are those of the model before it was written.

    Raises:
        CfspError: the checkpoint does not compute what the model computed.
    """
    found = logits(written, ids)  # (1, T, V)
    expected = expected.to(found.device)
    difference: float = (found.float() - expected.float()).abs().max().item()
    if written.model.dtype != dtype or not difference <= 1e-3 * expected.float().abs().max().item():
        raise CfspError(
            f"the checkpoint written does not compute what the model in memory does: dtype {written.model.dtype} "
            f"against {dtype}, logits off by {difference:.3g}. Nothing was kept; please report this."
        )
    return difference


def _modeling_code(decoder: Decoder) -> str:
    """The Python file that makes the checkpoint open where this package is not installed."""
    head, base = type(decoder.model), type(decoder.base)
    blocks = decoder.architecture.blocks
    return Template(_CODE).substitute(
        blocks=blocks,
        base_blocks=blocks.removeprefix(f"{decoder.architecture.base}."),
        module=_native(head).__module__,
        head=head.__name__,
        base=base.__name__,
        stand_in=inspect.getsource(ZeroResidual),
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
'''


def read_pruned(folder: Path) -> tuple[PruningPlan, Report]:
    """The plan and the report of a checkpoint that was pruned.

    Raises:
        ModelError: it was not, or not by this package.
    """
    files = folder / PLAN_FILE, folder / REPORT_FILE
    if missing := [path.name for path in files if not path.is_file()]:
        raise ModelError(f"{str(folder)!r} has no {missing[0]}: it was not written by `cfsp prune`.")
    plan, told = (path.read_text(encoding="utf-8") for path in files)
    try:
        return PruningPlan.from_json(plan), Report.model_validate_json(told)
    except ValidationError as error:
        raise ModelError(f"{files[1]} is not the report of a run: {error.errors()[0]['msg']}.") from error
