"""A report for the tests of pages and cards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from cfsp_framework.api.records import Report
from cfsp_framework.cli.main import cli


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path], calibration_text: Path) -> Report:
    """Return the report of a real run on a local text."""
    out = tmp_path_factory.mktemp("cards") / "out"
    words = ["prune", make_model("llama"), out, "--calibration", calibration_text, "--samples", 4, "--seqlen", 32]
    words += ["--round-to", 8, "--evaluate", calibration_text, "--evaluate-windows", 2, "-q"]
    result = CliRunner().invoke(cli, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return Report.model_validate_json((out / "report.json").read_text())
