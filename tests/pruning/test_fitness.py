"""The fitness of widths: what a really cut model computes, whatever ran before, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from cfsp_framework import BlockSummary, Budget, FitnessOptions
from cfsp_framework.data.windows import PADDING
from cfsp_framework.engine.replay import ForwardOptions
from cfsp_framework.errors import DataError
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.snapshot import restored
from cfsp_framework.pruning import fitness as fitness_module
from cfsp_framework.pruning.fitness import FitnessCache, ModelFitness
from cfsp_framework.pruning.planning import round_shares, select_channels
from cfsp_framework.pruning.surgery import cut_block
from helpers.types import MakeModel, OpenTiny

CANDIDATES = [(0.5, 0.5, 0.5), (0.25, 0.5, 0.75), (0.5, 0.75, 0.25), (0.5, 0.5, 0.5), (0.25, 0.75, 0.5)]
Metric = Literal["kl", "nll", "acceptance"]


def summaries_of(decoder: Decoder) -> list[BlockSummary]:
    """Summaries with random scores, one for each width."""
    draw, summaries = torch.Generator().manual_seed(3), list[BlockSummary]()
    for index in range(len(decoder.blocks)):
        for group in decoder.groups(index):
            members = {path: module.width for module in group.modules for path in module.paths}
            width = sum(members.values())
            scores = torch.rand(width, generator=draw)  # (F,)
            several = members if len(members) > 1 else {}
            summaries.append(BlockSummary(index, next(iter(members)), width, 1, {}, scores, members=several))
    return summaries


@pytest.fixture
def windows() -> Tensor:
    """Five windows of tokens, one of them padded, ``(N, T)``."""
    ids = torch.randint(3, 320, (5, 24), generator=torch.Generator().manual_seed(1))  # (N, T)
    ids[3, 15:] = PADDING
    return ids


@pytest.fixture
def open_fitness(windows: Tensor) -> Callable[..., ModelFitness]:
    """``open_fitness(decoder, metric, ...)``: the fitness of a model."""

    def make(
        decoder: Decoder, metric: Metric = "kl", stride: int = 1, batch: int = 2, ratio: float = 0.5, **more: object
    ) -> ModelFitness:
        summaries = summaries_of(decoder)
        return ModelFitness(
            decoder,
            windows,
            summaries,
            FitnessOptions(metric, len(windows), stride),
            starts={},
            round_shares=lambda shares: round_shares(shares, summaries, Budget(ratio)),
            forward_options=ForwardOptions(batch_size=batch),
            seed=0,
            **more,  # type: ignore[arg-type]
        )

    return make


def log_probabilities(decoder: Decoder, ids: Tensor) -> Tensor:
    """The model's own log-probabilities for one window without padding, ``(T, V)``."""
    with torch.no_grad():
        logits: Tensor = decoder.model(ids[None], use_cache=False).logits[0]  # (T, V)
        return logits.float().log_softmax(-1)


def expected_loss(decoder: Decoder, windows: Tensor, shares: tuple[float, ...], metric: Metric, stride: int) -> float:
    """The loss computed plainly, with the model cut as a whole."""
    texts = [window[window != PADDING] for window in windows]  # (T,) each
    full = [log_probabilities(decoder, ids) for ids in texts]  # (T, V) each
    summaries = summaries_of(decoder)
    widths = round_shares(shares, summaries, Budget(0.5))
    with restored(decoder):
        for index in range(len(decoder.blocks)):
            chosen = [select_channels(s, w) for s, w in zip(summaries, widths, strict=True) if s.block == index]
            cut_block(decoder, index, [torch.tensor(kept) for member in chosen for kept in member])
        cut = [log_probabilities(decoder, ids) for ids in texts]  # (T, V) each
    losses: list[Tensor] = []
    for ids, p, q in zip(texts, full, cut, strict=True):
        at = torch.arange(0, len(ids) - 1, stride)  # (P,)
        if metric == "nll":
            losses.append(-q[at, ids[at + 1]])
        elif metric == "kl":
            losses.append((p.exp() * (p - q)).sum(-1)[at])
        else:
            losses.append(1 - torch.minimum(p.exp(), q.exp()).sum(-1)[at])
    return torch.cat(losses).double().mean().item()


