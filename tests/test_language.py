"""Hold source, templates and documents to plain technical English."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cfsp_framework", "criteria", "allocators", "plugins")
SOURCES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
TEMPLATES = sorted((ROOT / "cfsp_framework").rglob("*.j2"))
DOCUMENTS = sorted(
    [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(p for f in PACKAGES for p in (ROOT / f).glob("*.md"))]
)

WORDS = re.compile(
    r"\b(told|telling|whatever|somebody|nobody|looked after|the same of|as it is there|leave one of both out)\b"
    r"|\b(is|are) no\b(?! longer)",
    re.IGNORECASE,
)
OPENINGS = re.compile(r"(What|Of|The same|Whatever|Tells?)\b")
VAGUE_NAMES = {"one", "found", "told", "made", "there"}


def by_path(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@by_path([*SOURCES, *TEMPLATES, *DOCUMENTS])
def test_words_are_plain(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [f"{number}: {line.strip()}" for number, line in enumerate(lines, 1) if WORDS.search(line)] == []


@by_path(SOURCES)
def test_docstrings_begin_with_a_verb_or_name_a_thing(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    assert [text.partition("\n")[0] for text in docstrings if OPENINGS.match(text)] == []


@by_path(SOURCES)
def test_variables_are_called_by_what_they_hold(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert sorted({f"{line}: {name}" for line, name in bound_names(tree) if name in VAGUE_NAMES}) == []


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Return line and name of every variable and parameter."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
