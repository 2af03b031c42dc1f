"""Where a loaded model keeps its blocks and feed-forwards, in one convention for every family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .api import Architecture, FeedForward
from .errors import ModelError
from .plugins import Plugins


@dataclass(frozen=True)
class Decoder:
    """A causal LM seen through its architecture: the model without its head, its blocks, their feed-forwards."""

    model: PreTrainedModel
    architecture: Architecture

    @property
    def base(self) -> nn.Module:
        """The model without its head."""
        return self.model.get_submodule(self.architecture.base)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The decoder blocks, in order."""
        return list(self.model.get_submodule(self.architecture.blocks).children())

    @property
    def config(self) -> PreTrainedConfig:
        """The part of the configuration that holds the decoder's widths."""
        return self.model.config.get_text_config()

    @property
    def widths(self) -> tuple[int, ...]:
        """The width every feed-forward really has; those of a pruned model differ."""
        return tuple(self.down_projection(index).in_features for index in range(len(self.blocks)))

    @property
    def channel_parameters(self) -> int:
        """Parameters of all feed-forward channels together; the down projections' biases are not theirs."""
        return sum(
            parameter.numel()
            for index in range(len(self.blocks))
            for name, linear in self.projections(index).items()
            for kind, parameter in linear.named_parameters()
            if (name, kind) != (self.architecture.feed_forward.down, "bias")
        )

    def attention_parameters(self, index: int) -> int:
        """Parameters of block ``index``'s attention.

        Raises:
            ModelError: this family cannot do without its attention.
        """
        if self.architecture.attention is None:
            raise ModelError(f"the attention of {self.architecture.family} models cannot be dropped.")
        attention = self.blocks[index].get_submodule(self.architecture.attention)
        return sum(parameter.numel() for parameter in attention.parameters())

    def projections(self, index: int) -> Mapping[str, nn.Linear]:
        """The projections of block ``index``'s feed-forward by attribute name; a fused one is there once."""
        layout = self.architecture.feed_forward
        parent = self.blocks[index].get_submodule(layout.path)
        return {name: _linear(parent, name) for name in (layout.gate, layout.up, layout.down) if name is not None}

    def down_projection(self, index: int) -> nn.Linear:
        """The projection whose input are block ``index``'s channel activations."""
        return self.projections(index)[self.architecture.feed_forward.down]

    def feed_forward(self, index: int, seed: int = 0) -> FeedForward:
        """Block ``index``'s feed-forward in the common convention; ``seed`` is for components that draw."""
        layout, projections = self.architecture.feed_forward, self.projections(index)
        up, down = projections[layout.up], projections[layout.down]
        gate_weight: Tensor | None = None
        gate_bias: Tensor | None = None
        up_weight: Tensor = up.weight
        up_bias: Tensor | None = up.bias
        if layout.fused:  # one projection of 2F rows: [gate; up]
            gate_weight, up_weight = up.weight.chunk(2)  # each (F, D)
            if up.bias is not None:
                gate_bias, up_bias = up.bias.chunk(2)  # each (F,)
        elif layout.gate is not None:
            gate_weight, gate_bias = projections[layout.gate].weight, projections[layout.gate].bias  # (F, D), (F,)
        return FeedForward(
            block=index,
            path=layout.path,
            up=up_weight.detach(),
            gate=_detached(gate_weight),
            down=down.weight.detach(),
            up_bias=_detached(up_bias),
            gate_bias=_detached(gate_bias),
            down_bias=_detached(down.bias),
            activation=_activation(self.config),
            seed=seed,
        )


def open_decoder(model: PreTrainedModel, plugins: Plugins) -> Decoder:
    """See ``model`` through the architecture some plugin knows for its family.

    Raises:
        ModelError: nobody knows the family, or its modules are not where its architecture says.
    """
    family = model.config.get_text_config().model_type
    architecture = plugins.architecture(model.config)
    if architecture is None:
        raise ModelError(
            f"no plugin knows where the family {family!r} keeps its feed-forwards; "
            "one can tell with the hook cfsp_architecture."
        )
    decoder = Decoder(model, architecture)
    try:
        modules = decoder.base, [decoder.feed_forward(index) for index in range(len(decoder.blocks))]
    except (AttributeError, TypeError) as error:
        raise ModelError(f"this {family} model has no feed-forward where {architecture.family} has: {error}") from error
    if not modules[1]:
        raise ModelError(f"this {family} model has no blocks.")
    return decoder


def _linear(parent: nn.Module, name: str) -> nn.Linear:
    module = parent.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a Linear")
    return module


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


def _activation(config: PreTrainedConfig) -> str:
    values = config.to_dict()  # getattr raises on the configuration of a pruned model
    return str(values.get("hidden_act") or values.get("hidden_activation") or "unknown")
