"""The estimates of `cfsp plan --estimate`: what they count, how they grow, and what the command prints and refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cfsp_framework.benchmark.hardware import NOMINAL, Hardware, disk_rates, product_rate
from cfsp_framework.cli.tables import human_seconds, rough_bytes
from cfsp_framework.config import RunConfig, layered
from cfsp_framework.estimate.estimate import RunWorkload, Way, estimate, plan_workload, pruned_bytes
from cfsp_framework.estimate.model_shape import BlockShape, FeedForwards, ModelShape, measure_shape
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.selection import select
from cfsp_framework.modeling.loading import build_from_config, load_model
from helpers import families
from helpers.runs import invoke
from helpers.types import MakeModel

# Families of the helpers, and the configuration's key for the width.
TINY = {
    "llama": "intermediate_size",
    "llama_tied": "intermediate_size",
    "gpt2": "n_inner",
    "opt": "ffn_dim",
    "mixtral": "intermediate_size",
}
BLOCKS = {"gpt2": "transformer.h", "opt": "model.decoder.layers"}
HARDWARE = Hardware(
    name="test",
    flops={"float32": 1e11},
    disk_read=1e9,
    disk_write=1e9,
    cached_read=4e9,
    hashing=2e9,
    cores=1,
    host_memory=10**15,
    measured=True,
)
CLUSTER = replace(HARDWARE, devices=4, nodes=2, device_memory=10**12, to_device=1e10, link=1e10)


@pytest.fixture(params=TINY)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, torch.nn.Module, Path]:
    """Name, model and folder of a tiny model of which only the configuration is saved."""
    name: str = request.param
    config = families.config_of(name, dtype="bfloat16", **{TINY[name]: 72})
    config.architectures = ["TinyForCausalLM"]
    config.save_pretrained(tmp_path)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return name, model, tmp_path


def shape_of(folder: Path, **options: object) -> ModelShape:
    return measure_shape(*build_from_config(RunConfig.build(model=str(folder), **options)))


def size(module: torch.nn.Module) -> tuple[int, int]:
    parameters = list(module.parameters())  # tied ones once
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def test_counts_are_those_of_the_model_that_is_really_built(saved: tuple[str, torch.nn.Module, Path]) -> None:
    name, model, folder = saved
    shape = shape_of(folder)
    blocks = list(model.get_submodule(BLOCKS.get(name, "model.layers")).children())
    assert (shape.parameters, shape.bytes) == size(model)
    assert [(block.parameters, block.bytes) for block in shape.blocks] == [size(block) for block in blocks]
    assert shape.outside_parameters == size(model)[0] - sum(size(block)[0] for block in blocks)
    assert shape.stored_bytes == shape.bytes
    assert (shape.hidden, shape.widest, shape.dtype) == (32, 72, "bfloat16")


def test_feed_forwards_are_recognised(saved: tuple[str, torch.nn.Module, Path]) -> None:
    name, _, folder = saved
    shape = shape_of(folder)
    biases = {"gpt2": 72 + 32, "opt": 72 + 32}.get(name, 0)
    each = {"gpt2": 2, "opt": 2}.get(name, 3) * 32 * 72 + biases
    expected = FeedForwards(72, 4, 0.5, 4 * each) if name == "mixtral" else FeedForwards(72, 1, 1.0, each)
    assert {block.feed_forwards for block in shape.blocks} == {(expected,)}
    assert (shape.experts, shape.experts_per_token) == ((4, 2) if name == "mixtral" else (0, 0))


def test_only_the_experts_a_token_is_routed_to_are_counted(tmp_path: Path) -> None:
    families.config_of("mixtral", intermediate_size=72).save_pretrained(tmp_path)
    attention, router, expert = 2 * 32 * 32 + 2 * 32 * 16, 4 * 32, 3 * 32 * 72
    shape = shape_of(tmp_path)
    assert {block.products for block in shape.blocks} == {attention + router + 2 * expert}
    assert shape.flops_per_token(10) == 3 * (2 * (attention + router + 2 * expert) + 4 * 10 * 32)


def test_a_vision_language_models_text_blocks_are_the_ones(tmp_path: Path) -> None:
    config: Any = families.config_of("gemma3")
    config.vision_config.num_hidden_layers = 3  # as many as text blocks
    config.architectures = ["Gemma3ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    shape = shape_of(tmp_path)
    assert (len(shape.blocks), shape.hidden, shape.widest) == (3, 32, 64)
    assert shape.parameters > shape.outside_parameters > 320 * 32  # the vision tower is outside the blocks


def test_what_is_written_is_what_pruning_leaves(make_model: MakeModel) -> None:
    folder = make_model("llama")
    shape = shape_of(folder)
    channels = pruned_bytes(shape, RunWorkload(8, HALF.select, ratio=0.25))
    assert shape.bytes - channels == 3 * 3 * 32 * 16 * 4  # blocks, projections, D, a quarter of F, float32
    of_all = pruned_bytes(shape, RunWorkload(8, HALF.select, ratio=0.25, of_all_parameters=True))
    assert of_all == pytest.approx(0.75 * shape.bytes, abs=8)


def test_dtype_in_memory_and_on_disk_may_differ(make_model: MakeModel) -> None:
    shape = shape_of(make_model("llama"), dtype="bfloat16")
    assert (shape.dtype, shape.element_size) == ("bfloat16", 2)
    assert shape.stored_bytes == 2 * shape.bytes


def test_the_workload_is_what_the_components_require() -> None:
    plain, closed = workload("cfsp"), workload("cfsp-closed-form")
    assert (plain.select.windows, plain.select.forwards, plain.select.grams, plain.compensate.windows) == (8, 1, 0, 0)
    assert (closed.select.windows, closed.select.grams, closed.select.cubes) == (4, 1, 8)
    second = closed.compensate
    assert (second.windows, second.forwards, second.streams, second.grams, second.held_out_grams) == (4, 3, 2, 1, 1)
    assert workload("magnitude-released").select.windows == 0
    notes = " ".join(workload("cfsp-refined").notes)
    assert "local-reconstruction" in notes
    assert "sensitivities" in notes


def workload(preset: str) -> RunWorkload:
    config = layered(preset, None, {"model": "demo", "samples": 8, "seqlen": 64})
    return plan_workload(config, select(config, load_plugins()), 512)


HALF = workload("cfsp")
CLOSED = workload("cfsp-closed-form")


def llama(layers: int = 4, hidden: int = 64, width: int = 192) -> ModelShape:
    """Return the shape of a Llama without building it."""
    products = 4 * hidden**2 + 3 * hidden * width
    block = BlockShape(
        products, 4 * products, 4 * products, products, (FeedForwards(width, 1, 1.0, 3 * hidden * width),)
    )
    outside = 1000 * hidden
    return ModelShape(
        "llama", "float32", 4, hidden, hidden, 1000, 512, 0, 0, (block,) * layers, outside, 4 * outside, 4 * outside
    )


sizes = st.fixed_dictionaries(
    {"layers": st.integers(1, 40), "hidden": st.sampled_from([8, 64, 1024]), "width": st.integers(8, 4096)}
)
loads = st.builds(
    lambda load, windows, ratio: replace(
        load,
        select=replace(load.select, windows=windows),
        compensate=replace(load.compensate, windows=windows if load.compensate.windows else 0),
        ratio=ratio,
    ),
    st.sampled_from([HALF, CLOSED]),
    st.integers(1, 500),
    st.floats(0, 0.9),
)
machines = st.sampled_from([HARDWARE, CLUSTER, *NOMINAL])


@given(sizes, loads, machines, st.integers(1, 50))
@settings(deadline=None)
def test_more_windows_and_more_blocks_never_take_less(
    size: dict[str, int], load: RunWorkload, machine: Hardware, more: int
) -> None:
    smaller = estimate(llama(**size), load, machine)
    windows = replace(load, select=replace(load.select, windows=load.select.windows + more))
    blocks = {**size, "layers": size["layers"] + more}
    for larger in (estimate(llama(**size), windows, machine), estimate(llama(**blocks), load, machine)):
        for less, much in zip(smaller, larger, strict=True):
            assert much.total >= less.total * (1 - 1e-9)
            assert much.host_bytes >= less.host_bytes
            assert much.device_bytes >= less.device_bytes


@given(sizes, loads, machines)
@settings(deadline=None)
def test_streaming_takes_less_memory_and_on_a_cpu_more_time(
    size: dict[str, int], load: RunWorkload, machine: Hardware
) -> None:
    memory, stream = estimate(llama(**size), load, machine)
    assert stream.host_bytes <= memory.host_bytes
    assert stream.device_bytes <= memory.device_bytes
    if not machine.has_gpu:
        assert stream.total >= memory.total * (1 - 1e-9)


@given(sizes, loads, machines)
@settings(deadline=None)
def test_seconds_are_the_same_by_phase_and_by_cause(size: dict[str, int], load: RunWorkload, machine: Hardware) -> None:
    for way in estimate(llama(**size), load, machine):
        assert way.total == pytest.approx(sum(way.causes.values()))
        assert min(way.causes.values()) >= 0
        assert way.bound in way.causes


def test_processes_share_the_windows_and_add_their_sums() -> None:
    shape = llama(layers=3, hidden=64, width=128)
    alone, all_eight = (estimate(shape, HALF, machine)[0] for machine in (HARDWARE, CLUSTER))
    assert all_eight.seconds["collect"] == pytest.approx(alone.seconds["collect"] / 8 + all_eight.causes["all-reduce"])
    sums = 8 * 128 * HALF.select.vectors
    assert all_eight.causes["all-reduce"] == pytest.approx(3 * 2 * 7 / 8 * sums / 1e10)
    assert (all_eight.processes, alone.causes["all-reduce"]) == (8, 0)


def test_a_gpu_reads_the_next_block_while_one_computes() -> None:
    shape, machine = llama(layers=5, hidden=1024, width=4096), replace(CLUSTER, devices=1, nodes=1)
    block = shape.blocks[0]
    reading = block.stored_bytes / 4e9 + block.bytes / 1e10
    slow = replace(machine, flops={"float32": 1.0})
    fast = replace(machine, flops={"float32": 1e30})
    computing = estimate(shape, HALF, slow)[0].seconds["collect"]
    assert estimate(shape, HALF, slow)[1].seconds["collect"] == pytest.approx(computing + reading)
    assert estimate(shape, HALF, fast)[1].seconds["collect"] == pytest.approx(6 * reading)


def test_too_little_memory_is_reported() -> None:
    shape = llama(layers=40, hidden=1024, width=4096)
    small = replace(HARDWARE, host_memory=1_200_000_000)
    assert [way.fits for way in estimate(shape, HALF, small)] == [False, True]


def test_rates_are_measured(tmp_path: Path) -> None:
    assert product_rate("float32", torch.device("cpu"), hidden=64, seconds=0.01) > 1e6
    assert min(disk_rates(tmp_path, megabytes=1)) > 1e3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "text"), [(0.04, "0.0 s"), (119.9, "119.9 s"), (120, "2.0 min"), (7200, "2.0 h"), (172800, "2.0 d")]
)
def test_seconds_for_people(value: float, text: str) -> None:
    assert human_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0.00 MB"), (1_230_000, "1.23 MB"), (45_600_000_000, "45.6 GB"), (10**14, "100 TB")]
)
def test_bytes_for_people(value: int, text: str) -> None:
    assert rough_bytes(value) == text


# The command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the measurement of this machine."""
    monkeypatch.setattr(
        "cfsp_framework.estimate.estimate.this_machine", lambda *_: replace(HARDWARE, name="this CPU, 1 thread")
    )


