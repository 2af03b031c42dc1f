"""The dense model comes back to the last bit after each cell: it is taken apart by reference, nothing large is copied."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from cfsp_framework.modeling.decoder import Decoder


@dataclass(frozen=True)
class ModelState:
    """Which parameters, submodules and plain attributes the modules of a model have, and its configuration's values."""

    modules: tuple[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]], ...]
    config: dict[str, Any]

    @classmethod
    def of(cls, decoder: Decoder) -> ModelState:
        """The model as it is now, by reference."""
        return cls(
            tuple(
                (module, dict(module._parameters), dict(module._modules), _plain(module))
                for module in decoder.model.modules()
            ),
            dict(vars(decoder.config)),
        )

    def put_back(self, decoder: Decoder) -> None:
        """Make the model what it was."""
        for module, parameters, modules, attributes in self.modules:
            _replace(module._parameters, parameters)
            _replace(module._modules, modules)
            vars(module).update(attributes)
        _replace(vars(decoder.config), self.config)


@contextmanager
def restored(decoder: Decoder, *, trained: bool = False) -> Generator[None]:
    """While open the model may be cut and compensated, and with ``trained`` trained too; afterwards it is what it was.

    Cutting makes new parameters and leaves the old ones alone, except for biases, which compensators may write into;
    those are copied. Training writes into anything: with ``trained`` the model gets copies of all its parameters.
    """
    before = ModelState.of(decoder)
    copies: dict[int, nn.Parameter] = {}
    for module, parameters, _, _ in before.modules:
        for name, parameter in parameters.items():
            if parameter is not None and (trained or name.endswith("bias")):
                if id(parameter) not in copies:  # tied ones stay tied
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module._parameters[name] = copies[id(parameter)]
    try:
        yield
    finally:
        before.put_back(decoder)


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes a cut may change: widths, and whatever else is a number."""
    return {name: value for name, value in vars(module).items() if isinstance(value, int)}


def _replace(there: dict[str, Any], wanted: dict[str, Any]) -> None:
    there.clear()
    there.update(wanted)
