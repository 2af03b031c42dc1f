"""Install plugins as pip does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


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
