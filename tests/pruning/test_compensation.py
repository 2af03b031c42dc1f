"""Compensation: the new kept weights, the stream they are measured on, and that no error on held-out tokens rises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cfsp_framework import (
    HELD_OUT_EVERY,
    BlockStatistics,
    Compensator,
    FeedForward,
    PruningPlan,
    RunConfig,
    RunResult,
    Statistic,
    Stream,
    Update,
    prune,
)
from cfsp_framework.config import layered
from cfsp_framework.engine.replay import Batch, ForwardOptions, run_block
from cfsp_framework.errors import PluginError
from cfsp_framework.host.registry import ConfiguredComponent, Origin, Plugins
from cfsp_framework.host.selection import select
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.feed_forwards import DenseFeedForward, Projection
from cfsp_framework.pipeline import plan_only
from cfsp_framework.pruning.compensation import SecondPassCompensation, compensate
from cfsp_framework.pruning.cut import cut_model
from cfsp_framework.pruning.surgery import apply_updates, cut_block
from cfsp_framework.statistics import (
    DOWN_CROSS,
    DOWN_INPUT_GRAM,
    DOWN_INPUT_MEAN,
    DOWN_TARGET_SQUARES,
    FEED_FORWARD_INPUTS,
    FEED_FORWARD_TARGETS,
    TOKEN_WEIGHTS,
)
from cfsp_plugins.compensators import LeastSquares, LeastSquaresBias, LocalReconstruction, Procrustes, Sequential
from cfsp_plugins.compensators.held_out_guard import guarded
from cfsp_plugins.compensators.local_reconstruction import CalibrationTokens, Weights
from helpers.runs import same_weights
from helpers.types import MakeModel, MakePlan, OpenTiny

GRAM, CROSS, SQUARES = (total.relative() for total in (DOWN_INPUT_GRAM, DOWN_CROSS, DOWN_TARGET_SQUARES))

untimed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])

WINDOWS = torch.randint(3, 300, (20, 24), generator=torch.Generator().manual_seed(6))
IS_HELD_OUT = torch.arange(1, 21) % HELD_OUT_EVERY == 0
CLOSED_FORM: list[Compensator] = [LeastSquares(), LeastSquaresBias(), Procrustes(), Sequential(mix=0.0)]


# --- one feed-forward ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A feed-forward's down projection and its inputs on some windows ``(N, T, F)``."""

    block: FeedForward
    inputs: Tensor

    @property
    def fit(self) -> Tensor:
        """Inputs ``(n, F)`` of the windows to fit on."""
        return self.inputs[torch.arange(1, len(self.inputs) + 1) % HELD_OUT_EVERY != 0].flatten(0, 1)

    @property
    def held_out(self) -> Tensor:
        return self.inputs[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY].flatten(0, 1)

    @property
    def statistics(self) -> BlockStatistics:
        """Statistics as the collectors measure them on the dense stream, where every token weighs the same."""
        inputs, held_out = self.inputs.flatten(0, 1), self.held_out
        down = self.block.down.double()
        gram, held_out_gram = inputs.mT @ inputs, held_out.mT @ held_out
        values = {
            DOWN_INPUT_GRAM: gram,
            DOWN_INPUT_GRAM.held_out(): held_out_gram,
            GRAM: gram,
            GRAM.held_out(): held_out_gram,
            CROSS: down @ gram,
            CROSS.held_out(): down @ held_out_gram,
            SQUARES: ((down @ gram) * down).sum(),
            SQUARES.held_out(): ((down @ held_out_gram) * down).sum(),
            DOWN_INPUT_MEAN: inputs.mean(0),
            DOWN_INPUT_MEAN.held_out(): held_out.mean(0) if len(held_out) else inputs[0] * 0,
        }
        return BlockStatistics(values, len(inputs), len(held_out))

    def dense(self, inputs: Tensor) -> Tensor:
        """Return the feed-forward's output ``(n, D)``."""
        bias = 0 if self.block.down_bias is None else self.block.down_bias
        return inputs @ self.block.down.mT + bias

    def pruned(self, inputs: Tensor, kept: Tensor, update: Update) -> Tensor:
        """Return the narrowed feed-forward's output ``(n, D)`` with the update's weights."""
        down = self.block.down[:, kept] if update.down is None else update.down
        bias = self.block.down_bias if update.down_bias is None else update.down_bias
        return inputs[:, kept] @ down.mT + (0 if bias is None else bias)

    def error(self, inputs: Tensor, kept: Tensor, update: Update) -> float:
        """Return the squared error of the output over that of the dense output without its bias."""
        whole = (inputs @ self.block.down.mT).square().sum().item()
        return (self.dense(inputs) - self.pruned(inputs, kept, update)).square().sum().item() / whole

    def compensate(self, compensator: Compensator, kept: Tensor) -> Update:
        """Call the compensator as the host does."""
        return compensate(ConfiguredComponent(compensator, Origin("test")), self.block, kept, self.statistics)


