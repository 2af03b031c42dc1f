"""Run commands in this process and compare the checkpoints they write."""

from __future__ import annotations

from pathlib import Path

import torch
from click.testing import CliRunner, Result

from cfsp_framework.cli.main import cli
from helpers.families import tensors_of


def run_command(*words: object) -> Result:
    """Run ``cfsp WORDS``; an exception that is not reported to the user is raised."""
    result = CliRunner().invoke(cli, list(map(str, words)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def same_weights(left: Path, right: Path) -> bool:
    """Compare two checkpoints to the last bit."""
    first, second = tensors_of(left), tensors_of(right)
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
