"""Restore a model exactly after it was cut: its state is held by reference, nothing large is copied."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from cfsp_framework.modeling.decoder import Decoder


@dataclass(frozen=True)
class ModelState:
    """Parameters, submodules and integer attributes of a model's modules, and the values of its configuration."""

    modules: tuple[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]], ...]
    config: dict[str, Any]

    @classmethod
    def capture(cls, decoder: Decoder, block: int | None = None) -> ModelState:
        """Return the current state of a model, or of its configuration and one block only, by reference."""
        root = decoder.model if block is None else decoder.blocks[block]
        return cls(
            tuple(
                (module, dict(module._parameters), dict(module._modules), _integers(module))
                for module in root.modules()
            ),
            dict(vars(decoder.config)),
        )

    def restore(self, decoder: Decoder) -> None:
        """Give a model this state."""
        for module, parameters, modules, attributes in self.modules:
            _replace(module._parameters, parameters)
            _replace(module._modules, modules)
            vars(module).update(attributes)
        _replace(vars(decoder.config), self.config)


@contextmanager
def restored(decoder: Decoder, *, trained: bool = False) -> Generator[None]:
    """Restore a model on exit; inside it may be cut and compensated, and with ``trained`` trained too.

    Cutting makes new parameters and leaves the old ones alone, except for biases, which compensators may write into;
    those are copied. Training writes into any parameter: with ``trained`` the model gets copies of all.
    """
    state = ModelState.capture(decoder)
    copies: dict[int, nn.Parameter] = {}
    for module, parameters, _, _ in state.modules:
        for name, parameter in parameters.items():
            if parameter is not None and (trained or name.endswith("bias")):
                if id(parameter) not in copies:  # tied parameters stay tied
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module._parameters[name] = copies[id(parameter)]
    try:
        yield
    finally:
        state.restore(decoder)


def _integers(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that a cut may change: widths, and other whole numbers."""
    return {name: value for name, value in vars(module).items() if isinstance(value, int)}


def _replace(target: dict[str, Any], values: dict[str, Any]) -> None:
    target.clear()
    target.update(values)
