"""Which files are pages of the site: those of docs/, those that the navigation names, and whatever they link to.

A hook of mkdocs. Every page keeps its path in the repository, so a relative link means the same here as in a checkout.
A linked file that is no Markdown (a module, a test, a script) becomes a page with its text, which ends in `.md`.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"^(`{3,}).*?^\1|(`+)[^`]+?\2", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Served as they are; any other text becomes a page.
SERVED = (".md", ".png", ".svg", ".json")
LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of docs/ under their paths in the repository, and the pages that lie elsewhere."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
            if not file.src_uri.endswith((".py", ".pyc")):
                files.append(_served(f"docs/{file.src_uri}", config, InclusionLevel.UNDEFINED))
    waiting = [*_named(config.nav), *(file.src_uri for file in files.documentation_pages())]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not (ROOT / path).is_file():  # mkdocs itself reports what is not there
            continue
        seen.add(path)
        if path.endswith(".md"):
            waiting += [posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in _links(path)]
        if not path.endswith(SERVED):
            files.append(_with_text(path, config))
        elif files.get_file_from_path(path) is None:
            files.append(_served(path, config, InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to modules lead to the pages with their text."""
    folder = posixpath.dirname(page.file.src_uri)

    def leading(match: re.Match[str]) -> str:
        place, mark, anchor = match[1].partition("#")
        path = posixpath.normpath(posixpath.join(folder, place))
        return match[0] if files.get_file_from_path(f"{path}.md") is None else f"]({place}.md{mark}{anchor})"

    return LINK.sub(leading, markdown)


def _named(nav: Any) -> Iterator[str]:
    """The paths in a navigation, however deep."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _named(part)


def _links(path: str) -> Iterator[str]:
    """Targets of the relative links of a page, without their anchors."""
    for target in LINK.findall(CODE.sub("", (ROOT / path).read_text("utf-8"))):
        place = target.partition("#")[0]
        if place and "://" not in place:
            yield place


def _served(path: str, config: MkDocsConfig, inclusion: InclusionLevel) -> File:
    return File(path, str(ROOT), config.site_dir, config.use_directory_urls, inclusion=inclusion)


def _with_text(path: str, config: MkDocsConfig) -> File:
    text, language = (ROOT / path).read_text("utf-8"), LANGUAGES.get(posixpath.splitext(path)[1], "text")
    fence = "`" * 6
    content = f"# {path}\n\n{fence}{language}\n{text}{fence}\n"
    return File.generated(config, f"{path}.md", content=content, inclusion=InclusionLevel.NOT_IN_NAV)
