"""Build tiny random models of many families, examine them, and write the tables of docs/architectures.md.

``python tests/helpers/families.py`` examines all families and rewrites the tables.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from cfsp_framework import BlockRecovery, PruningPlan, RecoveryPlan, RunConfig, Update
from cfsp_framework.api.records import BlockPlan, ModelIdentity, RunResult
from cfsp_framework.errors import ModelError
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.registry import Plugins
from cfsp_framework.modeling.decoder import Decoder, open_decoder
from cfsp_framework.modeling.feed_forwards import DenseFeedForward, ExpertFeedForwards, FeedForwardModule
from cfsp_framework.modeling.loading import load_model, open_model, silence_transformers
from cfsp_framework.pipeline import prune
from cfsp_framework.pruning.cut import cut_model
from cfsp_framework.recovery.lora import add_adapters, load_adapter, merge_adapters, save_adapter
from cfsp_framework.recovery.targets import list_trainable_blocks, select_matrices
from cfsp_framework.testing import build_plan
from cfsp_framework.testing.models import byte_tokenizer, random_model
from cfsp_plugins.recovery import unit_of_rank

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
CUT_TOLERANCE = 1e-5
"""Largest difference, of the largest logit, between a cut model and a masked one."""
ADAPTER_TOLERANCE = 1e-5
"""Largest difference, of the largest logit, after merging adapters or opening them again."""
VOCABULARY = 320
IDS = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(5))  # (B, T)

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA = {**_SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
_HEADS = {"head_dim": 8}
_SLIDING = {**_HEADS, "sliding_window": 16}
_GEMMA = {**_SLIDING, "query_pre_attn_scalar": 8}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 64}
_MIXTURE = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
_SMALL_EXPERTS = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DEEPSEEK = {
    **_LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_GEMMA3N = {
    **_LLAMA, **_SLIDING, "num_hidden_layers": 5, "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
    "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 4, "altup_num_inputs": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model type of Transformers with settings; ``refused`` is the message of a run that refuses it, if one does."""

    model_type: str
    settings: Mapping[str, Any]
    refused: str = ""

    @property
    def routed(self) -> int:
        """Experts that a token is routed to; 0 without experts."""
        routed: int = self.settings.get("num_experts_per_tok") or self.settings.get("moe_k") or 0
        return routed

    @property
    def known(self) -> bool:
        """Whether this version of Transformers has the model type."""
        return self.model_type in CONFIG_MAPPING


def _named(settings: Mapping[str, Any], *names: str) -> dict[str, Family]:
    return {name: Family(name, settings) for name in names}


_FIXED = "the width of {} in {} models is set by nothing in their configuration, so a narrower one could not be opened again."
_NO_BLOCKS = (
    "no list of {} decoder blocks is recognised in this {} model: Transformers does not say of which class they are. "
    "A plugin can describe it, with the hook cfsp_architecture."
)

BASE: dict[str, Family] = {
    **_named(_LLAMA, "llama"),
    "llama_bias": Family("llama", {**_LLAMA, "mlp_bias": True, "attention_bias": True}),
    "llama_tied": Family("llama", {**_LLAMA, "tie_word_embeddings": True}),
    **_named({**_LLAMA, "sliding_window": 16}, "mistral"),
    **_named(_LLAMA, "qwen2"),
    **_named({**_LLAMA, **_HEADS}, "qwen3", "gemma"),
    **_named({**_LLAMA, **_GEMMA}, "gemma2"),
    **_named({**_LLAMA, **_GEMMA, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}, "gemma3_text"),
    **_named(_GEMMA3N | {"activation_sparsity_pattern": None}, "gemma3n_text"),
    **_named(_LLAMA, "phi3", "phi", "starcoder2", "stablelm", "olmo", "olmo2", "cohere", "granite", "smollm3"),
    **_named(_LLAMA, "nemotron"),
    **_named({**_LLAMA, **_HEADS}, "glm4", "internlm3", "ministral3"),
    **_named({**_SMALL, "intermediate_size": 64}, "gpt_neox"),
    **_named({**_GPT, "rotary_dim": 4}, "gptj"),
    **_named({
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4,
        "window_size": 16, "max_position_embeddings": 128, "attention_types": [[["global", "local"], 1]],
    }, "gpt_neo"),
    **_named({**_SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}, "opt"),
    **_named(_GPT, "gpt2", "gpt_bigcode"),
    **_named({**_SMALL, "ffn_hidden_size": 64}, "falcon"),
    "bloom": Family(
        "bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}, _FIXED.format("mlp", "bloom")
    ),
    "mpt": Family("mpt", {
        "vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4, "expansion_ratio": 4, "max_seq_len": 128,
    }, _FIXED.format("ffn", "mpt")),
    **_named(_MIXTURE, "mixtral"),
    **_named({**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2}, "olmoe"),
    **_named({**_SMALL_EXPERTS, "shared_expert_intermediate_size": 48, "mlp_only_layers": [1]}, "qwen2_moe"),
    **_named({**_SMALL_EXPERTS, **_HEADS, "mlp_only_layers": [1]}, "qwen3_moe"),
    **_named({**_DEEPSEEK, **_LATENT}, "deepseek_v3"),
    **_named({
        **_MIXTURE, **_SLIDING, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    }, "gpt_oss"),
    **_named({
        **_LLAMA, **_HEADS, "intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
    }, "llama4_text"),
}  # fmt: skip
"""The families that must work, and two whose width nothing sets."""

