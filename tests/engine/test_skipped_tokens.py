"""Tokens that are skipped, or are padding, count in no statistic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfsp_framework import Criterion, Statistic
from cfsp_framework.data.windows import PADDING
from cfsp_framework.engine.collect import collect
from cfsp_framework.engine.measurements import FeedForwardMeasurement
from cfsp_framework.engine.replay import ForwardOptions
from cfsp_framework.host.registry import ConfiguredComponent, Plugins
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.runtime.progress import Progress
from cfsp_framework.statistics import (
    ANGULAR_DISTANCE,
    DOWN_INPUT_GRAM,
    DOWN_INPUT_MEAN,
    DOWN_INPUT_SQUARES,
    DOWN_INPUT_TAYLOR,
)
from helpers.types import MakeModel, OpenTiny

Measured = tuple[Sequence[FeedForwardMeasurement], list[float]]
BOS = 1
SKIP_BOS = frozenset({BOS})
LIGHT = (ANGULAR_DISTANCE, DOWN_INPUT_MEAN, DOWN_INPUT_SQUARES, DOWN_INPUT_TAYLOR)
WINDOWS = torch.randint(3, 300, (5, 24), generator=torch.Generator().manual_seed(1))


class Flat(Criterion):
    """Score all channels alike, and record the trace of their Gram matrix."""

    name = "flat"
    requires = frozenset({*LIGHT, DOWN_INPUT_GRAM})
    traces: list[float] = []  # noqa: RUF012  (pydantic copies it)

    def score(self, feed_forward: Any, statistics: Mapping[Statistic, Tensor]) -> Tensor:
        self.traces.append(statistics[DOWN_INPUT_GRAM].trace().item())
        return torch.ones(feed_forward.width)


@pytest.fixture
def decoder(make_model: MakeModel, open_tiny: OpenTiny) -> Decoder:
    return open_tiny(make_model("llama"))[1]


@pytest.fixture
def measure(decoder: Decoder, plugins: Plugins) -> Callable[..., Measured]:
    """``measure(windows, skip, batch_size)``: the light statistics, and the trace of each Gram matrix."""

    def measure(windows: Tensor, skip: frozenset[int] = frozenset(), batch_size: int = 2) -> Measured:
        criterion = ConfiguredComponent[Criterion](Flat(), plugins.criteria.origin("cfsp"))
        measurements = collect(
            decoder,
            windows,
            {"flat": criterion},
            plugins.collectors_for(Flat.requires),
            forward_options=ForwardOptions(batch_size, skip),
            seed=0,
            progress=Progress(),
        )
        return measurements, criterion.component.traces  # type: ignore[attr-defined]

    return measure


@torch.no_grad()
def measure_by_definition(decoder: Decoder, windows: Sequence[Tensor], skip: frozenset[int]) -> list[dict[str, Any]]:
    """Run each window whole through the model, and compute each block's statistics from the rows that count."""
    rows: list[list[Tensor]] = [[] for _ in decoder.blocks]
    distances: list[list[Tensor]] = [[] for _ in decoder.blocks]
    for ids in windows:
        inputs: dict[str | int, Tensor] = {}
        streams = decoder.model(ids[None], use_cache=False, output_hidden_states=True).hidden_states
        modules: dict[str | int, nn.Module] = {"norm": decoder.base.get_submodule("norm")}
        modules |= {index: block.get_submodule("mlp.down_proj") for index, block in enumerate(decoder.blocks)}
        handles = [
            module.register_forward_pre_hook(partial(keep_input, inputs, key)) for key, module in modules.items()
        ]
        decoder.model(ids[None], use_cache=False)
        for handle in handles:
            handle.remove()
        counted = ~torch.isin(ids, torch.tensor(sorted(skip)))
        path = [*streams[:-1], inputs["norm"]]
        for index in range(len(decoder.blocks)):
            rows[index].append(inputs[index][0][counted].double())  # (n, F)
            cosine = nn.functional.cosine_similarity(path[index][0].double(), path[index + 1][0].double(), dim=-1)
            distances[index].append((cosine.clamp(-1, 1).acos() / torch.pi)[counted])  # (n,)
    return [
        {
            "tokens": sum(map(len, rows[index])),
            "down_input_squares": torch.cat(rows[index]).square().sum(0),
            "down_input_mean": torch.cat(rows[index]).mean(0),
            "angular_distance": torch.cat(distances[index]).mean(),
        }
        for index in range(len(decoder.blocks))
    ]


def keep_input(inputs: dict[Any, Tensor], key: object, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    inputs[key] = arguments[0]


def check(measured: Measured, expected: list[dict[str, Any]]) -> None:
    for measurement, trace, values in zip(*measured, expected, strict=True):
        assert measurement.statistics.tokens == values["tokens"]
        for statistic in (DOWN_INPUT_SQUARES, DOWN_INPUT_MEAN, ANGULAR_DISTANCE):
            value, right = measurement.statistics[statistic].double(), values[statistic.name]
            assert torch.allclose(value, right, rtol=1e-5, atol=1e-6 * right.abs().max().item()), statistic.name
        assert trace == pytest.approx(values["down_input_squares"].sum().item(), rel=1e-5)


def test_the_first_token_is_not_counted(decoder: Decoder, measure: Callable[..., Measured]) -> None:
    windows = WINDOWS.clone()
    windows[:, 0] = BOS
    windows[3, [7, 12]] = BOS  # also where documents meet inside a window
    windows[4] = BOS  # a window of which nothing counts
    expected = measure_by_definition(decoder, list(windows), SKIP_BOS)
    assert expected[0]["tokens"] == 3 * 23 + 21
    for batch_size in (1, 2, 5):
        check(measure(windows, SKIP_BOS, batch_size), expected)
    everything = measure_by_definition(decoder, list(windows), frozenset())
    assert everything[0]["tokens"] == 120
    check(measure(windows), everything)
    with pytest.raises(AssertionError):
        check(measure(windows), expected)


def test_padding_is_not_counted(decoder: Decoder, measure: Callable[..., Measured]) -> None:
    lengths = 24, 9, 17, 24, 1
    padded = WINDOWS.clone()
    for window, length in zip(padded, lengths, strict=True):
        window[length:] = PADDING
    documents = [window[:length] for window, length in zip(WINDOWS, lengths, strict=True)]
    expected = measure_by_definition(decoder, documents, frozenset())
    assert expected[0]["tokens"] == sum(lengths)
    for batch_size in (1, 2, 5):
        check(measure(padded, batch_size=batch_size), expected)
    padded[:, 0] = BOS
    documents = [window[window != PADDING] for window in padded]
    check(measure(padded, SKIP_BOS), measure_by_definition(decoder, documents, SKIP_BOS))


def test_gradients_of_tokens_that_do_not_count_are_left_out(measure: Callable[..., Measured]) -> None:
    windows = WINDOWS.clone()
    windows[:, 0] = BOS
    padded = torch.cat([windows, torch.full((5, 6), PADDING)], 1)
    (everything, _), (skipped, _), (unpadded, _) = (
        measure(windows),
        measure(windows, SKIP_BOS),
        measure(padded, SKIP_BOS),
    )
    for parts in zip(everything, skipped, unpadded, strict=True):
        effect = [part.statistics[DOWN_INPUT_TAYLOR] for part in parts]
        assert (effect[0] >= effect[1]).all()
        assert effect[0].sum() > effect[1].sum()
        assert torch.allclose(effect[1], effect[2], rtol=1e-5)
        assert parts[1].statistics.tokens == parts[2].statistics.tokens == 115
