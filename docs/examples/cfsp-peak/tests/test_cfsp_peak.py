"""The contracts of every collector and criterion, and the numbers of these."""

from __future__ import annotations

import torch
from cfsp_framework import BlockStatistics, FeedForward
from cfsp_framework.testing import CollectorContract, CriterionContract

from cfsp_peak import PEAK, PeakCollector, PeakCriterion


class TestPeakCollector(CollectorContract):
    component = PeakCollector()


class TestPeakCriterion(CriterionContract):
    components = (PeakCriterion(), PeakCriterion(exponent=2))


def test_the_largest_activation_of_all_windows_is_kept() -> None:
    running = PeakCollector().start()
    for window in (torch.tensor([[1.0, -3.0], [0.0, 2.0]]), torch.empty(0, 2), torch.tensor([[-2.0, 0.5]])):  # (T, F)
        running.update(window, window)
    assert running.value(3).tolist() == [2.0, 3.0]


def test_a_score_is_the_most_an_output_can_change_by() -> None:
    draw = torch.Generator().manual_seed(0)
    down, activations = torch.randn(8, 6, generator=draw), torch.randn(50, 6, generator=draw)  # (D, F), (T, F)
    statistics = BlockStatistics({PEAK: activations.abs().amax(0)}, tokens=50)
    scores = PeakCriterion().score(FeedForward(0, "mlp", torch.ones(6, 8), down, "silu"), statistics)
    changes = (activations.T[:, :, None] * down.T[:, None]).norm(dim=2)  # (F, T): by removing one channel
    torch.testing.assert_close(scores, changes.amax(1))


def test_an_exponent_of_zero_leaves_the_weights() -> None:
    down = torch.tensor([[3.0, 0.0], [4.0, 2.0]])  # (D, F): its columns have the norms 5 and 2
    feed_forward = FeedForward(0, "mlp", torch.ones(2, 2), down, "silu")
    statistics = BlockStatistics({PEAK: torch.tensor([7.0, 9.0])}, tokens=4)
    assert PeakCriterion(exponent=0).score(feed_forward, statistics).tolist() == [5.0, 2.0]
