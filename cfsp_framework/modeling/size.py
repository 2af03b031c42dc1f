"""Measure a model's parameters, bytes and FLOPs per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cfsp_framework.api.records import (
    Size,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure_size(model: PreTrainedModel) -> Size:
    """Parameters (tied ones once), their bytes, and FLOPs per token."""
    parameters = list(model.parameters())
    products = sum(_products(module, model) for module in model.modules())
    return Size(
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        flops_per_token=2 * products,
    )


def _products(module: nn.Module, model: PreTrainedModel) -> int:
    """Multiplications a token needs in a module's own matrices, an expert's for its share of the tokens."""
    if isinstance(module, nn.Linear | Conv1D):
        weight: torch.Tensor = module.weight
        return weight.numel()
    own = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
    values = model.config.get_text_config().to_dict()
    chosen = values.get("num_experts_per_tok") or values.get("top_k") or 1
    return sum(int(parameter.numel() * min(1.0, chosen / len(parameter))) for parameter in own)
