"""Read facts of a model from its configuration, whose keys differ between families."""

from __future__ import annotations

from typing import Any

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def read_fact(config: Any, *keys: str) -> Any:
    """Return the value of the first key that is set in the decoder's configuration, or None.

    A key also matches under the family's own name for it (``n_embd`` for ``hidden_size``). The dictionary is read, because
    an attribute whose value differs between the blocks of a pruned model raises.
    """
    text_config = config.get_text_config()
    values, own_names = text_config.to_dict(), text_config.attribute_map
    return next((values[name] for key in keys for name in (key, own_names.get(key, key)) if values.get(name)), None)


def experts_per_token(config: Any) -> int:
    """Return the number of experts each token is routed to; 1 for a model without experts, the most where blocks differ."""
    count = read_fact(config, *_EXPERTS_PER_TOKEN) or 1
    return max(count) if isinstance(count, list | tuple) else int(count)


def context_length(config: Any) -> int | None:
    """Return the longest sequence the model was built for, in tokens, if its configuration states it."""
    length = read_fact(config, "max_position_embeddings", "n_positions")
    return int(length) if length else None


def attention_heads(config: Any) -> int:
    """Return the number of query heads of a block; the most where blocks differ."""
    heads = read_fact(config, "num_attention_heads") or 1
    return max(heads) if isinstance(heads, list | tuple) else int(heads)


def head_size(config: Any) -> int:
    """Return the channels of an attention head."""
    return int(read_fact(config, "head_dim") or (read_fact(config, "hidden_size") or 0) // attention_heads(config))
