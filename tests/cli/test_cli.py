"""The command line as its users meet it: what it prints, what it writes, what it refuses and how."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cfsp_framework.api.records import PruningPlan
from cfsp_framework.cli.main import COMMANDS, cli

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "cfsp-peak" / "src" / "cfsp_peak" / "__init__.py"
MakeModel = Callable[..., Path]

PLUGIN = """
import time
from pathlib import Path
import torch
from cfsp_framework import Criterion, Statistic, hookimpl

class Bad(Criterion):
    name = "bad"
    requires = frozenset({Statistic("down_input_squares")})

    def score(self, feed_forward, statistics):
        if feed_forward.block == 1:
            BODY
        return torch.ones(feed_forward.width)

@hookimpl
def cfsp_criteria():
    return [Bad]
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``run(*words)``: the command line in this process; an error that is not told to the user is raised."""
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*words: object) -> Result:
        result = CliRunner().invoke(cli, list(map(str, words)))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def refused(run: Callable[..., Result], tmp_path: Path) -> Callable[..., str]:
    """``refused(*words, code=2)``: what is told; in one or two lines, with nothing printed and nothing left behind."""

    def invoke(*words: object, code: int = 2) -> str:
        before = tree(tmp_path)
        result = run(*words)
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        assert 1 <= len(result.stderr.splitlines()) <= 2, result.stderr
        assert result.stderr.startswith("Error: ")
        assert tree(tmp_path) == before
        return result.stderr.removeprefix("Error: ").removesuffix("\n")

    return invoke


@pytest.fixture(scope="session")
def model(make_model: MakeModel) -> Path:
    """A tiny llama: 3 blocks of 64 channels."""
    return make_model("llama")


@pytest.fixture
def small(calibration_text: Path) -> tuple[object, ...]:
    """Options of a run that takes no time."""
    return "--calibration", calibration_text, "--samples", 4, "--seqlen", 32, "--round-to", 8


@pytest.fixture(scope="session")
def pruned(model: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint the command line made."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    words = ["prune", model, out, "-q", "--calibration", calibration_text, "--samples", 4, "--seqlen", 32]
    result = CliRunner().invoke(cli, [*map(str, words), "--round-to", "8"])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """``broken(remove, **config)``: a copy of the model without some files and with other settings."""

    def copy(*remove: str, **changes: object) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(model, folder)
        for name in remove:
            (folder / name).unlink()
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def write_plugin(folder: Path, body: str) -> Path:
    path = folder / "bad_plugin.py"
    path.write_text(PLUGIN.replace("BODY", body))
    return path


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_slow() -> None:
    code = (
        "import sys; from cfsp_framework.cli.main import cli\n"
        "try: cli(['--help'], prog_name='cfsp')\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'transformers', 'pydantic', 'datasets', 'rich', 'yaml', 'pluggy'} & sys.modules.keys()\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Prune a model into a checkpoint folder." in done.stdout


def test_a_commands_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from cfsp_framework.cli.main import cli\n"
        "try: cli(['prune', '--help'], prog_name='cfsp')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), ["plugins", "list"], ["plugins", "show"]])
def test_help_is_there_and_fits(words: list[str], run: Callable[..., Result]) -> None:
    result = run(*words, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert run(*words, "-h").stdout == result.stdout


def test_the_listed_commands_are_the_ones_there_are() -> None:
    context = click.Context(cli)
    assert cli.list_commands(context) == list(COMMANDS)
    assert all(cli.get_command(context, name) for name in COMMANDS)


def test_every_option_is_explained() -> None:
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts}"


# --- prune ------------------------------------------------------------------------------------------------------------


def test_a_recovery_of_somebody_elses_is_carried_out(
    run: Callable[..., Result], model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    plugin = Path(__file__).parents[1] / "fixtures/eager_recovery.py"
    result = run("prune", model, tmp_path / "out", *small, "-p", plugin, "--recovery", "eager", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["recovery"]
    assert (told["steps"], told["ranks"]) == (2, [2, 2, 2])


def test_prune_shows_tables_and_writes_a_checkpoint(
    run: Callable[..., Result], model: Path, small: tuple[object, ...], calibration_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run("prune", model, out, *small, "--evaluate", calibration_text, "--evaluate-windows", 2)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for words in (
        "importance",
        "parameters",
        "FLOPs per token",
        "2 x 32",
        "nats/token",
        "collect",
        f"Written to {out}",
    ):
        assert words in result.stdout
    lines = [line for line in result.stdout.splitlines() if not line.startswith("Written to")]
    assert max(map(len, lines)) <= 80
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        *(["modeling_pruned.py"] if (out / "modeling_pruned.py").exists() else []),
        "pruning_plan.json",
        "report.html",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 3


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_tables_fit_narrow_terminals(
    columns: int,
    run: Callable[..., Result],
    pruned: Path,
    small: tuple[object, ...],
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    evaluate = "--evaluate", calibration_text, "--evaluate-windows", 2
    for result in (
        run("prune", pruned, tmp_path / "out", *small, "--ratio", 0.2, *evaluate),
        run("plan", pruned, tmp_path / "plan.json", *small),
        run("evaluate", pruned, "--data", calibration_text, "--seqlen", 32, "--evaluate-windows", 2),
    ):
        assert result.exit_code == 0, result.output
        tables = [line for line in result.stdout.splitlines() if line[:1] in "┏┃┡│└"]
        assert tables
        assert max(map(len, tables)) <= columns


def test_json_is_one_object_and_the_report(
    run: Callable[..., Result], model: Path, small: tuple[object, ...], calibration_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run("prune", model, out, *small, "--json", "--evaluate", calibration_text, "--evaluate-windows", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == json.loads((out / "report.json").read_text())
    report = json.loads(result.stdout)
    assert report["channels_after"] == 96
    assert {"load", "collect", "plan", "cut", "save", "evaluate"} <= report["seconds"].keys()
    assert report["evaluations"][0]["seqlen"] == 32


def test_quiet_prints_nothing(
    run: Callable[..., Result], model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    assert run("prune", model, tmp_path / "out", *small, "-q").output == ""
    assert (tmp_path / "out" / "report.json").exists()


def test_a_pruned_model_is_pruned_again(
    run: Callable[..., Result], pruned: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    result = run("prune", pruned, tmp_path / "again", *small, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["channels_before"], report["channels_after"]) == (96, 48)
    assert report["reload_difference"] == 0


def test_ratio_zero_is_the_identity(
    run: Callable[..., Result], model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    assert run("prune", model, tmp_path / "out", *small, "-q", "--ratio", 0).exit_code == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (model, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_more_samples_than_the_text_has_are_fine(
    run: Callable[..., Result], model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    assert run("prune", model, tmp_path / "out", *small, "-q", "--samples", 500).exit_code == 0


def test_preset_file_and_options_come_after_each_other(
    run: Callable[..., Result], model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"preset": "cfsp-released", "allocator": "cfsp:a=3", "ratio": 0.25, "seed": 5}))
    words = "prune", model, tmp_path / "out", *small, "--config", config, "--json", "--seed", 7
    result = run(*words, "--allocator", "cfsp:distance=mse")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["components"]["criterion"].startswith("cfsp:variant=act")
    assert report["components"]["allocator"].startswith("cfsp:distance=mse,a=3.0,")
    assert "released=true" in report["components"]["allocator"]
    assert (report["ratio_requested"], report["seed"]) == (0.25, 7)


def test_a_plugin_in_a_file_is_used_and_recorded(
    run: Callable[..., Result], model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    plugin = "-p", EXAMPLE, "--criterion", "peak:exponent=2"
    result = run("prune", model, tmp_path / "out", *small, *plugin, "--json", "--keep-statistics")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["components"]["criterion"] == "peak:exponent=2.0"
    assert (tmp_path / "out" / "statistics.safetensors").exists()


def test_without_a_collector_no_data_is_read(run: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    choices = "--criterion", "magnitude", "--allocator", "uniform", "--calibration", "/nowhere.txt"
    result = run("prune", model, tmp_path / "out", *choices, "--round-to", 8)
    assert result.exit_code == 0, result.output
    assert "no data" in result.stdout


def test_a_mixture_calibrates(
    run: Callable[..., Result], model: Path, small: tuple[object, ...], calibration_text: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {n} is here"}) + "\n" for n in range(100)))
    result = run("prune", model, tmp_path / "out", *small, "--calibration", f"{calibration_text}=3,{rows}=1", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["samples"] == 4


def test_overwrite_replaces_a_checkpoint_whole(
    run: Callable[..., Result], model: Path, small: tuple[object, ...], pruned: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    (out / "leftover.txt").touch()
    assert run("prune", model, out, *small, "-q", "--overwrite", "--ratio", 0.2).exit_code == 0
    assert not (out / "leftover.txt").exists()
    assert json.loads((out / "report.json").read_text())["ratio_requested"] == 0.2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- plan -------------------------------------------------------------------------------------------------------------


def test_a_plan_is_written_and_cuts_the_same_without_data(
    run: Callable[..., Result], model: Path, small: tuple[object, ...], pruned: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    planned = run("plan", model, path, *small)
    assert planned.exit_code == 0, planned.output
    assert f"Written to {path}" in planned.stdout
    assert "50.00% of the feed-forward channels" in planned.stdout
    assert PruningPlan.from_json(path.read_text()) == PruningPlan.from_json((pruned / "pruning_plan.json").read_text())
    result = run("prune", model, tmp_path / "out", "--plan", path, "-q", "--calibration", "/nowhere.txt")
    assert (result.exit_code, result.output) == (0, "")
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (pruned / weights).read_bytes()


def test_plan_json_is_the_plan(
    run: Callable[..., Result], model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    result = run("plan", model, tmp_path / "plan.json", *small, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == json.loads((tmp_path / "plan.json").read_text())


def test_an_existing_plan_is_kept_unless_told(
    run: Callable[..., Result], refused: Callable[..., str], model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text("mine")
    assert refused("plan", model, path, *small) == f"{path} exists; give another file or --overwrite."
    assert path.read_text() == "mine"
    assert run("plan", model, path, *small, "--overwrite", "-q").exit_code == 0
    assert "is not a writable directory" in refused("plan", model, tmp_path / "no" / "plan.json", *small)


def edited(pruned: Path, edit: Callable[[dict[str, Any]], object]) -> str:
    plan = json.loads((pruned / "pruning_plan.json").read_text())
    edit(plan)
    return json.dumps(plan)


def set_kept(kept: list[int]) -> Callable[[dict[str, Any]], object]:
    return lambda plan: plan["blocks"][1].update(kept=kept)


@pytest.mark.parametrize(("edit", "message"), [
    (set_kept([]), "block 1, mlp: keeps no channel"),
    (set_kept([3, 3]), "block 1, mlp: kept channels are not ascending and distinct"),
    (set_kept([4, 3]), "block 1, mlp: kept channels are not ascending and distinct"),
    (set_kept([-1, 3]), "block 1, mlp: keeps channel -1, outside 0..63"),
    (set_kept([3, 64]), "block 1, mlp: keeps channel 64, outside 0..63"),
    (lambda plan: plan["blocks"][1].update(width=72), "the plan's entry 1 is block 1, mlp, width 72; the model has mlp"),
    (lambda plan: plan["blocks"][1].update(path="ffn"), "the plan's entry 1 is block 1, ffn, width 64"),
    (lambda plan: plan["blocks"].pop(), "the plan is for a llama model of 2 blocks; this is a llama model of 3"),
    (lambda plan: plan["blocks"].append(plan["blocks"][0]), "block 0, mlp: listed twice"),
    (lambda plan: plan["blocks"].reverse(), "the plan's entry 0 is block 2"),
    (lambda plan: plan.pop("blocks"), "blocks: Field required"),
    (lambda plan: plan.update(version=99), "version: Input should be 1"),
    (lambda plan: plan["model"].update(family="qwen3"), "the plan is for a qwen3 model"),
    (lambda plan: plan["model"].update(fingerprint="0" * 64), "the plan was made for another model than"),
])  # fmt: skip
def test_an_impossible_plan_is_refused(
    edit: Callable[[dict[str, Any]], object],
    message: str,
    refused: Callable[..., str],
    model: Path,
    pruned: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(edited(pruned, edit))
    assert message in refused("prune", model, tmp_path / "out", "--plan", path)


@pytest.mark.parametrize("content", [b"not json", b"[]", b'{"model": 3}', b"\xff\xfe", b""])
def test_what_is_no_plan_is_refused(content: bytes, refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    assert "is no pruning plan; `cfsp plan` writes one." in refused("prune", model, tmp_path / "out", "--plan", path)


def test_a_truncated_plan_is_refused(refused: Callable[..., str], model: Path, pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text((pruned / "pruning_plan.json").read_text()[:-20])
    message = refused("prune", model, tmp_path / "out", "--plan", path)
    assert message.startswith(f"{path}: the plan cannot be used: as a whole: Invalid JSON")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.lists(st.integers(-3, 70), max_size=6))
def test_any_hand_edited_channels_are_cut_or_refused(
    kept: list[int], run: Callable[..., Result], model: Path, pruned: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "plan.json", tmp_path / "out"
    path.write_text(edited(pruned, set_kept(kept)))
    result = run("prune", model, out, "--plan", path, "-q", "--overwrite")
    possible = bool(kept) and kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < 64
    assert result.exit_code == (0 if possible else 2), result.output
    if possible:
        assert json.loads((out / "report.json").read_text())["blocks"][1]["width_after"] == len(kept)


def test_a_plan_for_another_model_is_refused(
    refused: Callable[..., str], make_model: MakeModel, pruned: Path, tmp_path: Path
) -> None:
    other = make_model("llama", rms_norm_eps=1e-5)
    message = refused("prune", other, tmp_path / "out", "--plan", pruned / "pruning_plan.json")
    assert message.startswith(f"the plan was made for another model than '{other}'")


# --- evaluate and plugins ---------------------------------------------------------------------------------------------


def test_evaluate_reports_every_data_spec(
    run: Callable[..., Result], pruned: Path, calibration_text: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "some words and some more " * 50}) + "\n")
    words = "evaluate", pruned, "--data", calibration_text, "--data", rows, "--seqlen", 32, "--evaluate-windows", 3
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "calibration.txt" in result.stdout
    assert str(calibration_text.parent) not in result.stdout
    assert "3 x 32" in result.stdout
    told = run(*words, "--json")
    assert told.stderr == ""
    evaluations = json.loads(told.stdout)["evaluations"]
    assert [found["data"] for found in evaluations] == [str(calibration_text), str(rows)]
    assert all((found["seqlen"], found["windows"]) == (32, 3) for found in evaluations)
    assert f"{evaluations[0]['perplexity']:.3f}" in result.stdout


def test_plugins_list_names_every_component(run: Callable[..., Result]) -> None:
    result = run("plugins", "list", "-p", FIXTURES / "down_norm.py")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    rows = json.loads(run("plugins", "list", "--json", "-p", FIXTURES / "down_norm.py").stdout)["components"]
    for row in rows:
        assert row["name"] in result.stdout
    found = {(row["kind"], row["name"]): row for row in rows}
    assert found["criterion", "cfsp"]["plugin"] == "cfsp-criteria"
    assert found["criterion", "cfsp"]["distribution"].startswith("cfsp-framework ")
    assert found["criterion", "cfsp"]["requires"] == ["down_input_squares"]
    assert found["criterion", "down-norm"]["distribution"] is None
    assert found["collector", "down-input-squares"]["provides"] == "down_input_squares"


def test_plugins_show_explains_options(run: Callable[..., Result]) -> None:
    result = run("plugins", "show", "cfsp")
    assert result.exit_code == 0, result.output
    assert "allocator cfsp, plugin cfsp-allocators of cfsp-framework" in result.stdout
    assert "criterion cfsp, plugin cfsp-criteria of cfsp-framework" in result.stdout
    assert "rel | act | eq8" in result.stdout
    options = json.loads(run("plugins", "show", "cfsp", "--json").stdout)["components"][1]["options"]
    assert options["variant"]["default"] == "rel"


def test_every_component_can_be_shown(run: Callable[..., Result]) -> None:
    rows = json.loads(run("plugins", "list", "--json").stdout)["components"]
    for name in {row["name"] for row in rows}:
        result = run("plugins", "show", name)
        assert result.exit_code == 0, result.output
        assert all(len(line) <= 80 for line in result.stdout.splitlines() if not line.startswith("Defined in"))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "message"), [
    (["--ratio", "1"], "Invalid value for '--ratio': input should be less than 1, not 1.0."),
    (["--ratio", "1.5"], "'--ratio': input should be less than 1, not 1.5."),
    (["--ratio", "-0.1"], "'--ratio': input should be greater than or equal to 0, not -0.1."),
    (["--ratio", "nan"], "'--ratio': input should be a finite number, not nan."),
    (["--ratio", "inf"], "'--ratio': input should be a finite number, not inf."),
    (["--ratio", "abc"], "'--ratio': 'abc' is not a valid float."),
    (["--ratio", "0.99"], "cannot be met with --round-to 8"),
    (["--ratio", "0.001"], "removes nothing with --round-to 8"),
    (["--ratio", "0.9", "--budget", "parameters"], "of all parameters cannot be met"),
    (["--round-to", "0"], "'--round-to': input should be greater than or equal to 1, not 0."),
    (["--samples", "0"], "'--samples': input should be greater than or equal to 1, not 0."),
    (["--samples", "1.5"], "'--samples': '1.5' is not a valid integer."),
    (["--seqlen", "1"], "'--seqlen': input should be greater than or equal to 2, not 1."),
    (["--seqlen", "129"], "--seqlen 129 is longer than the model's context of 128."),
    (["--batch-size", "0"], "'--batch-size'"),
    (["--seed", "-1"], "'--seed'"),
    (["--budget", "money"], "'--budget': 'money' is not one of 'channels', 'parameters'."),
    (["--dtype", "int8"], "'--dtype': 'int8' is not one of"),
    (["--device", "cuda:99"], "--device cuda:99: this PyTorch sees"),
    (["--device", "meta"], "--device meta: not supported; use auto, cpu, cuda or cuda:N."),
    (["--device", "gpu"], "--device gpu: not a device; use auto, cpu, cuda or cuda:N."),
    (["--calibration", "wikitext"], "no such file or name. Did you mean 'wikitext2'?"),
    (["--calibration", "/nowhere.txt"], "data '/nowhere.txt': no such file or name."),
    (["--calibration", "demo=x"], "a mixture is NAME=WEIGHT,NAME=WEIGHT"),
    (["--evaluate", "/nowhere.txt"], "data '/nowhere.txt': no such file or name."),
    (["--preset", "cfps"], "Unknown preset 'cfps'. Did you mean 'cfsp'?"),
    (["--criterion", "wanda"], "Unknown criterion 'wanda'. Did you mean 'wanda-"),
    (["--criterion", "cfsp:varient=act"], "Bad options for criterion 'cfsp'"),
    (["--criterion", "cfsp:variant=all"], "variant: Input should be 'rel', 'act' or 'eq8'"),
    (["--criterion", "cfsp:variant"], "expected NAME:option=value,option=value"),
    (["--allocator", "cfsp:a=much"], "Bad options for allocator 'cfsp'"),
    (["--compensator", "lora"], "Unknown compensator 'lora'"),
    (["--recovery", "lora"], "Unknown recovery 'lora'"),
    (["--config", "/nowhere.yaml"], "'--config': File '/nowhere.yaml' does not exist."),
    (["--plan", "/nowhere.json"], "'--plan': File '/nowhere.json' does not exist."),
    (["-p", "nowhere.py"], "-p nowhere.py"),
    (["-p", "no:cfsp"], "-p no:cfsp names no plugin."),
    (["-p", "no:cfsp-criteria"], "Unknown criterion 'cfsp'."),
    (["--samplse", "3"], "No such option '--samplse'."),
])  # fmt: skip
def test_bad_options_are_refused(
    words: list[str],
    message: str,
    refused: Callable[..., str],
    model: Path,
    small: tuple[object, ...],
    tmp_path: Path,
) -> None:
    assert message in refused("prune", model, tmp_path / "out", *small, *words)


def test_cuda_is_refused_where_there_is_none(
    refused: Callable[..., str],
    model: Path,
    small: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = refused("prune", model, tmp_path / "out", *small, "--device", "cuda")
    assert message == "--device cuda: this PyTorch sees no GPU here."


@pytest.mark.parametrize(("words", "message"), [
    (["prune"], "Missing argument 'MODEL'."),
    (["prnue", "a", "b"], "No such command 'prnue'."),
    (["plugins", "show", "cfps"], "Unknown component 'cfps'. Did you mean 'cfsp'? `cfsp plugins list` shows all."),
    (["plugins", "list", "-p", "no:me"], "-p no:me names no plugin."),
    (["evaluate", "/nowhere/model"], "model '/nowhere/model': no such folder."),
    (["demo", "--ratio", "1"], "'--ratio': input should be less than 1, not 1.0."),
])  # fmt: skip
def test_bad_usage_is_refused(words: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused(*words)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "holds no text"),
    (b"short", "one calibration window of 32 needs more. Give more text or a smaller --seqlen."),
    (b"\xff\xfe\x00", "is not UTF-8 text"),
])  # fmt: skip
def test_bad_calibration_text_is_refused(
    content: bytes,
    message: str,
    refused: Callable[..., str],
    model: Path,
    small: tuple[object, ...],
    tmp_path: Path,
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    assert message in refused("prune", model, tmp_path / "out", *small, "--calibration", path)


def test_a_column_that_does_not_exist_is_refused(
    refused: Callable[..., str], model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"story": "Once"}\n')
    message = refused("prune", model, tmp_path / "out", *small, "--calibration", rows)
    assert message == f"data '{rows}' has no column 'text'. Available: story."


@pytest.mark.parametrize(("config", "message"), [
    ("criterion: [", "cannot be read"),
    ("- 1", "must hold options as `name: value` lines"),
    ("ratios: 0.5", "Unknown option 'ratios'. Did you mean 'ratio'?"),
    ("ratio: 2", "ratio: Input should be less than 1"),
    ("preset: cfps", "Unknown preset 'cfps'"),
])  # fmt: skip
def test_bad_configuration_files_are_refused(
    config: str,
    message: str,
    refused: Callable[..., str],
    model: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(config)
    assert message in refused("prune", model, tmp_path / "out", "--config", path)


def test_places_one_cannot_write_to_are_refused(
    refused: Callable[..., str], model: Path, small: tuple[object, ...], pruned: Path, tmp_path: Path
) -> None:
    file, folder = tmp_path / "notes.txt", tmp_path / "notes"
    file.write_text("mine")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert refused("prune", model, folder, *small) == f"{folder} exists; give another folder or --overwrite."
    assert "is no checkpoint; --overwrite does not remove it" in refused("prune", model, folder, *small, "--overwrite")
    assert "is no checkpoint; --overwrite does not remove it" in refused("prune", model, file, *small, "--overwrite")
    assert "is no folder one can write to" in refused("prune", model, tmp_path / "no" / "out", *small)
    assert "File name too long" in refused("prune", model, tmp_path / ("x" * 300), *small)


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
])  # fmt: skip
def test_a_full_disk_is_told_and_nothing_is_left(
    error: OSError,
    refused: Callable[..., str],
    model: Path,
    small: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    message = refused("prune", model, tmp_path / "out", *small)
    assert message == f"{tmp_path / 'out'} cannot be written: {error.strerror}."


def test_a_limit_on_file_sizes_is_told_and_nothing_is_left(
    model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    words = " ".join(map(str, ("prune", model, tmp_path / "out", *small, "-q")))
    command = f"ulimit -f 60; exec {sys.executable} -m cfsp_framework {words}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"Error: {tmp_path / 'out'} cannot be written: {os.strerror(errno.EFBIG)}.\n"
    assert tree(tmp_path) == set()


# --- models that cannot be pruned -------------------------------------------------------------------------------------


def refuse_model(refused: Callable[..., str], folder: Path | str, tmp_path: Path, *words: object) -> str:
    return refused("prune", folder, tmp_path / "out", "--calibration", "/nowhere.txt", *words)


def test_a_model_that_is_not_there_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refuse_model(refused, "/nowhere/model", tmp_path) == "model '/nowhere/model': no such folder."
    message = refuse_model(refused, "nobody/nothing", tmp_path)
    assert message == "model 'nobody/nothing': no such folder, and the Hub cannot be reached."
    assert refuse_model(refused, tmp_path, tmp_path) == f"{tmp_path} is not a model: it has no config.json."


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM, not a causal language model"),
    ({"model_type": "vit", "architectures": None}, "is of the family 'vit', not a causal language model"),
    ({"model_type": "mine"}, "does not know the family 'mine'"),
    ({"intermediate_size": 72}, "cannot be opened"),
    ({"num_hidden_layers": 4}, "do not fit the model"),
    ({"num_hidden_layers": 2}, "do not fit the model"),
    ({"hidden_size": "many"}, "cannot be opened"),
])  # fmt: skip
def test_other_models_are_refused(
    changes: dict[str, Any], message: str, broken: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    assert message in refuse_model(refused, broken(**changes), tmp_path)


def test_a_family_nobody_knows_is_refused(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(folder)
    message = refuse_model(refused, folder, tmp_path)
    if "/nowhere.txt" not in message:  # a later issue teaches it this family
        assert "no plugin knows where the family 'gpt2' keeps its feed-forwards" in message


@pytest.mark.parametrize(("content", "message"), [
    ("{not json", "is not a model: its config.json cannot be read"),
    ("[]", "is not a model: its config.json holds no settings"),
    ("{}", "not a causal language model"),
])  # fmt: skip
def test_a_config_that_is_no_config_is_refused(
    content: str, message: str, broken: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = broken()
    (folder / "config.json").write_text(content)
    assert message in refuse_model(refused, folder, tmp_path)


def test_pickled_weights_are_refused(broken: Callable[..., Path], refused: Callable[..., str], tmp_path: Path) -> None:
    folder = broken("model.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    message = refuse_model(refused, folder, tmp_path)
    assert "has no safetensors. Pickled weights can run code when they are opened and are refused" in message


@pytest.mark.parametrize("content", [b"", b"\xff" * 1000, None])
def test_damaged_weights_are_refused(
    content: bytes | None, broken: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = broken()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000] if content is None else content)
    message = refuse_model(refused, folder, tmp_path)
    assert message.startswith(f"model '{folder}': its safetensors are damaged (")
    assert message.endswith("); fetch or write them again.")


def test_a_model_without_tokenizer_is_refused(
    broken: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = broken("tokenizer.json", "tokenizer_config.json")
    assert refuse_model(refused, folder, tmp_path).startswith(f"the tokenizer of model '{folder}' cannot be opened: ")


@pytest.mark.parametrize("family", ["llama", "mine"])
def test_code_a_model_brings_along_runs_only_when_allowed(
    family: str, broken: Callable[..., Path], run: Callable[..., Result], small: tuple[object, ...], tmp_path: Path
) -> None:
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    folder, witness, out = broken(model_type=family, auto_map=names), tmp_path / "witness", tmp_path / "out"
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(witness)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig): pass\n"
        "class Model(LlamaForCausalLM): pass\n"
    )
    result = run("prune", folder, out, *small, "-q")
    assert not witness.exists()
    if family == "mine":
        assert result.exit_code == 2
        assert result.stderr == (
            f"Error: {folder} needs the Python code it brings along; read it, then give --trust-remote-code.\n"
        )
        assert not out.exists()
        run("prune", folder, out, *small, "-q", "--trust-remote-code")
        assert witness.exists()
    else:  # Transformers knows the family by itself
        assert result.exit_code == 0, result.output
        assert "auto_map" not in json.loads((out / "config.json").read_text()) or not (out / "code.py").exists()


# --- plugins that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "message"), [
    ("return torch.full((feed_forward.width,), float('nan'))", "has values that are not finite: nan at [0], 64 of 64"),
    ("return torch.full((feed_forward.width,), float('inf'))", "has values that are not finite: inf at [0], 64 of 64"),
    ("return torch.ones(feed_forward.width + 1)", "has shape (65,), not (64,)"),
    ("return [1.0] * feed_forward.width", "is a list, not a tensor"),
    ("raise ValueError('what\\n now')", "failed in score() at block 1, mlp: ValueError: what now."),
    ("return statistics[Statistic('down_input_mean')]", "failed in score() at block 1, mlp: KeyError"),
])  # fmt: skip
def test_a_failing_criterion_is_named_with_its_block(
    body: str, message: str, refused: Callable[..., str], model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    plugin = write_plugin(tmp_path, body)
    words = "prune", model, tmp_path / "out", *small, "-p", plugin, "--criterion", "bad"
    told = refused(*words, code=3)
    assert told.startswith(f"criterion 'bad' (plugin '{plugin}')")
    assert "block 1, mlp" in told
    assert message in told


def test_a_plugin_that_cannot_be_imported_is_named(
    refused: Callable[..., str], model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text("import nowhere_to_be_found\n")
    told = refused("prune", model, tmp_path / "out", *small, "-p", plugin, code=3)
    assert told.startswith(f"plugin '{plugin}' could not be loaded: ModuleNotFoundError: No module named 'nowhere_")
    assert "-p nowhere_to_be_found" in refused("plugins", "list", "-p", "nowhere_to_be_found", code=3)


def test_traceback_shows_where_an_error_came_from(
    run: Callable[..., Result], model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    plugin = write_plugin(tmp_path, "raise ValueError('what now')")
    words = "prune", model, tmp_path / "out", *small, "-p", plugin, "--criterion", "bad"
    result = run(*words, "--traceback")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "Traceback (most recent call last):" in result.stderr
    assert 'bad_plugin.py", line' in result.stderr
    assert result.stderr.splitlines()[-1] == run(*words).stderr.strip()


def test_out_of_memory_is_told(
    run: Callable[..., Result], model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    plugin = write_plugin(tmp_path, "raise MemoryError")
    result = run("prune", model, tmp_path / "out", *small, "-p", plugin, "--criterion", "bad")
    assert result.exit_code == 1
    assert result.stderr == "Error: out of memory; a smaller --batch-size or --seqlen needs less.\n"


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_leaves_nothing(
    number: signal.Signals, model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    begun, work = tmp_path / "begun", tmp_path / "work"
    work.mkdir()
    plugin = write_plugin(tmp_path, f"Path({str(begun)!r}).touch(); time.sleep(120)")
    words = "prune", model, work / "out", *small, "-p", plugin, "--criterion", "bad"
    command = [sys.executable, "-m", "cfsp_framework", *map(str, words)]
    # Where the tests run in the background of a shell, SIGINT is ignored there, and children inherit that.
    attend = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=attend,  # noqa: PLW1509  (no threads here)
    ) as process:
        while not begun.exists() and process.poll() is None:
            time.sleep(0.05)
        assert {path.suffix for path in work.iterdir()} == {".lock", ".partial"}
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, "")
    assert stderr.startswith("Error: interrupted in score() at block 1, mlp of criterion 'bad' (plugin ")
    assert stderr.strip().endswith("; nothing was written.")
    assert stderr.count("\n") == 1
    assert tree(work) == set()


# --- demo -------------------------------------------------------------------------------------------------------------


def test_demo_prunes_the_embedded_model(run: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("demo", "--json", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["model"] == "demo"
    assert report["channels_after"] == report["channels_before"] / 2
    assert report["reload_difference"] == 0
    [evaluation] = report["evaluations"]
    assert evaluation["dense"]["perplexity"] < evaluation["pruned"]["perplexity"] < 10_000
    assert (out / "report.json").exists()
