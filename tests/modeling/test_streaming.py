"""A model read block by block gives the same checkpoint as a model in memory, with one or two blocks in memory."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cfsp_framework.api.records import RunResult
from cfsp_framework.checkpoint.save import CODE_FILE, STATISTICS_FILE
from cfsp_framework.errors import ModelError
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.streaming import Shards, Streamed
from helpers.runs import equal_tensors, invoke, prune_small, refuse_small, weights_of
from helpers.types import MakeModel, MakePlan, OpenTiny

INDEX = "model.safetensors.index.json"
FEW_STEPS = "local-reconstruction:steps=4,batch_tokens=128,check_every=2"


def rewrite(model: Path, folder: Path, **options: Any) -> Path:
    """Write a checkpoint again with Transformers, with these options of ``save_pretrained``."""
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder, **options)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


@pytest.fixture
def refused(calibration_text: Path, tmp_path: Path) -> Callable[..., str]:
    """``refused(model, *words)``: the message of ``cfsp prune``."""
    return lambda model, *words: refuse_small(model, tmp_path, calibration_text, *words)


# --- the same as in memory --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run that is compared with and without ``--stream``."""

    model: str
    preset: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    """Widths of a given plan, if any."""
    dropped: tuple[int, ...] = ()
    sharded: bool = False


CASES = {
    "cfsp": Case("llama"),
    "closed form": Case("llama", "cfsp-closed-form"),
    "refined": Case("llama", "cfsp-refined", {"compensator": FEW_STEPS}),
    "a bias": Case("llama", "cfsp-closed-form", {"compensator": "least-squares-bias"}),
    "a bias where one block is not cut": Case("llama", options={"compensator": "bias"}, widths=(40, 64, 24)),
    "equal widths and a bias": Case("llama", options={"compensator": "bias"}, widths=(32, 32, 32)),
    "bfloat16, tied, sharded": Case(
        "llama-tied", "cfsp-closed-form", settings={"dtype": "bfloat16", "hidden_size": 64}, sharded=True
    ),
    "float16 of float32": Case("llama", options={"dtype": "float16"}),
    "uniform": Case("llama", options={"allocator": "uniform"}),
    "no data": Case("llama", options={"criterion": "magnitude", "allocator": "uniform"}),
    "without some attention": Case("llama", widths=(40, 24, 48), dropped=(1, 2)),
    "mixtral": Case("mixtral", "cfsp-closed-form"),
    "phi3": Case("phi3", "cfsp-closed-form"),
    "gemma3": Case("gemma3_text"),
    "documents": Case("llama", options={"pack": False, "samples": 1, "skip_bos": True}),
}


def compare(whole: RunResult, streamed: RunResult) -> None:
    """Check that both runs wrote the same checkpoint and report."""
    assert (whole.report.streamed, streamed.report.streamed) == (False, True)
    assert whole.plan == streamed.plan
    assert equal_tensors(weights_of(whole.folder), weights_of(streamed.folder))
    left, right = (json.loads((result.folder / "config.json").read_text()) for result in (whole, streamed))
    assert left == right
    names = [
        {path.name for path in result.folder.iterdir() if "model-" not in path.name} for result in (whole, streamed)
    ]
    assert names[0] ^ names[1] <= {"model.safetensors", INDEX}
    changed = {"streamed", "seconds", "component_seconds", "peak_memory_bytes", "reload_difference"}
    assert whole.report.model_dump(exclude=changed) == streamed.report.model_dump(exclude=changed)
    assert streamed.report.reload_difference == whole.report.reload_difference == 0
    if (whole.folder / STATISTICS_FILE).exists():
        assert equal_tensors(*(load_file(result.folder / STATISTICS_FILE) for result in (whole, streamed)))


