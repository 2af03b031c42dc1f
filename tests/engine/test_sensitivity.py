"""The sensitivity of a block is what a direct cut of that block alone gives."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfsp_framework.config import RunConfig
from cfsp_framework.engine import collect as collection
from cfsp_framework.engine.replay import ForwardOptions
from cfsp_framework.engine.sensitivity import measure_sensitivities
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.pipeline import plan_only
from helpers.types import MakeModel, OpenTiny

WINDOWS = torch.randint(3, 300, (6, 512), generator=torch.Generator().manual_seed(2))
USED = WINDOWS[:2, :96]


def scores_of(decoder: Decoder) -> list[list[Tensor]]:
    """Draw scores ``(F,)`` for each feed-forward of each block."""
    draw = torch.Generator().manual_seed(0)
    return [
        [torch.rand(feed_forward.width, generator=draw) for feed_forward in decoder.feed_forwards(index)]
        for index in range(len(decoder.blocks))
    ]


@torch.no_grad()
def expected_sensitivity(decoder: Decoder, scores: Tensor, index: int, windows: Tensor) -> float:
    """Run whole forwards of a copy whose block ``index`` lost its lower-scored half, and of the dense model."""
    outputs: list[Tensor] = []
    cut = deepcopy(decoder.model)
    cut.model.layers[index].mlp.down_proj.weight[:, scores.argsort()[: len(scores) // 2]] = 0
    logits = []
    for model in (decoder.model, cut):
        block = model.model.layers[index]
        hook = block.register_forward_hook(lambda _, __, output: outputs.append(output))
        logits.append(model(windows).logits.log_softmax(-1))
        hook.remove()
    error = ((outputs[1] - outputs[0]).square().sum(-1) / outputs[0].square().sum(-1)).mean()
    return float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean() / error)


def test_it_is_the_divergence_over_the_error_of_a_direct_cut(make_model: MakeModel, open_tiny: OpenTiny) -> None:
    _, decoder = open_tiny(make_model("llama"))
    before, scores = deepcopy(decoder.model), scores_of(decoder)
    windows = torch.cat([USED] * 6)  # 12 windows of 96 tokens, of which 11 are used
    sensitivities = measure_sensitivities(decoder, windows, {"random": scores})["random"]
    for index, sensitivity in enumerate(sensitivities):
        expected = expected_sensitivity(decoder, scores[index][0], index, windows[:11])
        assert sensitivity == pytest.approx(expected, rel=1e-3)
    for name, weight in decoder.model.state_dict().items():
        assert torch.equal(weight, before.state_dict()[name]), "the cut weights are put back"


def test_several_orders_batches_and_masks_change_nothing(make_model: MakeModel, open_tiny: OpenTiny) -> None:
    _, decoder = open_tiny(make_model("mixtral"))
    scores = scores_of(decoder)
    opposite = [[-values for values in block] for block in scores]
    together = measure_sensitivities(decoder, USED, {"a": scores, "b": opposite}, ForwardOptions(batch_size=1))
    assert together["a"] != together["b"]
    for label, order in (("a", scores), ("b", opposite)):
        alone = measure_sensitivities(decoder, USED, {label: order}, ForwardOptions(batch_size=2))
        assert together[label] == pytest.approx(alone[label], rel=1e-4)
    skipped = measure_sensitivities(decoder, USED, {"a": scores}, ForwardOptions(skip=frozenset(range(150))))
    assert skipped["a"] != pytest.approx(together["a"], rel=1e-4)


def test_a_block_that_adds_nothing_has_none(make_model: MakeModel, open_tiny: OpenTiny) -> None:
    _, decoder = open_tiny(make_model("llama"))
    with torch.no_grad():
        decoder.feed_forwards(1)[0].down.zero_()
    first, second, third = measure_sensitivities(decoder, USED, {"a": scores_of(decoder)})["a"]
    assert second is None
    assert first is not None
    assert third is not None


def test_it_is_measured_once_and_kept(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def count(*arguments: object) -> dict[str, list[float | None]]:
        calls.append(1)
        return measure_sensitivities(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(collection, "measure_sensitivities", count)
    options: dict[str, object] = {
        "model": str(make_model("llama")),
        "calibration": str(calibration_text),
        "allocator": "error-curve",
        "samples": 8,
        "seqlen": 32,
        "round_to": 8,
        "device": "cpu",
        "resume": tmp_path / "state",
    }
    plans = [plan_only(RunConfig.build(ratio=ratio, **options)) for ratio in (0.5, 0.5, 0.25)]
    assert len(calls) == 1
    assert plans[0].widths == plans[1].widths
    streamed = plan_only(RunConfig.build(ratio=0.5, **{**options, "resume": None, "stream": True}))
    assert streamed.widths == plans[0].widths
    even = plan_only(RunConfig.build(ratio=0.5, **{**options, "allocator": "error-curve:measured=false"}))
    assert len(calls) == 2
    assert sum(even.widths) == sum(plans[0].widths)
