"""Low-rank adapters with peft: put on exactly the modules meant, merged in float32, or written and opened again."""

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
from cfsp_framework.errors import CfspError, ModelError
from cfsp_framework.modeling.decoder import Decoder

_ADAPTER = "default"


def add_adapters(decoder: Decoder, matrices: Mapping[str, BlockRecovery]) -> PeftModel:
    """Put adapters on exactly these matrices of the decoder's model, in place; nothing else takes gradients.

    Raises:
        CfspError: peft adapted others than meant, or with other ranks.
    """
    targets = targets_of(decoder, matrices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Linear and Conv1D in one model, peft warns about one or the other
        learner: PeftModel = get_peft_model(decoder.model, adapter_config(decoder, targets))
    check_adapters(learner, targets)
    return learner


def targets_of(decoder: Decoder, matrices: Mapping[str, BlockRecovery]) -> dict[str, BlockRecovery]:
    """The matrices under the names that peft is given: those of modules, or of parameters.

    In a mixture all are parameters, as the experts' are anyway: peft takes a module's name there for that of an expert
    in earlier versions of Transformers, and adapts the experts instead (``_convert_peft_config_moe`` of peft 0.21).
    """
    modules = {name for name, _ in decoder.model.named_modules()}
    mixture = any(layout.experts for layout in decoder.architecture.feed_forwards)
    return {f"{name}.weight" if mixture and name in modules else name: one for name, one in matrices.items()}


def adapter_config(decoder: Decoder, targets: Mapping[str, BlockRecovery]) -> LoraConfig:
    """peft's configuration for adapters on exactly these modules and parameters.

    There is one pattern for each block, not for each matrix, because peft tries them all for each matrix. It takes the
    default rank wherever none matches, and says so in a warning at most: see ``check_adapters``.
    """
    prefix = decoder.architecture.blocks
    paths: dict[int, str] = {}  # of each block, as alternatives of a regular expression
    for name, one in targets.items():
        path = re.escape(name.removeprefix(f"{prefix}.{one.block}."))
        paths[one.block] = f"{paths[one.block]}|{path}" if one.block in paths else path
    patterns = {block: _pattern(prefix, [block], alternatives) for block, alternatives in paths.items()}
    alike = {alternatives: [b for b, same in paths.items() if same == alternatives] for alternatives in paths.values()}
    expressions = [_pattern(prefix, blocks, alternatives) for alternatives, blocks in alike.items()]
    chosen = {one.block: one for one in targets.values()}
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
        rank_pattern={pattern: chosen[block].rank for block, pattern in patterns.items()},
        alpha_pattern={pattern: chosen[block].alpha for block, pattern in patterns.items()},
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in projections),
    )


def _pattern(prefix: str, blocks: Sequence[int], alternatives: str) -> str:
    return rf"{re.escape(prefix)}\.(?:{'|'.join(map(str, blocks))})\.(?:{alternatives})"


def check_adapters(learner: PeftModel, targets: Mapping[str, BlockRecovery]) -> None:
    """Compare the adapters there are with those meant.

    Raises:
        CfspError: they are not the same.
    """
    found = {_adapted(name, layer): (layer.r[_ADAPTER], layer.lora_alpha[_ADAPTER]) for name, layer in _layers(learner)}
    meant = {name: (one.rank, one.alpha) for name, one in targets.items()}
    if found != meant:
        name = next(name for name in [*found, *meant] if found.get(name) != meant.get(name))
        raise CfspError(f"peft gave {name} rank and alpha {found.get(name)} where {meant.get(name)} was meant.")


def _layers(learner: PeftModel) -> list[tuple[str, LoraLayer]]:
    """peft's modules around what is adapted, by name."""
    named = learner.get_base_model().named_modules()
    return [(name, module) for name, module in named if isinstance(module, LoraLayer)]


def _adapted(name: str, layer: LoraLayer) -> str:
    """The name of the target a layer adapts; peft wraps a module once for each of its parameters."""
    return f"{name.replace('.base_layer', '')}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name


@torch.no_grad()
def merge(learner: PeftModel) -> None:
    """Add every adapter to its matrix, in float32, and take the adapters out of the model."""
    for _, module in _layers(learner):
        layer: Any = module
        weight = layer.get_param() if isinstance(module, ParamWrapper) else layer.get_base_layer().weight
        weight.copy_(weight.float() + layer.get_delta_weight(_ADAPTER).float())
    remove_adapters(learner)


def save_adapter(learner: PeftModel, folder: Path) -> None:
    """Write what ``PeftModel.from_pretrained`` opens on the pruned model; it names no model, since that may move."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learner.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's form to fill in
    settings = folder / "adapter_config.json"
    told = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps({**told, "base_model_name_or_path": None}, indent=2) + "\n", encoding="utf-8")


def open_adapted(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter in ``folder`` on ``model``, which is changed in place.

    Raises:
        ModelError: it is no adapter, or one for a model of other shapes.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"adapter {str(folder)!r}: there is no adapter_config.json.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "Found missing adapter keys")
            learner: PeftModel = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # peft's and torch's, which have no common class
        raise ModelError(f"adapter {str(folder)!r} does not fit the model: {_first_line(error)}") from error
    return learner


def remove_adapters(learner: PeftModel) -> None:
    """Take the adapters out of the model; what they added is gone."""
    tuner: Any = learner.base_model
    tuner.unload()


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") + "."
