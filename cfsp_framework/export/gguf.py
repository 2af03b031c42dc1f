"""Write a Llama-like model as a GGUF file, tensor by tensor.

llama.cpp builds the architectures ``llama`` and ``qwen2`` with one width, and ``deci`` with a width for each block and
with blocks without attention. Its rotary embedding pairs neighbouring rows of a head where Transformers pairs the two
halves (except ``qwen2``), so the rows of the query and key projections are reordered.
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
from cfsp_framework.modeling.config_facts import head_size
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.loading import stored_dtype
from cfsp_framework.modeling.streaming import Shards
from cfsp_framework.pruning.surgery import added_biases, dropped_attention

_FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""Architecture of models of one width."""
_REASONS = {
    "qwen3": "it normalises queries and keys, which `deci` does not",
    "phi3": "its projections are fused",
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "its activation is not SiLU and its embeddings are scaled"),
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
_OUTSIDE_BLOCKS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_Q8_0_ROW = 32
"""Values of a row that share a scale in Q8_0; the length of a row is a multiple of them."""
_UNUSED_MERGE = "\ue000 \ue000"
"""Placeholder for an empty list of merges, which llama.cpp does not open; no byte is encoded as these characters."""


@dataclass(frozen=True)
class _TensorEntry:
    """Name of a tensor in the file, key in the checkpoint, shape, type, and number of heads to reorder."""

    name: str
    key: str
    shape: tuple[int, ...]
    kind: str
    heads: int = 0


