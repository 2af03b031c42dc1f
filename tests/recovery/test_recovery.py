"""Recovery: adapters lie where they are planned, training can be killed and resumed, results are merged or kept."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM

from cfsp_framework import BlockRecovery, RecoveryPlan, RunConfig, pipeline
from cfsp_framework.api.records import PruningPlan
from cfsp_framework.checkpoint.save import read_pruned
from cfsp_framework.errors import CfspError, ConfigError, PluginError
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.selection import schedule_recovery, select
from cfsp_framework.recovery.lora import add_adapters, configure_adapters, merge_adapters, remove_adapters
from cfsp_framework.recovery.plan import RecoveryTask, check_recovery_options, plan_recovery
from cfsp_framework.recovery.targets import list_trainable_blocks, select_matrices, training_precision
from cfsp_framework.recovery.trainer import StepCallback, divergence, train
from cfsp_framework.run.context import RunContext, set_up
from cfsp_framework.runtime.progress import Progress
from cfsp_plugins.recovery import UniformLora, unit_of_rank
from helpers import families
from helpers.families import tensors_of
from helpers.runs import invoke, same_weights
from helpers.tiny_models import TINY_MODELS
from helpers.types import MakeModel

Pruned = Callable[[str], Path]
IDS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(3))
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "llama4_text")


@pytest.fixture(scope="session")
def pruned(make_model: MakeModel, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """``pruned(family)``: a tiny model of blocks of different widths; pruned once, never change it."""
    folders: dict[str, Path] = {}

    def prune(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp("pruned")
            if name in families.FAMILIES and name not in TINY_MODELS:
                dense = families.write(families.build(name), folder / "dense")
            else:
                dense = make_model(name)
            options: dict[str, object] = {"samples": 4, "seqlen": 32, "round_to": 8, "device": "cpu"}
            options |= {"calibration": str(calibration_text), "allocator": "cfsp:a=40"}
            folders[name] = pipeline.prune(RunConfig.build(model=str(dense), **options), folder / name).folder
        return folders[name]

    return prune


def open_pruned(folder: Path, **options: Any) -> tuple[RunContext, PruningPlan]:
    """Open a pruned model as ``cfsp recover`` does."""
    plan, _ = read_pruned(folder)
    given = {"recovery": "ig-lora:rank=4", "seqlen": 32, "device": "cpu", **options}
    return set_up(RunConfig.build(model=str(folder), **given), Progress(), planned=True), plan


def plan_task(context: RunContext, plan: PruningPlan) -> RecoveryTask:
    task = plan_recovery(context, plan)
    assert task is not None
    return task


def count_trained(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_adapters_lie_exactly_where_they_are_planned(family: str, attention: bool, pruned: Pruned) -> None:
    context, pruning = open_pruned(pruned(family), recovery=f"ig-lora:rank=4,min_rank=0,attention={attention}".lower())
    decoder, blocks = context.decoder, list_trainable_blocks(context.decoder, pruning)
    plan = plan_task(context, pruning).plan
    plan = plan.model_copy(update={"blocks": (plan.blocks[0].model_copy(update={"rank": 0}), *plan.blocks[1:])})
    prefix = decoder.architecture.blocks
    planned: set[str] = set()
    for block in plan.blocks:
        for path, module in decoder.blocks[block.block].named_modules():
            weight = getattr(module, "weight", None)
            if block.rank and weight is not None and weight.ndim == 2 and (attention or "attn" not in path):
                planned.add(f"{prefix}.{block.block}.{path}")
    matrices = select_matrices(decoder, plan, blocks)
    assert set(matrices) == planned
    adapted = add_adapters(decoder, matrices)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trained} == planned
    shapes = [{**block.feed_forward, **(block.attention if attention else {})}.values() for block in blocks]
    assert count_trained(adapted) == sum(plan.blocks[n].rank * sum(map(sum, shapes[n])) for n in range(len(blocks)))


def test_a_pattern_that_matches_nothing_is_noticed(pruned: Pruned, monkeypatch: pytest.MonkeyPatch) -> None:
    context, plan = open_pruned(pruned("llama"))
    task = plan_task(context, plan)

    def configure_wrongly(*given: Any) -> LoraConfig:
        config = configure_adapters(*given)
        config.rank_pattern = {"layers.0": 4}
        return config

    monkeypatch.setattr("cfsp_framework.recovery.lora.configure_adapters", configure_wrongly)
    with pytest.raises(CfspError, match=r"rank and alpha \(1, .*planned was \("):
        add_adapters(context.decoder, task.matrices)
    with pytest.raises(ConfigError, match=r"this llama model .*--recovery full"):
        plan_task(*open_pruned(pruned("llama")))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", *EXPERTS])
def test_merging_gives_what_the_adapters_gave(family: str, pruned: Pruned) -> None:
    context, plan = open_pruned(pruned(family))
    adapted = add_adapters(context.decoder, plan_task(context, plan).matrices)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
        expected = context.decoder.model(IDS).logits
        merge_adapters(adapted)
        actual = context.decoder.model(IDS).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in context.decoder.model.named_modules())


@pytest.mark.parametrize("family", EXPERTS)
def test_every_expert_gets_adapters_of_its_blocks_rank(family: str, pruned: Pruned) -> None:
    context, plan = open_pruned(pruned(family))
    task = plan_task(context, plan)
    blocks = list_trainable_blocks(context.decoder, plan)
    ranks = {block.block: block.rank for block in task.plan.blocks}
    shapes = [(block.block, shape) for block in blocks for shape in block.feed_forward.values()]
    adapted = add_adapters(context.decoder, task.matrices)
    assert count_trained(adapted) == sum(ranks[block] * unit_of_rank(shape) for block, shape in shapes)
    assert any(len(shape) == 3 for _, shape in shapes)


def test_removed_adapters_leave_the_model_as_it_was(pruned: Pruned) -> None:
    context, plan = open_pruned(pruned("llama"))
    with torch.no_grad():
        expected = context.decoder.model(IDS).logits
        remove_adapters(add_adapters(context.decoder, plan_task(context, plan).matrices))
        assert torch.equal(context.decoder.model(IDS).logits, expected)


def test_training_precision_restores_dtypes_and_untrained_weights(make_model: MakeModel) -> None:
    config = RunConfig.build(model=str(make_model("llama", dtype="bfloat16")), device="cpu")
    decoder = set_up(config, Progress(), planned=True).decoder
    before = {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}
    with training_precision(decoder, RecoveryPlan(blocks=(BlockRecovery(block=0, rank=1),))):
        assert {parameter.dtype for parameter in decoder.model.parameters()} == {torch.float32}
    for name, tensor in decoder.model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


# --- training ---------------------------------------------------------------------------------------------------------

SMALL = ("--seqlen", 32, "--device", "cpu", "--recovery-steps", 10)
TINY = "rank=4,batch_tokens=128,learning_rate=0.003"


def recover(model: Path, out: Path, recovery: str, *words: object) -> dict[str, Any]:
    """Run ``cfsp recover`` for ten steps of a few tokens and return its report."""
    result = invoke("recover", model, out, *SMALL, "--recovery", recovery, *words)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def test_recover_lowers_the_loss_and_reports_it(pruned: Pruned, calibration_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = "--evaluate", calibration_text, "--recovery-steps", 40, "--recovery-check-every", 20
    report = recover(pruned("llama"), out, f"ig-lora:{TINY}", *words)
    [evaluation] = report["evaluations"]
    assert evaluation["recovered"]["nll"] < evaluation["pruned"]["nll"] - 0.1
    assert evaluation["dense"] is None
    plan = RecoveryPlan.model_validate_json((out / "recovery_plan.json").read_text())
    context, pruning = open_pruned(out)
    sizes = [3 * (context.decoder.config.hidden_size + len(entry.kept)) for entry in pruning.blocks]
    training = report["recovery"]
    assert training["parameters"] == sum(block.rank * size for block, size in zip(plan.blocks, sizes, strict=True))
    assert training["ranks"] == [block.rank for block in plan.blocks]
    assert training["tokens"] == 40 * 128
    assert [point["step"] for point in training["curve"] if point["held_out"] is not None] == [20, 40]
    assert report["components"]["recovery"].startswith("ig-lora:")
    assert '"name":"held-out"' in (out / "report.html").read_text()
    before, after = tensors_of(pruned("llama")), tensors_of(out)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".mlp." in name for name in changed)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (pruned("llama"), out)]
    assert configs[0] == configs[1]


def test_the_first_loss_is_the_models_own(pruned: Pruned, tmp_path: Path) -> None:
    context, plan = open_pruned(
        pruned("llama"), recovery="ig-lora:rank=4,batch_tokens=128", recovery_steps=1, batch_size=4
    )
    task = plan_task(context, plan)
    task = replace(task, data=replace(task.data, train=task.data.train[:4]))
    add_adapters(context.decoder, task.matrices)
    with torch.no_grad():
        ids = torch.stack([example.ids for example in task.data.train])  # (4, T)
        logits = context.decoder.model(ids).logits[:, :-1]
        expected = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    [point] = train(context, task, context.decoder.model, tmp_path).curve
    assert point.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "recovery"),
    [("gemma2", f"ig-lora:{TINY}"), ("mixtral", "full:batch_tokens=128,learning_rate=0.003")],
)
def test_prune_recovers_in_the_same_run(
    family: str, recovery: str, make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", make_model(family, dtype="bfloat16")
    small = "--calibration", calibration_text, "--samples", 4, "--round-to", 8, *SMALL, "--evaluate", calibration_text
    result = invoke("prune", model, out, *small, "--evaluate-windows", 20, "--recovery", recovery, "--json")
    assert result.exit_code == 0, result.output
    [evaluation] = json.loads(result.stdout)["evaluations"]
    assert evaluation["recovered_excess_nll"] < evaluation["excess_nll"]
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(out)(IDS).logits.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "deepseek_v3"])
def test_a_kept_adapter_loads_on_the_pruned_model_and_merges_to_the_same(
    family: str, pruned: Pruned, tmp_path: Path
) -> None:
    kept, merged, later = tmp_path / "kept", tmp_path / "merged", tmp_path / "later"
    recover(pruned(family), kept, f"ig-lora:{TINY}", "--keep-adapter")
    recover(pruned(family), merged, f"ig-lora:{TINY}")
    assert same_weights(kept, pruned(family))
    base = AutoModelForCausalLM.from_pretrained(kept)
    with warnings.catch_warnings(action="ignore"):  # of peft's, about names in Transformers
        actual = PeftModel.from_pretrained(base, str(kept / "adapter")).eval()(IDS).logits
    expected = AutoModelForCausalLM.from_pretrained(merged)(IDS).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert str(pruned(family)) not in (kept / "adapter" / "adapter_config.json").read_text()
    merging = "--adapter", kept / "adapter", "--device", "cpu"
    assert invoke("recover", kept, later, *merging).exit_code == 0
    assert same_weights(later, merged)
    assert not json.loads((later / "report.json").read_text())["recovery"]["adapter"]
    refused = invoke("recover", pruned("phi3"), tmp_path / "no", *merging)
    assert refused.exit_code == 2
    assert "is for another checkpoint" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_saving_memory_does_not_change_the_result(family: str, pruned: Pruned, tmp_path: Path) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    recover(pruned(family), large, f"ig-lora:{TINY}", "--recovery-steps", 3)
    options = f"ig-lora:{TINY},gradient_checkpointing=true"
    recover(pruned(family), small, options, "--recovery-steps", 3, "--batch-size", 1)
    torch.testing.assert_close(tensors_of(small), tensors_of(large), rtol=1e-3, atol=1e-4)
    assert not same_weights(large, pruned(family))


def test_distillation_brings_the_model_nearer_to_its_teacher(
    pruned: Pruned, make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    assert read_pruned(pruned("llama"))[0].model.source == str(make_model("llama"))
    options = f"uniform-lora:{TINY},distillation=1.0,temperature=2.0"
    recover(pruned("llama"), tmp_path / "out", options, "--recovery-steps", 30)
    ids = torch.tensor([families.tokenizer()(calibration_text.read_text()[:400])["input_ids"][:100]])
    with torch.no_grad():
        teacher, before, after = (
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0]
            for folder in (make_model("llama"), pruned("llama"), tmp_path / "out")
        )
    assert divergence(after, teacher).mean() < 0.9 * divergence(before, teacher).mean()


def test_divergence_is_that_of_distributions() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(divergence(student, teacher), (p * (p / q).log()).sum(-1))
    assert divergence(student, student, 3.0).abs().max() < 1e-6


def write_instructions(path: Path, answers: list[str]) -> str:
    rows = [{"prompt": f"say it {number}: ", "completion": answer} for number, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"instructions:{path}"


def test_instructions_can_be_trained_on(pruned: Pruned, tmp_path: Path) -> None:
    data = "--recovery-data", write_instructions(tmp_path / "rows.jsonl", ["brown fox"] * 40)
    words = *data, "--recovery-check-every", 5, "--recovery-patience", 1
    report = recover(pruned("llama"), tmp_path / "out", f"uniform-lora:{TINY},gradient_checkpointing=true", *words)
    losses = [point["loss"] for point in report["recovery"]["curve"] if point["loss"] is not None]
    assert losses[-1] < losses[0]


def test_a_tracker_gets_the_losses(pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    words = "--recovery-check-every", 5, "--report-to", "tensorboard"
    curve = recover(pruned("llama"), tmp_path / "out", f"ig-lora:{TINY}", *words)["recovery"]["curve"]
    log = events.EventAccumulator(str(tmp_path / "runs"))
    log.Reload()
    for name, tag in (("loss", "train/loss"), ("held_out", "eval/loss")):
        logged = {event.step: event.value for event in log.Scalars(tag)}
        assert logged == pytest.approx({point["step"]: point[name] for point in curve if point[name] is not None})


def test_training_without_improvement_stops_and_keeps_the_best_weights(pruned: Pruned, tmp_path: Path) -> None:
    answers = ["0123456789" if number % 20 == 19 else "brown fox" for number in range(40)]  # the others are held out
    data = "--recovery-data", write_instructions(tmp_path / "rows.jsonl", answers)
    words = *data, "--recovery-check-every", 2, "--recovery-patience", 2, "--recovery-steps"
    recovery = "full:batch_tokens=128,learning_rate=0.01,decay=constant,warmup=0"
    training = recover(pruned("llama"), tmp_path / "out", recovery, *words, 30)["recovery"]
    held_out = {point["step"]: point["held_out"] for point in training["curve"] if point["held_out"] is not None}
    best = min(held_out, key=lambda step: held_out[step])
    assert training["steps"] == max(held_out) == best + 4 < 30
    recover(pruned("llama"), tmp_path / "best", recovery, *words, best)
    assert same_weights(tmp_path / "out", tmp_path / "best")


# --- killed, and several processes ------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from cfsp_framework.recovery.trainer import StepCallback
from cfsp_framework.cli.main import main
on_step_end = StepCallback.on_step_end

def die(self, args, state, control, **more):
    on_step_end(self, args, state, control, **more)
    if state.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)

StepCallback.on_step_end = die
main()
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def test_a_killed_training_resumes_and_ends_the_same(pruned: Pruned, tmp_path: Path) -> None:
    recovery = "ig-lora:" + TINY
    words = pruned("llama"), tmp_path / "resumed", *SMALL, "--recovery", recovery, "--resume", tmp_path / "kept"
    command = [sys.executable, "-c", KILLED, "recover", *map(str, words)]
    killed = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "resumed").exists()
    [folder] = (tmp_path / "kept").iterdir()
    assert (folder / "checkpoint-6" / "trainer_state.json").exists()
    (folder / "checkpoint-7").mkdir(exist_ok=True)  # as if it had been killed while it wrote
    resumed = recover(pruned("llama"), tmp_path / "resumed", recovery, "--resume", tmp_path / "kept")
    whole = recover(pruned("llama"), tmp_path / "whole", recovery)
    assert same_weights(tmp_path / "resumed", tmp_path / "whole")
    assert resumed["recovery"] == whole["recovery"]


def test_an_interrupted_training_of_all_weights_resumes(
    pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery, resume = "full:batch_tokens=128", ("--resume", tmp_path / "kept")

    def interrupt(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StepCallback, "on_step_end", interrupt)
        words = pruned("gpt2"), tmp_path / "resumed", *SMALL, "--recovery", recovery, *resume
        assert invoke("recover", *words).exit_code == 2
    recover(pruned("gpt2"), tmp_path / "resumed", recovery, *resume)
    recover(pruned("gpt2"), tmp_path / "whole", recovery)
    assert same_weights(tmp_path / "resumed", tmp_path / "whole")


def test_two_processes_train_together(pruned: Pruned, calibration_text: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = "--recovery", f"ig-lora:{TINY}", "--recovery-steps", 4, "--evaluate", calibration_text, "--json"
    words = "-m", "cfsp_framework", "recover", pruned("llama"), tmp_path / "two", *SMALL, *data
    head = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [*head, *map(str, words)],
        env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["processes"] == 2
    assert report["recovery"]["tokens"] == 4 * 128
    [evaluation] = report["evaluations"]
    assert evaluation["recovered"]["nll"] < evaluation["pruned"]["nll"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recovery": "full", "keep_adapter": True}, "--keep-adapter"),
        ({"recovery_patience": 2}, "--recovery-check-every"),
        ({"report_to": "nothing"}, "--report-to nothing"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES=1"),
        ({"recovery_data": "nowhere.txt"}, "nowhere.txt"),
        ({"recovery_data": "instructions:nowhere.jsonl"}, "nowhere.jsonl"),
        ({"criterion": "magnitude", "allocator": "uniform", "recovery_data": None}, "--recovery-data"),
    ],
)
def test_options_are_refused_without_a_model(options: dict[str, object], message: str) -> None:
    config = RunConfig.build(**{"model": "missing", "recovery": "ig-lora", "recovery_data": "demo", **options})
    selection = select(config, load_plugins())
    with pytest.raises(CfspError, match=message):
        check_recovery_options(config, selection)
    nothing = config.replace(recovery="none")
    check_recovery_options(nothing, select(nothing, load_plugins()))


def test_text_that_was_calibrated_on_is_enough_to_train_on(pruned: Pruned) -> None:
    config = RunConfig.build(model="missing", recovery="ig-lora", criterion="magnitude", allocator="uniform")
    selection = select(config, load_plugins(), planned=True)
    plan, _ = read_pruned(pruned("llama"))
    check_recovery_options(config, selection, plan)
    with pytest.raises(ConfigError, match="--recovery-data"):
        check_recovery_options(config, selection, plan.model_copy(update={"calibration": None}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recovery", "ig-lora:rank=2,min_rank=3"], "min_rank"),
        (["--recovery", "uniform-lora:rank=99"], "rank 99"),
        (["--recovery", "none"], "recovery 'none' (plugin 'cfsp-defaults'"),
        (["--recovery", "ig-lora:direction=up"], "recovery 'ig-lora'"),
        (["--report-to", "nothing"], "--report-to nothing"),
        (["--adapter", "EMPTY", "--keep-adapter"], "--keep-adapter"),
        (["--adapter", "EMPTY"], "recovery_plan.json"),
    ],
)
def test_bad_input_is_refused_in_one_line(words: list[str], message: str, pruned: Pruned, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    words = [word.replace("EMPTY", str(tmp_path / "empty")) for word in words]
    result = invoke("recover", pruned("llama"), tmp_path / "out", *SMALL, *words)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_not_pruned_cannot_be_recovered(make_model: MakeModel, tmp_path: Path) -> None:
    result = invoke("recover", make_model("llama"), tmp_path / "out", *SMALL)
    assert result.exit_code == 2
    assert "no pruning_plan.json" in result.stderr


def test_a_streamed_model_cannot_be_trained(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    small = "--calibration", calibration_text, "--samples", 4, "--round-to", 8, *SMALL
    result = invoke("prune", make_model("llama"), tmp_path / "out", *small, "--recovery", "ig-lora", "--stream")
    assert result.exit_code == 2
    assert "--stream: ig-lora" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (BlockRecovery(block=9, rank=1),)}, "names blocks"),
        ({"blocks": (BlockRecovery(block=0, rank=0),)}, "trains no block"),
        ({"targets": ("mlp.nothing",)}, "targets 'mlp.nothing', which no block has"),
    ],
)
def test_a_recovery_plan_that_does_not_fit_is_blamed_on_the_scheduler(
    changes: Mapping[str, Any], message: str, pruned: Pruned
) -> None:
    context, plan = open_pruned(pruned("llama"))
    blocks = list_trainable_blocks(context.decoder, plan)

    class Misfit(UniformLora):
        def schedule(self, *arguments: Any) -> RecoveryPlan | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            recovery = super().schedule(*arguments)
            assert recovery is not None
            return recovery.model_copy(update=dict(changes))

    scheduler = replace(context.selection.recovery, component=Misfit(rank=2))
    with pytest.raises(PluginError, match=f"lora.*{message}"):
        schedule_recovery(scheduler, (), plan, blocks)
