"""Run commands and small pruning runs in this process, and compare the checkpoints they write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor

from cfsp_framework import PruningPlan, prune
from cfsp_framework.api.records import RunResult
from cfsp_framework.cli.main import cli
from cfsp_framework.config import layered
from helpers.families import tensors_of


def invoke(*words: object, columns: int = 80) -> Result:
    """Run a command of ``cfsp`` in a terminal of so many columns; a fault of the program is raised."""
    with patch.dict(os.environ, COLUMNS=str(columns)):
        result = CliRunner().invoke(cli, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "This is a fault of cfsp" not in result.stderr, result.stderr
    return result


def prune_small(
    model: Path, out: Path, text: Path, preset: str | None = None, plan: PruningPlan | None = None, **options: object
) -> RunResult:
    """Prune a tiny model into ``out`` as a command line with these options does."""
    given = {"model": str(model), "calibration": str(text), "evaluate": str(text), "evaluate_windows": 3, "samples": 20}
    given |= {"seqlen": 32, "round_to": 8, "device": "cpu", **options}
    return prune(layered(preset, None, given), out, plan=plan, keep_statistics=plan is None)


def refuse_small(model: Path, folder: Path, text: Path, *words: object) -> str:
    """Return the line with which ``cfsp prune`` refuses; it must leave nothing in ``folder``."""
    files = set(folder.rglob("*"))
    small = "--calibration", text, "--samples", 4, "--seqlen", 32, "--round-to", 8
    result = invoke("prune", model, folder / "out", *small, *words)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert len(result.stderr.splitlines()) == 1
    assert set(folder.rglob("*")) == files
    return result.stderr


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a checkpoint by name; a name in two shards is an error."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        shard = load_file(path)
        assert not shard.keys() & weights.keys()
        weights |= shard
    return weights


def equal_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Return whether both have the same names and the same values, to the last bit."""
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


def same_weights(left: Path, right: Path) -> bool:
    """Compare two checkpoints to the last bit."""
    return equal_tensors(tensors_of(left), tensors_of(right))
