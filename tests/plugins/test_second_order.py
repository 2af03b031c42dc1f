"""What second-order methods are computed from: Gram matrices, products with targets, held-out windows, gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cfsp_framework import HELD_OUT_EVERY, Accumulator, BlockStatistics, Collector, Criterion, Site, Statistic
from cfsp_framework.engine.collect import collect
from cfsp_framework.engine.gradients import measure_gradients
from cfsp_framework.engine.measure import CollectorState, TokenCounts, WindowRows, measure_block
from cfsp_framework.engine.measurements import FeedForwardMeasurement, summarise
from cfsp_framework.engine.replay import ForwardOptions, embed
from cfsp_framework.host.registry import ConfiguredComponent, Origin, Plugins
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.feed_forwards import DenseFeedForward
from cfsp_framework.modeling.loading import LoadedModel
from cfsp_framework.runtime.distributed import SOLO
from cfsp_framework.runtime.progress import Progress
from cfsp_framework.statistics import (
    BLOCK_OUTPUT_SQUARES,
    DOWN_CROSS,
    DOWN_INPUT_GRAM,
    DOWN_INPUT_MEAN,
    DOWN_INPUT_SQUARES,
    DOWN_INPUT_TAYLOR,
    DOWN_INPUT_TAYLOR_SQUARED,
    DOWN_TARGET_SQUARES,
    FEED_FORWARD_INPUTS,
    FEED_FORWARD_TARGETS,
    TOKEN_WEIGHTS,
)
from cfsp_plugins.collectors.activations import DownInputMean
from cfsp_plugins.collectors.second_moments import BlockOutputSquares, DownCross, DownInputGram
from cfsp_plugins.collectors.sums import held_out as on_held_out
from cfsp_plugins.collectors.tokens import FeedForwardInputs, FeedForwardTargets

Open = Callable[..., tuple[LoadedModel, Decoder]]
untimed = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])

WINDOWS = torch.randint(3, 300, (23, 12), generator=torch.Generator().manual_seed(4))
HELD_OUT = [9, 19]  # of 23 windows: the tenth and the twentieth
FITTED = [number for number in range(23) if number not in HELD_OUT]
SECOND_ORDER = frozenset(
    {
        BLOCK_OUTPUT_SQUARES,
        DOWN_CROSS,
        DOWN_CROSS.held_out(),
        DOWN_INPUT_GRAM,
        DOWN_INPUT_GRAM.held_out(),
        DOWN_INPUT_MEAN.held_out(),
        DOWN_INPUT_SQUARES,
        FEED_FORWARD_INPUTS,
        FEED_FORWARD_INPUTS.held_out(),
        FEED_FORWARD_TARGETS,
        FEED_FORWARD_TARGETS.held_out(),
        DOWN_INPUT_GRAM.relative(),
        DOWN_INPUT_GRAM.relative().held_out(),
        DOWN_CROSS.relative(),
        DOWN_TARGET_SQUARES.relative(),
        TOKEN_WEIGHTS,
        TOKEN_WEIGHTS.held_out(),
    }
)


@pytest.fixture(scope="module", params=["llama", "llama-bias", "phi3", "gemma2"])
def decoder(request: pytest.FixtureRequest, make_model: Callable[..., Path], open_tiny: Open) -> Decoder:
    """Models that no test changes: plain, with biases, fused, with a norm behind the feed-forward."""
    return open_tiny(make_model(request.param))[1]


# --- collectors on their own -----------------------------------------------------------------------------------------


def activations(windows: int, tokens: int, width: int, seed: int = 0) -> Tensor:
    """``(N, T, width)`` of mean about 1 and very different scales."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(windows, tokens, width, generator=draw) + 1) * torch.logspace(-2, 2, width)


def collected(
    collector: Collector,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    after: Callable[[WindowRows], None] | None = None,
) -> Tensor:
    """The statistic after these windows, as the host asks for it; ``after`` is called with each once it was shown."""
    state, tokens = CollectorState(ConfiguredComponent(collector, Origin("test"))), TokenCounts()
    for number, (window_in, window_out) in enumerate(zip(inputs, outputs, strict=True)):
        window = WindowRows(number, window_in, window_out, torch.ones(len(window_in)))
        tokens.add(window)
        state.add(window)
        if after is not None:
            after(window)
    return state.value(tokens, "block 0", SOLO)


