"""Ablations: which cells a sweep has, that they are those of separate runs, and that nothing is done twice."""

from __future__ import annotations

import csv
import io
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsp_framework import RunConfig
from cfsp_framework.ablation.agreement import overlaps, rank_correlations
from cfsp_framework.ablation.cells import Extras, prune_command
from cfsp_framework.ablation.grid import expand, split_choices
from cfsp_framework.ablation.results import CellResult, SweepResults
from cfsp_framework.ablation.store import open_store
from cfsp_framework.ablation.summary import interval
from cfsp_framework.ablation.sweep import Sweep, ablate
from cfsp_framework.ablation.tables import TableCell, latex
from cfsp_framework.api.records import PruningPlan, Report
from cfsp_framework.cli.main import cli
from cfsp_framework.cli.prune import prune as prune_command_line
from cfsp_framework.config import OPTIONS, Choice, layered
from cfsp_framework.errors import ConfigError, OutputError
from cfsp_framework.modeling.snapshot import restored
from cfsp_framework.runtime.progress import Progress

pytestmark = pytest.mark.filterwarnings("ignore:.*changed torch's global random numbers")
"""``loose`` does so, and a warning says so."""

MakeModel = Callable[..., Path]
FIXTURES = Path(__file__).parents[1] / "fixtures"

# --- which cells ------------------------------------------------------------------------------------------------------

names = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
values = st.one_of(
    st.integers(0, 99).map(str), st.booleans().map(lambda value: str(value).lower()), names, st.just("a:b")
)
choices = st.builds(
    lambda name, options: (
        name + (":" + ",".join(f"{key}={value}" for key, value in options.items()) if options else "")
    ),
    names,
    st.dictionaries(names, values, max_size=3),
)


@settings(deadline=None)
@given(st.lists(choices, min_size=1, max_size=5), st.sampled_from([",", ", ", " ,", " , "]))
def test_choices_between_commas_come_apart_where_a_name_begins(specs: list[str], comma: str) -> None:
    assert split_choices(",".join(specs).replace(",", comma)) == specs


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,,b", "nothing between two commas"),
        ("a,", "nothing between two commas"),
        ("b=2", "'b=2' is an option, but of no NAME"),
        ("a,b=2", "'b=2' is an option, but of no NAME"),
    ],
)
def test_a_malformed_list_of_choices_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        split_choices(text)


def rows(**options: object) -> list[tuple[str, float, int, int]]:
    return [
        (c.row, c.config.budget.ratio, c.config.calibration.samples, c.config.run.seed) for c in expand("demo", options)
    ]


def test_a_grid_crosses_every_component_with_every_other_at_every_amount() -> None:
    cells = expand(
        "demo",
        {"criterion": "cfsp:variant=act,b=2,obs", "allocator": ["uniform", "owl"], "ratio": "0.2,0.5", "seeds": [0, 1]},
    )
    assert len(cells) == len({cell.config.model_dump_json() for cell in cells}) == 2 * 2 * 2 * 2
    assert cells[0].config.components.criterion == Choice(name="cfsp", options={"variant": "act", "b": 2})
    assert {c.row for c in cells} == {f"{c} + {a}" for c in ("cfsp:variant=act,b=2", "obs") for a in ("uniform", "owl")}


def test_a_sweep_without_axes_is_one_run() -> None:
    assert rows() == [("cfsp + cfsp", 0.5, 128, 0)]


def test_named_rows_are_presets_with_changes_and_come_first() -> None:
    cells = expand(
        "demo",
        {
            "criterion": "obs",
            "ratio": [0.3, 0.5],
            "preset": ["flap-released"],
            "rows": {"ours": {"preset": "cfsp-released", "allocator": "cfsp:a=2", "ratio": 0.4}},
            "rebalance": True,
        },
    )
    assert [(c.row, c.config.budget.ratio) for c in cells] == [
        ("flap-released", 0.3),
        ("flap-released", 0.5),
        ("ours", 0.4),
        ("obs + cfsp", 0.3),
        ("obs + cfsp", 0.5),
    ]
    assert cells[2].config.components.allocator == Choice(name="cfsp", options={"released": True, "a": 2})
    assert [c.config.budget.rebalance for c in cells] == [False, False, False, True, True]


