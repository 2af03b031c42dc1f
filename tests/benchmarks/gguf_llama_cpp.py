"""Exported GGUF files in llama.cpp itself: are logits, tokens and generated text those of Transformers?

    pip install --no-binary llama-cpp-python llama-cpp-python    # builds llama.cpp, some minutes
    python tests/benchmarks/gguf_llama_cpp.py [MODEL ...] [--text FILE]

Tiny random models show every form that can be exported. Every MODEL, a folder, is pruned with widths that differ between
blocks, exported in all types, compared on random tokens and on lines of the text, and asked to go on with a sentence.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from cfsp_framework import RunConfig, prune
from cfsp_framework.architectures import open_decoder
from cfsp_framework.checkpoint import save_model
from cfsp_framework.deployment.export import Exported, export_gguf
from cfsp_framework.files import staged_folder
from cfsp_framework.models import load_model, open_model, quiet
from cfsp_framework.plugins import load_plugins
from cfsp_framework.surgery import apply_plan, drop_attention

sys.path.insert(0, str(Path(__file__).parents[1]))
import families

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


def write_tiny(case: Case, place: Path) -> Path:
    """The pruned checkpoint of a case."""
    model = families.build(case.family, **case.settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    dense, pruned = families.write(model, place / "dense"), place / "pruned"
    loaded = load_model(RunConfig.build(model=str(dense), device="cpu"))
    decoder = open_decoder(loaded.model, load_plugins())
    plan = families.plan_of(decoder, case.kept)
    drop_attention(decoder, case.dropped)
    apply_plan(decoder, plan, families.add_biases(decoder, case.biases))
    with staged_folder(pruned) as folder:
        save_model(decoder, loaded, folder)
    return pruned


def compare_logits(pruned: Path, path: Path, length: int = 90) -> float:
    """The largest difference of a logit between Transformers in float32 and llama.cpp with a float32 cache."""
    model: Any = open_model(pruned, "float32")
    size = model.config.vocab_size
    ids = torch.randint(3, size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()  # (T, V)
    found = open_llama(path, length)
    found.eval(ids[0].tolist())
    return float(np.abs(np.array(found.scores)[:length] - expected).max())


def open_llama(path: Path, length: int) -> Any:
    """llama.cpp with the file."""
    from llama_cpp import Llama

    room = length + 8
    return Llama(
        str(path), n_ctx=room, n_batch=room, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0
    )


def compare_tokens(pruned: Path, path: Path, lines: Sequence[str]) -> int:
    """How many lines the tokenizer in the file splits otherwise than the checkpoint's."""
    tokenizer, found = AutoTokenizer.from_pretrained(pruned), open_llama(path, 8)
    return sum(found.tokenize(line.encode(), add_bos=True, special=True) != tokenizer(line).input_ids for line in lines)


def compare_text(pruned: Path, path: Path) -> tuple[str, str]:
    """What both write after the same words, taking the likeliest token each time."""
    tokenizer, model, found = AutoTokenizer.from_pretrained(pruned), open_model(pruned, "float32"), open_llama(path, 99)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=LENGTH, do_sample=False)  # type: ignore[operator]
    expected = tokenizer.decode(written[0, ids.shape[1] :])
    answer = found.create_completion(PROMPT, max_tokens=LENGTH, temperature=0.0)
    return expected.strip(), answer["choices"][0]["text"].strip()


def export(pruned: Path, path: Path, kind: str) -> Exported:
    """The file of one type."""
    return export_gguf(RunConfig.build(model=str(pruned), device="cpu"), path, kind=kind, overwrite=True)


def examine(source: Path, place: Path, text: Path | None) -> None:
    """Prune a real model, and compare all types."""
    spec = str(text) if text else "demo"
    config = RunConfig.build(
        model=str(source), ratio=0.5, samples=32, seqlen=256, round_to=32, calibration=spec, device="cpu"
    )
    prune(config, place / "pruned")
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()][:500] if text else []
    lines += ["  two spaces\n\nand\tmore", "naïve café — ☃ 日本語", "I'VE 3 or 12345.67", "a", "<s> hi </s>"]
    for kind in ("f32", "f16", "bf16", "q8_0"):
        made = export(place / "pruned", place / f"{kind}.gguf", kind)
        difference = compare_logits(place / "pruned", place / f"{kind}.gguf", 200)
        print(f"{source.name}, {kind} ({made.architecture}, {made.bytes / 1e6:.2f} MB): {difference:.2g}", flush=True)
        if kind == "f32":
            wrong = compare_tokens(place / "pruned", place / "f32.gguf", lines)
            expected, found = compare_text(place / "pruned", place / "f32.gguf")
            print(f"{source.name}: {wrong} of {len(lines)} texts are tokenised otherwise")
            print(f"{source.name}: {'the same' if expected == found else 'another'} continuation: {found!r}")


def main() -> None:
    """Print one line for each comparison; fail where one at float32 is 0.01 or more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--text", type=Path)
    given = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    worst = 0.0
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            pruned = write_tiny(case, Path(folder))
            made = export(pruned, Path(folder, "tiny.gguf"), "f32")
            difference = compare_logits(pruned, Path(folder, "tiny.gguf"))
            worst = max(worst, difference)
            print(f"{name} ({made.architecture}): {difference:.2g}", flush=True)
    for source in given.models:
        with tempfile.TemporaryDirectory() as folder:
            examine(source, Path(folder), given.text)
    sys.exit(worst >= 1e-2)


if __name__ == "__main__":
    main()
