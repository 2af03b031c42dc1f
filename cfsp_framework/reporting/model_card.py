"""The metadata at the top of a model card: what the Hub reads, carried over from the base model where that says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load

from cfsp_framework.api.records import Evaluation, Report
from cfsp_framework.data.sources import WELL_KNOWN, parse_mixture
from cfsp_framework.errors import CfspError
from cfsp_framework.runtime.atomic_files import licence_files

_CARRIED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class BaseModel:
    """What is known of the model that was pruned: its id on the Hub, and what its own card says."""

    name: str
    hub_id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    licence_files: tuple[str, ...] = ()

    @property
    def licence(self) -> str | None:
        """As a person reads it, or None where nothing says."""
        name = self.metadata.get("license_name") or self.metadata.get("license")
        return str(name) if name else None


def read_base(source: str, folder: Path) -> BaseModel:
    """What ``folder``, where the model ``source`` lies, tells of its licence and language."""
    local = PurePath(source).is_absolute() or source.startswith((".", "~")) or source.count("/") != 1
    hub_id = None if local or Path(source).exists() else source
    found: dict[str, Any] = {}
    try:
        found = metadata_load(folder / "README.md") or {}
    except Exception:  # noqa: BLE001  (whatever is wrong with somebody else's card is no reason to stop)
        found = {}
    carried = {key: value for key in _CARRIED if (value := plain(found.get(key)))}
    files = tuple(path.name for path in licence_files(folder))
    link = carried.get("license_link")
    if isinstance(link, str) and "://" not in link and PurePath(link).name not in files:
        if hub_id:
            carried["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
        else:
            del carried["license_link"]  # it would point to nothing
    return BaseModel(PurePath(source).name or source, hub_id, carried, files)


def plain(value: Any) -> Any:
    """Metadata whose texts are one line without control characters, which YAML would fold or refuse."""
    if isinstance(value, str):
        return " ".join("".join(letter if letter.isprintable() else " " for letter in value).split())
    return [plain(one) for one in value] if isinstance(value, list) else value


def front_matter(report: Report, base: BaseModel, name: str, *, code: bool) -> str:
    """The YAML between the dashes. Perplexities are listed where the Hub has the data they were measured on.

    ``base_model_relation`` has no value for pruned models; trained ones are ``finetune``.
    """
    used = [report.calibration, report.recovery.data if report.recovery else None]
    sets = dict.fromkeys(one for spec in used if spec for one in hub_data_sets(spec))
    results = [result for found in report.evaluations if (result := _result(found))]
    more: dict[str, Any] = dict(base.metadata)
    if base.hub_id and report.recovery and not report.recovery.adapter:
        more["base_model_relation"] = "finetune"
    if results:
        more |= {"model_name": name, "eval_results": results}
    tags = ["pruning", "structured-pruning", "cfsp-framework"]
    return ModelCardData(
        base_model=base.hub_id,
        datasets=list(sets) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*tags, *(["custom_code"] if code else [])],
        **more,
    ).to_yaml()


def hub_data_sets(spec: str) -> list[str]:
    """The data sets of the Hub that a SPEC reads."""
    try:
        parts = [name for name, _ in parse_mixture(spec.removeprefix("instructions:"))]
    except CfspError:
        return []
    known = [WELL_KNOWN[part].repository if part in WELL_KNOWN else part for part in parts]
    named = [part.split(":")[1] if part.startswith("hf:") else part for part in known]
    return [one for one, part in zip(named, parts, strict=True) if part in WELL_KNOWN or part.startswith("hf:")]


def _result(found: Evaluation) -> EvalResult | None:
    """A perplexity as the Hub lists it."""
    named = hub_data_sets(found.data)
    if not named:
        return None
    corpus = WELL_KNOWN.get(found.data)
    return EvalResult(
        task_type="text-generation",
        dataset_type=named[0],
        dataset_name=found.data,
        dataset_config=corpus.config if corpus else None,
        dataset_split=corpus.evaluation_split if corpus else None,
        metric_type="perplexity",
        metric_name=f"Perplexity, {found.windows} windows of {found.seqlen} tokens",
        metric_value=round(found.last.perplexity, 4),
    )
