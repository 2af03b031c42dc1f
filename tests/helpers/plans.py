"""Build pruning plans without a model."""

from __future__ import annotations

from collections.abc import Iterable

from cfsp_framework.api.records import BlockPlan, ModelIdentity, PruningPlan


def build_plan(blocks: Iterable[BlockPlan], **changes: object) -> PruningPlan:
    """Build a plan of these blocks for a tiny Llama; ``changes`` replace other fields."""
    values: dict[str, object] = {
        "model": ModelIdentity(source="tiny", family="llama", fingerprint="", parameters=0),
        "calibration": None,
        "ratio": 0.5,
        "budget": "channels",
        "round_to": 1,
        "seed": 0,
        "components": {},
        "versions": {},
        "blocks": tuple(blocks),
        **changes,
    }
    return PruningPlan.model_validate(values)
