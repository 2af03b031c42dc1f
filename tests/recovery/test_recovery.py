"""Recovery: ranks keep their budget, adapters lie where they are meant to, training can be killed, results are checked."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from cfsp_framework import BlockRecovery, RecoveryPlan, RunConfig, TrainableBlock, pipeline
from cfsp_framework.api.records import BlockPlan, ModelIdentity, PruningPlan
from cfsp_framework.checkpoint.save import read_pruned
from cfsp_framework.cli.main import cli
from cfsp_framework.data.training import NOT_LEARNT, instructions, packed_windows, training_data
from cfsp_framework.errors import CfspError, ConfigError, DataError, PluginError
from cfsp_framework.recovery import recover as recovery_module
from cfsp_framework.recovery.lora import adapter_config, add_adapters, merge, remove_adapters
from cfsp_framework.recovery.recover import plan_recovery
from cfsp_framework.recovery.targets import adapted, trainable_blocks, trained_precision
from cfsp_framework.recovery.trainer import TrainerSettings, divergence, train
from cfsp_framework.run.context import RunContext, set_up
from cfsp_framework.runtime.progress import Progress
from cfsp_plugins.recovery import Full, IgLora, UniformLora, spread_ranks, unit_of_rank
from helpers import families
from helpers.tiny_models import TINY_MODELS

MakeModel = Callable[..., Path]
IDS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(3))


# --- ranks ------------------------------------------------------------------------------------------------------------


@st.composite
def budgets(draw: st.DrawFn, equal: bool = False) -> tuple[list[float], list[int], list[int], int]:
    """Weights, costs, caps and a rank that fits under the caps."""
    count = draw(st.integers(1, 12))
    weights = draw(st.lists(st.floats(0, 10), min_size=count, max_size=count))
    costs = draw(st.lists(st.integers(50, 400), min_size=count, max_size=count))
    if equal:
        costs = [costs[0]] * count
    rank = draw(st.integers(1, 16))
    caps = draw(st.lists(st.integers(rank, 40), min_size=count, max_size=count))
    return weights, costs, caps, rank


@given(budgets())
def test_ranks_spend_the_budget_but_for_less_than_one_unit(
    drawn: tuple[list[float], list[int], list[int], int],
) -> None:
    weights, costs, caps, rank = drawn
    ranks = spread_ranks(weights, costs, caps, rank)
    left = rank * sum(costs) - sum(cost * one for cost, one in zip(costs, ranks, strict=True))
    assert 0 <= left < max(costs)
    assert all(1 <= one <= cap for one, cap in zip(ranks, caps, strict=True))


@given(budgets(equal=True))
def test_ranks_sum_to_the_budget_where_all_blocks_cost_the_same(
    drawn: tuple[list[float], list[int], list[int], int],
) -> None:
    weights, costs, caps, rank = drawn
    assert sum(spread_ranks(weights, costs, caps, rank)) == rank * len(weights)


@given(budgets())
def test_a_block_of_more_weight_never_gets_less(drawn: tuple[list[float], list[int], list[int], int]) -> None:
    weights, costs, caps, rank = drawn
    ranks = spread_ranks(weights, costs, [min(caps)] * len(caps), rank)
    for i, more in enumerate(ranks):
        assert all(more >= less for less, weight in zip(ranks, weights, strict=True) if weight < weights[i])


def test_ranks_are_in_proportion() -> None:
    assert spread_ranks([4, 2, 1, 1], [10] * 4, [64] * 4, 8) == [16, 8, 4, 4]
    assert spread_ranks([0, 0, 0], [10] * 3, [64] * 3, 8) == [8, 8, 8]
    assert spread_ranks([0, 1, 1], [10] * 3, [64] * 3, 4) == [1, 6, 5]  # the first on a tie
    assert spread_ranks([9, 1, 1], [10] * 3, [8, 64, 64], 8) == [8, 8, 8]
    assert spread_ranks([0, 1], [10] * 2, [8, 8], 8, least=0) == [8, 8]  # caps leave some over


def blocks_of(*widths: int, hidden: int = 32) -> list[TrainableBlock]:
    """Gated feed-forwards of these widths."""
    return [
        TrainableBlock(
            index,
            {
                "mlp.gate_proj": (width, hidden),
                "mlp.up_proj": (width, hidden),
                "mlp.down_proj": (hidden, width),
            },
            {"self_attn.q_proj": (hidden, hidden)},
        )
        for index, width in enumerate(widths)
    ]


def plan_of(kept: Sequence[int], importance: Sequence[float | None], width: int = 64) -> PruningPlan:
    """A plan that keeps so many channels."""
    return PruningPlan(
        model=ModelIdentity(source="tiny", family="llama", fingerprint="", parameters=0),
        calibration=None,
        ratio=0.5,
        budget="channels",
        round_to=1,
        seed=0,
        components={},
        versions={},
        blocks=tuple(
            BlockPlan(block=index, path="mlp", width=width, importance=value, kept=tuple(range(count)))
            for index, (count, value) in enumerate(zip(kept, importance, strict=True))
        ),
    )


def ranks_of(found: RecoveryPlan | None) -> list[int]:
    assert found is not None
    return [one.rank for one in found.blocks]


def test_directions_are_nearly_opposite_and_spend_the_same() -> None:
    plan, blocks = plan_of([64, 32, 16, 16], [0.8, 0.4, 0.2, 0.2]), blocks_of(64, 32, 16, 16)
    toward = ranks_of(IgLora(rank=4).schedule((), plan, blocks))
    removed = ranks_of(IgLora(rank=4, direction="removed").schedule((), plan, blocks))
    uniform = ranks_of(UniformLora(rank=4).schedule((), plan, blocks))
    assert toward == sorted(toward, reverse=True)
    assert removed == sorted(removed)
    assert uniform == [4] * 4
    costs = [3 * (32 + width) for width in (64, 32, 16, 16)]
    spent = [sum(cost * rank for cost, rank in zip(costs, ranks, strict=True)) for ranks in (toward, removed, uniform)]
    assert all(0 <= spent[2] - one < max(costs) for one in spent)


def test_without_importance_the_kept_share_stands_for_it() -> None:
    plan, blocks = plan_of([64, 32, 16], [None] * 3), blocks_of(64, 32, 16)
    kept = ranks_of(IgLora().schedule((), plan, blocks))
    assert kept == ranks_of(IgLora().schedule((), plan_of([64, 32, 16], [4.0, 2.0, 1.0]), blocks))
    assert kept == sorted(kept, reverse=True)
    removed = ranks_of(IgLora(direction="removed").schedule((), plan, blocks))
    assert removed == sorted(removed)


def test_the_learning_rate_follows_the_hidden_size_where_none_is_given() -> None:
    def rate(scheduler: UniformLora | Full, hidden: int) -> float:
        found = scheduler.schedule((), plan_of([32], [1.0]), blocks_of(32, hidden=hidden))
        assert found is not None
        return found.learning_rate

    assert rate(UniformLora(), 2000) == pytest.approx(5e-4)
    assert rate(UniformLora(), 4096) == pytest.approx(2.86e-4, rel=1e-2)
    assert rate(Full(), 256) == pytest.approx(rate(UniformLora(), 256) / 10)
    assert rate(UniformLora(learning_rate=0.01), 256) == 0.01


def test_the_schedulers_say_what_is_trained() -> None:
    plan, blocks = plan_of([32, 32], [1.0, 1.0]), blocks_of(32, 32)
    found = IgLora(rank=4, scale=3, attention=True, distillation=0.25, decay="linear").schedule((), plan, blocks)
    assert found is not None
    assert found.targets == ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")
    assert [one.alpha for one in found.blocks] == [12, 12]
    assert found.distillation is not None
    assert (found.decay, found.distillation.weight) == ("linear", 0.25)
    assert RecoveryPlan.model_validate_json(found.to_json()) == found
    full = Full().schedule((), plan, blocks)
    assert full is not None
    assert full.full


def test_budgets_that_cannot_be_met_are_refused() -> None:
    plan, blocks = plan_of([4, 4], [1.0, 1.0]), blocks_of(4, 4)
    with pytest.raises(ConfigError, match="rank 2 is too small a budget: min_rank 3"):
        IgLora(rank=2, min_rank=3).schedule((), plan, blocks)
    with pytest.raises(ConfigError, match="min_rank 3 is above max_rank 2"):
        IgLora(rank=2, min_rank=3, max_rank=2).schedule((), plan, blocks)
    with pytest.raises(ConfigError, match="rank 8 is too large a budget: what the matrices hold, or max_rank, is 4 on"):
        UniformLora(rank=8).schedule((), plan, blocks)


# --- adapters ---------------------------------------------------------------------------------------------------------


EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "llama4_text")
OPTIONS: dict[str, Any] = {"samples": 4, "seqlen": 32, "round_to": 8, "device": "cpu"}


@pytest.fixture(scope="session")
def pruned(
    make_model: MakeModel, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """``pruned(family)``: a tiny model of blocks of different widths; made once, never change it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("pruned")
            if name in families.FAMILIES and name not in TINY_MODELS:
                families.build(name).save_pretrained(folder / "dense")
                families.tokenizer().save_pretrained(folder / "dense")
                dense = folder / "dense"
            else:
                dense = make_model(name)
            config = RunConfig.build(
                model=str(dense), calibration=str(calibration_text), allocator="cfsp:a=40", **OPTIONS
            )
            made[name] = pipeline.prune(config, folder / name).folder
        return made[name]

    return make


