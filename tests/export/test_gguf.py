"""A GGUF file holds the model's tensors, reordered for llama.cpp, its keys and its tokenizer.

``tests/benchmarks/gguf_llama_cpp.py`` runs such files in llama.cpp; here they are read back.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

gguf = pytest.importorskip("gguf")

from cfsp_framework import RunConfig
from cfsp_framework.errors import ModelError, OutputError
from cfsp_framework.export.export import Exported, export_gguf
from cfsp_framework.export.gguf import interleave
from cfsp_framework.export.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary
from helpers import families
from helpers.pruned_checkpoints import write_pruned
from helpers.runs import invoke

WIDTHS = (48, 40, 56)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Write:
    """``write(name, widths, **settings)``: the folder of a pruned model whose tokenizer is a byte-level BPE."""

    def make(name: str, widths: Sequence[int] = WIDTHS, *, dropped: Any = (), biases: Any = (), **changes: Any) -> Path:
        out = tmp_path_factory.mktemp("gguf") / "pruned"
        dense = make_model(name, **changes)
        return write_pruned(dense, out, widths, dropped=dropped, biases=biases, max_shard_size="40KB")

    return make


def export(pruned: Path, **options: Any) -> tuple[Exported, Any]:
    """The export's record, and the file."""
    path = pruned.parent / "model.gguf"
    exported = export_gguf(RunConfig.build(model=str(pruned), device="cpu"), path, overwrite=True, **options)
    return exported, gguf.GGUFReader(path)


def value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


