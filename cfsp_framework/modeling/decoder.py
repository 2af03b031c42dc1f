"""Where a loaded model keeps its blocks and feed-forwards, in one convention for every family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cfsp_framework.api.data import Architecture, FeedForward
from cfsp_framework.errors import ModelError
from cfsp_framework.host.registry import Plugins
from cfsp_framework.modeling.detection import find_architecture
from cfsp_framework.modeling.feed_forwards import DenseFeedForward, ExpertFeedForwards, FeedForwardModule
from cfsp_framework.modeling.streaming import InMemory, WeightLoading


@dataclass(frozen=True)
class WidthGroup:
    """The modules of one block whose width one value of the configuration sets."""

    key: str
    modules: tuple[FeedForwardModule, ...]

    @property
    def width(self) -> int:
        """The configuration's value."""
        return self.modules[0].width // self.modules[0].layout.times


@dataclass(frozen=True)
class Decoder:
    """A causal LM seen through its architecture: the model without its head, its blocks, their feed-forwards.

    The parameters of a block are only there while it is resident: ``with decoder.resident(index): ...``. For a model
    in memory that is always.
    """

    model: PreTrainedModel
    architecture: Architecture
    loaded: WeightLoading = field(default_factory=InMemory)

    @property
    def device(self) -> torch.device:
        """Where blocks run."""
        return self.loaded.device or self.model.device

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

    def feed_forward_modules(self, index: int) -> tuple[FeedForwardModule, ...]:
        """The modules of block ``index`` that hold its feed-forwards, in the architecture's order.

        Raises:
            AttributeError, TypeError: they are not where the architecture says.
        """
        block, found = self.blocks[index], list[FeedForwardModule]()
        for layout in self.architecture.feed_forwards:
            module = _submodule(block, layout.path)
            if module is None or not hasattr(module, layout.down):
                continue
            stacked = isinstance(getattr(module, layout.down), nn.Parameter)
            if stacked is layout.experts:
                found.append((ExpertFeedForwards if stacked else DenseFeedForward)(module, layout))
        if not found:
            raise AttributeError(
                f"block {index} has none of {[layout.path for layout in self.architecture.feed_forwards]}"
            )
        return tuple(found)

    def groups(self, index: int) -> tuple[WidthGroup, ...]:
        """The modules of block ``index`` by the configuration's key for their width."""
        modules = self.feed_forward_modules(index)
        keys = dict.fromkeys(module.layout.width_key for module in modules)
        return tuple(
            WidthGroup(key, tuple(module for module in modules if module.layout.width_key == key)) for key in keys
        )

    def feed_forwards(self, index: int, seed: int = 0) -> tuple[FeedForward, ...]:
        """Block ``index``'s feed-forwards in the common convention, in the order of a plan; ``seed`` is for draws."""
        activation = _activation(self.config)
        return tuple(
            module.feed_forward(member, index, activation, seed)
            for group in self.groups(index)
            for module in group.modules
            for member in range(len(module.paths))
        )

    @property
    def places(self) -> tuple[tuple[int, str, int], ...]:
        """Block, path and width of every feed-forward, in the order of a plan; those of a pruned model differ."""
        return tuple(
            (index, path, module.width)
            for index in range(len(self.blocks))
            for group in self.groups(index)
            for module in group.modules
            for path in module.paths
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """The width every feed-forward really has."""
        return tuple(width for _, _, width in self.places)

    @property
    def channel_parameters(self) -> int:
        """Parameters of all feed-forward channels together; the down projections' biases are not theirs."""
        return sum(
            view.numel()
            for index in range(len(self.blocks))
            for module in self.feed_forward_modules(index)
            for member in range(len(module.paths))
            for name, view in module.weights(member).items()
            if view is not None and name != "down_bias"
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


def open_decoder(model: PreTrainedModel, plugins: Plugins, loaded: WeightLoading | None = None) -> Decoder:
    """See ``model`` through the architecture some plugin knows for its family, or that can be found in its modules.

    Raises:
        ModelError: the width of its feed-forwards cannot be changed, or they are not where its architecture says.
    """
    family = model.config.get_text_config().model_type
    architecture = plugins.architecture(model.config) or find_architecture(model)
    decoder = Decoder(model, architecture, loaded or InMemory())
    try:
        modules = decoder.base, [decoder.feed_forwards(index) for index in range(len(decoder.blocks))]
    except (AttributeError, TypeError) as error:
        raise ModelError(f"this {family} model has no feed-forward where {architecture.family} has: {error}") from error
    if not modules[1]:
        raise ModelError(f"this {family} model has no blocks.")
    return decoder


def _submodule(block: nn.Module, path: str) -> nn.Module | None:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")
_OWN_GATES = frozenset({"gpt_oss"})  # a clamped gate that no name of ACT2FN stands for


def _activation(config: PreTrainedConfig) -> str:
    values: Mapping[str, object] = config.to_dict()  # getattr raises on the configuration of a pruned model
    if values.get("model_type") in _OWN_GATES:
        return "unknown"
    return next((str(values[name]) for name in _ACTIVATIONS if values.get(name)), "unknown")
