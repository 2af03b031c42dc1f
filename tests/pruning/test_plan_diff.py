"""Two plans side by side: what is counted, what is refused, what is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from cfsp_framework.api.records import BlockPlan, CalibrationIdentity, ModelIdentity, PruningPlan
from cfsp_framework.checkpoint.save import PLAN_FILE
from cfsp_framework.cli.main import cli
from cfsp_framework.cli.options import read_plan
from cfsp_framework.errors import PlanError
from cfsp_framework.pruning.plan_diff import Comparison, compare

NAMES = ("A", "B")


def make_plan(*blocks: tuple[int, str, int, set[int]], fingerprint: str = "aa" * 32, **changes: object) -> PruningPlan:
    """A plan of (block, path, width, kept channels)."""
    plan = PruningPlan(
        model=ModelIdentity(source="tiny", family="llama", fingerprint=fingerprint, parameters=0),
        calibration=CalibrationIdentity(spec="demo", samples=8, seqlen=64, seed=0, fingerprint="cc" * 32),
        ratio=0.5,
        budget="channels",
        round_to=1,
        seed=0,
        components={"criterion": "cfsp:variant=rel", "allocator": "uniform"},
        versions={"torch": "2.13.0"},
        blocks=tuple(
            BlockPlan(block=block, path=path, width=width, importance=0.25 * block, kept=tuple(sorted(kept)))
            for block, path, width, kept in blocks
        ),
    )
    return plan.model_copy(update=changes)


@pytest.fixture
def plans(tmp_path: Path) -> tuple[Path, Path]:
    """Two plans for one model; the second is in a checkpoint's folder."""
    first = tmp_path / "a.json"
    first.write_text(make_plan((0, "mlp", 8, {0, 1, 2, 3}), (1, "mlp", 8, {4, 5})).to_json())
    second = tmp_path / "pruned"
    second.mkdir()
    other = make_plan(
        (0, "mlp", 8, {2, 3, 4}),
        (1, "mlp", 8, {4, 5}),
        ratio=0.4,
        components={"criterion": "wanda-sp", "allocator": "uniform"},
    )
    (second / PLAN_FILE).write_text(other.to_json())
    return first, second


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``run(*words)``: `cfsp compare` in this process."""
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*words: object) -> Result:
        result = CliRunner().invoke(cli, ["compare", *map(str, words)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


# --- what is counted --------------------------------------------------------------------------------------------------

channels = st.sets(st.integers(0, 15), min_size=1)
both = st.lists(st.tuples(channels, channels), min_size=1, max_size=4)


@given(both)
def test_overlaps_are_those_of_the_sets(kept: list[tuple[set[int], set[int]]]) -> None:
    first = make_plan(*((place, "mlp", 16, one) for place, (one, _) in enumerate(kept)))
    second = make_plan(*((place, "mlp", 16, other) for place, (_, other) in enumerate(kept)))
    found = compare(first, second, NAMES)
    for block, (one, other) in zip(found.blocks, kept, strict=True):
        assert (block.first, block.second) == (len(one), len(other))
        assert (block.both, block.only_first, block.only_second) == (
            len(one & other),
            len(one - other),
            len(other - one),
        )
        assert block.jaccard == len(one & other) / len(one | other)
    assert found.total.both == sum(block.both for block in found.blocks)
    assert found.total.width == 16 * len(kept)
    assert found.same_cut == all(one == other for one, other in kept)
    assert found.differences == ()


@given(both)
def test_the_other_way_round_everything_is_swapped(kept: list[tuple[set[int], set[int]]]) -> None:
    first = make_plan(*((place, "mlp", 16, one) for place, (one, _) in enumerate(kept)), ratio=0.3)
    second = make_plan(*((place, "mlp", 16, other) for place, (_, other) in enumerate(kept)))
    there, back = compare(first, second, NAMES), compare(second, first, NAMES)
    assert there.same_cut == back.same_cut
    assert (there.total.first, there.total.only_first) == (back.total.second, back.total.only_second)
    assert (there.total.jaccard, there.total.chance) == pytest.approx((back.total.jaccard, back.total.chance))
    assert [(one.name, one.first, one.second) for one in there.differences] == [
        (one.name, one.second, one.first) for one in back.differences
    ]


@given(both)
def test_a_plan_and_itself_are_one(kept: list[tuple[set[int], set[int]]]) -> None:
    plan = make_plan(*((place, "mlp", 16, one) for place, (one, _) in enumerate(kept)))
    found = compare(plan, plan, NAMES)
    assert (found.same_cut, found.differences, found.notes, found.total.jaccard) == (True, (), (), 1.0)


def test_chance_is_what_random_plans_overlap() -> None:
    found = compare(make_plan((0, "mlp", 100, {*range(50)})), make_plan((0, "mlp", 100, {*range(25, 75)})), NAMES)
    assert found.total.jaccard == found.total.chance == 25 / 75


def test_the_order_of_blocks_does_not_matter() -> None:
    first = make_plan((0, "mlp", 4, {0}), (1, "mlp", 4, {1, 2}))
    second = make_plan((1, "mlp", 4, {1, 2}), (0, "mlp", 4, {0}))
    assert compare(first, second, NAMES).same_cut


def test_experts_of_a_mixture_are_one_row_unless_asked_for() -> None:
    first = make_plan((0, "mlp.experts.0", 8, {0, 1}), (0, "mlp.experts.1", 8, {0, 1}), (0, "mlp.shared", 8, {7}))
    second = make_plan((0, "mlp.experts.0", 8, {0, 1}), (0, "mlp.experts.1", 8, {1, 2}), (0, "mlp.shared", 8, {7}))
    rows = [(one.path, one.experts, one.both, one.only_first) for one in compare(first, second, NAMES).blocks]
    assert rows == [("mlp.experts", 2, 3, 1), ("mlp.shared", 1, 1, 0)]
    each = [(one.path, one.both) for one in compare(first, second, NAMES, experts=True).blocks]
    assert each == [("mlp.experts.0", 2), ("mlp.experts.1", 1), ("mlp.shared", 1)]


def test_what_led_to_a_plan_is_compared_too() -> None:
    first = make_plan((0, "mlp", 4, {0}), (1, "mlp", 4, {0}))
    second = first.model_copy(
        update={"calibration": None, "dropped_attention": (1,), "versions": {"torch": "2.6.0"}, "budget": "parameters"}
    )
    found = compare(first, second, NAMES)
    told = {one.name: (one.first, one.second) for one in found.differences}
    assert told.pop("calibration") == ("demo", None)
    assert told.pop("dropped attention") == ("[]", "[1]")
    assert told.pop("version of torch") == ("2.13.0", "2.6.0")
    assert told.pop("budget") == ("channels", "parameters")
    assert all(name.startswith("calibration ") for name in told)
    assert not found.same_cut  # the attention


# --- what is refused --------------------------------------------------------------------------------------------------


def test_plans_of_other_models_are_refused() -> None:
    plan = make_plan((0, "mlp", 8, {0}))
    with pytest.raises(PlanError, match=r"block 0, mlp has 8 channels in A \(tiny\) and has 16 channels in B \(tiny\)"):
        compare(plan, make_plan((0, "mlp", 16, {0})), NAMES)
    longer = make_plan((0, "mlp", 8, {0}), (1, "mlp", 8, {0}))
    with pytest.raises(PlanError, match=r"block 1, mlp is missing in A \(tiny\) and has 8 channels in B"):
        compare(plan, longer, NAMES)
    with pytest.raises(PlanError, match=r"has 8 channels in A \(tiny\) and is missing in B"):
        compare(longer, plan, NAMES)


def test_other_weights_of_the_same_shape_are_a_note() -> None:
    first, second = make_plan((0, "mlp", 8, {0})), make_plan((0, "mlp", 8, {0}), fingerprint="bb" * 32)
    found = compare(first, second, NAMES)
    assert found.same_cut
    [note] = found.notes
    assert note.startswith("the plans are for models of one shape but other weights, aaaaaaaaaaaa and bbbbbbbbbbbb:")


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PlanError, match=r"empty has no pruning_plan\.json; give a plan, or the folder"):
        read_plan(tmp_path / "empty")
    for content in (b"\xff\xfe\x00", b"{}", b"no json"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(PlanError, match=r"bad\.json is no pruning plan"):
            read_plan(tmp_path / "bad.json")
    impossible = make_plan((0, "mlp", 8, {0})).to_json().replace("[0]", "[9]")
    (tmp_path / "bad.json").write_text(impossible)
    with pytest.raises(PlanError, match=r"bad\.json: the plan cannot be used: .*channel 9, outside 0\.\.7"):
        read_plan(tmp_path / "bad.json")


# --- the command ------------------------------------------------------------------------------------------------------


def test_compare_prints_tables(run: Callable[..., Result], plans: tuple[Path, Path]) -> None:
    result = run(*plans)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["0", "8", "4", "3", "2", "2", "1", "0.400", "0", "0"] in lines
    assert ["1", "8", "2", "2", "2", "0", "0", "1.000", "0.25", "0.25"] in lines
    assert ["all", "16", "6", "5", "4", "2", "1", "0.571"] in lines
    assert ["ratio", "0.5", "0.4"] in lines
    assert ["criterion", "cfsp:variant=rel", "wanda-sp"] in lines
    assert "differ in 1 of 2 feed-forwards" in result.stdout
    assert max(map(len, result.stdout.splitlines()[2:])) <= 80


def test_compare_of_real_widths_fits_a_terminal(run: Callable[..., Result], tmp_path: Path) -> None:
    for name, offset in (("a.json", 0), ("b.json", 1)):
        kept = {*range(offset, 14336, 2)}
        (tmp_path / name).write_text(make_plan(*((block, "mlp", 14336, kept) for block in range(80))).to_json())
    result = run(tmp_path / "a.json", tmp_path / "b.json")
    assert "…" not in result.stdout
    assert any(line.split()[:3] == ["79", "14336", "7168"] for line in result.stdout.splitlines())


def test_compare_prints_json(run: Callable[..., Result], plans: tuple[Path, Path]) -> None:
    result = run(*plans, "--json")
    found = Comparison.model_validate_json(result.stdout)
    assert json.loads(result.stdout)["blocks"][0]["jaccard"] == 0.4
    assert [one.name for one in found.differences] == ["ratio", "criterion"]


def test_the_exit_code_says_whether_plans_differ_only_if_asked(
    run: Callable[..., Result], plans: tuple[Path, Path]
) -> None:
    first, second = plans
    assert run(first, second, "-q").exit_code == 0
    assert run(first, second, "-q", "--exit-code").exit_code == 1
    assert run(first, first, "--exit-code").exit_code == 0
    assert run(first, second, "-q", "--exit-code").output == ""


def test_a_comparison_that_is_refused_is_one_line(run: Callable[..., Result], plans: tuple[Path, Path]) -> None:
    other = plans[0].with_name("other.json")
    other.write_text(make_plan((0, "mlp", 16, {0}), (1, "mlp", 16, {0})).to_json())
    result = run(plans[0], other, "--exit-code")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: These plans are for different models: block 0, mlp has 8 channels in")
    assert run(plans[0], "missing.json").exit_code == 2


def test_comparing_needs_no_torch(plans: tuple[Path, Path]) -> None:
    code = (
        "import sys; from cfsp_framework.cli.main import cli\n"
        f"try: cli(['compare', {str(plans[0])!r}, {str(plans[1])!r}], prog_name='cfsp')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
