"""Measure a model's parameters, bytes and FLOPs per token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cfsp_framework.api.records import Size
from cfsp_framework.modeling.config_facts import experts_per_token


@dataclass(frozen=True)
class TokenProducts:
    """Weights that one token is multiplied with, each one multiplication and one addition."""

    dense: int
    """In projections and convolutions, without the head."""
    head: int
    experts: int
    """In the experts that the token is routed to."""
    expert_bytes: int
    """Bytes of all experts."""
    expert_share: float
    """Share of the experts that the token is routed to."""

    @property
    def total(self) -> int:
        return self.dense + self.head + self.experts


def measure_size(model: PreTrainedModel) -> Size:
    """Return parameters (tied ones once), their bytes, and FLOPs per token without attention scores."""
    parameters = list(model.parameters())
    return Size(
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        flops_per_token=2 * count_products(model).total,
    )


def count_products(model: PreTrainedModel) -> TokenProducts:
    """Count the weights that one token is multiplied with; blocks are counted at the widths they have."""
    head = model.get_output_embeddings()
    routed = experts_per_token(model.config)
    dense = experts = expert_bytes = 0
    share = 1.0
    for module in model.modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear | Conv1D | nn.Conv1d):
            dense += module.weight.numel()
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3:  # the matrices of all experts, (E, ...)
                share = min(1.0, routed / len(parameter))
                experts += int(parameter.numel() * share)
                expert_bytes += parameter.numel() * parameter.element_size()
    head_products = head.weight.numel() if isinstance(head, nn.Linear) else 0
    return TokenProducts(dense, head_products, experts, expert_bytes, share)
