"""A model read block by block gives what a model in memory gives, and no more of it is ever there than is said."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from cfsp_framework import Criterion, PruningPlan, Statistic, prune
from cfsp_framework.api.records import RunResult
from cfsp_framework.checkpoint.save import CODE_FILE, PLAN_FILE, REPORT_FILE, STATISTICS_FILE
from cfsp_framework.cli.main import cli
from cfsp_framework.config import layered
from cfsp_framework.data.windows import PADDING
from cfsp_framework.engine.collect import collect
from cfsp_framework.engine.hidden_states import allocate
from cfsp_framework.engine.measurements import FeedForwardMeasurement
from cfsp_framework.engine.replay import ForwardOptions
from cfsp_framework.errors import ModelError, OutputError, ResourceError
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.registry import ConfiguredComponent, Plugins
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.loading import LoadedModel
from cfsp_framework.modeling.streaming import Shards, Streamed
from cfsp_framework.runtime.progress import Progress
from cfsp_framework.statistics import (
    ANGULAR_DISTANCE,
    DOWN_INPUT_GRAM,
    DOWN_INPUT_MEAN,
    DOWN_INPUT_SQUARES,
    DOWN_INPUT_TAYLOR,
)

MakeModel = Callable[..., Path]
MakePlan = Callable[..., PruningPlan]
Open = Callable[..., tuple[LoadedModel, Decoder]]
INDEX = "model.safetensors.index.json"
FEW_STEPS = "local-reconstruction:steps=4,batch_tokens=128,check_every=2"


def run(model: Path, out: Path, text: Path, preset: str | None = None, **options: object) -> RunResult:
    """Prune into ``out`` as a command line with these options does."""
    plan = options.pop("plan", None)
    assert plan is None or isinstance(plan, PruningPlan)
    given = {"model": str(model), "calibration": str(text), "evaluate": str(text), "evaluate_windows": 3, "samples": 20}
    given |= {"seqlen": 32, "round_to": 8, "device": "cpu", **options}
    return prune(layered(preset, None, given), out, plan=plan, keep_statistics=plan is None)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint by name; none is there twice."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        here = load_file(path)
        assert not here.keys() & found.keys()
        found |= here
    return found


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def rewritten(model: Path, folder: Path, **options: Any) -> Path:
    """A checkpoint as Transformers writes it again, with these options of ``save_pretrained``."""
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder, **options)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def without(model: Path, folder: Path, *keys: str) -> Path:
    """A copy of a checkpoint of one file that lacks some tensors."""
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if key not in keys}, path, {"format": "pt"})
    return folder


# --- the same as in memory --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run that is compared with and without ``--stream``."""

    model: str
    preset: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    """Of a plan that is given, if one is."""
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


