"""Write a pruned model as a checkpoint that plain Transformers opens.

It opens in two ways: after ``import cfsp_framework``, or with ``trust_remote_code=True`` where this package is not
installed. Otherwise Transformers raises an error if widths differ. Equal widths make an ordinary checkpoint without code.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cfsp_framework.api.records import PruningPlan, Report
from cfsp_framework.checkpoint.remote_code import write_modeling_code
from cfsp_framework.engine.replay import logits
from cfsp_framework.errors import CfspError, ModelError, OutputError
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.loading import LoadedModel
from cfsp_framework.modeling.streaming import ShardWriter
from cfsp_framework.runtime.atomic_files import check_parent, licence_files

PLAN_FILE = "pruning_plan.json"
EXPORT_FILE = "export.json"
"""Record of an export."""
ROUNDS_FOLDER = "plans"
"""Folder of the plans of all rounds but the last, ``round-1.json`` and so on."""
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
CARD_FILE = "README.md"
STATISTICS_FILE = "statistics.safetensors"
CODE_FILE = "modeling_pruned.py"
# How a multimodal model prepares images, audio and video; independent of the widths.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def check_output(folder: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a folder that exists, that holds what a run reads, or that cannot be created.

    ``overwrite`` replaces an empty folder, or one that this package wrote, and that holds neither one of the ``inputs``
    nor the working directory.

    Raises:
        OutputError: a message for each.
    """
    if folder.exists() and not overwrite:
        raise OutputError(f"{folder} exists; give another folder or --overwrite.")
    written = any((folder / name).is_file() for name in (PLAN_FILE, EXPORT_FILE))
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not written):
        raise OutputError(
            f"{folder} exists and has no {PLAN_FILE}, so it is not an output of this package; --overwrite does not remove it."
        )
    if folder.is_dir():
        for path in (Path.cwd(), *inputs):
            if path.resolve().is_relative_to(folder.resolve()):
                raise OutputError(
                    f"{folder} would be replaced, but it holds {path}, which this run uses; give another."
                )
    check_parent(folder)


def save_model(decoder: Decoder, loaded: LoadedModel, folder: Path, *, max_shard_size: str = "5GB") -> None:
    """Write weights, configuration, tokenizer and, where widths differ, the code that builds them."""
    model = decoder.model
    code = _register_code(decoder)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if code is None and (folder / CODE_FILE).exists():
        # Copied by Transformers: the model was opened by the code of its checkpoint.
        (folder / CODE_FILE).unlink()
        model.config.__dict__.pop("auto_map", None)
        model.config.save_pretrained(folder)
    _save_other_files(code, loaded, folder)


def save_streamed(decoder: Decoder, loaded: LoadedModel, writer: ShardWriter, folder: Path) -> None:
    """Write the rest of a checkpoint whose blocks were written one by one."""
    model: Any = decoder.model
    code = _register_code(decoder)
    writer.write_rest()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    _save_other_files(code, loaded, folder)


def _register_code(decoder: Decoder) -> str | None:
    """Name the checkpoint's code in its configuration and return the code; None where widths are equal."""
    model = decoder.model
    model.config.__dict__.pop("auto_map", None)
    if not decoder.config.to_dict().get("per_layer_config"):
        return None
    code = write_modeling_code(decoder)
    stem = CODE_FILE.removesuffix(".py")
    causal = type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING
    head = "AutoModelForCausalLM" if causal else "AutoModelForImageTextToText"
    model.config.auto_map = {
        "AutoModel": f"{stem}.{type(decoder.base).__name__}",
        head: f"{stem}.{type(model).__name__}",
    }
    return code


def _save_other_files(code: str | None, loaded: LoadedModel, folder: Path) -> None:
    if code:
        (folder / CODE_FILE).write_text(code, encoding="utf-8")
    loaded.tokenizer.save_pretrained(folder)
    processors = [path for name in _PROCESSOR_FILES if (path := loaded.folder / name).exists()]
    for path in (*processors, *licence_files(loaded.folder)):
        shutil.copyfile(path, folder / path.name)


@torch.no_grad()
def verify(written: Decoder, expected: Tensor, ids: Tensor, dtype: torch.dtype) -> float:
    """Compare the logits of the reopened checkpoint on ``ids (1, T)`` with those of the model before it was written.

    Returns the largest difference from ``expected (1, T, V)``, near 0.

    Raises:
        CfspError: they differ by more than 0.1 % of the largest logit, or the checkpoint has another dtype.
    """
    actual = logits(written, ids)  # (1, T, V)
    expected = expected.to(actual.device)
    difference: float = (actual.float() - expected.float()).abs().max().item()
    if written.model.dtype != dtype or not difference <= 1e-3 * expected.float().abs().max().item():
        raise CfspError(
            f"the written checkpoint does not compute the same as the model in memory: dtype {written.model.dtype} "
            f"against {dtype}, logits off by {difference:.3g}. Nothing was kept; please report this."
        )
    return difference


def read_pruned(folder: Path) -> tuple[PruningPlan, Report]:
    """Read the plan and the report of a pruned checkpoint.

    Raises:
        ModelError: the folder lacks them, or they cannot be read.
    """
    files = folder / PLAN_FILE, folder / REPORT_FILE
    for path in files:
        if not path.is_file():
            raise ModelError(f"{str(folder)!r} has no {path.name}: it was not written by `cfsp prune`.")
    plan, report = (path.read_text(encoding="utf-8") for path in files)
    try:
        return PruningPlan.from_json(plan), Report.model_validate_json(report)
    except ValidationError as error:
        raise ModelError(f"{files[1]} is not the report of a run: {error.errors()[0]['msg']}.") from error
