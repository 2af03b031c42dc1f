"""Add the README and the shelves' documents to the site as pages, and rewrite links for the site.

In the repository, links are relative to the file that contains them, so that they work in a code browser. On the site,
documents of other folders are pages with other names, and a link to a file that is not a page becomes its path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ADDED = {
    "README.md": "overview.md",
    "criteria/README.md": "criteria.md",
    "allocators/README.md": "allocators.md",
    "plugins/README.md": "plugins.md",
}
"""Documents outside ``docs``, and the pages they become."""
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", flags=re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents outside ``docs``."""
    for source, page in ADDED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page outside code; inside code, remove the backslash that tables need before ``|``."""
    pages = {page: source for source, page in ADDED.items()}
    source = pages.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(link: re.Match[str]) -> str:
        text, target = link.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return link[0]
        path, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        target_page = ADDED.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target_page is None or files.get_file_from_path(target_page) is None:
            return f"{text} (`{path}`)"
        return f"[{text}]({target_page}{mark}{anchor})"

    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(rewrite, part) for part in parts[::2]]
    parts[1::2] = [part if part.startswith("```") else part.replace(r"\|", "|") for part in parts[1::2]]
    return "".join(parts)
