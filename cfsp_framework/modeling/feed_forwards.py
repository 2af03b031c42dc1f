"""Read and observe the modules that hold a block's feed-forwards, in one convention for all their forms.

A module holds either one feed-forward of Linear or Conv1D projections, or the experts of a mixture in parameters of
three dimensions, all of one width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from cfsp_framework.api.data import FeedForward, FeedForwardLayout, Site
from cfsp_framework.errors import ModelError

Projection = nn.Linear | Conv1D


@dataclass(frozen=True)
class FeedForwardIO:
    """Inputs, activations and outputs of one feed-forward in one forward, on ``n`` tokens.

    The tokens may lie along one dimension or two: ``n`` stands for ``(n,)`` or ``(B, T)``.
    """

    member: int
    inputs: Tensor  # (n, D): of the gate and up projections
    activations: Tensor  # (n, F): of the down projection
    outputs: Tensor  # (n, D): of the feed-forward
    bias: Tensor | None = None  # (D,): the part of the outputs that is the down projection's bias
    tokens: Tensor | None = None  # (n,): positions in the flattened batch (B * T,); None for all

    def at(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return inputs and outputs at one of the feed-forward's sites, ``(n, D or F)`` and ``(n, D)``."""
        if site is Site.FEED_FORWARD:
            return self.inputs.flatten(0, -2), self.outputs.flatten(0, -2)
        product = self.outputs if self.bias is None else self.outputs - self.bias
        return self.activations.flatten(0, -2), product.flatten(0, -2)


Listener = Callable[[FeedForwardIO], None]


class FeedForwardModule(ABC):
    """One module's feed-forwards, all ``width`` channels wide, with the means to read and observe each."""

    experts: ClassVar[bool]

    def __init__(self, module: nn.Module, layout: FeedForwardLayout) -> None:
        self.module = module
        self.layout = layout

    @property
    @abstractmethod
    def paths(self) -> tuple[str, ...]:
        """Path of each feed-forward inside the block."""

    @property
    @abstractmethod
    def width(self) -> int:
        """``F``, the number of channels of each feed-forward."""

    @abstractmethod
    def weights(self, member: int) -> Mapping[str, Tensor | None]:
        """Return views of one feed-forward's parameters under the names of ``FeedForward``: ``up``, ``down`` ..."""

    @abstractmethod
    def observed(self, listener: Listener) -> AbstractContextManager[None]:
        """Call ``listener`` with each feed-forward's inputs and outputs, once a forward, while the context is open."""

    def feed_forward(self, member: int, block: int, activation: str, seed: int) -> FeedForward:
        """Return one feed-forward in the common convention."""
        views: dict[str, Any] = {
            name: None if view is None else view.detach() for name, view in self.weights(member).items()
        }
        return FeedForward(
            block=block, path=self.paths[member], activation=activation, expert=member, seed=seed, **views
        )


