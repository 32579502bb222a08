"""A plugin for MkDocs: in the site's search box, a name finds its definition first."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mkdocs.config import config_options
from mkdocs.config.base import Config
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import BasePlugin, event_priority
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from codeindex.names import simple_name
from codeindex.store import MARK

_KEYWORD = re.compile(r'^\* <a id="([^"]+)"></a>(`+) ?(.+?) ?\2 ([a-z ]+), \[?(\d+)', re.MULTILINE)
_NOT_SEARCHED = ("heading", "key")


class Settings(Config):
    """Options in mkdocs.yml."""

    folder = config_options.Type(str, default="code")


class CodeIndexPlugin(BasePlugin[Settings]):
    """Replaces what search knows of an index's pages: each file by its path, each definition by its name.

    Example, in mkdocs.yml, with an index built to docs/code:
        plugins:
          - search
          - codeindex:
              folder: code
    """

    def on_pre_build(self, *, config: MkDocsConfig) -> None:
        """Forget the last build, when serving."""
        self._files: set[str] = set()
        self._entries: list[dict[str, Any]] = []

    def on_page_markdown(self, markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> None:
        """Take a page's definitions down."""
        if not page.file.src_uri.startswith(f"{self.config.folder}/") or f"{MARK} blob" not in markdown:
            return
        self._files.add(page.url)
        path = markdown.split("\n", 1)[0].strip("# `")
        for anchor, _, name, kind, line in _KEYWORD.findall(markdown):
            if kind not in _NOT_SEARCHED:
                about = f"{kind} {name}, {path}:{line}"  # no range: thousands of those break lunr 2.3.9's search
                location = f"{page.url}#{quote(anchor, safe=':~')}"
                self._entries.append({"location": location, "title": simple_name(name), "text": html.escape(about)})

    @event_priority(-100)  # after search has written its index
    def on_post_build(self, *, config: MkDocsConfig) -> None:
        """Put the definitions into the site's search index."""
        file = Path(config.site_dir, "search", "search_index.json")
        try:
            index = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            raise PluginError("codeindex needs the plugin search; put it before codeindex in mkdocs.yml") from None
        others = [entry for entry in index["docs"] if not entry["location"].startswith(f"{self.config.folder}/")]
        files = [{**entry, "boost": 0.1} for entry in index["docs"] if entry["location"] in self._files]
        index["docs"] = [*others, *files, *self._entries]
        file.write_text(json.dumps(index, separators=(",", ":"), ensure_ascii=False), "utf-8")
