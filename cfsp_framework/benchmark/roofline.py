"""What one call of a model has to compute and to read: FLOPs and bytes, from its modules and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cfsp_framework.benchmark.hardware import product_rate, read_rate


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
    """Of ``model`` as it is, every block with the width it has."""
    values: Mapping[str, Any] = model.config.get_text_config().to_dict()  # getattr raises on a pruned model's
    chosen = values.get("num_experts_per_tok") or values.get("top_k") or 1
    head = model.get_output_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    products = expert_products = expert_bytes = 0
    share = 1.0
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            products += module.weight.numel()
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3:  # the matrices of all experts
                share = min(1.0, chosen / len(parameter))
                expert_products += int(parameter.numel() * share)
                expert_bytes += parameter.numel() * parameter.element_size()
    everything = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    tied = {id(head.weight)} if isinstance(head, nn.Linear) else set[int]()
    only_looked_up = {id(table.weight): table.weight for table in tables if id(table.weight) not in tied}
    looked_up = sum(weight.numel() * weight.element_size() for weight in only_looked_up.values())
    heads = int(values.get("num_attention_heads") or values.get("n_head") or 1)
    layers = int(values.get("num_hidden_layers") or values.get("n_layer") or 1)
    layers -= len((values.get("dropped_attention") or {}).get("blocks", ()))
    hidden = int(values.get("hidden_size") or values.get("n_embd") or 0)
    size = int(values.get("head_dim") or hidden // heads)
    return Costs(
        products=products + expert_products,
        head=head.weight.numel() if isinstance(head, nn.Linear) else 0,
        dense_bytes=everything - expert_bytes - looked_up,
        expert_bytes=expert_bytes,
        expert_share=share,
        attention=layers * heads * size,
        keys=2 * layers * int(values.get("num_key_value_heads") or heads) * size,
        itemsize=model.dtype.itemsize,
    )
