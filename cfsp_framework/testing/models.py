"""Tiny random models of several families, made in memory, and what the host measures of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfsp_framework.api.components import Collector, Compensator, Criterion
from cfsp_framework.api.data import Site, Update
from cfsp_framework.errors import CfspError, ConfigError, did_you_mean
from cfsp_framework.host.registry import ConfiguredComponent, Origin
from cfsp_framework.testing.errors import ContractError, NotApplicable
from cfsp_framework.testing.samples import built_ins, made, provider

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp_framework.modeling.decoder import Decoder

VOCABULARY = 259
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
    """A new random model of two blocks with 24 channels each; ``name`` is one of TINY.

    Raises:
        ConfigError: there is none of that name.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in TINY:
        raise ConfigError(f"There is no tiny model {name!r}.{did_you_mean(name, TINY)}")
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **TINY[name])).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1 or path.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    model.to(dtype)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    return model


def tiny_decoder(name: str = "llama", dtype: torch.dtype = torch.float32) -> Decoder:
    """The same, opened as a run opens it."""
    from cfsp_framework.modeling.decoder import open_decoder

    return open_decoder(tiny_model(name, dtype), built_ins())


def write_checkpoint(name: str, folder: Path) -> Path:
    """The same in a folder, with a tokenizer of one token a byte: a MODEL for the command line."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tiny_model(name).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    ).save_pretrained(folder)
    return folder


def calibration_windows(windows: int = 12, seqlen: int = 16) -> Tensor:
    """Random token ids ``(N, T)`` for the tiny models."""
    return torch.randint(3, VOCABULARY, (windows, seqlen), generator=torch.Generator().manual_seed(0))


def scores(criterion: Criterion, name: str, collectors: Sequence[type[Collector]], batch_size: int) -> list[Tensor]:
    """A criterion's scores ``(F,)`` of every feed-forward of a tiny model.

    Raises:
        ContractError: the host refuses something.
    """
    from cfsp_framework.engine.collect import collect
    from cfsp_framework.engine.replay import ForwardOptions
    from cfsp_framework.runtime.progress import Progress

    needed = [_chosen(made(provider(one, collectors))) for one in sorted(criterion.required())]
    try:
        found = collect(
            decoder(name),
            calibration_windows() if needed else None,
            {"scores": _chosen(criterion)},
            needed,
            forward_options=ForwardOptions(batch_size),
            seed=0,
            progress=Progress(visible=False),
        )
    except CfspError as error:
        raise ContractError(f"On a tiny {name} model: {error}") from error
    return [one.scores["scores"] for one in found]


def statistics(collector: Collector, name: str, batch_size: int) -> list[Tensor]:
    """What a collector measures of every feed-forward of a tiny model.

    Raises:
        ContractError: the host refuses something.
    """
    from cfsp_framework.engine.gradients import measure_gradients
    from cfsp_framework.engine.measure import measure_block
    from cfsp_framework.engine.replay import ForwardOptions, embed
    from cfsp_framework.runtime.progress import Progress

    model, windows, forward_options = decoder(name), calibration_windows(), ForwardOptions(batch_size)
    chosen = [_chosen(collector)]
    try:
        if collector.site is Site.GRADIENT:
            per_block = list(measure_gradients(model, windows, chosen, Progress(visible=False), forward_options))
        else:
            batches = embed(model, windows, forward_options)
            with torch.no_grad():
                per_block = [measure_block(model, index, batches, chosen) for index in range(len(model.blocks))]
    except CfspError as error:
        raise ContractError(f"On a tiny {name} model: {error}") from error
    return [seen[collector.provides] for block in per_block for seen in block]


def update(compensator: Compensator, name: str, collectors: Sequence[type[Collector]]) -> list[Update]:
    """What a compensator changes in the first block of a tiny model.

    Raises:
        ContractError: the host refuses something.
        NotApplicable: the compensator refuses the family, in words.
    """
    from cfsp_framework.engine.measure import measure_block
    from cfsp_framework.engine.replay import embed
    from cfsp_framework.errors import PluginError
    from cfsp_framework.pruning.compensation import compensate

    needed = [_chosen(made(provider(one, collectors))) for one in sorted(compensator.required())]
    model = decoder(name)
    try:
        batches = embed(model, calibration_windows())
        with torch.no_grad():
            seen = measure_block(model, 0, batches, needed)
        parts = model.feed_forwards(0, 0)
        kept = torch.arange(0, parts[0].width, 2)  # (K,)
        return [compensate(_chosen(compensator), one, kept, its) for one, its in zip(parts, seen, strict=True)]
    except PluginError as error:
        raise ContractError(f"On a tiny {name} model: {error}") from error
    except CfspError as error:
        raise NotApplicable(str(error)) from error


@cache
def decoder(name: str) -> Decoder:
    """A decoder that is only read."""
    return tiny_decoder(name)


def _chosen(component: Any) -> ConfiguredComponent[Any]:
    return ConfiguredComponent(component, Origin("under test"))


__all__ = ["TINY", "calibration_windows", "tiny_decoder", "tiny_model", "write_checkpoint"]
