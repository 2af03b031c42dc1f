"""Where the families with gated feed-forwards keep them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cfsp_framework import Architecture, FeedForwardLayout, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SEPARATE = FeedForwardLayout(path="mlp", gate="gate_proj", up="up_proj", down="down_proj")
NORMALISED = replace(
    SEPARATE, additive=False
)  # a norm, or a multiplier, between the feed-forward and the residual stream
FUSED = FeedForwardLayout(path="mlp", gate="gate_up_proj", up="gate_up_proj", down="down_proj")

LAYOUTS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"), SEPARATE),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "granite"), NORMALISED),
    "phi3": FUSED,
}


@hookimpl(trylast=True)
def cfsp_architecture(config: PreTrainedConfig) -> Architecture | None:
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        return None
    return Architecture(family=config.model_type, base="model", blocks="model.layers", feed_forward=layout)
