"""Writes a pruned model in a form that programs without this package open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfsp_framework.checkpoint.save import CARD_FILE, PLAN_FILE, check_output, save_model, verify
from cfsp_framework.config import RunConfig
from cfsp_framework.engine.replay import logits
from cfsp_framework.errors import ModelError, OutputError
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
from cfsp_framework.runtime.atomic_files import check_parent, staged_file, staged_folder

NOTE_FILE = "export.json"


@dataclass(frozen=True)
class Exported:
    """What was written, and how near it is to the pruned model."""

    format: str
    source: str
    path: str
    widths: tuple[int, ...]
    """Of the pruned model's feed-forwards."""
    written_widths: tuple[int, ...]
    bytes: int
    """Of the weights: the file, or all safetensors."""
    difference: float | None = None
    """The largest difference of a logit, where the result could be run here; 0 is bit-equal."""
    architecture: str | None = None
    """As llama.cpp calls it."""
    notes: tuple[str, ...] = ()
    """What whoever uses the result should know, each a sentence without its full stop."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def export_padded(config: RunConfig, out: Path, *, width: int | None = None, overwrite: bool = False) -> Exported:
    """Write ``config.model.source`` as a plain checkpoint of one width, which Transformers opens without any code.

    Raises:
        ConfigError: ``width`` is too small, or the model has several.
        ModelError: the family's own configuration cannot describe the model.
        OutputError: the folder cannot be made.
    """
    check_output(out, overwrite=overwrite)
    loaded = load_model(config)
    decoder = open_decoder(loaded.model, load_plugins(config.run.plugins))
    widths, ids = decoder.widths, sample_ids(decoder)
    expected = logits(decoder, ids)  # (1, T, V)
    pad_model(decoder, choose_widths(decoder, width))
    with staged_folder(out) as folder:
        save_model(decoder, loaded, folder)
        written = replace(decoder, model=open_model(folder, device=decoder.device))
        difference = verify(written, expected, ids, loaded.model.dtype)
        made = Exported(
            format="padded",
            source=config.model.source,
            path=str(out),
            widths=widths,
            written_widths=written.widths,
            bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            difference=difference,
        )
        carry_over(loaded.folder, folder, made)
    return made


def export_gguf(
    config: RunConfig, out: Path, *, kind: str = "auto", pre_tokenizer: str | None = None, overwrite: bool = False
) -> Exported:
    """Write ``config.model.source`` as a GGUF file for llama.cpp; one tensor is in memory at a time.

    ``kind`` is the type of the matrices: ``auto`` is what the checkpoint has. ``pre_tokenizer`` is llama.cpp's name for
    how the tokenizer splits text, where it cannot be told.

    Raises:
        ConfigError: the package gguf is not installed, or ``kind`` is unknown.
        ModelError: llama.cpp has no architecture for this model, or no tokenizer for its own.
        OutputError: the file cannot be made.
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
            f"model {config.model.source!r} has no tokenizer that opens, and llama.cpp needs one."
        ) from error
    with staged_file(out) as path:
        written = write_gguf(decoder, folder, tokenizer, path, kind=kind, pre_tokenizer=pre_tokenizer)
        return Exported(
            format="gguf",
            source=config.model.source,
            path=str(out),
            widths=decoder.widths,
            written_widths=decoder.widths,
            bytes=path.stat().st_size,
            architecture=written.architecture,
            notes=written.notes,
        )


def export_onnx(config: RunConfig, out: Path, *, overwrite: bool = False) -> Exported:
    """Write ``config.model.source`` as a folder with ``model.onnx`` in float32, its configuration and its tokenizer.

    Raises:
        ConfigError: a package is not installed.
        ModelError: PyTorch cannot turn the model into a graph.
        OutputError: the folder cannot be made.
    """
    from cfsp_framework.export.onnx import check_packages, compare_onnx, write_onnx

    check_output(out, overwrite=overwrite)
    check_packages()
    loaded = load_model(config.replace(dtype="float32"))
    decoder = open_decoder(loaded.model, load_plugins(config.run.plugins))
    with staged_folder(out) as folder:
        write_onnx(loaded.model, context_length(loaded.model.config), folder)
        difference = compare_onnx(loaded.model, folder)
        loaded.model.config.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        made = Exported(
            format="onnx",
            source=config.model.source,
            path=str(out),
            widths=decoder.widths,
            written_widths=decoder.widths,
            bytes=sum(path.stat().st_size for path in folder.glob("model.onnx*")),
            difference=difference,
            notes=("there is no key-value cache in the graph: it scores texts at once, and writes slowly",),
        )
        carry_over(loaded.folder, folder, made)
    return made


def check_file(out: Path, *, overwrite: bool) -> None:
    """Refuse, before any work is done, a file that exists or cannot be made."""
    check_parent(out)
    if out.is_dir():
        raise OutputError(f"{out} is a folder; give the name of a file.")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists; give another file or --overwrite.")


def sample_ids(decoder: Decoder, count: int = 64) -> Tensor:
    """Any valid tokens to compare logits on, ``(1, T)``."""
    length = min(count, context_length(decoder.model.config) or count)
    return torch.randint(decoder.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def carry_over(source: Path, folder: Path, made: Exported) -> None:
    """Put the plan and the model card of the pruned checkpoint beside the weights, with a note on what they became.

    The report stays behind: it is about the pruned checkpoint, whose sizes these are not.
    """
    (folder / NOTE_FILE).write_text(json.dumps(made.to_dict(), indent=2) + "\n", encoding="utf-8")
    if (source / PLAN_FILE).is_file():
        shutil.copyfile(source / PLAN_FILE, folder / PLAN_FILE)
    card = source / CARD_FILE
    if card.is_file():
        text = card.read_text(encoding="utf-8").rstrip()
        (folder / CARD_FILE).write_text(f"{text}\n\n{_card_note(made)}\n", encoding="utf-8")


def _card_note(made: Exported) -> str:
    """What follows the pruned checkpoint's card."""
    if made.format == "onnx":
        return (
            "## ONNX export\n\n"
            "The pruned model as one graph in float32, from `input_ids` and `attention_mask` to `logits`. What is said "
            "above on loading is about the checkpoint it was made from."
        )
    was, now = spread(made.widths), spread(made.written_widths)
    return (
        "## Padded export\n\n"
        f"These weights are the pruned model's with channels of zeros: feed-forwards of {was} channels became {now} in "
        "every block. They compute the same and open in Transformers without code. Speed and sizes above are those of "
        "the pruned checkpoint, not of this one."
    )


def spread(widths: Sequence[int]) -> str:
    """The narrowest and the widest, or the one there is."""
    low, high = min(widths), max(widths)
    return f"{low}" if low == high else f"{low} to {high}"