def opened(folder: Path, **options: Any) -> tuple[RunContext, PruningPlan]:
    """A pruned model as ``cfsp recover`` opens it."""
    plan, _ = read_pruned(folder)
    given = {"recovery": "ig-lora:rank=4", "seqlen": 32, "device": "cpu", **options}
    return set_up(RunConfig.build(model=str(folder), **given), Progress(), planned=True), plan


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_adapters_lie_exactly_where_they_are_meant_to(
    family: str, attention: bool, pruned: Callable[[str], Path]
) -> None:
    context, plan = opened(pruned(family), recovery=f"ig-lora:rank=4,min_rank=0,attention={attention}".lower())
    decoder, blocks = context.decoder, trainable_blocks(context.decoder, plan)
    wanted = context.selection.recovery.component.schedule((), plan, blocks)
    assert wanted is not None
    wanted = wanted.model_copy(update={"blocks": (wanted.blocks[0].model_copy(update={"rank": 0}), *wanted.blocks[1:])})
    matrices = adapted(decoder, wanted, blocks)
    expected = {
        name: name.split(".")[-1]
        for name, module in decoder.model.named_modules()
        if name.startswith(decoder.architecture.blocks) and hasattr(module, "weight") and module.weight.ndim == 2
    }
    kinds = {path.split(".")[-1] for path in (blocks[0].feed_forward if not attention else expected)}
    trained = [one.block for one in wanted.blocks if one.rank]
    meant = {
        name
        for name in expected
        if int(name.removeprefix(f"{decoder.architecture.blocks}.").split(".")[0]) in trained
        and (name.split(".")[-1] in kinds or attention)
        and (attention or "attn" not in name)
    }
    assert set(matrices) == meant
    learner = add_adapters(decoder, matrices)
    takes = {name for name, parameter in learner.named_parameters() if parameter.requires_grad}
    assert {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in takes} == meant
    ranks = {one.block: one.rank for one in wanted.blocks}
    count = sum(
        ranks[block.block] * sum(map(sum, {**block.feed_forward, **(block.attention if attention else {})}.values()))
        for block in blocks
    )
    assert sum(p.numel() for p in learner.parameters() if p.requires_grad) == count


