"""Replay block by block: it computes what the model computes, each block once, and leaves no hook on the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cfsp_framework import Accumulator, BlockStatistics, Collector, Criterion, RunConfig, Site, Statistic
from cfsp_framework.engine.collect import collect
from cfsp_framework.engine.gradients import measure_gradients
from cfsp_framework.engine.measure import measure_block
from cfsp_framework.engine.measurements import FeedForwardMeasurement
from cfsp_framework.engine.replay import ForwardOptions, check_replay, embed, run_block
from cfsp_framework.errors import ModelError, PluginError
from cfsp_framework.host.registry import ConfiguredComponent, Origin, Plugins
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.feed_forwards import DenseFeedForward
from cfsp_framework.pipeline import plan_only
from cfsp_framework.runtime.progress import Progress
from cfsp_framework.statistics import (
    ANGULAR_DISTANCE,
    DOWN_INPUT_GRAM,
    DOWN_INPUT_MEAN,
    DOWN_INPUT_SQUARES,
    DOWN_INPUT_TAYLOR,
    FEED_FORWARD_INPUTS,
    FEED_FORWARD_TARGETS,
)
from helpers.types import MakeModel, OpenTiny

WINDOWS = torch.randint(3, 300, (5, 24), generator=torch.Generator().manual_seed(1))  # longer than the sliding windows
LIGHT = frozenset({DOWN_INPUT_SQUARES, DOWN_INPUT_MEAN, ANGULAR_DISTANCE})


@pytest.fixture(scope="module")
def llama(make_model: MakeModel, open_tiny: OpenTiny) -> Decoder:
    """A model that no test changes."""
    return open_tiny(make_model("llama"))[1]


def collect_light(
    decoder: Decoder, plugins: Plugins, windows: Tensor = WINDOWS, batch_size: int | None = 2
) -> tuple[FeedForwardMeasurement, ...]:
    """Collect light statistics and CFSP scores of every block's only feed-forward."""
    criterion: ConfiguredComponent[Criterion] = plugins.criteria.create("cfsp", {})
    collectors = plugins.collectors_for(LIGHT | criterion.component.required())
    forward_options = ForwardOptions(batch_size=batch_size)
    return collect(
        decoder, windows, {"cfsp": criterion}, collectors, forward_options=forward_options, seed=0, progress=Progress()
    )


def down_projection(decoder: Decoder, index: int) -> nn.Module:
    """Return the module whose inputs are the channel activations of block ``index``."""
    (module,) = decoder.feed_forward_modules(index)
    assert isinstance(module, DenseFeedForward)
    return module.down


def hooks_of(model: nn.Module) -> list[tuple[str, str]]:
    """List every hook and every replaced forward in the model."""
    return [
        (path, name)
        for path, module in model.named_modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "forward")
        if module.__dict__.get(name)
    ]


