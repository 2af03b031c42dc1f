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
from helpers.runs import invoke

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "cfsp-peak" / "src" / "cfsp_peak" / "__init__.py"
NOWHERE = "--calibration", "/nowhere.txt"
MakeModel = Callable[..., Path]
Run = Callable[..., Result]
Refuse = Callable[..., str]

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
def refused(tmp_path: Path) -> Refuse:
    """``refused(*words, code=2)``: the error, of one or two lines; nothing is printed and nothing left behind."""

    def refuse(*words: object, code: int = 2) -> str:
        before = tree(tmp_path)
        result = invoke(*words)
        assert (result.exit_code, result.stdout) == (code, ""), result.output
        assert 1 <= len(result.stderr.splitlines()) <= 2, result.stderr
        assert result.stderr.startswith("Error: ")
        assert tree(tmp_path) == before
        return result.stderr.removeprefix("Error: ").removesuffix("\n")

    return refuse


@pytest.fixture(scope="session")
def model(make_model: MakeModel) -> Path:
    """A tiny llama: 3 blocks of 64 channels."""
    return make_model("llama")


@pytest.fixture(scope="session")
def small(calibration_text: Path) -> tuple[object, ...]:
    """Options of a run that takes no time."""
    return "--calibration", calibration_text, "--samples", 4, "--seqlen", 32, "--round-to", 8


@pytest.fixture(scope="session")
def evaluated(calibration_text: Path) -> tuple[object, ...]:
    """Options of a short evaluation."""
    return "--evaluate", calibration_text, "--evaluate-windows", 2


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder to write to."""
    return tmp_path / "out"


@pytest.fixture
def prune(model: Path, out: Path, small: tuple[object, ...]) -> Run:
    """``prune(*words)``: a successful run with further options."""

    def succeed(*words: object) -> Result:
        result = invoke("prune", model, out, *small, *words)
        assert result.exit_code == 0, result.output
        return result

    return succeed


@pytest.fixture
def refused_prune(refused: Refuse, model: Path, out: Path, small: tuple[object, ...]) -> Refuse:
    """``refused_prune(*words, code=2)``: the error of a run with further options."""
    return partial(refused, "prune", model, out, *small)


@pytest.fixture(scope="session")
def pruned(model: Path, small: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint written by the command line."""
    folder = tmp_path_factory.mktemp("pruned") / "out"
    result = invoke("prune", model, folder, "-q", *small)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """``broken(remove, **config)``: a copy of the model without some files and with other settings."""

    def copy(*remove: str, **changes: object) -> Path:
        folder = Path(shutil.copytree(model, tmp_path / "model"))
        for name in remove:
            (folder / name).unlink()
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


def tree(folder: Path) -> set[Path]:
    """All files of a folder, without the locks of folders being written."""
    return {path for path in folder.rglob("*") if path.suffix != ".lock"}