def tensors(reader: Any) -> dict[str, torch.Tensor]:
    """Every tensor in float32, shaped as in PyTorch."""
    return {
        entry.name: torch.from_numpy(gguf.quants.dequantize(entry.data, entry.tensor_type).copy()).view(
            *reversed([int(size) for size in entry.shape])
        )
        for entry in reader.tensors
    }


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes what makes the halves of a head alternate, by plain indexing."""
    size = len(weight) // heads
    order = [head * size + 2 * i + half for head in range(heads) for half in (0, 1) for i in range(size // 2)]
    return weight[order]


@pytest.mark.parametrize(
    ("name", "widths", "settings", "architecture"),
    [
        ("llama", WIDTHS, {}, "deci"),
        ("llama", (48, 48, 48), {}, "llama"),
        ("llama-bias", WIDTHS, {"attention_bias": True}, "deci"),
        ("llama-tied", WIDTHS, {}, "deci"),
        ("mistral", WIDTHS, {}, "deci"),
        ("mistral", (48, 48, 48), {}, "llama"),
        ("qwen2", WIDTHS, {}, "deci"),
        ("qwen2", (48, 48, 48), {}, "qwen2"),
        ("qwen2", (48, 48, 48), {"head_dim": 16}, "deci"),
        ("qwen2", (48, 48, 48), {"rope_parameters": LLAMA3}, "deci"),
    ],
)
def test_every_tensor_is_there(
    name: str, widths: Sequence[int], settings: dict[str, Any], architecture: str, write: Write
) -> None:
    pruned = write(name, widths, **settings)
    exported, reader = export(pruned)
    assert exported.architecture == value(reader, "general.architecture") == architecture
    found, expected = tensors(reader), families.tensors_of(pruned)
    found.pop("rope_freqs.weight", None)
    assert len(found) == len(expected)
    heads = {"q_proj": 4, "k_proj": 2}
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    for key, tensor in expected.items():
        module, _, kind = key.rpartition(".")
        prefix = ""
        if module.startswith("model.layers."):
            index, module = module.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{index}."
        written = found[f"{prefix}{names[module]}.{kind}"]
        count = heads.get(module.rpartition(".")[2], 0)
        assert (halves(written, count) if count and architecture != "qwen2" else written).equal(tensor), key


@given(st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_the_halves_of_a_head_alternate(heads: int, half: int, vector: bool) -> None:
    rows = heads * 2 * half
    weight = torch.arange(rows) if vector else torch.arange(rows * 3).view(rows, 3)
    changed = interleave(weight, heads)
    assert halves(changed, heads).equal(weight)
    assert changed[0].equal(weight[0])
    assert changed[1].equal(weight[half])


def test_the_keys_say_what_the_model_is(write: Write) -> None:
    _, reader = export(write("llama", head_dim=16, rms_norm_eps=1e-5))
    assert value(reader, "deci.feed_forward_length") == list(WIDTHS)
    assert value(reader, "deci.attention.head_count") == [4, 4, 4]
    assert value(reader, "deci.attention.head_count_kv") == [2, 2, 2]
    expected = {
        "block_count": 3,
        "context_length": 128,
        "embedding_length": 32,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
        "vocab_size": 320,
    }
    assert {key: value(reader, f"deci.{key}") for key in expected} == expected
    assert value(reader, "deci.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    _, plain = export(write("llama", (48, 48, 48)))
    assert value(plain, "llama.feed_forward_length") == 48
    assert value(plain, "llama.attention.head_count_kv") == 2


def test_a_block_without_attention_has_no_heads_and_no_norm_before_them(write: Write) -> None:
    _, reader = export(write("llama", (48, 48, 48), dropped=(1,)))
    assert value(reader, "general.architecture") == "deci"
    assert value(reader, "deci.attention.head_count") == [4, 0, 4]
    assert value(reader, "deci.attention.head_count_kv") == [2, 0, 2]
    names = {entry.name for entry in reader.tensors if entry.name.startswith("blk.1.")}
    assert names == {f"blk.1.{part}.weight" for part in ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")}


def test_biases_of_a_compensator_are_there(write: Write) -> None:
    pruned = write("llama", biases=("down_bias",))
    _, reader = export(pruned)
    expected = families.tensors_of(pruned)
    for index in range(3):
        bias = expected[f"model.layers.{index}.mlp.down_proj.bias"]
        assert bias.any()
        assert tensors(reader)[f"blk.{index}.ffn_down.bias"].equal(bias)


def test_llama_3_positions_are_factors_of_each_frequency(write: Write) -> None:
    _, reader = export(write("llama", head_dim=16, rope_parameters=LLAMA3))
    lengths = [2 * math.pi * 10000 ** (2 * i / 16) for i in range(8)]

    def factor(length: float) -> float:
        if length < 64 / 4:
            return 1.0
        if length > 64 / 1:
            return 8.0
        smooth = (64 / length - 1) / (4 - 1)
        return 1 / ((1 - smooth) / 8 + smooth)

    found = tensors(reader)["rope_freqs.weight"]
    assert found.tolist() == pytest.approx([factor(length) for length in lengths], rel=1e-5)
    assert len({round(value, 3) for value in found.tolist()}) >= 3
    assert "deci.rope.scaling.type" not in reader.fields


def test_linear_and_yarn_positions(write: Write) -> None:
    theta = {"rope_theta": 5000.0}
    _, linear = export(write("llama", rope_parameters={**theta, "rope_type": "linear", "factor": 4.0}))
    assert value(linear, "deci.rope.scaling.type") == "linear"
    assert value(linear, "deci.rope.scaling.factor") == 4.0
    assert value(linear, "deci.rope.freq_base") == 5000.0
    yarn = {**theta, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    _, reader = export(write("llama", rope_parameters=yarn))
    assert value(reader, "deci.rope.scaling.attn_factor") == pytest.approx(0.1 * math.log(4) + 1)
    factors = tensors(reader)["rope_freqs.weight"]
    assert factors[0] == pytest.approx(1)
    assert factors[-1] == pytest.approx(4)


def test_positions_that_change_with_the_length_are_refused(write: Write) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}
    with pytest.raises(ModelError, match=r"changes with the length of the text \(dynamic\)"):
        export(write("llama", rope_parameters=dynamic))


def test_the_context_ends_where_a_window_would_slide(write: Write) -> None:
    exported, reader = export(write("mistral"))
    assert value(reader, "deci.context_length") == 16
    assert "slides over 16 tokens" in exported.notes[0]
    exported, reader = export(write("mistral", sliding_window=None))
    assert value(reader, "deci.context_length") == 128
    assert exported.notes == ()


@pytest.mark.parametrize(("kind", "error"), [("f32", 0.0), ("f16", 2e-4), ("bf16", 3e-3), ("q8_0", 5e-3)])
def test_matrices_have_the_type_asked_for_and_vectors_are_exact(kind: str, error: float, write: Write) -> None:
    pruned = write("llama", (64, 32, 64))
    exported, reader = export(pruned, kind=kind)
    types = {entry.name: entry.tensor_type.name for entry in reader.tensors}
    assert {name: kind_ for name, kind_ in types.items() if "norm" in name and kind_ != "F32"} == {}
    assert {kind_ for name, kind_ in types.items() if "norm" not in name} == {kind.upper()}
    found = tensors(reader)["blk.1.ffn_up.weight"]
    expected = families.tensors_of(pruned)["model.layers.1.mlp.up_proj.weight"]
    assert (found - expected).abs().max() <= error
    assert kind == "f32" or not found.equal(expected)
    assert value(reader, "general.file_type") == {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[kind]
    assert exported.notes == ()


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_the_type_is_the_checkpoints_where_none_is_asked_for(dtype: str, expected: str, write: Write) -> None:
    pruned = write("llama", dtype=dtype)
    _, reader = export(pruned)
    assert {entry.tensor_type.name for entry in reader.tensors if "ffn_up" in entry.name} == {expected}
    weight = families.tensors_of(pruned)["model.layers.0.mlp.up_proj.weight"]
    assert tensors(reader)["blk.0.ffn_up.weight"].equal(weight.float())


def test_matrices_q8_0_cannot_hold_stay_in_16_bits_and_are_noted(write: Write) -> None:
    exported, reader = export(write("llama"), kind="q8_0")  # widths 48, 40, 56: no multiples of 32
    types = {entry.name: entry.tensor_type.name for entry in reader.tensors}
    assert {types[f"blk.{index}.ffn_down.weight"] for index in range(3)} == {"F16"}
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    assert "3 matrices, first blk.0.ffn_down.weight, have rows of 48 values" in exported.notes[0]
    assert "--round-to of 32" in exported.notes[0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3", "normalises queries and keys"),
        ("phi3", "projections are fused"),
        ("gemma2", "not SiLU"),
        ("mixtral", "mixture of experts"),
        ("olmo2", "not those of Llama"),
    ],
)
def test_families_llama_cpp_has_no_architecture_for_are_refused(
    name: str, reason: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = RunConfig.build(model=str(make_model(name)), device="cpu")
    with pytest.raises(ModelError, match=reason):
        export_gguf(config, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_other_activations_are_refused(write: Write) -> None:
    with pytest.raises(ModelError, match="SiLU, and this one has 'gelu'"):
        export(write("llama", hidden_act="gelu"))


def test_a_file_is_kept_without_overwrite_and_after_a_failure(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig.build(model=str(write("llama")), device="cpu")
    out = tmp_path / "x.gguf"
    export_gguf(config, out)
    with pytest.raises(OutputError, match="exists"):
        export_gguf(config, out)
    before = out.read_bytes()

    def fail(*_: Any) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr("cfsp_framework.export.gguf.interleave", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        export_gguf(config, out, overwrite=True)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
    with pytest.raises(OutputError, match="is a folder"):
        export_gguf(config, tmp_path)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    families.build("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"tokenizer of model .* cannot be opened"):
        export_gguf(RunConfig.build(model=str(tmp_path / "bare"), device="cpu"), tmp_path / "x.gguf")


def test_without_the_package_the_extra_is_named(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    found = invoke("export", str(write("llama")), str(tmp_path / "x.gguf"), "--format", "gguf")
    assert found.exit_code == 2
    assert "pip install 'cfsp-framework[gguf]'" in found.output


def test_the_command_reports_the_architecture(write: Write, tmp_path: Path) -> None:
    command = ["export", str(write("llama")), str(tmp_path / "x.gguf"), "--format", "gguf", "--type", "q8_0"]
    exported = json.loads(invoke(*command, "--json").stdout)
    assert (exported["architecture"], exported["widths"]) == ("deci", list(WIDTHS))
    assert exported["bytes"] == (tmp_path / "x.gguf").stat().st_size
    shown = invoke(*command, "--overwrite")
    assert "architecture deci" in shown.output
    assert "Note: 3 matrices" in " ".join(shown.output.split())


# The tokenizer


def byte_level(*first: Any, use_regex: bool = False, prefix: bool = False, **model: Any) -> Tokenizer:
    """A tokenizer of three letters and two merges."""
    made = Tokenizer(
        models.BPE(vocab={"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, merges=[("a", "b"), ("ab", "c")], **model)
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*first, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)]
    )
    made.decoder = decoders.ByteLevel()
    return made


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (byte_level(use_regex=True), "gpt-2"),
        (byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True), "smollm"),
        (byte_level(split(CONTRACTIONS + r"\p{N}{1,3}|" + REST), ignore_merges=True), "llama-bpe"),
        (byte_level(split(CONTRACTIONS + r"\p{N}{1,3}|" + REST)), "smaug-bpe"),
        (byte_level(split(CONTRACTIONS + r"\p{N}|" + REST)), "qwen2"),
    ],
)
def test_the_way_to_split_text_is_named(made: Tokenizer, name: str) -> None:
    found = read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=made), 8)
    assert (found.model, found.pre) == ("gpt2", name)
    assert found.tokens == ("a", "b", "c", "ab", "abc", "[PAD5]", "[PAD6]", "[PAD7]")
    assert found.kinds == (NORMAL,) * 5 + (UNUSED,) * 3
    assert found.merges == ("a b", "ab c")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (byte_level(split("a|b")), "is not known"),
        (byte_level(split(CONTRACTIONS + r"\p{N}|" + REST), ignore_merges=True), "is not known"),
        (byte_level(use_regex=True, prefix=True), "splits text by"),
        (byte_level(pre_tokenizers.Punctuation()), "splits text by"),
        (Tokenizer(models.WordLevel({"a": 0, "<u>": 1}, unk_token="<u>")), "is a WordLevel model"),
    ],
)
def test_other_ways_are_refused(made: Tokenizer, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=made), 8)


def test_an_unknown_way_to_split_text_can_be_given() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(split("a|b")))
    assert read_vocabulary(tokenizer, 8, pre_tokenizer="falcon").pre == "falcon"


def test_normalisation_is_noted_or_refused() -> None:
    made = byte_level(use_regex=True)
    made.normalizer = normalizers.NFC()
    assert "normalises text (NFC)" in read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=made), 8).notes[0]
    made.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match=r"changes text first \(Lowercase\)"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=made), 8)


def test_special_tokens_keep_their_roles(make_model: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_model("llama"))
    tokenizer.add_tokens(["<note>"])
    tokenizer.chat_template = "{{ messages }}"
    found = read_vocabulary(tokenizer, 400, ends=[2, 5])
    assert found.special == {"bos": 1, "eos": 2, "pad": 0, "eot": 5}
    assert found.kinds[:4] == (CONTROL, CONTROL, CONTROL, NORMAL)
    assert found.kinds[len(tokenizer) - 1] == USER_DEFINED
    assert (found.add_bos, found.add_eos) == (False, False)
    assert found.chat_template == "{{ messages }}"


PIECES = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x41>": 3, "\u2581": 4, "a": 5, "b": 6, "ab": 7, "\u2581ab": 8}
ALL_WAYS = [("a", "b"), ("\u2581", "ab")]


def sentencepiece(
    merges: Sequence[tuple[str, str]] = ALL_WAYS, vocabulary: dict[str, int] | None = None, *, metaspace: bool = False
) -> PreTrainedTokenizerFast:
    made = Tokenizer(
        models.BPE(
            vocab=vocabulary or PIECES, merges=list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_pieces_are_scored_in_the_order_they_are_joined() -> None:
    found = read_vocabulary(sentencepiece(), 10)
    assert (found.model, found.pre, found.space_prefix) == ("llama", "default", True)
    assert found.kinds == (UNKNOWN, CONTROL, CONTROL, BYTE, NORMAL, NORMAL, NORMAL, NORMAL, NORMAL, UNUSED)
    assert found.scores[7] > found.scores[8] > found.scores[4]
    assert found.merges == ()
    assert found.notes == ()


def test_merges_that_scores_cannot_express_are_noted() -> None:
    more = {**PIECES, "\u2581a": 9}
    assert "not those of SentencePiece" in read_vocabulary(sentencepiece(vocabulary=more), 10).notes[0]
    all_ways = [*ALL_WAYS, ("\u2581a", "b"), ("\u2581", "a")]
    assert read_vocabulary(sentencepiece(all_ways, more), 10).notes == ()
    apart = [("\u2581", "ab"), ("\u2581", "a"), ("\u2581a", "b"), ("a", "b")]
    assert "not those of SentencePiece" in read_vocabulary(sentencepiece(apart, more), 10).notes[0]


def test_spaces_before_a_text() -> None:
    found = read_vocabulary(sentencepiece(metaspace=True), 10)
    assert found.space_prefix
    assert "begins with two of them" in found.notes[0]
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    assert not read_vocabulary(tokenizer, 10).space_prefix
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match="unlike SentencePiece"):
        read_vocabulary(tokenizer, 10)


def test_the_tokenizer_of_a_real_model(assets: Path, tmp_path: Path) -> None:
    out = tmp_path / "stories.gguf"
    export_gguf(RunConfig.build(model=str(assets / "models" / "stories260K"), device="cpu"), out)
    reader = gguf.GGUFReader(out)
    assert value(reader, "tokenizer.ggml.model") == "llama"
    assert value(reader, "tokenizer.ggml.add_bos_token") is True
    assert value(reader, "tokenizer.ggml.add_eos_token") is False
    assert value(reader, "tokenizer.ggml.add_space_prefix") is True
    assert value(reader, "tokenizer.ggml.tokens")[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert value(reader, "tokenizer.ggml.token_type")[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert len(value(reader, "tokenizer.ggml.scores")) == 512