def test_included_grids_have_axes_of_their_own_and_take_the_others_amounts() -> None:
    actual = rows(
        rows={"one": {"criterion": "flap"}},
        samples=[8, 16],
        include=[{"criterion": ["magnitude"], "samples": 8, "rebalance": False}, {"allocator": "owl", "ratio": 0.8}],
    )
    assert actual == [
        ("one", 0.5, 8, 0),
        ("one", 0.5, 16, 0),
        ("magnitude + cfsp + rebalance=False", 0.5, 8, 0),
        ("cfsp + owl", 0.8, 8, 0),
        ("cfsp + owl", 0.8, 16, 0),
    ]


def test_exclude_leaves_out_what_matches_in_everything_it_names() -> None:
    options: dict[str, Any] = {"criterion": "obs,obs:damping=0.1,cfsp", "ratio": [0.2, 0.5], "seeds": [0, 1]}
    assert len(rows(**options)) == 12
    assert len(rows(**options, exclude=[{"criterion": "obs"}])) == 4
    assert len(rows(**options, exclude=[{"criterion": "obs:damping=0.1"}])) == 8
    assert len(rows(**options, exclude=[{"criterion": "obs", "ratio": 0.5}, {"seeds": 1, "row": "cfsp + cfsp"}])) == 6
    with pytest.raises(ConfigError, match="no cells"):
        rows(exclude=[{"ratio": [0.5]}])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"criteria": "obs"}, "unknown option 'criteria'.* Did you mean 'criterion'"),
        ({"rows": {"mine": {"ratios": 0.2}}}, "row 'mine': unknown option 'ratios'"),
        ({"rows": {"mine": {"preset": "cfps"}}}, "Unknown preset 'cfps'. Did you mean 'cfsp'"),
        ({"rows": ["cfsp"]}, "rows: expected options by name"),
        ({"include": {"criterion": "obs"}}, "include: expected a list"),
        ({"exclude": [{"rounding": 2}]}, "exclude: unknown option 'rounding'"),
        ({"exclude": [{"ratio": "half"}]}, "exclude, ratio: 'half' is not a number"),
        ({"ratio": [0.5, 1.5]}, "ratio: .* less than 1"),
        ({"seeds": "zero"}, "seed: "),
        ({"criterion": 3}, "criterion: expected names of components, not 3"),
    ],
)
def test_impossible_sweeps_are_refused(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        expand("demo", options)


# --- commands that reproduce a cell -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "ratio": st.sampled_from([0.1, 0.25, 0.5, 1 / 3]),
            "budget": st.sampled_from(["channels", "parameters"]),
            "rebalance": st.booleans(),
            "rounds": st.sampled_from([1, 3]),
            "pack": st.booleans(),
            "skip_bos": st.booleans(),
            "criterion": st.sampled_from(["obs:damping=0.05", "cfsp:variant=act,b=2", "flap:released=true"]),
            "allocator": st.sampled_from(["cfsp:distance=mse,temperature=null", "uniform"]),
            "calibration": st.sampled_from(["demo", "a file.txt", "it's"]),
            "evaluate": st.lists(st.sampled_from(["demo", "my text.txt:body"]), max_size=2, unique=True).map(tuple),
            "plugins": st.lists(st.sampled_from(["no:x", "my plugin.py"]), max_size=2, unique=True).map(tuple),
            "seqlen": st.integers(2, 99),
            "seed": st.integers(0, 9),
            "recovery_steps": st.integers(1, 9),
            "dtype": st.sampled_from(["float32", "auto"]),
        },
    )
)
def test_the_command_of_a_cell_is_the_run_it_was(options: dict[str, object]) -> None:
    config = RunConfig.build(model="some model", **options)
    cfsp, prune, *words = shlex.split(prune_command(config, "out"))
    assert (cfsp, prune, *words[:2]) == ("cfsp", "prune", "some model", "out")
    parsed = prune_command_line.make_context("prune", words, help_option_names=["-h", "--help"]).params
    given = {name: value for name, value in parsed.items() if name in OPTIONS and value not in (None, ())}
    assert layered(None, None, given) == config


# --- what a cell is worth ---------------------------------------------------------------------------------------------

