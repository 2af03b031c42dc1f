"""Count the FLOPs and bytes of one call of a model, and the least time a machine needs for them (the roofline)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from cfsp_framework.benchmark.hardware import product_rate, read_rate
from cfsp_framework.modeling.config_facts import attention_heads, head_size, read_fact
from cfsp_framework.modeling.size import count_products


@dataclass(frozen=True)
class CallCosts:
    """FLOPs and bytes of one call; a multiplication with an addition counts as two FLOPs."""

    flops: float
    bytes: float
    """Weights once, and the keys and values that are read and written; without activations."""


@dataclass(frozen=True)
class MachineRates:
    """Rates of a device in one dtype: FLOP/s of large matrix products, bytes/s of matrices that are read once."""

    flops: float
    bytes: float

    @classmethod
    def measure(cls, dtype: str, device: Any, seconds: float = 0.3) -> MachineRates:
        """Measure both rates, for ``seconds`` each."""
        return cls(flops=product_rate(dtype, device, seconds=seconds), bytes=read_rate(dtype, device, seconds=seconds))

    def seconds(self, costs: CallCosts) -> float:
        """Return the least time of a call: computing or reading, whichever takes longer."""
        return max(costs.flops / self.flops, costs.bytes / self.bytes)

    def bound(self, costs: CallCosts) -> Literal["FLOPs", "bytes"]:
        """Return which of the two takes longer."""
        return "FLOPs" if costs.flops / self.flops >= costs.bytes / self.bytes else "bytes"


@dataclass(frozen=True)
class ModelCosts:
    """Sizes that determine the costs of a model's calls."""

    products: int
    """Weights that one token is multiplied with, including those of its experts, without the head."""
    head: int
    """Weights of the head."""
    dense_bytes: int
    """Weights that every call reads, including the head, without tables of embeddings."""
    expert_bytes: int
    """Weights of all experts."""
    expert_share: float
    """Share of the experts that one token is routed to."""
    attention: int
    """Query values of one token in all layers: heads times head size."""
    keys: int
    """Cached values of one token: keys and values of all layers."""
    itemsize: int

    def prefill(self, batch: int, length: int) -> CallCosts:
        """Return the costs of causal prompts of ``length`` tokens, with logits for the last token alone."""
        tokens = batch * length
        scores = 2 * self.attention * batch * length**2  # two products of length^2 / 2 pairs each
        return CallCosts(
            flops=2.0 * self.products * tokens + 2 * self.head * batch + scores,
            bytes=self._weight_bytes(tokens) + self.keys * tokens * self.itemsize,
        )

    def decode(self, batch: int, length: int) -> CallCosts:
        """Return the costs of one more token for each of ``batch`` sequences of ``length`` tokens."""
        return CallCosts(
            flops=2.0 * (self.products + self.head) * batch + 4 * self.attention * batch * length,
            bytes=self._weight_bytes(batch) + self.keys * batch * length * self.itemsize,
        )

    def _weight_bytes(self, tokens: int) -> float:
        """Return the bytes of the weights read for ``tokens`` tokens, which are routed to experts independently."""
        return self.dense_bytes + self.expert_bytes * (1 - (1 - self.expert_share) ** tokens)


def count_costs(model: PreTrainedModel) -> ModelCosts:
    """Count the costs of ``model``, every block at the width it has."""
    config = model.config
    products, head = count_products(model), model.get_output_embeddings()
    stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    if isinstance(head, nn.Linear):
        tables.pop(id(head.weight), None)  # a tied table is read as the head
    looked_up = sum(weight.numel() * weight.element_size() for weight in tables.values())
    dropped = (read_fact(config, "dropped_attention") or {}).get("blocks", ())
    layers = int(read_fact(config, "num_hidden_layers") or 1) - len(dropped)
    return ModelCosts(
        products=products.dense + products.experts,
        head=products.head,
        dense_bytes=stored - products.expert_bytes - looked_up,
        expert_bytes=products.expert_bytes,
        expert_share=products.expert_share,
        attention=layers * attention_heads(config) * head_size(config),
        keys=2 * layers * int(read_fact(config, "num_key_value_heads") or attention_heads(config)) * head_size(config),
        itemsize=model.dtype.itemsize,
    )
