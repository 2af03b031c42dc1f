"""Writes a Llama-like model as a GGUF file, tensor by tensor.

llama.cpp builds the architectures ``llama`` and ``qwen2`` with one width, ``deci`` with a width for each block, and with
blocks that have no attention. Its rotary embedding pairs neighbouring rows of a head where Transformers pairs the two
halves (``qwen2`` aside); so the rows of the query and key projections change places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cfsp_framework.errors import ConfigError, ModelError
from cfsp_framework.export.gguf_tokenizer import Vocabulary, read_vocabulary
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.loading import stored_dtype
from cfsp_framework.modeling.streaming import Shards
from cfsp_framework.pruning.surgery import added_biases, dropped_attention

_FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""The architecture of models of one width."""
_REASONS = {
    "qwen3": "it normalises queries and keys, which `deci` does not",
    "phi3": "its projections are fused",
    "gemma": "its activation is no SiLU and its embeddings are scaled",
    "gemma2": "its activation is no SiLU and its embeddings are scaled",
    "gemma3_text": "its activation is no SiLU and its embeddings are scaled",
    "mixtral": "it is a mixture of experts",
}
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_AROUND = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_AUTO = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_Q8_0_ROW = 32
"""Values of a row that share a scale; a row is a multiple of them."""
_NO_MERGE = "\ue000 \ue000"
"""Stands in a list of merges that would be empty, which llama.cpp does not open; no byte is written so."""


@dataclass(frozen=True)
class Written:
    """What was written."""

    architecture: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """One tensor to come: its name in the file, its key in the checkpoint, shape, type, and heads to reorder."""

    name: str
    key: str
    shape: tuple[int, ...]
    kind: str
    heads: int = 0


def write_gguf(
    decoder: Decoder,
    folder: Path,
    tokenizer: Any,
    path: Path,
    *,
    kind: str = "auto",
    pre_tokenizer: str | None = None,
) -> Written:
    """Write the checkpoint in ``folder``, of which ``decoder`` has no weights, to ``path``.

    Raises:
        ConfigError: the package gguf is missing.
        ModelError: llama.cpp has no architecture, no rotary embedding or no tokenizer for this model.
    """
    gguf = _package()
    config = decoder.config
    rope = _Rope(config)
    architecture = _architecture(decoder, rope)
    kind = _AUTO[stored_dtype(config)] if kind == "auto" else kind
    ends = getattr(decoder.model.generation_config, "eos_token_id", None) or []
    vocabulary = read_vocabulary(
        tokenizer,
        config.vocab_size,
        pre_tokenizer=pre_tokenizer,
        ends=ends if isinstance(ends, list) else [ends],
    )
    shards = Shards(folder)
    entries = list(_entries(decoder, shards, architecture, kind))
    length, window_notes = _context(config)
    writer = gguf.GGUFWriter(path, architecture)
    _describe(writer, gguf, decoder, architecture, rope, length)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"))
    _describe_vocabulary(writer, gguf, vocabulary)
    _write_tensors(writer, gguf, shards, entries, rope.factors)
    notes = (*vocabulary.notes, *window_notes, *_unquantised(entries, kind))
    return Written(architecture, notes)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("--format gguf needs the package gguf: pip install 'cfsp-framework[gguf]'.") from error
    return gguf


def _architecture(decoder: Decoder, rope: _Rope) -> str:
    """What llama.cpp calls a model like this.

    Raises:
        ModelError: it has none.
    """
    config, family = decoder.config, decoder.architecture.family
    values = config.to_dict()
    if decoder.model.config.model_type not in _FAMILIES:
        reason = _REASONS.get(family, "its blocks are not those of Llama, Mistral or Qwen2")
        raise ModelError(
            f"llama.cpp has no architecture for a {family} model with a width for each block: {reason}. Prune it with "
            "--allocator uniform, or export it as padded, and convert that with llama.cpp's convert_hf_to_gguf.py."
        )
    if values.get("hidden_act") != "silu":
        raise ModelError(f"llama.cpp computes these models with SiLU, and this one has {values.get('hidden_act')!r}.")
    native = _FAMILIES[family]
    square = config.num_attention_heads * head_size(config) == config.hidden_size
    special = added_biases(config) or values.get("mlp_bias") or dropped_attention(config)
    plain = len(set(decoder.widths)) == 1 and not dropped_attention(config)
    if native == "qwen2":
        plain = plain and square and not special and rope.factors is None
    return native if plain else "deci"


def head_size(config: Any) -> int:
    """Rows of one head."""
    return int(config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads)


class _Rope:
    """How positions are scaled: by keys llama.cpp has, or by a factor for every frequency, ``factors (head / 2,)``."""

    def __init__(self, config: Any) -> None:
        told: Mapping[str, Any] = config.to_dict().get("rope_parameters") or {}
        self.kind = str(told.get("rope_type", "default"))
        self.theta = float(told.get("rope_theta", 10000.0))
        self.told = told
        self.factors: Tensor | None = None
        self.magnitude = 1.0
        """Of sines and cosines."""
        if told.get("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError("llama.cpp turns whole heads in these models, and this one has a partial_rotary_factor.")
        if self.kind in ("dynamic", "longrope"):
            raise ModelError(
                f"positions are scaled in a way that changes with the length of the text ({self.kind}), which llama.cpp "
                "does not do in these models."
            )
        if self.kind not in ("default", "linear"):
            self._compute(config)

    def _compute(self, config: Any) -> None:
        """Take Transformers' own frequencies, whatever the scaling is called."""
        size = head_size(config)
        plain = self.theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)  # (head / 2,)
        scaled, self.magnitude = ROPE_INIT_FUNCTIONS[self.kind](config, torch.device("cpu"))
        self.factors = (plain / scaled.double()).float()


