"""Dropping attention: the rule, the choice, the plan, and a checkpoint that reloads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cfsp_framework.api.records import PruningPlan
from cfsp_framework.config import RunConfig
from cfsp_framework.errors import ConfigError, PlanError
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.modeling.decoder import Decoder, open_decoder
from cfsp_framework.modeling.loading import open_model
from cfsp_framework.modeling.variable_width import ZeroResidual
from cfsp_framework.pipeline import prune
from cfsp_framework.pruning.attention import choose_attentions, count_to_drop
from cfsp_framework.pruning.surgery import without_attention
from cfsp_framework.runtime.progress import Progress

MakeModel = Callable[..., Path]
IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def decoder_of(folder: Path) -> Decoder:
    return open_decoder(open_model(folder), load_plugins())


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


def config(folder: Path, **options: object) -> RunConfig:
    text = folder.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, hello world this is a test. " * 60)
    given = {"model": str(folder), "calibration": str(text), "samples": 4, "seqlen": 32, "round_to": 4, **options}
    return RunConfig.build(**given)


def test_a_block_without_attention_equals_one_whose_attention_gives_zero(make_model: MakeModel) -> None:
    decoder = decoder_of(make_model("llama"))
    with without_attention(decoder, [1]):
        dropped = logits(decoder.model)
    projection = decoder.blocks[1].get_submodule("self_attn.o_proj")
    assert isinstance(projection, nn.Linear)
    nn.init.zeros_(projection.weight)
    torch.testing.assert_close(dropped, logits(decoder.model))
    assert not any(isinstance(module, ZeroResidual) for module in decoder.model.modules())


def test_the_rule_drops_more_the_more_has_to_go(make_model: MakeModel) -> None:
    decoder = decoder_of(make_model("llama"))
    counts = [count_to_drop(decoder, ratio) for ratio in (0.0, 0.1, 0.3, 0.5)]
    assert counts[0] == 0
    assert counts == sorted(counts)
    with pytest.raises(ConfigError, match="more than the blocks hold"):
        count_to_drop(decoder, 0.99)


def test_the_attention_missed_least_goes_first_and_never_the_first_blocks(make_model: MakeModel) -> None:
    decoder = decoder_of(make_model("llama"))
    idle = decoder.blocks[2].get_submodule("self_attn.o_proj")
    assert isinstance(idle, nn.Linear)
    nn.init.zeros_(idle.weight)
    for index in (0, 1):
        busy = decoder.blocks[index].get_submodule("self_attn.o_proj")
        assert isinstance(busy, nn.Linear)
        busy.weight.data.mul_(5)
    model, targets = decoder.model, logits(decoder.model).argmax(-1)
    windows = torch.cat([IDS[:, :1], targets[:, :-1]], dim=1)
    assert len(choose_attentions(decoder, windows, 2, Progress())) == 2
    assert 0 not in choose_attentions(decoder, windows, 2, Progress())
    with pytest.raises(ConfigError, match="at most 2"):
        choose_attentions(decoder, windows, 3, Progress())
    assert model is decoder.model


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_a_checkpoint_without_some_attention_reloads_and_generates(
    family: str, make_model: MakeModel, tmp_path: Path
) -> None:
    folder, out = make_model(family), tmp_path / "out"
    result = prune(config(folder, drop_attention=1, budget="parameters", ratio=0.3), out)
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
    again = prune(config(folder, budget="parameters", ratio=0.3), tmp_path / "again", plan=result.plan)
    assert torch.equal(logits(open_model(tmp_path / "again")), logits(model))
    assert again.plan == result.plan


def test_it_opens_without_this_package_and_never_without_help(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(config(make_model("llama"), drop_attention=1, allocator="uniform", criterion="magnitude"), out)
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


def test_a_plan_that_drops_the_impossible_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    result = prune(config(make_model("llama"), drop_attention=1), tmp_path / "out")
    plan = json.loads(result.plan.to_json())
    for wrong in ([0], [2, 1], [1, 1], [7]):
        with pytest.raises(PlanError, match="dropped_attention"):
            PruningPlan.from_json(json.dumps({**plan, "dropped_attention": wrong}))


def test_auto_needs_a_budget_of_parameters(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--budget parameters"):
        prune(config(make_model("llama"), drop_attention="auto"), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