def write_plugin(folder: Path, body: str) -> tuple[object, ...]:
    """Options that select a criterion with this body."""
    path = folder / "bad_plugin.py"
    path.write_text(PLUGIN.replace("BODY", body))
    return "-p", path, "--criterion", "bad"


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "slow"),
    [
        (["--help"], {"torch", "transformers", "pydantic", "datasets", "rich", "yaml", "pluggy"}),
        (["prune", "--help"], {"torch", "transformers", "datasets"}),
    ],
)
def test_help_imports_nothing_slow(words: list[str], slow: set[str]) -> None:
    code = (
        "import sys; from cfsp_framework.cli.main import cli\n"
        f"try: cli({words}, prog_name='cfsp')\n"
        "except SystemExit: pass\n"
        f"assert not {slow} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: cfsp")


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), ["plugins", "list"], ["plugins", "show"]])
def test_help_exists_and_fits(words: list[str]) -> None:
    result = invoke(*words, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert invoke(*words, "-h").stdout == result.stdout


def test_the_listed_commands_exist_and_every_option_is_explained() -> None:
    context = click.Context(cli)
    assert cli.list_commands(context) == list(COMMANDS)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        assert all(option.help for option in command.params if isinstance(option, click.Option)), name


# --- prune ------------------------------------------------------------------------------------------------------------


def test_a_recovery_of_a_third_party_runs(prune: Run) -> None:
    result = prune("-p", FIXTURES / "eager_recovery.py", "--recovery", "eager", "--json")
    recovery = json.loads(result.stdout)["recovery"]
    assert (recovery["steps"], recovery["ranks"]) == (2, [2, 2, 2])


def test_prune_shows_tables_and_writes_a_checkpoint(prune: Run, evaluated: tuple[object, ...], out: Path) -> None:
    result = prune(*evaluated)
    assert result.stderr == ""
    for words in ("importance", "parameters", "FLOPs per token", "2 x 32", "nats/token", "collect", f"to {out}"):
        assert words in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if not line.startswith("Written to")) <= 80
    files = {"README.md", "config.json", "generation_config.json", "model.safetensors", "pruning_plan.json"}
    files |= {"report.html", "report.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} - {"modeling_pruned.py"} == files
    assert tree(out.parent) == {out, *tree(out)}
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 3


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_tables_fit_narrow_terminals(
    columns: int, pruned: Path, small: tuple[object, ...], evaluated: tuple[object, ...], tmp_path: Path
) -> None:
    for words in (
        ("prune", pruned, tmp_path / "out", *small, "--ratio", 0.2, *evaluated),
        ("plan", pruned, tmp_path / "plan.json", *small),
        ("evaluate", pruned, *evaluated, "--seqlen", 32),
    ):
        result = invoke(*words, columns=columns)
        assert result.exit_code == 0, result.output
        tables = [line for line in result.stdout.splitlines() if line[:1] in "┏┃┡│└"]
        assert tables
        assert max(map(len, tables)) <= columns


def test_json_is_one_object_and_the_report(prune: Run, evaluated: tuple[object, ...], out: Path) -> None:
    result = prune("--json", *evaluated)
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report == json.loads((out / "report.json").read_text())
    assert report["channels_after"] == 96
    assert {"load", "collect", "plan", "cut", "save", "evaluate"} <= report["seconds"].keys()
    assert report["evaluations"][0]["seqlen"] == 32


def test_quiet_prints_nothing_and_short_texts_give_fewer_windows(prune: Run, out: Path) -> None:
    assert prune("-q", "--samples", 500).output == ""
    assert (out / "report.json").exists()


def test_a_pruned_model_is_pruned_again(pruned: Path, small: tuple[object, ...], out: Path) -> None:
    report = json.loads(invoke("prune", pruned, out, *small, "--json").stdout)
    assert (report["channels_before"], report["channels_after"]) == (96, 48)
    assert report["reload_difference"] == 0


def test_ratio_zero_is_the_identity(prune: Run, model: Path, out: Path) -> None:
    prune("-q", "--ratio", 0)
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (model, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_options_override_the_file_and_the_file_the_preset(prune: Run, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"preset": "cfsp-released", "allocator": "cfsp:a=3", "ratio": 0.25, "seed": 5}))
    result = prune("--config", config, "--json", "--seed", 7, "--allocator", "cfsp:distance=mse")
    report = json.loads(result.stdout)
    assert report["components"]["criterion"].startswith("cfsp:variant=act")
    assert report["components"]["allocator"].startswith("cfsp:distance=mse,a=3.0,")
    assert "released=true" in report["components"]["allocator"]
    assert (report["ratio_requested"], report["seed"]) == (0.25, 7)


def test_a_plugin_in_a_file_is_used_and_recorded(prune: Run, out: Path) -> None:
    result = prune("-p", EXAMPLE, "--criterion", "peak:exponent=2", "--json", "--keep-statistics")
    assert json.loads(result.stdout)["components"]["criterion"] == "peak:exponent=2.0"
    assert (out / "statistics.safetensors").exists()


def test_without_a_collector_no_data_is_read(prune: Run) -> None:
    printed = prune("--criterion", "magnitude", "--allocator", "uniform", *NOWHERE).stdout
    assert "no calibration data" in " ".join(printed.split())
    assert "importance" not in printed  # uniform computes none


