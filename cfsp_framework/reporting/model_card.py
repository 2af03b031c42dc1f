"""Write the metadata at the top of a model card, which the Hub reads; some is carried over from the base model."""

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
    """The model that was pruned: its id on the Hub, and the metadata of its own card."""

    name: str
    hub_id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    licence_files: tuple[str, ...] = ()

    @property
    def licence(self) -> str | None:
        """Name of the licence, or None where the card does not state it."""
        name = self.metadata.get("license_name") or self.metadata.get("license")
        return str(name) if name else None


def read_base(source: str, folder: Path) -> BaseModel:
    """Read licence and language of the model ``source`` from its ``folder``."""
    local = PurePath(source).is_absolute() or source.startswith((".", "~")) or source.count("/") != 1
    hub_id = None if local or Path(source).exists() else source
    metadata: dict[str, Any] = {}
    try:
        metadata = metadata_load(folder / "README.md") or {}
    except Exception:  # noqa: BLE001  (a broken card of the base model does not stop a run)
        metadata = {}
    carried = {key: value for key in _CARRIED if (value := plain(metadata.get(key)))}
    files = tuple(path.name for path in licence_files(folder))
    link = carried.get("license_link")
    if isinstance(link, str) and "://" not in link and PurePath(link).name not in files:
        if hub_id:
            carried["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
        else:
            del carried["license_link"]  # a relative link without its file
    return BaseModel(PurePath(source).name or source, hub_id, carried, files)


def plain(value: Any) -> Any:
    """Return metadata with every text on one line without control characters, which YAML would fold or refuse."""
    if isinstance(value, str):
        return " ".join("".join(letter if letter.isprintable() else " " for letter in value).split())
    return [plain(item) for item in value] if isinstance(value, list) else value


def front_matter(report: Report, base: BaseModel, name: str, *, code: bool) -> str:
    """Return the YAML between the dashes; perplexities are listed where the Hub has the text.

    ``base_model_relation`` has no value for pruned models; trained ones are ``finetune``.
    """
    used = [report.calibration, report.recovery.data if report.recovery else None]
    sets = dict.fromkeys(name for spec in used if spec for name in hub_data_sets(spec))
    results = [result for evaluation in report.evaluations if (result := _to_result(evaluation))]
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
    """Return the Hub's data sets that a SPEC reads."""
    try:
        parts = [name for name, _ in parse_mixture(spec.removeprefix("instructions:"))]
    except CfspError:
        return []
    known = [WELL_KNOWN[part].repository if part in WELL_KNOWN else part for part in parts]
    named = [part.split(":")[1] if part.startswith("hf:") else part for part in known]
    return [name for name, part in zip(named, parts, strict=True) if part in WELL_KNOWN or part.startswith("hf:")]


def _to_result(evaluation: Evaluation) -> EvalResult | None:
    """Return a perplexity as the Hub lists it, or None where the Hub lacks the text."""
    named = hub_data_sets(evaluation.data)
    if not named:
        return None
    corpus = WELL_KNOWN.get(evaluation.data)
    return EvalResult(
        task_type="text-generation",
        dataset_type=named[0],
        dataset_name=evaluation.data,
        dataset_config=corpus.config if corpus else None,
        dataset_split=corpus.evaluation_split if corpus else None,
        metric_type="perplexity",
        metric_name=f"Perplexity, {evaluation.windows} windows of {evaluation.seqlen} tokens",
        metric_value=round(evaluation.last.perplexity, 4),
    )