MORE: dict[str, Family] = {
    **_named({**_LLAMA, **_SLIDING}, "cohere2", "exaone4"),
    **_named({**_LLAMA, "sliding_window": 16}, "olmo3"),
    **_named({**_LLAMA, **_HEADS}, "helium", "seed_oss", "ernie4_5", "hunyuan_v1_dense"),
    **_named({**_LLAMA, **_GEMMA}, "vaultgemma"),
    **_named(_LLAMA, "arcee", "apertus", "diffllama", "nanochat"),
    **_named({**_SMALL, "intermediate_size": 64}, "persimmon"),
    **_named({**_GPT, "rotary_dim": 4}, "codegen"),
    **_named({
        "vocab_size": VOCABULARY, "d_model": 32, "ffn_dim": 64, "num_layers": 3, "attention_heads": 4,
        "max_position_embeddings": 128,
    }, "xglm"),
    **_named({**_LLAMA, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "conv"]}, "lfm2"),
    **_named(_MIXTURE, "granitemoe", "phimoe"),
    **_named({**_MIXTURE, **_HEADS}, "minimax"),
    **_named({
        **_LLAMA, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1,
    }, "ernie4_5_moe"),
    **_named({**_DEEPSEEK, **_HEADS}, "glm4_moe"),
    **_named(_DEEPSEEK, "dots1"),
    **_named({
        **_SMALL_EXPERTS, **_HEADS, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    }, "qwen3_next"),
    **_named({
        **_LLAMA, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4,
    }, "jamba"),
}  # fmt: skip
"""Families that no plugin describes: their feed-forwards are detected."""

_TWO_SHARED = {"deepseek_v3_two_shared": Family("deepseek_v3", {**_DEEPSEEK, **_LATENT, "n_shared_experts": 2})}

SEEING: dict[str, Family] = {
    **_named({"text_config": {**_LLAMA, **_GEMMA}, "vision_config": _VISION, "mm_tokens_per_image": 4}, "gemma3"),
    **_named({
        "text_config": {**_LLAMA, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "clip_vision_model"},
    }, "llava"),
    **_named({
        "text_config": {
            **_LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
    }, "qwen2_vl"),
    **_named({
        "text_config": {**_LLAMA, "model_type": "mistral"},
        "vision_config": {**_VISION, "model_type": "pixtral"},
    }, "mistral3"),
}  # fmt: skip
"""Vision-language models; their text decoder is pruned."""

ALIEN: dict[str, Family] = {
    "gpt_neox_japanese": Family(
        "gpt_neox_japanese",
        {key: value for key, value in _SMALL.items() if key != "pad_token_id"},
        "the width of mlp in gpt_neox_japanese models is 32 times intermediate_multiple_size: it cannot be any other number.",
    ),
    "bitnet": Family(
        "bitnet", _LLAMA, "mlp has ffn_sub_norm.weight over all of its channels; it cannot be cut exactly."
    ),
    "mamba": Family(
        "mamba",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3},
        "no feed-forward is recognised in the blocks of this mamba model; a plugin can describe it.",
    ),
    "biogpt": Family("biogpt", {**_SMALL, "intermediate_size": 64}, _NO_BLOCKS.format(3, "biogpt")),
    "ctrl": Family(
        "ctrl",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "dff": 64},
        _NO_BLOCKS.format(3, "ctrl"),
    ),
    "gemma3n_text_sparse": Family(
        "gemma3n_text",
        _GEMMA3N | {"activation_sparsity_pattern": [0.9] * 2 + [0.0] * 3},
        "this Gemma 3n keeps the channels above a quantile over all channels of a block, which changes when some are "
        "removed: it cannot be pruned exactly.",
    ),
}
"""Families that are refused, beside those of ``BASE``."""

