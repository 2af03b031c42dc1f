"""Run exported GGUF files in llama.cpp and compare logits, tokens and generated text with Transformers.

    pip install --no-binary llama-cpp-python llama-cpp-python    # builds llama.cpp, some minutes
    python tests/benchmarks/gguf_llama_cpp.py [MODEL ...] [--text FILE]

Tiny random models cover every form that can be exported. Every MODEL, a folder, is pruned to widths that differ between
blocks, exported in all types, and compared on random tokens, on lines of the text and on a generated continuation.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cfsp_framework import RunConfig, prune
from cfsp_framework.export.export import Exported, export_gguf
from cfsp_framework.modeling.loading import open_model, silence_transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import families
from helpers.pruned_checkpoints import write_pruned

PROMPT = "Once upon a time"
LENGTH = 30
"""Tokens that are generated."""


@dataclass(frozen=True)
class Case:
    """A tiny model; ``kept`` are the widths of its blocks, ``dropped`` those without attention."""

    family: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    kept: tuple[int, ...] = (48, 40, 56)
    dropped: tuple[int, ...] = ()
    biases: tuple[str, ...] = ()


_ROPE = {"rope_theta": 10000.0}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "llama": Case("llama"),
    "llama, equal widths": Case("llama", kept=(48, 48, 48)),
    "llama, biases everywhere": Case("llama_bias"),
    "llama, biases and equal widths": Case("llama_bias", kept=(48, 48, 48)),
    "llama, tied": Case("llama_tied"),
    "llama, large heads": Case("llama", {"head_dim": 16}),
    "llama, no attention in two blocks": Case("llama", dropped=(1, 2)),
    "llama, biases of a compensator": Case("llama", biases=("down_bias",)),
    "llama, linear positions": Case("llama", {"rope_parameters": {**_ROPE, "rope_type": "linear", "factor": 2.0}}),
    "llama, llama3 positions": Case("llama", {"rope_parameters": {**_ROPE, **_LLAMA3, "rope_type": "llama3"}}),
    "llama, llama3 positions, equal widths": Case(
        "llama", {"rope_parameters": {**_ROPE, **_LLAMA3, "rope_type": "llama3"}}, kept=(48, 48, 48)
    ),
    "llama, yarn positions": Case("llama", {"rope_parameters": {**_ROPE, **_YARN, "rope_type": "yarn"}}),
    "mistral": Case("mistral", {"sliding_window": None}),
    "mistral, within its window": Case("mistral", {"sliding_window": 100}),
    "qwen2": Case("qwen2"),
    "qwen2, equal widths": Case("qwen2", kept=(48, 48, 48)),
    "qwen2, large heads, equal widths": Case("qwen2", {"head_dim": 16}, kept=(48, 48, 48)),
}

TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
PATTERNS = {
    "llama 3": WORD + r"\p{N}{1,3}|" + TAIL,
    "qwen 2": WORD + r"\p{N}|" + TAIL,
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""Patterns with which byte-level tokenizers of these names split text."""
ODD_LINES = (
    "  two spaces\n\nand\tmore  ",
    "naïve café — ☃ 日本語, ÉCOLE Straße ИВАН",
    "I'VE 3 or 12345.67; don't they'll x=y**2\r\n\r\n",
    "a",
    "<s> hi </s>",
    "CamelCaseWords snake_case //path/to/file\n",
    "\n\n\n   \n",
)