FEW = {"samples": 4, "seqlen": 48, "round_to": 16, "evaluate_windows": 3, "device": "cpu"}
TRAINED = {"recovery": "ig-lora:rank=2,batch_tokens=96,attention=true", "recovery_steps": 2}
WATCHED = str(FIXTURES / "watched.py")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, calibration_text: Path) -> tuple[Path, SweepResults]:
    """A sweep of the demo model with every kind of cell."""
    out = tmp_path_factory.mktemp("sweeps") / "out"
    cells = expand(
        "demo",
        {
            **FEW,
            "calibration": str(calibration_text),
            "evaluate": [str(calibration_text)],
            "criterion": "cfsp,obs,loose",
            "allocator": "cfsp,error-curve",
            "ratio": [0.3, 0.5],
            "plugins": [WATCHED],
            "preset": ["cfsp-closed-form", "flap-released"],
            "rows": {
                "trained": {**TRAINED, "ratio": 0.3},
                "searched": {"criterion": "magnitude", "allocator": "search:evaluations=4", "ratio": 0.3},
                "in rounds": {"preset": "cfsp-closed-form", "rounds": 2, "ratio": 0.3},
                "all trained": {"recovery": "full:batch_tokens=96", "recovery_steps": 2, "ratio": 0.3},
            },
            "include": [
                {"criterion": "magnitude", "allocator": "uniform"},
                {"compensator": "least-squares-bias", "ratio": 0.3, "seeds": 1},
            ],
            "exclude": [{"row": "obs + cfsp"}],
        },
    )
    return out, ablate(Sweep(cells), out)


def cell_of(results: SweepResults, row: str, ratio: float = 0.5) -> CellResult:
    [match] = [cell for cell in results.cells if (cell.spec.row, cell.spec.ratio) == (row, ratio)]
    return match


@pytest.mark.parametrize(
    ("row", "ratio"),
    [
        ("cfsp + cfsp", 0.5),
        ("obs + error-curve", 0.3),
        ("magnitude + uniform", 0.5),
        ("loose + cfsp", 0.5),
        ("cfsp-closed-form", 0.5),
        ("flap-released", 0.3),
        ("trained", 0.3),
        ("searched", 0.3),
        ("in rounds", 0.3),
        ("all trained", 0.3),
        ("cfsp + cfsp + least-squares-bias", 0.3),
    ],
)
def test_a_cell_is_what_its_own_command_gives(
    swept: tuple[Path, SweepResults], row: str, ratio: float, tmp_path: Path
) -> None:
    out, results = swept
    cell = cell_of(results, row, ratio)
    _, prune, model, _, *words = shlex.split(cell.command)
    alone = CliRunner().invoke(cli, [prune, model, str(tmp_path / "alone"), *words, "--json"], catch_exceptions=False)
    report = Report.model_validate_json(alone.stdout)
    [evaluation], [quality] = report.evaluations, cell.qualities
    assert (cell.status, quality.nll, quality.perplexity) == ("done", evaluation.last.nll, evaluation.last.perplexity)
    assert results.dense[0].nll == (evaluation.dense.nll if evaluation.dense else None)
    assert (cell.parameters, cell.channel_ratio) == (report.pruned.parameters, report.channel_ratio)
    assert (out / "plans" / f"{cell.key}.json").read_text() == (tmp_path / "alone" / "pruning_plan.json").read_text()


def test_a_cell_does_not_depend_on_the_others(
    swept: tuple[Path, SweepResults], calibration_text: Path, tmp_path: Path
) -> None:
    _, results = swept
    wanted = [cell_of(results, row, 0.3) for row in ("loose + error-curve", "trained", "cfsp-closed-form")]
    cells = expand(
        "demo",
        {
            **FEW,
            "calibration": str(calibration_text),
            "evaluate": [str(calibration_text)],
            "plugins": [WATCHED],
            "ratio": 0.3,
            "preset": ["cfsp-closed-form"],
            "include": [{"criterion": "loose", "allocator": "error-curve"}],
            "rows": {"trained": TRAINED},
        },
    )
    alone = {cell.key: cell for cell in ablate(Sweep(cells), tmp_path / "out").cells}
    for cell in wanted:
        assert cell.status == "done"
        assert (alone[cell.key].qualities, alone[cell.key].widths) == (cell.qualities, cell.widths)


