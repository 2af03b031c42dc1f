"""Write a pruned model as ONNX through ``torch.export``: from tokens to logits, for any batch and any length."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cfsp_framework.errors import CfspError, ConfigError, ModelError, one_line

MODEL_FILE = "model.onnx"
_INPUTS = ("input_ids", "attention_mask")
_SHAPES = ((1, 5), (3, 8))
"""Batches and lengths to compare the result on; tracing uses others."""


class _Logits(nn.Module):
    """Model without its key-value cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits ``(B, T, V)`` of tokens ``(B, T)``; ``attention_mask (B, T)`` is 1 for a token and 0 for padding."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits  # (B, T, V)


def check_packages() -> None:
    """Check, before any work is done, that the packages of the extra ``onnx`` are installed.

    Raises:
        ConfigError: a package is missing.
    """
    for name in ("onnx", "onnxruntime", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"--format onnx needs the package {name}: pip install 'cfsp-framework[onnx]'.") from error


@torch.no_grad()
def write_onnx(model: PreTrainedModel, length: int | None, folder: Path) -> None:
    """Write ``model`` to ``folder``, for texts of up to ``length`` tokens; weights above 1 GiB get a file of their own.

    Raises:
        ModelError: PyTorch cannot export this model for any batch and length.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (2, 7), generator=draw)  # (B, T)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", min=2, max=length)
    dynamic = {name: {0: batch, 1: tokens} for name in _INPUTS}
    with _silenced_exporter():
        try:
            program = torch.onnx.export(
                _Logits(model),
                (ids, torch.ones_like(ids)),
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=list(_INPUTS),
                output_names=["logits"],
                verbose=False,
            )
        except Exception as error:  # torch.export and the exporter share no class of errors
            reason = one_line(error.__cause__ or error)[:200]
            raise ModelError(f"PyTorch cannot export this {model.config.model_type} model as ONNX: {reason}") from error
        assert program is not None, "dynamo=True gives a program"
        large = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) > 1 << 30
        program.save(str(folder / MODEL_FILE), external_data=large)


@torch.no_grad()
def compare_onnx(model: PreTrainedModel, folder: Path) -> float:
    """Return the largest difference of a logit between ONNX Runtime and ``model``, with and without padding.

    Raises:
        CfspError: the logits differ.
    """
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(folder / MODEL_FILE), providers=["CPUExecutionProvider"])
    module, worst = _Logits(model), 0.0
    for batch, length in _SHAPES:
        ids = torch.randint(model.config.get_text_config().vocab_size, (batch, length))  # (B, T)
        mask = torch.ones_like(ids)  # (B, T)
        mask[1:, :2] = 0  # padded on the left, as when generating
        expected = module(ids, mask).numpy()  # (B, T, V)
        (logits,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        difference = float(np.abs(logits - expected)[mask.bool().numpy()].max())
        if not difference <= 1e-3 * float(np.abs(expected).max()):
            raise CfspError(
                f"ONNX Runtime does not compute what the pruned model computes: logits differ by {difference:.3g} on "
                f"{batch} texts of {length} tokens. Nothing was written; please report this."
            )
        worst = max(worst, difference)
    return worst


@contextmanager
def _silenced_exporter() -> Generator[None]:
    """Hide the exporter's log and warnings inside the block."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
