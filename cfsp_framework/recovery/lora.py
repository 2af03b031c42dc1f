"""Low-rank adapters (LoRA, arXiv 2106.09685) with peft: add to chosen matrices, merge in float32, save and load."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cfsp_framework.api.data import BlockRecovery
from cfsp_framework.errors import CfspError, ModelError, one_line
from cfsp_framework.modeling.decoder import Decoder

_ADAPTER = "default"


def add_adapters(decoder: Decoder, matrices: Mapping[str, BlockRecovery]) -> PeftModel:
    """Add adapters to exactly these matrices of the decoder's model, in place; no other parameter requires gradients.

    Raises:
        CfspError: peft adapted other matrices than planned, or with other ranks.
    """
    targets = name_targets(decoder, matrices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where a model has Linear and Conv1D, peft warns about either
        adapted: PeftModel = get_peft_model(decoder.model, configure_adapters(decoder, targets))
    check_adapters(adapted, targets)
    return adapted


def name_targets(decoder: Decoder, matrices: Mapping[str, BlockRecovery]) -> dict[str, BlockRecovery]:
    """Name each matrix as peft expects it: by its module, or by its parameter.

    In a mixture of experts all are named by parameters, as the experts' have to be. There, peft takes a module's name
    for that of an expert in earlier versions of Transformers, and adapts the experts instead
    (``_convert_peft_config_moe`` of peft 0.21).
    """
    modules = {name for name, _ in decoder.model.named_modules()}
    mixture = any(layout.experts for layout in decoder.architecture.feed_forwards)
    return {f"{name}.weight" if mixture and name in modules else name: entry for name, entry in matrices.items()}


def configure_adapters(decoder: Decoder, targets: Mapping[str, BlockRecovery]) -> LoraConfig:
    """Return peft's configuration for adapters on exactly these modules and parameters.

    There is one pattern for each block, not for each matrix, because peft tries them all for each matrix. Where none
    matches, peft uses the default rank and warns at most: see ``check_adapters``.
    """
    prefix = decoder.architecture.blocks
    paths: dict[int, str] = {}  # of each block, as alternatives of a regular expression
    for name, entry in targets.items():
        path = re.escape(name.removeprefix(f"{prefix}.{entry.block}."))
        paths[entry.block] = f"{paths[entry.block]}|{path}" if entry.block in paths else path
    patterns = {block: _pattern(prefix, [block], alternatives) for block, alternatives in paths.items()}
    alike = {alternatives: [b for b, same in paths.items() if same == alternatives] for alternatives in paths.values()}
    expressions = [_pattern(prefix, blocks, alternatives) for alternatives, blocks in alike.items()]
    entries = {entry.block: entry for entry in targets.values()}
    modules = dict(decoder.model.named_modules())
    projections = [modules[name] for name in targets if name in modules]
    parameters = [name for name in targets if name not in modules]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=1,
        lora_alpha=1,
        lora_dropout=0.0,
        target_modules="|".join(expressions) if projections else [],
        target_parameters=parameters or None,
        rank_pattern={pattern: entries[block].rank for block, pattern in patterns.items()},
        alpha_pattern={pattern: entries[block].alpha for block, pattern in patterns.items()},
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in projections),
    )


def _pattern(prefix: str, blocks: Sequence[int], alternatives: str) -> str:
    return rf"{re.escape(prefix)}\.(?:{'|'.join(map(str, blocks))})\.(?:{alternatives})"


def check_adapters(adapted: PeftModel, targets: Mapping[str, BlockRecovery]) -> None:
    """Compare peft's adapters with those planned.

    Raises:
        CfspError: they differ.
    """
    actual = {
        _target_name(name, layer): (layer.r[_ADAPTER], layer.lora_alpha[_ADAPTER])
        for name, layer in _adapter_layers(adapted)
    }
    planned = {name: (entry.rank, entry.alpha) for name, entry in targets.items()}
    for name in [*actual, *planned]:
        if actual.get(name) != planned.get(name):
            raise CfspError(f"peft gave {name} rank and alpha {actual.get(name)}; planned was {planned.get(name)}.")


def _adapter_layers(adapted: PeftModel) -> list[tuple[str, LoraLayer]]:
    """List peft's modules around the adapted ones, by name."""
    named = adapted.get_base_model().named_modules()
    return [(name, module) for name, module in named if isinstance(module, LoraLayer)]


def _target_name(name: str, layer: LoraLayer) -> str:
    """Return the name of the target a layer adapts; peft wraps a module once for each of its parameters."""
    return f"{name.replace('.base_layer', '')}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name


@torch.no_grad()
def merge_adapters(adapted: PeftModel) -> None:
    """Add every adapter to its matrix, in float32, and remove the adapters from the model."""
    for _, module in _adapter_layers(adapted):
        layer: Any = module
        weight = layer.get_param() if isinstance(module, ParamWrapper) else layer.get_base_layer().weight
        weight.copy_(weight.float() + layer.get_delta_weight(_ADAPTER).float())
    remove_adapters(adapted)


def remove_adapters(adapted: PeftModel) -> None:
    """Remove the adapters from the model, without merging them."""
    tuner: Any = adapted.base_model
    tuner.unload()


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """Write files that ``PeftModel.from_pretrained`` opens on the pruned model, without the model's path, which may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's form to fill in
    path = folder / "adapter_config.json"
    settings = {**json.loads(path.read_text(encoding="utf-8")), "base_model_name_or_path": None}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Add the adapter in ``folder`` to ``model``, in place.

    Raises:
        ModelError: the folder holds none, or one for a model of other shapes.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"adapter {str(folder)!r} has no adapter_config.json; give a folder that --keep-adapter wrote."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted: PeftModel = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # peft's and torch's, which have no common class
        raise ModelError(f"adapter {str(folder)!r} does not fit the model: {one_line(error)[:300]}") from error
    return adapted
