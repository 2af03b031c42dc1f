"""The model card: metadata the Hub reads, carried over from the base model, and text that fits the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from cfsp_framework.api.records import Evaluation, LossPoint, Perplexity, RecoveryReport, Report
from cfsp_framework.reporting.html import model_card
from cfsp_framework.reporting.model_card import BaseModel, front_matter, hub_data_sets, plain, read_base


def on(report: Report, data: str, **changes: Any) -> Report:
    """The same run evaluated on other data."""
    perplexity = Perplexity(perplexity=12.3456789, nll=2.5, bits_per_byte=1.1)
    evaluation = Evaluation(data=data, seqlen=1024, windows=7, dense=perplexity, pruned=perplexity, excess_nll=0.0)
    return report.model_copy(update={"evaluations": (evaluation,), **changes})


def trained(adapter: bool = False) -> RecoveryReport:
    return RecoveryReport(
        data="c4", sequences=8, seqlen=32, parameters=100, ranks=(), steps=3, tokens=768, adapter=adapter,
        curve=(LossPoint(step=1, loss=2.0),),
    )  # fmt: skip


def parsed(report: Report, base: BaseModel, *, code: bool = True) -> Any:
    return ModelCard(model_card(report, code=code, base=base)).data


def test_the_hub_reads_what_the_card_says(report: Report) -> None:
    base = BaseModel("Llama-3.2-1B", "meta-llama/Llama-3.2-1B", {"license": "llama3.2", "language": ["en", "de"]})
    data = parsed(on(report, "wikitext2", calibration="c4=0.7,hf:me/notes:small=0.3"), base)
    assert data.base_model == "meta-llama/Llama-3.2-1B"
    assert (data.license, data.language) == ("llama3.2", ["en", "de"])
    assert data.datasets == ["allenai/c4", "me/notes"]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"pruning", "cfsp-framework", "custom_code"} <= set(data.tags)
    [result] = data.eval_results
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == (
        "Salesforce/wikitext", "wikitext-2-raw-v1", "test",
    )  # fmt: skip
    assert (result.metric_type, result.metric_value) == ("perplexity", 12.3457)


def test_only_trained_weights_are_a_finetune(report: Report) -> None:
    base = BaseModel("m", "me/m")
    relation = [
        parsed(report.model_copy(update={"recovery": recovery}), base).to_dict().get("base_model_relation")
        for recovery in (None, trained(), trained(adapter=True))
    ]
    assert relation == [None, "finetune", None]


def test_local_data_stay_out_of_the_metadata(report: Report) -> None:
    data = parsed(report, BaseModel("m"))
    assert (data.datasets, data.eval_results, data.base_model) == (None, None, None)
    assert "calibration.txt" in model_card(report, code=True)  # but the table tells


def test_three_ways_to_load_where_code_is_needed_and_one_where_not(report: Report) -> None:
    special, plain = model_card(report, code=True), model_card(report, code=False)
    for words in ("trust_remote_code=True", "import cfsp_framework", "--format padded"):
        assert words in special
        assert words not in plain
    data: Any = ModelCard(plain).data
    assert "custom_code" not in data.tags


@pytest.mark.parametrize(
    ("link", "files", "source", "expected"),
    [
        ("LICENSE.md", ["LICENSE.md"], "me/m", "LICENSE.md"),
        ("LICENSE.md", [], "me/m", "https://huggingface.co/me/m/blob/main/LICENSE.md"),
        ("LICENSE.md", [], "./m", None),
        ("https://example.org/terms", [], "./m", "https://example.org/terms"),
    ],
)
def test_a_link_to_a_licence_points_to_one(
    link: str, files: list[str], source: str, expected: str | None, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: other\nlicense_name: fox\nlicense_link: {link}\n---\n")
    for name in files:
        (tmp_path / name).write_text("terms")
    base = read_base(source, tmp_path)
    assert base.metadata.get("license_link") == expected
    assert (base.licence, base.licence_files) == ("fox", tuple(files))


@pytest.mark.parametrize("text", [None, "", "# no metadata", "---\n: [\n---\n", "---\n- a list\n---\n", "\xff"])
def test_a_base_without_a_readable_card_says_nothing(text: str | None, tmp_path: Path, report: Report) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text, encoding="latin-1")
    base = read_base("demo", tmp_path)
    assert (base.metadata, base.hub_id) == ({}, None)
    assert "its card did not state one" in model_card(report, code=True, base=base)


@given(
    st.text(min_size=1, max_size=20),
    st.fixed_dictionaries(
        {}, optional={"license_name": st.text(min_size=1), "language": st.lists(st.text(min_size=1))}
    ),
)
def test_any_words_make_valid_metadata(name: str, metadata: dict[str, Any]) -> None:
    """With any characters of a base model's card, the written metadata can be read again and are the same."""
    from yaml import safe_load

    report = Report.model_construct(calibration=None, recovery=None, evaluations=())
    cleaned = {key: plain(value) for key, value in metadata.items()}
    assert {key: plain(value) for key, value in cleaned.items()} == cleaned
    read = safe_load(front_matter(report, BaseModel(name, None, cleaned), name, code=False))
    for key, value in cleaned.items():
        assert read.get(key, []) == value or not value


def test_metadata_keep_their_words_on_one_line() -> None:
    assert plain("Fox\x85 and\u2028hound\n\x07 licence") == "Fox and hound licence"
    assert plain(["en", "d\te"]) == ["en", "d e"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("c4", ["allenai/c4"]),
        ("instructions:hf:me/talk:train", ["me/talk"]),
        ("/some/where.txt", []),
        ("demo", []),
        ("wikitext2=0.5,notes.txt=0.5", ["Salesforce/wikitext"]),
        ("a=b", []),
    ],
)
def test_data_sets_of_the_hub_are_named(spec: str, expected: list[str]) -> None:
    assert hub_data_sets(spec) == expected
