"""Benchmarks: costs of a call, the order of runs, and what is computed from seconds. No test depends on wall time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from cfsp_framework import RunConfig
from cfsp_framework.benchmark import timing
from cfsp_framework.benchmark.benchmark import run_benchmark, short_names
from cfsp_framework.benchmark.candidates import Candidate, Cuts, cut_in_memory, open_candidate, random_model
from cfsp_framework.benchmark.roofline import CallCosts, MachineRates, ModelCosts, count_costs
from cfsp_framework.benchmark.timing import BenchmarkReport, BenchmarkSettings, Spread, compute_ideal
from cfsp_framework.errors import ConfigError
from cfsp_framework.host.manager import load_plugins
from helpers.pruned_checkpoints import write_pruned
from helpers.runs import invoke

MakeModel = Callable[..., Path]
PLUGINS = load_plugins()
CPU = torch.device("cpu")
QUICK = BenchmarkSettings(batch_sizes=(1,), lengths=(8,), decode_tokens=2, repeats=2)


@pytest.fixture(scope="module", autouse=True)
def quick_rates() -> Iterator[None]:
    """A machine of known rates, so that nothing is measured for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MachineRates, "measure", staticmethod(lambda dtype, device: MachineRates(flops=1e11, bytes=1e10)))
        patch.setattr(timing, "LEAST_SECONDS", 0.0)
        yield


def opened(folder: Path, **options: Any) -> Candidate:
    return open_candidate(str(folder), RunConfig.build(model=str(folder), device="cpu", **options), PLUGINS)


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gemma2", "phi3", "mixtral"])
@pytest.mark.parametrize(("batch", "length"), [(1, 16), (3, 8)])
@torch.no_grad()
def test_products_are_those_pytorch_counts(name: str, batch: int, length: int, make_model: MakeModel) -> None:
    model = opened(make_model(name)).model
    costs = count_costs(model)
    if name == "mixtral":
        model.set_experts_implementation("eager")  # PyTorch does not count grouped products
    ids = torch.randint(3, 320, (batch, length))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False, logits_to_keep=1)
    counted = sum(
        value
        for operation, value in counter.get_flop_counts()["Global"].items()
        if str(operation) in ("aten.mm", "aten.addmm")
    )
    scores = 2 * costs.attention * batch * length**2
    assert costs.prefill(batch, length).flops - scores == pytest.approx(counted, rel=0.02)


def test_bytes_are_those_of_the_weights_a_call_reads(make_model: MakeModel) -> None:
    for name in ("llama", "llama-tied"):
        model: Any = opened(make_model(name)).model
        stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        table = 0 if name == "llama-tied" else model.get_input_embeddings().weight.numel() * 4
        assert count_costs(model).decode(1, 0).bytes == stored - table


def test_more_tokens_need_more_experts_but_never_more_than_there_are(make_model: MakeModel) -> None:
    costs = count_costs(opened(make_model("mixtral")).model)
    read = [costs.decode(batch, 0).bytes for batch in (1, 2, 8, 1000)]
    assert read == sorted(read)
    assert read[0] == costs.dense_bytes + costs.expert_bytes / 2
    assert read[-1] == pytest.approx(costs.dense_bytes + costs.expert_bytes)


positive = st.integers(1, 10**6)
sizes = st.builds(
    ModelCosts, products=positive, head=positive, dense_bytes=positive, expert_bytes=st.just(0), expert_share=st.just(1.0),
    attention=st.integers(1, 1000), keys=st.integers(1, 1000), itemsize=st.just(2),
)  # fmt: skip
machines = st.builds(MachineRates, flops=st.floats(1, 1e6), bytes=st.floats(1, 1e6))


@given(sizes, sizes, machines, st.sampled_from(["prefill", "decode"]), st.integers(1, 8), st.integers(1, 100))
def test_the_ideal_lies_between_what_flops_and_bytes_allow(
    dense: ModelCosts, pruned: ModelCosts, machine: MachineRates, phase: str, batch: int, length: int
) -> None:
    found = compute_ideal(dense, pruned, machine, phase, batch, length)
    least, most = sorted((found.flops, found.bytes))
    assert least * (1 - 1e-9) <= found.expected <= most * (1 + 1e-9)
    assert compute_ideal(dense, dense, machine, phase, batch, length).expected == 1


def test_a_machine_is_bound_by_what_takes_it_longer() -> None:
    machine = MachineRates(flops=100, bytes=10)
    assert machine.bound(CallCosts(flops=1000, bytes=1)) == "FLOPs"
    assert machine.bound(CallCosts(flops=1, bytes=1000)) == "bytes"
    assert machine.seconds(CallCosts(flops=1000, bytes=1)) == 10
    assert machine.seconds(CallCosts(flops=1, bytes=1000)) == 100


