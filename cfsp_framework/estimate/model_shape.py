"""What a model is made of, from its configuration alone: parameters, bytes and products, counted on the meta device.

``D`` is the hidden size, ``F`` the channels of a feed-forward, ``T`` the tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cfsp_framework.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Configuration keys for the experts each token is sent to."""


@dataclass(frozen=True)
class FeedForwards:
    """The feed-forwards of a block that are equally wide: a single one, or the experts of a mixture."""

    width: int
    """``F`` of each."""
    count: int
    share: float
    """Of the tokens, that each of them sees."""
    parameters: int
    """Of all of them together."""


@dataclass(frozen=True)
class BlockShape:
    """One decoder block."""

    parameters: int
    bytes: int
    """In memory."""
    stored_bytes: int
    """In the checkpoint."""
    products: int
    """Weights that one token is multiplied with: of the experts only those it is sent to."""
    feed_forwards: tuple[FeedForwards, ...]


@dataclass(frozen=True)
class ModelShape:
    """A model as far as time and memory go."""

    family: str
    dtype: str
    """In memory."""
    element_size: int
    """Bytes of a hidden state's element."""
    hidden: int
    """``D``."""
    attention: int
    """Heads times their size."""
    vocabulary: int
    context: int | None
    experts: int
    experts_per_token: int
    blocks: tuple[BlockShape, ...] = field(repr=False)
    outside_parameters: int
    """Embeddings, norms and head: all that is in no block, tied weights once."""
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
        """``F`` of the widest feed-forward; 0 where none was found."""
        return max((found.width for block in self.blocks for found in block.feed_forwards), default=0)

    def flops_per_token(self, seqlen: int) -> int:
        """Of one token through the blocks: two per weight of every product, and attention over ``seqlen`` tokens."""
        return sum(self.block_flops(block, seqlen) for block in self.blocks)

    def block_flops(self, block: BlockShape, seqlen: int) -> int:
        """Of one token through one block; scores and their sums as if a token saw the whole window."""
        return 2 * block.products + 4 * seqlen * self.attention


def measure_shape(model: PreTrainedModel, stored_dtype: Any = None) -> ModelShape:
    """The shape of a model, which may be on the meta device; ``stored_dtype`` is its checkpoint's, else the model's.

    Raises:
        ModelError: its decoder blocks cannot be told.
    """
    config = model.config.get_text_config()
    per_token = _experts_per_token(config)
    stored_size = (stored_dtype or model.dtype).itemsize
    blocks = tuple(_block_shape(block, config.hidden_size, per_token, stored_size) for block in find_blocks(model))
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    size = sum(p.numel() * p.element_size() for p in parameters)
    experts = max((f.count for block in blocks for f in block.feed_forwards), default=1)
    return ModelShape(
        family=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        element_size=model.dtype.itemsize,
        hidden=config.hidden_size,
        attention=_attention_width(config),
        vocabulary=config.vocab_size,
        context=_context(config),
        experts=experts if experts > 1 else 0,
        experts_per_token=per_token if experts > 1 else 0,
        blocks=blocks,
        outside_parameters=count - sum(block.parameters for block in blocks),
        outside_bytes=size - sum(block.bytes for block in blocks),
        outside_stored_bytes=count * stored_size - sum(block.stored_bytes for block in blocks),
    )


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks: as many as the configuration says, of a class the model wants whole on one device.

    Raises:
        ModelError: there is no such list, or more than one.
    """
    from torch import nn

    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    whole = set(model._no_split_modules or ())
    found = [
        module
        for module in model.get_decoder().modules()  # of a vision-language model the part that reads text
        if isinstance(module, nn.ModuleList) and len(module) == count and type(module[0]).__name__ in whole
    ]
    if len(found) != 1:
        raise ModelError(f"a model of the family {model.config.model_type!r} does not show which its blocks are.")
    return found[0]


def _block_shape(block: nn.Module, hidden: int, per_token: int, stored_size: int) -> BlockShape:
    named = dict(block.named_parameters())
    count = sum(parameter.numel() for parameter in named.values())
    feed_forwards = tuple(_feed_forwards(block, hidden, per_token))
    share = min((found.share for found in feed_forwards), default=1.0)
    matrices = {path: parameter.numel() for path, parameter in named.items() if parameter.ndim > 1}
    active = sum(round(size * share) if _is_expert(path) else size for path, size in matrices.items())
    return BlockShape(
        parameters=count,
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in named.values()),
        stored_bytes=count * stored_size,
        products=active,
        feed_forwards=feed_forwards,
    )


def _feed_forwards(block: nn.Module, hidden: int, per_token: int) -> Iterator[FeedForwards]:
    """The feed-forwards of a block, those of one width and share together."""
    routed = [p for path, p in block.named_parameters() if _is_expert(path) and p.ndim == 3]
    if routed:
        count = len(routed[0])
        width = min(p.numel() for p in routed) // (count * hidden)  # the down projection is the smallest
        parameters = sum(p.numel() for path, p in block.named_parameters() if _is_expert(path))
        yield FeedForwards(width, count, min(1.0, per_token / count), parameters)
    groups: dict[tuple[int, bool], list[int]] = {}
    for path, width, parameters in _single(block, hidden):
        groups.setdefault((width, _is_expert(path)), []).append(parameters)
    for (width, expert), sizes in groups.items():
        share = min(1.0, per_token / len(sizes)) if expert else 1.0
        yield FeedForwards(width, len(sizes), share, sum(sizes))


def _single(block: nn.Module, hidden: int) -> Iterator[tuple[str, int, int]]:
    """Path, width and parameters of the feed-forwards made of projections: what maps back to ``hidden`` ends one."""
    by_parent: dict[str, dict[str, tuple[int, int]]] = {}
    for path, module in block.named_modules():
        shape = _projection(module)
        if shape is not None and not _is_attention(path):
            by_parent.setdefault(path.rpartition(".")[0], {})[path] = shape
    for parent, projections in by_parent.items():
        widths = [inner for outer, inner in projections.values() if outer == hidden]
        if not widths:
            continue
        width = max(widths)
        own = [path for path, shape in projections.items() if {*shape} & {width, 2 * width}]
        yield parent, width, sum(p.numel() for path in own for p in block.get_submodule(path).parameters())


def _projection(module: nn.Module) -> tuple[int, int] | None:
    """``(out, in)`` of a module that multiplies with a matrix."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):  # stored the other way round
        return module.weight.shape[1], module.weight.shape[0]
    return None


def _is_expert(path: str) -> bool:
    """Whether a parameter or module belongs to the routed experts of a mixture."""
    return "experts" in path.split(".") and not _is_attention(path)


def _is_attention(path: str) -> bool:
    return any("attn" in part or "attention" in part or "mixer" in part for part in path.split("."))


def _experts_per_token(config: Any) -> int:
    found = next((getattr(config, key) for key in _PER_TOKEN if getattr(config, key, None)), 1)
    return max(found) if isinstance(found, list | tuple) else int(found)


def _attention_width(config: Any) -> int:
    heads = getattr(config, "num_attention_heads", None) or 1
    heads = max(heads) if isinstance(heads, list | tuple) else heads
    return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // heads))


def _context(config: Any) -> int | None:
    values: Mapping[str, Any] = config.to_dict()
    length = values.get("max_position_embeddings") or values.get("n_positions")
    return int(length) if length else None
