"""Writes a pruned model as ONNX through ``torch.export``: tokens in, logits out, any batch and any length."""

from __future__ import annotations

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

from cfsp_framework.errors import CfspError, ConfigError, ModelError

MODEL_FILE = "model.onnx"
_INPUTS = ("input_ids", "attention_mask")
_SHAPES = ((1, 5), (3, 8))
"""Batches and lengths the result is compared on; neither is the one it is traced with."""


class _Logits(nn.Module):
    """The model without its cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``(B, T)`` tokens and 1 where they count, else 0 -> ``(B, T, V)``."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def check_packages() -> None:
    """Refuse, before any work is done, to begin without the packages.

    Raises:
        ConfigError: one is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--format onnx needs the package {error.name}: pip install 'cfsp-framework[onnx]'."
        ) from error


@torch.no_grad()
def write_onnx(model: PreTrainedModel, length: int | None, folder: Path) -> None:
    """Write ``model`` to ``folder``, for texts of up to ``length`` tokens; weights beside the graph where they are many.

    Raises:
        ModelError: PyTorch cannot turn this model into a graph of any batch and length.
    """
    module = _Logits(model)
    ids = torch.randint(model.config.get_text_config().vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", min=2, max=length)
    dynamic = {name: {0: batch, 1: tokens} for name in _INPUTS}
    with _quietly():
        try:
            program = torch.onnx.export(
                module,
                (ids, torch.ones_like(ids)),
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=list(_INPUTS),
                output_names=["logits"],
                verbose=False,
            )
        except Exception as error:  # torch.export's and the exporter's have no class of their own in common
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise ModelError(f"PyTorch cannot turn this {model.config.model_type} model into ONNX: {reason}") from error
        assert program is not None, "dynamo=True gives a program"
        large = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) > 1 << 30
        program.save(str(folder / MODEL_FILE), external_data=large)


@torch.no_grad()
def compare_onnx(model: PreTrainedModel, folder: Path) -> float:
    """The largest difference of a logit between ONNX Runtime and ``model``, on batches with and without padding.

    Raises:
        CfspError: the file computes something else.
    """
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(folder / MODEL_FILE), providers=["CPUExecutionProvider"])
    module, worst = _Logits(model), 0.0
    for batch, length in _SHAPES:
        ids = torch.randint(model.config.get_text_config().vocab_size, (batch, length))
        mask = torch.ones_like(ids)
        mask[1:, :2] = 0  # padded on the left, as when generating
        expected = module(ids, mask).numpy()  # (B, T, V)
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        difference = float(np.abs(found - expected)[mask.bool().numpy()].max())
        if not difference <= 1e-3 * float(np.abs(expected).max()):
            raise CfspError(
                f"ONNX Runtime computes something else than the pruned model: logits are off by {difference:.3g} on "
                f"{batch} texts of {length} tokens. Nothing was kept; please report this."
            )
        worst = max(worst, difference)
    return worst


@contextmanager
def _quietly() -> Generator[None]:
    """Keep the exporter's advice to its developers off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
