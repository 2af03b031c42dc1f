"""Comparing two plans: overlaps of channels, differences of settings, refusals and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfsp_framework.api.records import BlockPlan, CalibrationIdentity, ModelIdentity, PruningPlan
from cfsp_framework.checkpoint.save import PLAN_FILE
from cfsp_framework.cli.options import read_plan
from cfsp_framework.errors import PlanError
from cfsp_framework.pruning.plan_diff import Comparison, compare
from cfsp_framework.testing import build_plan
from helpers.runs import invoke

NAMES = ("A", "B")


def make_plan(*blocks: tuple[int, str, int, set[int]], fingerprint: str = "aa" * 32, **changes: object) -> PruningPlan:
    """Make a plan of (block, path, width, kept channels)."""
    settings: dict[str, object] = {
        "model": ModelIdentity(source="tiny", family="llama", fingerprint=fingerprint, parameters=0),
        "calibration": CalibrationIdentity(spec="demo", samples=8, seqlen=64, seed=0, fingerprint="cc" * 32),
        "components": {"criterion": "cfsp:variant=rel", "allocator": "uniform"},
        "versions": {"torch": "2.13.0"},
    }
    entries = [
        BlockPlan(block=block, path=path, width=width, importance=0.25 * block, kept=tuple(sorted(kept)))
        for block, path, width, kept in blocks
    ]
    return build_plan(entries, **{**settings, **changes})


def keeping(kept: Iterable[set[int]], ratio: float = 0.5) -> PruningPlan:
    """Make a plan that keeps these of 16 channels in each block."""
    return make_plan(*((block, "mlp", 16, channels) for block, channels in enumerate(kept)), ratio=ratio)


@pytest.fixture
def plans(tmp_path: Path) -> tuple[Path, Path]:
    """Write two plans for one model; the second is in a checkpoint's folder."""
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


run = partial(invoke, "compare")


# --- counts -----------------------------------------------------------------------------------------------------------

channels = st.sets(st.integers(0, 15), min_size=1)
pairs = st.lists(st.tuples(channels, channels), min_size=1, max_size=4)
Pairs = list[tuple[set[int], set[int]]]


@given(pairs)
def test_overlaps_are_those_of_the_sets(kept: Pairs) -> None:
    left, right = zip(*kept, strict=True)
    comparison = compare(keeping(left), keeping(right), NAMES)
    for block, (first, second) in zip(comparison.blocks, kept, strict=True):
        assert (block.first, block.second, block.both) == (len(first), len(second), len(first & second))
        assert (block.only_first, block.only_second) == (len(first - second), len(second - first))
        assert block.jaccard == len(first & second) / len(first | second)
    assert comparison.total.both == sum(block.both for block in comparison.blocks)
    assert comparison.total.width == 16 * len(kept)
    assert comparison.same_cut == all(first == second for first, second in kept)
    assert comparison.differences == ()


@given(pairs)
def test_exchanging_the_plans_exchanges_all_numbers(kept: Pairs) -> None:
    left, right = zip(*kept, strict=True)
    first, second = keeping(left, ratio=0.3), keeping(right)
    forth, back = compare(first, second, NAMES), compare(second, first, NAMES)
    assert forth.same_cut == back.same_cut
    assert (forth.total.first, forth.total.only_first) == (back.total.second, back.total.only_second)
    assert (forth.total.jaccard, forth.total.chance) == pytest.approx((back.total.jaccard, back.total.chance))
    exchanged = [(difference.name, difference.second, difference.first) for difference in back.differences]
    assert [(difference.name, difference.first, difference.second) for difference in forth.differences] == exchanged


@given(pairs)
def test_a_plan_equals_itself(kept: Pairs) -> None:
    plan = keeping(first for first, _ in kept)
    comparison = compare(plan, plan, NAMES)
    assert (comparison.same_cut, comparison.differences, comparison.notes) == (True, (), ())
    assert comparison.total.jaccard == 1.0


def test_chance_is_what_random_plans_overlap() -> None:
    first, second = (make_plan((0, "mlp", 100, {*range(start, start + 50)})) for start in (0, 25))
    total = compare(first, second, NAMES).total
    assert total.jaccard == total.chance == 25 / 75


def test_the_order_of_blocks_does_not_matter() -> None:
    first = make_plan((0, "mlp", 4, {0}), (1, "mlp", 4, {1, 2}))
    second = make_plan((1, "mlp", 4, {1, 2}), (0, "mlp", 4, {0}))
    assert compare(first, second, NAMES).same_cut


