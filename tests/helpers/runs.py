"""Run commands in this process and compare the checkpoints they write."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import torch
from click.testing import CliRunner, Result

from cfsp_framework.cli.main import cli
from helpers.families import tensors_of


def invoke(*words: object, columns: int = 80) -> Result:
    """Run a command of ``cfsp`` in a terminal of so many columns; an unexpected exception keeps its traceback."""
    with patch.dict(os.environ, COLUMNS=str(columns)):
        result = CliRunner().invoke(cli, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def same_weights(left: Path, right: Path) -> bool:
    """Compare two checkpoints to the last bit."""
    first, second = tensors_of(left), tensors_of(right)
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
