"""Train the demo model: `python -m cfsp_framework.data.demo.train --minutes 50` on one CPU core.

A small Llama and its own byte-level BPE tokenizer, from random weights, on the `train` split of `corpus` only. The
budget is wall-clock time: the learning rate falls to zero as the minutes run out, so that a slower machine ends with
a finished, if weaker, model.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cfsp_framework.data.demo import MODEL_FOLDER, corpus
from cfsp_framework.runtime.atomic_files import staged_folder

END_OF_TEXT: Final = "<|endoftext|>"
PROMPTS: Final = (
    "archive.read(path, encoding=None)\n\nReturn",
    "class archive.Reader(object)\n\nA class",
)
"""Beginnings of invented documents in the form of `corpus`."""


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates of the training; the result also depends on the text and the machine's speed."""

    vocabulary: int = 2048
    hidden: int = 160
    blocks: int = 8
    width: int = 768
    heads: int = 5
    context: int = 512
    window: int = 256
    batch: int = 8
    muon_rate: float = 8e-3
    adam_rate: float = 6e-3
    weight_decay: float = 0.1
    bpe_dropout: float = 0.1
    warmup: float = 0.02
    clip: float = 1.0


@dataclass(frozen=True)
class Score:
    """Loss of the model on one text."""

    nats_per_token: float
    tokens_per_byte: float

    @property
    def perplexity(self) -> float:
        """Perplexity per token, comparable only between models with this tokenizer."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte, comparable between tokenizers."""
        return self.nats_per_token * self.tokens_per_byte / math.log(2)