@pytest.mark.parametrize("name", CASES)
def test_streaming_changes_nothing(
    name: str, make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan, calibration_text: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    model = make_model(case.model, **case.settings)
    if case.sharded:
        model = rewrite(model, tmp_path / "sharded", max_shard_size="30KB")
        assert len(list(model.glob("*.safetensors"))) > 3
    options = dict(case.options)
    if case.widths:
        loaded, decoder = open_tiny(model)
        plan = make_plan(decoder, case.widths, loaded.fingerprint)
        options["plan"] = plan.model_copy(update={"dropped_attention": case.dropped})
    whole = prune_small(model, tmp_path / "whole", calibration_text, case.preset, **options)  # type: ignore[arg-type]
    options["stream"] = True
    streamed = prune_small(model, tmp_path / "streamed", calibration_text, case.preset, **options)  # type: ignore[arg-type]
    compare(whole, streamed)
    assert (streamed.folder / CODE_FILE).exists() is (name not in ("uniform", "no data"))
    check_shards(streamed.folder)
    ids = torch.arange(3, 25)[None]  # (1, T)
    with torch.no_grad():
        left, right = (AutoModelForCausalLM.from_pretrained(result.folder)(ids).logits for result in (whole, streamed))
    assert torch.equal(left, right)
    assert left.std() > 0.05


def check_shards(folder: Path) -> None:
    """Check that the index names each tensor's file and all bytes, and that each shard but the last holds a block."""
    index = json.loads((folder / INDEX).read_text())
    shards = {path.name: load_file(path) for path in sorted(folder.glob("model-*.safetensors"))}
    assert index["weight_map"] == {key: name for name, shard in shards.items() for key in shard}
    assert list(shards) == [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards.values() for t in shard.values())
    assert [any(".layers." in key for key in shard) for shard in shards.values()][:-1] == [True] * 3


def test_biases_of_blocks_that_were_not_cut_are_zeros_in_the_last_shard(
    make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan, calibration_text: Path, tmp_path: Path
) -> None:
    model = make_model("llama")
    loaded, decoder = open_tiny(model)
    plan = make_plan(decoder, (40, 64, 24), loaded.fingerprint)
    out = prune_small(model, tmp_path / "out", calibration_text, compensator="bias", stream=True, plan=plan).folder
    weight_map, weights = json.loads((out / INDEX).read_text())["weight_map"], weights_of(out)
    keys = [f"model.layers.{block}.mlp.down_proj.bias" for block in range(3)]
    assert [weight_map[key] for key in keys] == [f"model-0000{part}-of-00004.safetensors" for part in (1, 4, 3)]
    assert [bool(weights[key].any()) for key in keys] == [True, False, True]


def test_a_pruned_model_is_streamed(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    first = prune_small(make_model("llama"), tmp_path / "first", calibration_text, ratio=0.25).folder
    assert (first / STATISTICS_FILE).exists(), "safetensors that are not the model's"
    whole = prune_small(first, tmp_path / "whole", calibration_text, "cfsp-closed-form")
    streamed = prune_small(first, tmp_path / "streamed", calibration_text, "cfsp-closed-form", stream=True)
    compare(whole, streamed)
    again = prune_small(streamed.folder, tmp_path / "again", calibration_text, stream=True, ratio=0.25)
    assert [block.width for block in again.plan.blocks] == list(streamed.plan.widths)


@pytest.mark.parametrize("model", ["llama", "llama-tied", "mixtral", "gemma2"])
def test_evaluation_is_the_same(model: str, make_model: MakeModel, calibration_text: Path) -> None:
    words = "evaluate", make_model(model), "--data", calibration_text, "--seqlen", 32, "--json"
    whole, streamed = invoke(*words), invoke(*words, "--stream")
    assert whole.exit_code == 0, whole.output
    assert streamed.stdout == whole.stdout


# --- blocks in memory -------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """The blocks in memory each time a block ran, and each block that was read."""

    in_memory: list[tuple[int, frozenset[int]]] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    models: list[Any] = field(default_factory=list)


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch, *, ahead: bool) -> Generator[Record]:
    """Make runs stream through a subclass that records which blocks are in memory."""
    record = Record()

    class Recording(Streamed):
        def __init__(self, model: Any, folder: Path, blocks: str, device: torch.device) -> None:
            super().__init__(model, folder, blocks, device, ahead=ahead)
            record.models.append(self)
            self.parts = list(model.get_submodule(blocks).children())
            for index, part in enumerate(self.parts):
                part.get_submodule("self_attn").register_forward_pre_hook(self.make_hook(index))
            assert not self.in_memory()

        def in_memory(self) -> frozenset[int]:
            return frozenset(n for n, part in enumerate(self.parts) if not all(p.is_meta for p in part.parameters()))

        def make_hook(self, index: int) -> Callable[..., None]:
            def hook(*_: object) -> None:
                if self._coming is not None:
                    self._coming[1].result()  # else threads decide which blocks are in memory
                record.in_memory.append((index, self.in_memory()))

            return hook

        def _load_block(self, index: int) -> None:
            record.reads.append(index)
            super()._load_block(index)

    with monkeypatch.context() as patch:
        patch.setattr("cfsp_framework.run.context.Streamed", Recording)
        yield record


@pytest.mark.parametrize("preset", ["cfsp", "cfsp-closed-form", "cfsp-refined"])
def test_one_block_is_in_memory(
    preset: str, make_model: MakeModel, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", num_hidden_layers=5)
    options: dict[str, Any] = {"compensator": FEW_STEPS} if preset == "cfsp-refined" else {}
    with recording(monkeypatch, ahead=False) as record:
        prune_small(model, tmp_path / "out", calibration_text, preset, stream=True, **options)
    assert {index for index, _ in record.in_memory} == set(range(5))
    assert all(blocks == {index} for index, blocks in record.in_memory)
    passes = (
        5 if preset == "cfsp" else 6
    )  # perplexity, measuring, sensitivities, cutting, logits, perplexity of the result
    assert record.reads == list(range(5)) * passes
    assert all(not model.in_memory() for model in record.models)


def test_reading_ahead_is_the_same_with_two_blocks_in_memory(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, preset = make_model("llama", num_hidden_layers=5), "cfsp-closed-form"
    options: dict[str, Any] = {"compensator": "least-squares-bias"}
    plain = prune_small(model, tmp_path / "plain", calibration_text, preset, **options)
    with recording(monkeypatch, ahead=True) as record:
        ahead = prune_small(model, tmp_path / "ahead", calibration_text, preset, stream=True, **options)
    compare(plain, ahead)
    assert all(index in blocks <= {index, index + 1} for index, blocks in record.in_memory)
    assert any(len(blocks) == 2 for _, blocks in record.in_memory)
    assert record.reads == list(range(5)) * 6, "each block is read once a pass"


def blocks_in_memory(decoder: Decoder) -> list[int]:
    return [n for n, block in enumerate(decoder.blocks) if not any(p.is_meta for p in block.parameters())]


@pytest.mark.parametrize("ahead", [False, True])
def test_blocks_can_be_loaded_in_any_order(ahead: bool, make_model: MakeModel, open_tiny: OpenTiny) -> None:
    folder = make_model("llama", num_hidden_layers=5)
    whole, (loaded, decoder) = open_tiny(folder)[1], open_tiny(folder, stream=True)
    streamed = Streamed(loaded.model, folder, decoder.architecture.blocks, torch.device("cpu"), ahead=ahead)
    for index in (3, 0, 1, 1, 4, 2):
        with streamed(index):
            parameters = dict(decoder.blocks[index].named_parameters())
            assert equal_tensors(parameters, dict(whole.blocks[index].named_parameters()))
            assert len(set(blocks_in_memory(decoder)) - {index}) <= ahead
    streamed.close()
    assert blocks_in_memory(decoder) == []
    assert all(parameter.is_meta for parameter in decoder.model.parameters())
    assert [p.shape for p in decoder.model.parameters()] == [p.shape for p in whole.model.parameters()]


def test_a_block_that_fails_is_dropped(make_model: MakeModel, open_tiny: OpenTiny) -> None:
    folder = make_model("llama")
    loaded, decoder = open_tiny(folder, stream=True)
    streamed = Streamed(loaded.model, folder, decoder.architecture.blocks, torch.device("cpu"))

    def fail() -> None:
        assert blocks_in_memory(decoder) == [1]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), streamed(1):
        fail()
    assert blocks_in_memory(decoder) == []


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("--criterion taylor", "down_input_taylor"),
        ("--drop-attention 1", "attention"),
        ("--drop-attention auto --budget parameters", "attention"),
        ("--device-map auto", "--device-map"),
    ],
)
def test_options_that_need_the_whole_model_are_refused(
    words: str, cause: str, refused: Callable[..., str], make_model: MakeModel
) -> None:
    message = refused(make_model("llama"), "--stream", *words.split())
    assert "--stream" in message
    assert cause in message


