"""Tiny random models of several families, and what the host measures and computes on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfsp_framework.api.components import Collector, Compensator, Criterion
from cfsp_framework.api.data import Site, Update
from cfsp_framework.errors import ConfigError, did_you_mean
from cfsp_framework.testing.contract import checked_by_host, configure
from cfsp_framework.testing.samples import built_ins, find_collectors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from cfsp_framework.modeling.decoder import Decoder

VOCABULARY = 259
"""Three special tokens and one for each byte."""
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **_IDS}
_LLAMA = {**_SMALL, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 64}
TINY: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "opt": {**_SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "phi3": _LLAMA,
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 64, **_IDS,
    },
    "mixtral": {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 1},
}  # fmt: skip
"""Model types of Transformers: gated, plain with biases, fused, Conv1D, and a mixture of experts."""


def tiny_model(name: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Make a random model of two blocks with 24 channels each; ``name`` is a key of ``TINY``.

    Raises:
        ConfigError: the name is unknown.
    """
    from transformers import AutoConfig

    if name not in TINY:
        raise ConfigError(f"Unknown tiny model {name!r}.{did_you_mean(name, TINY)}")
    model = random_model(AutoConfig.for_model(name, **TINY[name]), 0.2)
    model.to(dtype)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    return model


def tiny_decoder(name: str = "llama", dtype: torch.dtype = torch.float32) -> Decoder:
    """Make a tiny model and open it as a run does."""
    from cfsp_framework.modeling.decoder import open_decoder

    return open_decoder(tiny_model(name, dtype), built_ins())


def write_checkpoint(name: str, folder: Path) -> Path:
    """Write a tiny model with a tokenizer of one token per byte, a MODEL for the command line."""
    tiny_model(name).save_pretrained(folder)
    byte_tokenizer(max_length=64).save_pretrained(folder)
    return folder


def random_model(config: PreTrainedConfig, scale: float, factory: Any = None) -> PreTrainedModel:
    """Make a model with weights and biases of standard deviation ``scale``, so large that changes show in the logits.

    Norms stay as they are initialised. ``factory`` is an auto class of Transformers, by default of causal models.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model: PreTrainedModel = (factory or AutoModelForCausalLM).from_config(config).eval()
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1 or path.endswith("bias"):
                parameter.normal_(0, scale)
    return model


def byte_tokenizer(
    *, texts: Sequence[str] = (), vocabulary: int = VOCABULARY, max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """Make a tokenizer with three special tokens and one token per byte, and merges learnt from ``texts``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=max_length
    )


def calibration_windows(windows: int = 12, seqlen: int = 16) -> Tensor:
    """Make random token ids ``(N, T)`` for the tiny models."""
    return torch.randint(3, VOCABULARY, (windows, seqlen), generator=torch.Generator().manual_seed(0))


def score_model(
    criterion: Criterion, name: str, collectors: Sequence[type[Collector]], batch_size: int
) -> list[Tensor]:
    """Return a criterion's scores ``(F,)`` of every feed-forward of a tiny model.

    Raises:
        ContractError: the host refuses something.
    """
    from cfsp_framework.engine.collect import collect
    from cfsp_framework.engine.replay import ForwardOptions
    from cfsp_framework.runtime.progress import Progress

    needed = find_collectors(criterion.required(), collectors)
    with checked_by_host(_describe(name)):
        measurements = collect(
            _decoder(name),
            calibration_windows() if needed else None,
            {"scores": configure(criterion)},
            needed,
            forward_options=ForwardOptions(batch_size),
            seed=0,
            progress=Progress(visible=False),
        )
    return [measurement.scores["scores"] for measurement in measurements]


def measure_model(collector: Collector, name: str, batch_size: int) -> list[Tensor]:
    """Return a collector's statistic of every feed-forward of a tiny model.

    Raises:
        ContractError: the host refuses something.
    """
    from cfsp_framework.engine.gradients import measure_gradients
    from cfsp_framework.engine.measure import measure_block
    from cfsp_framework.engine.replay import ForwardOptions, embed
    from cfsp_framework.runtime.progress import Progress

    decoder, windows, forward_options = _decoder(name), calibration_windows(), ForwardOptions(batch_size)
    configured = [configure(collector)]
    with checked_by_host(_describe(name)):
        if collector.site is Site.GRADIENT:
            per_block = list(measure_gradients(decoder, windows, configured, Progress(visible=False), forward_options))
        else:
            batches = embed(decoder, windows, forward_options)
            with torch.no_grad():
                per_block = [measure_block(decoder, i, batches, configured) for i in range(len(decoder.blocks))]
    return [statistics[collector.provides] for block in per_block for statistics in block]


def compensate_block(compensator: Compensator, name: str, collectors: Sequence[type[Collector]]) -> list[Update]:
    """Return a compensator's updates of the first block of a tiny model.

    Raises:
        ContractError: the host refuses something.
        NotApplicable: the compensator refuses the family with an error of this package.
    """
    from cfsp_framework.engine.measure import measure_block
    from cfsp_framework.engine.replay import embed
    from cfsp_framework.pruning.compensation import compensate

    needed, decoder = find_collectors(compensator.required(), collectors), _decoder(name)
    with torch.no_grad(), checked_by_host(_describe(name), may_refuse=True):
        measured = measure_block(decoder, 0, embed(decoder, calibration_windows()), needed)
        feed_forwards = decoder.feed_forwards(0, 0)
        kept = torch.arange(0, feed_forwards[0].width, 2)  # (K,)
        parts = zip(feed_forwards, measured, strict=True)
        return [compensate(configure(compensator), part, kept, statistics) for part, statistics in parts]


@cache
def _decoder(name: str) -> Decoder:
    """Return a decoder that must not be changed."""
    return tiny_decoder(name)


def _describe(name: str) -> str:
    return f"a tiny {name} model"
