"""Local reconstruction: each narrowed feed-forward is trained for a moment to give what the dense one gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from transformers.activations import ACT2FN

from cfsp_framework import (
    HELD_OUT_EVERY,
    BlockStatistics,
    Compensator,
    FeedForward,
    Statistic,
    Stream,
    Update,
)
from cfsp_framework.errors import ConfigError
from cfsp_framework.linalg import least_squares
from cfsp_framework.statistics import (
    FEED_FORWARD_INPUTS,
    FEED_FORWARD_INPUTS_HELD_OUT,
    FEED_FORWARD_TARGETS,
    FEED_FORWARD_TARGETS_HELD_OUT,
)

_CHUNK = 8192


class LocalReconstruction(Compensator):
    """Train gate, up and down of each narrowed feed-forward on calibration tokens, starting from least squares.

    Mean squared error against the target of ``sequential``; AdamW, linear decay, float32, nothing else trainable and no
    backward through the model (arXiv 2510.14444 on local reconstruction). The weights of the best held-out step are
    kept; a block that never falls below its start keeps that, and one that starts above plain pruning starts from it.
    """

    name: ClassVar[str] = "local-reconstruction"
    requires: ClassVar[frozenset[Statistic]] = frozenset(
        {FEED_FORWARD_INPUTS, FEED_FORWARD_INPUTS_HELD_OUT, FEED_FORWARD_TARGETS, FEED_FORWARD_TARGETS_HELD_OUT}
    )

    steps: int = Field(default=300, ge=1, description="optimiser steps a block")
    learning_rate: float = Field(default=1e-3, gt=0, description="of AdamW, decaying linearly to 0")
    batch_tokens: int = Field(default=2048, ge=1, description="calibration tokens a step")
    mix: float = Field(default=0.7, ge=0, le=1, description="0: the block's own output; 1: the dense residual stream")
    damping: float = Field(default=1e-3, gt=0, description="of the least-squares start")
    check_every: int = Field(default=25, ge=1, description="steps between looks at the held-out tokens")

    def stream(self) -> Stream:
        return Stream.PRUNED

    def target_mix(self) -> float:
        return self.mix

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        tokens = _tokens(statistics)
        plain = Weights.of(feed_forward, kept)
        whole = tokens.held_out_targets.square().mean().item() or 1.0  # targets of 0 leave nothing to lose
        before = plain.error(tokens.held_out_inputs, tokens.held_out_targets)
        fitted = replace(plain, down=self._least_squares(feed_forward, plain, kept, tokens))
        start = min((plain, fitted), key=lambda w: w.error(tokens.held_out_inputs, tokens.held_out_targets))
        best, error = self._train(start, tokens, feed_forward.generator())
        if not error < before:
            return Update(error_plain=before / whole, error=error / whole)
        return best.update(before / whole, error / whole)

    def _least_squares(self, feed_forward: FeedForward, plain: Weights, kept: Tensor, tokens: TokenCounts) -> Tensor:
        """The least-squares down weights ``(D, K)`` for the fitting tokens."""
        count = len(kept)
        gram = plain.down.new_zeros(count, count, dtype=torch.float64)  # (K, K)
        cross = plain.down.new_zeros(feed_forward.hidden, count, dtype=torch.float64)  # (D, K)
        pieces = zip(tokens.inputs.split(_CHUNK), tokens.targets.split(_CHUNK), strict=True)
        for inputs, targets in pieces:
            activations = plain.activations(inputs)  # (n, K)
            goal = targets if plain.down_bias is None else targets - plain.down_bias  # (n, D)
            gram += (activations.mT @ activations).double()
            cross += (goal.mT @ activations).double()
        return least_squares(plain.down, gram, cross, torch.arange(count, device=kept.device), self.damping).float()

    def _train(self, start: Weights, tokens: TokenCounts, generator: torch.Generator) -> tuple[Weights, float]:
        """The weights of the best look at the held-out tokens, and their mean squared error there."""
        best, least = start, start.error(tokens.held_out_inputs, tokens.held_out_targets)
        weights = start.trainable()
        parameters = weights.tensors()
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.steps)
        for step in range(1, self.steps + 1):
            chosen = torch.randint(len(tokens.inputs), (self.batch_tokens,), generator=generator)
            chosen = chosen.to(tokens.inputs.device)  # (n,)
            with torch.enable_grad():
                loss = functional.mse_loss(weights.output(tokens.inputs[chosen]), tokens.targets[chosen])
            gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            if step % self.check_every == 0 or step == self.steps:
                error = weights.error(tokens.held_out_inputs, tokens.held_out_targets)
                if error < least:
                    best, least = weights.copy(), error
        return best, least


@dataclass(frozen=True)
class TokenCounts:
    """Feed-forward inputs and targets ``(n, D)``, to fit on and held out."""

    inputs: Tensor
    targets: Tensor
    held_out_inputs: Tensor
    held_out_targets: Tensor


def _tokens(statistics: BlockStatistics) -> TokenCounts:
    """The tokens to fit on and those to judge by; where none are held out the last tenth is."""
    tokens = TokenCounts(
        statistics[FEED_FORWARD_INPUTS],
        statistics[FEED_FORWARD_TARGETS],
        statistics[FEED_FORWARD_INPUTS_HELD_OUT],
        statistics[FEED_FORWARD_TARGETS_HELD_OUT],
    )
    if len(tokens.inputs) and len(tokens.held_out_inputs):
        return tokens
    inputs = torch.cat([tokens.inputs, tokens.held_out_inputs])  # (n, D)
    targets = torch.cat([tokens.targets, tokens.held_out_targets])
    fit = max(1, len(inputs) - -(-len(inputs) // HELD_OUT_EVERY))
    held_out = slice(fit if fit < len(inputs) else 0, None)
    return TokenCounts(inputs[:fit], targets[:fit], inputs[held_out], targets[held_out])


def _function(feed_forward: FeedForward) -> Callable[[Tensor], Tensor]:
    """The activation between up and down, if it is one that has a name."""
    if feed_forward.activation not in ACT2FN:
        raise ConfigError(
            f"local-reconstruction cannot train {feed_forward.path}: what its family computes between gate, up and down "
            "has no name; choose sequential or least-squares."
        )
    function: Callable[[Tensor], Tensor] = ACT2FN[feed_forward.activation]
    return function


@dataclass(frozen=True)
class Weights:
    """A feed-forward of K channels, float32."""

    activation: Callable[[Tensor], Tensor]
    up: Tensor  # (K, D)
    down: Tensor  # (D, K)
    gate: Tensor | None  # (K, D)
    up_bias: Tensor | None  # (K,)
    gate_bias: Tensor | None  # (K,)
    down_bias: Tensor | None  # (D,)

    @classmethod
    def of(cls, feed_forward: FeedForward, kept: Tensor) -> Weights:
        """The kept channels ``kept (K,)`` of a dense feed-forward."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[kept].float()

        return cls(
            activation=_function(feed_forward),
            up=feed_forward.up[kept].float(),
            down=feed_forward.down[:, kept].float(),
            gate=rows(feed_forward.gate),
            up_bias=rows(feed_forward.up_bias),
            gate_bias=rows(feed_forward.gate_bias),
            down_bias=None if feed_forward.down_bias is None else feed_forward.down_bias.float(),
        )

    def activations(self, inputs: Tensor) -> Tensor:
        """What enters the down projection, ``(n, D)`` -> ``(n, K)``."""
        up = functional.linear(inputs, self.up, self.up_bias)  # (n, K)
        if self.gate is None:
            return self.activation(up)
        return self.activation(functional.linear(inputs, self.gate, self.gate_bias)) * up  # (n, K)

    def output(self, inputs: Tensor) -> Tensor:
        """``(n, D)`` -> ``(n, D)``."""
        return functional.linear(self.activations(inputs), self.down, self.down_bias)

    def error(self, inputs: Tensor, targets: Tensor) -> float:
        """Mean squared error on some tokens."""
        with torch.no_grad():
            pieces = zip(inputs.split(_CHUNK), targets.split(_CHUNK), strict=True)
            total: float = sum((self.output(i) - t).square().sum(dtype=torch.float64).item() for i, t in pieces)
        return total / targets.numel()

    def tensors(self) -> Sequence[Tensor]:
        """All weights that exist."""
        found = (self.up, self.down, self.gate, self.up_bias, self.gate_bias, self.down_bias)
        return [tensor for tensor in found if tensor is not None]

    def copy(self) -> Weights:
        """The same values, detached from training."""
        return self._map(lambda tensor: tensor.detach().clone())

    def trainable(self) -> Weights:
        """The same values as leaves that take gradients."""
        return self._map(lambda tensor: tensor.detach().clone().requires_grad_())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Weights:
        names = ("up", "down", "gate", "up_bias", "gate_bias", "down_bias")
        changed: dict[str, Any] = {name: change(value) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **changed)

    def update(self, error_plain: float, error: float) -> Update:
        """These weights as a compensator's answer."""
        return Update(
            down=self.down,
            up=self.up,
            gate=self.gate,
            down_bias=self.down_bias,
            up_bias=self.up_bias,
            gate_bias=self.gate_bias,
            error_plain=error_plain,
            error=error,
        )
