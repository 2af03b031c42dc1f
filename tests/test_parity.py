"""Parity with the authors' released code on public models: kept widths, kept channels and perplexities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cfsp_framework.config import RunConfig, layered
from cfsp_framework.pipeline import evaluate_only, prune

DISTANCES = ("angular", "cosine", "mse", "mae", "uniform")
SETTINGS: dict[str, tuple[str, dict[str, str]]] = {
    **{f"cfsp_{name}": ("cfsp-released", {"allocator": f"cfsp:distance={name}"}) for name in DISTANCES[:4]},
    "cfsp_avg_base": ("cfsp-released", {"allocator": "cfsp:distance=uniform"}),
    "cfsp_a5": ("cfsp-released", {"allocator": "cfsp:a=5"}),
    "cfsp_wandabase": ("cfsp-released", {"criterion": "wanda-sp"}),
    "wanda_sp": ("wanda-sp-released", {}),
    "flap": ("flap-released", {}),
    "mag": ("magnitude-released", {}),
}


def check_cell(config: RunConfig, expected: dict[str, Any], evaluation: dict[str, Any], out: Path) -> None:
    result = prune(config, out)
    assert list(result.plan.widths) == expected["kept_widths"]
    assert [list(block.kept) for block in result.plan.blocks] == expected["kept_indices"]
    assert result.report.pruned.parameters == expected["parameters"]
    assert result.report.reload_difference == 0
    [(_, quality)] = evaluate_only(RunConfig.build(model=str(out), dtype="float32", **evaluation))
    assert quality.perplexity == pytest.approx(expected["perplexity"], rel=1e-3)


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("setting", SETTINGS)
def test_stories260k_matches_the_released_code(setting: str, ratio: float, assets: Path, tmp_path: Path) -> None:
    expected = json.loads((assets / "parity/released_stories260K.json").read_text())["cells"][f"{setting}_{ratio}"]
    preset, options = SETTINGS[setting]
    given: dict[str, object] = {
        "model": str(assets / "models/stories260K"),
        "ratio": ratio,
        "round_to": 1,
        "calibration": str(assets / "data/tinystories/parity-calibration.txt"),
        "samples": 64,
        "seqlen": 256,
        **options,
    }
    evaluation = {"evaluate": str(assets / "data/tinystories/parity-test.txt"), "seqlen": 256}
    check_cell(layered(preset, None, given), expected, evaluation, tmp_path / "out")


def test_wiki9m_matches_the_released_code_with_its_rounding(assets: Path, tmp_path: Path) -> None:
    expected = json.loads((assets / "parity/released_wiki9m.json").read_text())["cells"]["cfsp_angular_0.5"]
    given: dict[str, object] = {
        "model": str(assets / "models/wiki9m"),
        "ratio": 0.5,
        "dtype": "float32",
        "calibration": str(assets / "data/wikitext2/validation.txt"),
        "samples": 64,
        "seqlen": 512,
    }
    evaluation = {"evaluate": str(assets / "data/wikitext2/test.txt"), "seqlen": 512, "evaluate_windows": 100}
    check_cell(layered("cfsp-released", None, given), expected, evaluation, tmp_path / "out")