@contextmanager
def counting(modules: dict[str, nn.Module]) -> Generator[Counter[str]]:
    """Count how often each module's forward runs."""
    counts: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            counts[name] += 1

        return hook

    handles = [module.register_forward_hook(count(name)) for name, module in modules.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_block_by_block_equals_the_models_own_forward_bit_for_bit(
    family: str, make_model: MakeModel, open_tiny: OpenTiny
) -> None:
    _, decoder = open_tiny(make_model(family))
    expected: list[list[Tensor]] = [[] for _ in decoder.blocks]  # block -> its output for every batch
    handles = [
        block.register_forward_hook(lambda _, __, output, into=into: into.append(output))
        for block, into in zip(decoder.blocks, expected, strict=True)
    ]
    final_norm: list[Tensor] = []
    handles.append(
        decoder.base.get_submodule("norm").register_forward_pre_hook(lambda _, inputs: final_norm.append(inputs[0]))
    )
    for ids in WINDOWS.split(2):
        decoder.base(ids, use_cache=False)
    for handle in handles:
        handle.remove()

    batches = embed(decoder, WINDOWS, ForwardOptions(batch_size=2))
    assert [len(batch.hidden) for batch in batches] == [2, 2, 1]
    for index in range(len(decoder.blocks)):
        for number, batch in enumerate(batches):
            first = run_block(decoder, index, batch)
            batch.hidden.copy_(run_block(decoder, index, batch))  # once more: no cache was filled
            assert torch.equal(batch.hidden, first)
            assert torch.equal(batch.hidden, expected[index][number]), f"block {index}, batch {number}"
    assert all(torch.equal(batch.hidden, output) for batch, output in zip(batches, final_norm, strict=True))


def test_masks_of_every_block_are_kept_where_they_differ(make_model: MakeModel, open_tiny: OpenTiny) -> None:
    _, decoder = open_tiny(make_model("gemma3_text"))
    (batch,) = embed(decoder, WINDOWS[:1])
    sliding, also_sliding, full = (call.keyword["attention_mask"] for call in batch.calls)
    assert torch.equal(sliding, also_sliding)
    assert full is None


def test_collecting_runs_each_block_once_a_batch_and_the_head_never_and_leaves_no_hook(
    family: str, make_model: MakeModel, open_tiny: OpenTiny, plugins: Plugins
) -> None:
    _, decoder = open_tiny(make_model(family))
    parts: dict[str, nn.Module] = {"head": decoder.model.get_submodule("lm_head")}
    for index, block in enumerate(decoder.blocks):  # the parts: a stub in place of a block still calls its hooks
        parts[f"attention {index}"] = block.get_submodule("self_attn")
        parts[f"feed-forward {index}"] = down_projection(decoder, index)
    hooks = hooks_of(decoder.model)
    with counting(parts) as counts:
        collect_light(decoder, plugins, batch_size=2)
    assert hooks_of(decoder.model) == hooks
    assert counts == {name: 3 for name in parts if name != "head"}


def test_an_exception_while_recording_leaves_no_stub(llama: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hooks_of(llama.model)
    with pytest.raises(IndexError):  # before any block
        embed(llama, torch.full((1, 4), 10**6))
    assert hooks_of(llama.model) == before

    def interrupt(*_: object) -> Tensor:
        assert "forward" in llama.blocks[0].__dict__, "the blocks are stubbed here"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after all blocks
        patch.setattr(type(llama.base.get_submodule("norm")), "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(llama, WINDOWS)
    assert hooks_of(llama.model) == before
    with torch.no_grad():
        assert llama.model(WINDOWS).logits.std() > 0.1


class FailingAccumulator:
    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        raise ZeroDivisionError

    def value(self, tokens: int) -> Tensor:
        raise NotImplementedError


class FailingCollector(Collector):
    name: ClassVar[str] = "failing"
    provides: ClassVar[Statistic] = Statistic("failure")
    site: ClassVar[Site] = Site.DOWN_PROJECTION

    def start(self) -> Accumulator:
        return FailingAccumulator()


class FailingGradientCollector(FailingCollector):
    site: ClassVar[Site] = Site.GRADIENT


def configured(collector: Collector) -> Sequence[ConfiguredComponent[Collector]]:
    return [ConfiguredComponent(collector, Origin("test"))]


def test_an_exception_while_measuring_leaves_no_hook(llama: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hooks_of(llama.model)
    failing = configured(FailingCollector())
    with pytest.raises(PluginError, match=r"failing.*update"):
        measure_block(llama, 0, embed(llama, WINDOWS), failing)
    assert hooks_of(llama.model) == before

    batches = embed(llama, WINDOWS)

    def interrupt(*_: object, **__: object) -> Tensor:
        assert hooks_of(llama.model) != before, "the hooks are on the model here"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(llama.blocks[0].get_submodule("self_attn")), "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            measure_block(llama, 0, batches, failing)
    assert hooks_of(llama.model) == before


def test_gradients_are_the_losss_and_leave_nothing(
    family: str, make_model: MakeModel, open_tiny: OpenTiny, plugins: Plugins
) -> None:
    _, decoder = open_tiny(make_model(family))
    trained = [name for name, parameter in decoder.model.named_parameters() if parameter.requires_grad]
    before = hooks_of(decoder.model)
    measured = measure_gradients(decoder, WINDOWS, plugins.collectors_for({DOWN_INPUT_TAYLOR}), Progress())
    assert hooks_of(decoder.model) == before
    assert trained == [name for name, parameter in decoder.model.named_parameters() if parameter.requires_grad]
    assert all(parameter.grad is None for parameter in decoder.model.parameters())

    activations: list[Tensor] = []
    for index in range(len(decoder.blocks)):
        down_projection(decoder, index).register_forward_pre_hook(lambda _, inputs: activations.append(inputs[0]))
    expected = [torch.zeros(64) for _ in decoder.blocks]
    for window in WINDOWS:
        activations.clear()
        loss = decoder.model(window[None], labels=window[None]).loss
        for total, activation, gradient in zip(
            expected, activations, torch.autograd.grad(loss, activations), strict=True
        ):
            total += (activation * gradient).abs().sum((0, 1)).detach()
    for (statistics,), total in zip(measured, expected, strict=True):
        torch.testing.assert_close(statistics[DOWN_INPUT_TAYLOR], total, rtol=1e-4, atol=1e-6)


def test_an_exception_while_gradients_are_measured_leaves_nothing(llama: Decoder) -> None:
    before = hooks_of(llama.model)
    failing = configured(FailingGradientCollector())
    with pytest.raises(PluginError, match=r"failing.*update"):
        measure_gradients(llama, WINDOWS, failing, Progress())
    with pytest.raises(IndexError):
        measure_gradients(llama, torch.full((1, 4), 10**6), failing, Progress())
    assert hooks_of(llama.model) == before
    assert all(parameter.requires_grad for parameter in llama.model.parameters())


def measure_everything(decoder: Decoder, plugins: Plugins, windows: Tensor, batch_size: int) -> list[BlockStatistics]:
    """Measure every statistic of the built-in collectors, the heavy ones too."""
    collectors = plugins.collectors_for(cls.provides for cls in plugins.collectors.values())
    backward = [c for c in collectors if c.component.site is Site.GRADIENT]
    forward = [c for c in collectors if c.component.site is not Site.GRADIENT]
    gradients = measure_gradients(decoder, windows, backward, Progress())
    batches = embed(decoder, windows, ForwardOptions(batch_size=batch_size))
    measured: list[BlockStatistics] = []
    for index, (backwards,) in enumerate(gradients):
        (statistics,) = measure_block(decoder, index, batches, forward)
        measured.append(statistics | backwards)
    return measured


@pytest.fixture(scope="module")
def one_by_one(llama: Decoder, plugins: Plugins) -> list[BlockStatistics]:
    return measure_everything(llama, plugins, WINDOWS, batch_size=1)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(batch_size=st.integers(2, 7), order=st.permutations(range(len(WINDOWS))))
def test_statistics_depend_neither_on_batches_nor_on_the_order_of_windows(
    llama: Decoder, plugins: Plugins, one_by_one: list[BlockStatistics], batch_size: int, order: list[int]
) -> None:
    ordered = {cls.provides for cls in plugins.collectors.values() if cls.ordered}
    for expected, batched, shuffled in zip(
        one_by_one,
        measure_everything(llama, plugins, WINDOWS, batch_size),
        measure_everything(llama, plugins, WINDOWS[order], batch_size),
        strict=True,
    ):
        assert batched.tokens == shuffled.tokens == WINDOWS.numel()
        for statistic, value in expected.items():
            largest = value.abs().max().item() if value.numel() else 0.0  # nothing is held out of so few windows
            close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6 * largest)
            close(batched[statistic], value)
            if statistic not in ordered:
                close(shuffled[statistic], value)
            elif statistic in (FEED_FORWARD_INPUTS, FEED_FORWARD_TARGETS):
                close(shuffled[statistic], value.unflatten(0, WINDOWS.shape)[order].flatten(0, 1))  # (n, D)


def test_the_last_batch_may_be_short_and_a_batch_larger_than_all_windows(llama: Decoder, plugins: Plugins) -> None:
    expected = collect_light(llama, plugins, batch_size=None)
    for batch_size in (3, 100):
        for left, right in zip(expected, collect_light(llama, plugins, batch_size=batch_size), strict=True):
            torch.testing.assert_close(left.scores["cfsp"], right.scores["cfsp"], rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_the_dense_model(
    family: str, make_model: MakeModel, open_tiny: OpenTiny, plugins: Plugins
) -> None:
    _, decoder = open_tiny(make_model(family))
    before = {name: value.clone() for name, value in decoder.model.state_dict().items()}
    measurements = collect_light(decoder, plugins)
    assert all(torch.equal(value, before[name]) for name, value in decoder.model.state_dict().items())

    activations: dict[int, Tensor] = {}
    streams: dict[int, tuple[Tensor, Tensor]] = {}

    def record(index: int, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        activations[index] = inputs[0].double().flatten(0, 1)  # (N * T, F)

    def record_stream(index: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        streams[index] = inputs[0].double(), output.double()

    for index, block in enumerate(decoder.blocks):
        down_projection(decoder, index).register_forward_hook(partial(record, index))
        block.register_forward_hook(partial(record_stream, index))
    with torch.no_grad():
        decoder.model(WINDOWS, use_cache=False)
    for index, measurement in enumerate(measurements):
        cosine = torch.nn.functional.cosine_similarity(*streams[index], dim=-1)
        expected = {
            DOWN_INPUT_SQUARES: activations[index].square().sum(0),
            DOWN_INPUT_MEAN: activations[index].mean(0),
            ANGULAR_DISTANCE: (cosine.clamp(-1, 1).arccos() / torch.pi).mean(),
        }
        for statistic, value in expected.items():
            torch.testing.assert_close(measurement.statistics[statistic], value.float(), rtol=1e-4, atol=1e-5)


def test_statistics_and_scores_of_a_bfloat16_model_are_float32(
    make_model: MakeModel, open_tiny: OpenTiny, plugins: Plugins
) -> None:
    loaded, decoder = open_tiny(make_model("qwen2", dtype="bfloat16"))
    assert loaded.model.dtype == torch.bfloat16
    for measurement in collect_light(decoder, plugins):
        assert {value.dtype for value in measurement.statistics.values()} == {torch.float32}
        assert measurement.scores["cfsp"].dtype == torch.float32
    for statistics in measure_everything(decoder, plugins, WINDOWS[:2], batch_size=2):
        assert {value.dtype for value in statistics.values()} == {torch.float32}


def test_heavy_statistics_do_not_outlive_their_block(llama: Decoder, plugins: Plugins) -> None:
    criterion: ConfiguredComponent[Criterion] = plugins.criteria.create("magnitude", {})
    collectors = plugins.collectors_for({DOWN_INPUT_GRAM, DOWN_INPUT_MEAN})
    measurements = collect(llama, WINDOWS, {"magnitude": criterion}, collectors, seed=0, progress=Progress())
    assert [set(measurement.statistics) for measurement in measurements] == [{DOWN_INPUT_MEAN}] * 3


def test_magnitude_and_uniform_read_no_data_and_run_nothing(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a module ran")

    monkeypatch.setattr(nn.Module, "__call__", refuse)
    config = RunConfig.build(
        model=str(make_model("llama")),
        criterion="magnitude",
        allocator="uniform",
        calibration="/there/is/no/such.txt",
        round_to=8,
        device="cpu",
    )
    plan = plan_only(config)
    assert plan.calibration is None
    assert plan.widths == (32, 32, 32)


def test_blocks_that_depend_on_more_than_their_inputs_are_refused(make_model: MakeModel, open_tiny: OpenTiny) -> None:
    _, decoder = open_tiny(make_model("llama"))
    check_replay(decoder, WINDOWS[:1])
    calls: list[int] = []

    def add_calls(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return output + len(calls)

    decoder.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    decoder.blocks[1].register_forward_hook(add_calls)
    with pytest.raises(ModelError, match=r"run one by one, .* logits differ by"):
        check_replay(decoder, WINDOWS[:1])