def assert_products(found: Tensor, left: Tensor, right: Tensor) -> None:
    """``found`` is ``left^T right`` of ``(n, a)`` and ``(n, b)``, to the float32 rounding of its sums."""
    left, right = left.double(), right.double()
    size = left.square().sum(0).sqrt()[:, None] * right.square().sum(0).sqrt()
    assert ((found.double() - left.mT @ right).abs() <= 1e-5 * size + 1e-30).all()


@untimed
@given(
    windows=st.integers(1, 25), tokens=st.integers(1, 7), width=st.integers(1, 33), seed=st.integers(0, 99)
)  # panels of 8: also widths that are no multiples, and fewer channels than panels
def test_gram_matrices_are_symmetric_sums_of_outer_products(windows: int, tokens: int, width: int, seed: int) -> None:
    inputs = activations(windows, tokens, width, seed)
    outputs = activations(windows, tokens, 3, seed + 1)
    gram = collected(DownInputGram(), list(inputs), list(outputs))
    assert (gram.dtype, gram.shape) == (torch.float32, (width, width))
    assert torch.equal(gram, gram.mT)
    assert_products(gram, inputs.flatten(0, 1), inputs.flatten(0, 1))
    squares = inputs.flatten(0, 1).double().square().sum(0).float()
    torch.testing.assert_close(gram.diagonal(), squares, rtol=1e-5, atol=0)


@untimed
@given(windows=st.integers(1, 25), tokens=st.integers(1, 7), width=st.integers(1, 20), seed=st.integers(0, 99))
def test_held_out_collectors_see_every_tenth_window_and_nothing_else(
    windows: int, tokens: int, width: int, seed: int
) -> None:
    inputs, outputs = activations(windows, tokens, width, seed), activations(windows, tokens, 5, seed + 1)
    seen_in = inputs[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY].flatten(0, 1)  # (n, F)
    seen_out = outputs[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY].flatten(0, 1)  # (n, D)
    gram = collected(on_held_out(DownInputGram)(), list(inputs), list(outputs))
    cross = collected(on_held_out(DownCross)(), list(inputs), list(outputs))
    mean = collected(on_held_out(DownInputMean)(), list(inputs), list(outputs))
    assert_products(gram, seen_in, seen_in)
    assert_products(cross, seen_out, seen_in)
    assert torch.equal(collected(on_held_out(FeedForwardInputs)(), list(inputs), list(outputs)), seen_in)
    assert torch.equal(collected(on_held_out(FeedForwardTargets)(), list(inputs), list(outputs)), seen_out)
    expected = seen_in.double().mean(0) if len(seen_in) else torch.zeros(width, dtype=torch.float64)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6)


@untimed
@given(windows=st.integers(1, 12), tokens=st.integers(1, 7), seed=st.integers(0, 99))
def test_the_other_collectors_are_what_they_say(windows: int, tokens: int, seed: int) -> None:
    inputs, outputs = activations(windows, tokens, 9, seed), activations(windows, tokens, 4, seed + 1)
    assert_products(collected(DownCross(), list(inputs), list(outputs)), outputs.flatten(0, 1), inputs.flatten(0, 1))
    fitted = torch.arange(1, windows + 1) % HELD_OUT_EVERY != 0
    assert torch.equal(collected(FeedForwardInputs(), list(inputs), list(outputs)), inputs[fitted].flatten(0, 1))
    assert torch.equal(collected(FeedForwardTargets(), list(inputs), list(outputs)), outputs[fitted].flatten(0, 1))
    squares = collected(BlockOutputSquares(), list(inputs), list(outputs))
    assert squares.shape == ()
    assert squares.item() == pytest.approx(outputs.double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("collector", [DownInputGram(), DownCross(), BlockOutputSquares()], ids=repr)
def test_sums_of_several_processes_add_up(collector: Collector) -> None:
    inputs, outputs = activations(6, 5, 11), activations(6, 5, 4, seed=1)
    whole, first, second = collector.start(), collector.start(), collector.start()
    for number, (window_in, window_out) in enumerate(zip(inputs, outputs, strict=True)):
        whole.update(window_in, window_out)
        (first if number < 2 else second).update(window_in, window_out)
    for name, total in second.sums.items():
        first.sums[name] = first.sums[name] + total
    torch.testing.assert_close(first.value(30), whole.value(30), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.bfloat16, 257), (torch.float16, 2049), (torch.float32, 100)])