@pytest.mark.parametrize(
    ("name", "metric", "stride"),
    [
        ("llama", "kl", 1),
        ("gemma3_text", "kl", 3),
        ("llama-bias", "nll", 2),
        ("phi3", "acceptance", 1),
        ("mixtral", "kl", 1),
    ],
)
def test_it_is_the_loss_of_the_cut_model(
    name: str,
    metric: Metric,
    stride: int,
    windows: Tensor,
    make_model: MakeModel,
    open_tiny: OpenTiny,
    open_fitness: Callable[..., ModelFitness],
) -> None:
    _, decoder = open_tiny(make_model(name))
    before = {key: value.clone() for key, value in decoder.model.state_dict().items()}
    measured = open_fitness(decoder, metric, stride)(CANDIDATES)
    expected = [expected_loss(decoder, windows, shares, metric, stride) for shares in CANDIDATES]
    assert measured == pytest.approx(expected, rel=2e-4, abs=1e-7)
    assert len(set(measured)) == 4
    after = decoder.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_kept_hidden_states_change_nothing_but_the_work(
    make_model: MakeModel,
    open_tiny: OpenTiny,
    open_fitness: Callable[..., ModelFitness],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, decoder = open_tiny(make_model("llama"))
    alone = [open_fitness(decoder)([shares])[0] for shares in CANDIDATES]
    together = open_fitness(decoder)
    assert together(CANDIDATES) == alone
    assert together.evaluations == 4
    assert together.block_forwards < 3 * 5  # three blocks, four candidates and the dense model
    monkeypatch.setattr(fitness_module, "HIDDEN_BYTES", 1)
    without = open_fitness(decoder)
    assert without(CANDIDATES) == alone
    assert without.block_forwards == 3 * 5


def test_a_full_model_loses_nothing(
    make_model: MakeModel, open_tiny: OpenTiny, open_fitness: Callable[..., ModelFitness]
) -> None:
    _, decoder = open_tiny(make_model("llama"))
    assert open_fitness(decoder, ratio=0.0)([(1.0, 1.0, 1.0)]) == [0.0]
    assert open_fitness(decoder)([(0.5, 0.5, 0.5)])[0] > 0


def test_a_cache_saves_every_forward(
    tmp_path: Path, make_model: MakeModel, open_tiny: OpenTiny, open_fitness: Callable[..., ModelFitness]
) -> None:
    _, decoder = open_tiny(make_model("llama"))
    first = open_fitness(decoder, cache=FitnessCache(tmp_path, "ab" * 32))
    values = first(CANDIDATES)
    [path] = tmp_path.iterdir()
    with path.open("a") as file:
        file.write('{"widths": [32, 3')  # a process was killed here
    again = open_fitness(decoder, cache=FitnessCache(tmp_path, "ab" * 32))
    assert again(CANDIDATES) == values
    assert (again.block_forwards, again.evaluations) == (0, 4)
    again([(0.75, 0.5, 0.25)])
    assert len(FitnessCache(tmp_path, "ab" * 32).load()) == 5
    assert len(FitnessCache(tmp_path, "cd" * 32).load()) == 0


def test_a_model_that_overflows_is_the_worst(
    tmp_path: Path, make_model: MakeModel, open_tiny: OpenTiny, open_fitness: Callable[..., ModelFitness]
) -> None:
    _, decoder = open_tiny(make_model("llama"))
    with torch.no_grad():
        decoder.feed_forwards(1)[0].down.fill_(float("nan"))
    fitness = open_fitness(decoder, cache=FitnessCache(tmp_path, "ab"))
    assert fitness(CANDIDATES[:1]) == [float("inf")]
    assert list(FitnessCache(tmp_path, "ab").load().values()) == [float("inf")]


def test_windows_without_two_tokens_are_refused(
    make_model: MakeModel, open_tiny: OpenTiny, open_fitness: Callable[..., ModelFitness], windows: Tensor
) -> None:
    windows[:, 1:] = PADDING
    _, decoder = open_tiny(make_model("llama"))
    with pytest.raises(DataError, match="--samples"):
        open_fitness(decoder)
