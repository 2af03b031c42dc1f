"""Describe the families that are known by name; the host detects others in the model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cfsp_framework import Architecture, FeedForwardLayout, hookimpl
from cfsp_framework.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GATED = FeedForwardLayout(path="mlp", gate="gate_proj", up="up_proj", down="down_proj")
# A norm, or a multiplier, between the feed-forward and the residual stream.
NORMALISED = replace(GATED, additive=False)
FUSED = FeedForwardLayout(path="mlp", gate="gate_up_proj", up="gate_up_proj", down="down_proj")
EXPERTS = replace(FUSED, path="mlp.experts", experts=True)
ROUTED = replace(EXPERTS, width_key="moe_intermediate_size")
ROUTED_SHARED = replace(GATED, path="mlp.shared_experts", width_key="moe_intermediate_size")


def _plain(up: str, down: str, path: str = "mlp", width_key: str = "intermediate_size") -> FeedForwardLayout:
    return FeedForwardLayout(path=path, up=up, down=down, width_key=width_key)


LLAMA_LIKE: dict[str, tuple[FeedForwardLayout, ...]] = {
    **dict.fromkeys(
        ("llama", "internlm3", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "smollm3", "olmo", "cohere"),
        (GATED,),
    ),
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma3n_text", "olmo2", "granite"), (NORMALISED,)),
    "stablelm": (GATED,),
    "phi3": (FUSED,),
    "glm4": (replace(FUSED, additive=False),),
    "nemotron": (_plain("up_proj", "down_proj"),),
    "starcoder2": (_plain("c_fc", "c_proj"),),
    "phi": (_plain("fc1", "fc2"),),
    "mixtral": (EXPERTS,),
    "olmoe": (EXPERTS,),
    "gpt_oss": (EXPERTS,),
    "qwen3_moe": (GATED, ROUTED),
    "qwen2_moe": (
        GATED,
        ROUTED,
        replace(GATED, path="mlp.shared_expert", width_key="shared_expert_intermediate_size"),
    ),
    "llama4_text": (
        replace(GATED, path="feed_forward", width_key="intermediate_size_mlp"),
        replace(EXPERTS, path="feed_forward.experts"),
        replace(GATED, path="feed_forward.shared_expert"),
    ),
}

OTHERS = {
    "opt": Architecture("opt", "model", "model.decoder.layers", (_plain("fc1", "fc2", "", "ffn_dim"),)),
    "gpt2": Architecture("gpt2", "transformer", "transformer.h", (_plain("c_fc", "c_proj", width_key="n_inner"),)),
    "gpt_bigcode": Architecture(
        "gpt_bigcode", "transformer", "transformer.h", (_plain("c_fc", "c_proj", width_key="n_inner"),)
    ),
    "gptj": Architecture("gptj", "transformer", "transformer.h", (_plain("fc_in", "fc_out", width_key="n_inner"),)),
    "gpt_neo": Architecture("gpt_neo", "transformer", "transformer.h", (_plain("c_fc", "c_proj"),)),
    "gpt_neox": Architecture("gpt_neox", "gpt_neox", "gpt_neox.layers", (_plain("dense_h_to_4h", "dense_4h_to_h"),)),
    "falcon": Architecture(
        "falcon",
        "transformer",
        "transformer.h",
        (_plain("dense_h_to_4h", "dense_4h_to_h", width_key="ffn_hidden_size"),),
    ),
}

# Families whose attention returns only what the block adds to the residual stream.
DROPPABLE = frozenset(
    {
        *(
            "gemma",
            "gemma2",
            "gemma3_text",
            "granite",
            "internlm3",
            "llama",
            "ministral3",
            "mistral",
            "nemotron",
            "olmo",
        ),
        *("olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"),
    }
)


@hookimpl(trylast=True)
def cfsp_architecture(config: PreTrainedConfig) -> Architecture | None:
    """Describe the family of ``config`` if it is known.

    Raises:
        ModelError: the family cannot be pruned exactly.
    """
    family = config.model_type
    if family in OTHERS:
        return replace(OTHERS[family], attention=None)
    layouts = LLAMA_LIKE.get(family)
    if family == "deepseek_v3":  # shared experts are as wide as so many routed ones
        layouts = (GATED, ROUTED, replace(ROUTED_SHARED, times=config.n_shared_experts))
    if family == "gemma3n_text" and any(config.activation_sparsity_pattern or ()):
        raise ModelError(
            "this Gemma 3n keeps the channels above a quantile over all channels of a block, which changes when some are "
            "removed: it cannot be pruned exactly."
        )
    if layouts is None:
        return None
    attention = "self_attn" if family in DROPPABLE else None
    return Architecture(family, "model", "model.layers", layouts, attention)
