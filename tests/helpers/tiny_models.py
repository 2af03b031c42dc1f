"""Make tiny random models of several families, with a tokenizer."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from cfsp_framework.testing.models import byte_tokenizer, random_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 320
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING = {"head_dim": 8, "sliding_window": 16}
_GEMMA = {**_SLIDING, "query_pre_attn_scalar": 8}

TINY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3_text": ("gemma3_text", {**_GEMMA, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"residual_multiplier": 0.5}),
    "smollm3": ("smollm3", {}),
}
"""Model type and settings by the name tests call them."""

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
"""Models with experts, for tests that name them."""


def make_random_model(name: str, settings: dict[str, Any]) -> PreTrainedModel:
    """Make a model called ``name`` here with other ``settings`` of its configuration."""
    from transformers import AutoConfig

    family, changes = (TINY_MODELS | MIXTURES)[name]
    model = random_model(AutoConfig.for_model(family, **{**_BASE, **changes, **settings}), 0.15)
    model.generation_config.update(bos_token_id=1, eos_token_id=[2, 5], pad_token_id=0, max_new_tokens=7)
    return model


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer with a few merges."""
    texts = ["the quick brown fox jumps over the lazy dog", "hello world, this is a test"]
    return byte_tokenizer(texts=texts, vocabulary=VOCABULARY, max_length=128)


def plant_massive_activation(model: PreTrainedModel, block: int, token: int, sample: Tensor, size: float) -> None:
    """Make ``token`` leave ``block`` of a Llama with a residual stream of about norm ``size``, and few others.

    Channel 0 of the block's feed-forward becomes a detector of that token among those of ``sample (N, T)``, as massive
    activations arise in trained models (arXiv 2402.17762).
    """
    import torch

    feed_forward: Any = model.model.layers[block].mlp
    entering: list[Tensor] = []
    hook = feed_forward.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    with torch.no_grad():
        model(sample)
        hook.remove()
        features = entering[0].flatten(0, 1)  # (N * T, D)
        present = features[sample.flatten() == token].mean(0)  # (D,)
        spread = features.mT @ features / len(features)  # (D, D)
        detector = torch.linalg.solve(
            spread + 1e-3 * spread.diagonal().mean() * torch.eye(len(spread)), present
        )  # (D,)
        detector *= 8 / (detector @ present)
        feed_forward.gate_proj.weight[0] = detector
        feed_forward.up_proj.weight[0] = detector
        direction = torch.randn(len(present), generator=torch.Generator().manual_seed(block))  # (D,)
        feed_forward.down_proj.weight[:, 0] = size / 64 * direction / direction.norm()
