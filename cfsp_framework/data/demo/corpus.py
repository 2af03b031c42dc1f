"""Read the text every CPython carries: the standard library's docstrings and pydoc's language topics.

This corpus of real prose needs no network and no file of this package. Sources are parsed with `ast`, never imported.
A hash of its name puts each module into one split, in every Python version; reading a split parses its modules alone.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

Split = Literal["train", "calibration", "test"]

HELD_FIRST: Final[tuple[Split, ...]] = ("test", "calibration", "train")
"""Order of the splits in which a text that occurs in several is kept."""

MINIMUM_CHARACTERS: Final = 80
"""Shorter texts ("Return the name.") carry no context worth predicting."""

HELD_OUT_PERCENT: Final = 8
"""Percentage of the names in each of the two held-out splits; the rest is `train`."""

SALT: Final = "cfsp-demo-596:"
"""Chosen once so that both held-out splits are large and diverse. Changing it leaks trained text into `test`."""

SKIPPED_FOLDERS: Final = frozenset({
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip",
    "turtledemo", "pydoc_data",
})  # fmt: skip

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def split_of(name: str) -> Split:
    """Return the split of a module ("json.decoder") or a topic ("topic:NUMBERS"), in every version of Python."""
    percent = int.from_bytes(hashlib.sha256((SALT + name).encode()).digest()[:8]) % 100
    if percent < HELD_OUT_PERCENT:
        return "test"
    return "calibration" if percent < 2 * HELD_OUT_PERCENT else "train"


def documents(split: Split) -> list[str]:
    """Return the documents of one split in a fixed order.

    A docstring that occurs in several splits is kept in the first of `HELD_FIRST` alone, so that no text is both trained
    and evaluated on.

    Raises:
        LookupError: this Python has neither library sources nor pydoc topics.
    """
    held: set[str] = set()
    for other in HELD_FIRST[: HELD_FIRST.index(split)]:
        held.update(_distinct(other, held))
    texts = _distinct(split, held)
    if not texts:
        raise LookupError(f"no text for the {split} split: this Python has neither library sources nor pydoc topics")
    return [f"{heading}\n\n{body}" if heading else body for body, heading in texts.items()]


def text(split: Split) -> str:
    """Return one split as a single text: its documents with a blank line between."""
    return "\n\n".join(documents(split))


def _distinct(split: Split, held: set[str]) -> dict[str, str]:
    """Return headings by body, for bodies of one split that are long enough and not held by another split."""
    texts: dict[str, str] = {}
    for heading, body in _split_texts(split):
        if len(body) >= MINIMUM_CHARACTERS and body not in held:
            texts.setdefault(body, heading)
    return texts


def _split_texts(split: Split) -> Iterator[tuple[str, str]]:
    """Yield (heading, body) of everything in one split, modules first."""
    for name, path in _modules(Path(sysconfig.get_path("stdlib"))):
        if split_of(name) == split:
            yield from _docstrings(name, path)
    for name, topic in sorted(_topics().items()):
        if split_of(f"topic:{name}") == split:
            yield "", inspect.cleandoc(topic)


def _modules(root: Path) -> list[tuple[str, Path]]:
    """Return dotted name and source of the modules below `root`, sorted by name."""
    modules: list[tuple[str, Path]] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in SKIPPED_FOLDERS]
        parents = Path(folder).relative_to(root).parts
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix == ".py" and stem.isidentifier():
                parts = parents if stem == "__init__" else (*parents, stem)
                modules.append((".".join(parts), Path(folder, file)))
    return sorted(modules)


def _topics() -> dict[str, str]:
    """Return chapters of the language reference by name, from pydoc; some distributions leave them out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return topics


def _docstrings(module: str, path: Path) -> Iterator[tuple[str, str]]:
    """Yield (heading, docstring) of a module and of every class and function in it; nothing if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources hold invalid escapes
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    if body := ast.get_docstring(tree):
        yield f"module {module}", body
    yield from _nested_docstrings(module, tree)


def _nested_docstrings(prefix: str, parent: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (heading, docstring) of the definitions inside `parent`, at any depth, in source order."""
    for node in ast.iter_child_nodes(parent):
        name = prefix
        if isinstance(node, Definition):
            name = f"{prefix}.{node.name}"
            if body := ast.get_docstring(node):
                yield _heading(name, node), body
        if not isinstance(node, ast.expr):
            yield from _nested_docstrings(name, node)


def _heading(name: str, node: Definition) -> str:
    """Return the first line pydoc would print: `class json.JSONDecoder(object)`, `heapq.nlargest(n, iterable)`."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}({ast.unparse(node.args)})"