def test_a_finished_sweep_holds_a_plan_and_every_table(
    swept: tuple[Path, SweepResults], calibration_text: Path
) -> None:
    out, results = swept
    assert {cell.status for cell in results.cells} == {"done"}
    for cell in results.cells:
        plan = PruningPlan.from_json((out / "plans" / f"{cell.key}.json").read_text())
        assert (plan.widths, plan.ratio, plan.seed) == (cell.widths, cell.spec.ratio, cell.spec.seed)
        assert plan.components["criterion"] == cell.spec.criterion
    with (out / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["key"], float(row[f"nll {calibration_text}"])) for row in table] == [
        (c.key, c.qualities[0].nll) for c in results.cells
    ]
    assert "cfsp-closed-form" in (out / "results.md").read_text()
    assert "\\toprule" in (out / "results.tex").read_text()
    queried = sqlite3.connect(out / "results.sqlite").execute(
        'SELECT "row", ratio, nll FROM cells JOIN qualities USING (key) WHERE status = "done"'
    )
    assert sorted(queried.fetchall()) == sorted((c.spec.row, c.spec.ratio, c.qualities[0].nll) for c in results.cells)


def test_criteria_are_compared_on_every_feed_forward(swept: tuple[Path, SweepResults]) -> None:
    _, results = swept
    pairs = Counter((pair.first, pair.second) for pair in results.agreements if pair.seed == 0)
    names = {cell.spec.criterion for cell in results.cells if cell.spec.seed == 0}
    assert len(pairs) == len(names) * (len(names) - 1) / 2
    assert set(pairs.values()) == {len(results.places)}
    assert all(set(pair.overlap) == {"0.3", "0.5"} for pair in results.agreements)


@pytest.mark.parametrize("trained", [False, True])
def test_the_model_comes_back_to_the_last_bit(trained: bool, make_model: MakeModel, open_tiny: Any) -> None:
    loaded, decoder = open_tiny(make_model("llama-bias"))
    ids = torch.arange(3, 40)[None]
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in loaded.model.named_parameters()}
    logits, config = loaded.model(ids).logits, decoder.config.to_dict()
    with restored(decoder, trained=trained):
        for block in decoder.blocks:
            mlp: Any = block.mlp
            mlp.down_proj.bias.data.add_(1)
            mlp.up_proj.weight = torch.nn.Parameter(mlp.up_proj.weight[:9].clone())
            mlp.up_proj.out_features = 9
            if trained:
                mlp.down_proj.weight.data.mul_(2)
        decoder.config.per_layer_config = {0: {"intermediate_size": 9}}
        decoder.config.intermediate_size = 9
    after = dict(loaded.model.named_parameters())
    assert all(after[name] is parameter and torch.equal(parameter, copy) for name, (parameter, copy) in before.items())
    assert decoder.config.to_dict() == config
    first: Any = decoder.blocks[0]
    assert first.mlp.up_proj.out_features == 64
    assert torch.equal(loaded.model(ids).logits, logits)


# --- what is not done twice -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def results(self) -> SweepResults:
        """What ``--json`` printed."""
        return SweepResults.model_validate_json(self.stdout)