def sample(
    windows: int = 20, tokens: int = 12, width: int = 16, hidden: int = 6, seed: int = 0, *, biased: bool = False
) -> Sample:
    """Draw a feed-forward whose channels are correlated and have means, in float64."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    mixing = torch.eye(width, dtype=torch.float64) + normal(width, width) / width**0.5
    inputs = (normal(windows, tokens, width) + normal(width) / 2) @ mixing
    bias = normal(hidden) if biased else None
    down = normal(hidden, width)
    return Sample(FeedForward(0, "mlp", normal(width, hidden), down, "silu", down_bias=bias), inputs)


SAMPLES = st.builds(
    sample,
    windows=st.integers(1, 25),
    tokens=st.integers(2, 12),
    width=st.integers(2, 20),
    hidden=st.integers(1, 8),
    seed=st.integers(0, 999),
    biased=st.booleans(),
)
EVEN = torch.arange(0, 16, 2)


def errors(update: Update) -> tuple[float, float]:
    """Return the held-out errors with and without the update, which both have to be there."""
    assert update.error is not None
    assert update.error_plain is not None
    return update.error, update.error_plain


def refused(update: Update) -> bool:
    """Return whether an update has errors and changes nothing."""
    return update == Update(error=update.error, error_plain=update.error_plain)


def weight(update: Update) -> Tensor:
    assert update.down is not None
    return update.down


@pytest.mark.parametrize("compensator", CLOSED_FORM, ids=repr)
@untimed
@given(sample=SAMPLES, data=st.data())
def test_closed_form_compensation_never_raises_the_calibration_or_the_held_out_error(
    compensator: Compensator, sample: Sample, data: st.DataObject
) -> None:
    width = sample.block.width
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, width - 1), min_size=1))))
    update = sample.compensate(compensator, kept)
    if len(kept) == width:
        assert update == Update(), "where nothing is lost the compensator is not called"
        update = compensator.compensate(sample.block, kept, sample.statistics)
    error, error_plain = errors(update)
    tokens = sample.held_out if len(sample.held_out) else sample.fit
    assert error_plain == pytest.approx(sample.error(tokens, kept, Update()), rel=1e-6, abs=1e-9)
    if refused(update):
        assert not error < error_plain, "refused for no reason"
        return
    assert error < error_plain
    assert error == pytest.approx(sample.error(tokens, kept, update), rel=1e-6, abs=1e-9)
    if compensator.name != "least-squares-bias" or len(sample.fit) > 2:  # the covariance of one token is 0
        fitted = sample.error(sample.fit, kept, update)
        assert fitted <= sample.error(sample.fit, kept, Update()) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("compensator", CLOSED_FORM, ids=repr)
def test_with_enough_tokens_every_compensator_helps(compensator: Compensator) -> None:
    error, error_plain = errors(sample(windows=40, tokens=20).compensate(compensator, EVEN))
    assert error < 0.9 * error_plain


def test_least_squares_is_better_than_its_special_cases() -> None:
    many = sample(windows=40, tokens=20, biased=True)
    plain, centred, rotated = (
        many.error(many.fit, EVEN, many.compensate(compensator, EVEN))
        for compensator in (LeastSquares(damping=1e-9), LeastSquaresBias(damping=1e-9), Procrustes())
    )
    lost = many.block.down[:, EVEN + 1] @ many.fit[:, EVEN + 1].mean(0)
    assert many.block.down_bias is not None
    assert plain < rotated
    assert centred < plain
    assert centred < many.error(many.fit, EVEN, Update(down_bias=many.block.down_bias + lost))


def test_sequential_on_the_dense_target_is_least_squares() -> None:
    sequential, plain = (
        sample().compensate(compensator, EVEN) for compensator in (Sequential(mix=0.0), LeastSquares())
    )
    torch.testing.assert_close(weight(sequential), weight(plain), rtol=1e-9, atol=1e-9)
    assert errors(sequential) == pytest.approx(errors(plain), rel=1e-6)


@pytest.mark.parametrize("compensator", CLOSED_FORM, ids=repr)
def test_a_block_whose_held_out_error_does_not_fall_keeps_plain_pruning(compensator: Compensator) -> None:
    inputs = sample().inputs.clone()
    for channel in EVEN + 1:  # removed channels matter on the fitting windows only: plain pruning is perfect
        inputs[IS_HELD_OUT, :, channel] = 0
    update = replace(sample(), inputs=inputs).compensate(compensator, EVEN)
    error, error_plain = errors(update)
    assert error_plain == pytest.approx(0, abs=1e-12)
    assert error > 0
    assert refused(update)


def test_the_guard_raises_the_damping_tenfold_five_times_at_most() -> None:
    tried: list[float] = []

    def fit(damping: float) -> Tensor:
        tried.append(damping)
        if len(tried) == 2:
            torch.linalg.cholesky(-torch.eye(2))  # not positive definite
        return torch.full((1, 1), damping)

    def error_above(limit: float) -> Callable[[Tensor], float]:
        return lambda down: 2.0 if down.item() >= limit else 6.0

    update = guarded(fit, error_above(0.5), 4.0, 8.0, 1e-3)
    assert tried == pytest.approx([1e-3, 1e-2, 1e-1, 1.0])
    assert (weight(update).item(), *errors(update)) == (1.0, 0.25, 0.5)
    tried.clear()
    update = guarded(fit, error_above(1e9), 4.0, 8.0, 1e-3)
    assert tried == pytest.approx([1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2])
    assert update == Update(error_plain=0.5, error=0.75)
    update = guarded(lambda damping: torch.ones(1, 1), lambda down: float("nan"), 4.0, 8.0, 1e-3)
    assert update == Update(error_plain=0.5, error=0.5), "NaN is not an improvement"

    def exhausted(damping: float) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):  # a RuntimeError that must not be taken for a singular matrix
        guarded(exhausted, error_above(0.5), 4.0, 8.0, 1e-3)


@pytest.mark.parametrize("compensator", CLOSED_FORM, ids=repr)
@pytest.mark.parametrize("zero", ["weights", "activations", "held-out activations"])
def test_a_feed_forward_without_output_is_left_unchanged(compensator: Compensator, zero: str) -> None:
    feed_forward = sample()
    if zero == "weights":
        feed_forward = replace(feed_forward, block=replace(feed_forward.block, down=feed_forward.block.down * 0))
    else:
        silent = torch.ones(20, 1, 1) if zero == "activations" else IS_HELD_OUT[:, None, None]
        feed_forward = replace(feed_forward, inputs=feed_forward.inputs * (1 - silent.double()))
    update = feed_forward.compensate(compensator, EVEN)
    assert (update.down, update.down_bias) == (None, None)
    assert update.error_plain == 0


@pytest.mark.parametrize("biased", [False, True])
def test_least_squares_bias_is_the_centred_least_squares_fit(biased: bool) -> None:
    block = sample(windows=40, biased=biased)
    update = block.compensate(LeastSquaresBias(damping=1e-12), EVEN)
    design = torch.cat([block.fit[:, EVEN], torch.ones(len(block.fit), 1, dtype=torch.float64)], 1)  # (n, K + 1)
    expected = torch.linalg.lstsq(design, block.dense(block.fit)).solution  # (K + 1, D)
    assert update.down_bias is not None
    torch.testing.assert_close(weight(update), expected[:-1].mT, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(update.down_bias, expected[-1], rtol=1e-6, atol=1e-8)
    damped = block.compensate(LeastSquaresBias(), EVEN)
    means = [output.mean(0) for output in (block.dense(block.fit), block.pruned(block.fit, EVEN, damped))]
    torch.testing.assert_close(means[1], means[0], rtol=1e-9, atol=1e-9)


def test_procrustes_is_the_best_rotation_and_scale_of_the_kept_output() -> None:
    block = sample(windows=40)
    down = weight(block.compensate(Procrustes(), EVEN))
    turned = down @ torch.linalg.pinv(block.block.down[:, EVEN])  # s Q: (D, D), for D < K
    scale = torch.linalg.matrix_norm(turned, 2)
    torch.testing.assert_close(turned @ turned.mT, scale.square() * torch.eye(6, dtype=torch.float64))
    best = block.error(block.fit, EVEN, Update(down=down))
    draw = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.3):
        for _ in range(10):
            skew = size * torch.randn(6, 6, generator=draw, dtype=torch.float64)
            factor = 1 + size * torch.randn(1, generator=draw, dtype=torch.float64)
            for near in (torch.linalg.matrix_exp(skew - skew.mT) @ down, factor * down):
                assert block.error(block.fit, EVEN, Update(down=near)) >= best


# --- checks of the host ------------------------------------------------------------------------------------------------


class Fixed(Compensator):
    """Return a fixed update."""

    name: ClassVar[str] = "fixed"
    update: ClassVar[object] = Update()

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        return self.update  # type: ignore[return-value]


KEPT = torch.tensor([0, 3, 5])
SHAPES = {"down": (6, 3), "down_bias": (6,), "up": (3, 6), "gate": (3, 6), "up_bias": (3,), "gate_bias": (3,)}
BLAME = r"'fixed'.*their-plugin.*their-package 1\.2"


def checked(update: object, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> Update:
    """Return the update of a compensator of block 7 once the host has checked it."""
    monkeypatch.setattr(Fixed, "update", update)
    block = sample().block
    block = replace(block, block=7, down=block.down.to(dtype), up=block.up.to(dtype), gate=block.up.to(dtype))
    fixed = ConfiguredComponent(Fixed(), Origin("their-plugin", "their-package", "1.2"))
    return compensate(fixed, block, KEPT, BlockStatistics({}, 0))


@pytest.mark.parametrize("part", SHAPES)
def test_a_wrong_update_names_the_plugin_the_tensor_and_the_block(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.ones(SHAPES[part])
    assert checked(Update(**{part: right}), monkeypatch) == Update(**{part: right})  # type: ignore[arg-type]
    infinite = right.clone()
    infinite.view(-1)[1] = float("inf")
    wrong: list[tuple[object, str]] = [
        (right[..., :-1], "shape"),
        (right[None], "shape"),
        (right * float("nan"), "not finite"),
        (infinite, "not finite"),
        ([1.0, 2.0], "a list, not a tensor"),
    ]
    for value, message in wrong:
        with pytest.raises(PluginError, match=f"{BLAME}.*`{part}` at block 7 .*{message}"):
            checked(Update(**{part: value}), monkeypatch)  # type: ignore[arg-type]


def test_a_value_that_is_not_an_update_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, torch.ones(6, 3), {"down": torch.ones(6, 3)}):
        with pytest.raises(PluginError, match=f"{BLAME}.* not an Update"):
            checked(value, monkeypatch)


def test_values_that_the_models_dtype_cannot_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Update(down=torch.full((6, 3), 1e5))
    assert checked(update, monkeypatch, torch.bfloat16) is update
    with pytest.raises(PluginError, match=r"`down` at block 7 .*float16"):
        checked(update, monkeypatch, torch.float16)


@pytest.mark.parametrize("error", ["error", "error_plain"])
def test_an_error_that_is_not_a_number_is_refused(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match=rf"`{error}` at block 7 is nan"):
        checked(Update(**{error: float("nan")}), monkeypatch)  # type: ignore[arg-type]


# --- the second pass -------------------------------------------------------------------------------------------------

HEAVY = frozenset(
    {
        GRAM,
        GRAM.held_out(),
        CROSS,
        CROSS.held_out(),
        SQUARES,
        SQUARES.held_out(),
        TOKEN_WEIGHTS,
        TOKEN_WEIGHTS.held_out(),
        FEED_FORWARD_INPUTS,
        FEED_FORWARD_INPUTS.held_out(),
        FEED_FORWARD_TARGETS,
        FEED_FORWARD_TARGETS.held_out(),
    }
)


class Recording(Compensator):
    """Record the statistics, and change the weights, so that the pruned stream differs from the dense one."""

    name: ClassVar[str] = "recording"
    requires: ClassVar[frozenset[Statistic]] = HEAVY
    statistics: ClassVar[dict[int, BlockStatistics]] = {}

    pruned: bool
    mix: float = 0.0

    def stream(self) -> Stream:
        return Stream.PRUNED if self.pruned else Stream.DENSE

    def target_mix(self) -> float:
        return self.mix

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        self.statistics[feed_forward.block] = statistics
        return Update(down=feed_forward.down[:, kept] * 1.5)


def only(decoder: Decoder, index: int) -> FeedForward:
    """Block ``index``'s only feed-forward."""
    (feed_forward,) = decoder.feed_forwards(index)
    return feed_forward


