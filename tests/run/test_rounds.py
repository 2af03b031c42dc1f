"""Pruning in rounds: each is a run on the model as the one before left it, and their plans are nested."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsp_framework import PruningPlan
from cfsp_framework.api.records import BlockPlan
from cfsp_framework.run.rounds import compose
from cfsp_framework.testing import build_plan
from helpers.runs import invoke, prune_small, refuse_small, weights_of
from helpers.types import MakeModel

SMALL: dict[str, Any] = {"round_to": 4, "evaluate": ()}


def plans_of(folder: Path) -> list[PruningPlan]:
    """The plans of all rounds, the last one's included."""
    paths = [*sorted((folder / "plans").glob("round-*.json")), folder / "pruning_plan.json"]
    return [PruningPlan.from_json(path.read_text()) for path in paths]


def test_plans_are_nested_and_keep_equal_shares_of_one_another(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    model = make_model("llama")
    prune_small(model, tmp_path / "out", calibration_text, "cfsp", rounds=3, ratio=0.5, **SMALL)
    once = prune_small(model, tmp_path / "once", calibration_text, "cfsp", ratio=0.5, **SMALL).plan
    plans = plans_of(tmp_path / "out")
    assert [plan.rounds for plan in plans] == [1, 2, 3]
    for wider, narrower in pairwise(plans):
        for before, after in zip(wider.blocks, narrower.blocks, strict=True):
            assert set(after.kept) <= set(before.kept)
            assert (after.width, after.block, after.path) == (64, before.block, before.path)
    totals = [sum(plan.widths) for plan in plans]
    assert totals == [round(192 * 0.5 ** (number / 3) / 4) * 4 for number in (1, 2, 3)]
    assert totals[-1] == sum(once.widths)
    assert (plans[-1].ratio, once.ratio, once.rounds) == (0.5, 0.5, 1)
    assert not (tmp_path / "once" / "plans").exists()


@pytest.mark.parametrize(("name", "preset"), [("llama", "cfsp-closed-form"), ("gemma2", "flap-released")])
def test_two_rounds_are_two_runs(
    name: str, preset: str, make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    model = make_model(name, dtype="float32")
    more: dict[str, Any] = {**SMALL, "rebalance": True}
    rounds = prune_small(model, tmp_path / "rounds", calibration_text, preset, rounds=2, ratio=0.5, **more)
    first = plans_of(tmp_path / "rounds")[0]
    prune_small(model, tmp_path / "first", calibration_text, preset, ratio=first.ratio, **more)
    ratio = 1 - sum(rounds.plan.widths) / sum(first.widths)
    prune_small(tmp_path / "first", tmp_path / "second", calibration_text, preset, ratio=ratio, **more)
    expected, weights = weights_of(tmp_path / "second"), weights_of(tmp_path / "rounds")
    assert expected.keys() == weights.keys()
    for key, value in expected.items():
        assert torch.allclose(weights[key], value, rtol=1e-5, atol=1e-6), key


def test_a_run_goes_on_after_the_last_finished_round(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    model, kept = make_model("llama"), tmp_path / "kept"
    more: dict[str, Any] = {"ratio": 0.5, "resume": kept, **SMALL}
    prune_small(model, tmp_path / "first", calibration_text, "cfsp-closed-form", rounds=2, **more)
    times = {path: path.stat().st_mtime_ns for path in kept.rglob("*.safetensors")}
    collections = {path.parent.name for path in times if path.parent.name.startswith("collection")}
    assert len(collections) == 2
    for path in list(times):  # as if the run had been killed while it measured for the second round
        if path.parent.name == max(collections, key=lambda folder: (kept / folder).stat().st_ctime_ns):
            path.unlink()
    removed = {path for path in times if not path.exists()}
    prune_small(model, tmp_path / "again", calibration_text, "cfsp-closed-form", rounds=2, **more)
    assert {path: path.stat().st_mtime_ns for path in times if path not in removed} == {
        path: time for path, time in times.items() if path not in removed
    }
    assert set(kept.rglob("*.safetensors")) == set(times)
    first, again = weights_of(tmp_path / "first"), weights_of(tmp_path / "again")
    assert all(torch.equal(value, again[key]) for key, value in first.items())


def test_a_plan_is_that_of_the_run(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    small = ("--calibration", calibration_text, "--samples", 20, "--seqlen", 32, "--round-to", 4, "--rounds", 2)
    words = (*small, "--preset", "cfsp-closed-form", "--budget", "parameters", "--ratio", 0.2)
    model = make_model("llama")
    assert invoke("plan", model, tmp_path / "plan.json", *words).exit_code == 0
    assert invoke("prune", model, tmp_path / "out", *words).exit_code == 0
    assert (tmp_path / "plan.json").read_text() == (tmp_path / "out" / "pruning_plan.json").read_text()


@pytest.mark.parametrize("words", [("--stream",), ("--plan", "plan.json")])
def test_options_that_need_one_round_are_refused(
    words: tuple[str, ...], make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    model = make_model("llama")
    small = ("--calibration", calibration_text, "--samples", 4, "--seqlen", 32, "--round-to", 8)
    assert invoke("plan", model, tmp_path / "plan.json", *small).exit_code == 0
    paths = [str(tmp_path / word) if word.endswith(".json") else word for word in words]
    message = refuse_small(model, tmp_path, calibration_text, "--rounds", 2, *paths)
    assert "--rounds" in message
    assert words[0] in message


def test_a_round_that_removes_nothing_is_refused(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    message = refuse_small(make_model("llama"), tmp_path, calibration_text, "--rounds", 50)
    assert "fewer rounds" in message


@settings(deadline=None)
@given(st.data())
def test_composed_plans_name_channels_of_the_dense_model(data: st.DataObject) -> None:
    width = data.draw(st.integers(3, 30))
    outer = sorted(data.draw(st.sets(st.integers(0, width - 1), min_size=2)))
    inner = sorted(data.draw(st.sets(st.integers(0, len(outer) - 1), min_size=1)))
    before = compose(None, build_plan([BlockPlan(block=0, path="mlp", width=width, kept=tuple(outer))]), 1, 2)
    step = build_plan([BlockPlan(block=0, path="mlp", width=len(outer), kept=tuple(inner))])
    [entry] = compose(before, step, 2, 2).blocks
    channels = torch.arange(width)[outer][inner]  # (K,)
    assert entry.kept == tuple(channels.tolist())
    assert entry.width == width
