"""Blocks and feed-forwards of a loaded model, in one convention for every family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

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
    """Modules of one block whose intermediate size is set by one value of the configuration."""

    key: str
    modules: tuple[FeedForwardModule, ...]

    @property
    def width(self) -> int:
        """The configuration's value."""
        return self.modules[0].width // self.modules[0].layout.times


@dataclass(frozen=True)
class Decoder:
    """A causal LM seen through its architecture: the model without its head, its blocks, their feed-forwards.

    The parameters of a block may be used inside ``with decoder.loaded(index): ...``. For a model in memory this changes
    nothing; a streamed model reads the block on entering and frees it on leaving.
    """

    model: PreTrainedModel
    architecture: Architecture
    loaded: WeightLoading = field(default_factory=InMemory)

    @property
    def device(self) -> torch.device:
        """The device that blocks run on."""
        return self.loaded.device or self.model.device

    @property
    def base(self) -> nn.Module:
        """The model without its head."""
        return self.model.get_submodule(self.architecture.base)

    @cached_property
    def blocks(self) -> Sequence[nn.Module]:
        """The decoder blocks, in order."""
        return list(self.model.get_submodule(self.architecture.blocks).children())

    @property
    def config(self) -> PreTrainedConfig:
        """The part of the configuration that holds the decoder's widths."""
        return self.model.config.get_text_config()

    def feed_forward_modules(self, index: int) -> tuple[FeedForwardModule, ...]:
        """Return the modules of block ``index`` that hold its feed-forwards, in the architecture's order."""
        return self._modules[index]

    def groups(self, index: int) -> tuple[WidthGroup, ...]:
        """Return the modules of block ``index`` grouped by the configuration's key for their width."""
        return self._groups[index]

    def feed_forwards(self, index: int, seed: int = 0) -> tuple[FeedForward, ...]:
        """Return block ``index``'s feed-forwards in the common convention, in the order of a plan.

        ``seed`` seeds the generators that components draw from.
        """
        activation = _activation(self.config)
        return tuple(
            module.feed_forward(member, index, activation, seed)
            for module in self._in_plan_order(index)
            for member in range(len(module.paths))
        )

    @property
    def places(self) -> tuple[tuple[int, str, int], ...]:
        """Block, path and current width of every feed-forward, in the order of a plan."""
        return tuple(
            (index, path, module.width)
            for index in range(len(self.blocks))
            for module in self._in_plan_order(index)
            for path in module.paths
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Current width of every feed-forward."""
        return tuple(width for _, _, width in self.places)

    @property
    def channel_parameters(self) -> int:
        """Parameters of all feed-forward channels together, without the biases of down projections."""
        return sum(
            weight.numel()
            for modules in self._modules
            for module in modules
            for member in range(len(module.paths))
            for name, weight in module.weights(member).items()
            if weight is not None and name != "down_bias"
        )

    def attention_parameters(self, index: int) -> int:
        """Count the parameters of block ``index``'s attention.

        Raises:
            ModelError: the family cannot run without its attention.
        """
        if self.architecture.attention is None:
            raise ModelError(f"the attention of {self.architecture.family} models cannot be dropped.")
        attention = self.blocks[index].get_submodule(self.architecture.attention)
        return sum(parameter.numel() for parameter in attention.parameters())

    @cached_property
    def _modules(self) -> tuple[tuple[FeedForwardModule, ...], ...]:
        """Each block's feed-forward modules.

        Raises:
            AttributeError, TypeError: they are not where the architecture says.
        """
        return tuple(_feed_forward_modules(block, index, self.architecture) for index, block in enumerate(self.blocks))

    @cached_property
    def _groups(self) -> tuple[tuple[WidthGroup, ...], ...]:
        return tuple(_group_by_width(modules) for modules in self._modules)

    def _in_plan_order(self, index: int) -> Iterator[FeedForwardModule]:
        for group in self._groups[index]:
            yield from group.modules


def open_decoder(model: PreTrainedModel, plugins: Plugins, loading: WeightLoading | None = None) -> Decoder:
    """View ``model`` through the architecture that a plugin gives for its family or that is detected in its modules.

    Raises:
        ModelError: the width of its feed-forwards cannot be changed, or they are not where its architecture says.
    """
    family = model.config.get_text_config().model_type
    architecture = plugins.architecture(model.config) or find_architecture(model)
    decoder = Decoder(model, architecture, loading or InMemory())
    try:
        base, feed_forwards = decoder.base, [decoder.feed_forwards(index) for index in range(len(decoder.blocks))]
    except (AttributeError, TypeError) as error:
        raise ModelError(f"this {family} model has no feed-forward where {architecture.family} has: {error}") from error
    if not feed_forwards:
        raise ModelError(f"this {family} model has no blocks in its {type(base).__name__}.")
    return decoder


def _feed_forward_modules(block: nn.Module, index: int, architecture: Architecture) -> tuple[FeedForwardModule, ...]:
    modules: list[FeedForwardModule] = []
    for layout in architecture.feed_forwards:
        module = _submodule(block, layout.path)
        if module is None or not hasattr(module, layout.down):
            continue
        stacked = isinstance(getattr(module, layout.down), nn.Parameter)
        if stacked is layout.experts:
            modules.append((ExpertFeedForwards if stacked else DenseFeedForward)(module, layout))
    if not modules:
        raise AttributeError(f"block {index} has none of {[layout.path for layout in architecture.feed_forwards]}")
    return tuple(modules)


def _group_by_width(modules: Sequence[FeedForwardModule]) -> tuple[WidthGroup, ...]:
    groups: dict[str, list[FeedForwardModule]] = {}
    for module in modules:
        groups.setdefault(module.layout.width_key, []).append(module)
    return tuple(WidthGroup(key, tuple(members)) for key, members in groups.items())


def _submodule(block: nn.Module, path: str) -> nn.Module | None:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")
_CLAMPED_GATES = frozenset({"gpt_oss"})  # no name of ACT2FN stands for them


def _activation(config: PreTrainedConfig) -> str:
    values: Mapping[str, object] = config.to_dict()  # getattr raises on the configuration of a pruned model
    if values.get("model_type") in _CLAMPED_GATES:
        return "unknown"
    return next((str(values[name]) for name in _ACTIVATIONS if values.get(name)), "unknown")