FAMILIES: dict[str, Family] = BASE | _TWO_SHARED | MORE | SEEING | ALIEN
PRUNED = tuple(name for name, family in FAMILIES.items() if not family.refused)
MIXTURES = tuple(name for name in PRUNED if FAMILIES[name].routed)
REFUSED = tuple(name for name, family in FAMILIES.items() if family.refused)


def config_of(name: str, **settings: Any) -> PreTrainedConfig:
    """Return a family's configuration, with some settings changed."""
    family = FAMILIES[name]
    return AutoConfig.for_model(family.model_type, **copy.deepcopy({**family.settings, **settings}))


def build(name: str, **settings: Any) -> PreTrainedModel:
    """Make a random model of a family, with some settings of its configuration changed."""
    factory = AutoModelForImageTextToText if name in SEEING else AutoModelForCausalLM
    return random_model(config_of(name, **settings), 0.15, factory)


tokenizer = cache(byte_tokenizer)
"""Tokenizer of one token per byte."""


def write(model: PreTrainedModel, folder: Path) -> Path:
    """Write a checkpoint of several shards, with a tokenizer."""
    model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer().save_pretrained(folder)
    return folder


def run_config(model: Path, **options: Any) -> RunConfig:
    """Return the configuration of a short run on a text written beside the model."""
    text = model.parent / "calibration.txt"
    if not text.exists():
        text.write_text("".join(f"{n} squared is {n * n}, and the quick brown fox jumps again.\n" for n in range(50)))
    settings: dict[str, Any] = {"ratio": 0.4, "samples": 8, "seqlen": 32} | options
    return RunConfig.build(model=str(model), calibration=str(text), device="cpu", **settings)


def _plan(decoder: Decoder, blocks: Sequence[BlockPlan]) -> PruningPlan:
    family = decoder.architecture.family
    return build_plan(blocks, model=ModelIdentity(source="tiny", family=family, fingerprint="", parameters=0))


def _keep(block: int, path: str, width: int, count: int, draw: torch.Generator) -> BlockPlan:
    kept = torch.randperm(width, generator=draw)[:count].sort().values
    return BlockPlan(block=block, path=path, width=width, kept=tuple(kept.tolist()))


def random_plan(decoder: Decoder, step: int | None = None) -> PruningPlan:
    """Return a plan that keeps random channels of every feed-forward, ``step`` fewer from block to block.

    Experts of a block keep equally many.
    """
    draw, blocks = torch.Generator().manual_seed(0), list[BlockPlan]()
    for index in range(len(decoder.blocks)):
        for group in decoder.groups(index):
            # torch multiplies experts of aligned width only
            fewer = step or (8 if any(module.experts for module in group.modules) else 7)
            left = group.width - fewer * (index + 1)
            for module in group.modules:
                count = left * module.layout.times
                blocks += [_keep(index, path, module.width, count, draw) for path in module.paths]
    return _plan(decoder, blocks)


def plan_of(decoder: Decoder, widths: Sequence[int]) -> PruningPlan:
    """Return a plan that keeps so many random channels of each feed-forward."""
    draw = torch.Generator().manual_seed(sum(widths))
    places = zip(decoder.places, widths, strict=True)
    return _plan(decoder, [_keep(block, path, width, count, draw) for (block, path, width), count in places])


