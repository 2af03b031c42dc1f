"""The algebra of removing channels: every shortcut equals what it stands for, computed the long way in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfsp_criteria import Leverage, Obs
from cfsp_framework import BlockStatistics, FeedForward
from cfsp_framework.engine.collect import CURVE_DAMPING, CurveKind, error_curves
from cfsp_framework.linalg import (
    compensated_curve,
    damped,
    damped_inverse,
    greedy_removal,
    least_squares,
    output_error,
    output_square,
    plain_curve,
    positive_inverse,
)
from cfsp_framework.pruning.planning import keep_highest
from cfsp_framework.statistics import DOWN_INPUT_GRAM

untimed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
DAMPINGS = st.sampled_from([1e-4, 1e-2, 0.3])


@dataclass(frozen=True)
class Case:
    """A down projection ``(D, F)`` and activations ``(T, F)`` whose channels resemble each other."""

    weight: Tensor
    activations: Tensor

    @property
    def gram(self) -> Tensor:
        return self.activations.mT @ self.activations

    @property
    def width(self) -> int:
        return self.weight.shape[1]


def case(width: int, hidden: int, tokens: int, seed: int) -> Case:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    mixing = torch.eye(width, dtype=torch.float64) + 0.4 * normal(width, width) / width**0.5
    scale = torch.exp(normal(width))
    return Case(normal(hidden, width), (normal(tokens, width) @ mixing + 0.3) * scale)


CASES = st.builds(
    case, width=st.integers(2, 24), hidden=st.integers(1, 10), tokens=st.integers(1, 60), seed=st.integers(0, 999)
)
DEFAULT = case(width=40, hidden=12, tokens=300, seed=7)


def removal_curve(weight: Tensor, gram: Tensor, order: Tensor, damping: float | None = None) -> Tensor:
    """The error after each removal, ``(F + 1,)``: the plain one, or with a damping the compensated one."""
    if damping is None:
        return plain_curve(weight, gram, order)
    return compensated_curve(weight, damped_inverse(gram, damping), order)


def complement(kept: Tensor, width: int) -> Tensor:
    """The channels that are not kept, ascending."""
    return torch.tensor(sorted(set(range(width)) - set(kept.tolist())), dtype=torch.int64)


def refitted(weight: Tensor, matrix: Tensor, kept: Tensor) -> Tensor:
    """The minimiser ``(D, K)`` of ``trace(R H R^T)``, found by solving the normal equations."""
    solution: Tensor = torch.linalg.solve(matrix[kept][:, kept], (weight @ matrix)[:, kept].mT)  # (K, D)
    return solution.mT


def loss(weight: Tensor, kept_weight: Tensor, kept: Tensor, matrix: Tensor) -> float:
    """``trace(R H R^T)`` with R the change of all weights."""
    change = weight.clone()
    change[:, kept] -= kept_weight
    return float(torch.trace(change @ matrix @ change.mT))


def removal_loss(weight: Tensor, matrix: Tensor, removed: Tensor) -> float:
    """``trace(W_P ([H^-1]_PP)^-1 W_P^T)``."""
    inner = torch.linalg.inv(torch.linalg.inv(matrix)[removed][:, removed])
    return float(torch.trace(weight[:, removed] @ inner @ weight[:, removed].mT))


# --- damping and inverses --------------------------------------------------------------------------------------------


@untimed
@given(CASES, DAMPINGS)
def test_damping_adds_a_share_of_the_mean_diagonal(case: Case, damping: float) -> None:
    gram = case.gram
    share = damping * gram.diagonal().mean()
    torch.testing.assert_close(damped(gram, damping), gram + share * torch.eye(case.width, dtype=torch.float64))
    assert torch.equal(damped(gram.float(), damping), damped(gram.float().double(), damping)), "always in float64"
    assert torch.equal(gram, case.gram), "the argument is left alone"


@untimed
@given(CASES, DAMPINGS)
def test_the_inverse_is_one_and_symmetric(case: Case, damping: float) -> None:
    matrix = damped(case.gram, damping)
    inverse = positive_inverse(matrix)
    torch.testing.assert_close(matrix @ inverse, torch.eye(case.width, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(inverse, inverse.mT, rtol=1e-12, atol=1e-14 * inverse.abs().max().item())


@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_a_gram_matrix_of_zeros_becomes_the_identity(damping: float) -> None:
    assert torch.equal(damped(torch.zeros(5, 5), damping), torch.eye(5, dtype=torch.float64))


def test_a_dead_channel_without_damping_is_decoupled() -> None:
    gram = DEFAULT.gram
    gram[3] = gram[:, 3] = 0
    inverse = positive_inverse(damped(gram, 0.0))
    assert inverse[3].nonzero().tolist() == [[3]]


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e6])
def test_a_constant_factor_changes_nothing_but_the_scale_of_errors(scale: float) -> None:
    gram = DEFAULT.gram.clone()
    gram[5] = gram[:, 5] = 0  # a channel that is always 0 must not matter more where activations are small
    torch.testing.assert_close(damped(gram * scale, 1e-2), damped(gram, 1e-2) * scale, rtol=1e-12, atol=0)
    order, errors = greedy_removal(DEFAULT.weight, gram)
    scaled_order, scaled_errors = greedy_removal(DEFAULT.weight, gram * scale)
    assert torch.equal(order, scaled_order)
    torch.testing.assert_close(scaled_errors, errors * scale, rtol=1e-9, atol=0)
    curve = removal_curve(DEFAULT.weight, gram, order, 1e-2)
    torch.testing.assert_close(
        removal_curve(DEFAULT.weight, gram * scale, order, 1e-2), curve * scale, rtol=1e-9, atol=0
    )


def test_what_is_not_positive_definite_is_refused() -> None:
    with pytest.raises(RuntimeError, match="not positive-definite"):
        positive_inverse(-torch.eye(3, dtype=torch.float64))


# --- greedy removal --------------------------------------------------------------------------------------------------


@untimed
@given(CASES, DAMPINGS, st.integers(1, 9))
def test_greedy_removal_is_a_permutation_whose_error_grows_to_the_whole_output(
    case: Case, damping: float, batch: int
) -> None:
    order, errors = greedy_removal(case.weight, case.gram, damping, batch)
    assert sorted(order.tolist()) == list(range(case.width))
    assert errors.shape == (case.width + 1,)
    assert errors.dtype == torch.float64
    assert errors[0] == 0
    assert all(before <= after for before, after in pairwise(errors.tolist()))
    whole = output_square(case.weight, damped(case.gram, damping))
    assert errors[-1].item() == pytest.approx(whole, rel=1e-7)  # the damped Gram may have a condition of 1e6


@untimed
@given(CASES, DAMPINGS, st.integers(1, 9))
def test_the_greedy_error_is_that_of_the_refit_at_every_batch(case: Case, damping: float, batch: int) -> None:
    order, errors = greedy_removal(case.weight, case.gram, damping, batch)
    matrix = damped(case.gram, damping)
    whole = output_square(case.weight, matrix)
    for count in range(batch, case.width, batch):
        removed, kept = order[:count], order[count:].sort().values
        found = errors[count].item()
        assert found == pytest.approx(removal_loss(case.weight, matrix, removed), rel=1e-7, abs=1e-12 * whole)
        best = refitted(case.weight, matrix, kept)
        assert found == pytest.approx(loss(case.weight, best, kept, matrix), rel=1e-7, abs=1e-12 * whole)


@untimed
@given(CASES, DAMPINGS, st.integers(1, 9))
def test_the_greedy_error_is_the_curve_of_its_own_order(case: Case, damping: float, batch: int) -> None:
    order, errors = greedy_removal(case.weight, case.gram, damping, batch)
    curve = removal_curve(case.weight, case.gram, order, damping)
    at = [*range(0, case.width, batch), case.width]
    torch.testing.assert_close(errors[at], curve[at], rtol=1e-7, atol=1e-12 * curve[-1].item())


def naive_order(weight: Tensor, matrix: Tensor) -> list[int]:
    """One channel at a time, every loss and every refit computed from scratch."""
    alive, order = list(range(weight.shape[1])), list[int]()
    while alive:
        losses = []
        for channel in alive:
            kept = torch.tensor([other for other in alive if other != channel], dtype=torch.int64)
            losses.append(loss(weight, refitted(weight, matrix, kept), kept, matrix))
        order.append(alive.pop(min(range(len(alive)), key=losses.__getitem__)))
    return order


@pytest.mark.parametrize("seed", range(5))
def test_one_by_one_each_step_removes_what_costs_least_after_the_refit(seed: int) -> None:
    small = case(width=10, hidden=6, tokens=40, seed=seed)
    order, _ = greedy_removal(small.weight, small.gram, damping=1e-2, batch=1)
    assert order.tolist() == naive_order(small.weight, damped(small.gram, 1e-2))


def test_inside_a_batch_the_error_is_a_straight_line() -> None:
    _, errors = greedy_removal(DEFAULT.weight, DEFAULT.gram, batch=7)
    for start in range(0, 40, 7):
        part = errors[start : min(start + 7, 40) + 1].diff()
        torch.testing.assert_close(part, part[:1].expand_as(part), rtol=1e-6, atol=1e-9 * errors[-1].item())


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_batches_cost_little_more_than_single_steps(batch: int) -> None:
    _, single = greedy_removal(DEFAULT.weight, DEFAULT.gram, batch=1)
    order, _ = greedy_removal(DEFAULT.weight, DEFAULT.gram, batch=batch)
    curve = removal_curve(DEFAULT.weight, DEFAULT.gram, order, 1e-2)
    for removed in (8, 16, 24, 32):
        assert curve[removed] <= 1.15 * single[removed]


def test_a_batch_larger_than_the_layer_removes_all_at_once() -> None:
    order, errors = greedy_removal(DEFAULT.weight, DEFAULT.gram, batch=1000)
    whole = output_square(DEFAULT.weight, damped(DEFAULT.gram, 1e-2))
    torch.testing.assert_close(errors, torch.linspace(0, 1, 41, dtype=torch.float64) * whole)
    assert sorted(order.tolist()) == list(range(40))


def test_greedy_beats_other_orders_after_the_refit() -> None:
    _, errors = greedy_removal(DEFAULT.weight, DEFAULT.gram, batch=1)
    draw = torch.Generator().manual_seed(0)
    magnitude = (DEFAULT.weight.square().sum(0) * DEFAULT.gram.diagonal()).argsort()
    for order in (magnitude, torch.randperm(40, generator=draw)):
        curve = removal_curve(DEFAULT.weight, DEFAULT.gram, order, 1e-2)
        assert errors[20] < curve[20]


def test_the_arguments_are_left_alone() -> None:
    weight, gram = DEFAULT.weight.clone(), DEFAULT.gram
    greedy_removal(weight, gram)
    removal_curve(weight, gram, torch.arange(40), 1e-2)
    least_squares(weight, gram, weight @ gram, torch.arange(7), 1e-3)
    assert torch.equal(weight, DEFAULT.weight)
    assert torch.equal(gram, DEFAULT.gram)


def degenerate(name: str) -> Case:
    found = case(width=12, hidden=5, tokens=60, seed=3)
    weight, activations = found.weight.clone(), found.activations.clone()
    if name == "dead channels":
        activations[:, [0, 4, 11]] = 0
    elif name == "silence":
        activations.zero_()
    elif name == "twins":
        activations[:, 6:] = activations[:, :6]
    elif name == "one token":
        activations = activations[:1]
    elif name == "no weights":
        weight.zero_()
    elif name == "massive activation":
        activations[:, 2] *= 1e4
    return Case(weight, activations)


DEGENERATE = ("dead channels", "silence", "twins", "one token", "no weights", "massive activation")


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_layers_survive(name: str, batch: int, dtype: torch.dtype) -> None:
    broken = degenerate(name)
    weight, gram = broken.weight.to(dtype), broken.gram.to(dtype)
    order, errors = greedy_removal(weight, gram, batch=batch)
    assert sorted(order.tolist()) == list(range(12))
    assert errors.isfinite().all()
    assert (errors.diff() >= 0).all()
    for damping in (None, 1e-2):
        assert removal_curve(weight, gram, order, damping).isfinite().all()
    kept = order[6:].sort().values
    found = least_squares(weight, gram, weight.double() @ gram.double(), kept, 1e-3)
    assert found.isfinite().all()
    whole = output_square(weight, gram)
    assert output_error(weight, found, kept, gram) <= output_error(weight, weight[:, kept], kept, gram) + 1e-6 * whole


def test_dead_channels_and_twins_cost_nothing() -> None:
    for name, free in (("dead channels", 3), ("twins", 6)):
        broken = degenerate(name)
        order, errors = greedy_removal(broken.weight, broken.gram, damping=1e-6, batch=1)
        assert errors[free] < 1e-5 * errors[-1]
        assert errors[free + 1] > 100 * errors[free]
        if name == "dead channels":
            assert sorted(order[:3].tolist()) == [0, 4, 11]


# --- error curves of any order ---------------------------------------------------------------------------------------


@untimed
@given(CASES, st.data())
def test_the_plain_curve_is_the_recomputed_error_of_any_order(case: Case, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(case.width))))
    curve = removal_curve(case.weight, case.gram, order)
    outputs = case.activations @ case.weight.mT  # (T, D)
    whole = outputs.square().sum().item()
    assert curve.shape == (case.width + 1,)
    for count in range(case.width + 1):
        removed, kept = order[:count], order[count:]
        direct = (outputs - case.activations[:, kept] @ case.weight[:, kept].mT).square().sum().item()
        inner = case.weight[:, removed] @ case.gram[removed][:, removed] @ case.weight[:, removed].mT
        assert curve[count].item() == pytest.approx(direct, rel=1e-8, abs=1e-9 * max(whole, curve.max().item()))
        assert curve[count].item() == pytest.approx(float(torch.trace(inner)), rel=1e-8, abs=1e-9 * curve.max().item())


@untimed
@given(CASES, DAMPINGS, st.data())
def test_the_compensated_curve_is_the_recomputed_least_squares_error_of_any_order(
    case: Case, damping: float, data: st.DataObject
) -> None:
    order = torch.tensor(data.draw(st.permutations(range(case.width))))
    curve = removal_curve(case.weight, case.gram, order, damping)
    matrix = damped(case.gram, damping)
    assert curve.shape == (case.width + 1,)
    assert (curve.diff() >= 0).all()
    for count in range(case.width + 1):
        kept = order[count:].sort().values
        best = refitted(case.weight, matrix, kept)
        expected = loss(case.weight, best, kept, matrix)
        assert curve[count].item() == pytest.approx(expected, rel=1e-7, abs=1e-11 * curve[-1].item())


@untimed
@given(CASES, DAMPINGS)
def test_compensating_never_costs_more_than_leaving_the_weights(case: Case, damping: float) -> None:
    order = torch.arange(case.width)
    matrix = damped(case.gram, damping)
    compensated = removal_curve(case.weight, case.gram, order, damping)
    plain = removal_curve(case.weight, matrix, order)
    assert (compensated <= plain * (1 + 1e-9) + 1e-12 * plain[-1]).all()


def block_of(case: Case) -> FeedForward:
    return FeedForward(0, "mlp", case.weight.mT.float(), case.weight.float(), "silu")


@pytest.mark.parametrize("kind", ["plain", "compensated"])
def test_the_curve_of_a_block_follows_what_the_plan_removes(kind: CurveKind) -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 5.0, 1.0, 2.0, 4.0])  # ties: the lower index stays longer
    small = case(width=8, hidden=4, tokens=50, seed=1)
    statistics = BlockStatistics({DOWN_INPUT_GRAM.relative(): small.gram.float()}, 50)
    curve = error_curves(block_of(small), statistics, {"mine": (scores, kind)})["mine"]
    weight, gram = small.weight.float().double(), small.gram.float().double()
    matrix = damped(gram, CURVE_DAMPING)
    assert (curve.dtype, curve.shape) == (torch.float64, (9,))
    for count in range(8):
        kept = torch.tensor(keep_highest(scores, 8 - count))
        if kind == "plain":
            expected = loss(weight, weight[:, kept], kept, gram)
        else:
            expected = loss(weight, refitted(weight, matrix, kept), kept, matrix)
        assert curve[count].item() == pytest.approx(expected, rel=1e-7, abs=1e-9)


# --- criteria on top -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 1, 8])
def test_obs_scores_are_the_steps_of_removal_so_every_width_is_nested(batch: int | None) -> None:
    statistics = BlockStatistics({DOWN_INPUT_GRAM.relative(): DEFAULT.gram.float()}, 300)
    block = block_of(DEFAULT)
    scores = Obs(batch=batch).score(block, statistics)
    order, _ = greedy_removal(block.down, statistics[DOWN_INPUT_GRAM.relative()], 1e-2, batch or 1)
    assert sorted(scores.tolist()) == list(range(40))
    before: set[int] = set()
    for width in range(1, 41):
        kept = set(keep_highest(scores, width))
        assert kept == set(order[40 - width :].tolist())
        assert before < kept
        before = kept


@untimed
@given(CASES, DAMPINGS)
def test_leverage_lies_between_0_and_1_and_sums_to_the_effective_dimension(case: Case, damping: float) -> None:
    gram = case.gram
    scores = Leverage(damping=damping).score(block_of(case), BlockStatistics({DOWN_INPUT_GRAM.relative(): gram}, 1))
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    shift = damping * gram.diagonal().mean()
    assert scores.sum().item() == pytest.approx((values / (values + shift)).sum().item(), rel=1e-8)
    assert ((scores > -1e-9) & (scores < 1)).all()
    direct = (gram @ torch.linalg.inv(gram + shift * torch.eye(case.width))).diagonal()
    torch.testing.assert_close(scores, direct, rtol=1e-7, atol=1e-9)


# --- least squares ---------------------------------------------------------------------------------------------------

KEPT = torch.arange(0, 40, 2)


def objective(case: Case, target: Tensor, kept: Tensor, update: Tensor, damping: float) -> float:
    """What least squares minimises, from the activations themselves; target ``(T, D)``, update ``(D, K)``."""
    output = case.activations[:, kept] @ (case.weight[:, kept] + update).mT
    shift = damping * case.activations.square().sum(0).mean()
    return float((target - output).square().sum() + shift * update.square().sum())


@untimed
@given(CASES, DAMPINGS, st.data())
def test_no_change_of_the_least_squares_weights_lowers_the_damped_objective(
    case: Case, damping: float, data: st.DataObject
) -> None:
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, case.width - 1), min_size=1))))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    noise = torch.randn(*case.weight.shape, generator=draw, dtype=torch.float64)
    target = case.activations @ (case.weight + 0.5 * noise).mT  # also where the target is not the dense output
    found = least_squares(case.weight, case.gram, target.mT @ case.activations, kept, damping)
    assert found.shape == (case.weight.shape[0], len(kept))
    update = found - case.weight[:, kept]
    least = objective(case, target, kept, update, damping)
    for size in (1e-3, 0.1, 1.0):
        step = torch.randn(*update.shape, generator=draw, dtype=torch.float64) * size
        assert objective(case, target, kept, update + step, damping) >= least * (1 - 1e-12)
    assert least <= objective(case, target, kept, torch.zeros_like(update), damping) * (1 + 1e-12)


@untimed
@given(CASES, DAMPINGS, st.data())
def test_least_squares_is_the_printed_formula(case: Case, damping: float, data: st.DataObject) -> None:
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, case.width - 1), min_size=1))))
    removed = complement(kept, case.width)
    gram = case.gram
    matrix = damped(gram, damping)
    coupling = case.weight[:, removed] @ gram[removed][:, kept]
    expected = case.weight[:, kept] + coupling @ torch.linalg.inv(matrix[kept][:, kept])
    found = least_squares(case.weight, gram, case.weight @ gram, kept, damping)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * (1 + expected.abs().max().item()))
    # damped toward the original weights it minimises the error measured with H in place of G
    torch.testing.assert_close(found, refitted(case.weight, matrix, kept), rtol=1e-6, atol=1e-8)
    curve = removal_curve(case.weight, gram, torch.cat([removed, kept]), damping)
    assert loss(case.weight, found, kept, matrix) == pytest.approx(
        curve[len(removed)].item(), rel=1e-7, abs=1e-11 * curve[-1].item()
    )


def test_keeping_everything_changes_nothing() -> None:
    found = least_squares(DEFAULT.weight, DEFAULT.gram, DEFAULT.weight @ DEFAULT.gram, torch.arange(40), 1e-3)
    torch.testing.assert_close(found, DEFAULT.weight, rtol=1e-12, atol=1e-12)
    assert output_error(DEFAULT.weight, DEFAULT.weight, torch.arange(40), DEFAULT.gram) == 0


def test_a_growing_damping_goes_back_to_the_original_weights_and_never_beyond_plain_pruning() -> None:
    own, cross = DEFAULT.weight[:, KEPT], DEFAULT.weight @ DEFAULT.gram
    plain = output_error(DEFAULT.weight, own, KEPT, DEFAULT.gram)
    errors, steps = [], []
    for damping in (1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e12):
        found = least_squares(DEFAULT.weight, DEFAULT.gram, cross, KEPT, damping)
        errors.append(output_error(DEFAULT.weight, found, KEPT, DEFAULT.gram))
        steps.append((found - own).norm().item())
    assert errors == sorted(errors)
    assert steps == sorted(steps, reverse=True)
    assert all(error < plain for error in errors[:-1])
    assert errors[-1] == pytest.approx(plain, rel=1e-6)
    assert steps[-1] < 1e-9 * own.norm().item()


def test_a_dead_kept_channel_keeps_its_weights() -> None:
    activations = DEFAULT.activations.clone()
    activations[:, 4] = 0
    gram = activations.mT @ activations
    found = least_squares(DEFAULT.weight, gram, DEFAULT.weight @ gram, KEPT, 1e-3)
    assert torch.equal(found[:, 2], DEFAULT.weight[:, 4])
    assert (found[:, 3] != DEFAULT.weight[:, 6]).any()


def test_half_precision_weights_are_fitted_in_float64() -> None:
    weight, gram = DEFAULT.weight.bfloat16(), DEFAULT.gram.float()
    found = least_squares(weight, gram, weight.double() @ gram.double(), KEPT, 1e-3)
    assert found.dtype == torch.float64
    expected = least_squares(weight.double(), gram.double(), weight.double() @ gram.double(), KEPT, 1e-3)
    assert torch.equal(found, expected)


# --- errors ----------------------------------------------------------------------------------------------------------


@untimed
@given(CASES, st.data())
def test_the_output_error_is_that_of_the_outputs_with_and_without_a_target(case: Case, data: st.DataObject) -> None:
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, case.width - 1), min_size=1))))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    changed = case.weight[:, kept] + 0.1 * torch.randn(*case.weight[:, kept].shape, generator=draw, dtype=torch.float64)
    narrow, dense = case.activations[:, kept] @ changed.mT, case.activations @ case.weight.mT
    whole = dense.square().sum().item()
    scale = whole + narrow.square().sum().item()
    direct = (dense - narrow).square().sum().item()
    assert output_square(case.weight, case.gram) == pytest.approx(whole, rel=1e-9, abs=1e-12 * scale)
    assert output_error(case.weight, changed, kept, case.gram) == pytest.approx(direct, rel=1e-8, abs=1e-10 * scale)
    cross = case.weight @ case.gram
    with_cross = output_error(case.weight, changed, kept, case.gram, cross) + whole
    assert with_cross == pytest.approx(direct, rel=1e-8, abs=1e-10 * scale)
    target = dense + torch.randn(*dense.shape, generator=draw, dtype=torch.float64)
    found = output_error(case.weight, changed, kept, case.gram, target.mT @ case.activations)
    expected = (target - narrow).square().sum().item() - target.square().sum().item()
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-9 * (scale + target.square().sum().item()))