# --- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "phi3", "mixtral"])
def test_cuts_leave_the_dense_model_alone_and_share_the_rest(name: str, make_model: MakeModel) -> None:
    dense = opened(make_model(name))
    before = {path: value.clone() for path, value in dense.model.state_dict().items()}
    config = RunConfig.build(model=dense.name, device="cpu")
    found = list(cut_in_memory(dense, Cuts(0.5, ("uniform", "log-increase"), (8, 16)), config, PLUGINS))
    assert [one.name for one in found] == ["uniform/8", "uniform/16", "log-increase/8", "log-increase/16"]
    assert all(torch.equal(value, before[path]) for path, value in dense.model.state_dict().items())
    for one in found:
        assert sum(one.widths) == sum(dense.widths) / 2
        shared = {id(parameter) for parameter in one.model.parameters()} & {id(p) for p in dense.model.parameters()}
        assert id(one.model.get_input_embeddings().weight) in shared
        assert len(shared) < len(list(one.model.parameters()))
    assert [len(set(one.widths)) > 1 for one in found[:3]] == [False, False, True]


def test_widths_that_have_to_be_measured_are_measured_on_random_tokens(make_model: MakeModel) -> None:
    dense = opened(make_model("llama"))
    config = RunConfig.build(model=dense.name, device="cpu")
    [found] = cut_in_memory(dense, Cuts(0.5, ("cfsp:a=20",), (4,)), config, PLUGINS)
    assert sum(found.widths) == 96
    assert len(set(found.widths)) > 1


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "mixtral"])
def test_random_weights_need_the_configuration_alone(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model(name)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for source in (tmp_path, tmp_path / "config.json"):
        model: Any = random_model(RunConfig.build(model=str(source), dtype="bfloat16"), CPU)
        stored = opened(folder).model
        assert [p.shape for p in model.parameters()] == [p.shape for p in stored.parameters()]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name == "llama-tied")