def add_biases(decoder: Decoder, names: Sequence[str]) -> Callable[[int, Sequence[torch.Tensor]], list[Update]]:
    """Return a compensator that sets random biases, which a family may not have."""

    def compensate(index: int, kept: Sequence[torch.Tensor]) -> list[Update]:
        if not names:
            return [Update() for _ in kept]
        draw = torch.Generator().manual_seed(index)
        (feed_forward,), (channels,) = decoder.feed_forwards(index), kept
        sizes = {name: feed_forward.hidden if name == "down_bias" else len(channels) for name in names}
        biases = {name: torch.randn(size, generator=draw) for name, size in sizes.items()}
        return [Update(**biases)]  # type: ignore[arg-type]

    return compensate


@torch.no_grad()
def mask(decoder: Decoder, plan: PruningPlan) -> None:
    """Zero the output weights of the channels that the plan removes, and keep every shape."""
    feed_forwards = [part for index in range(len(decoder.blocks)) for part in decoder.feed_forwards(index)]
    for feed_forward, entry in zip(feed_forwards, plan.blocks, strict=True):
        removed = sorted({*range(entry.width)} - {*entry.kept})
        feed_forward.down[:, removed] = 0


@torch.no_grad()
def logits_of(decoder: Decoder) -> torch.Tensor:
    """Return the logits ``(B, T, V)`` of ``IDS``."""
    logits: torch.Tensor = decoder.model(IDS, use_cache=False).logits
    return logits


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest difference over the largest value."""
    return ((left - right).abs().max() / right.abs().max()).item()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, sharded or not."""
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def digest(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Return the exact logits, and the tokens the model generates."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.float()
        start = ids[:, :8]
        written = model.generate(start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=5)
    return {"logits": logits.tolist(), "written": written[:, 8:].tolist()}


def agree(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Return whether two digests are of the same model, to the last bit."""
    return bool(left["logits"] == right["logits"] and left["written"] == right["written"])


_SCRIPT = """
import json, sys, traceback
from typing import Any
sys.modules["cfsp_framework"] = None  # as if it were not installed
import torch
torch.set_num_threads(1)
import transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

{digest}
results = sys.stdout
sys.stdout = sys.stderr
for line in sys.stdin:
    folder, ids = json.loads(line)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        head = [name for name in getattr(config, "auto_map", {{}}) if name != "AutoModel"]
        stock = "AutoModelForCausalLM" if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING else "AutoModelForImageTextToText"
        auto = getattr(transformers, head[0] if head else stock)
        model = auto.from_pretrained(folder, trust_remote_code=True)
        result = digest(model, torch.tensor(ids)) | {{"own_code": "transformers_modules" in type(model).__module__}}
    except Exception:
        result = {{"error": traceback.format_exc()}}
    print(json.dumps(result), file=results, flush=True)
"""


class Reader:
    """A process without this package that opens checkpoints by the code they bring."""

    def __init__(self, requests: IO[str], results: IO[str]) -> None:
        self._requests, self._results = requests, results

    def read(self, folder: Path) -> dict[str, Any]:
        """Return the digest of a checkpoint, and whether its ``own_code`` built the model."""
        print(json.dumps([str(folder), IDS.tolist()]), file=self._requests, flush=True)
        result: dict[str, Any] = json.loads(self._results.readline())
        if "error" in result:
            raise RuntimeError(result["error"])
        return result


@contextmanager
def reader(home: Path) -> Generator[Reader]:
    """Start such a process and yield it; it copies the code of checkpoints into ``home``."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    script = _SCRIPT.format(digest=inspect.getsource(digest))
    command, pipe = [sys.executable, "-W", "ignore", "-c", script], subprocess.PIPE
    with subprocess.Popen(command, cwd=home, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Reader(process.stdin, process.stdout)


@dataclass(frozen=True)
class AdapterCheck:
    """Effects of adapters on every matrix of feed-forwards and attention, of a rank that grows from block to block."""

    trained: int
    """Parameters that take gradients."""
    planned: int
    """Parameters of the planned ranks."""
    added: float
    """Difference from the model without adapters."""
    merged: float
    """Difference after merging them."""
    reopened: float
    """Difference after writing and opening them again."""

    @property
    def holds(self) -> bool:
        """Whether the adapters are those planned, and stay so."""
        return self.trained == self.planned and max(self.merged, self.reopened) <= ADAPTER_TOLERANCE < self.added


@torch.no_grad()
def check_adapters(decoder: Decoder, plan: PruningPlan, folder: Path) -> AdapterCheck:
    """Add adapters to a model that was cut by the plan, except to its first block; write and merge them."""
    blocks, plain, other = list_trainable_blocks(decoder, plan), logits_of(decoder), copy.deepcopy(decoder.model)
    paths = dict.fromkeys(path for block in blocks for path in (*block.feed_forward, *block.attention))
    ranks = tuple(BlockRecovery(block=block.block, rank=block.block, alpha=2 * block.block) for block in blocks)
    learner = add_adapters(decoder, select_matrices(decoder, RecoveryPlan(targets=tuple(paths), blocks=ranks), blocks))
    for name, parameter in learner.named_parameters():
        if "lora_B" in name:  # which are 0 at first
            parameter.normal_(0, 0.1)
    adapted_logits = logits_of(decoder)
    save_adapter(learner, folder)
    load_adapter(other, folder)
    trained = sum(parameter.numel() for parameter in learner.parameters() if parameter.requires_grad)
    merge_adapters(learner)
    shapes = [(b.block, shape) for b in blocks for shape in (*b.feed_forward.values(), *b.attention.values())]
    return AdapterCheck(
        trained,
        planned=sum(rank * unit_of_rank(shape) for rank, shape in shapes),
        added=relative(adapted_logits, plain),
        merged=relative(logits_of(decoder), adapted_logits),
        reopened=relative(logits_of(replace(decoder, model=other)), adapted_logits),
    )


@cache
def _plugins() -> Plugins:
    return load_plugins()


class Examination:
    """Results of all checks of one family, each computed when it is first used."""

    def __init__(self, name: str, folder: Path, remote: Reader, dtype: torch.dtype = torch.float32) -> None:
        self.name = name
        self.folder = folder
        self._remote = remote
        self._dtype = dtype

    @cached_property
    def source(self) -> Path:
        """Folder of the dense model."""
        model: Any = build(self.name)
        return write(model.to(self._dtype), self.folder / "dense")

    @cached_property
    def dense(self) -> Decoder:
        """The dense model as a run sees it; never changed."""
        return open_decoder(load_model(self._config()).model, _plugins())

    def open(self) -> Decoder:
        """Open the dense model again, to change it."""
        return replace(self.dense, model=open_model(self.source))

    @cached_property
    def cut(self) -> tuple[float, float]:
        """Differences between the logits of a cut model and those of a masked one, and of the dense one."""
        cut, masked, plan = self.open(), self.open(), random_plan(self.dense)
        cut_model(cut, plan)
        mask(masked, plan)
        logits = logits_of(cut)
        return relative(logits, logits_of(masked)), relative(logits, logits_of(self.dense))

    @cached_property
    def memory(self) -> RunResult:
        """A whole run with the model in memory."""
        return prune(self._config(), self.folder / "memory")

    @cached_property
    def streamed(self) -> RunResult:
        """A whole run with one block in memory at a time."""
        return prune(self._config(stream=True), self.folder / "streamed")

    def _config(self, **options: Any) -> RunConfig:
        bytes_each = torch.finfo(self._dtype).bits // 8
        return run_config(self.source, round_to=16 // bytes_each, **options)

    @cached_property
    def streaming_differences(self) -> list[str]:
        """Tensors and files that differ between the checkpoints of both runs."""
        memory, streamed = tensors_of(self.memory.folder), tensors_of(self.streamed.folder)
        keys = memory.keys() & streamed.keys()
        same = {key: memory[key].dtype == streamed[key].dtype and memory[key].equal(streamed[key]) for key in keys}
        configs = {(result.folder / "config.json").read_text() for result in (self.memory, self.streamed)}
        differences = sorted(memory.keys() ^ streamed.keys()) + sorted(key for key, equal in same.items() if not equal)
        return (
            differences + ["the plan"] * (self.memory.plan != self.streamed.plan) + ["config.json"] * (len(configs) > 1)
        )

    @cached_property
    def adapters(self) -> AdapterCheck:
        """Effects of adapters on the cut model."""
        decoder, plan = self.open(), random_plan(self.dense)
        cut_model(decoder, plan)
        return check_adapters(decoder, plan, self.folder / "adapter")

    @cached_property
    def expected(self) -> dict[str, Any]:
        """Digest of the dense model after it is cut in memory by the run's plan."""
        decoder = self.open()
        cut_model(decoder, self.memory.plan)
        return digest(decoder.model, IDS)

    @cached_property
    def imported(self) -> dict[str, Any]:
        """Digest of the checkpoint where this package is imported."""
        return digest(open_model(self.memory.folder), IDS)

    @cached_property
    def remote(self) -> dict[str, Any]:
        """Digest of the checkpoint built by its own code, without this package."""
        return self._remote.read(self.memory.folder)

    def row(self) -> list[str]:
        """Return the family's row of the table."""
        layouts = [module.layout for module in self.modules]
        keys = [f"{part.times} x `{part.width_key}`" if part.times > 1 else f"`{part.width_key}`" for part in layouts]
        paths = [f"`{part.path}`" if part.path else "the block itself" for part in layouts]
        code = _passes(lambda: agree(self.remote, self.expected))
        return [
            f"`{self.name}`",
            f"`{self.dense.architecture.blocks}`: {', '.join(paths)}",
            ", ".join(form_of(module) for module in self.modules),
            ", ".join(dict.fromkeys(keys)),
            _passes(lambda: self.cut[0] <= CUT_TOLERANCE),
            _passes(lambda: agree(self.imported, self.expected)),
            code if code == "no" or self.remote["own_code"] else "needs none",
            _passes(lambda: not self.streaming_differences),
            _passes(lambda: self.adapters.holds),
        ]

    @property
    def modules(self) -> list[FeedForwardModule]:
        """One module of every layout, from the first block that has it."""
        modules: dict[Any, FeedForwardModule] = {}
        for index in range(len(self.dense.blocks)):
            for module in self.dense.feed_forward_modules(index):
                modules.setdefault(module.layout, module)
        return [modules[layout] for layout in self.dense.architecture.feed_forwards if layout in modules]


def form_of(module: FeedForwardModule) -> str:
    """Describe the form of a module that holds feed-forwards."""
    layout = module.layout
    form = "plain" if layout.gate is None else "fused" if layout.fused else "gated"
    if isinstance(module, ExpertFeedForwards):
        details = {
            "interleaved": not module.concatenated,
            "transposed": module.transposed,
            "with biases": module.biased,
        }
        return " ".join(["experts:", form, *(detail for detail, holds in details.items() if holds)])
    conv = isinstance(module, DenseFeedForward) and isinstance(module.down, Conv1D)
    return f"{form} Conv1D" if conv else form


def _passes(check: Callable[[], bool]) -> str:
    try:
        return "yes" if check() else "no"
    except Exception as error:  # noqa: BLE001  # the table states results; the tests give reasons
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return "no"


def refusal(name: str, folder: Path) -> str:
    """Return the message of a run that refuses the family; it does not get as far as the missing text."""
    source = write(build(name), folder / "dense")
    config = RunConfig.build(model=str(source), ratio=0.4, calibration=str(folder / "none.txt"), device="cpu")
    try:
        prune(config, folder / "out")
    except ModelError as error:
        return str(error)
    return ""


HEADINGS = (
    "family",
    "feed-forwards",
    "form",
    "width set by",
    "cut = masked",
    "reopens: import",
    "reopens: remote code",
    "streams",
    "adapters",
)
REFUSALS = ("family", "what a run says")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rewritten(text: str, mark: str, content: str) -> str:
    """Return the document with new content between two markers."""
    pattern = rf"(<!-- {mark} -->\n).*?(<!-- end of {mark} -->)"
    return re.sub(pattern, lambda match: f"{match[1]}\n{content}\n\n{match[2]}", text, flags=re.DOTALL)


def main() -> None:
    """Examine every family and write the results into the document."""
    silence_transformers()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root, reader(Path(root)) as remote:
        folders = {name: Path(root) / name for name in (*PRUNED, *REFUSED)}
        for folder in folders.values():
            folder.mkdir()
        rows = [Examination(name, folders[name], remote).row() for name in PRUNED]
        refusals = [[f"`{name}`", refusal(name, folders[name])] for name in REFUSED]
    text = rewritten(DOCUMENT.read_text(encoding="utf-8"), "families", table(HEADINGS, rows))
    DOCUMENT.write_text(rewritten(text, "refused families", table(REFUSALS, refusals)), encoding="utf-8")


if __name__ == "__main__":
    main()