def test_a_pattern_that_matches_nothing_is_noticed(
    pruned: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    context, plan = opened(pruned("llama"))
    task = plan_recovery_on_text(context, plan)
    own = adapter_config

    def wrong(*given: Any) -> Any:
        found = own(*given)
        found.rank_pattern = {"layers.0": 4}
        return found

    monkeypatch.setattr("cfsp_framework.recovery.lora.adapter_config", wrong)
    with pytest.raises(CfspError, match=r"rank and alpha \(1, .*where \("):
        add_adapters(context.decoder, task.matrices)
    again, _ = opened(pruned("llama"))
    with pytest.raises(ConfigError, match=r"peft does not adapt this llama model as meant .* choose --recovery full"):
        plan_recovery_on_text(again, plan)


def plan_recovery_on_text(context: RunContext, plan: PruningPlan) -> recovery_module.RecoveryTask:
    """What the bench's scheduler wants, on the text the model was calibrated on."""
    assert plan.calibration is not None
    data = context.config.recovery.data or plan.calibration.spec
    task = plan_recovery(replace(context, config=context.config.replace(recovery_data=data)), plan)
    assert task is not None
    return task


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", *EXPERTS])
def test_merging_gives_what_the_adapters_gave(family: str, pruned: Callable[[str], Path]) -> None:
    context, plan = opened(pruned(family))
    learner = add_adapters(context.decoder, plan_recovery_on_text(context, plan).matrices)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
        before = context.decoder.model(IDS).logits
        merge(learner)
        after = context.decoder.model(IDS).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in context.decoder.model.named_modules())