def test_a_mixture_calibrates(prune: Run, calibration_text: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {n} is here"}) + "\n" for n in range(100)))
    result = prune("--calibration", f"{calibration_text}=3,{rows}=1", "--json")
    assert result.stderr == ""
    assert json.loads(result.stdout)["samples"] == 4


def test_overwrite_replaces_a_checkpoint_whole(prune: Run, pruned: Path, out: Path) -> None:
    shutil.copytree(pruned, out)
    (out / "leftover.txt").touch()
    prune("-q", "--overwrite", "--ratio", 0.2)
    assert not (out / "leftover.txt").exists()
    assert json.loads((out / "report.json").read_text())["ratio_requested"] == 0.2
    assert tree(out.parent) == {out, *tree(out)}


# --- plan -------------------------------------------------------------------------------------------------------------


def test_a_plan_is_written_and_cuts_the_same_without_data(
    model: Path, small: tuple[object, ...], pruned: Path, out: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    planned = invoke("plan", model, path, *small)
    assert planned.exit_code == 0, planned.output
    assert f"Written to {path}" in planned.stdout
    assert "50.00% of the feed-forward channels" in planned.stdout
    assert PruningPlan.from_json(path.read_text()) == PruningPlan.from_json((pruned / "pruning_plan.json").read_text())
    result = invoke("prune", model, out, "--plan", path, "-q", *NOWHERE)
    assert (result.exit_code, result.output) == (0, "")
    assert (out / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()


def test_an_existing_plan_is_kept_without_overwrite(
    refused: Refuse, model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text("mine")
    assert f"{path} exists" in refused("plan", model, path, *small)
    assert path.read_text() == "mine"
    result = invoke("plan", model, path, *small, "--overwrite", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == json.loads(path.read_text())
    assert f"{tmp_path / 'no'} is not a writable" in refused("plan", model, tmp_path / "no" / "plan.json", *small)


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
    (lambda plan: plan["blocks"][1].update(width=72), "entry 1 is block 1, mlp, width 72; the model has mlp"),
    (lambda plan: plan["blocks"][1].update(path="ffn"), "entry 1 is block 1, ffn, width 64"),
    (lambda plan: plan["blocks"].pop(), "for a llama model of 2 blocks; this is a llama model of 3"),
    (lambda plan: plan["blocks"].append(plan["blocks"][0]), "block 0, mlp: listed twice"),
    (lambda plan: plan["blocks"].reverse(), "entry 0 is block 2"),
    (lambda plan: plan.pop("blocks"), "blocks"),
    (lambda plan: plan.update(version=99), "version"),
    (lambda plan: plan["model"].update(family="qwen3"), "the plan is for a qwen3 model"),
    (lambda plan: plan["model"].update(fingerprint="0" * 64), "the plan was made for another model than"),
])  # fmt: skip
def test_an_impossible_plan_is_refused(
    edit: Callable[[dict[str, Any]], object], message: str, refused_prune: Refuse, pruned: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(edited(pruned, edit))
    assert message in refused_prune("--plan", path)


@pytest.mark.parametrize("content", [b"not json", b"[]", b'{"model": 3}', b"\xff\xfe", b""])
def test_other_files_are_refused_as_a_plan(content: bytes, refused_prune: Refuse, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    assert f"{path} is not a pruning plan; `cfsp plan`" in refused_prune("--plan", path)


def test_a_truncated_plan_is_refused(refused_prune: Refuse, pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text((pruned / "pruning_plan.json").read_text()[:-20])
    assert refused_prune("--plan", path).startswith(f"{path}: the plan cannot be used")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.lists(st.integers(-3, 70), max_size=6))
def test_any_hand_edited_channels_are_cut_or_refused(
    kept: list[int], model: Path, pruned: Path, out: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(edited(pruned, set_kept(kept)))
    result = invoke("prune", model, out, "--plan", path, "-q", "--overwrite")
    possible = bool(kept) and kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < 64
    assert result.exit_code == (0 if possible else 2), result.output
    if possible:
        assert json.loads((out / "report.json").read_text())["blocks"][1]["width_after"] == len(kept)


def test_a_plan_for_another_model_is_refused(refused: Refuse, make_model: MakeModel, pruned: Path, out: Path) -> None:
    other = make_model("llama", rms_norm_eps=1e-5)
    message = refused("prune", other, out, "--plan", pruned / "pruning_plan.json")
    assert message.startswith(f"the plan was made for another model than '{other}'")


# --- evaluate and plugins ---------------------------------------------------------------------------------------------


def test_evaluate_reports_every_data_spec(pruned: Path, calibration_text: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "some words and some more " * 50}) + "\n")
    words = "evaluate", pruned, "--data", calibration_text, "--data", rows, "--seqlen", 32, "--evaluate-windows", 3
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert "calibration.txt" in result.stdout
    assert str(calibration_text.parent) not in result.stdout
    assert "3 x 32" in result.stdout
    as_json = invoke(*words, "--json")
    assert as_json.stderr == ""
    evaluations = json.loads(as_json.stdout)["evaluations"]
    assert [row["data"] for row in evaluations] == [str(calibration_text), str(rows)]
    assert all((row["seqlen"], row["windows"]) == (32, 3) for row in evaluations)
    assert f"{evaluations[0]['perplexity']:.3f}" in result.stdout


def test_plugins_list_names_every_component() -> None:
    words = "plugins", "list", "-p", FIXTURES / "down_norm.py"
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    components = json.loads(invoke(*words, "--json").stdout)["components"]
    assert all(row["name"] in result.stdout for row in components)
    rows = {(row["kind"], row["name"]): row for row in components}
    assert rows["criterion", "cfsp"]["plugin"] == "cfsp-criteria"
    assert rows["criterion", "cfsp"]["distribution"].startswith("cfsp-framework ")
    assert rows["criterion", "cfsp"]["requires"] == ["down_input_squares"]
    assert rows["criterion", "down-norm"]["distribution"] is None
    assert rows["collector", "down-input-squares"]["provides"] == "down_input_squares"


def test_plugins_show_explains_options() -> None:
    result = invoke("plugins", "show", "cfsp")
    assert result.exit_code == 0, result.output
    assert "allocator cfsp, plugin cfsp-allocators of cfsp-framework" in result.stdout
    assert "criterion cfsp, plugin cfsp-criteria of cfsp-framework" in result.stdout
    assert "rel | act | eq8" in result.stdout
    options = json.loads(invoke("plugins", "show", "cfsp", "--json").stdout)["components"][1]["options"]
    assert options["variant"]["default"] == "rel"


def test_every_component_can_be_shown() -> None:
    rows = json.loads(invoke("plugins", "list", "--json").stdout)["components"]
    for name in {row["name"] for row in rows}:
        result = invoke("plugins", "show", name)
        assert result.exit_code == 0, result.output
        assert all(len(line) <= 80 for line in result.stdout.splitlines() if not line.startswith("Defined in"))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "message"), [
    (["--ratio", "1"], "Invalid value for '--ratio': input should be less than 1, not 1.0."),
    (["--ratio", "1.5"], "'--ratio': input should be less than 1, not 1.5."),
    (["--ratio", "-0.1"], "'--ratio': input should be greater than or equal to 0, not -0.1."),
    (["--ratio", "nan"], "'--ratio': input should be a finite number, not nan."),
    (["--ratio", "inf"], "'--ratio': input should be a finite number, not inf."),
    (["--ratio", "abc"], "'--ratio': 'abc'"),
    (["--ratio", "0.99"], "cannot be met with --round-to 8"),
    (["--ratio", "0.001"], "removes nothing with --round-to 8"),
    (["--ratio", "0.9", "--budget", "parameters"], "of all parameters cannot be met"),
    (["--round-to", "0"], "'--round-to': input should be greater than or equal to 1, not 0."),
    (["--samples", "0"], "'--samples': input should be greater than or equal to 1, not 0."),
    (["--samples", "1.5"], "'--samples': '1.5'"),
    (["--seqlen", "1"], "'--seqlen': input should be greater than or equal to 2, not 1."),
    (["--seqlen", "129"], "--seqlen 129 is longer than the model's context of 128."),
    (["--batch-size", "0"], "'--batch-size'"),
    (["--seed", "-1"], "'--seed'"),
    (["--budget", "money"], "'--budget': 'money'"),
    (["--dtype", "int8"], "'--dtype': 'int8'"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--device", "meta"], "--device meta: not supported; use auto, cpu, cuda or cuda:N."),
    (["--device", "gpu"], "--device gpu: not a device; use auto, cpu, cuda or cuda:N."),
    (["--calibration", "wikitext"], "Did you mean 'wikitext2'?"),
    (["--calibration", "/nowhere.txt"], "data '/nowhere.txt'"),
    (["--calibration", "demo=x"], "a mixture is NAME=WEIGHT,NAME=WEIGHT"),
    (["--evaluate", "/nowhere.txt"], "data '/nowhere.txt'"),
    (["--preset", "cfps"], "Unknown preset 'cfps'. Did you mean 'cfsp'?"),
    (["--criterion", "wanda"], "Unknown criterion 'wanda'. Did you mean 'wanda-"),
    (["--criterion", "cfsp:varient=act"], "Bad options for criterion 'cfsp'"),
    (["--criterion", "cfsp:variant=all"], "'rel', 'act' or 'eq8'"),
    (["--criterion", "cfsp:variant"], "expected NAME:option=value,option=value"),
    (["--allocator", "cfsp:a=much"], "Bad options for allocator 'cfsp'"),
    (["--compensator", "lora"], "Unknown compensator 'lora'"),
    (["--recovery", "lora"], "Unknown recovery 'lora'"),
    (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
    (["--plan", "/nowhere.json"], "/nowhere.json"),
    (["-p", "nowhere.py"], "-p nowhere.py"),
    (["-p", "no:cfsp"], "-p no:cfsp names no plugin."),
    (["-p", "no:cfsp-criteria"], "Unknown criterion 'cfsp'."),
    (["--samplse", "3"], "--samplse"),
])  # fmt: skip
def test_bad_options_are_refused(words: list[str], message: str, refused_prune: Refuse) -> None:
    assert message in refused_prune(*words)


def test_cuda_is_refused_without_a_gpu(refused_prune: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert refused_prune("--device", "cuda").startswith("--device cuda: ")


@pytest.mark.parametrize(("words", "message"), [
    (["prune"], "Missing argument 'MODEL'."),
    (["prnue", "a", "b"], "'prnue'"),
    (["plugins", "show", "cfps"], "Unknown component 'cfps'. Did you mean 'cfsp'?"),
    (["plugins", "list", "-p", "no:me"], "-p no:me names no plugin."),
    (["evaluate", "/nowhere/model"], "model '/nowhere/model': no such folder."),
    (["demo", "--ratio", "1"], "'--ratio': input should be less than 1, not 1.0."),
])  # fmt: skip
def test_bad_usage_is_refused(words: list[str], message: str, refused: Refuse) -> None:
    assert message in refused(*words)


@pytest.mark.parametrize(("option", "name", "content", "message"), [
    ("--calibration", "bad.txt", b"", "holds no text"),
    ("--calibration", "bad.txt", b"short", "one calibration window of 32 needs more"),
    ("--calibration", "bad.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
    ("--calibration", "rows.jsonl", b'{"story": "Once"}\n', "has no column 'text'. Available: story."),
    ("--config", "run.yaml", b"criterion: [", "cannot be read"),
    ("--config", "run.yaml", b"- 1", "must hold options as `name: value` lines"),
    ("--config", "run.yaml", b"ratios: 0.5", "run.yaml: Unknown option 'ratios'. Did you mean 'ratio'?"),
    ("--config", "run.yaml", b"ratio: 2", "ratio: Input should be less than 1"),
    ("--config", "run.yaml", b"preset: cfps", "Unknown preset 'cfps'"),
])  # fmt: skip
def test_bad_files_are_refused(
    option: str, name: str, content: bytes, message: str, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    result = invoke("prune", model, tmp_path / "out", "--seqlen", 32, "--samples", 4, option, path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert tree(tmp_path) == {path}


def test_unwritable_places_are_refused(refused: Refuse, model: Path, small: tuple[object, ...], tmp_path: Path) -> None:
    file, folder = tmp_path / "notes.txt", tmp_path / "notes"
    file.write_text("mine")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for out, words, message in (
        (folder, (), f"{folder} exists; give another folder or --overwrite."),
        (folder, ("--overwrite",), "--overwrite does not remove it"),
        (file, ("--overwrite",), "--overwrite does not remove it"),
        (tmp_path / "no" / "out", (), str(tmp_path / "no")),
        (tmp_path / ("x" * 300), (), os.strerror(errno.ENAMETOOLONG)),
    ):
        assert message in refused("prune", model, out, *small, *words)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported_and_nothing_is_left(
    number: int, refused_prune: Refuse, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    assert refused_prune() == f"{out} cannot be written: {os.strerror(number)}."


def test_a_limit_on_file_sizes_is_reported_and_nothing_is_left(
    model: Path, small: tuple[object, ...], out: Path, tmp_path: Path
) -> None:
    words = " ".join(map(str, ("prune", model, out, *small, "-q")))
    command = f"ulimit -f 60; exec {sys.executable} -m cfsp_framework {words}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"Error: {out} cannot be written: {os.strerror(errno.EFBIG)}.\n"
    assert tree(tmp_path) == set()


# --- models that cannot be pruned -------------------------------------------------------------------------------------


@pytest.fixture
def refused_model(refused: Refuse, out: Path) -> Refuse:
    """``refused_model(folder)``: the error of a run that does not come to read data."""
    return lambda folder: refused("prune", folder, out, *NOWHERE)


def test_a_missing_model_is_refused(refused_model: Refuse, tmp_path: Path) -> None:
    assert refused_model("/nowhere/model").startswith("model '/nowhere/model'")
    message = refused_model("nobody/nothing")
    assert message.startswith("model 'nobody/nothing'")
    assert "Hub" in message
    assert f"{tmp_path} is not a model" in refused_model(tmp_path)


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
    changes: dict[str, Any], message: str, broken: Callable[..., Path], refused_model: Refuse
) -> None:
    assert message in refused_model(broken(**changes))


@pytest.mark.parametrize(("content", "message"), [
    ("{not json", "is not a model: its config.json cannot be read"),
    ("[]", "is not a model: its config.json holds no settings"),
    ("{}", "not a causal language model"),
])  # fmt: skip
def test_a_broken_config_is_refused(
    content: str, message: str, broken: Callable[..., Path], refused_model: Refuse
) -> None:
    folder = broken()
    (folder / "config.json").write_text(content)
    assert message in refused_model(folder)


def test_pickled_weights_are_refused(broken: Callable[..., Path], refused_model: Refuse) -> None:
    folder = broken("model.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    message = refused_model(folder)
    assert "has no safetensors" in message
    assert "Pickled weights" in message


@pytest.mark.parametrize(("index", "message"), [
    ({"weight_map": {"a": "pytorch_model.bin"}}, "not safetensors"),
    ({"weight_map": {"a": "../model.safetensors"}}, "outside of the checkpoint's folder"),
    ({"weight_map": {"a": "/etc/x.safetensors"}}, "outside of the checkpoint's folder"),
    ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors cannot be read"),
    ({"weight_map": ["a"]}, "is not an index of weights"),
    ([], "is not an index of weights"),
])  # fmt: skip
def test_an_index_that_names_other_files_is_refused(
    index: object, message: str, broken: Callable[..., Path], refused_model: Refuse
) -> None:
    folder = broken("model.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refused_model(folder)
    result = invoke("prune", folder, folder.parent / "out", "--stream", "--criterion", "magnitude")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_pickle_named_safetensors_is_refused(broken: Callable[..., Path], refused_model: Refuse) -> None:
    folder = broken("model.safetensors")
    torch.save({}, folder / "model.safetensors")
    assert "model.safetensors cannot be read" in refused_model(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 1000, None])
def test_damaged_weights_are_refused(content: bytes | None, broken: Callable[..., Path], refused_model: Refuse) -> None:
    folder = broken()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000] if content is None else content)
    assert f"{weights} cannot be read (" in refused_model(folder)


def test_a_model_without_tokenizer_is_refused(broken: Callable[..., Path], refused_model: Refuse) -> None:
    folder = broken("tokenizer.json", "tokenizer_config.json")
    assert refused_model(folder).startswith(f"the tokenizer of model '{folder}' cannot be opened: ")


@pytest.mark.parametrize("family", ["llama", "mine"])
def test_code_of_a_checkpoint_runs_only_when_allowed(
    family: str, broken: Callable[..., Path], small: tuple[object, ...], out: Path, tmp_path: Path
) -> None:
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    folder, witness = broken(model_type=family, auto_map=names), tmp_path / "witness"
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(witness)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig): pass\n"
        "class Model(LlamaForCausalLM): pass\n"
    )
    result = invoke("prune", folder, out, *small, "-q")
    assert not witness.exists()
    if family == "mine":
        assert result.exit_code == 2
        assert str(folder) in result.stderr
        assert "--trust-remote-code" in result.stderr
        assert not out.exists()
        invoke("prune", folder, out, *small, "-q", "--trust-remote-code")
        assert witness.exists()
    else:  # Transformers knows the family by itself
        assert result.exit_code == 0, result.output
        assert "auto_map" not in json.loads((out / "config.json").read_text()) or not (out / "code.py").exists()


# --- plugins that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "message"), [
    ("return torch.full((feed_forward.width,), float('nan'))", "not finite: nan at [0], 64 of 64"),
    ("return torch.full((feed_forward.width,), float('inf'))", "not finite: inf at [0], 64 of 64"),
    ("return torch.ones(feed_forward.width + 1)", "has shape (65,), not (64,)"),
    ("return [1.0] * feed_forward.width", "is a list, not a tensor"),
    ("raise ValueError('what\\n now')", "ValueError: what now."),
    ("return statistics[Statistic('down_input_mean')]", "KeyError"),
])  # fmt: skip
def test_a_failing_criterion_is_named_with_its_block(
    body: str, message: str, refused_prune: Refuse, tmp_path: Path
) -> None:
    words = write_plugin(tmp_path, body)
    error = refused_prune(*words, code=3)
    assert error.startswith(f"criterion 'bad' (plugin '{words[1]}')")
    assert "block 1, mlp" in error
    assert message in error


def test_a_plugin_that_cannot_be_imported_is_named(refused: Refuse, refused_prune: Refuse, tmp_path: Path) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text("import nowhere_to_be_found\n")
    error = refused_prune("-p", plugin, code=3)
    assert error.startswith(f"plugin '{plugin}' could not be loaded: ModuleNotFoundError: ")
    assert "-p nowhere_to_be_found" in refused("plugins", "list", "-p", "nowhere_to_be_found", code=3)


def test_traceback_shows_the_origin_of_an_error(
    refused_prune: Refuse, model: Path, small: tuple[object, ...], out: Path, tmp_path: Path
) -> None:
    words = write_plugin(tmp_path, "raise ValueError('what now')")
    result = invoke("prune", model, out, *small, *words, "--traceback")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "Traceback (most recent call last):" in result.stderr
    assert 'bad_plugin.py", line' in result.stderr
    assert result.stderr.splitlines()[-1] == f"Error: {refused_prune(*words, code=3)}"


def test_out_of_memory_names_the_options_that_need_less(refused_prune: Refuse, tmp_path: Path) -> None:
    error = refused_prune(*write_plugin(tmp_path, "raise MemoryError"), code=1)
    assert "out of memory" in error
    assert "--batch-size" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_leaves_nothing(
    number: signal.Signals, model: Path, small: tuple[object, ...], tmp_path: Path
) -> None:
    begun, work = tmp_path / "begun", tmp_path / "work"
    work.mkdir()
    plugin = write_plugin(tmp_path, f"Path({str(begun)!r}).touch(); time.sleep(120)")
    command = [sys.executable, "-m", "cfsp_framework", *map(str, ("prune", model, work / "out", *small, *plugin))]
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
        assert ".partial" in {path.suffix for path in work.iterdir()}
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, "")
    assert stderr.startswith("Error: interrupted in score() at block 1, mlp of criterion 'bad' (plugin ")
    assert stderr.strip().endswith("; nothing was written.")
    assert stderr.count("\n") == 1
    assert list(work.iterdir()) == []


def test_demo_prunes_the_embedded_model(out: Path) -> None:
    result = invoke("demo", "--json", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["model"] == "demo"
    assert report["channels_after"] == report["channels_before"] / 2
    assert report["reload_difference"] == 0
    [evaluation] = report["evaluations"]
    assert evaluation["dense"]["perplexity"] < evaluation["pruned"]["perplexity"] < 10_000
    assert (out / "report.json").exists()


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"plugins"}))
def test_an_unforeseen_failure_is_two_lines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, click.Command)

    def fail(*_: object, **__: object) -> None:
        raise ValueError("bad \x1b]0;title\x07 " + "x" * 10_000)

    monkeypatch.setattr(command, "callback", fail)
    monkeypatch.setattr(command, "params", [])
    result = CliRunner().invoke(cli, [name])
    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert "ValueError: bad \\x1b]0;title\\x07" in first
    assert len(first) < 2200
    assert "--traceback" in second
