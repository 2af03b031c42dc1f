"""Compensation: what the kept weights become, on which stream it is measured, and that it never makes things worse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
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
    DOWN_CROSS_HELD_OUT,
    DOWN_INPUT_GRAM,
    DOWN_INPUT_GRAM_HELD_OUT,
    DOWN_INPUT_MEAN,
    DOWN_INPUT_MEAN_HELD_OUT,
    DOWN_TARGET_SQUARES,
    DOWN_TARGET_SQUARES_HELD_OUT,
    FEED_FORWARD_INPUTS,
    FEED_FORWARD_INPUTS_HELD_OUT,
    FEED_FORWARD_TARGETS,
    FEED_FORWARD_TARGETS_HELD_OUT,
)
from cfsp_plugins.least_squares import LeastSquares, LeastSquaresBias, Procrustes, Sequential, guarded
from cfsp_plugins.local_reconstruction import LocalReconstruction, Weights
from helpers.types import MakeModel, MakePlan, OpenTiny

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
        kept = torch.arange(1, len(self.inputs) + 1) % HELD_OUT_EVERY != 0
        return self.inputs[kept].flatten(0, 1)

    @property
    def held_out(self) -> Tensor:
        return self.inputs[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY].flatten(0, 1)

    @property
    def statistics(self) -> BlockStatistics:
        """What the collectors would give on the dense stream."""
        inputs, held_out = self.inputs.flatten(0, 1), self.held_out
        down = self.block.down.double()
        gram, judge = inputs.mT @ inputs, held_out.mT @ held_out
        values = {
            DOWN_INPUT_GRAM: gram,
            DOWN_INPUT_GRAM_HELD_OUT: judge,
            DOWN_CROSS: down @ gram,
            DOWN_CROSS_HELD_OUT: down @ judge,
            DOWN_TARGET_SQUARES: ((down @ gram) * down).sum(),
            DOWN_TARGET_SQUARES_HELD_OUT: ((down @ judge) * down).sum(),
            DOWN_INPUT_MEAN: inputs.mean(0),
            DOWN_INPUT_MEAN_HELD_OUT: held_out.mean(0) if len(held_out) else inputs[0] * 0,
        }
        return BlockStatistics(values, len(inputs), len(held_out))

    def dense(self, inputs: Tensor) -> Tensor:
        """The feed-forward's output ``(n, D)``."""
        bias = 0 if self.block.down_bias is None else self.block.down_bias
        return inputs @ self.block.down.mT + bias

    def pruned(self, inputs: Tensor, kept: Tensor, update: Update) -> Tensor:
        """The narrowed feed-forward's output with the update's weights."""
        down = self.block.down[:, kept] if update.down is None else update.down
        bias = self.block.down_bias if update.down_bias is None else update.down_bias
        return inputs[:, kept] @ down.mT + (0 if bias is None else bias)

    def error(self, inputs: Tensor, kept: Tensor, update: Update) -> float:
        """Squared error of the output over that of the dense output without its bias."""
        whole = (inputs @ self.block.down.mT).square().sum().item()
        return (self.dense(inputs) - self.pruned(inputs, kept, update)).square().sum().item() / whole

    def answer(self, compensator: Compensator, kept: Tensor) -> Update:
        """As the host asks."""
        return compensate(ConfiguredComponent(compensator, Origin("test")), self.block, kept, self.statistics)


def sample(
    windows: int = 20, tokens: int = 12, width: int = 16, hidden: int = 6, seed: int = 0, *, biased: bool = False
) -> Sample:
    """Channels that resemble each other and have means, in float64."""
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


@pytest.mark.parametrize("compensator", CLOSED_FORM, ids=repr)
@untimed
@given(sample=SAMPLES, data=st.data())
def test_closed_form_compensation_never_raises_the_calibration_or_the_held_out_error(
    compensator: Compensator, sample: Sample, data: st.DataObject
) -> None:
    width = sample.block.width
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, width - 1), min_size=1))))
    update = sample.answer(compensator, kept)
    plain = Update()
    if len(kept) == width:
        assert update == plain, "where nothing is lost nobody is asked"
        update = compensator.compensate(sample.block, kept, sample.statistics)
    assert update.error is not None
    assert update.error_plain is not None
    judged = sample.held_out if len(sample.held_out) else sample.fit
    assert update.error_plain == pytest.approx(sample.error(judged, kept, plain), rel=1e-6, abs=1e-9)
    if update == replace(plain, error=update.error, error_plain=update.error_plain):
        assert not update.error < update.error_plain, "refused for no reason"
        return
    assert update.error < update.error_plain
    assert update.error == pytest.approx(sample.error(judged, kept, update), rel=1e-6, abs=1e-9)
    if compensator.name != "least-squares-bias" or len(sample.fit) > 2:  # the covariance of one token is 0
        fitted = sample.error(sample.fit, kept, update)
        assert fitted <= sample.error(sample.fit, kept, plain) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("compensator", CLOSED_FORM, ids=repr)
