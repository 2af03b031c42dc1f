"""Dropping attention: how many, which, and a checkpoint without them that reopens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cfsp_framework.api.records import BlockPlan, PruningPlan
from cfsp_framework.config import RunConfig
from cfsp_framework.errors import ConfigError, PlanError
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.loading import open_model
from cfsp_framework.modeling.variable_width import ZeroResidual
from cfsp_framework.pipeline import prune
from cfsp_framework.pruning.attention import choose_attentions, count_to_drop
from cfsp_framework.pruning.surgery import without_attention
from cfsp_framework.runtime.progress import Progress
from cfsp_framework.testing import build_plan
from helpers.types import MakeModel, OpenTiny

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def decoder(make_model: MakeModel, open_tiny: OpenTiny) -> Decoder:
    return open_tiny(make_model("llama"))[1]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    output: Tensor = model(IDS, use_cache=False).logits
    return output


def output_projection(decoder: Decoder, index: int) -> Tensor:
    return decoder.blocks[index].get_parameter("self_attn.o_proj.weight").data  # (D, D)


def config(folder: Path, text: Path, **options: object) -> RunConfig:
    given = {"model": str(folder), "calibration": str(text), "samples": 4, "seqlen": 32, "round_to": 4, **options}
    return RunConfig.build(**given)


def test_a_block_without_attention_equals_one_whose_attention_gives_zero(decoder: Decoder) -> None:
    with without_attention(decoder, [1]):
        dropped = logits(decoder.model)
    assert not any(isinstance(module, ZeroResidual) for module in decoder.model.modules())
    output_projection(decoder, 1).zero_()
    torch.testing.assert_close(dropped, logits(decoder.model))


def test_more_attentions_are_dropped_the_larger_the_ratio(decoder: Decoder) -> None:
    counts = [count_to_drop(decoder, ratio) for ratio in (0.0, 0.1, 0.3, 0.5)]
    assert counts[0] == 0
    assert counts == sorted(counts)
    with pytest.raises(ConfigError, match="more than the blocks hold"):
        count_to_drop(decoder, 0.99)


def test_the_attention_missed_least_goes_first_and_never_that_of_the_first_block(decoder: Decoder) -> None:
    losses: dict[int, float] = {}
    for block in (1, 2):
        with without_attention(decoder, [block]):
            predicted = logits(decoder.model)[:, :-1].flatten(0, 1)  # (n, V)
            losses[block] = functional.cross_entropy(predicted, IDS[:, 1:].flatten()).item()
    assert choose_attentions(decoder, IDS, 1, Progress()) == (min(losses, key=losses.__getitem__),)
    assert choose_attentions(decoder, IDS, 2, Progress()) == (1, 2)
    with pytest.raises(ConfigError, match="at most 2"):
        choose_attentions(decoder, IDS, 3, Progress())


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_a_checkpoint_without_some_attention_reopens_and_generates(
    family: str, make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    folder, out = make_model(family), tmp_path / "out"
    result = prune(config(folder, calibration_text, drop_attention=1, budget="parameters", ratio=0.3), out)
    assert len(result.plan.dropped_attention) == 1
    assert result.report.reload_difference == 0
    assert result.report.parameter_ratio == pytest.approx(0.3, abs=0.05)
    assert any("lost its attention" in note for note in result.report.notes)
    model = open_model(out)
    assert sum(isinstance(module, ZeroResidual) for module in model.modules()) == 1
    assert not any(f"layers.{result.plan.dropped_attention[0]}.self_attn" in name for name in model.state_dict())
    cached = model.generate(IDS, max_new_tokens=4, do_sample=False)  # type: ignore[operator]  # pyright: ignore
    uncached = model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False)  # type: ignore[operator]  # pyright: ignore
    assert torch.equal(cached, uncached)
    again = prune(
        config(folder, calibration_text, budget="parameters", ratio=0.3), tmp_path / "again", plan=result.plan
    )
    assert torch.equal(logits(open_model(tmp_path / "again")), logits(model))
    assert again.plan == result.plan


def test_it_opens_with_remote_code_and_not_without(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prune(
        config(make_model("llama"), calibration_text, drop_attention=1, allocator="uniform", criterion="magnitude"), out
    )
    torch.save({"ids": IDS, "logits": logits(open_model(out))}, tmp_path / "record.pt")
    code = f"""
import sys; sys.modules["cfsp_framework"] = None
import torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=False)
except Exception as error:
    print("refused", type(error).__name__)
model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)
record = torch.load({str(tmp_path / "record.pt")!r})
with torch.no_grad():
    print(torch.equal(model(record["ids"], use_cache=False).logits, record["logits"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", "AmbiguousGlobalPerLayerAttributeError", "True"]


@pytest.mark.parametrize("blocks", [[0], [2, 1], [1, 1], [7]])
def test_a_plan_that_drops_impossible_attentions_is_refused(blocks: list[int]) -> None:
    plan = build_plan(BlockPlan(block=block, path="mlp", width=4, kept=(0,)) for block in range(3))
    values = {**json.loads(plan.to_json()), "dropped_attention": [1, 2]}
    assert PruningPlan.from_json(json.dumps(values)).dropped_attention == (1, 2)
    with pytest.raises(PlanError, match="dropped_attention"):
        PruningPlan.from_json(json.dumps({**values, "dropped_attention": blocks}))


def test_auto_needs_a_budget_of_parameters(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--budget parameters"):
        prune(config(make_model("llama"), calibration_text, drop_attention="auto"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