def down_projection(decoder: Decoder, index: int) -> Projection:
    """The module whose input are its channel activations."""
    (module,) = decoder.feed_forward_modules(index)
    assert isinstance(module, DenseFeedForward)
    return module.down


def module_of(decoder: Decoder, index: int) -> nn.Module:
    """The module that holds it."""
    (module,) = decoder.feed_forward_modules(index)
    return module.module


@torch.no_grad()
def record(decoder: Decoder, index: int) -> dict[str, Tensor]:
    """Record inputs and outputs of block ``index``, its feed-forward and its down projection, ``(N, T, ...)``."""
    modules = {
        "block": decoder.blocks[index],
        "feed_forward": module_of(decoder, index),
        "down": down_projection(decoder, index),
    }
    recorded: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def remember(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            recorded[f"{name} in"], recorded[f"{name} out"] = inputs[0].clone(), output.clone()

        return remember

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    decoder.model(WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    return recorded


def window_statistics(inputs: Tensor, targets: Tensor, weights: Tensor) -> dict[Statistic, Tensor]:
    """Split a feed-forward's inputs, targets and weights ``(N, T, ...)`` as collectors do: every tenth is held out."""
    held_out = torch.arange(1, len(inputs) + 1) % HELD_OUT_EVERY == 0
    return {
        FEED_FORWARD_INPUTS: inputs[~held_out].flatten(0, 1),
        FEED_FORWARD_INPUTS.held_out(): inputs[held_out].flatten(0, 1),
        FEED_FORWARD_TARGETS: targets[~held_out].flatten(0, 1),
        FEED_FORWARD_TARGETS.held_out(): targets[held_out].flatten(0, 1),
        TOKEN_WEIGHTS: weights[~held_out].flatten(),
        TOKEN_WEIGHTS.held_out(): weights[held_out].flatten(),
    }


def expected_statistics(cut_so_far: Decoder, dense: Decoder, index: int, mix: float) -> dict[Statistic, Tensor]:
    """Compute the statistics by whole forward passes of the model as it is cut so far, and of the dense one."""
    student, teacher = record(cut_so_far, index), record(dense, index)
    correction = mix * (teacher["block out"] - student["block out"])
    bias = down_projection(cut_so_far, index).bias
    target = student["down out"] - (0 if bias is None else bias.detach()) + correction  # (N, T, D)
    reference = teacher if mix else student
    weights = 1 / reference["block out"].square().sum(-1)  # (N, T)
    statistics = window_statistics(student["feed_forward in"], student["feed_forward out"] + correction, weights)
    for windows, gram, cross, squares in (
        (slice(None), GRAM, CROSS, SQUARES),
        (IS_HELD_OUT, GRAM.held_out(), CROSS.held_out(), SQUARES.held_out()),
    ):
        inputs, targets = student["down in"][windows].flatten(0, 1), target[windows].flatten(0, 1)
        weighted = inputs * weights[windows].flatten().unsqueeze(1)
        statistics[gram], statistics[cross], statistics[squares] = (
            weighted.mT @ inputs,
            targets.mT @ weighted,
            (weights[windows].flatten() * targets.square().sum(1)).sum(),
        )
    return statistics


def second_pass(
    decoder: Decoder, compensator: Compensator, plugins: Plugins, batch_size: int | None = 3
) -> SecondPassCompensation:
    chosen = ConfiguredComponent(compensator, Origin("test"))
    collectors = plugins.collectors_for(compensator.required())
    return SecondPassCompensation(
        decoder, WINDOWS, chosen, collectors, seed=0, forward_options=ForwardOptions(batch_size=batch_size)
    )


WIDTHS = [(40, 24, 56), (64, 40, 24), (40, 64, 24), (64, 64, 24), (24, 40, 64), (64, 40, 64)]
OTHER_FAMILIES = ["llama-bias", "phi3", "gemma2", "gemma3_text", "granite", "olmo2"]
SECOND_PASSES = [
    *[("llama", widths, mix) for widths in WIDTHS for mix in (0.0, 0.7, None)],
    *[(name, (64, 40, 24), mix) for name in OTHER_FAMILIES for mix in (0.7, None)],
]


@pytest.mark.parametrize(("name", "widths", "mix"), SECOND_PASSES, ids=str)
def test_the_second_pass_measures_each_block_behind_the_blocks_cut_so_far(
    name: str,
    widths: tuple[int, ...],
    mix: float | None,  # None: the dense stream
    make_model: MakeModel,
    open_tiny: OpenTiny,
    make_plan: MakePlan,
    plugins: Plugins,
) -> None:
    folder = make_model(name)
    (_, cut), (_, slow), (_, dense) = (open_tiny(folder) for _ in range(3))
    plan = make_plan(cut, widths)
    Recording.statistics.clear()
    cut_model(cut, plan, second_pass(cut, Recording(pruned=mix is not None, mix=mix or 0.0), plugins))
    assert sorted(Recording.statistics) == [index for index, width in enumerate(widths) if width < 64]
    (layout,) = cut.architecture.feed_forwards
    additive = layout.additive
    assert additive == (name in ("llama", "llama-bias", "phi3"))
    for index, block in enumerate(plan.blocks):
        if len(block.kept) == block.width:
            continue
        expected = (
            expected_statistics(dense, dense, index, 0.0)
            if mix is None
            else expected_statistics(slow, dense, index, mix if additive else 0.0)
        )
        measured = Recording.statistics[index]
        assert (measured.tokens, measured.held_out_tokens) == (480, 48)
        for statistic, value in expected.items():
            close = 1e-5 * value.abs().max().item()
            torch.testing.assert_close(measured[statistic], value, rtol=1e-3, atol=close, msg=f"{statistic}, {index}")
        kept = torch.tensor(block.kept)
        update = Update(down=only(slow, index).down[:, kept] * 1.5)
        cut_block(slow, index, [kept])
        apply_updates(slow, index, [update])
    for index in range(3):
        torch.testing.assert_close(only(cut, index).down, only(slow, index).down)


def test_each_stream_runs_only_as_often_as_it_is_needed(
    make_model: MakeModel, open_tiny: OpenTiny, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []

    def count(decoder: Decoder, index: int, batch: Batch) -> Tensor:
        runs.append(index)
        return run_block(decoder, index, batch)

    monkeypatch.setattr("cfsp_framework.engine.measure.run_block", count)
    monkeypatch.setattr("cfsp_framework.engine.replay.run_block", count)
    kept = torch.arange(32)
    for name, compensator, expected in (
        ("llama", Recording(pruned=False, mix=0.5), 3),
        ("llama", Recording(pruned=True), 3 + 2),  # the blocks before the last run again once they are cut
        ("llama", Recording(pruned=True, mix=0.5), 3 + 2 + 3),
        ("gemma2", Recording(pruned=True, mix=0.5), 3 + 2),
    ):
        _, decoder = open_tiny(make_model(name))
        compensation = second_pass(decoder, compensator, plugins, batch_size=20)
        runs.clear()
        for index in range(3):
            compensation.compensate(index, [kept])
            if index < 2:  # nothing is measured after the last one
                compensation.advance(index)
        assert len(runs) == expected, compensator


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_sequential_without_a_teacher_is_least_squares_on_the_pruned_stream(
    name: str, make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan, plugins: Plugins
) -> None:
    (_, cut), (_, slow) = (open_tiny(make_model(name)) for _ in range(2))
    plan = make_plan(cut, (40, 64, 24))
    cut_model(cut, plan, second_pass(cut, Sequential(mix=0.0), plugins))
    for index in (0, 2):
        kept = torch.tensor(plan.blocks[index].kept)
        statistics = BlockStatistics(expected_statistics(slow, slow, index, 0.0), 480, 48)
        update = LeastSquares().compensate(only(slow, index), kept, statistics)
        cut_block(slow, index, [kept])
        apply_updates(slow, index, [update])
    for index in (0, 2):
        actual, expected = only(cut, index).down, only(slow, index).down
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_compensation_brings_the_whole_model_nearer_to_the_dense_one(
    make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan, plugins: Plugins
) -> None:
    folder = make_model("llama-bias")
    _, dense = open_tiny(folder)
    plan, expected = make_plan(dense, (40, 40, 40)), record(dense, 2)["block out"]

    def stream_error(compensator: Compensator | None) -> float:
        """Return the squared difference of the residual stream after the last block of a cut model."""
        _, cut = open_tiny(folder)
        cut_model(cut, plan, second_pass(cut, compensator, plugins) if compensator else None)
        return (record(cut, 2)["block out"] - expected).square().sum().item()

    plain = stream_error(None)
    reconstruction = LocalReconstruction(steps=40, batch_tokens=128)
    for compensator in (Procrustes(), LeastSquares(), Sequential(mix=0.0), Sequential(), reconstruction):
        assert stream_error(compensator) < plain, repr(compensator)


@pytest.mark.parametrize("name", ["llama", "llama-bias", "phi3", "gemma2"])
def test_least_squares_lowers_the_calibration_error_of_every_block(
    name: str, make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan, plugins: Plugins
) -> None:
    folder = make_model(name)
    (_, cut), (_, dense) = open_tiny(folder), open_tiny(folder)
    plan = make_plan(cut, (40, 24, 56))
    updates = cut_model(cut, plan, second_pass(cut, LeastSquares(), plugins))
    for index, block in enumerate(plan.blocks):
        recorded, kept = record(dense, index), torch.tensor(block.kept)
        norms = recorded["block out"].norm(dim=-1, keepdim=True)  # (N, T, 1)
        update = updates[index, block.path]
        whole = Sample(only(dense, index), recorded["down in"] / norms)
        rounded = replace(update, down=weight(update).float())
        assert whole.error(whole.fit, kept, rounded) < whole.error(whole.fit, kept, Update())
        assert whole.error(whole.held_out, kept, rounded) < whole.error(whole.held_out, kept, Update())
        assert whole.error(whole.held_out, kept, rounded) == pytest.approx(update.error, rel=1e-3)
        assert torch.equal(only(cut, index).down, weight(update).to(only(dense, index).down.dtype))


# --- local reconstruction --------------------------------------------------------------------------------------------


def test_the_weights_compute_what_the_models_own_feed_forward_does(
    family: str, make_model: MakeModel, open_tiny: OpenTiny
) -> None:
    _, decoder = open_tiny(make_model(family))
    inputs = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    for index, kept in enumerate((torch.arange(64), torch.tensor([0, 5, 63]), torch.arange(0, 64, 3))):
        output = Weights.of(only(decoder, index), kept).output(inputs)
        cut_block(decoder, index, [kept])
        with torch.no_grad():
            torch.testing.assert_close(output, module_of(decoder, index)(inputs), rtol=1e-5, atol=1e-6)


def test_an_activation_works_without_a_gate() -> None:
    draw = torch.Generator().manual_seed(0)
    up, down, inputs = (torch.randn(*shape, generator=draw) for shape in ((9, 4), (4, 9), (7, 4)))
    block = FeedForward(0, "mlp", up, down, "relu", up_bias=torch.ones(9), down_bias=torch.ones(4))
    kept = torch.tensor([1, 4, 8])
    weights = Weights.of(block, kept)
    expected = (inputs @ up[kept].T + 1).relu() @ down[:, kept].T + 1
    torch.testing.assert_close(weights.output(inputs), expected)
    assert len(weights.tensors()) == 4
    even = torch.ones(7, 1)
    assert weights.error(CalibrationTokens(inputs, expected + 2, even)) == pytest.approx(4.0, rel=1e-5)


HALF = torch.arange(0, 64, 2)


@dataclass(frozen=True)
class Trial:
    """A dense feed-forward of a tiny model with inputs, and its outputs as targets."""

    block: FeedForward
    inputs: Tensor  # (N, T, D)
    targets: Tensor

    def reconstruct(self, compensator: Compensator) -> Update:
        values = window_statistics(self.inputs, self.targets, torch.ones(self.inputs.shape[:2]))
        tokens = self.inputs.shape[0] * self.inputs.shape[1]
        statistics = BlockStatistics(values, tokens, 24 * (len(self.inputs) // HELD_OUT_EVERY))
        return compensate(ConfiguredComponent(compensator, Origin("test")), self.block, HALF, statistics)

    def error(self, weights: Weights) -> float:
        """Return the mean squared error on the held-out windows, or on the last tenth of the tokens."""
        windows = range(len(self.inputs))[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        inputs, targets = self.inputs.flatten(0, 1), self.targets.flatten(0, 1)  # (n, D)
        if windows:
            inputs, targets = self.inputs[list(windows)], self.targets[list(windows)]
        else:
            last = -(-len(inputs) // HELD_OUT_EVERY)
            inputs, targets = inputs[-last:], targets[-last:]
        return (weights.output(inputs) - targets).square().mean().item()

    def updated(self, update: Update) -> Weights:
        """Return the kept weights with the update's in their place."""
        parts = ("up", "down", "gate", "up_bias", "gate_bias", "down_bias")
        changed = {part: value for part in parts if (value := getattr(update, part)) is not None}
        return replace(Weights.of(self.block, HALF), **changed)


MakeTrial = Callable[..., Trial]


@pytest.fixture
def make_trial(make_model: MakeModel, open_tiny: OpenTiny) -> MakeTrial:
    """``make_trial(name, windows=20, dtype="float32")``: the feed-forward of block 1 of a tiny model."""

    def make(name: str, windows: int = 20, **settings: str) -> Trial:
        _, decoder = open_tiny(make_model(name, **settings))
        recorded = record(decoder, 1)
        inputs, targets = (recorded[f"feed_forward {side}"][:windows].float() for side in ("in", "out"))
        return Trial(only(decoder, 1), inputs, targets)

    return make


QUICK = LocalReconstruction(steps=30, batch_tokens=64, check_every=10)


@pytest.mark.parametrize("name", ["llama", "llama-bias", "phi3"])
def test_reconstruction_lowers_the_held_out_error_below_least_squares(name: str, make_trial: MakeTrial) -> None:
    trial = make_trial(name)
    update = trial.reconstruct(QUICK)
    scale = trial.targets[IS_HELD_OUT].square().mean().item()
    error, error_plain = errors(update)
    assert error == pytest.approx(trial.error(trial.updated(update)) / scale, rel=1e-5)
    assert error_plain == pytest.approx(trial.error(Weights.of(trial.block, HALF)) / scale, rel=1e-5)
    start, _ = errors(trial.reconstruct(LocalReconstruction(steps=1, learning_rate=1e-30)))
    assert error < start <= error_plain
    assert update.up is not None
    assert update.gate is not None
    assert (update.up.shape, update.gate.shape) == ((32, 32), (32, 32))
    assert not torch.equal(update.up, trial.block.up[HALF])
    biases = (update.down_bias, update.up_bias, update.gate_bias)
    assert [bias is None for bias in biases] == [name != "llama-bias"] * 3


@pytest.mark.parametrize("name", ["llama", "llama-bias", "phi3"])
def test_a_reconstructed_block_has_the_planned_width_and_computes_the_trained_weights(
    name: str, make_trial: MakeTrial, make_model: MakeModel, open_tiny: OpenTiny
) -> None:
    trial = make_trial(name)
    _, decoder = open_tiny(make_model(name))
    update = trial.reconstruct(QUICK)
    cut_block(decoder, 1, [HALF])
    apply_updates(decoder, 1, [update])
    module = module_of(decoder, 1)
    assert decoder.widths == (64, 32, 64)
    with torch.no_grad():
        output = module(trial.inputs)
    torch.testing.assert_close(output, trial.updated(update).output(trial.inputs), rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())


def tensors(update: Update) -> list[Tensor]:
    return [value for part in ("up", "down", "gate") if (value := getattr(update, part)) is not None]


def test_reconstruction_is_deterministic_for_a_seed_and_a_block(make_trial: MakeTrial) -> None:
    trial = make_trial("llama")
    inputs = (trial.block.up, trial.block.down, trial.inputs, trial.targets)
    before = [tensor.clone() for tensor in inputs]
    first = trial.reconstruct(QUICK)
    torch.manual_seed(99)  # global random numbers neither matter nor change
    state = torch.get_rng_state()
    again = trial.reconstruct(QUICK)
    assert torch.equal(state, torch.get_rng_state())
    assert errors(first) == errors(again)
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True))
    for other in (replace(trial.block, seed=1), replace(trial.block, block=2)):
        moved = replace(trial, block=other).reconstruct(QUICK)
        assert not any(torch.equal(a, b) for a, b in zip(tensors(first), tensors(moved), strict=True))
    assert all(torch.equal(old, new) for old, new in zip(before, inputs, strict=True))


@pytest.mark.parametrize("windows", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("rate", [1e-30, 1e-3, 1.0, 1e30])
def test_reconstruction_never_raises_the_held_out_error(windows: int, rate: float, make_trial: MakeTrial) -> None:
    trial = make_trial("llama-bias", windows)
    update = trial.reconstruct(LocalReconstruction(steps=4, learning_rate=rate, check_every=1, batch_tokens=16))
    error, error_plain = errors(update)
    if update.down is None:
        assert refused(update)
    else:
        assert trial.error(trial.updated(update)) < trial.error(Weights.of(trial.block, HALF))
        assert error < error_plain


def test_a_reconstruction_that_raises_the_held_out_error_is_refused(make_trial: MakeTrial) -> None:
    trial = make_trial("llama")
    trial.targets[IS_HELD_OUT] = Weights.of(trial.block, HALF).output(trial.inputs[IS_HELD_OUT])  # plain is perfect
    update = trial.reconstruct(QUICK)
    assert refused(update)
    assert update.error_plain == pytest.approx(0, abs=1e-12)


def test_targets_of_zero_do_not_divide_by_zero(make_trial: MakeTrial) -> None:
    trial = make_trial("llama")
    silent = replace(trial, block=replace(trial.block, down=trial.block.down * 0), targets=trial.targets * 0)
    assert silent.reconstruct(QUICK) == Update(error_plain=0.0, error=0.0)


def test_half_precision_blocks_are_trained_in_float32(make_trial: MakeTrial) -> None:
    update = make_trial("phi3", dtype="bfloat16").reconstruct(QUICK)
    error, error_plain = errors(update)
    assert error < error_plain
    assert {value.dtype for value in tensors(update)} == {torch.float32}


# --- whole runs ------------------------------------------------------------------------------------------------------


Run = Callable[..., RunResult]


@pytest.fixture
def run(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> Run:
    """``run(preset, out, model="llama", plan=None, **options)``: prune a tiny model into a folder of this name."""

    def start(preset: str, out: str, model: str = "llama", plan: PruningPlan | None = None, **options: object) -> Any:
        chosen: dict[str, object] = {"samples": 20, "seqlen": 32, "round_to": 8, "device": "cpu", **options}
        chosen |= {"model": str(make_model(model)), "calibration": str(calibration_text)}
        return prune(layered(preset, None, chosen), tmp_path / out, plan=plan)

    return start


FEW_STEPS = "local-reconstruction:steps=6,batch_tokens=128,check_every=3"


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "llama-bias"])
@pytest.mark.parametrize(
    ("preset", "options"), [("cfsp-closed-form", {}), ("cfsp-refined", {"compensator": FEW_STEPS})]
)
def test_the_presets_run_and_their_checkpoints_open_again(
    preset: str, options: dict[str, object], name: str, run: Run, make_model: MakeModel, open_tiny: OpenTiny
) -> None:
    result = run(preset, "out", name, **options)
    assert sum(result.plan.widths) == 96
    assert all(width % 8 == 0 for width in result.plan.widths)
    assert result.report.reload_difference < 1e-5
    few = [note for note in result.report.notes if "calibration tokens are few" in note]
    assert len(few) == (preset == "cfsp-closed-form")
    (_, cut), (_, dense) = open_tiny(result.folder), open_tiny(make_model(name))
    assert cut.widths == result.plan.widths
    kept = torch.tensor(result.plan.blocks[0].kept)
    assert not torch.equal(only(cut, 0).down, only(dense, 0).down[:, kept])
    trained = preset == "cfsp-refined"
    assert torch.equal(only(cut, 0).up, only(dense, 0).up[kept]) != trained
    assert result.plan.components["criterion"].startswith("obs:")


def test_a_run_by_its_plan_gives_the_same_weights(run: Run) -> None:
    first = run("cfsp-closed-form", "first")
    second = run("cfsp-closed-form", "second", plan=first.plan)
    assert same_weights(first.folder, second.folder)


@pytest.mark.parametrize("compensator", ["least-squares", "least-squares-bias", "procrustes", "sequential", FEW_STEPS])
def test_the_report_names_blocks_whose_compensation_was_refused(
    compensator: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run("cfsp-refined", "plain", compensator="none")
    assert plain.report.notes == ()
    for module in ("least_squares", "least_squares_bias", "procrustes", "sequential"):
        monkeypatch.setattr(f"cfsp_plugins.compensators.{module}.output_error", lambda *_: 1.0)
    monkeypatch.setattr(Weights, "error", lambda *_: 1.0)
    refused = run("cfsp-refined", "refused", compensator=compensator)
    [note] = refused.report.notes
    assert note.startswith(compensator.partition(":")[0])
    assert "block 0, 1, 2" in note
    assert same_weights(plain.folder, refused.folder), "no bias was added either"


def test_few_tokens_are_noted(run: Run) -> None:
    report = run("cfsp-closed-form", "out", samples=10, seqlen=3).report
    assert any("15 calibration tokens are few for blocks of 64 channels" in note for note in report.notes)
    assert report.reload_difference < 1e-5


def test_a_bias_is_counted_where_some_blocks_take_one(run: Run) -> None:
    report = run("cfsp-closed-form", "out", compensator="least-squares-bias").report
    assert "mlp.down_proj" in report.notes[-1]
    assert "96 parameters" in report.notes[-1]
    assert report.reload_difference < 1e-5


def heavy_config(model: Path, text: Path, **options: object) -> RunConfig:
    return RunConfig.build(model=str(model), calibration=str(text), samples=4, seqlen=16, device="cpu", **options)


def test_heavy_statistics_of_a_compensator_are_measured_in_the_second_pass_only(
    make_model: MakeModel, calibration_text: Path, plugins: Plugins
) -> None:
    config = heavy_config(make_model("llama"), calibration_text, criterion="magnitude", allocator="uniform")
    for name, first, second in (
        ("none", [], []),
        ("bias", ["down-input-mean"], []),
        ("least-squares", [], ["down-input-gram-relative", "down-input-gram-relative-held-out"]),
        (
            "local-reconstruction",
            [],
            [
                *("feed-forward-inputs", "feed-forward-inputs-held-out"),
                *("feed-forward-targets", "feed-forward-targets-held-out"),
                *("token-weights", "token-weights-held-out"),
            ],
        ),
    ):
        chosen = config.replace(compensator=name)
        for planned in (False, True):
            selection = select(chosen, plugins, planned=planned)
            assert [collector.component.name for collector in selection.collectors] == first
            assert [collector.component.name for collector in selection.second_pass] == second
    refined = select(layered("cfsp-refined", None, {"model": "x"}), plugins)
    assert {collector.component.name for collector in refined.collectors} == {"down-input-gram-relative"}
    foreign = replace(refined.second_pass[0], origin=Origin("theirs", "their-package", "2"))
    assert replace(refined, second_pass=(foreign,)).distributions()["their-package"] == "2"


def test_a_plan_needs_no_second_pass(make_model: MakeModel, calibration_text: Path) -> None:
    config = heavy_config(make_model("llama"), calibration_text, criterion="obs", allocator="error-curve", round_to=8)
    plan = plan_only(config)
    assert sum(plan.widths) == 96
    compensated = plan_only(config.replace(compensator="sequential"))
    assert [block.kept for block in compensated.blocks] == [block.kept for block in plan.blocks]


def test_a_killed_run_resumes_after_its_finished_blocks(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"compensator": FEW_STEPS, "resume": tmp_path / "state"}
    whole = run("cfsp-refined", "whole", compensator=FEW_STEPS)
    compensated: list[int] = []
    original = LocalReconstruction.compensate

    def counted(self: LocalReconstruction, feed_forward: FeedForward, *rest: Any) -> Update:
        if len(compensated) == 2:
            raise KeyboardInterrupt
        compensated.append(feed_forward.block)
        return original(self, feed_forward, *rest)

    monkeypatch.setattr(LocalReconstruction, "compensate", counted)
    with pytest.raises(KeyboardInterrupt):
        run("cfsp-refined", "cut", **options)
    assert not (tmp_path / "cut").exists()
    compensated.clear()
    resumed = run("cfsp-refined", "cut", **options)
    assert compensated == [2], "the first two blocks are read, not trained again"
    assert same_weights(whole.folder, resumed.folder)
    compensated.clear()
    with pytest.raises(KeyboardInterrupt):  # at its third block: nothing is kept for another seed
        run("cfsp-refined", "other", **options, seed=1)
    assert compensated == [0, 1]