@pytest.fixture(scope="module")
def narrow(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose blocks differ in width."""
    return write_pruned(make_model("llama"), tmp_path_factory.mktemp("narrow") / "narrow", (24, 40, 64))


def test_checkpoints_keep_the_widths_of_their_blocks(narrow: Path) -> None:
    assert opened(narrow).widths == (24, 40, 64)
    drawn = open_candidate(str(narrow), RunConfig.build(model=str(narrow), device="cpu"), PLUGINS, random_weights=True)
    assert drawn.widths == (24, 40, 64)


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=4))
def test_names_are_short_and_differ(paths: list[list[str]]) -> None:
    names = short_names(["/".join(path) for path in paths])
    assert len(set(names)) == len(names)
    assert all(name.split(" (")[0].split("/")[-1] == path[-1] for name, path in zip(names, paths, strict=True))


# --- timing -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20))
def test_quartiles_lie_in_order(values: list[float]) -> None:
    found = Spread.of(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values) * (1 + 1e-12)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_an_episode_is_one_prompt_and_then_tokens_one_by_one(cache: Any, make_model: MakeModel) -> None:
    model, seen = opened(make_model("llama")).model, list[tuple[tuple[int, ...], int]]()

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        cached = kwargs.get("cache", kwargs.get("past_key_values"))
        seen.append((tuple(args[0].shape), int(cached.get_seq_length())))
        assert output.logits.shape[1] == 1

    model.register_forward_hook(note, with_kwargs=True)
    prefill, decode = timing.run_episode(
        model, torch.randint(3, 320, (2, 8)), BenchmarkSettings(decode_tokens=3, cache=cache)
    )
    assert [shape for shape, _ in seen] == [(2, 8), (2, 1), (2, 1), (2, 1)]
    assert [length for _, length in seen] == [8, 9, 10, 11]
    assert prefill > 0 < decode


def test_models_run_in_turns_and_a_drift_cancels(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that becomes slower with every episode, a model of half the time is found twice as fast."""
    dense = opened(make_model("llama"))
    fast = Candidate("fast", opened(make_model("llama-bias")).model, (32,))
    order, slowness = list[str](), 1.0

    def episode(model: Any, ids: Any, workload: BenchmarkSettings) -> tuple[float, float]:
        nonlocal slowness
        slowness *= 1.05
        name = "fast" if model is fast.model else "dense"
        order.append(name)
        return (slowness * (0.5 if name == "fast" else 1.0), slowness * (0.25 if name == "fast" else 1.0))

    monkeypatch.setattr(timing, "run_episode", episode)
    found = timing.time_models(
        [dense, fast], BenchmarkSettings(batch_sizes=(1,), lengths=(8,), decode_tokens=4, repeats=8)
    )
    assert order[-8:] == ["dense", "fast", "fast", "dense"] * 2
    speed_ups = {one.phase: one.speed_up for one in found.speeds if one.model == "fast"}
    assert speed_ups["prefill"] is not None
    assert speed_ups["decode"] is not None
    assert speed_ups["prefill"].median == pytest.approx(2, rel=0.01)  # 2 / 1.05 and 2 x 1.05, in turn
    assert speed_ups["decode"].median == pytest.approx(4, rel=0.01)
    assert [one.speed_up for one in found.speeds if one.model == dense.name] == [None, None]


def test_a_benchmark_says_what_it_measured(make_model: MakeModel, narrow: Path) -> None:
    folder = make_model("llama")
    config = RunConfig.build(model=str(folder), device="cpu")
    workload = BenchmarkSettings(batch_sizes=(1, 2), lengths=(4, 8), decode_tokens=2, repeats=2)
    found = run_benchmark(config, [str(narrow)], Cuts(0.5, roundings=(8,)), workload, threads=1)
    assert [one.name for one in found.models] == ["llama", "narrow", "uniform/8"]
    dense, pruned, cut = found.models
    assert (dense.least_width, dense.most_width, dense.widths) == (64, 64, 1)
    assert (pruned.least_width, pruned.most_width, pruned.widths, pruned.channels) == (24, 64, 3, 128)
    assert cut.channels == 96
    assert all(one.peak_bytes is None or one.peak_bytes >= one.bytes for one in found.models)
    assert len(found.speeds) == 2 * 4 * 3
    for one in found.speeds:
        assert one.tokens_per_second == pytest.approx(
            one.batch_size * (one.length if one.phase == "prefill" else 1) / one.seconds.median
        )
        if one.ideal and one.speed_up:
            assert 1 < one.ideal.expected < 2
            assert one.reached == one.speed_up.median / one.ideal.expected
    assert BenchmarkReport.model_validate_json(found.to_json()) == found


def test_threads_are_given_back(make_model: MakeModel) -> None:
    before = torch.get_num_threads()
    found = run_benchmark(
        RunConfig.build(model=str(make_model("llama")), device="cpu"), settings=QUICK, threads=before + 1
    )
    assert found.threads == before + 1
    assert torch.get_num_threads() == before


def test_models_that_cannot_be_compared_are_refused(make_model: MakeModel) -> None:
    one, other = opened(make_model("llama")), opened(make_model("llama"), dtype="bfloat16")
    with pytest.raises(ConfigError, match="more than the context"):
        timing.check_settings([one], BenchmarkSettings(lengths=(120,), decode_tokens=9))
    timing.check_settings([one], BenchmarkSettings(lengths=(120,), decode_tokens=8))
    with pytest.raises(ConfigError, match="give --dtype"):
        timing.check_settings([one, other], QUICK)


# --- the command ------------------------------------------------------------------------------------------------------


def run(*words: object) -> Result:
    return invoke("benchmark", *words, "--lengths", 8, "--decode-tokens", 2, "--repeats", 2)


def test_the_command_prints_plots_and_writes_json(make_model: MakeModel, narrow: Path, tmp_path: Path) -> None:
    arguments = make_model("llama"), narrow, "--ratio", 0.5, "--round-to", "8,16", "--allocator", "uniform"
    for name in ("speed.svg", "speed.png"):
        result = run(*arguments, "--allocator", "log-increase", "--plot", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert (tmp_path / name).stat().st_size > 1000
    assert max(map(len, (line for line in result.stdout.splitlines() if "Plotted" not in line))) <= 80
    for words in ("Prefill", "Decode", "narrow", "uniform/16", "log-increase/8", "24 to 64", "reached", "bytes"):
        assert words in result.stdout.replace("\n", ""), words
    report = json.loads(run(*arguments, "--json").stdout)
    assert [model["name"] for model in report["models"]] == ["llama", "narrow", "uniform/8", "uniform/16"]


def test_one_model_alone_is_timed_too(make_model: MakeModel, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text((make_model("llama") / "config.json").read_text())
    result = run(
        config, "--random-weights", "--cache", "static", "--clock", "processor", "--plot", tmp_path / "one.svg"
    )
    assert result.exit_code == 0, result.output
    assert "random weights" in result.stdout
    assert "speed-up" not in result.stdout
    assert "milliseconds" in (tmp_path / "one.svg").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "--allocator", "uniform"], "give --ratio too"),
        (["demo", "--round-to", "64"], "give --ratio too"),
        (["demo", "--batch-sizes", "1,x"], "such as 1,8"),
        (["demo", "--plot", "speed.txt"], "a picture's name ends in"),
        (["demo", "--ratio", "0.5", "--allocator", "unifrom"], "Did you mean 'uniform'?"),
        (["/nowhere/model"], "no such folder"),
        (["demo", "--ratio", "1"], "range"),
    ],
)
def test_the_command_refuses(words: list[str], message: str) -> None:
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert message in result.stderr
