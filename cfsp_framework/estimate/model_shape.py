"""Count parameters, bytes and products of a model's blocks; the model may be on the meta device.

``D`` is the hidden size, ``F`` the channels of a feed-forward, ``T`` the tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cfsp_framework.modeling.config_facts import attention_heads, context_length, experts_per_token, head_size

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FeedForwards:
    """The feed-forwards of a block that are equally wide: a single one, or the experts of a mixture."""

    width: int
    """``F`` of each."""
    count: int
    share: float
    """Share of the tokens that each of them is computed for."""
    parameters: int
    """Parameters of all of them together."""


@dataclass(frozen=True)
class BlockShape:
    """One decoder block."""

    parameters: int
    bytes: int
    """Bytes in memory."""
    stored_bytes: int
    """Bytes in the checkpoint."""
    products: int
    """Weights that one token is multiplied with; of the experts only those it is routed to."""
    feed_forwards: tuple[FeedForwards, ...]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that time and memory depend on."""

    family: str
    dtype: str
    """Dtype in memory."""
    element_size: int
    """Bytes of a hidden state's element."""
    hidden: int
    """``D``."""
    attention: int
    """Query heads times their size."""
    vocabulary: int
    context: int | None
    experts: int
    experts_per_token: int
    blocks: tuple[BlockShape, ...] = field(repr=False)
    outside_parameters: int
    """Embeddings, norms and head, tied weights once."""
    outside_bytes: int
    outside_stored_bytes: int

    @property
    def parameters(self) -> int:
        return self.outside_parameters + sum(block.parameters for block in self.blocks)

    @property
    def bytes(self) -> int:
        return self.outside_bytes + sum(block.bytes for block in self.blocks)

    @property
    def stored_bytes(self) -> int:
        return self.outside_stored_bytes + sum(block.stored_bytes for block in self.blocks)

    @property
    def widest(self) -> int:
        """``F`` of the widest feed-forward; 0 without any."""
        return max((part.width for block in self.blocks for part in block.feed_forwards), default=0)

    def flops_per_token(self, seqlen: int) -> int:
        """Return the FLOPs of one token through the blocks: two per product, and attention over ``seqlen`` tokens."""
        return sum(self.block_flops(block, seqlen) for block in self.blocks)

    def block_flops(self, block: BlockShape, seqlen: int) -> int:
        """Return the FLOPs of one token through one block, as if its attention saw the whole window."""
        return 2 * block.products + 4 * seqlen * self.attention


def measure_shape(model: PreTrainedModel, stored_dtype: Any = None) -> ModelShape:
    """Measure a model whose checkpoint has ``stored_dtype``, by default the model's.

    Raises:
        ModelError: its decoder blocks are not recognised.
    """
    from cfsp_framework.modeling.detection import find_blocks

    config = model.config.get_text_config()
    per_token = experts_per_token(config)
    stored_size = (stored_dtype or model.dtype).itemsize
    blocks = tuple(_measure_block(block, config.hidden_size, per_token, stored_size) for block in find_blocks(model)[1])
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    size = sum(p.numel() * p.element_size() for p in parameters)
    experts = max((part.count for block in blocks for part in block.feed_forwards), default=1)
    return ModelShape(
        family=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        element_size=model.dtype.itemsize,
        hidden=config.hidden_size,
        attention=attention_heads(config) * head_size(config),
        vocabulary=config.vocab_size,
        context=context_length(config),
        experts=experts if experts > 1 else 0,
        experts_per_token=per_token if experts > 1 else 0,
        blocks=blocks,
        outside_parameters=count - sum(block.parameters for block in blocks),
        outside_bytes=size - sum(block.bytes for block in blocks),
        outside_stored_bytes=count * stored_size - sum(block.stored_bytes for block in blocks),
    )


def _measure_block(block: nn.Module, hidden: int, per_token: int, stored_size: int) -> BlockShape:
    parameters = dict(block.named_parameters())
    count = sum(parameter.numel() for parameter in parameters.values())
    feed_forwards = tuple(_find_feed_forwards(block, hidden, per_token))
    share = min((part.share for part in feed_forwards), default=1.0)
    matrices = {path: parameter.numel() for path, parameter in parameters.items() if parameter.ndim > 1}
    return BlockShape(
        parameters=count,
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters.values()),
        stored_bytes=count * stored_size,
        products=sum(round(size * share) if _is_expert(path) else size for path, size in matrices.items()),
        feed_forwards=feed_forwards,
    )


def _find_feed_forwards(block: nn.Module, hidden: int, per_token: int) -> Iterator[FeedForwards]:
    """Yield the feed-forwards of a block, those of one width and share together."""
    experts = {path: p for path, p in block.named_parameters() if _is_expert(path)}
    stacked = [p for p in experts.values() if p.ndim == 3]  # (E, ...)
    if stacked:
        count = len(stacked[0])
        width = min(p.numel() for p in stacked) // (count * hidden)  # the down projection is the smallest
        yield FeedForwards(width, count, min(1.0, per_token / count), sum(p.numel() for p in experts.values()))
    groups: dict[tuple[int, bool], list[int]] = {}
    for path, width, parameters in _find_projected(block, hidden):
        groups.setdefault((width, _is_expert(path)), []).append(parameters)
    for (width, expert), sizes in groups.items():
        share = min(1.0, per_token / len(sizes)) if expert else 1.0
        yield FeedForwards(width, len(sizes), share, sum(sizes))


def _find_projected(block: nn.Module, hidden: int) -> Iterator[tuple[str, int, int]]:
    """Yield path, width and parameters of the feed-forwards made of projections; the last maps back to ``hidden``."""
    by_parent: dict[str, dict[str, tuple[int, int]]] = {}
    for path, module in block.named_modules():
        shape = _projection_shape(module)
        if shape is not None and not _is_attention(path):
            by_parent.setdefault(path.rpartition(".")[0], {})[path] = shape
    for parent, projections in by_parent.items():
        width = max((inner for outer, inner in projections.values() if outer == hidden), default=0)
        if width:
            along = [path for path, shape in projections.items() if {*shape} & {width, 2 * width}]
            yield parent, width, sum(p.numel() for path in along for p in block.get_submodule(path).parameters())


def _projection_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return ``(out, in)`` of a projection; Conv1D stores its weight the other way round."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return (module.weight.shape[1], module.weight.shape[0]) if isinstance(module, Conv1D) else None


def _is_expert(path: str) -> bool:
    """Return whether a parameter or module belongs to the routed experts of a mixture."""
    return "experts" in path.split(".") and not _is_attention(path)


def _is_attention(path: str) -> bool:
    return any("attn" in part or "attention" in part or "mixer" in part for part in path.split("."))
