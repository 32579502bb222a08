"""The site is made of files that are also read on a forge: the README is its first page, CONTRIBUTING.md its last, and
links between files of the repository lead to pages of the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from urllib.parse import quote, unquote

from codeindex.markdown import Pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
CODE = "code"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}  # outside of docs/
_CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()[^()\s]+(?=\))")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages whose files are not in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to their pages."""
    own = page.file.src_uri
    if own.startswith(f"{CODE}/"):
        return markdown
    source = next((source for source, page in PAGES.items() if page == own), f"docs/{own}")

    def replaced(found: re.Match[str]) -> str:
        target, _, fragment = found[0].partition("#")
        if not target or "://" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(target)))
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif (ROOT / path).is_dir():
            path = f"{CODE}/{Pages([f'{path}/file']).folder(path)}"
        else:
            path = f"{CODE}/{Pages([path]).of(path)}"
        relative = quote(posixpath.relpath(path, posixpath.dirname(own) or "."))
        return f"{relative}#{fragment}" if fragment else relative

    parts = _CODE.split(markdown)  # every other one is code
    return "".join(part if number % 2 else _LINK.sub(replaced, part) for number, part in enumerate(parts))