@pytest.mark.parametrize("family", EXPERTS)
def test_every_expert_gets_adapters_of_its_blocks_rank(family: str, pruned: Callable[[str], Path]) -> None:
    context, plan = opened(pruned(family))
    task = plan_recovery_on_text(context, plan)
    blocks = trainable_blocks(context.decoder, plan)
    learner = add_adapters(context.decoder, task.matrices)
    ranks = {one.block: one.rank for one in task.plan.blocks}
    expected = sum(ranks[b.block] * unit_of_rank(shape) for b in blocks for shape in b.feed_forward.values())
    assert sum(p.numel() for p in learner.parameters() if p.requires_grad) == expected
    assert any(len(shape) == 3 for b in blocks for shape in b.feed_forward.values())


def test_precision_comes_back_and_what_was_not_trained_with_it(make_model: MakeModel) -> None:
    model = make_model("llama", dtype="bfloat16")
    context = set_up(RunConfig.build(model=str(model), device="cpu"), Progress(), planned=True)
    before = {name: tensor.clone() for name, tensor in context.decoder.model.state_dict().items()}
    plan = RecoveryPlan(blocks=(BlockRecovery(block=0, rank=1),))
    with trained_precision(context.decoder, plan):
        assert {parameter.dtype for parameter in context.decoder.model.parameters()} == {torch.float32}
    for name, tensor in context.decoder.model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


# --- data -------------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


FORMS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "the quick ", "completion": "brown fox"},
    "response": {"prompt": "the quick ", "response": "brown fox"},
    "question": {"question": "the quick ", "answer": "brown fox"},
    "alpaca": {"instruction": "say it", "input": "quick", "output": "brown fox"},
    "dolly": {"instruction": "say it", "context": "quick", "response": "brown fox", "category": "x"},
    "turns": {
        "prompt": [{"role": "user", "content": "the quick"}],
        "completion": [{"role": "assistant", "content": "brown fox"}],
    },
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "hello"},
            {"from": "human", "value": "the quick"},
            {"from": "gpt", "value": "brown fox"},
        ]
    },
    "messages": {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "world"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "brown fox"},
        ]
    },
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("form", FORMS)
def test_only_answers_are_learnt(form: str, template: str | None, tmp_path: Path) -> None:
    tokenizer = families.tokenizer()
    path = write_rows(tmp_path / "rows.jsonl", [FORMS[form]] * 3)
    own = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        found = instructions(str(path), tokenizer, 512)
    finally:
        tokenizer.chat_template = own
    assert len(found) == 3
    one = found[0]
    learnt = one.labels != NOT_LEARNT
    assert torch.equal(one.ids[learnt], one.labels[learnt])
    said = tokenizer.decode(one.ids[learnt], skip_special_tokens=False)
    end = "</s>" if template else (tokenizer.eos_token or "")
    assert said == (f"world{end}brown fox{end}" if form == "messages" else f"brown fox{end}")
    whole = tokenizer.decode(one.ids, skip_special_tokens=False)
    assert "brown fox" in whole
    assert ("hello" if form == "messages" else "quick") in whole


def test_instructions_are_cut_and_rows_without_an_answer_left_out(tmp_path: Path) -> None:
    tokenizer = families.tokenizer()
    rows = [{"prompt": "x" * 200, "completion": "y"}, {"prompt": "x", "completion": "y" * 200}]
    [one] = instructions(str(write_rows(tmp_path / "rows.jsonl", rows)), tokenizer, 20)
    assert len(one.ids) == 20
    with pytest.raises(DataError, match="no row has an answer within 20 tokens"):
        instructions(str(write_rows(tmp_path / "long.jsonl", rows[:1])), tokenizer, 20)


