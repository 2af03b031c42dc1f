"""Plugins as pip installs them, and the command line in this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

from click.testing import CliRunner, Result

from cfsp_framework.cli.main import cli


def invoke(*words: object, columns: int = 80) -> Result:
    """Run a command of ``cfsp`` in a terminal of so many columns; an unexpected exception keeps its traceback."""
    with patch.dict(os.environ, COLUMNS=str(columns)):
        result = CliRunner().invoke(cli, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def install_distribution(
    folder: Path, name: str, points: Mapping[str, str], modules: Mapping[str, str] | None = None, version: str = "1.0"
) -> None:
    """Write a distribution with its entry points into ``folder``: metadata, and the source of its modules beside it."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    lines = "".join(f"{point} = {module}\n" for point, module in points.items())
    (metadata / "entry_points.txt").write_text(f"[cfsp_framework]\n{lines}", encoding="utf-8")
    for module, source in (modules or {}).items():
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