def test_with_enough_tokens_every_compensator_helps(compensator: Compensator) -> None:
    many = sample(windows=40, tokens=20)
    update = many.answer(compensator, EVEN)
    assert update.down is not None
    assert update.error is not None
    assert update.error_plain is not None
    assert update.error < 0.9 * update.error_plain


def test_least_squares_beats_what_it_contains() -> None:
    many = sample(windows=40, tokens=20, biased=True)
    plain, centred, rotated = (
        many.error(many.fit, EVEN, many.answer(compensator, EVEN))
        for compensator in (LeastSquares(damping=1e-9), LeastSquaresBias(damping=1e-9), Procrustes())
    )
    lost = many.block.down[:, EVEN + 1] @ many.fit[:, EVEN + 1].mean(0)
    assert many.block.down_bias is not None
    assert plain < rotated
    assert centred < plain
    assert centred < many.error(many.fit, EVEN, Update(down_bias=many.block.down_bias + lost))


def test_sequential_on_the_dense_stream_s_own_target_is_least_squares() -> None:
    one = sample()
    sequential, plain = one.answer(Sequential(mix=0.0), EVEN), one.answer(LeastSquares(), EVEN)
    assert sequential.down is not None
    assert plain.down is not None
    torch.testing.assert_close(sequential.down, plain.down, rtol=1e-9, atol=1e-9)
    assert sequential.error == pytest.approx(plain.error, rel=1e-6)
    assert sequential.error_plain == pytest.approx(plain.error_plain, rel=1e-6)


def silent_when_held_out(removed: Tensor) -> Sample:
    """Removed channels that matter on the fitting windows and are 0 on the held-out ones: plain pruning is perfect."""
    one = sample()
    inputs = one.inputs.clone()
    held_out = inputs[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    held_out[..., removed] = 0
    return replace(one, inputs=inputs)


@pytest.mark.parametrize("compensator", CLOSED_FORM, ids=repr)
def test_a_block_whose_held_out_error_does_not_fall_keeps_plain_pruning(compensator: Compensator) -> None:
    update = silent_when_held_out(EVEN + 1).answer(compensator, EVEN)
    assert update.error_plain == pytest.approx(0, abs=1e-12)
    assert update.error is not None
    assert update.error > 0
    assert update == Update(error_plain=update.error_plain, error=update.error)


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
    assert update.down is not None
    assert (update.down.item(), update.error_plain, update.error) == (1.0, 0.5, 0.25)
    tried.clear()
    update = guarded(fit, error_above(1e9), 4.0, 8.0, 1e-3)
    assert tried == pytest.approx([1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2])
    assert update == Update(error_plain=0.5, error=0.75)
    update = guarded(lambda damping: torch.ones(1, 1), lambda down: float("nan"), 4.0, 8.0, 1e-3)
    assert update == Update(error_plain=0.5, error=0.5), "an error that is no number is no improvement"

    def exhausted(damping: float) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):  # a RuntimeError as well, but no reason to prune without compensation
        guarded(exhausted, error_above(0.5), 4.0, 8.0, 1e-3)


@pytest.mark.parametrize("compensator", CLOSED_FORM, ids=repr)
@pytest.mark.parametrize("what", ["weights", "activations", "held-out activations"])
def test_a_feed_forward_that_outputs_nothing_is_left_alone(compensator: Compensator, what: str) -> None:
    one = sample()
    if what == "weights":
        one = replace(one, block=replace(one.block, down=one.block.down * 0))
    else:
        silent = torch.ones(20, 1, 1) if what == "activations" else IS_HELD_OUT[:, None, None]
        one = replace(one, inputs=one.inputs * (1 - silent.double()))
    update = one.answer(compensator, EVEN)
    assert (update.down, update.down_bias) == (None, None)
    assert update.error_plain == 0


def test_least_squares_bias_matches_the_mean_output() -> None:
    for biased in (False, True):
        one = sample(windows=40, biased=biased)
        update = one.answer(LeastSquaresBias(), EVEN)
        assert update.down_bias is not None
        means = [output.mean(0) for output in (one.dense(one.fit), one.pruned(one.fit, EVEN, update))]
        torch.testing.assert_close(means[1], means[0], rtol=1e-9, atol=1e-9)


def test_least_squares_bias_is_the_centred_least_squares_fit() -> None:
    one = sample(windows=40)
    update = one.answer(LeastSquaresBias(damping=1e-12), EVEN)
    design = torch.cat([one.fit[:, EVEN], torch.ones(len(one.fit), 1, dtype=torch.float64)], 1)  # (n, K + 1)
    expected = torch.linalg.lstsq(design, one.dense(one.fit)).solution  # (K + 1, D)
    assert update.down is not None
    assert update.down_bias is not None
    torch.testing.assert_close(update.down, expected[:-1].mT, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(update.down_bias, expected[-1], rtol=1e-6, atol=1e-8)


def test_procrustes_is_the_best_rotation_and_scale_of_the_kept_output() -> None:
    one = sample(windows=40)
    update = one.answer(Procrustes(), EVEN)
    assert update.down is not None
    own = one.block.down[:, EVEN]  # (D, K), D < K
    turned = update.down @ torch.linalg.pinv(own)  # s Q
    scale = torch.linalg.matrix_norm(turned, 2)
    torch.testing.assert_close(turned @ turned.mT, scale.square() * torch.eye(6, dtype=torch.float64))
    best = one.error(one.fit, EVEN, update)
    draw = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.3):
        for _ in range(10):
            skew = size * torch.randn(6, 6, generator=draw, dtype=torch.float64)
            near = torch.linalg.matrix_exp(skew - skew.mT) @ update.down
            assert one.error(one.fit, EVEN, Update(down=near)) >= best
            factor = 1 + size * torch.randn(1, generator=draw, dtype=torch.float64)
            assert one.error(one.fit, EVEN, Update(down=factor * update.down)) >= best


