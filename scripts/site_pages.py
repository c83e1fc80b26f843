"""What mkdocs.yml's site has beside the pages of docs/: the repository's own pages, and Python's reference.

mkdocs calls `on_files` and `on_page_markdown` (https://www.mkdocs.org/dev-guide/plugins/#events).
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# Pages of the repository, and what they are called in the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "examples/README.md": "examples.md",
    "recipes/models/stories/README.md": "stories.md",
}
PYTHON = """# Python

What `mlcbuild.runtime` has is for programs of yours: it changes as [the changelog](CHANGELOG.md) says, and stays within
a minor version. Everything else of the package may change at any time.

::: mlcbuild.runtime.load

::: mlcbuild.runtime.Model

::: mlcbuild.runtime.Session
"""
_LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^```(\w+) (\S+)( wrong)?$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    pages = {name: (ROOT / page).read_text("utf-8") for page, name in PAGES.items()}
    for name, text in {**pages, "python.md": PYTHON}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they are in the site, and the names of files over their text."""
    source = next((path for path, name in PAGES.items() if name == page.file.src_uri), f"docs/{page.file.src_uri}")
    text = _LINK.sub(lambda found: _link(found[1], found[2], posixpath.dirname(source)), markdown)
    return _FENCE.sub(lambda found: f'```{found[1]} title="{found[2]}{" (wrong)" if found[3] else ""}"', text)


def _link(text: str, target: str, folder: str) -> str:
    """A link to a file of the repository that is no page of the site is its text."""
    if re.match(r"[a-z]+:|#", target):
        return f"[{text}]({target})"
    path, hash_, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(folder, path))
    if path.startswith("docs/"):
        return f"[{text}]({path.removeprefix('docs/')}{hash_}{anchor})"
    return f"[{text}]({PAGES[path]}{hash_}{anchor})" if path in PAGES else text
