"""Train each narrowed feed-forward to reproduce the output of the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    TOKEN_WEIGHTS,
)

_CHUNK = 8192


class LocalReconstruction(Compensator):
    """Train gate, up and down of each narrowed feed-forward on calibration tokens, starting from least squares.

    Mean squared error against the target of ``sequential``, each token relative to its residual stream; AdamW, linear decay, float32, nothing else trainable and no
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
            TOKEN_WEIGHTS,
            TOKEN_WEIGHTS.held_out(),
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
        tokens, held_out = split_tokens(statistics)
        plain = Weights.of(feed_forward, kept)
        scale = held_out.target_square() or 1.0  # targets of 0 leave nothing to lose
        plain_error = plain.error(held_out)
        fitted = replace(plain, down=self._least_squares(plain, tokens))
        start = min((plain, fitted), key=lambda weights: weights.error(held_out))
        best, error = self._train(start, tokens, held_out, feed_forward.generator())
        if not error < plain_error:
            return Update(error_plain=plain_error / scale, error=error / scale)
        return best.update(plain_error / scale, error / scale)

    def _least_squares(self, plain: Weights, tokens: CalibrationTokens) -> Tensor:
        """Return the least-squares down weights ``(D, K)`` for the tokens to fit on."""
        hidden, count = plain.down.shape
        gram = plain.down.new_zeros(count, count, dtype=torch.float64)  # (K, K)
        cross = plain.down.new_zeros(hidden, count, dtype=torch.float64)  # (D, K)
        for piece in tokens.pieces():
            activations = plain.activations(piece.inputs)  # (n, K)
            weighted = activations * piece.weights  # (n, K)
            residual = piece.targets if plain.down_bias is None else piece.targets - plain.down_bias  # (n, D)
            gram += (weighted.mT @ activations).double()
            cross += (residual.mT @ weighted).double()
        return least_squares(
            plain.down, gram, cross, torch.arange(count, device=plain.down.device), self.damping
        ).float()

    def _train(
        self, start: Weights, tokens: CalibrationTokens, held_out: CalibrationTokens, generator: torch.Generator
    ) -> tuple[Weights, float]:
        """Return the weights of the best held-out step, and their mean weighted squared error on the held-out tokens."""
        best, least = start, start.error(held_out)
        weights = start.trainable()
        parameters = weights.tensors()
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.steps)
        for step in range(1, self.steps + 1):
            batch = tokens.draw(self.batch_tokens, generator)
            with torch.enable_grad():
                loss = weights.squared_error(batch) / batch.targets.numel()
            gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            if step % self.check_every == 0 or step == self.steps:
                error = weights.error(held_out)
                if error < least:
                    best, least = weights.copy(), error
        return best, least


@dataclass(frozen=True)
class CalibrationTokens:
    """Inputs and targets of a feed-forward, and the weight of each token."""

    inputs: Tensor  # (n, D)
    targets: Tensor  # (n, D)
    weights: Tensor  # (n, 1) float32, mean 1 over all tokens

    def pieces(self) -> Iterator[CalibrationTokens]:
        """Yield the tokens in pieces that fit beside their activations."""
        tensors = (self.inputs, self.targets, self.weights)
        yield from map(CalibrationTokens, *(tensor.split(_CHUNK) for tensor in tensors))

    def draw(self, count: int, generator: torch.Generator) -> CalibrationTokens:
        """Return ``count`` random tokens."""
        rows = torch.randint(len(self.inputs), (count,), generator=generator).to(self.inputs.device)  # (count,)
        return CalibrationTokens(self.inputs[rows], self.targets[rows], self.weights[rows])

    def target_square(self) -> float:
        """Return the mean weighted square of the targets."""
        total = sum((p.weights * p.targets.square()).sum(dtype=torch.float64).item() for p in self.pieces())
        return total / self.targets.numel()


def split_tokens(statistics: BlockStatistics) -> tuple[CalibrationTokens, CalibrationTokens]:
    """Return the tokens to fit on and those to judge by; if none are held out, the last tenth is."""
    kinds = (FEED_FORWARD_INPUTS, FEED_FORWARD_TARGETS, TOKEN_WEIGHTS)
    fitted, held_out = ([statistics[kind] for kind in part] for part in (kinds, [kind.held_out() for kind in kinds]))
    if not (len(fitted[0]) and len(held_out[0])):
        joined = [torch.cat(pair) for pair in zip(fitted, held_out, strict=True)]
        fit = max(1, len(joined[0]) - -(-len(joined[0]) // HELD_OUT_EVERY))
        judge = slice(fit if fit < len(joined[0]) else 0, None)
        fitted, held_out = [tensor[:fit] for tensor in joined], [tensor[judge] for tensor in joined]
    mean = torch.cat([fitted[2], held_out[2]]).mean().clamp(min=torch.finfo(torch.float32).tiny)
    fitted[2], held_out[2] = ((weights / mean).unsqueeze(1) for weights in (fitted[2], held_out[2]))  # (n, 1)
    return CalibrationTokens(*fitted), CalibrationTokens(*held_out)


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

    def squared_error(self, tokens: CalibrationTokens) -> Tensor:
        """Return the weighted sum of squared errors, ``()``."""
        return (tokens.weights * (self.output(tokens.inputs) - tokens.targets).square()).sum()

    def error(self, tokens: CalibrationTokens) -> float:
        """Return the mean weighted squared error."""
        with torch.no_grad():
            total = sum(self.squared_error(piece).item() for piece in tokens.pieces())
        return total / tokens.targets.numel()

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