def train_tokenizer(texts: Sequence[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; it has a token for every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Build a Llama with random weights, most of them in the feed-forwards as in larger models."""
    end = tokenizer.backend_tokenizer.token_to_id(END_OF_TEXT)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.width,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        num_key_value_heads=1,
        head_dim=recipe.hidden // recipe.heads,
        max_position_embeddings=recipe.context,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    return LlamaForCausalLM(config)


def training_stream(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random
) -> Iterator[Tensor]:
    """Yield endless batches (B, T): all documents shuffled anew each epoch and packed without padding.

    The corpus is small and each document is read many times; BPE dropout tokenizes it differently each time, which delays
    overfitting. Documents are separated by the end-of-text token, which generation needs, or by a blank line as in
    `corpus.text`, half of the time each.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # the shipped one keeps its single spelling
    backend.model.dropout = recipe.bpe_dropout
    size = recipe.batch * recipe.window
    buffer: list[int] = []
    while True:
        shuffled = [rng.choice((END_OF_TEXT, "\n\n")) + text for text in rng.sample(texts, len(texts))]
        for encoding in backend.encode_batch(shuffled):
            buffer += encoding.ids
            while len(buffer) >= size:
                yield torch.tensor(buffer[:size]).view(recipe.batch, recipe.window)  # (B, T)
                del buffer[:size]


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the blocks, and AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def rate_factor(progress: float, warmup: float) -> float:
    """Return the learning rate relative to its peak: up during the warm-up, then linearly down to zero."""
    if progress < warmup:
        return progress / warmup
    return max(0.0, (1 - progress) / (1 - warmup))


def windows(text: str, tokenizer: PreTrainedTokenizerFast, length: int) -> Tensor:
    """Return the text as consecutive token windows (N, T); an incomplete last one is dropped."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])  # (tokens,)
    return ids[: len(ids) // length * length].view(-1, length)  # (N, T)


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, length: int) -> Score:
    """Return the mean loss over a text in windows of `length` tokens, each predicted from its own beginning."""
    ids = windows(text, tokenizer, length)  # (N, T)
    losses = [float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in torch.split(ids, 16)]
    return Score(sum(losses) / len(ids), ids.numel() / len(str(tokenizer.decode(ids.flatten())).encode()))


def step(
    model: LlamaForCausalLM, batch: Tensor, steppers: Sequence[torch.optim.Optimizer], factor: float, recipe: Recipe
) -> float:
    """Take one optimizer step at `factor` times the peak learning rates; return the loss in nats per token."""
    loss: Tensor = model(input_ids=batch, labels=batch).loss  # ()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    for stepper, peak in zip(steppers, (recipe.muon_rate, recipe.adam_rate), strict=True):
        for group in stepper.param_groups:
            group["lr"] = factor * peak
        stepper.step()
        stepper.zero_grad()
    return loss.item()


def fit(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, options: argparse.Namespace
) -> int:
    """Train until the minutes are up; return the number of tokens used."""
    stream = training_stream(corpus.documents("train"), tokenizer, recipe, random.Random(options.seed))
    test = corpus.text("test")
    steppers = optimizers(model, recipe)
    started = time.monotonic()
    steps, tokens, tenths, smoothed = 0, 0, 0, math.log(recipe.vocabulary)
    while (progress := (time.monotonic() - started) / (60 * options.minutes)) < 1:
        batch = next(stream)  # (B, T)
        loss = step(model, batch, steppers, rate_factor(progress, recipe.warmup), recipe)
        steps, tokens, smoothed = steps + 1, tokens + batch.numel(), 0.95 * smoothed + 0.05 * loss
        if steps % 50 == 0:
            print(
                f"step {steps}  {tokens / (time.monotonic() - started):.0f} tokens/s  train loss {smoothed:.3f}",
                flush=True,
            )
        if int(10 * progress) > tenths:
            tenths += 1
            score = evaluate(model, tokenizer, test, recipe.window)
            print(
                f"{progress:.0%}  test loss {score.nats_per_token:.3f}, {score.bits_per_byte:.3f} bits/byte", flush=True
            )
            if options.snapshots:
                save(model, tokenizer, options.snapshots)
    return tokens


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint in bfloat16."""
    with staged_folder(folder) as staging:
        copy.deepcopy(model).bfloat16().save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def continuation(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, sample: bool) -> str:
    """Return the prompt and its continuation by the model."""
    inputs = tokenizer(END_OF_TEXT + prompt, return_tensors="pt")
    writer: Any = model  # the annotations of `generate` leave out the very models it is for
    ids = writer.generate(**inputs, max_new_tokens=100, do_sample=sample)  # (1, T)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


README: Final = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# The demo model of cfsp-framework

A Llama of {parameters:,} parameters ({blocks} blocks, hidden size {hidden}, feed-forward width {width}, bfloat16)
with a byte-level BPE tokenizer of {vocabulary:,} tokens. It exists so that pruning can be tried, end to end and
without a network, on a model that has really learned something. It is good for nothing else.

- Text: the docstrings of the Python {python} standard library and the language topics of `pydoc_data`, as
  `cfsp_framework.data.demo.corpus` reads them. The `train` split only ({train_bytes:,} bytes); `calibration` and `test` are
  other modules and other topics, and were never trained on.
- Training: from random weights, {tokens:,} tokens in {minutes:g} minutes on {threads} CPU thread(s), by
  `python -m cfsp_framework.data.demo.train --minutes {minutes:g} --seed {seed}`. Wall-clock time is the budget, so another
  run ends near these numbers, not on them.
- Result on the `test` split, in windows of {window} tokens: perplexity {perplexity:.2f} per token,
  {bits:.3f} bits per byte.
- The text is small and was read many times. Perplexity on the beginning of `train` is {trained_perplexity:.2f}: judge
  a pruned model on `test` only.

The model was trained on CPython's documentation strings, copyright Python Software Foundation and its contributors,
which the PSF License Version 2 covers.

What it writes (greedy, then sampled):

```text
{samples}
```
"""


def report(folder: Path, recipe: Recipe, tokens: int, options: argparse.Namespace) -> str:
    """Return the model card, with the numbers of the saved checkpoint."""
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    score = evaluate(model, tokenizer, corpus.text("test"), recipe.window)
    trained = evaluate(model, tokenizer, corpus.text("train")[:200_000], recipe.window)
    samples = [continuation(model, tokenizer, prompt, i > 0) for i, prompt in enumerate(PROMPTS)]
    return README.format(
        **{**asdict(recipe), **vars(options), "vocabulary": len(tokenizer)},
        parameters=model.num_parameters(),
        python=".".join(platform.python_version_tuple()[:2]),
        train_bytes=len(corpus.text("train").encode()),
        tokens=tokens,
        perplexity=score.perplexity,
        bits=score.bits_per_byte,
        trained_perplexity=trained.perplexity,
        samples="\n\n".join(samples),
    )


def main() -> None:
    """Train, save, reload, evaluate, and write the model card."""
    parser = argparse.ArgumentParser(description="Train the demo model on the text every CPython carries.")
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="checkpoint folder to write")
    parser.add_argument("--minutes", type=float, default=50, help="training time, which the learning rate follows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--snapshots", type=Path, help="folder to keep the latest unfinished checkpoint in")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    recipe = Recipe()
    tokenizer = train_tokenizer(corpus.documents("train"), recipe)
    model = build_model(tokenizer, recipe)
    tokens = fit(model, tokenizer, recipe, options)
    save(model, tokenizer, options.out)
    card = report(options.out, recipe, tokens, options)
    (options.out / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