def watched(tmp_path: Path, *words: str, end: str | None = None) -> Ended:
    """``cfsp ablate``, logging what its plugin does; with ``end`` in a process of its own, killed at that step."""
    arguments = ["ablate", *words, "-p", WATCHED, "--json"]
    environment = {"WATCHED_LOG": str(tmp_path / "log"), "WATCHED_END": end or ""}
    if end is None:
        here = CliRunner().invoke(cli, arguments, env=environment)
        return Ended(here.exit_code, here.stdout, here.stderr)
    command = [sys.executable, "-m", "cfsp_framework", *arguments]
    ended = subprocess.run(
        command, check=False, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def log(tmp_path: Path) -> Counter[str]:
    return Counter((tmp_path / "log").read_text().splitlines())


@pytest.fixture
def tiny_words(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> list[str]:
    data = ["--calibration", str(calibration_text), "--samples", "4", "--seqlen", "32", "--round-to", "4"]
    return [str(make_model("llama")), str(tmp_path / "out"), *data, "--evaluate", str(calibration_text)]


def test_a_killed_sweep_goes_on_where_it_was(tiny_words: list[str], tmp_path: Path) -> None:
    words = [*tiny_words, "--criterion", "watched", "--allocator", "even", "--ratio", "0.2,0.4,0.6,0.8"]
    killed = watched(tmp_path, *words, end="score 2")
    assert (killed.code, log(tmp_path)) == (-signal.SIGKILL, Counter(["score 0", "score 1"]))
    killed = watched(tmp_path, *words, end="allocate 3")
    assert (killed.code, log(tmp_path)["allocate 0.6"]) == (-signal.SIGKILL, 1)
    ended = watched(tmp_path, *words)
    assert ended.code == 0, ended.stderr
    counts = log(tmp_path)
    assert [counts[f"allocate {ratio}"] for ratio in (0.2, 0.4, 0.6, 0.8)] == [1, 1, 2, 1]
    assert [counts[f"score {block}"] for block in range(3)] == [1, 2, 1]  # killed within block 1
    results = ended.results
    assert [cell.status for cell in results.cells] == ["done"] * 4
    again = watched(tmp_path, *words)
    assert (again.code, log(tmp_path)) == (0, counts)
    assert again.results.cells == results.cells


def test_a_wider_sweep_measures_what_is_new(tiny_words: list[str], tmp_path: Path) -> None:
    first = watched(tmp_path, *tiny_words, "--criterion", "watched", "--allocator", "even", "--ratio", "0.5")
    wider = watched(
        tmp_path, *tiny_words, "--criterion", "watched,cfsp", "--allocator", "even,error-curve", "--ratio", "0.25,0.5"
    )
    assert (first.code, wider.code) == (0, 0), wider.stderr
    counts = log(tmp_path)
    assert counts["allocate 0.5"] == 2  # watched + even before, cfsp + even now
    assert counts["allocate 0.25"] == 2
    assert len(wider.results.cells) == 8


def test_a_failed_cell_is_a_row_and_tried_again(tiny_words: list[str], tmp_path: Path) -> None:
    words = [*tiny_words, "--criterion", "watched,hollow,cfsp", "--allocator", "even", "--ratio", "0.25,0.5"]
    ended = watched(tmp_path, *words)
    assert ended.code == 1
    assert ended.stderr.strip().splitlines()[-1].startswith("Error: 2 of 6 cells failed;")
    results = ended.results
    failed = [cell for cell in results.cells if cell.status == "failed"]
    assert [(cell.spec.row, cell.spec.ratio) for cell in failed] == [("hollow + even", 0.25), ("hollow + even", 0.5)]
    assert all("block 1, mlp has values that are not finite" in (cell.error or "") for cell in failed)
    before = log(tmp_path)
    assert watched(tmp_path, *words).code == 1
    assert log(tmp_path) == before  # hollow fails before anything else is asked; all others are done


def test_an_impossible_ratio_is_a_row_too(tiny_words: list[str], tmp_path: Path) -> None:
    words = [*tiny_words, "--criterion", "watched", "--allocator", "even", "--ratio", "0.5,0.97", "--round-to", "8"]
    ended = watched(tmp_path, *words)
    results = ended.results
    assert ended.code == 1
    assert [cell.status for cell in results.cells] == ["done", "failed"]
    assert "cannot be met with --round-to 8" in (results.cells[1].error or "")


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["--criterion", "cfps"], 2, "Unknown criterion 'cfps'. Did you mean 'cfsp'"),
        (["--criterion", "cfsp:d=1"], 2, "Bad options for criterion 'cfsp'"),
        (["--ratio", "2"], 2, "ratio: "),
        (["-j", "2"], 2, "-j: the serial executor runs one cell at a time"),
        (["--executor", "process", "--latency"], 2, "--latency: cells that run at the same time"),
        (["--ray-address", "auto"], 2, "--ray-address: add --executor ray"),
        (["-p", "no_such_module"], 3, "no_such_module"),
    ],
)
def test_impossible_options_are_refused_before_the_model_is_opened(
    words: list[str], code: int, problem: str, tmp_path: Path
) -> None:
    ended = CliRunner().invoke(cli, ["ablate", "no such model", str(tmp_path / "out"), *words])
    assert (ended.exit_code, problem in ended.stderr) == (code, True), ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ended = CliRunner().invoke(cli, ["ablate", "demo", str(tmp_path)])
    assert (ended.exit_code, "holds no sweep" in ended.stderr) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        open_store(tmp_path / "out"),
        pytest.raises(OutputError, match="another sweep is at work"),
        open_store(tmp_path / "out"),
    ):
        pass