@pytest.mark.parametrize(
    ("model", "key", "named"),
    [
        ("llama", "model.norm.weight", "model.norm.weight"),
        ("llama", "lm_head.weight", "lm_head.weight"),
        ("llama", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "model.layers.2.self_attn.q_proj.weight", "model.layers.2.self_attn.q_proj.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.mlp.gate.weight"),
    ],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_missing_tensor_is_named(
    model: str,
    key: str,
    named: str,
    ahead: bool,
    refused: Callable[..., str],
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(make_model(model), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with recording(monkeypatch, ahead=ahead):
        message = refused(folder, "--stream")
    assert f"the checkpoint has no {named}" in message
    assert "made up" in message or "1 are missing" in message


def test_an_unexpected_tensor_is_named(refused: Callable[..., str], make_model: MakeModel, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    path = folder / "model.safetensors"
    bias = {"model.layers.0.mlp.down_proj.bias": torch.ones(32)}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # of old checkpoints, and computed anew
    save_file(load_file(path) | buffer, path, {"format": "pt"})
    result = invoke("evaluate", folder, "--stream", "--evaluate-windows", 1, "--seqlen", 32)
    assert result.exit_code == 0, result.output
    save_file(load_file(path) | bias, path, {"format": "pt"})
    for words in ([], ["--stream"]):
        message = refused(folder, *words)
        assert "do not fit the model, first of 1: model.layers.0.mlp.down_proj.bias" in message


@pytest.mark.parametrize("shard_size", ["5GB", "30KB"])
def test_a_damaged_file_is_named(
    shard_size: str, refused: Callable[..., str], make_model: MakeModel, tmp_path: Path
) -> None:
    folder = rewrite(make_model("llama"), tmp_path / "model", max_shard_size=shard_size)
    path = max(folder.glob("*.safetensors"))
    os.truncate(path, path.stat().st_size - 100)
    assert f"{path} cannot be read" in refused(folder, "--stream")
    path.unlink()
    assert (path.name if shard_size == "30KB" else "has no safetensors") in refused(folder, "--stream")


@pytest.fixture
def no_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the conversions of Transformers."""
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)


@pytest.mark.usefixtures("no_conversions")
def test_families_whose_keys_are_those_of_the_modules_need_no_conversions(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImportError):
        from transformers.core_model_loading import revert_weight_conversion  # noqa: F401
    model, preset = make_model("llama-tied"), "cfsp-closed-form"
    bare = prune_small(model, tmp_path / "bare", calibration_text, preset, stream=True)
    monkeypatch.undo()
    compare(prune_small(model, tmp_path / "whole", calibration_text, preset), bare)


@pytest.mark.usefixtures("no_conversions")
def test_families_with_other_keys_are_refused_without_conversions(
    refused: Callable[..., str], make_model: MakeModel
) -> None:
    message = refused(make_model("mixtral"), "--stream")
    assert "cannot convert model.layers.0.block_sparse_moe." in message
    assert "update it, or leave out --stream" in message


def test_shards_are_those_transformers_reads(make_model: MakeModel, tmp_path: Path) -> None:
    folder = rewrite(make_model("llama"), tmp_path / "model", max_shard_size="30KB")
    shards = Shards(folder)
    assert shards.files == json.loads((folder / INDEX).read_text())["weight_map"]
    key = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(shards.slices([key])[key][:], weights_of(folder)[key])
    save_file({"other": torch.ones(1)}, folder / "adapter.safetensors")
    assert "other" not in Shards(folder).files
    shutil.copyfile(make_model("llama") / "model.safetensors", folder / "model.safetensors")
    assert set(Shards(folder).files.values()) == {"model.safetensors"}, "the one file comes first for Transformers too"
    with pytest.raises(ModelError, match="neither"):
        Shards(tmp_path)


# --- all devices ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate would use the GPU, whose arithmetic differs")
def test_a_device_map_on_a_machine_without_gpu_is_in_memory(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    model, preset = make_model("llama"), "cfsp-closed-form"
    whole = prune_small(model, tmp_path / "whole", calibration_text, preset)
    spread = prune_small(model, tmp_path / "spread", calibration_text, preset, device_map="auto")
    assert spread.plan == whole.plan
    assert equal_tensors(weights_of(spread.folder), weights_of(whole.folder))
    assert spread.report.evaluations == whole.report.evaluations


def test_a_device_map_that_leaves_parameters_out_is_refused(
    refused: Callable[..., str], make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model("llama"))
    model.model.layers[2].to("meta")
    info = dict.fromkeys(("missing_keys", "mismatched_keys", "unexpected_keys"), ())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (model, info))
    message = refused(make_model("llama"), "--device-map", "auto")
    assert "--device-map auto: 9 parameters do not fit on the devices; give --stream" in message