def test_half_precision_activations_are_counted_and_summed_exactly(dtype: torch.dtype, tokens: int) -> None:
    inputs = (activations(10, tokens, 4) / 100).to(dtype)  # 257 tokens are no bfloat16, 2049 no float16
    windows = list(inputs)
    mean = collected(on_held_out(DownInputMean)(), windows, windows)
    torch.testing.assert_close(mean.double(), inputs[9].double().mean(0), rtol=1e-5, atol=0)
    gram = collected(DownInputGram(), windows, windows)
    assert gram.dtype == torch.float32
    assert_products(gram, inputs.flatten(0, 1), inputs.flatten(0, 1))


@pytest.mark.parametrize(
    "collector",
    [
        DownInputGram(),
        on_held_out(DownInputGram)(),
        DownCross(),
        on_held_out(DownCross)(),
        FeedForwardInputs(),
        on_held_out(FeedForwardInputs)(),
        FeedForwardTargets(),
        on_held_out(FeedForwardTargets)(),
        BlockOutputSquares(),
    ],
    ids=repr,
)
def test_collecting_keeps_no_hold_of_the_activations(collector: Collector) -> None:
    inputs, outputs = activations(10, 3, 6), activations(10, 3, 4, seed=1)
    expected = collected(collector, list(inputs), list(outputs))
    assert bool(expected.any())

    def overwrite(window: WindowRows) -> None:
        window.inputs.zero_()  # the engine writes the next block's stream over it
        window.outputs.zero_()

    assert torch.equal(collected(collector, list(inputs.clone()), list(outputs.clone()), overwrite), expected)
    assert collector.ordered == ("feed-forward" in collector.name)


# --- measured on a model ---------------------------------------------------------------------------------------------


def measured(decoder: Decoder, plugins: Plugins, windows: Tensor, batch_size: int) -> list[BlockStatistics]:
    """Every second-order statistic of every block of the dense model."""
    collectors = plugins.collectors_for(SECOND_ORDER)
    batches = embed(decoder, windows, ForwardOptions(batch_size=batch_size))
    found: list[BlockStatistics] = []
    for index in range(len(decoder.blocks)):
        (statistics,) = measure_block(decoder, index, batches, collectors)
        found.append(statistics)
    return found


def down_projection(decoder: Decoder, index: int) -> nn.Module:
    """The module whose input are the channel activations of block ``index``."""
    (module,) = decoder.feed_forward_modules(index)
    assert isinstance(module, DenseFeedForward)
    return module.down