@pytest.mark.parametrize("executor", ["process", "ray"])
def test_other_executors_give_the_same_table(executor: str, tiny_words: list[str], tmp_path: Path) -> None:
    if executor == "ray":
        pytest.importorskip("ray")
    words = [
        *tiny_words[2:],
        "--criterion",
        "watched,cfsp,hollow",
        "--allocator",
        "cfsp,error-curve",
        "--compensator",
        "sequential",
    ]
    tables: list[SweepResults] = []
    for kind in ("serial", executor):
        more = [] if kind == "serial" else ["--executor", executor, "-j", "2"]
        apart = "never" if kind == "ray" else None  # what Ray leaves behind goes with its process
        ended = watched(tmp_path, tiny_words[0], str(tmp_path / kind), *words, *more, end=apart)
        assert ended.code == 1, ended.stderr
        tables.append(ended.results)
    serial, parallel = ([cell.model_copy(update={"seconds": 0.0}) for cell in table.cells] for table in tables)
    assert serial == parallel
    assert [cell.status for cell in serial] == ["done"] * 4 + ["failed"] * 2
    assert tables[0].agreements == tables[1].agreements


# --- how criteria agree -----------------------------------------------------------------------------------------------

matrices = st.integers(1, 4).flatmap(
    lambda count: st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=count, max_size=count)
)


@settings(deadline=None)
@given(matrices)
def test_rank_correlations_are_spearmans(scores: list[list[int]]) -> None:
    from scipy.stats import spearmanr

    tensor = torch.tensor(scores, dtype=torch.float64)
    actual = rank_correlations(tensor)
    for i, first in enumerate(scores):
        for j, second in enumerate(scores):
            constant = len({*first}) == 1 or len({*second}) == 1
            result: Any = None if constant else spearmanr(first, second)
            expected = 0.0 if constant else result.statistic
            assert actual[i, j].item() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(matrices, st.sampled_from([0.0, 0.2, 0.5, 0.9]))
def test_overlaps_are_shares_of_what_both_keep(scores: list[list[int]], ratio: float) -> None:
    from cfsp_framework.pruning.planning import keep_highest

    tensor = torch.tensor(scores, dtype=torch.float64)
    count = max(1, round((1 - ratio) * 7))
    kept = [set(keep_highest(row, count)) for row in tensor]
    expected = [[len(row & other) / count for other in kept] for row in kept]
    torch.testing.assert_close(overlaps(tensor, ratio), torch.tensor(expected, dtype=torch.float64))


def test_latex_is_escaped() -> None:
    assert latex(r"a_b & 50 % {x} \y ~ ^") == (
        r"a\_b \& 50 \% \{x\} \textbackslash{}y \textasciitilde{} \textasciicircum{}"
    )


def test_latency_is_measured_beside_the_dense_model(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    options = {"calibration": str(calibration_text), "samples": 4, "seqlen": 32, "round_to": 4, "device": "cpu"}
    cells = expand(str(make_model("llama")), options)
    [cell] = ablate(Sweep(cells, Extras(latency=True)), tmp_path / "out").cells
    assert cell.latency is not None
    assert cell.latency.tokens == 512
    assert cell.latency.milliseconds > 0
    assert cell.latency.dense_milliseconds > 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_notes_and_bars_share_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, hide_cursor = Terminal(), "\x1b[?25l"
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress(visible=True)
    progress.note("out [1] has 2 of 4 cells")
    assert terminal.getvalue() == "out [1] has 2 of 4 cells\n"
    for displays in (1, 2):
        with progress.bar("cells", total=2) as step:
            with progress.bar("collect", total=1) as inner:
                inner()
            step()
        assert terminal.getvalue().count(hide_cursor) == displays


@pytest.mark.parametrize(
    ("values", "expected"),
    [([65.884, 65.884], "65.88"), ([65.884], "65.88"), ([1.0, 2.0], "1.50 ± 6.35"), ([], "failed")],
)
def test_values_that_all_seeds_share_have_no_spread(values: list[float], expected: str) -> None:
    assert TableCell(interval(values), None, failed=0 if values else 2, best=False).text(2) == expected
