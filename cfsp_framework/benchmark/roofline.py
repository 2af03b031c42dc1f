"""What one call of a model has to compute and to read: FLOPs and bytes, from its modules and its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import PreTrainedModel

from cfsp_framework.benchmark.hardware import product_rate, read_rate
from cfsp_framework.modeling.config_facts import attention_heads, head_size, read_fact
from cfsp_framework.modeling.size import count_products


class Work(BaseModel):
    """Of one call. A multiplication with an addition counts as two FLOPs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    flops: float
    bytes: float
    """Weights once, and the keys and values that are read and written; activations are left out."""


@dataclass(frozen=True)
class Machine:
    """What a device reaches in one dtype: FLOP/s of large matrix products, bytes/s of matrices that are read once."""

    flops: float
    bytes: float

    @classmethod
    def measured(cls, dtype: str, device: Any, seconds: float = 0.3) -> Machine:
        """Measure for ``seconds`` each."""
        return cls(flops=product_rate(dtype, device, seconds=seconds), bytes=read_rate(dtype, device, seconds=seconds))

    def seconds(self, work: Work) -> float:
        """The least a call can take: its computing or its reading, whichever is longer (the roofline)."""
        return max(work.flops / self.flops, work.bytes / self.bytes)

    def bound(self, work: Work) -> str:
        """What that is: ``FLOPs`` or ``bytes``."""
        return "FLOPs" if work.flops / self.flops >= work.bytes / self.bytes else "bytes"


@dataclass(frozen=True)
class Costs:
    """The sizes that a model's work is made of."""

    products: int
    """Weights a token is multiplied with, an expert's for its share of the tokens, the head aside."""
    head: int
    """The same of the head."""
    dense_bytes: int
    """Of the weights every call reads, the head among them; a table of embeddings is not read as a whole."""
    expert_bytes: int
    """Of all experts together."""
    expert_share: float
    """Of the experts, those one token needs."""
    attention: int
    """Queries' values of all layers together, heads times their size."""
    keys: int
    """Values that are kept for one token: keys and values of all layers."""
    itemsize: int

    def prefill(self, batch: int, length: int) -> Work:
        """A prompt of ``length`` tokens, causally, with logits for its last token alone."""
        tokens = batch * length
        scores = 2 * self.attention * batch * length**2  # two products of length^2 / 2 pairs each
        return Work(
            flops=2.0 * self.products * tokens + 2 * self.head * batch + scores,
            bytes=self._weights(tokens) + self.keys * tokens * self.itemsize,
        )

    def decode(self, batch: int, length: int) -> Work:
        """One more token for each of ``batch`` sequences that have ``length``."""
        return Work(
            flops=2.0 * (self.products + self.head) * batch + 4 * self.attention * batch * length,
            bytes=self._weights(batch) + self.keys * batch * length * self.itemsize,
        )

    def _weights(self, tokens: int) -> float:
        """Bytes of the weights that are read for so many tokens: the more, the more experts some of them need."""
        return self.dense_bytes + self.expert_bytes * (1 - (1 - self.expert_share) ** tokens)


def count_costs(model: PreTrainedModel) -> Costs:
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
    return Costs(
        products=products.dense + products.experts,
        head=products.head,
        dense_bytes=stored - products.expert_bytes - looked_up,
        expert_bytes=products.expert_bytes,
        expert_share=products.expert_share,
        attention=layers * attention_heads(config) * head_size(config),
        keys=2 * layers * int(read_fact(config, "num_key_value_heads") or attention_heads(config)) * head_size(config),
        itemsize=model.dtype.itemsize,
    )
