"""The demo corpus: no document is in two splits, and each stays in its split."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from cfsp_framework.data.demo import corpus

SPLITS: tuple[corpus.Split, ...] = ("train", "calibration", "test")


def bodies(split: corpus.Split) -> set[str]:
    """Return the documents of a split without their headings, which name the module and always differ."""
    return {document.partition("\n\n")[2] or document for document in corpus.documents(split)}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("functools", "train"),
        ("json.decoder", "train"),
        ("ast", "calibration"),
        ("topic:with", "train"),
        ("doctest", "test"),
        ("topic:assignment", "test"),
    ],
)
def test_a_name_stays_in_its_split(name: str, split: corpus.Split) -> None:
    assert corpus.split_of(name) == split


def test_no_document_is_in_two_splits() -> None:
    train, calibration, test = (bodies(split) for split in SPLITS)
    assert not train & test
    assert not train & calibration
    assert not calibration & test


@pytest.mark.parametrize("split", SPLITS)
def test_documents_are_repeatable_distinct_and_dedented(split: corpus.Split) -> None:
    documents = corpus.documents(split)
    assert documents == corpus.documents(split)
    assert len(documents) == len(set(documents))
    assert all(len(document) >= corpus.MINIMUM_CHARACTERS and not document[0].isspace() for document in documents)


@pytest.mark.parametrize(("split", "kilobytes"), [("train", 1000), ("calibration", 100), ("test", 100)])
def test_there_is_enough_text(split: corpus.Split, kilobytes: int) -> None:
    assert len(corpus.text(split).encode()) > 1000 * kilobytes


def test_only_the_standard_library_is_read(tmp_path: Path) -> None:
    for name in ("kept.py", "package/__init__.py", "package/deep.py", "site-packages/torch.py", "test/case.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [name for name, _ in corpus._modules(tmp_path)] == ["kept", "package", "package.deep"]


def test_an_unreadable_module_is_skipped(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text('"""A docstring."""\ndef', encoding="utf-8")
    assert list(corpus._docstrings("broken", broken)) == []


def test_headings_name_the_documented_object(tmp_path: Path) -> None:
    source = tmp_path / "shop.py"
    source.write_text(
        '"""M."""\nclass Till(dict):\n    """C."""\n    if True:\n        async def pay(self, *, tip=0):\n            """F."""\n',
        encoding="utf-8",
    )
    expected = [("module shop", "M."), ("class shop.Till(dict)", "C."), ("shop.Till.pay(self, *, tip=0)", "F.")]
    assert list(corpus._docstrings("shop", source)) == expected


def test_a_python_without_any_text_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "absent"))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(LookupError, match="neither library sources nor pydoc topics"):
        corpus.documents("test")