class DenseFeedForward(FeedForwardModule):
    """One feed-forward of Linear or Conv1D projections."""

    experts: ClassVar[bool] = False

    @property
    def projections(self) -> Mapping[str, Projection]:
        """The projections by attribute name; a fused one appears once."""
        names = (self.layout.gate, self.layout.up, self.layout.down)
        return {name: _projection(self.module, name) for name in names if name is not None}

    @property
    def down(self) -> Projection:
        """The projection that takes the channel activations."""
        return _projection(self.module, self.layout.down)

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.layout.path,)

    @property
    def width(self) -> int:
        return matrix(self.down).shape[1]

    def weights(self, member: int) -> Mapping[str, Tensor | None]:
        layout, projections = self.layout, self.projections
        up, down = projections[layout.up], projections[layout.down]
        views: dict[str, Tensor | None] = {"up": matrix(up), "up_bias": up.bias}  # (F, D), (F,)
        if layout.fused:  # one projection of 2F rows: [gate; up]
            views["gate"], views["up"] = matrix(up).chunk(2)  # each (F, D)
            if up.bias is not None:
                views["gate_bias"], views["up_bias"] = up.bias.chunk(2)  # each (F,)
        elif layout.gate is not None:
            gate = projections[layout.gate]
            views |= {"gate": matrix(gate), "gate_bias": gate.bias}
        return {**views, "down": matrix(down), "down_bias": down.bias}  # (D, F), (D,)

    @contextmanager
    def observed(self, listener: Listener) -> Generator[None]:
        up, down = self.projections[self.layout.up], self.down
        up_inputs: list[Tensor] = []

        def keep_input(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            up_inputs[:] = [inputs[0]]

        def report(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # Cloned: parallel and shared feed-forwards have other results added to their output in place afterwards.
            listener(FeedForwardIO(0, up_inputs.pop(), inputs[0], output.clone(), down.bias))

        with ExitStack() as hooks:
            hooks.callback(up.register_forward_hook(keep_input).remove)
            hooks.callback(down.register_forward_hook(report).remove)
            yield


class ExpertFeedForwards(FeedForwardModule):
    """The experts of a mixture, in parameters ``(E, ...)`` whose form the module states.

    While it is observed the experts are computed one after another, with the results of the module's own forward.
    """

    experts: ClassVar[bool] = True

    def __init__(self, module: nn.Module, layout: FeedForwardLayout) -> None:
        super().__init__(module, layout)
        if getattr(module, "has_post_expert_norm", False):
            raise ModelError(f"{layout.path}: experts with a norm of their own are not supported.")

    @property
    def transposed(self) -> bool:
        """Whether matrices are stored as ``(in, out)``; the experts of Llama 4 are, without stating it."""
        return bool(getattr(self.module, "is_transposed", not self._routed_by_module))

    @property
    def concatenated(self) -> bool:
        """Whether the rows are ``[gate; up]``; else gate and up rows alternate."""
        return bool(getattr(self.module, "is_concatenated", True))

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(f"{self.layout.path}.{expert}" for expert in range(len(self._parameter(self.layout.down))))

    @property
    def width(self) -> int:
        return self._matrix(self.layout.down, 0).shape[1]

    @property
    def biased(self) -> bool:
        """Whether the experts have biases."""
        return bool(getattr(self.module, "has_bias", False))

    def weights(self, member: int) -> Mapping[str, Tensor | None]:
        layout = self.layout
        views: dict[str, Tensor | None] = {"up": self._matrix(layout.up, member)}
        if self.biased:
            views["up_bias"] = self._parameter(f"{layout.up}_bias")[member]
            views["down_bias"] = self._parameter(f"{layout.down}_bias")[member]  # (D,)
        if layout.fused:
            for kind in ("", "_bias")[: 1 + self.biased]:
                both = views[f"up{kind}"]
                assert both is not None
                views[f"gate{kind}"], views[f"up{kind}"] = (
                    both.chunk(2) if self.concatenated else (both[::2], both[1::2])  # each (F, D) or (F,)
                )
        return {**views, "down": self._matrix(layout.down, member)}  # (D, F)

    @contextmanager
    def observed(self, listener: Listener) -> Generator[None]:
        def forward(hidden: Tensor, *routing: Tensor) -> Tensor:
            return self._forward(listener, hidden, *routing) if routing else self._forward_sorted(listener, hidden)

        own = self.module.__dict__.get("forward")
        self.module.__dict__["forward"] = forward
        try:
            yield
        finally:
            if own is None:
                self.module.__dict__.pop("forward", None)
            else:
                self.module.__dict__["forward"] = own

    @property
    def _routed_by_module(self) -> bool:
        """Whether the module gets the routing; else it gets one copy of all tokens for each expert (Llama 4)."""
        return hasattr(self.module, "is_transposed")

    def _forward(self, listener: Listener, hidden: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """Map ``hidden (n, D)`` with each token's ``experts (n, k)`` and their ``shares (n, k)`` to ``(n, D)``."""
        result = torch.zeros_like(hidden)
        for expert in range(len(self.paths)):
            tokens, place = torch.where(experts == expert)  # (m,) each, tokens ascending
            outputs = self._run(listener, expert, hidden[tokens], tokens)  # (m, D)
            result.index_add_(0, tokens, (outputs * shares[tokens, place, None]).to(result.dtype))
        return result

    def _forward_sorted(self, listener: Listener, hidden: Tensor) -> Tensor:
        """Map ``hidden (E * n, D)``, each expert's copy of all tokens with zeros for those not routed to it."""
        copies = hidden.view(len(self.paths), -1, hidden.shape[-1])  # (E, n, D)
        result = torch.zeros_like(copies)
        for expert, inputs in enumerate(copies):
            tokens = inputs.any(-1).nonzero()[:, 0]  # (m,)
            result[expert, tokens] = self._run(listener, expert, inputs[tokens], tokens)
        return result.view_as(hidden)

    def _run(self, listener: Listener, expert: int, inputs: Tensor, tokens: Tensor) -> Tensor:
        """Run one expert on ``inputs (m, D)`` and return ``(m, D)``."""
        module: Any = self.module
        up_bias = self._parameter(f"{self.layout.up}_bias")[expert] if self.biased else None
        rows = functional.linear(inputs, self._matrix(self.layout.up, expert), up_bias)  # (m, 2F or F)
        if not self.layout.fused:
            activations = module.act_fn(rows)
        elif hasattr(module, "_apply_gate"):
            activations = module._apply_gate(rows)
        else:
            gate, up = rows.chunk(2, dim=-1)
            activations = up * module.act_fn(gate)  # (m, F)
        down_bias = self._parameter(f"{self.layout.down}_bias")[expert] if self.biased else None
        outputs = functional.linear(activations, self._matrix(self.layout.down, expert), down_bias)
        listener(FeedForwardIO(expert, inputs, activations, outputs, down_bias, tokens))
        return outputs

    def _parameter(self, name: str) -> nn.Parameter:
        return self.module.get_parameter(name)

    def _matrix(self, name: str, expert: int) -> Tensor:
        """Return a view of one expert's weights as ``(out, in)``."""
        weight = self._parameter(name)[expert]
        return weight.mT if self.transposed else weight


def matrix(projection: Projection) -> Tensor:
    """Return a view of a projection's weights as ``(out, in)``; Conv1D stores them as ``(in, out)``."""
    weight: Tensor = projection.weight
    return weight.mT if isinstance(projection, Conv1D) else weight


def _projection(parent: nn.Module, name: str) -> Projection:
    module = parent.get_submodule(name)
    if not isinstance(module, Projection):
        raise TypeError(f"{name} is a {type(module).__name__}, neither a Linear nor a Conv1D")
    return module