def test_experts_of_a_mixture_are_one_row_unless_asked_for() -> None:
    first = make_plan((0, "mlp.experts.0", 8, {0, 1}), (0, "mlp.experts.1", 8, {0, 1}), (0, "mlp.shared", 8, {7}))
    second = make_plan((0, "mlp.experts.0", 8, {0, 1}), (0, "mlp.experts.1", 8, {1, 2}), (0, "mlp.shared", 8, {7}))
    rows = [(row.path, row.experts, row.both, row.only_first) for row in compare(first, second, NAMES).blocks]
    assert rows == [("mlp.experts", 2, 3, 1), ("mlp.shared", 1, 1, 0)]
    each = [(row.path, row.both) for row in compare(first, second, NAMES, experts=True).blocks]
    assert each == [("mlp.experts.0", 2), ("mlp.experts.1", 1), ("mlp.shared", 1)]


def test_settings_that_led_to_the_plans_are_compared_too() -> None:
    first = make_plan((0, "mlp", 4, {0}), (1, "mlp", 4, {0}))
    second = first.model_copy(
        update={"calibration": None, "dropped_attention": (1,), "versions": {"torch": "2.6.0"}, "budget": "parameters"}
    )
    comparison = compare(first, second, NAMES)
    differences = {difference.name: (difference.first, difference.second) for difference in comparison.differences}
    assert differences.pop("calibration") == ("demo", None)
    assert differences.pop("dropped attention") == ("[]", "[1]")
    assert differences.pop("version of torch") == ("2.13.0", "2.6.0")
    assert differences.pop("budget") == ("channels", "parameters")
    assert all(name.startswith("calibration ") for name in differences)
    assert not comparison.same_cut  # the attention


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_plans_of_models_of_other_shapes_cannot_be_compared() -> None:
    plan, wider = make_plan((0, "mlp", 8, {0})), make_plan((0, "mlp", 16, {0}))
    longer = make_plan((0, "mlp", 8, {0}), (1, "mlp", 8, {0}))
    for first, second, message in (
        (plan, wider, r"block 0, mlp .* 8 channels in A .* 16 channels in B"),
        (plan, longer, r"block 1, mlp .* missing in A .* 8 channels in B"),
        (longer, plan, r"block 1, mlp .* 8 channels in A .* missing in B"),
    ):
        with pytest.raises(PlanError, match=message):
            compare(first, second, NAMES)


def test_other_weights_of_the_same_shape_are_a_note() -> None:
    first, second = make_plan((0, "mlp", 8, {0})), make_plan((0, "mlp", 8, {0}), fingerprint="bb" * 32)
    comparison = compare(first, second, NAMES)
    assert comparison.same_cut
    [note] = comparison.notes
    assert "aaaaaaaaaaaa and bbbbbbbbbbbb" in note


def test_a_file_that_is_not_a_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PlanError, match=r"empty has no pruning_plan\.json"):
        read_plan(tmp_path / "empty")
    impossible = make_plan((0, "mlp", 8, {0})).to_json().replace("[0]", "[9]")
    for content in (b"\xff\xfe\x00", b"{}", b"no json", impossible.encode()):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(PlanError, match=r"bad\.json.*channel 9" if b"kept" in content else r"bad\.json"):
            read_plan(tmp_path / "bad.json")


# --- the command ------------------------------------------------------------------------------------------------------


def test_compare_prints_tables(plans: tuple[Path, Path]) -> None:
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


def test_compare_of_real_widths_fits_a_terminal(tmp_path: Path) -> None:
    for name, offset in (("a.json", 0), ("b.json", 1)):
        kept = {*range(offset, 14336, 2)}
        (tmp_path / name).write_text(make_plan(*((block, "mlp", 14336, kept) for block in range(80))).to_json())
    result = run(tmp_path / "a.json", tmp_path / "b.json")
    assert "…" not in result.stdout
    assert any(line.split()[:3] == ["79", "14336", "7168"] for line in result.stdout.splitlines())


def test_compare_prints_json(plans: tuple[Path, Path]) -> None:
    output = run(*plans, "--json").stdout
    comparison = Comparison.model_validate_json(output)
    assert json.loads(output)["blocks"][0]["jaccard"] == 0.4
    assert [difference.name for difference in comparison.differences] == ["ratio", "criterion"]


def test_the_exit_code_depends_on_the_plans_only_with_exit_code(plans: tuple[Path, Path]) -> None:
    first, second = plans
    assert run(first, second, "-q").exit_code == 0
    assert run(first, second, "-q", "--exit-code").exit_code == 1
    assert run(first, first, "--exit-code").exit_code == 0
    assert run(first, second, "-q", "--exit-code").output == ""


def test_a_comparison_that_is_refused_is_one_line(plans: tuple[Path, Path]) -> None:
    other = plans[0].with_name("other.json")
    other.write_text(make_plan((0, "mlp", 16, {0}), (1, "mlp", 16, {0})).to_json())
    result = run(plans[0], other, "--exit-code")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "block 0, mlp has 8 channels" in result.stderr
    assert len(result.stderr.splitlines()) == 1
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
