"""Write pruned checkpoints without a run: a model, a plan, dropped attention and added biases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cfsp_framework import RunConfig
from cfsp_framework.api.records import PruningPlan
from cfsp_framework.checkpoint.save import CARD_FILE, PLAN_FILE, save_model
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.modeling.decoder import Decoder, open_decoder
from cfsp_framework.modeling.loading import load_model
from cfsp_framework.pruning.cut import cut_model
from cfsp_framework.pruning.surgery import drop_attention
from cfsp_framework.runtime.atomic_files import staged_folder
from helpers import families
from helpers.compensation import GivenUpdates


def write_pruned(
    dense: Path,
    out: Path,
    plan: Sequence[int] | Callable[[Decoder], PruningPlan],
    *,
    dropped: Sequence[int] = (),
    biases: Sequence[str] = (),
    max_shard_size: str = "5GB",
) -> Path:
    """Cut the model in ``dense`` by a plan, or to these widths, and write the checkpoint ``out`` with plan and card."""
    loaded = load_model(RunConfig.build(model=str(dense), device="cpu"))
    decoder = open_decoder(loaded.model, load_plugins())
    planned = plan(decoder) if callable(plan) else families.plan_of(decoder, plan)
    drop_attention(decoder, dropped)
    cut_model(decoder, planned, GivenUpdates(families.add_biases(decoder, biases)))
    with staged_folder(out) as folder:
        save_model(decoder, loaded, folder, max_shard_size=max_shard_size)
        (folder / PLAN_FILE).write_text(planned.to_json())
        (folder / CARD_FILE).write_text("# A model\n\nWidths differ.\n")
    return out