@pytest.fixture
def bare(make_model: MakeModel, tmp_path: Path) -> Path:
    """Return a folder with nothing but a configuration."""
    shutil.copy(make_model("llama") / "config.json", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["", "config.json"])
def test_a_configuration_is_enough(bare: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    files = sorted(bare.iterdir())
    result = invoke("plan", bare / name, "--estimate")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    for words in ("4x8 GPUs *", "this CPU", "stream", "not measured"):
        assert words in result.stdout
    assert sorted(bare.iterdir()) == files


@pytest.mark.usefixtures("quick")
def test_json_is_one_object_with_all_ways(bare: Path) -> None:
    words = ("--json", "--samples", 10, "--seqlen", 32, "--dtype", "bfloat16", "--preset", "cfsp-closed-form")
    result = json.loads(invoke("plan", bare, bare / "plan.json", "--estimate", *words).stdout)
    assert not (bare / "plan.json").exists()
    assert [(way["hardware"], way["streamed"]) for way in result["ways"]] == [
        (name, streamed) for name in ("this CPU, 1 thread", "1 GPU", "8 GPUs", "4x8 GPUs") for streamed in (False, True)
    ]
    assert result["shape"]["parameters"] == shape_of(bare).parameters
    assert result["shape"]["hidden_state_bytes"] == 5 * 32 * 32 * 2
    assert result["shape"]["gram_bytes"] == 2 * 64 * 64 * 4
    assert result["workload"]["select"]["windows"] == 5
    assert result["hardware"][0]["link"] is None


def test_it_measures_this_machine_and_loads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("cfsp_framework.modeling.loading.load_model", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    ways: list[dict[str, Any]] = json.loads(invoke("plan", "demo", "--estimate", "--json").stdout)["ways"]
    assert ways[0]["measured"]
    assert ways[0]["total_seconds"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("no-such/folder/here", "--estimate"), "no such folder"),
        (("EMPTY", "--estimate"), "has no config.json"),
        (("BROKEN", "--estimate"), "its config.json cannot be read"),
        (("FILE", "--estimate"), "cannot be read"),
        (("demo", "--estimate", "--seqlen", "4096"), "longer than the model's context of 512"),
        (("demo", "--estimate", "--criterion", "cfps"), "cfsp"),
        (("demo",), "Missing argument 'PLAN_FILE'"),
    ],
)
def test_models_that_cannot_be_estimated_are_refused_in_a_line(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BROKEN").mkdir()
    (tmp_path / "BROKEN" / "config.json").write_text("{")
    (tmp_path / "FILE").write_text("no settings")
    first = tmp_path / words[0] if words[0].isupper() else words[0]
    result = invoke("plan", first, *words[1:])
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert message in lines[0]
    assert len(lines) == (1 if "--estimate" in words else 2)  # a usage error also says where help is


def test_ways_compare_like_numbers(make_model: MakeModel) -> None:
    """Estimates for a tiny model are of the order of a real run's: nothing is off by a unit."""
    shape = measure_shape(load_model(RunConfig.build(model=str(make_model("llama")), device="cpu")).model)
    ways: tuple[Way, ...] = estimate(shape, HALF, HARDWARE)
    assert all(1e-6 < way.total < 10 for way in ways)
    assert all(4e8 < way.host_bytes < 1e9 for way in ways)