def _describe(writer: Any, gguf: Any, decoder: Decoder, architecture: str, rope: _Rope, length: int) -> None:
    """The keys that say what the model is."""
    config = decoder.config
    dropped, count = set(dropped_attention(config)), len(decoder.blocks)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    per_block = architecture == "deci"  # its blocks may differ in heads, too; one without attention has none
    size = head_size(config)
    writer.add_name(Path(str(decoder.model.config.name_or_path or "pruned")).name or "pruned")
    writer.add_description("Feed-forward channels pruned with cfsp-framework.")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(count)
    writer.add_context_length(length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(list(decoder.widths) if per_block else decoder.widths[0])
    writer.add_head_count([0 if i in dropped else heads for i in range(count)] if per_block else heads)
    writer.add_head_count_kv([0 if i in dropped else groups for i in range(count)] if per_block else groups)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope.told["factor"]))
    elif rope.magnitude != 1.0:
        writer.add_rope_scaling_attn_factors(rope.magnitude)


def _context(config: Any) -> tuple[int, tuple[str, ...]]:
    """The longest text the file is good for: where a window slides over longer ones, the window."""
    values = config.to_dict()
    length, window = int(values["max_position_embeddings"]), values.get("sliding_window")
    kinds = values.get("layer_types")
    slides = window and (kinds is None or "sliding_attention" in kinds) and values.get("use_sliding_window", True)
    if not slides or window >= length:
        return length, ()
    note = (
        f"attention slides over {window} tokens, which llama.cpp does not do in these models: the file says that its "
        f"context is {window} tokens, and up to there it is exact"
    )
    return int(window), (note,)


def _describe_vocabulary(writer: Any, gguf: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.model == "gpt2":
        writer.add_token_merges(list(vocabulary.merges) or [_NO_MERGE])
    for role, index in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _entries(decoder: Decoder, shards: Shards, architecture: str, kind: str) -> Iterator[_Entry]:
    """Every tensor of the checkpoint as the file will have it.

    Raises:
        ModelError: there is one nobody knows.
    """
    config = decoder.config
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    left_out = {f"model.layers.{index}.input_layernorm.weight" for index in dropped_attention(config)}
    if config.tie_word_embeddings:
        left_out.add("lm_head.weight")
    slices = shards.slices(shards.files)
    for key in sorted(slices, key=_in_order):
        if key.endswith("rotary_emb.inv_freq") or key in left_out:
            continue
        shape = tuple(slices[key].get_shape())
        name, part = _name(key)
        yield _Entry(name, key, shape, _type_of(shape, kind), heads.get(part, 0) if architecture != "qwen2" else 0)


def _in_order(key: str) -> tuple[int, str]:
    parts = key.split(".")
    return (int(parts[2]) if key.startswith("model.layers.") else -1), key


def _name(key: str) -> tuple[str, str]:
    """The name in the file, and which part of a block it is."""
    if key in _AROUND:
        return _AROUND[key], ""
    if key.startswith("model.layers."):
        index, rest = key.removeprefix("model.layers.").split(".", 1)
        part, _, what = rest.rpartition(".")
        if part in _PARTS:
            return f"blk.{index}.{_PARTS[part]}.{what}", part
    raise ModelError(f"the checkpoint has a tensor llama.cpp has no place for: {key}.")


def _type_of(shape: tuple[int, ...], kind: str) -> str:
    """Vectors stay float32; a matrix whose rows Q8_0 cannot divide stays in 16 bits."""
    if len(shape) == 1:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % _Q8_0_ROW else kind


def _unquantised(entries: list[_Entry], kind: str) -> tuple[str, ...]:
    left = [entry for entry in entries if kind == "q8_0" and entry.kind == "f16"]
    if not left:
        return ()
    note = (
        f"{len(left)} matrices, first {left[0].name}, have rows of {left[0].shape[-1]} values, no multiple of "
        f"{_Q8_0_ROW}, and stay f16; prune with a --round-to of {_Q8_0_ROW} or a multiple"
    )
    return (note,)


def _write_tensors(writer: Any, gguf: Any, shards: Shards, entries: list[_Entry], factors: Tensor | None) -> None:
    """The header first, which names them all, then one after the other."""
    types = {kind: getattr(gguf.GGMLQuantizationType, kind.upper()) for kind in ("f32", "f16", "bf16", "q8_0")}
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), 4 * len(factors))
    for entry in entries:
        kind = types[entry.kind]
        stored = gguf.quant_shape_to_byte_shape(entry.shape, kind) if entry.kind in ("q8_0", "bf16") else entry.shape
        dtype = {"f32": np.float32, "f16": np.float16}.get(entry.kind, np.uint8)
        size = int(np.prod(stored)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(entry.name, stored, np.dtype(dtype), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for entry in entries:
            values = interleave(_read(shards, entry.key), entry.heads)
            writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(values.numpy()), types[entry.kind]))
    finally:
        writer.close()


def _read(shards: Shards, key: str) -> Tensor:
    (found,) = shards.slices([key]).values()
    tensor: Tensor = found[:]
    return tensor.float()


def interleave(weight: Tensor, heads: int) -> Tensor:
    """The rows of ``heads`` heads, ``weight (heads * size, ...)``, with the two halves of each head alternating."""
    if not heads:
        return weight
    halves = weight.view(heads, 2, -1, *weight.shape[1:])  # (heads, 2, size / 2, ...)
    return halves.transpose(1, 2).reshape(weight.shape)