@torch.no_grad()
def recorded(modules: Sequence[nn.Module], model: nn.Module, windows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What goes in and out of each module when the whole model runs, ``(N, T, ...)``."""
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].clone(), output.clone())))
        for module in modules
    ]
    model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_second_order_statistics_are_those_of_the_models_own_forward(decoder: Decoder, plugins: Plugins) -> None:
    found = measured(decoder, plugins, WINDOWS, batch_size=3)
    count, (layout,) = len(decoder.blocks), decoder.architecture.feed_forwards
    downs = recorded([down_projection(decoder, index) for index in range(count)], decoder.model, WINDOWS)
    wholes = recorded([block.get_submodule(layout.path) for block in decoder.blocks], decoder.model, WINDOWS)
    blocks = recorded(decoder.blocks, decoder.model, WINDOWS)
    for index, statistics in enumerate(found):
        assert (statistics.tokens, statistics.held_out_tokens) == (23 * 12, 2 * 12)
        inputs = downs[index][0]  # (N, T, F)
        flat, held_out = inputs.flatten(0, 1), inputs[HELD_OUT].flatten(0, 1)
        assert_products(statistics[DOWN_INPUT_GRAM], flat, flat)
        assert_products(statistics[DOWN_INPUT_GRAM.held_out()], held_out, held_out)
        torch.testing.assert_close(
            statistics[DOWN_INPUT_GRAM].diagonal(), statistics[DOWN_INPUT_SQUARES], rtol=1e-5, atol=0
        )
        torch.testing.assert_close(statistics[DOWN_INPUT_MEAN.held_out()], held_out.mean(0), rtol=1e-5, atol=1e-6)
        for windows, entering, leaving in (
            (FITTED, FEED_FORWARD_INPUTS, FEED_FORWARD_TARGETS),
            (HELD_OUT, FEED_FORWARD_INPUTS.held_out(), FEED_FORWARD_TARGETS.held_out()),
        ):
            whole_in, whole_out = (side[windows].flatten(0, 1) for side in wholes[index])  # (n, D) each
            torch.testing.assert_close(statistics[entering], whole_in, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(statistics[leaving], whole_out, rtol=1e-4, atol=1e-5)
        weights = 1 / blocks[index][1].square().sum(-1)  # (N, T)
        root = weights.sqrt().unsqueeze(-1)  # (N, T, 1)
        relative, targets = (inputs * root).flatten(0, 1), (downs[index][1] * root).flatten(0, 1)
        bias = down_projection(decoder, index).bias
        if isinstance(bias, Tensor):
            targets = targets - (bias * root).flatten(0, 1)
        assert_products(statistics[DOWN_INPUT_GRAM.relative()], relative, relative)
        assert_products(
            statistics[DOWN_INPUT_GRAM.relative().held_out()], *[(inputs * root)[HELD_OUT].flatten(0, 1)] * 2
        )
        assert_products(statistics[DOWN_CROSS.relative()], targets, relative)
        squares = targets.double().square().sum().item()
        assert statistics[DOWN_TARGET_SQUARES.relative()].item() == pytest.approx(squares, rel=1e-4)
        torch.testing.assert_close(statistics[TOKEN_WEIGHTS], weights[FITTED].flatten(), rtol=1e-4, atol=0)
        torch.testing.assert_close(statistics[TOKEN_WEIGHTS.held_out()], weights[HELD_OUT].flatten(), rtol=1e-4, atol=0)
        expected = blocks[index][1].double().square().sum().item()
        assert statistics[BLOCK_OUTPUT_SQUARES].item() == pytest.approx(expected, rel=1e-5)


def test_on_the_dense_stream_the_target_is_the_product_without_a_bias(decoder: Decoder, plugins: Plugins) -> None:
    for index, statistics in enumerate(measured(decoder, plugins, WINDOWS, batch_size=23)):
        weight = decoder.feed_forwards(index)[0].down.double()
        for gram, cross in ((DOWN_INPUT_GRAM, DOWN_CROSS), (DOWN_INPUT_GRAM.held_out(), DOWN_CROSS.held_out())):
            product = weight @ statistics[gram].double()  # (D, F)
            torch.testing.assert_close(
                statistics[cross].double(), product, rtol=1e-4, atol=1e-5 * product.abs().max().item()
            )


def test_no_split_into_batches_changes_a_statistic(
    make_model: Callable[..., Path], open_tiny: Open, plugins: Plugins
) -> None:
    llama = open_tiny(make_model("llama"))[1]
    expected = measured(llama, plugins, WINDOWS, batch_size=1)
    for batch_size in (2, 7, 10, 23):
        for left, right in zip(expected, measured(llama, plugins, WINDOWS, batch_size), strict=True):
            assert (left.tokens, left.held_out_tokens) == (right.tokens, right.held_out_tokens)
            for statistic, value in left.items():
                close = 1e-6 * value.abs().max().item()
                torch.testing.assert_close(right[statistic], value, rtol=1e-4, atol=close)


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (9, 0), (10, 1), (19, 1), (20, 2)])
def test_fewer_than_ten_windows_hold_nothing_out(
    count: int, held_out: int, make_model: Callable[..., Path], open_tiny: Open, plugins: Plugins
) -> None:
    llama = open_tiny(make_model("llama"))[1]
    statistics = measured(llama, plugins, WINDOWS[:count], batch_size=4)[0]
    assert (statistics.tokens, statistics.held_out_tokens) == (count * 12, held_out * 12)
    for statistic in (DOWN_INPUT_GRAM.held_out(), DOWN_CROSS.held_out(), DOWN_INPUT_MEAN.held_out()):
        assert bool(statistics[statistic].any()) == (held_out > 0)
    for statistic in (FEED_FORWARD_INPUTS.held_out(), FEED_FORWARD_TARGETS.held_out()):
        assert len(statistics[statistic]) == held_out * 12
    for kept in (statistics.light(), statistics.only(SECOND_ORDER), statistics.to("cpu"), statistics | {}):
        assert (kept.tokens, kept.held_out_tokens) == (count * 12, held_out * 12)


class _Remembered:
    """A statistic that is heavy, and a list of what is still alive of it."""

    def __init__(self, alive: list[weakref.ref[Tensor]]) -> None:
        self.sums: dict[str, Tensor] = {}
        self._alive = alive

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        assert not [found for found in self._alive if found() is not None], "an earlier block's is still held"

    def value(self, tokens: int) -> Tensor:
        gram = torch.ones(3, 3)
        self._alive.append(weakref.ref(gram))
        return gram


class Remembered(Collector):
    name: ClassVar[str] = "remembered"
    provides: ClassVar[Statistic] = Statistic("remembered", "(n, n)", heavy=True)
    site: ClassVar[Site] = Site.DOWN_PROJECTION
    alive: ClassVar[list[weakref.ref[Tensor]]] = []

    def start(self) -> Accumulator:
        return _Remembered(self.alive)


def test_only_one_block_s_heavy_statistics_are_held_at_a_time(
    make_model: Callable[..., Path], open_tiny: Open, plugins: Plugins
) -> None:
    llama = open_tiny(make_model("llama"))[1]
    Remembered.alive.clear()
    criterion: ConfiguredComponent[Criterion] = plugins.criteria.create("magnitude", {})
    collect(
        llama,
        WINDOWS,
        {"magnitude": criterion},
        [ConfiguredComponent(Remembered(), Origin("test"))],
        seed=0,
        progress=Progress(),
    )
    assert len(Remembered.alive) == 3
    assert not [found for found in Remembered.alive if found() is not None]


# --- gradients -------------------------------------------------------------------------------------------------------

BACKWARD = frozenset({DOWN_INPUT_TAYLOR, DOWN_INPUT_TAYLOR_SQUARED})


def naive_gradients(decoder: Decoder, windows: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """For every window and block, the activations ``(T, F)`` and the gradients of the mean next-token loss."""
    found: list[list[tuple[Tensor, Tensor]]] = []
    seen: list[Tensor] = []

    def hear(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    for window in windows:
        seen.clear()
        handles = [
            down_projection(decoder, index).register_forward_pre_hook(hear) for index in range(len(decoder.blocks))
        ]
        logits = decoder.model(window[None], use_cache=False).logits[0].double()
        for handle in handles:
            handle.remove()
        chances = logits[:-1].log_softmax(-1)
        loss = -chances[torch.arange(len(window) - 1), window[1:]].mean()
        gradients = torch.autograd.grad(loss, seen)
        found.append([(a[0].detach().double(), g[0].double()) for a, g in zip(seen, gradients, strict=True)])
    return found


def test_taylor_statistics_equal_a_naive_computation(decoder: Decoder, plugins: Plugins) -> None:
    found = measure_gradients(decoder, WINDOWS[:3], plugins.collectors_for(BACKWARD), Progress())
    naive = naive_gradients(decoder, WINDOWS[:3])
    for index, (values,) in enumerate(found):
        effects = torch.cat([naive[window][index][0] * naive[window][index][1] for window in range(3)])  # (3 T, F)
        for statistic, effect in (
            (DOWN_INPUT_TAYLOR, effects.abs().sum(0)),
            (DOWN_INPUT_TAYLOR_SQUARED, effects.square().sum(0)),
        ):
            assert values[statistic].dtype == torch.float32
            torch.testing.assert_close(values[statistic].double(), effect, rtol=1e-3, atol=1e-5 * effect.max().item())


def state(model: nn.Module) -> tuple[list[bool], bool, list[tuple[str, str]]]:
    """Which parameters are trainable, whether any has a gradient, and every hook."""
    hooks = [
        (path, kind)
        for path, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if module.__dict__.get(kind)
    ]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    return trainable, any(parameter.grad is not None for parameter in model.parameters()), hooks


def test_measuring_gradients_leaves_every_flag_as_it_was(
    make_model: Callable[..., Path], open_tiny: Open, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = open_tiny(make_model("llama-tied"))[1]
    frozen = list(llama.model.parameters())[::3]
    for parameter in frozen:
        parameter.requires_grad_(False)
    weights = {name: value.clone() for name, value in llama.model.state_dict().items()}
    before = state(llama.model)
    assert not before[1]
    collectors = plugins.collectors_for({DOWN_INPUT_TAYLOR})
    with torch.no_grad():  # as the caller may have it
        first = measure_gradients(llama, WINDOWS[:2], collectors, Progress())
    assert state(llama.model) == before
    assert all(torch.equal(value, weights[name]) for name, value in llama.model.state_dict().items())

    def interrupt(*_: object, **__: object) -> Tensor:
        assert state(llama.model) != before, "hooks are there and nothing is trainable"
        raise KeyboardInterrupt

    for module in (llama.blocks[1].get_submodule("self_attn"), llama.base.get_submodule("norm")):
        with monkeypatch.context() as patch:
            patch.setattr(type(module), "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                measure_gradients(llama, WINDOWS[:2], collectors, Progress())
        assert state(llama.model) == before
    again = measure_gradients(llama, WINDOWS[:2], collectors, Progress())
    for (one,), (other,) in zip(first, again, strict=True):
        assert torch.equal(one[DOWN_INPUT_TAYLOR], other[DOWN_INPUT_TAYLOR])


def collected_for(
    decoder: Decoder, plugins: Plugins, name: str, options: dict[str, object], more: frozenset[Statistic] = frozenset()
) -> tuple[FeedForwardMeasurement, ...]:
    """What one pass gives for a criterion."""
    criterion: ConfiguredComponent[Criterion] = plugins.criteria.create(name, options)
    collectors = plugins.collectors_for(criterion.component.required() | more)
    return collect(decoder, WINDOWS, {name: criterion}, collectors, seed=0, progress=Progress())


@pytest.mark.parametrize("more", [frozenset(), frozenset({DOWN_INPUT_SQUARES})])
def test_gradient_statistics_know_their_tokens_beside_others_and_alone(
    more: frozenset[Statistic], make_model: Callable[..., Path], open_tiny: Open, plugins: Plugins
) -> None:
    llama = open_tiny(make_model("llama"))[1]
    found = collected_for(llama, plugins, "taylor", {}, more)
    for measurement, summary in zip(found, summarise(llama, found, "taylor"), strict=True):
        assert set(measurement.statistics) == {DOWN_INPUT_TAYLOR, *more}
        assert measurement.statistics.tokens == summary.tokens == WINDOWS.numel()
        assert measurement.statistics.held_out_tokens == 24
        assert torch.equal(measurement.scores["taylor"], measurement.statistics[DOWN_INPUT_TAYLOR])


def test_taylor_reads_the_statistic_its_option_names(
    make_model: Callable[..., Path], open_tiny: Open, plugins: Plugins
) -> None:
    llama = open_tiny(make_model("llama"))[1]
    plain = collected_for(llama, plugins, "taylor", {})
    squared = collected_for(llama, plugins, "taylor", {"squared": True}, frozenset({DOWN_INPUT_TAYLOR}))
    for one, other in zip(plain, squared, strict=True):
        assert torch.equal(one.scores["taylor"], other.statistics[DOWN_INPUT_TAYLOR])
        assert torch.equal(other.scores["taylor"], other.statistics[DOWN_INPUT_TAYLOR_SQUARED])


def test_gradients_are_listened_to_at_their_own_site(plugins: Plugins) -> None:
    sites = {cls.provides: cls.site for cls in plugins.collectors.values()}
    assert {statistic for statistic, site in sites.items() if site is Site.GRADIENT} == BACKWARD