def train_tokenizer(kind: str, lines: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a small tokenizer of one kind: one of PATTERNS, ``gpt-2``, ``digits``, ``metaspace``."""
    specials = ["<unk>", "<s>", "</s>"]
    if kind == "metaspace":
        model = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        model.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=True)
        model.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
        specials += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet: list[str] = []
    else:
        model = Tokenizer(models.BPE(ignore_merges=kind in ("llama 3", "tekken")))
        first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if kind == "digits" else []
        if kind in PATTERNS:
            first = [pre_tokenizers.Split(Regex(PATTERNS[kind]), behavior="isolated")]
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in PATTERNS)
        model.pre_tokenizer = pre_tokenizers.Sequence([*first, bytes_]) if first else bytes_
        model.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=specials, show_progress=False, initial_alphabet=alphabet
    )
    model.train_from_iterator(lines, trainer)
    settings = json.loads(model.to_str())
    if kind == "metaspace":
        settings["model"]["merges"] = in_spm_order(settings["model"])
    settings["added_tokens"] = [added for added in settings["added_tokens"] if not added["content"].startswith("<0x")]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def in_spm_order(model: Mapping[str, Any]) -> list[list[str]]:
    """Return all ways to form each token, in the order of the tokens: the merges of a SentencePiece model."""
    order = dict.fromkeys(left + right for left, right in model["merges"])
    reachable = {character for token in order for character in token} | {*order}
    return [
        [token[:cut], token[cut:]]
        for token in order
        for cut in range(1, len(token))
        if token[:cut] in reachable and token[cut:] in reachable
    ]


def examine_tokenizers(lines: Sequence[str]) -> None:
    """Train a tokenizer of every kind that can be named, and compare it with llama.cpp's of that name."""
    for kind in (*PATTERNS, "gpt-2", "digits", "metaspace"):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = train_tokenizer(kind, lines)
            place = families.write(families.build("llama", vocab_size=len(tokenizer)), Path(folder, "tiny"))
            tokenizer.save_pretrained(place)
            exported = export(place, Path(folder, "tiny.gguf"), "f32")
            all_lines = [*lines, *ODD_LINES]
            wrong = compare_tokens(place, Path(folder, "tiny.gguf"), all_lines)
            notes = f"; {exported.notes}" if exported.notes else ""
            print(f"tokenizer {kind}: {wrong} of {len(all_lines)} texts are tokenised differently{notes}", flush=True)


def write_tiny(case: Case, place: Path) -> Path:
    """Write the pruned checkpoint of a case."""
    model = families.build(case.family, **case.settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    dense = families.write(model, place / "dense")
    return write_pruned(dense, place / "pruned", case.kept, dropped=case.dropped, biases=case.biases)


def compare_logits(pruned: Path, path: Path, length: int = 90) -> float:
    """Return the largest difference of a logit between Transformers in float32 and llama.cpp with a float32 cache."""
    model: Any = open_model(pruned, "float32")
    size = model.config.vocab_size
    ids = torch.randint(3, size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()  # (T, V)
    llama = open_llama(path, length)
    llama.eval(ids[0].tolist())
    return float(np.abs(np.array(llama.scores)[:length] - expected).max())


def open_llama(path: Path, length: int) -> Any:
    """Open a file in llama.cpp."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    room = length + 8
    return llama_cpp.Llama(
        str(path), n_ctx=room, n_batch=room, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0
    )


def compare_tokens(pruned: Path, path: Path, lines: Sequence[str]) -> int:
    """Count the lines that the file's tokenizer splits differently from the checkpoint's."""
    tokenizer, llama = AutoTokenizer.from_pretrained(pruned), open_llama(path, 8)
    wrong = [line for line in lines if llama.tokenize(line.encode(), True, True) != tokenizer(line).input_ids]
    for line in wrong[:2]:
        print(f"    {line!r}: {llama.tokenize(line.encode(), True, True)} against {tokenizer(line).input_ids}")
    return len(wrong)


def compare_text(pruned: Path, path: Path) -> tuple[str, str]:
    """Generate greedily with both after the same words."""
    tokenizer, model, llama = AutoTokenizer.from_pretrained(pruned), open_model(pruned, "float32"), open_llama(path, 99)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=LENGTH, do_sample=False)  # type: ignore[operator]
    expected = str(tokenizer.decode(written[0, ids.shape[1] :]))
    completion = llama.create_completion(PROMPT, max_tokens=LENGTH, temperature=0.0)
    return expected.strip(), completion["choices"][0]["text"].strip()


def read_lines(text: Path | None) -> list[str]:
    """Return the lines to compare tokenizers on."""
    read = text.read_text(encoding="utf-8") if text else __doc__ or ""
    return [line.strip() for line in read.splitlines() if line.strip()][:500]


def export(pruned: Path, path: Path, kind: str) -> Exported:
    """Export a file of one type."""
    return export_gguf(RunConfig.build(model=str(pruned), device="cpu"), path, kind=kind, overwrite=True)


def examine(source: Path, place: Path, text: Path | None) -> None:
    """Prune a real model, and compare all types."""
    spec = str(text) if text else "demo"
    config = RunConfig.build(
        model=str(source), ratio=0.5, samples=32, seqlen=256, round_to=32, calibration=spec, device="cpu"
    )
    prune(config, place / "pruned")
    lines = [*read_lines(text), *ODD_LINES]
    for kind in ("f32", "f16", "bf16", "q8_0"):
        exported = export(place / "pruned", place / f"{kind}.gguf", kind)
        difference = compare_logits(place / "pruned", place / f"{kind}.gguf", 200)
        print(
            f"{source.name}, {kind} ({exported.architecture}, {exported.bytes / 1e6:.2f} MB): {difference:.2g}",
            flush=True,
        )
        if kind == "f32":
            wrong = compare_tokens(place / "pruned", place / "f32.gguf", lines)
            expected, generated = compare_text(place / "pruned", place / "f32.gguf")
            print(f"{source.name}: {wrong} of {len(lines)} texts are tokenised differently")
            print(f"{source.name}: {'the same' if expected == generated else 'another'} continuation: {generated!r}")


def main() -> None:
    """Print one line for each comparison; fail where one at float32 is 0.01 or more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--text", type=Path)
    given = parser.parse_args()
    silence_transformers()
    torch.set_num_threads(1)
    worst = 0.0
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            pruned = write_tiny(case, Path(folder))
            exported = export(pruned, Path(folder, "tiny.gguf"), "f32")
            difference = compare_logits(pruned, Path(folder, "tiny.gguf"))
            worst = max(worst, difference)
            print(f"{name} ({exported.architecture}): {difference:.2g}", flush=True)
    examine_tokenizers(read_lines(given.text))
    for source in given.models:
        with tempfile.TemporaryDirectory() as folder:
            examine(source, Path(folder), given.text)
    sys.exit(worst >= 1e-2)


if __name__ == "__main__":
    main()