def write_gguf(
    decoder: Decoder, folder: Path, tokenizer: Any, path: Path, *, kind: str = "auto", pre_tokenizer: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """Write the checkpoint in ``folder`` to ``path``; ``decoder`` has its shapes, but no weights.

    Returns llama.cpp's name of the architecture, and notes for users of the file.

    Raises:
        ConfigError: the package gguf is missing.
        ModelError: llama.cpp has no architecture, no rotary embedding or no tokenizer for this model.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("--format gguf needs the package gguf: pip install 'cfsp-framework[gguf]'.") from error
    config, shards = decoder.config, Shards(folder)
    rope = _Rope(config)
    architecture = _choose_architecture(decoder, rope)
    kind = _KINDS[stored_dtype(config)] if kind == "auto" else kind
    ends = getattr(decoder.model.generation_config, "eos_token_id", None) or []
    ends = ends if isinstance(ends, list) else [ends]
    vocabulary = read_vocabulary(tokenizer, config.vocab_size, pre_tokenizer=pre_tokenizer, ends=ends)
    entries = list(_list_tensors(decoder, shards, architecture, kind))
    length, window_notes = _context(config)
    writer: Any = gguf.GGUFWriter(path, architecture)
    _write_settings(writer, decoder, architecture, rope, length)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"))
    _write_vocabulary(writer, vocabulary)
    _write_tensors(writer, shards, entries, rope.factors)
    return architecture, (*vocabulary.notes, *window_notes, *_note_unquantized(entries, kind))


def _choose_architecture(decoder: Decoder, rope: _Rope) -> str:
    """Return llama.cpp's architecture for a model.

    Raises:
        ModelError: llama.cpp has none.
    """
    config, family = decoder.config, decoder.architecture.family
    values, dropped = config.to_dict(), dropped_attention(config)
    if decoder.model.config.model_type not in _FAMILIES:
        reason = _REASONS.get(family, "its blocks are not those of Llama, Mistral or Qwen2")
        raise ModelError(
            f"llama.cpp has no architecture for a {family} model with a width for each block: {reason}. Prune it with "
            "--allocator uniform, or export it as padded, and convert that with llama.cpp's convert_hf_to_gguf.py."
        )
    if values.get("hidden_act") != "silu":
        raise ModelError(f"llama.cpp computes these models with SiLU, and this one has {values.get('hidden_act')!r}.")
    native = _FAMILIES[family]
    plain = len(set(decoder.widths)) == 1 and not dropped
    if native == "qwen2":
        square = config.num_attention_heads * head_size(config) == config.hidden_size
        plain = plain and square and rope.factors is None and not (added_biases(config) or values.get("mlp_bias"))
    return native if plain else "deci"


class _Rope:
    """Scaling of positions: by keys of llama.cpp, or by a factor for each frequency, ``factors (head / 2,)``."""

    def __init__(self, config: Any) -> None:
        self.parameters: Mapping[str, Any] = config.to_dict().get("rope_parameters") or {}
        self.kind = str(self.parameters.get("rope_type", "default"))
        self.theta = float(self.parameters.get("rope_theta", 10000.0))
        self.factors: Tensor | None = None
        self.magnitude = 1.0
        """Scale of sines and cosines."""
        if self.parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError("llama.cpp rotates whole heads in these models; this one has a partial_rotary_factor.")
        if self.kind in ("dynamic", "longrope"):
            raise ModelError(
                f"positions are scaled in a way that changes with the length of the text ({self.kind}), which llama.cpp "
                "does not do in these models."
            )
        if self.kind not in ("default", "linear"):  # Transformers' own frequencies, for any other kind of scaling
            size = head_size(config)
            plain = self.theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)  # (head / 2,)
            scaled, self.magnitude = ROPE_INIT_FUNCTIONS[self.kind](config, torch.device("cpu"))  # (head / 2,)
            self.factors = (plain / scaled.double()).float()  # (head / 2,)


def _write_settings(writer: Any, decoder: Decoder, architecture: str, rope: _Rope, length: int) -> None:
    """Write the keys that describe the model; ``deci`` has a width and heads for each block."""
    import gguf

    config, size = decoder.config, head_size(decoder.config)
    per_block = architecture == "deci"
    counts = [0 if index in dropped_attention(config) else 1 for index in range(len(decoder.blocks))]
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    writer.add_name(Path(str(decoder.model.config.name_or_path or "pruned")).name or "pruned")
    writer.add_description("Feed-forward channels pruned with cfsp-framework.")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(decoder.blocks))
    writer.add_context_length(length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(list(decoder.widths) if per_block else decoder.widths[0])
    writer.add_head_count([count * heads for count in counts] if per_block else heads)
    writer.add_head_count_kv([count * groups for count in counts] if per_block else groups)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope.parameters["factor"]))
    elif rope.magnitude != 1.0:
        writer.add_rope_scaling_attn_factors(rope.magnitude)


def _context(config: Any) -> tuple[int, list[str]]:
    """Return the longest text the file is exact for, that of the sliding window if there is one, and a note on it."""
    values = config.to_dict()
    length, window = int(values["max_position_embeddings"]), values.get("sliding_window")
    kinds = values.get("layer_types")
    slides = window and (kinds is None or "sliding_attention" in kinds) and values.get("use_sliding_window", True)
    if not slides or window >= length:
        return length, []
    note = (
        f"attention slides over {window} tokens, which llama.cpp does not do in these models: the file says that its "
        f"context is {window} tokens, and up to there it is exact"
    )
    return int(window), [note]


def _write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.model == "gpt2":
        writer.add_token_merges(list(vocabulary.merges) or [_UNUSED_MERGE])
    for role, index in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _list_tensors(decoder: Decoder, shards: Shards, architecture: str, kind: str) -> Iterator[_TensorEntry]:
    """Yield every tensor of the file, the blocks in order.

    Raises:
        ModelError: the checkpoint has a tensor that llama.cpp has no name for.
    """
    config = decoder.config
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    skipped = {f"model.layers.{index}.input_layernorm.weight" for index in dropped_attention(config)}
    if config.tie_word_embeddings:
        skipped.add("lm_head.weight")
    slices = shards.slices(shards.files)
    for key in sorted(slices, key=lambda key: (_block_of(key), key)):
        if key.endswith("rotary_emb.inv_freq") or key in skipped:
            continue
        part, _, leaf = key.removeprefix(f"model.layers.{_block_of(key)}.").rpartition(".")
        if key in _OUTSIDE_BLOCKS:
            name = _OUTSIDE_BLOCKS[key]
        elif part in _PARTS:
            name = f"blk.{_block_of(key)}.{_PARTS[part]}.{leaf}"
        else:
            raise ModelError(f"the checkpoint has a tensor that llama.cpp has no name for: {key}.")
        shape = tuple(slices[key].get_shape())
        reordered = heads.get(part, 0) if architecture != "qwen2" else 0
        yield _TensorEntry(name, key, shape, _choose_kind(shape, kind), reordered)


def _block_of(key: str) -> int:
    return int(key.split(".")[2]) if key.startswith("model.layers.") else -1


def _choose_kind(shape: tuple[int, ...], kind: str) -> str:
    """Return the type of a tensor: vectors stay float32, and matrices whose rows Q8_0 cannot divide 16 bits."""
    if len(shape) == 1:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % _Q8_0_ROW else kind


def _note_unquantized(entries: list[_TensorEntry], kind: str) -> Iterator[str]:
    unquantized = [entry for entry in entries if kind == "q8_0" and entry.kind == "f16"]
    if unquantized:
        first = unquantized[0]
        yield (
            f"{len(unquantized)} matrices, first {first.name}, have rows of {first.shape[-1]} values, not a multiple of "
            f"{_Q8_0_ROW}, and stay f16; prune with a --round-to of {_Q8_0_ROW} or a multiple"
        )


def _write_tensors(writer: Any, shards: Shards, entries: list[_TensorEntry], factors: Tensor | None) -> None:
    """Write the header, which lists all tensors, then one tensor after the other."""
    import gguf

    types = {kind: getattr(gguf.GGMLQuantizationType, kind.upper()) for kind in ("f32", "f16", "bf16", "q8_0")}
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), 4 * len(factors))
    for entry in entries:
        kind = types[entry.kind]
        stored = gguf.quant_shape_to_byte_shape(entry.shape, kind) if entry.kind in ("q8_0", "bf16") else entry.shape
        dtype = np.dtype({"f32": np.float32, "f16": np.float16}.get(entry.kind, np.uint8))
        writer.add_tensor_info(entry.name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for entry in entries:
            (stored_slice,) = shards.slices([entry.key]).values()
            weight: Tensor = stored_slice[:]  # (out, in) or (out,)
            values = np.ascontiguousarray(interleave(weight.float(), entry.heads).numpy())
            writer.write_tensor_data(gguf.quants.quantize(values, types[entry.kind]))
    finally:
        writer.close()


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Alternate the rows of the two halves of each head of ``weight (heads * size, ...)``; 0 heads change nothing."""
    if not heads:
        return weight
    halves = weight.view(heads, 2, -1, *weight.shape[1:])  # (heads, 2, size / 2, ...)
    return halves.transpose(1, 2).reshape(weight.shape)  # (heads * size, ...)