@pytest.fixture(scope="module")
def source(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """``source(case)``: the folder of its model."""

    def folder(case: Case) -> Path:
        made = make_model(case.model, **case.settings)
        if not case.sharded:
            return made
        sharded = rewritten(made, tmp_path_factory.mktemp("sharded") / "model", max_shard_size="30KB")
        assert len(list(sharded.glob("*.safetensors"))) > 3
        return sharded

    return folder


def compare(whole: RunResult, streamed: RunResult) -> None:
    """Both runs wrote the same checkpoint and found the same numbers."""
    assert (whole.report.streamed, streamed.report.streamed) == (False, True)
    assert whole.plan == streamed.plan
    assert same(tensors(whole.folder), tensors(streamed.folder))
    left, right = (json.loads((result.folder / "config.json").read_text()) for result in (whole, streamed))
    assert left == right
    names = [
        {path.name for path in result.folder.iterdir() if "model-" not in path.name} for result in (whole, streamed)
    ]
    assert names[0] ^ names[1] <= {"model.safetensors", INDEX}
    assert whole.report.evaluations == streamed.report.evaluations
    changed = {"streamed", "seconds", "component_seconds", "peak_memory_bytes", "reload_difference"}
    assert whole.report.model_dump(exclude=changed) == streamed.report.model_dump(exclude=changed)
    assert streamed.report.reload_difference == whole.report.reload_difference == 0
    for name in (CODE_FILE, "generation_config.json", "tokenizer.json"):
        assert [(result.folder / name).exists() for result in (whole, streamed)] in ([True, True], [False, False])
    if (whole.folder / STATISTICS_FILE).exists():
        assert same(*(load_file(result.folder / STATISTICS_FILE) for result in (whole, streamed)))


@pytest.mark.parametrize("name", CASES)
def test_streamed_is_the_same(
    name: str,
    source: Callable[[Case], Path],
    open_tiny: Open,
    make_plan: MakePlan,
    calibration_text: Path,
    tmp_path: Path,
) -> None:
    case = CASES[name]
    model = source(case)
    options = dict(case.options)
    if case.widths:
        loaded, decoder = open_tiny(model)
        plan = make_plan(decoder, case.widths, loaded.fingerprint)
        options["plan"] = plan.model_copy(update={"dropped_attention": case.dropped})
    whole = run(model, tmp_path / "whole", calibration_text, case.preset, **options)
    streamed = run(model, tmp_path / "streamed", calibration_text, case.preset, stream=True, **options)
    compare(whole, streamed)
    assert (streamed.folder / CODE_FILE).exists() is (name not in ("uniform", "no data"))
    check_shards(streamed.folder)
    ids = torch.arange(3, 25)[None]
    with torch.no_grad():
        left, right = (AutoModelForCausalLM.from_pretrained(result.folder)(ids).logits for result in (whole, streamed))
    assert torch.equal(left, right)
    assert left.std() > 0.05


def check_shards(folder: Path) -> None:
    """The index tells the truth: every tensor in one file, every file there, all bytes counted."""
    index = json.loads((folder / INDEX).read_text())
    there = {path.name: load_file(path) for path in folder.glob("model-*.safetensors")}
    assert index["weight_map"] == {key: name for name, found in there.items() for key in found}
    assert sorted(there) == [f"model-{number + 1:05d}-of-{len(there):05d}.safetensors" for number in range(len(there))]
    assert index["metadata"]["total_size"] == sum(t.nbytes for found in there.values() for t in found.values())
    assert [len([key for key in found if ".layers." in key]) > 0 for _, found in sorted(there.items())][:-1] == [
        True
    ] * 3


def test_biases_of_blocks_that_were_not_cut_are_zeros_in_the_last_shard(
    make_model: MakeModel, open_tiny: Open, make_plan: MakePlan, calibration_text: Path, tmp_path: Path
) -> None:
    loaded, decoder = open_tiny(make_model("llama"))
    plan = make_plan(decoder, (40, 64, 24), loaded.fingerprint)
    out = run(
        make_model("llama"), tmp_path / "out", calibration_text, compensator="bias", stream=True, plan=plan
    ).folder
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    keys = [f"model.layers.{block}.mlp.down_proj.bias" for block in range(3)]
    assert [weight_map[key] for key in keys] == [f"model-0000{part}-of-00004.safetensors" for part in (1, 4, 3)]
    assert [bool(tensors(out)[key].any()) for key in keys] == [True, False, True]


def test_a_model_pruned_before_is_streamed(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    first = run(make_model("llama"), tmp_path / "first", calibration_text, ratio=0.25).folder
    assert (first / STATISTICS_FILE).exists(), "which is none of the model's tensors"
    whole = run(first, tmp_path / "whole", calibration_text, "cfsp-closed-form")
    streamed = run(first, tmp_path / "streamed", calibration_text, "cfsp-closed-form", stream=True)
    compare(whole, streamed)
    again = run(streamed.folder, tmp_path / "again", calibration_text, stream=True, ratio=0.25)
    assert [block.width for block in again.plan.blocks] == list(streamed.plan.widths)


@pytest.mark.parametrize("model", ["llama", "llama-tied", "mixtral", "gemma2"])
def test_evaluation_is_the_same(model: str, make_model: MakeModel, calibration_text: Path) -> None:
    words = ["evaluate", str(make_model(model)), "--data", str(calibration_text), "--seqlen", "32", "--json"]
    whole, streamed = (CliRunner().invoke(cli, [*words, *more]) for more in ([], ["--stream"]))
    assert whole.exit_code == 0, whole.output
    assert streamed.stdout == whole.stdout


# --- what is there at a time ------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """Which blocks had parameters whenever a block ran, and how often each block was read."""

    loaded: list[tuple[int, frozenset[int]]] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    models: list[Streamed] = field(default_factory=list)


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch, *, ahead: bool) -> Generator[Watched]:
    """While open, runs stream through what tells which blocks are resident."""
    seen = Watched()

    class Watching(Streamed):
        def __init__(self, model: Any, folder: Path, blocks: str, device: torch.device) -> None:
            super().__init__(model, folder, blocks, device, ahead=ahead)
            seen.models.append(self)
            self.parts = list(model.get_submodule(blocks).children())
            for index, part in enumerate(self.parts):
                part.get_submodule("self_attn").register_forward_pre_hook(self.look(index))
            assert not self.there()

        def there(self) -> frozenset[int]:
            return frozenset(n for n, part in enumerate(self.parts) if not all(p.is_meta for p in part.parameters()))

        def look(self, index: int) -> Callable[..., None]:
            def hear(*_: object) -> None:
                if self._coming is not None:
                    self._coming[1].result()  # else it depends on the threads which blocks are there
                seen.loaded.append((index, self.there()))

            return hear

        def _load_block(self, index: int) -> None:
            seen.reads.append(index)
            super()._load_block(index)

    with monkeypatch.context() as patch:
        patch.setattr("cfsp_framework.run.context.Streamed", Watching)
        yield seen


@pytest.mark.parametrize("preset", ["cfsp", "cfsp-closed-form", "cfsp-refined"])
def test_one_block_is_there_at_a_time(
    preset: str, make_model: MakeModel, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", num_hidden_layers=5)
    options: dict[str, object] = {"compensator": FEW_STEPS} if preset == "cfsp-refined" else {}
    with watching(monkeypatch, ahead=False) as seen:
        run(model, tmp_path / "out", calibration_text, preset, stream=True, **options)
    assert {index for index, _ in seen.loaded} == set(range(5))
    assert all(there == {index} for index, there in seen.loaded)
    assert seen.reads == list(range(5)) * 5, "perplexity, measuring, cutting, logits and perplexity of the result"
    assert all(not model.there() for model in seen.models)  # type: ignore[attr-defined]


def test_reading_ahead_is_the_same_with_two_blocks_there(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", num_hidden_layers=5)
    plain = run(model, tmp_path / "plain", calibration_text, "cfsp-closed-form", compensator="least-squares-bias")
    with watching(monkeypatch, ahead=True) as seen:
        ahead = run(
            model,
            tmp_path / "ahead",
            calibration_text,
            "cfsp-closed-form",
            compensator="least-squares-bias",
            stream=True,
        )
    compare(plain, ahead)
    assert all(index in there <= {index, index + 1} for index, there in seen.loaded)
    assert any(len(there) == 2 for _, there in seen.loaded)
    assert seen.reads == list(range(5)) * 5, "nothing is read for nothing"


def parameters_there(decoder: Decoder) -> list[int]:
    return [n for n, block in enumerate(decoder.blocks) if not any(p.is_meta for p in block.parameters())]


@pytest.mark.parametrize("ahead", [False, True])
def test_blocks_in_any_order(ahead: bool, make_model: MakeModel, open_tiny: Open) -> None:
    folder = make_model("llama", num_hidden_layers=5)
    whole, (loaded, decoder) = open_tiny(folder)[1], open_tiny(folder, stream=True)
    streamed = Streamed(loaded.model, folder, decoder.architecture.blocks, torch.device("cpu"), ahead=ahead)
    for index in (3, 0, 1, 1, 4, 2):
        with streamed(index):
            own = dict(decoder.blocks[index].named_parameters())
            assert same(own, dict(whole.blocks[index].named_parameters()))
            assert len(set(parameters_there(decoder)) - {index}) <= ahead
    streamed.close()
    assert parameters_there(decoder) == []
    assert all(parameter.is_meta for parameter in decoder.model.parameters())
    assert [p.shape for p in decoder.model.parameters()] == [p.shape for p in whole.model.parameters()]


def test_a_block_that_fails_is_let_go(make_model: MakeModel, open_tiny: Open) -> None:
    folder = make_model("llama")
    loaded, decoder = open_tiny(folder, stream=True)
    streamed = Streamed(loaded.model, folder, decoder.architecture.blocks, torch.device("cpu"))

    def fail() -> None:
        assert parameters_there(decoder) == [1]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), streamed(1):
        fail()
    assert parameters_there(decoder) == []


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(calibration_text: Path, tmp_path: Path) -> Callable[..., str]:
    """``refused(model, *words)``: what ``cfsp prune`` says as it refuses, which leaves nothing behind."""

    def invoke(model: Path, *words: object) -> str:
        small = "--calibration", calibration_text, "--samples", 4, "--seqlen", 32, "--round-to", 8
        before = tree(tmp_path)
        result = CliRunner().invoke(cli, list(map(str, ("prune", model, tmp_path / "out", *small, *words))))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert len(result.stderr.splitlines()) == 1
        assert tree(tmp_path) == before
        return result.stderr

    return invoke


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--criterion", "taylor"], "--stream: down_input_taylor needs a backward pass through the whole model"),
        (["--drop-attention", "1"], "--stream: which attention to drop is found with the whole model"),
        (["--drop-attention", "auto"], "--stream: which attention to drop is found with the whole model"),
        (["--device-map", "auto"], "--stream reads blocks one by one, --device-map spreads them all"),
    ],
)
def test_what_needs_the_whole_model_is_refused(
    words: list[str], message: str, refused: Callable[..., str], make_model: MakeModel
) -> None:
    assert message in refused(make_model("llama"), "--stream", *words)


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
def test_a_tensor_that_is_missing_is_named(
    model: str,
    key: str,
    named: str,
    ahead: bool,
    refused: Callable[..., str],
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert key in load_file(make_model(model) / "model.safetensors")
    folder = without(make_model(model), tmp_path / "model", key)
    with watching(monkeypatch, ahead=ahead):
        told = refused(folder, "--stream")
    assert f"the checkpoint has no {named}" in told
    assert "made up" in told or "1 are missing" in told


def test_a_tensor_too_many_is_named(refused: Callable[..., str], make_model: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama"), folder)
    path = folder / "model.safetensors"
    bias = {"model.layers.0.mlp.down_proj.bias": torch.ones(32)}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # of old checkpoints, and computed anew
    save_file(load_file(path) | buffer, path, {"format": "pt"})
    result = CliRunner().invoke(cli, ["evaluate", str(folder), "--stream", "--evaluate-windows", "1", "--seqlen", "32"])
    assert result.exit_code == 0, result.output
    save_file(load_file(path) | bias, path, {"format": "pt"})
    for words in ([], ["--stream"]):
        told = refused(folder, *words)
        assert "do not fit the model, first of 1: model.layers.0.mlp.down_proj.bias" in told


@pytest.mark.parametrize("sharded", [False, True])
def test_a_damaged_file_is_named(
    sharded: bool, refused: Callable[..., str], make_model: MakeModel, tmp_path: Path
) -> None:
    size = "30KB" if sharded else "5GB"
    folder = rewritten(make_model("llama"), tmp_path / "model", max_shard_size=size)
    path = max(folder.glob("*.safetensors"))
    os.truncate(path, path.stat().st_size - 100)
    assert f"{path} cannot be read" in refused(folder, "--stream")
    path.unlink()
    assert "No such file" in refused(folder, "--stream") if sharded else "safetensors" in refused(folder, "--stream")


@pytest.fixture
def no_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Transformers that has its conversions elsewhere."""
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)


@pytest.mark.usefixtures("no_conversions")
def test_families_without_conversions_need_none(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImportError):
        from transformers.core_model_loading import revert_weight_conversion  # noqa: F401
    bare = run(make_model("llama-tied"), tmp_path / "bare", calibration_text, "cfsp-closed-form", stream=True)
    monkeypatch.undo()
    whole = run(make_model("llama-tied"), tmp_path / "whole", calibration_text, "cfsp-closed-form")
    compare(whole, bare)


@pytest.mark.usefixtures("no_conversions")
def test_families_with_conversions_are_refused_without_them(refused: Callable[..., str], make_model: MakeModel) -> None:
    told = refused(make_model("mixtral"), "--stream")
    assert "this version of Transformers cannot convert model.layers.0.block_sparse_moe." in told
    assert told.endswith("alone; update it, or leave out --stream.\n")


def test_shards_are_those_transformers_reads(make_model: MakeModel, tmp_path: Path) -> None:
    folder = rewritten(make_model("llama"), tmp_path / "model", max_shard_size="30KB")
    shards = Shards(folder)
    assert shards.files == json.loads((folder / INDEX).read_text())["weight_map"]
    key = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(shards.slices([key])[key][:], tensors(folder)[key])
    save_file({"other": torch.ones(1)}, folder / "adapter.safetensors")
    assert "other" not in Shards(folder).files
    shutil.copyfile(make_model("llama") / "model.safetensors", folder / "model.safetensors")
    assert set(Shards(folder).files.values()) == {"model.safetensors"}, "the one file comes first for Transformers too"
    with pytest.raises(ModelError, match="neither"):
        Shards(tmp_path)


# --- all devices ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate would use the GPU, which computes otherwise")
def test_a_device_map_on_a_machine_without_gpu_is_in_memory(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    whole = run(make_model("llama"), tmp_path / "whole", calibration_text, "cfsp-closed-form")
    spread = run(make_model("llama"), tmp_path / "spread", calibration_text, "cfsp-closed-form", device_map="auto")
    assert spread.plan == whole.plan
    assert same(tensors(spread.folder), tensors(whole.folder))
    assert spread.report.evaluations == whole.report.evaluations


def test_a_device_map_that_leaves_parameters_out_is_refused(
    refused: Callable[..., str], make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model("llama"))
    model.model.layers[2].to("meta")
    monkeypatch.setattr("cfsp_framework.modeling.loading._from_pretrained", lambda *_, **__: model)
    told = refused(make_model("llama"), "--device-map", "auto")
    assert "--device-map auto: 9 parameters do not fit on the devices; give --stream" in told


# --- hidden states in a file ------------------------------------------------------------------------------------------


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all tensors that were mapped from files."""
    sizes: list[int] = []
    own = torch.from_file

    def from_file(*arguments: Any, **options: Any) -> Tensor:
        sizes.append(options["size"])
        return own(*arguments, **options)

    monkeypatch.setattr(torch, "from_file", from_file)
    return sizes


@pytest.mark.parametrize("stream", [False, True])
def test_spilled_is_the_same(
    stream: bool, make_model: MakeModel, calibration_text: Path, tmp_path: Path, mapped: list[int]
) -> None:
    plain = run(make_model("llama"), tmp_path / "plain", calibration_text, "cfsp-closed-form", stream=stream)
    assert mapped == []
    spill = tmp_path / "deep" / "spill"
    spilled = run(
        make_model("llama"), tmp_path / "spilled", calibration_text, "cfsp-closed-form", stream=stream, spill=spill
    )
    assert mapped.count(10 * 32 * 32) == 3, "the first pass, and the second's two streams"
    assert list(spill.iterdir()) == []
    assert spilled.plan == plain.plan
    assert same(tensors(spilled.folder), tensors(plain.folder))
    assert spilled.report.evaluations == plain.report.evaluations


def test_a_spilled_tensor_has_no_name_and_holds_what_is_written(tmp_path: Path) -> None:
    like = torch.zeros(1, dtype=torch.bfloat16)
    tensor = allocate((3, 5, 7), like, tmp_path)
    assert list(tmp_path.iterdir()) == []
    values = torch.arange(105.0).view(3, 5, 7).bfloat16()
    assert (tensor.shape, tensor.dtype) == (values.shape, values.dtype)
    tensor[1:].copy_(values[1:])
    assert torch.equal(tensor[1:], values[1:])
    assert allocate((2, 3), like, None).shape == (2, 3)


def test_places_that_cannot_be_spilled_to_are_refused(
    refused: Callable[..., str], make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    told = refused(make_model("llama"), "--spill", tmp_path / "file" / "spill")
    assert f"hidden states cannot be spilled to {tmp_path}/file/spill: Not a directory." in told

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    (tmp_path / "spill").mkdir()
    assert "No space left on device" in refused(make_model("llama"), "--spill", tmp_path / "spill")
    with pytest.raises(OutputError, match="No space left on device"):
        allocate((2, 2), torch.zeros(1), tmp_path / "spill")


def test_too_little_memory_is_told_before_it_is_taken(
    refused: Callable[..., str],
    make_model: MakeModel,
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e4))
    told = refused(make_model("llama"))
    assert "the hidden states of all windows take 0.02 MB and 0.01 MB are free; give --spill FOLDER" in told
    with pytest.raises(ResourceError, match="--spill"):
        allocate((2501,), torch.zeros(1), None)
    assert len(allocate((2500,), torch.zeros(1), None)) == 2500
    run(make_model("llama"), tmp_path / "out", calibration_text, spill=tmp_path / "spill")
    assert (tmp_path / "out" / PLAN_FILE).exists()
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text())["samples"] == 20


# --- tokens that do not count -----------------------------------------------------------------------------------------

BOS = 1
LIGHT = (ANGULAR_DISTANCE, DOWN_INPUT_MEAN, DOWN_INPUT_SQUARES, DOWN_INPUT_TAYLOR)


class Flat(Criterion):
    """All channels alike, and the trace of their Gram matrix with it."""

    name = "flat"
    requires = frozenset({*LIGHT, DOWN_INPUT_GRAM})
    traces: list[float] = []  # noqa: RUF012  (pydantic copies it)

    def score(self, feed_forward: Any, statistics: Mapping[Statistic, Tensor]) -> Tensor:
        self.traces.append(statistics[DOWN_INPUT_GRAM].trace().item())
        return torch.ones(feed_forward.width)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


def measured(
    decoder: Decoder, plugins: Plugins, windows: Tensor, skip: frozenset[int] = frozenset(), batch_size: int = 2
) -> tuple[Sequence[FeedForwardMeasurement], list[float]]:
    """The light statistics of every feed-forward, and what the criterion saw of the heavy one."""
    criterion = ConfiguredComponent[Criterion](Flat(), plugins.criteria.origin("cfsp"))
    found = collect(
        decoder,
        windows,
        {"flat": criterion},
        plugins.collectors_for(Flat.requires),
        forward_options=ForwardOptions(batch_size, skip),
        seed=0,
        progress=Progress(),
    )
    return found, criterion.component.traces  # type: ignore[attr-defined]


@torch.no_grad()
def by_hand(decoder: Decoder, windows: Sequence[Tensor], skip: frozenset[int]) -> list[dict[str, Tensor | int]]:
    """What the statistics are by their definitions, each window run whole through the model and its rows picked."""
    rows: list[list[Tensor]] = [[] for _ in decoder.blocks]
    moved: list[list[Tensor]] = [[] for _ in decoder.blocks]
    for ids in windows:
        seen: dict[int, Tensor] = {}
        streams = decoder.model(ids[None], use_cache=False, output_hidden_states=True).hidden_states
        handles = [
            block.get_submodule("mlp.down_proj").register_forward_pre_hook(_keep(seen, index))
            for index, block in enumerate(decoder.blocks)
        ]
        last: dict[int, Tensor] = {}
        handles.append(decoder.base.get_submodule("norm").register_forward_pre_hook(_keep(last, 0)))
        decoder.model(ids[None], use_cache=False)
        for handle in handles:
            handle.remove()
        counts = ~torch.isin(ids, torch.tensor(sorted(skip)))
        path = [*streams[:-1], last[0]]
        for index in range(len(decoder.blocks)):
            rows[index].append(seen[index][0][counts].double())
            cosine = nn.functional.cosine_similarity(path[index][0].double(), path[index + 1][0].double(), dim=-1)
            moved[index].append((cosine.clamp(-1, 1).acos() / torch.pi)[counts])
    return [
        {
            "tokens": sum(map(len, rows[index])),
            "down_input_squares": torch.cat(rows[index]).square().sum(0),
            "down_input_mean": torch.cat(rows[index]).mean(0),
            "angular_distance": torch.cat(moved[index]).mean(),
        }
        for index in range(len(decoder.blocks))
    ]


def _keep(seen: dict[int, Tensor], index: int) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[index] = inputs[0]

    return hook


def check(found: tuple[Sequence[FeedForwardMeasurement], list[float]], expected: list[dict[str, Any]]) -> None:
    for one, trace, wanted in zip(*found, expected, strict=True):
        assert one.statistics.tokens == wanted["tokens"]
        for statistic in (DOWN_INPUT_SQUARES, DOWN_INPUT_MEAN, ANGULAR_DISTANCE):
            value, right = one.statistics[statistic].double(), wanted[statistic.name]
            assert torch.allclose(value, right, rtol=1e-5, atol=1e-6 * right.abs().max().item()), statistic.name
        assert trace == pytest.approx(wanted["down_input_squares"].sum().item(), rel=1e-5)


WINDOWS = torch.randint(3, 300, (5, 24), generator=torch.Generator().manual_seed(1))


def test_the_first_token_is_not_counted(make_model: MakeModel, open_tiny: Open, plugins: Plugins) -> None:
    _, decoder = open_tiny(make_model("llama"))
    windows = WINDOWS.clone()
    windows[:, 0] = BOS
    windows[3, [7, 12]] = BOS  # also where documents meet inside a window
    windows[4] = BOS  # a window of which nothing counts
    skip = frozenset({BOS})
    expected = by_hand(decoder, list(windows), skip)
    assert expected[0]["tokens"] == 3 * 23 + 21
    for batch_size in (1, 2, 5):
        check(measured(decoder, plugins, windows, skip, batch_size), expected)
    everything = by_hand(decoder, list(windows), frozenset())
    assert everything[0]["tokens"] == 120
    check(measured(decoder, plugins, windows), everything)
    with pytest.raises(AssertionError):
        check(measured(decoder, plugins, windows), expected)


def test_padding_is_not_counted(make_model: MakeModel, open_tiny: Open, plugins: Plugins) -> None:
    _, decoder = open_tiny(make_model("llama"))
    lengths = 24, 9, 17, 24, 1
    padded = WINDOWS.clone()
    for window, length in zip(padded, lengths, strict=True):
        window[length:] = PADDING
    documents = [window[:length] for window, length in zip(WINDOWS, lengths, strict=True)]
    expected = by_hand(decoder, documents, frozenset())
    assert expected[0]["tokens"] == sum(lengths)
    for batch_size in (1, 2, 5):
        check(measured(decoder, plugins, padded, batch_size=batch_size), expected)
    padded[:, 0] = BOS
    documents = [window[window != PADDING] for window in padded]
    check(measured(decoder, plugins, padded, frozenset({BOS})), by_hand(decoder, documents, frozenset({BOS})))


def test_gradients_of_tokens_that_do_not_count_are_left_out(
    make_model: MakeModel, open_tiny: Open, plugins: Plugins
) -> None:
    _, decoder = open_tiny(make_model("llama"))
    windows = WINDOWS.clone()
    windows[:, 0] = BOS
    padded = torch.cat([windows, torch.full((5, 6), PADDING)], 1)
    (whole, _), (left, _), (bare, _) = (
        measured(decoder, plugins, ids, skip)
        for ids, skip in ((windows, frozenset()), (windows, frozenset({BOS})), (padded, frozenset({BOS})))
    )
    for all_of_it, some, same_tokens in zip(whole, left, bare, strict=True):
        effect = [one.statistics[DOWN_INPUT_TAYLOR] for one in (all_of_it, some, same_tokens)]
        assert (effect[0] >= effect[1]).all()
        assert effect[0].sum() > effect[1].sum()
        assert torch.allclose(effect[1], effect[2], rtol=1e-5)
        assert some.statistics.tokens == same_tokens.statistics.tokens == 115