# --- what the host checks --------------------------------------------------------------------------------------------


class Answering(Compensator):
    """Answers whatever it was told to."""

    name: ClassVar[str] = "answering"
    answer: ClassVar[object] = Update()

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        return self.answer  # type: ignore[return-value]


KEPT = torch.tensor([0, 3, 5])
SHAPES = {"down": (6, 3), "down_bias": (6,), "up": (3, 6), "gate": (3, 6), "up_bias": (3,), "gate_bias": (3,)}


def ask(answer: object, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> Update:
    monkeypatch.setattr(Answering, "answer", answer)
    block = sample().block
    block = replace(block, block=7, down=block.down.to(dtype), up=block.up.to(dtype))
    return compensate(
        ConfiguredComponent(Answering(), Origin("their-plugin", "their-package", "1.2")),
        block,
        KEPT,
        BlockStatistics({}, 0),
    )


@pytest.mark.parametrize("part", SHAPES)
def test_a_wrong_answer_names_the_plugin_the_tensor_and_the_block(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[part]
    right = torch.ones(shape)
    assert ask(Update(**{part: right}), monkeypatch) == Update(**{part: right})  # type: ignore[arg-type]
    infinite = right.clone()
    infinite.view(-1)[1] = float("inf")
    wrong: list[tuple[object, str]] = [
        (right[..., :-1], r"has shape .*, not "),
        (right[None], r"has shape .*, not "),
        (right * float("nan"), "has values that are not finite"),
        (infinite, "has values that are not finite"),
        ([1.0, 2.0], "is a list, not a tensor"),
    ]
    for value, message in wrong:
        with pytest.raises(
            PluginError, match=rf"'answering'.*their-plugin.*their-package 1.2.*`{part}` at block 7 {message}"
        ):
            ask(Update(**{part: value}), monkeypatch)  # type: ignore[arg-type]


def test_what_is_no_update_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (None, torch.ones(6, 3), {"down": torch.ones(6, 3)}):
        with pytest.raises(PluginError, match=r"'answering'.*their-plugin.* returned .*, not an Update"):
            ask(answer, monkeypatch)


def test_what_the_models_dtype_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Update(down=torch.full((6, 3), 1e5))
    assert ask(update, monkeypatch, torch.bfloat16) is update
    with pytest.raises(PluginError, match=r"`down` at block 7 has values that are not finite in float16"):
        ask(update, monkeypatch, torch.float16)


@pytest.mark.parametrize("error", ["error", "error_plain"])
def test_an_error_that_is_no_number_is_refused(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match=rf"`{error}` at block 7 is nan"):
        ask(Update(**{error: float("nan")}), monkeypatch)  # type: ignore[arg-type]


# --- the second pass -------------------------------------------------------------------------------------------------

HEAVY = frozenset(
    {
        DOWN_INPUT_GRAM,
        DOWN_INPUT_GRAM_HELD_OUT,
        DOWN_CROSS,
        DOWN_CROSS_HELD_OUT,
        DOWN_TARGET_SQUARES,
        DOWN_TARGET_SQUARES_HELD_OUT,
        FEED_FORWARD_INPUTS,
        FEED_FORWARD_INPUTS_HELD_OUT,
        FEED_FORWARD_TARGETS,
        FEED_FORWARD_TARGETS_HELD_OUT,
    }
)


class Listening(Compensator):
    """Keeps what it is given, and changes something, so that the streams tell pruned from dense."""

    name: ClassVar[str] = "listening"
    requires: ClassVar[frozenset[Statistic]] = HEAVY
    seen: ClassVar[dict[int, BlockStatistics]] = {}

    pruned: bool
    mix: float = 0.0

    def stream(self) -> Stream:
        return Stream.PRUNED if self.pruned else Stream.DENSE

    def target_mix(self) -> float:
        return self.mix

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        self.seen[feed_forward.block] = statistics
        return changed(feed_forward, kept)


def changed(feed_forward: FeedForward, kept: Tensor) -> Update:
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
def heard(decoder: Decoder, index: int) -> dict[str, Tensor]:
    """What goes in and out of block ``index``, its feed-forward and its down projection on WINDOWS, ``(N, T, ...)``."""
    modules = {
        "block": decoder.blocks[index],
        "feed_forward": module_of(decoder, index),
        "down": down_projection(decoder, index),
    }
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def remember(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[f"{name} in"], seen[f"{name} out"] = inputs[0].clone(), output.clone()

        return remember

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    decoder.model(WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def window_statistics(inputs: Tensor, targets: Tensor) -> dict[Statistic, Tensor]:
    """A feed-forward's inputs and targets ``(N, T, D)`` as the collectors give them: every tenth window apart."""
    held_out = torch.arange(1, len(inputs) + 1) % HELD_OUT_EVERY == 0
    return {
        FEED_FORWARD_INPUTS: inputs[~held_out].flatten(0, 1),
        FEED_FORWARD_INPUTS_HELD_OUT: inputs[held_out].flatten(0, 1),
        FEED_FORWARD_TARGETS: targets[~held_out].flatten(0, 1),
        FEED_FORWARD_TARGETS_HELD_OUT: targets[held_out].flatten(0, 1),
    }


def expected_statistics(cut_so_far: Decoder, dense: Decoder, index: int, mix: float) -> dict[Statistic, Tensor]:
    """The long way: whole forwards of the model as it is cut by now, and of the dense one."""
    own, teacher = heard(cut_so_far, index), heard(dense, index)
    correction = mix * (teacher["block out"] - own["block out"])
    bias = down_projection(cut_so_far, index).bias
    target = own["down out"] - (0 if bias is None else bias.detach()) + correction  # (N, T, D)
    found = window_statistics(own["feed_forward in"], own["feed_forward out"] + correction)
    for windows, gram, cross, squares in (
        (slice(None), DOWN_INPUT_GRAM, DOWN_CROSS, DOWN_TARGET_SQUARES),
        (IS_HELD_OUT, DOWN_INPUT_GRAM_HELD_OUT, DOWN_CROSS_HELD_OUT, DOWN_TARGET_SQUARES_HELD_OUT),
    ):
        inputs, targets = own["down in"][windows].flatten(0, 1), target[windows].flatten(0, 1)
        found[gram], found[cross], found[squares] = inputs.mT @ inputs, targets.mT @ inputs, targets.square().sum()
    return found


def second_pass(
    decoder: Decoder, compensator: Compensator, plugins: Plugins, batch_size: int | None = 3
) -> SecondPassCompensation:
    chosen = ConfiguredComponent(compensator, Origin("test"))
    collectors = plugins.collectors_for(compensator.required())
    return SecondPassCompensation(
        decoder, WINDOWS, chosen, collectors, seed=0, forward_options=ForwardOptions(batch_size=batch_size)
    )


def compensated(decoder: Decoder, plan: PruningPlan, compensator: Compensator, plugins: Plugins) -> None:
    """Cut the model by the plan, compensated in a second pass."""
    cut_model(decoder, plan, second_pass(decoder, compensator, plugins))


SOME_BLOCKS = [(40, 24, 56), (64, 40, 24), (40, 64, 24), (64, 64, 24), (24, 40, 64), (64, 40, 64)]


@pytest.mark.parametrize("widths", SOME_BLOCKS, ids=str)
@pytest.mark.parametrize("mix", [0.0, 0.7, None])
def test_the_second_pass_measures_each_block_where_it_stands(
    widths: tuple[int, ...],
    mix: float | None,
    make_model: MakeModel,
    open_tiny: OpenTiny,
    make_plan: MakePlan,
    plugins: Plugins,
) -> None:
    check_second_pass("llama", widths, mix, make_model, open_tiny, make_plan, plugins)


@pytest.mark.parametrize("name", ["llama-bias", "phi3", "gemma2", "gemma3_text", "granite", "olmo2"])
@pytest.mark.parametrize("mix", [0.7, None])
def test_the_second_pass_of_other_families(
    name: str,
    mix: float | None,
    make_model: MakeModel,
    open_tiny: OpenTiny,
    make_plan: MakePlan,
    plugins: Plugins,
) -> None:
    check_second_pass(name, (64, 40, 24), mix, make_model, open_tiny, make_plan, plugins)


def check_second_pass(
    name: str,
    widths: tuple[int, ...],
    mix: float | None,
    make_model: MakeModel,
    open_tiny: OpenTiny,
    make_plan: MakePlan,
    plugins: Plugins,
) -> None:
    """Compare with whole forwards; ``mix`` None is the dense stream."""
    folder = make_model(name)
    (_, cut), (_, slow), (_, dense) = (open_tiny(folder) for _ in range(3))
    plan = make_plan(cut, widths)
    Listening.seen.clear()
    compensated(cut, plan, Listening(pruned=mix is not None, mix=mix or 0.0), plugins)
    assert sorted(Listening.seen) == [index for index, width in enumerate(widths) if width < 64]
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
        found = Listening.seen[index]
        assert (found.tokens, found.held_out_tokens) == (480, 48)
        for statistic, value in expected.items():
            close = 1e-5 * value.abs().max().item()
            torch.testing.assert_close(found[statistic], value, rtol=1e-3, atol=close, msg=f"{statistic}, {index}")
        kept = torch.tensor(block.kept)
        update = changed(only(slow, index), kept)
        cut_block(slow, index, [kept])
        apply_updates(slow, index, [update])
    for index in range(3):
        torch.testing.assert_close(only(cut, index).down, only(slow, index).down)


def test_the_dense_model_takes_no_teacher_where_none_is_needed(
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
        ("llama", Listening(pruned=False, mix=0.5), 3),
        ("llama", Listening(pruned=True), 3 + 2),  # the blocks before the last run again once they are cut
        ("llama", Listening(pruned=True, mix=0.5), 3 + 2 + 3),
        ("gemma2", Listening(pruned=True, mix=0.5), 3 + 2),
    ):
        _, decoder = open_tiny(make_model(name))
        answer = second_pass(decoder, compensator, plugins, batch_size=20)
        runs.clear()
        for index in range(3):
            answer.compensate(index, [kept])
            if index < 2:  # nothing is measured after the last one
                answer.advance(index)
        assert len(runs) == expected, compensator


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_sequential_without_a_teacher_is_least_squares_on_the_pruned_stream(
    name: str, make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan, plugins: Plugins
) -> None:
    folder = make_model(name)
    (_, cut), (_, slow) = open_tiny(folder), open_tiny(folder)
    plan = make_plan(cut, (40, 64, 24))
    compensated(cut, plan, Sequential(mix=0.0), plugins)
    for index in (0, 2):
        kept = torch.tensor(plan.blocks[index].kept)
        statistics = BlockStatistics(expected_statistics(slow, slow, index, 0.0), 480, 48)
        update = LeastSquares().compensate(only(slow, index), kept, statistics)
        assert update.down is not None
        cut_block(slow, index, [kept])
        apply_updates(slow, index, [update])
    for index in (0, 2):
        found, expected = only(cut, index).down, only(slow, index).down
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def stream_error(cut: Decoder, dense: Decoder, windows: Tensor | None = None) -> float:
    """Relative squared difference of the residual streams that leave the last block."""
    chosen = slice(None) if windows is None else windows
    found, expected = (heard(decoder, 2)["block out"][chosen] for decoder in (cut, dense))
    return ((found - expected).square().sum() / expected.square().sum()).item()


def test_compensation_brings_the_whole_model_nearer_to_the_dense_one(
    make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan, plugins: Plugins
) -> None:
    folder = make_model("llama-bias")
    _, dense = open_tiny(folder)
    plan = make_plan(dense, (40, 40, 40))
    errors: dict[str, float] = {}
    compensators: list[Compensator] = [
        Procrustes(), LeastSquares(), Sequential(mix=0.0), Sequential(), LocalReconstruction(steps=40, batch_tokens=128)
    ]  # fmt: skip
    for compensator in compensators:
        _, cut = open_tiny(folder)
        compensated(cut, plan, compensator, plugins)
        errors[repr(compensator)] = stream_error(cut, dense)
    _, cut = open_tiny(folder)
    cut_model(cut, plan)
    assert all(error < stream_error(cut, dense) for error in errors.values()), errors


@pytest.mark.parametrize("name", ["llama", "llama-bias", "phi3", "gemma2"])
def test_least_squares_lowers_the_calibration_error_of_every_block(
    name: str, make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan, plugins: Plugins
) -> None:
    folder = make_model(name)
    (_, cut), (_, dense) = open_tiny(folder), open_tiny(folder)
    plan = make_plan(cut, (40, 24, 56))
    updates = cut_model(cut, plan, second_pass(cut, LeastSquares(), plugins))
    for index, block in enumerate(plan.blocks):
        inputs, kept = heard(dense, index)["down in"], torch.tensor(block.kept)
        weight, update = only(dense, index).down, updates[index, block.path]
        whole = Sample(only(dense, index), inputs)
        assert update.down is not None
        assert update.error is not None
        found = replace(update, down=update.down.float())
        assert whole.error(whole.fit, kept, found) < whole.error(whole.fit, kept, Update())
        assert whole.error(whole.held_out, kept, found) < whole.error(whole.held_out, kept, Update())
        assert whole.error(whole.held_out, kept, found) == pytest.approx(update.error, rel=1e-3)
        assert torch.equal(only(cut, index).down, update.down.to(weight.dtype))


# --- local reconstruction --------------------------------------------------------------------------------------------


def test_the_weights_compute_what_the_models_own_feed_forward_does(
    family: str, make_model: MakeModel, open_tiny: OpenTiny
) -> None:
    _, decoder = open_tiny(make_model(family))
    inputs = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    for index, kept in enumerate((torch.arange(64), torch.tensor([0, 5, 63]), torch.arange(0, 64, 3))):
        found = Weights.of(only(decoder, index), kept).output(inputs)
        cut_block(decoder, index, [kept])
        with torch.no_grad():
            torch.testing.assert_close(found, module_of(decoder, index)(inputs), rtol=1e-5, atol=1e-6)


def test_an_activation_works_without_a_gate() -> None:
    draw = torch.Generator().manual_seed(0)
    up, down, inputs = (torch.randn(*shape, generator=draw) for shape in ((9, 4), (4, 9), (7, 4)))
    block = FeedForward(0, "mlp", up, down, "relu", up_bias=torch.ones(9), down_bias=torch.ones(4))
    kept = torch.tensor([1, 4, 8])
    weights = Weights.of(block, kept)
    expected = (inputs @ up[kept].T + 1).relu() @ down[:, kept].T + 1
    torch.testing.assert_close(weights.output(inputs), expected)
    assert len(weights.tensors()) == 4
    assert weights.error(inputs, expected + 2) == pytest.approx(4.0, rel=1e-5)


@dataclass(frozen=True)
class Trial:
    """A dense feed-forward of a tiny model with inputs and its own outputs as targets."""

    block: FeedForward
    inputs: Tensor  # (N, T, D)
    targets: Tensor

    def answer(self, compensator: Compensator, kept: Tensor) -> Update:
        values = window_statistics(self.inputs, self.targets)
        tokens = self.inputs.shape[0] * self.inputs.shape[1]
        statistics = BlockStatistics(values, tokens, 24 * (len(self.inputs) // HELD_OUT_EVERY))
        return compensate(ConfiguredComponent(compensator, Origin("test")), self.block, kept, statistics)

    def error(self, weights: Weights) -> float:
        """Mean squared error on the held-out windows, or on the last tenth of the tokens where there are none."""
        windows = range(len(self.inputs))[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        inputs, targets = self.inputs.flatten(0, 1), self.targets.flatten(0, 1)  # (n, D)
        if windows:
            inputs, targets = self.inputs[list(windows)], self.targets[list(windows)]
        else:
            last = -(-len(inputs) // HELD_OUT_EVERY)
            inputs, targets = inputs[-last:], targets[-last:]
        return (weights.output(inputs) - targets).square().mean().item()


def trial(name: str, make_model: MakeModel, open_tiny: OpenTiny, windows: int = 20, block: int = 1) -> Trial:
    _, decoder = open_tiny(make_model(name))
    seen = heard(decoder, block)
    return Trial(only(decoder, block), seen["feed_forward in"][:windows], seen["feed_forward out"][:windows])


def with_update(block: FeedForward, kept: Tensor, update: Update) -> Weights:
    """The kept weights with the update's in their place."""
    parts = ("up", "down", "gate", "up_bias", "gate_bias", "down_bias")
    found = {part: value for part in parts if (value := getattr(update, part)) is not None}
    return replace(Weights.of(block, kept), **found)


HALF = torch.arange(0, 64, 2)
QUICK = LocalReconstruction(steps=30, batch_tokens=64, check_every=10)


@pytest.mark.parametrize("name", ["llama", "llama-bias", "phi3"])
def test_reconstruction_lowers_the_held_out_error_below_least_squares(
    name: str, make_model: MakeModel, open_tiny: OpenTiny
) -> None:
    one = trial(name, make_model, open_tiny)
    update = one.answer(QUICK, HALF)
    assert update.error is not None
    assert update.error_plain is not None
    whole = one.targets[IS_HELD_OUT].square().mean().item()
    assert update.error == pytest.approx(one.error(with_update(one.block, HALF, update)) / whole, rel=1e-5)
    assert update.error_plain == pytest.approx(one.error(Weights.of(one.block, HALF)) / whole, rel=1e-5)
    start = one.answer(LocalReconstruction(steps=1, learning_rate=1e-30), HALF)
    assert start.error is not None
    assert update.error < start.error <= update.error_plain
    assert update.up is not None
    assert update.gate is not None
    assert (update.up.shape, update.gate.shape) == ((32, 32), (32, 32))
    assert not torch.equal(update.up, one.block.up[HALF])
    biases = (update.down_bias, update.up_bias, update.gate_bias)
    assert [bias is None for bias in biases] == [name != "llama-bias"] * 3


@pytest.mark.parametrize("name", ["llama", "llama-bias", "phi3"])
def test_a_reconstructed_block_has_the_planned_width_and_computes_the_trained_weights(
    name: str, make_model: MakeModel, open_tiny: OpenTiny
) -> None:
    one = trial(name, make_model, open_tiny)
    _, decoder = open_tiny(make_model(name))
    update = one.answer(QUICK, HALF)
    cut_block(decoder, 1, [HALF])
    apply_updates(decoder, 1, [update])
    module = module_of(decoder, 1)
    assert decoder.widths == (64, 32, 64)
    with torch.no_grad():
        found = module(one.inputs)
    torch.testing.assert_close(found, with_update(one.block, HALF, update).output(one.inputs), rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())


def tensors(update: Update) -> list[Tensor]:
    return [value for part in ("up", "down", "gate") if (value := getattr(update, part)) is not None]


def test_reconstruction_is_deterministic_for_a_seed_and_a_block(make_model: MakeModel, open_tiny: OpenTiny) -> None:
    one = trial("llama", make_model, open_tiny)
    before = [tensor.clone() for tensor in (one.block.up, one.block.down, one.inputs, one.targets)]
    first = one.answer(QUICK, HALF)
    torch.manual_seed(99)  # nobody else's random numbers matter, nor are they disturbed
    state = torch.get_rng_state()
    again = one.answer(QUICK, HALF)
    assert torch.equal(state, torch.get_rng_state())
    assert (first.error, first.error_plain) == (again.error, again.error_plain)
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True))
    for other in (replace(one.block, seed=1), replace(one.block, block=2)):
        moved = replace(one, block=other).answer(QUICK, HALF)
        assert not any(torch.equal(a, b) for a, b in zip(tensors(first), tensors(moved), strict=True))
    after = (one.block.up, one.block.down, one.inputs, one.targets)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("windows", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("rate", [1e-30, 1e-3, 1.0, 1e30])
def test_reconstruction_never_raises_the_held_out_error(
    windows: int, rate: float, make_model: MakeModel, open_tiny: OpenTiny
) -> None:
    one = trial("llama-bias", make_model, open_tiny, windows)
    update = one.answer(LocalReconstruction(steps=4, learning_rate=rate, check_every=1, batch_tokens=16), HALF)
    assert update.error is not None
    assert update.error_plain is not None
    if update.down is None:
        assert update == Update(error_plain=update.error_plain, error=update.error)
    else:
        found, plain = one.error(with_update(one.block, HALF, update)), one.error(Weights.of(one.block, HALF))
        assert found < plain
        assert update.error < update.error_plain


def test_what_makes_held_out_tokens_worse_is_refused(make_model: MakeModel, open_tiny: OpenTiny) -> None:
    one = trial("llama", make_model, open_tiny)
    narrow = Weights.of(one.block, HALF)
    targets = one.targets.clone()
    targets[IS_HELD_OUT] = narrow.output(one.inputs[IS_HELD_OUT])  # plain pruning is perfect there
    update = replace(one, targets=targets).answer(QUICK, HALF)
    assert update == Update(error_plain=update.error_plain, error=update.error)
    assert update.error_plain == pytest.approx(0, abs=1e-12)


def test_targets_of_zero_are_no_division_by_zero(make_model: MakeModel, open_tiny: OpenTiny) -> None:
    one = trial("llama", make_model, open_tiny)
    silent = replace(one, block=replace(one.block, down=one.block.down * 0), targets=one.targets * 0)
    update = silent.answer(QUICK, HALF)
    assert update == Update(error_plain=0.0, error=0.0)


def test_half_precision_blocks_are_trained_in_float32(make_model: MakeModel, open_tiny: OpenTiny) -> None:
    _, decoder = open_tiny(make_model("phi3", dtype="bfloat16"))
    seen = heard(decoder, 1)
    one = Trial(only(decoder, 1), seen["feed_forward in"].float(), seen["feed_forward out"].float())
    update = one.answer(QUICK, HALF)
    assert update.error is not None
    assert update.error_plain is not None
    assert update.error < update.error_plain
    assert {value.dtype for value in tensors(update)} == {torch.float32}


# --- a whole run -----------------------------------------------------------------------------------------------------


def run(
    preset: str, out: Path, model: Path, text: Path, plan: PruningPlan | None = None, **options: object
) -> RunResult:
    given: dict[str, object] = {
        "model": str(model),
        "calibration": str(text),
        "samples": 20,
        "seqlen": 32,
        "round_to": 8,
        "device": "cpu",
        **options,
    }
    return prune(layered(preset, None, given), out, plan=plan)


FEW_STEPS = "local-reconstruction:steps=6,batch_tokens=128,check_every=3"


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "llama-bias"])
@pytest.mark.parametrize(
    ("preset", "options"), [("cfsp-closed-form", {}), ("cfsp-refined", {"compensator": FEW_STEPS})]
)
def test_the_presets_run_and_what_they_write_opens_again(
    preset: str,
    options: dict[str, object],
    name: str,
    make_model: MakeModel,
    calibration_text: Path,
    open_tiny: OpenTiny,
    tmp_path: Path,
) -> None:
    result = run(preset, tmp_path / "out", make_model(name), calibration_text, None, **options)
    assert sum(result.plan.widths) == 96
    assert all(width % 8 == 0 for width in result.plan.widths)
    assert result.report.reload_difference < 1e-5
    assert all("calibration tokens are few" in note for note in result.report.notes)
    (_, cut), (_, dense) = open_tiny(tmp_path / "out"), open_tiny(make_model(name))
    assert cut.widths == result.plan.widths
    kept = torch.tensor(result.plan.blocks[0].kept)
    assert not torch.equal(only(cut, 0).down, only(dense, 0).down[:, kept])
    trained = preset == "cfsp-refined"
    assert torch.equal(only(cut, 0).up, only(dense, 0).up[kept]) != trained
    written = json.loads((tmp_path / "out/pruning_plan.json").read_text())
    assert written["components"]["criterion"].startswith("obs:")


def test_a_run_by_its_plan_is_the_same_run(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    model = make_model("llama")
    first = run("cfsp-closed-form", tmp_path / "first", model, calibration_text)
    run("cfsp-closed-form", tmp_path / "second", model, calibration_text, first.plan)
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[key]) for key, value in left.items())


@pytest.mark.parametrize("compensator", ["least-squares", "least-squares-bias", "procrustes", "sequential", FEW_STEPS])
def test_the_report_says_where_compensation_was_refused(
    compensator: str,
    make_model: MakeModel,
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("llama")
    plain = run("cfsp-refined", tmp_path / "plain", model, calibration_text, compensator="none")
    assert plain.report.notes == ()
    monkeypatch.setattr("cfsp_plugins.least_squares.output_error", lambda *_: 1.0)
    monkeypatch.setattr(Weights, "error", lambda *_: 1.0)
    refused = run("cfsp-refined", tmp_path / "refused", model, calibration_text, compensator=compensator)
    name = compensator.partition(":")[0]
    assert refused.report.notes == (f"{name} did not help on held-out tokens in block 0, 1, 2: plain pruning there",)
    left, right = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "refused"))
    assert left.keys() == right.keys(), "no bias was added either"
    assert all(torch.equal(value, right[key]) for key, value in left.items())


def test_few_tokens_are_refused_or_help(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    model = make_model("llama")
    result = run("cfsp-closed-form", tmp_path / "out", model, calibration_text, samples=10, seqlen=3)
    assert any("15 calibration tokens are few for blocks of 64 channels" in note for note in result.report.notes)
    assert result.report.reload_difference < 1e-5


def test_a_bias_is_counted_where_some_blocks_take_one(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    model = make_model("llama")
    result = run("cfsp-closed-form", tmp_path / "out", model, calibration_text, compensator="least-squares-bias")
    assert result.report.notes[-1] == (
        "least-squares-bias gave mlp.down_proj of every block a bias the family lacks: 96 parameters in all"
    )
    assert result.report.reload_difference < 1e-5


def heavy_config(model: Path, text: Path, **options: object) -> RunConfig:
    return RunConfig.build(model=str(model), calibration=str(text), samples=4, seqlen=16, device="cpu", **options)


def test_heavy_statistics_of_a_compensator_are_measured_in_the_second_pass_only(
    make_model: MakeModel, calibration_text: Path, plugins: Plugins
) -> None:
    config = heavy_config(make_model("llama"), calibration_text, criterion="magnitude", allocator="uniform")
    for name, first, second in (
        ("none", [], []),
        ("bias", ["down-input-mean"], []),
        ("least-squares", [], ["down-input-gram", "down-input-gram-held-out"]),
        (
            "local-reconstruction",
            [],
            [
                *("feed-forward-inputs", "feed-forward-inputs-held-out"),
                *("feed-forward-targets", "feed-forward-targets-held-out"),
            ],
        ),
    ):
        chosen = config.replace(compensator=name)
        for planned in (False, True):
            selection = select(chosen, plugins, planned=planned)
            assert [collector.component.name for collector in selection.collectors] == first
            assert [collector.component.name for collector in selection.second_pass] == second
    refined = select(layered("cfsp-refined", None, {"model": "x"}), plugins)
    assert {collector.component.name for collector in refined.collectors} == {"down-input-gram", "block-output-squares"}
    foreign = replace(refined.second_pass[0], origin=Origin("theirs", "their-package", "2"))
    assert replace(refined, second_pass=(foreign,)).distributions()["their-package"] == "2"


def test_a_plan_needs_no_second_pass(make_model: MakeModel, calibration_text: Path) -> None:
    config = heavy_config(make_model("llama"), calibration_text, criterion="obs", allocator="error-curve", round_to=8)
    plan = plan_only(config)
    assert sum(plan.widths) == 96
    compensated = plan_only(config.replace(compensator="sequential"))
    assert [block.kept for block in compensated.blocks] == [block.kept for block in plan.blocks]


def test_a_killed_run_goes_on_after_its_finished_blocks(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state = make_model("llama"), tmp_path / "state"
    whole = run("cfsp-refined", tmp_path / "whole", model, calibration_text, compensator=FEW_STEPS)
    compensated: list[int] = []
    own = LocalReconstruction.compensate

    def counted(self: LocalReconstruction, feed_forward: FeedForward, *rest: Any) -> Update:
        if len(compensated) == 2:
            raise KeyboardInterrupt
        compensated.append(feed_forward.block)
        return own(self, feed_forward, *rest)

    monkeypatch.setattr(LocalReconstruction, "compensate", counted)
    with pytest.raises(KeyboardInterrupt):
        run("cfsp-refined", tmp_path / "cut", model, calibration_text, compensator=FEW_STEPS, resume=state)
    assert not (tmp_path / "cut").exists()
    compensated.clear()
    run("cfsp-refined", tmp_path / "cut", model, calibration_text, compensator=FEW_STEPS, resume=state)
    assert compensated == [2], "the first two blocks are read, not trained again"
    left, right = (load_file(folder / "model.safetensors") for folder in (whole.folder, tmp_path / "cut"))
    assert all(torch.equal(value, right[key]) for key, value in left.items())
    compensated.clear()
    with pytest.raises(KeyboardInterrupt):  # at its third block: other windows find nothing
        run("cfsp-refined", tmp_path / "other", model, calibration_text, compensator=FEW_STEPS, resume=state, seed=1)
    assert compensated == [0, 1]
