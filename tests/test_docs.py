from __future__ import annotations

import functools
import http.server
import pkgutil
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import deadband

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git repository")]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site of this checkout, built as `make docs` does."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    made = tmp_path_factory.mktemp("site")
    for command in (
        ["codeindex", "build", str(ROOT), "-o", str(ROOT / "docs" / "code"), "--source-url", "none", "--quiet"],
        ["mkdocs", "build", "--strict", "--quiet", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(made)],
    ):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
    return made


class Page(HTMLParser):
    """The links and ids of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids.update(found[name] for name in ("id", "name") if found.get(name))
        self.links += [found[name] for name in ("href", "src") if found.get(name)]


def test_no_link_of_the_site_is_dead(site):
    pages = {file: Page(file) for file in site.rglob("*.html") if file.is_file() and file.name != "404.html"}
    assert len(pages) > 200
    wrong = []
    for file, page in pages.items():
        for link in page.links:
            path, fragment = urldefrag(link)
            if re.match(r"[a-z]+:", path):
                continue
            target = (file.parent / unquote(path)).resolve() if path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (fragment and target in pages and unquote(fragment) not in pages[target].ids):
                wrong.append((file.relative_to(site).as_posix(), link))
    assert wrong == []


def test_every_public_name_has_an_entry(site):
    ids = set().union(*(Page(file).ids for file in (site / "api").rglob("index.html")))
    shown = [pkgutil.resolve_name(each) for each in ids if re.match(r"deadband(\.\w+)+$", each)]
    assert [name for name in deadband.__all__ if not any(getattr(deadband, name) is each for each in shown)] == []


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_a_browser_shows_it_and_finds_definitions_first(browser, address, width):
    context = browser.new_context(viewport={"width": width, "height": 844})
    page = context.new_page()
    errors, elsewhere = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "request",
        lambda request: (
            elsewhere.append(request.url) if not request.url.startswith((address, "data:", "blob:")) else None
        ),
    )
    code = ("code/", "code/keywords/", "code/src/deadband/sparsify/sparsify.py/")
    for path in ("", "getting-started/", "decoding/", "figures/", "contributing/", "api/sparsify/", *code):
        page.goto(address + path, wait_until="networkidle")
        assert page.locator("h1").first.is_visible(), path
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
        assert all(page.evaluate("[...document.images].map(image => image.naturalWidth > 0)")), path
    page.goto(address, wait_until="networkidle")
    box, found = (
        page.locator("input.md-search__input"),
        page.locator("ol.md-search-result__list > li:first-child a[href*='#']").first,
    )
    for name, where in (
        ("sparsify_", "api/sparsify/#deadband.sparsify.sparsify_"),
        ("prepare_decode_", "api/decode/#deadband.decoding.prepare_decode_"),
        ("Thresholds", "api/sparsify/#deadband.allocation.Thresholds"),
        ("_check_unchanged", "code/src/deadband/sparsify/weights.py/#_check_unchanged"),
        ("deadband_attend", "code/csrc/dispatch.cpp/#deadband_attend"),
    ):
        if not box.is_visible():
            page.locator("label.md-header__button[for=__search]").click()
        box.fill("")
        box.press_sequentially(name)
        page.wait_for_function(
            "([name, where]) => { const first = document.querySelector("
            "\"ol.md-search-result__list > li:first-child a[href*='#']\");"
            " return first && first.href.replace(/\\?[^#]*/, '').endsWith(where) }", arg=[name, where], timeout=20_000,
        )  # fmt: skip
        assert found.is_visible()
    assert errors == []
    assert elsewhere == []
    context.close()
