"""Train each narrowed feed-forward to reproduce the output of the dense one."""

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
    FEED_FORWARD_TARGETS,
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
        {
            FEED_FORWARD_INPUTS,
            FEED_FORWARD_INPUTS.held_out(),
            FEED_FORWARD_TARGETS,
            FEED_FORWARD_TARGETS.held_out(),
        }
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
        scale = tokens.held_out_targets.square().mean().item() or 1.0  # targets of 0 leave nothing to lose
        plain_error = plain.error(tokens.held_out_inputs, tokens.held_out_targets)
        fitted = replace(plain, down=self._least_squares(feed_forward, plain, kept, tokens))
        start = min((plain, fitted), key=lambda w: w.error(tokens.held_out_inputs, tokens.held_out_targets))
        best, error = self._train(start, tokens, feed_forward.generator())
        if not error < plain_error:
            return Update(error_plain=plain_error / scale, error=error / scale)
        return best.update(plain_error / scale, error / scale)

    def _least_squares(
        self, feed_forward: FeedForward, plain: Weights, kept: Tensor, tokens: CalibrationTokens
    ) -> Tensor:
        """Return the least-squares down weights ``(D, K)`` for the tokens to fit on."""
        count = len(kept)
        gram = plain.down.new_zeros(count, count, dtype=torch.float64)  # (K, K)
        cross = plain.down.new_zeros(feed_forward.hidden, count, dtype=torch.float64)  # (D, K)
        pieces = zip(tokens.inputs.split(_CHUNK), tokens.targets.split(_CHUNK), strict=True)
        for inputs, targets in pieces:
            activations = plain.activations(inputs)  # (n, K)
            residual = targets if plain.down_bias is None else targets - plain.down_bias  # (n, D)
            gram += (activations.mT @ activations).double()
            cross += (residual.mT @ activations).double()
        return least_squares(plain.down, gram, cross, torch.arange(count, device=kept.device), self.damping).float()

    def _train(self, start: Weights, tokens: CalibrationTokens, generator: torch.Generator) -> tuple[Weights, float]:
        """Return the weights of the best held-out step, and their mean squared error on the held-out tokens."""
        best, least = start, start.error(tokens.held_out_inputs, tokens.held_out_targets)
        weights = start.trainable()
        parameters = weights.tensors()
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.steps)
        for step in range(1, self.steps + 1):
            rows = torch.randint(len(tokens.inputs), (self.batch_tokens,), generator=generator)
            rows = rows.to(tokens.inputs.device)  # (n,)
            with torch.enable_grad():
                loss = functional.mse_loss(weights.output(tokens.inputs[rows]), tokens.targets[rows])
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
class CalibrationTokens:
    """Feed-forward inputs and targets ``(n, D)`` float32, to fit on and held out."""

    inputs: Tensor
    targets: Tensor
    held_out_inputs: Tensor
    held_out_targets: Tensor


def _tokens(statistics: BlockStatistics) -> CalibrationTokens:
    """Return the tokens to fit on and those to judge by; if none are held out, the last tenth is."""
    tokens = CalibrationTokens(
        statistics[FEED_FORWARD_INPUTS],
        statistics[FEED_FORWARD_TARGETS],
        statistics[FEED_FORWARD_INPUTS.held_out()],
        statistics[FEED_FORWARD_TARGETS.held_out()],
    )
    if len(tokens.inputs) and len(tokens.held_out_inputs):
        return tokens
    inputs = torch.cat([tokens.inputs, tokens.held_out_inputs])  # (n, D)
    targets = torch.cat([tokens.targets, tokens.held_out_targets])
    fit = max(1, len(inputs) - -(-len(inputs) // HELD_OUT_EVERY))
    held_out = slice(fit if fit < len(inputs) else 0, None)
    return CalibrationTokens(inputs[:fit], targets[:fit], inputs[held_out], targets[held_out])


def _activation(feed_forward: FeedForward) -> Callable[[Tensor], Tensor]:
    """Return the activation between up and down.

    Raises:
        ConfigError: the family's activation has no name in ``ACT2FN``.
    """
    if feed_forward.activation not in ACT2FN:
        raise ConfigError(
            f"local-reconstruction cannot train {feed_forward.path}: the activation of its family is unknown; choose "
            "sequential or least-squares."
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
        """Take the channels ``kept (K,)`` of a dense feed-forward."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[kept].float()

        return cls(
            activation=_activation(feed_forward),
            up=feed_forward.up[kept].float(),
            down=feed_forward.down[:, kept].float(),
            gate=rows(feed_forward.gate),
            up_bias=rows(feed_forward.up_bias),
            gate_bias=rows(feed_forward.gate_bias),
            down_bias=None if feed_forward.down_bias is None else feed_forward.down_bias.float(),
        )

    def activations(self, inputs: Tensor) -> Tensor:
        """Return the inputs of the down projection, ``(n, K)`` for ``inputs (n, D)``."""
        up = functional.linear(inputs, self.up, self.up_bias)  # (n, K)
        if self.gate is None:
            return self.activation(up)
        return self.activation(functional.linear(inputs, self.gate, self.gate_bias)) * up  # (n, K)

    def output(self, inputs: Tensor) -> Tensor:
        """Return the output ``(n, D)`` for ``inputs (n, D)``."""
        return functional.linear(self.activations(inputs), self.down, self.down_bias)

    def error(self, inputs: Tensor, targets: Tensor) -> float:
        """Return the mean squared error on tokens ``(n, D)``."""
        with torch.no_grad():
            pieces = zip(inputs.split(_CHUNK), targets.split(_CHUNK), strict=True)
            total: float = sum((self.output(i) - t).square().sum(dtype=torch.float64).item() for i, t in pieces)
        return total / targets.numel()

    def tensors(self) -> Sequence[Tensor]:
        """Return the weights that exist."""
        tensors = (self.up, self.down, self.gate, self.up_bias, self.gate_bias, self.down_bias)
        return [tensor for tensor in tensors if tensor is not None]

    def copy(self) -> Weights:
        """Return the values detached from training."""
        return self._map(lambda tensor: tensor.detach().clone())

    def trainable(self) -> Weights:
        """Return the values as leaves that take gradients."""
        return self._map(lambda tensor: tensor.detach().clone().requires_grad_())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Weights:
        names = ("up", "down", "gate", "up_bias", "gate_bias", "down_bias")
        changed: dict[str, Any] = {name: change(value) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **changed)

    def update(self, error_plain: float, error: float) -> Update:
        """Return the weights as a compensator's update."""
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
