"""Check the options of a run: first among themselves, before a model is opened, then against the model and the plan."""

from __future__ import annotations

from pathlib import Path

from cfsp_framework.api.data import Site
from cfsp_framework.api.records import PruningPlan
from cfsp_framework.config import RunConfig
from cfsp_framework.data.sources import parse_mixture
from cfsp_framework.errors import ConfigError, PlanError
from cfsp_framework.host.selection import Selection
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.pruning.planning import check_shared
from cfsp_framework.pruning.surgery import check_fits, expert_step
from cfsp_framework.runtime.distributed import Ranks


def input_paths(config: RunConfig) -> list[Path]:
    """Return the files and folders that a run reads or keeps its state in, as far as they exist."""
    run = config.run
    specs = [spec for spec in (config.calibration.data, config.recovery.data, *config.evaluation.data) if spec]
    data = [part for spec in specs for name, _ in parse_mixture(spec) for part in _parts(name)]
    names: list[str | Path] = [config.model.source, *data, *run.plugins, *filter(None, (run.resume, run.spill))]
    return [path for path in map(Path, names) if _exists(path)]


def _parts(spec: str) -> list[str]:
    """Return every part of a data SPEC that may be a path, such as FILE of ``FILE:COLUMN``."""
    words = spec.split(":")
    return [":".join(words[a:b]) for a in range(len(words)) for b in range(a + 1, len(words) + 1)]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a text too long to be a path
        return False


def check_options(config: RunConfig, selection: Selection, ranks: Ranks) -> None:
    """Refuse options and components that cannot be combined; no model is needed.

    Raises:
        ConfigError: it names the options and what to change.
    """
    if config.budget.drop_attention == "auto" and config.budget.unit != "parameters":
        raise ConfigError("--drop-attention auto needs --budget parameters: its rule is about all parameters.")
    if config.model.stream and config.budget.rounds > 1:
        raise ConfigError(
            "--stream and --rounds cannot be combined: the next round measures the model that the last one cut."
        )
    collectors = (*selection.collectors, *selection.second_pass)
    if config.model.stream:
        _check_streaming(config, selection)
    ordered = [collector.component.name for collector in collectors if collector.component.ordered]
    if ranks.world > 1 and ordered:
        raise ConfigError(
            f"{ordered[0]} depends on the order of all windows and cannot be distributed; run one process."
        )


def _check_streaming(config: RunConfig, selection: Selection) -> None:
    """Refuse what needs the whole model at once."""
    collectors = [c.component for c in (*selection.collectors, *selection.second_pass)]
    gradients = [collector.provides.name for collector in collectors if collector.site is Site.GRADIENT]
    if gradients:
        raise ConfigError(f"--stream: {gradients[0]} needs a backward pass through the whole model; omit --stream.")
    if selection.searches:
        raise ConfigError(
            f"--stream: {selection.allocator.component.name} tries many widths on the whole model, and would read it "
            "from disk for each; omit --stream, or search once without it and prune by that plan, --plan."
        )
    if config.budget.drop_attention:
        raise ConfigError(
            "--stream and --drop-attention cannot be combined: choosing attentions needs the whole model."
        )
    if config.model.device_map == "auto":
        raise ConfigError("--stream and --device-map auto cannot be combined: one reads block by block, one loads all.")
    if (recovery := selection.recovery.component.name) != "none":
        raise ConfigError(
            f"--stream: {recovery} trains the whole model, not one block at a time; prune first, then `cfsp recover`."
        )


def check_model(config: RunConfig, decoder: Decoder, *, planned: bool) -> None:
    """Refuse a rounding that experts cannot run with, and a model that cannot be distributed as asked for.

    Raises:
        ConfigError, PlanError: it names the option and the widths or heads that do not fit.
    """
    budget = config.budget
    if budget.tensor_parallel > 1:
        heads = decoder.config.num_attention_heads
        if heads % budget.tensor_parallel:
            raise ConfigError(
                f"--tensor-parallel {budget.tensor_parallel}: {heads} attention heads cannot be divided equally among "
                f"{budget.tensor_parallel} processes."
            )
        check_shared(decoder.places, budget.tensor_parallel)
    step = expert_step(decoder)
    if budget.round_to % step and not planned:
        raise ConfigError(
            f"--round-to {budget.round_to}: the products of experts need widths that are multiples of {step} in "
            f"{str(decoder.model.dtype).removeprefix('torch.')}."
        )


def check_plan(config: RunConfig, decoder: Decoder, fingerprint: str, plan: PruningPlan) -> None:
    """Refuse a plan made for other weights or other shapes.

    Raises:
        PlanError: it says what differs.
    """
    check_fits(decoder, plan)
    if plan.model.fingerprint != fingerprint:
        raise PlanError(
            f"the plan was made for another model than {config.model.source!r}: {plan.model.source!r}, "
            f"fingerprint {plan.model.fingerprint[:12]} against {fingerprint[:12]}."
        )
    check_shared([(entry.block, entry.path, len(entry.kept)) for entry in plan.blocks], config.budget.tensor_parallel)
