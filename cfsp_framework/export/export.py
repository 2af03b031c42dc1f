"""Write a pruned model in formats that other programs open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfsp_framework.checkpoint.save import CARD_FILE, EXPORT_FILE, PLAN_FILE, check_output, save_model, verify
from cfsp_framework.config import RunConfig
from cfsp_framework.engine.replay import logits
from cfsp_framework.errors import ModelError
from cfsp_framework.export.padded import choose_widths, pad_model
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.modeling.config_facts import context_length
from cfsp_framework.modeling.decoder import Decoder, open_decoder
from cfsp_framework.modeling.loading import (
    check_checkpoint,
    load_model,
    open_model,
    open_on_meta,
    resolve,
    silence_transformers,
)
from cfsp_framework.run.checks import input_paths
from cfsp_framework.runtime.atomic_files import check_file, staged_file, staged_folder


@dataclass(frozen=True)
class Exported:
    """Result of an export, compared with the pruned model."""

    format: str
    source: str
    path: str
    widths: tuple[int, ...]
    """Of the pruned model's feed-forwards."""
    written_widths: tuple[int, ...]
    bytes: int
    """Of the weights: the file, or all safetensors."""
    difference: float | None = None
    """Largest difference of a logit, if the result was run; 0 is bit-equal."""
    architecture: str | None = None
    """Name in llama.cpp."""
    notes: tuple[str, ...] = ()
    """Limitations for users of the result, each a sentence without its full stop."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def export_padded(config: RunConfig, out: Path, *, width: int | None = None, overwrite: bool = False) -> Exported:
    """Write ``config.model.source`` as a checkpoint of one width, which Transformers opens without remote code.

    Raises:
        ConfigError: ``width`` is too small, or the model has several.
        ModelError: the family's own configuration cannot describe the model.
        OutputError: the folder cannot be written.
    """
    check_output(out, overwrite=overwrite, inputs=input_paths(config))
    loaded = load_model(config)
    decoder = open_decoder(loaded.model, load_plugins(config.run.plugins))
    widths, ids = decoder.widths, sample_ids(decoder)
    expected = logits(decoder, ids)  # (1, T, V)
    pad_model(decoder, choose_widths(decoder, width))
    with staged_folder(out) as folder:
        save_model(decoder, loaded, folder)
        written = replace(decoder, model=open_model(folder, device=decoder.device))
        exported = Exported(
            format="padded",
            source=config.model.source,
            path=str(out),
            widths=widths,
            written_widths=written.widths,
            bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            difference=verify(written, expected, ids, loaded.model.dtype),
        )
        before, after = format_range(widths), format_range(written.widths)
        note = (
            "## Padded export\n\n"
            f"These weights are the pruned model's with channels of zeros: feed-forwards of {before} channels became "
            f"{after} in every block. They compute the same and open in Transformers without code. Speed and sizes "
            "above are those of the pruned checkpoint, not of this one."
        )
        write_notes(loaded.folder, folder, exported, note)
    return exported


def export_gguf(
    config: RunConfig, out: Path, *, kind: str = "auto", pre_tokenizer: str | None = None, overwrite: bool = False
) -> Exported:
    """Write ``config.model.source`` as a GGUF file for llama.cpp, with one tensor in memory at a time.

    ``kind`` is the type of the matrices; ``auto`` is that of the checkpoint. ``pre_tokenizer`` is llama.cpp's name for
    how the tokenizer splits text, if it cannot be detected.

    Raises:
        ConfigError: the package gguf is not installed, or ``kind`` is unknown.
        ModelError: llama.cpp has no architecture or no tokenizer for this model.
        OutputError: the file cannot be written.
    """
    from transformers import AutoTokenizer

    from cfsp_framework.export.gguf import write_gguf

    check_file(out, overwrite=overwrite)
    silence_transformers()
    folder = resolve(config.model.source)
    check_checkpoint(folder, trust_remote_code=config.model.trust_remote_code)
    decoder = open_decoder(open_on_meta(folder), load_plugins(config.run.plugins))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the tokenizer of model {config.model.source!r} cannot be opened; llama.cpp needs it."
        ) from error
    with staged_file(out) as path:
        architecture, notes = write_gguf(decoder, folder, tokenizer, path, kind=kind, pre_tokenizer=pre_tokenizer)
        return Exported(
            format="gguf",
            source=config.model.source,
            path=str(out),
            widths=decoder.widths,
            written_widths=decoder.widths,
            bytes=path.stat().st_size,
            architecture=architecture,
            notes=notes,
        )


def export_onnx(config: RunConfig, out: Path, *, overwrite: bool = False) -> Exported:
    """Write ``config.model.source`` as a folder with ``model.onnx`` in float32, its configuration and its tokenizer.

    Raises:
        ConfigError: a package is not installed.
        ModelError: PyTorch cannot export the model as a graph.
        OutputError: the folder cannot be written.
    """
    from cfsp_framework.export.onnx import check_packages, compare_onnx, write_onnx

    check_output(out, overwrite=overwrite, inputs=input_paths(config))
    check_packages()
    loaded = load_model(config.replace(dtype="float32"))
    widths = open_decoder(loaded.model, load_plugins(config.run.plugins)).widths
    with staged_folder(out) as folder:
        write_onnx(loaded.model, context_length(loaded.model.config), folder)
        difference = compare_onnx(loaded.model, folder)
        loaded.model.config.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        exported = Exported(
            format="onnx",
            source=config.model.source,
            path=str(out),
            widths=widths,
            written_widths=widths,
            bytes=sum(path.stat().st_size for path in folder.glob("model.onnx*")),
            difference=difference,
            notes=("the graph has no key-value cache: it scores texts at once, and generates slowly",),
        )
        note = (
            "## ONNX export\n\n"
            "The pruned model as one graph in float32, from `input_ids` and `attention_mask` to `logits`. What is said "
            "above on loading is about the checkpoint it was made from."
        )
        write_notes(loaded.folder, folder, exported, note)
    return exported


def sample_ids(decoder: Decoder, count: int = 64) -> Tensor:
    """Draw tokens to compare logits on, ``(1, T)``."""
    length = min(count, context_length(decoder.model.config) or count)
    return torch.randint(decoder.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))  # (1, T)


def write_notes(source: Path, folder: Path, exported: Exported, note: str) -> None:
    """Write the export's record, copy the plan, and append ``note`` to the model card of the pruned checkpoint.

    The report is not copied: its sizes are those of the pruned checkpoint.
    """
    (folder / EXPORT_FILE).write_text(json.dumps(exported.to_dict(), indent=2) + "\n", encoding="utf-8")
    if (source / PLAN_FILE).is_file():
        shutil.copyfile(source / PLAN_FILE, folder / PLAN_FILE)
    if (source / CARD_FILE).is_file():
        card = (source / CARD_FILE).read_text(encoding="utf-8").rstrip()
        (folder / CARD_FILE).write_text(f"{card}\n\n{note}\n", encoding="utf-8")


def format_range(widths: Sequence[int]) -> str:
    """Format the least and the largest width, or the only one."""
    low, high = min(widths), max(widths)
    return f"{low}" if low == high else f"{low} to {high}"