def test_packed_windows_have_no_gaps_and_mix_by_weight(tmp_path: Path) -> None:
    tokenizer = families.tokenizer()
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("a" * 1000)
    second.write_text("b" * 1000)
    windows = packed_windows(str(first), tokenizer, 10, 100)
    ids = tokenizer("a" * 1000)["input_ids"]
    assert windows.flatten().tolist() == ids[: len(ids) // 10 * 10]
    mixed = packed_windows(f"{first}=0.75,{second}=0.25", tokenizer, 10, 100)
    letters = [tokenizer.decode(window)[-1] for window in mixed]
    assert abs(letters.count("a") - 3 * letters.count("b")) <= 3


def test_held_out_sequences_are_not_trained_on(calibration_text: Path) -> None:
    tokenizer = families.tokenizer()
    windows = packed_windows(str(calibration_text), tokenizer, 32, 0).tolist()
    data = training_data(str(calibration_text), tokenizer, 32, 0, hold_out=True)
    held_out = windows[19::20][:64]
    assert [one.ids.tolist() for one in data.held_out] == held_out
    assert [one.ids.tolist() for one in data.train] == [w for i, w in enumerate(windows) if i % 20 != 19 or i >= 1280]


# --- training ---------------------------------------------------------------------------------------------------------


def run(*words: object) -> Result:
    """The command line in this process; an error that is not told to the user is raised."""
    result = CliRunner().invoke(cli, list(map(str, words)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


SMALL = ("--seqlen", 32, "--device", "cpu", "--recovery-steps", 10)
TINY = "rank=4,batch_tokens=128,learning_rate=0.003"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(left: Path, right: Path) -> bool:
    one, other = weights(left), weights(right)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_recover_lowers_the_loss_and_says_so(
    pruned: Callable[[str], Path], calibration_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = "recover", pruned("llama"), out, *SMALL, "--recovery", f"ig-lora:{TINY}", "--evaluate", calibration_text
    result = run(*words, "--recovery-steps", 40, "--recovery-check-every", 20)
    assert result.exit_code == 0, result.output
    assert "recovered" in result.output
    assert "Trained " in result.output
    told = json.loads((out / "report.json").read_text())
    [found] = told["evaluations"]
    assert found["recovered"]["nll"] < found["pruned"]["nll"] - 0.1
    assert found["dense"] is None
    plan = RecoveryPlan.model_validate_json((out / "recovery_plan.json").read_text())
    context, pruning = opened(out)
    sizes = [3 * (context.decoder.config.hidden_size + len(entry.kept)) for entry in pruning.blocks]
    spent = sum(one.rank * size for one, size in zip(plan.blocks, sizes, strict=True))
    assert told["recovery"]["parameters"] == spent
    assert told["recovery"]["ranks"] == [one.rank for one in plan.blocks]
    assert told["recovery"]["tokens"] == 40 * 128
    assert [p["step"] for p in told["recovery"]["curve"] if p["held_out"] is not None] == [20, 40]
    assert told["components"]["recovery"].startswith("ig-lora:")
    assert "polyline" in (out / "report.html").read_text()
    changed = {name for name, tensor in weights(out).items() if not torch.equal(tensor, weights(pruned("llama"))[name])}
    assert changed
    assert all(".mlp." in name for name in changed)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (pruned("llama"), out))
    assert before == after


def test_the_first_loss_is_the_models_own(
    pruned: Callable[[str], Path], calibration_text: Path, tmp_path: Path
) -> None:
    context, plan = opened(pruned("llama"), recovery_data=str(calibration_text), recovery_steps=1)
    task = plan_recovery_on_text(context, plan)
    one = replace(task.data, train=task.data.train[:4])
    add_adapters(context.decoder, task.matrices)
    course = TrainerSettings(tmp_path, torch.device("cpu"), batch_sequences=4, seqlen=32)
    with torch.no_grad():
        ids = torch.stack([example.ids for example in one.train])
        logits = context.decoder.model(ids).logits[:, :-1]
        expected = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    [point] = train(context.decoder.model, task.plan, one, course).curve
    assert point.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("recovery", [f"ig-lora:{TINY}", "full:batch_tokens=128,learning_rate=0.003"])
def test_prune_recovers_in_one_go(recovery: str, make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out", make_model("gemma2" if recovery.startswith("ig") else "mixtral", dtype="bfloat16")
    small = "--calibration", calibration_text, "--samples", 4, "--round-to", 8, *SMALL, "--evaluate", calibration_text
    result = run("prune", model, out, *small, "--evaluate-windows", 20, "--recovery", recovery, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    [found] = told["evaluations"]
    assert found["recovered_excess_nll"] < found["excess_nll"]
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded(IDS).logits.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "deepseek_v3"])
def test_a_kept_adapter_loads_on_the_pruned_base_and_merges_to_the_same(
    family: str, pruned: Callable[[str], Path], calibration_text: Path, tmp_path: Path
) -> None:
    words = "--recovery", f"ig-lora:{TINY}", "--recovery-data", calibration_text
    kept, merged, later = tmp_path / "kept", tmp_path / "merged", tmp_path / "later"
    result = run("recover", pruned(family), kept, *SMALL, *words, "--keep-adapter")
    assert result.exit_code == 0, result.output
    assert run("recover", pruned(family), merged, *SMALL, *words).exit_code == 0
    assert same(kept, pruned(family))
    base = AutoModelForCausalLM.from_pretrained(kept)
    with warnings.catch_warnings(action="ignore"):  # of peft's, about names in Transformers
        found = PeftModel.from_pretrained(base, str(kept / "adapter")).eval()(IDS).logits
    expected = AutoModelForCausalLM.from_pretrained(merged)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert str(pruned(family)) not in (kept / "adapter" / "adapter_config.json").read_text()
    result = run("recover", kept, later, "--adapter", kept / "adapter", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert same(later, merged)
    told = json.loads((later / "report.json").read_text())["recovery"]
    assert not told["adapter"]
    refused = run("recover", pruned("phi3"), tmp_path / "no", "--adapter", kept / "adapter", "--device", "cpu")
    assert refused.exit_code == 2
    assert "is for another checkpoint than" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_memory_can_be_saved_without_changing_what_is_learnt(
    family: str, pruned: Callable[[str], Path], calibration_text: Path, tmp_path: Path
) -> None:
    data = "--recovery-data", calibration_text, "--recovery-steps", 3
    found = []
    for options, more in (("", ()), (",gradient_checkpointing=true", ("--batch-size", 1))):
        recovery = "--recovery", f"ig-lora:{TINY}{options}"
        result = run("recover", pruned(family), tmp_path / "out", *SMALL, *data, *recovery, *more, "--overwrite")
        assert result.exit_code == 0, result.output
        found.append(weights(tmp_path / "out"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(tensor, weights(pruned(family))[name]) for name, tensor in found[0].items())


def test_distillation_brings_the_model_nearer_to_its_teacher(
    pruned: Callable[[str], Path], make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    recovery = f"uniform-lora:{TINY},distillation=1.0,temperature=2.0"
    assert read_pruned(pruned("llama"))[0].model.source == str(make_model("llama"))
    words = "--recovery", recovery, "--recovery-data", calibration_text, "--recovery-steps", 30
    result = run("recover", pruned("llama"), tmp_path / "out", *SMALL, *words)
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        teacher, before, after = (
            AutoModelForCausalLM.from_pretrained(folder)(text_ids(calibration_text)).logits[0]
            for folder in (make_model("llama"), pruned("llama"), tmp_path / "out")
        )
    assert divergence(after, teacher).mean() < 0.9 * divergence(before, teacher).mean()


def text_ids(path: Path) -> Tensor:
    return torch.tensor([families.tokenizer()(path.read_text()[:400])["input_ids"][:100]])


def test_divergence_is_that_of_distributions() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(5, 7), torch.randn(5, 7)
    p, q = theirs.softmax(-1), ours.softmax(-1)
    torch.testing.assert_close(divergence(ours, theirs), (p * (p / q).log()).sum(-1))
    assert divergence(ours, ours, 3.0).abs().max() < 1e-6


def test_instructions_can_be_trained_on(pruned: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [{"prompt": f"the quick {n} ", "completion": "brown fox"} for n in range(40)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = "--recovery-data", f"instructions:{path}", "--recovery-check-every", 5, "--recovery-patience", 1
    result = run(
        "recover",
        pruned("llama"),
        tmp_path / "out",
        *SMALL,
        "--recovery",
        f"uniform-lora:{TINY},gradient_checkpointing=true",
        *data,
    )
    assert result.exit_code == 0, result.output
    curve = json.loads((tmp_path / "out" / "report.json").read_text())["recovery"]["curve"]
    losses = [point["loss"] for point in curve if point["loss"] is not None]
    assert losses[-1] < losses[0]


def test_a_tracker_is_told_the_loss(
    pruned: Callable[[str], Path], calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    data = "--recovery", f"ig-lora:{TINY}", "--recovery-data", calibration_text, "--recovery-check-every", 5
    result = run("recover", pruned("llama"), tmp_path / "out", *SMALL, *data, "--report-to", "tensorboard")
    assert result.exit_code == 0, result.output
    curve = json.loads((tmp_path / "out" / "report.json").read_text())["recovery"]["curve"]
    found = events.EventAccumulator(str(tmp_path / "runs"))
    found.Reload()
    for name, tag in (("loss", "train/loss"), ("held_out", "eval/loss")):
        told = {event.step: event.value for event in found.Scalars(tag)}
        assert told == pytest.approx({point["step"]: point[name] for point in curve if point[name] is not None})


def test_a_training_that_gains_nothing_stops_and_keeps_the_best(pruned: Callable[[str], Path], tmp_path: Path) -> None:
    answers = ["0123456789" if n % 20 == 19 else "brown fox" for n in range(40)]  # the others are held out
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "say it: ", "completion": answer} for answer in answers])
    data = "--recovery-data", f"instructions:{rows}", "--recovery-check-every", 2, "--recovery-patience", 2
    recovery = "full:batch_tokens=128,learning_rate=0.01,decay=constant,warmup=0"
    words = *SMALL, "--recovery", recovery, *data, "--recovery-steps"
    assert run("recover", pruned("llama"), tmp_path / "out", *words, 30).exit_code == 0
    told = json.loads((tmp_path / "out" / "report.json").read_text())["recovery"]
    held_out = {point["step"]: point["held_out"] for point in told["curve"] if point["held_out"] is not None}
    best = min(held_out, key=lambda step: held_out[step])
    assert told["steps"] == max(held_out) == best + 4 < 30
    assert run("recover", pruned("llama"), tmp_path / "best", *words, best).exit_code == 0
    assert same(tmp_path / "out", tmp_path / "best")


# --- killed, and several processes --------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from cfsp_framework.recovery import trainer as training
from cfsp_framework.cli.main import main
own = training._Steps.on_step_end

def die(self, args, state, control, **more):
    own(self, args, state, control, **more)
    if state.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)

training._Steps.on_step_end = die
main()
"""


def test_a_killed_training_goes_on_and_ends_the_same(
    pruned: Callable[[str], Path], calibration_text: Path, tmp_path: Path
) -> None:
    data = "--recovery", f"ig-lora:{TINY}", "--recovery-data", calibration_text
    words = "recover", pruned("llama"), tmp_path / "resumed", *SMALL, *data, "--resume", tmp_path / "kept"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, words)], env=environment, capture_output=True, timeout=120, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "resumed").exists()
    [folder] = (tmp_path / "kept").iterdir()
    assert (folder / "checkpoint-6" / "trainer_state.json").exists()
    (folder / "checkpoint-7").mkdir(exist_ok=True)  # as if it had been killed while it wrote
    assert run(*words).exit_code == 0
    assert run("recover", pruned("llama"), tmp_path / "whole", *SMALL, *data).exit_code == 0
    assert same(tmp_path / "resumed", tmp_path / "whole")
    curves = [json.loads((tmp_path / n / "report.json").read_text())["recovery"] for n in ("resumed", "whole")]
    assert curves[0] == curves[1]


def test_an_interrupted_training_of_all_weights_goes_on_too(
    pruned: Callable[[str], Path], calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = "--recovery", "full:batch_tokens=128", "--recovery-data", calibration_text
    words = "recover", pruned("gpt2"), tmp_path / "resumed", *SMALL, *data, "--resume", tmp_path / "kept"

    def interrupt(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("cfsp_framework.recovery.trainer._Steps.on_step_end", interrupt)
        assert run(*words).exit_code == 2
    assert run(*words).exit_code == 0
    assert run("recover", pruned("gpt2"), tmp_path / "whole", *SMALL, *data).exit_code == 0
    assert same(tmp_path / "resumed", tmp_path / "whole")


def test_two_processes_train_together(pruned: Callable[[str], Path], calibration_text: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = "--recovery", f"ig-lora:{TINY}", "--recovery-data", calibration_text, "--recovery-steps", 4
    words = "recover", pruned("llama"), tmp_path / "two", *SMALL, *data, "--evaluate", calibration_text, "--json"
    head = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*head, "-m", "cfsp_framework", *map(str, words)],
        env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["processes"] == 2
    assert told["recovery"]["tokens"] == 4 * 128
    [found] = told["evaluations"]
    assert found["recovered"]["nll"] < found["pruned"]["nll"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "message"), [
    (["--recovery", "ig-lora:rank=2,min_rank=3"], "rank 2 is too small a budget"),
    (["--recovery", "uniform-lora:rank=99"], "rank 99 is too large a budget"),
    (["--recovery", "none"], "recovery 'none' (plugin 'cfsp-defaults' of cfsp-framework 0.1.0) trains nothing"),
    (["--recovery", "ig-lora:direction=up"], "Bad options for recovery 'ig-lora'"),
    (["--recovery", "full", "--keep-adapter"], "there is no adapter"),
    (["--recovery-patience", "2"], "give --recovery-check-every too"),
    (["--report-to", "nothing"], "--report-to nothing: no such tracker."),
    (["--recovery-data", "nowhere.txt"], "there is no such file or name"),
    (["--recovery-data", "instructions:nowhere.jsonl"], "there is no such file or folder"),
    (["--recovery-data", "instructions:TEXT"], "holds no instructions: it has columns text; expected one of messages, "),
    (["--recovery-data", "instructions:ODD"], "row 0 is not an instruction: it holds int where text is expected"),
    (["--recovery-data", "instructions:SILENT"], "row 0 is not an instruction: a turn has no 'content'"),
    (["--recovery-data", "instructions:NONE"], "holds no rows"),
    (["--adapter", "EMPTY", "--keep-adapter"], "leave one of both out"),
    (["--adapter", "EMPTY"], "has no recovery_plan.json to tell which model it is for"),
])  # fmt: skip
def test_bad_input_is_refused_in_a_line(
    words: list[str], message: str, pruned: Callable[[str], Path], calibration_text: Path, tmp_path: Path
) -> None:
    files = {
        "TEXT": str(write_rows(tmp_path / "text.jsonl", [{"text": "hello"}])),
        "ODD": str(write_rows(tmp_path / "odd.jsonl", [{"prompt": 1, "completion": "x"}])),
        "SILENT": str(write_rows(tmp_path / "silent.jsonl", [{"messages": [{"role": "user"}]}])),
        "NONE": str(write_rows(tmp_path / "none.jsonl", [])),
        "EMPTY": str(tmp_path / "empty"),
    }
    (tmp_path / "empty").mkdir()
    for name, path in files.items():
        words = [word.replace(name, path) for word in words]
    given = [] if "--recovery-data" in words else ["--recovery-data", calibration_text]
    result = run("recover", pruned("llama"), tmp_path / "out", *SMALL, *given, *words)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_plan_that_measured_nothing_leaves_no_text_to_train_on(make_model: MakeModel, tmp_path: Path) -> None:
    small = *SMALL, "--round-to", 8, "--criterion", "magnitude", "--allocator", "uniform"
    result = run("prune", make_model("llama"), tmp_path / "out", *small, "--recovery", "ig-lora")
    assert result.exit_code == 2
    assert "there is no text to train on; give --recovery-data." in result.stderr


def test_a_model_that_was_not_pruned_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    result = run("recover", make_model("llama"), tmp_path / "out", *SMALL)
    assert result.exit_code == 2
    assert "has no pruning_plan.json: it was not written by `cfsp prune`." in result.stderr


def test_streams_are_refused(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    small = "--calibration", calibration_text, "--samples", 4, "--round-to", 8, *SMALL
    result = run("prune", make_model("llama"), tmp_path / "out", *small, "--recovery", "ig-lora", "--stream")
    assert result.exit_code == 2
    assert "--stream: ig-lora trains the whole model" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("changes", "message"), [
    ({"blocks": (BlockRecovery(block=9, rank=1),)}, "names blocks"),
    ({"blocks": (BlockRecovery(block=0, rank=0),)}, "trains no block"),
    ({"targets": ("mlp.nothing",)}, "no block has 'mlp.nothing'"),
])  # fmt: skip
def test_a_schedulers_plan_that_does_not_fit_is_its_fault(
    changes: Mapping[str, Any], message: str, pruned: Callable[[str], Path]
) -> None:
    context, plan = opened(pruned("llama"))
    blocks = trainable_blocks(context.decoder, plan)
    wanted = UniformLora(rank=2).schedule((), plan, blocks)
    assert wanted is not None
    with pytest.raises(PluginError, match=message):
        recovery_module.check_schedule(context.selection.recovery, wanted.model_copy(update=dict(changes)), blocks)


def test_adapters_can_be_taken_out_again(pruned: Callable[[str], Path]) -> None:
    context, plan = opened(pruned("llama"))
    with torch.no_grad():
        before = context.decoder.model(IDS).logits
        learner = add_adapters(context.decoder, plan_recovery_on_text(context, plan).matrices)
        remove_adapters(learner)
        assert torch.equal(context.decoder.model(IDS).logits, before)
