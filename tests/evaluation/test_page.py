"""The page of a sweep: what it says, and that a browser draws it."""

from __future__ import annotations

import builtins
import json
import math
import random
import re
import time
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadband.evaluation import page as report
from deadband.evaluation.page import report_html, write_report

METHODS = {
    "auto": ("deadband, automatic", "this repository"),
    "teal-uniform": ("TEAL, uniform", "arXiv 2408.14690"),
    "teal-greedy": ("TEAL, greedy", "arXiv 2408.14690"),
    "wina": ("WINA", "arXiv 2505.19427"),
    "relative": ("Relative to the norm", "arXiv 2401.00000"),
    "cats": ("CATS", "arXiv 2404.08763"),
}
KINDS = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
EVIL = (
    "</script><script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\"> "
    "{{table}} & \u2028é"
)


def random_sweep(
    seed: int = 0, *, layers: int = 4, budgets: tuple[float, ...] = (0.25, 0.4, 0.5), speeds: bool = True
) -> dict[str, Any]:
    """A sweep with figures that look like real ones."""
    draw = random.Random(seed)
    names = {f"model.layers.{depth}.{kind}": (depth, kind) for depth in range(layers) for kind in KINDS}
    edges = [10 ** (-4 + 5.5 * index / 60) for index in range(61)]
    sites: dict[str, Any] = {}
    centres: dict[str, float] = {}
    for name, (depth, kind) in names.items():
        centres[name] = draw.uniform(-1.2, 0.3)
        counts = [
            math.exp(
                -0.5 * ((math.log10(edge) - centres[name]) / (0.35 if math.log10(edge) > centres[name] else 0.8)) ** 2
            )
            for edge in edges[:-1]
        ]
        sites[name] = {
            "block": f"model.layers.{depth}",
            "depth": depth,
            "kind": kind,
            "weight_bytes": draw.choice([663552, 1769472]),
            "histogram": {"edges": edges, "counts": [1e5 * count for count in counts], "zeros": 0.01 * draw.random()},
        }
    runs = []
    for index, (method, (title, paper)) in enumerate(METHODS.items()):
        for budget in budgets:
            kl = (0.6 + 0.12 * index) * budget**3 * draw.uniform(0.9, 1.1)
            sparsity = budget + draw.gauss(0, 0.005)
            own = {}
            for name, (depth, kind) in names.items():
                part = min(
                    0.97, max(0.01, budget + 0.12 * math.sin(depth / 3 + KINDS.index(kind)) + draw.gauss(0, 0.02))
                )
                own[name] = {
                    "sparsity": part,
                    "threshold": 10 ** (centres[name] - 0.9 + 1.4 * part),
                    "relative": method == "relative",
                    "harm": None if method == "cats" else kl * draw.expovariate(1) / len(names),
                }
            runs.append(
                {
                    "method": method,
                    "title": title,
                    "paper": paper,
                    "budget": budget,
                    "sparsity": sparsity,
                    "kl": kl,
                    "kl_error": 0.06 * kl,
                    "perplexity": 19.75 * math.exp(kl),
                    "perplexity_increase": math.exp(kl) - 1,
                    "perplexity_increase_error": 0.002,
                    "agreement": math.exp(-3 * kl**0.8),
                    "agreement_error": 0.004,
                    "bytes_per_token": 5.4e8 * (1 - 0.8 * sparsity),
                    "tokens_per_second": 20 / (1 - 0.75 * sparsity) * draw.uniform(0.97, 1.03) if speeds else None,
                    "seconds": draw.uniform(5, 60),
                    "picked": "greedy, as its KL on held-out windows was lowest" if method == "auto" else None,
                    "text": " to write for the reader, to be brief and to "
                    + draw.choice(["check it.", "ask a friend."]),
                    "sites": own,
                }
            )
    return {
        "version": 1,
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "protocol": "all tokens sparse",
        "calibrated_on": {"name": "pydoc", "tokens": 8192},
        "judged_on": {"name": "valid.txt", "windows": 16, "window": 512},
        "machine": {
            "processor": "Intel Xeon (family 6 model 207)",
            "cores": 2,
            "threads": 2,
            "kernels": "x86-64-v4",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "deadband": "0.1.0",
            "python": "3.11.7",
            "system": "Linux x86_64",
        },
        "dense": {
            "perplexity": 19.75,
            "perplexity_error": 0.9,
            "bytes_per_token": 5.4e8,
            "tokens_per_second": 20.1 if speeds else None,
            "text": " to write for the reader, to be brief and to revise.",
        },
        "prompt": "The three most important rules for writing clear documentation are",
        "sites": sites,
        "runs": runs,
    }


class Page(HTMLParser):
    """What a browser would see: tags, the addresses they point to, and the text by enclosing tag."""

    VOID = ("meta", "br", "img", "link", "input", "hr", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "action", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.words += data


@pytest.fixture
def without_plotly(monkeypatch):
    """Pages of a few kilobytes, for what does not need a browser."""
    monkeypatch.setattr(report, "_plotly", lambda: "")


def odd_sweep() -> dict[str, Any]:
    """Markup in every text, odd names of sites, and histograms that are empty, flat or broken."""
    sweep = random_sweep(3, layers=2)
    sites, first = sweep["sites"], sweep["sites"]["model.layers.0.self_attn.q_proj"]
    odd = [EVIL, "__proto__", "constructor", "", "a" * 300, "<b>bold</b>", "%{x} $\\frac{1}{2}$", "línea\nnueva 層"]
    for index, name in enumerate(odd):
        sites[name] = {**first, "kind": name, "block": EVIL, "depth": None if index % 2 else index}
        for run in sweep["runs"]:
            run["sites"][name] = {"sparsity": 0.3, "threshold": 0.2, "relative": False, "harm": 1.0 + index}
    sites[odd[0]]["histogram"] = {"edges": [], "counts": [], "zeros": 1.0}
    sites[odd[1]]["histogram"] = {"edges": [0.0, 1e-3, 1.0], "counts": [5.0, 0.0], "zeros": 0.0}
    sites[odd[2]]["histogram"] = {"edges": [1.0, 2.0, math.inf], "counts": [0.0, 0.0], "zeros": None}
    sites[odd[3]]["histogram"] = None
    for key in ("model", "dtype", "protocol", "prompt"):
        sweep[key] = EVIL
    sweep["machine"] = dict.fromkeys(sweep["machine"], EVIL)
    sweep["judged_on"]["name"] = sweep["calibrated_on"]["name"] = sweep["dense"]["text"] = EVIL
    for run in sweep["runs"]:
        if run["method"] != "auto":
            run["method"] += EVIL
        run["title"] += EVIL
        run["paper"] = run["picked"] = run["text"] = EVIL
    return sweep


def damaged(sweep: dict[str, Any], draw: random.Random, share: float = 0.15) -> dict[str, Any]:
    """The sweep as JSON without some of its values: removed, null, or not a number."""

    def walk(value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            kept = {
                key: walk(item, depth + 1)
                for key, item in value.items()
                if key == "version" or draw.random() > share / 2
            }
            return {key: None if key != "version" and draw.random() < share / 2 else item for key, item in kept.items()}
        if isinstance(value, list):
            return [walk(item, depth + 1) for item in value]
        if isinstance(value, float) and draw.random() < share / 10:
            return draw.choice([math.nan, math.inf, -math.inf])
        return value

    return walk(sweep, 0)


# Without a browser


def test_table_says_what_the_sweep_holds(without_plotly):
    sweep = random_sweep()
    page = Page(report_html(sweep))
    words = " ".join(page.words.split())
    for part in (
        "6 methods of activation sparsity at 3 budgets on SmolLM2-135M-Instruct in float32",
        "calibrated on 8,192 tokens of pydoc, judged on 16 windows of 512 tokens of valid.txt (all tokens sparse)",
        "Intel Xeon (family 6 model 207), 2 cores, 2 threads, kernels x86-64-v4",
        "deadband 0.1.0, torch 2.13.0, transformers 5.23.0, Python 3.11.7, Linux x86_64",
        "deadband, automatic at 25%, 40%, 50% picked: greedy",
        sweep["prompt"],
        "arXiv 2505.19427",
    ):
        assert part in words
    for run in sweep["runs"]:
        assert f"{run['kl']:.4f} ± {run['kl_error']:.4f}" in words
        assert f"{run['sparsity']:.1%} of {run['budget']:.0%}" in words
        assert f"{run['tokens_per_second']:.1f} {run['tokens_per_second'] / 20.1:.2f}×" in words
    assert json.loads(page.scripts[0]) == json.loads(json.dumps(sweep))
    assert not page.open
    assert {"html", "header", "main", "h1", "h2", "table", "label", "select", "figure", "details"} <= set(page.tags)


def test_lowest_kl_of_each_budget_is_marked(without_plotly):
    sweep = random_sweep()
    sweep["runs"] = sweep["runs"][:8]  # methods 1 and 2 at three budgets, 3 at two
    sweep["runs"][4]["kl"] = 1e-5
    text = report_html(sweep)
    rows = re.findall(r"<tr[^>]*>(?:(?!</tr>).)*best</b>.*?</tr>", text)
    assert len(rows) == 3
    assert "TEAL, uniform" in rows[1]
    assert "1.0e-05" in rows[1]
    assert "Not run, or not finished: TEAL, greedy at 50%." in text
    sweep["runs"] = sweep["runs"][:3]
    assert "best</b>" not in report_html(sweep)  # nothing to compare with


@pytest.mark.parametrize("sweep", [{}, {"version": 1, "runs": None}, {"runs": [{}]}, {"runs": [None], "dense": {}}])
def test_sweep_without_anything(without_plotly, sweep):
    page = Page(report_html(sweep))
    assert not page.open
    assert "a model" in page.words


def test_text_is_escaped(without_plotly):
    sweep = odd_sweep()
    plain, page = Page(report_html(random_sweep(3, layers=2))), Page(report_html(sweep))
    assert page.tags.count("script") == plain.tags.count("script") == 3
    assert "img" not in page.tags
    assert page.words.count(EVIL) > 30
    assert json.loads(page.scripts[0])["prompt"] == EVIL
    assert "<" not in page.scripts[0]


def test_nothing_outside_the_file_is_named():
    page = Page(report_html(random_sweep(layers=1)))
    assert not page.addresses
    assert not re.search(r"https?:", "".join(page.scripts[:1] + page.scripts[2:]) + page.words)
    assert "default-src 'none'" in report.TEMPLATE.read_text(encoding="utf-8")  # the library's own are never asked for


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.sampled_from([0.05, 0.3, 0.8]))
def test_missing_values(seed, share):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_plotly", lambda: "")
        draw = random.Random(seed)
        page = Page(report_html(damaged(random_sweep(seed, layers=1), draw, share)))
    assert not page.open
    assert not re.search(r"\b(nan|inf)\b", page.words)
    assert "None" not in page.words
    json.loads(page.scripts[0], parse_constant=pytest.fail)


def test_file_replaces_the_old_one_or_leaves_it(tmp_path, without_plotly):
    path = tmp_path / "a report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match=r"version 2.*reads version 1"):
        write_report({"version": 2}, path)
    assert path.read_text() == "old"
    sweep = random_sweep(layers=1)
    sweep["prompt"] = "half a pair: \ud800"
    write_report(sweep, path)
    assert path.read_bytes().decode("utf-8").startswith("<!doctype html>")
    assert [each.name for each in tmp_path.iterdir()] == ["a report.html"]


def test_plotly_is_missing(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("plotly"):
            raise ModuleNotFoundError("No module named 'plotly'", name="plotly")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r'needs plotly.*pip install "deadband\[report\]"'):
        report_html(random_sweep(layers=1))


# In a browser

PLOTS = ("frontier", "speed", "depth", "harm", "scores")


@pytest.fixture
def visit(browser, tmp_path):
    """A function that writes a sweep's page and opens it; errors and requests are judged at the end of the test."""
    seen: list[str] = []
    requests: list[str] = []
    contexts = []

    def open_page(sweep, *, width=1280, scheme="light"):
        path = tmp_path / f"{len(contexts)}.html"
        write_report(sweep, path)
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: seen.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: seen.append(f"error: {error}"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert seen == []
    assert requests
    assert all(request.startswith("file://") for request in requests)


def boxes(page, plot):
    """Width plus height of every drawn path of a plot's traces."""
    return page.evaluate(
        """id => [...document.querySelectorAll(`#${id} svg .trace path`)]
            .filter(path => (path.getAttribute("d") ?? "").length > 4)
            .map(path => path.getBoundingClientRect()).map(box => box.width + box.height)""",
        plot,
    )


def wait(page, condition):
    """Until an expression is true; playwright's own way of waiting is eval, which the page forbids."""
    end = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def drawn(page, plot):
    """All that a plot shows, to see whether it changed."""
    return page.evaluate("id => document.querySelector(`#${id} svg`)?.outerHTML", plot)


def middle(page, path):
    """Where to point at: plotly's own layer lies above what it draws."""
    page.locator(path).scroll_into_view_if_needed()
    box = page.locator(path).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def luminance(colour):
    numbers = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    linear = [each / 12.92 if each <= 0.03928 else ((each + 0.055) / 1.055) ** 2.4 for each in numbers]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def colours(page):
    return page.evaluate(
        """ids => Object.fromEntries([
            ["page", [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]],
            ["note", [getComputedStyle(document.body).backgroundColor,
                getComputedStyle(document.querySelector("h2 + .note")).color]],
            ["best", [getComputedStyle(document.querySelector(".best")).backgroundColor,
                getComputedStyle(document.querySelector(".best")).color]],
            ["auto", [getComputedStyle(document.querySelector("tr.auto td")).backgroundColor,
                getComputedStyle(document.querySelector("tr.auto td .muted")).color]],
            ...ids.map(id => [id, [
                getComputedStyle(document.querySelector(`#${id} svg.main-svg`)).backgroundColor,
                getComputedStyle(document.querySelector(`#${id} .xtick text`)).fill]]),
        ])""",
        list(PLOTS),
    )


def test_every_plot_is_drawn(visit):
    page = visit(random_sweep())
    for plot in PLOTS:
        sizes = boxes(page, plot)
        assert sizes, plot
        assert all(size > 3 for size in sizes), plot
    assert page.locator("#frontier .scatterlayer .trace").count() == len(METHODS)
    assert page.locator("#frontier .errorbar").count() == 3 * len(METHODS)
    assert page.locator("#depth .scatterlayer .trace").count() == len(KINDS) + 1  # and the ring
    assert page.locator("#harm .barlayer .point").count() == 15
    assert page.locator("#scores .scatterlayer .trace").count() == 2  # skipped and kept
    assert page.locator("#scores .shapelayer path").count() == 1
    assert page.locator("#speed .shapelayer path").count() == 1
    widths = page.evaluate(
        "[...document.querySelectorAll('#frontier .js-line')].map(line => parseFloat(line.style.strokeWidth))"
    )
    assert sorted(widths)[-1] > 2 * sorted(widths)[-2]  # "auto" stands out
    assert page.locator("#run option:checked").inner_text() == "deadband, automatic, 40%"


def test_choices_change_the_plots(visit):
    sweep = random_sweep()
    for run in sweep["runs"]:
        if run["method"] == "wina":
            run["criterion"] = "weighted_magnitude"  # other scores than those of the histogram
    page = visit(sweep)
    before = {plot: drawn(page, plot) for plot in PLOTS}
    page.get_by_label("Run", exact=True).select_option(label="WINA, 50%")
    after = {plot: drawn(page, plot) for plot in PLOTS}
    assert [plot for plot in PLOTS if before[plot] != after[plot]] == ["depth", "harm", "scores"]
    assert "other scores (weighted_magnitude)" in page.locator("#scores-note").inner_text()
    assert page.locator("#scores .shapelayer path").count() == 0
    page.get_by_label("Site", exact=True).select_option("model.layers.3.mlp.up_proj")
    assert drawn(page, "scores") != after["scores"]
    assert drawn(page, "harm") == after["harm"]
    assert drawn(page, "depth") != after["depth"]  # the ring moves

    page.get_by_label("Run", exact=True).select_option(label="Relative to the norm, 40%")
    assert "divided by the norm" in page.locator("#scores-note").inner_text()
    assert page.locator("#scores .shapelayer path").count() == 0  # no line that would be wrong
    assert boxes(page, "scores")
    page.get_by_label("Run", exact=True).select_option(label="CATS, 25%")
    assert page.locator("#harm").is_hidden()
    assert "not estimated" in page.locator("#harm-note").inner_text()
    page.get_by_label("Run", exact=True).select_option(label="TEAL, uniform, 25%")
    assert page.locator("#harm").is_visible()
    assert boxes(page, "harm")

    page.mouse.click(*middle(page, "#harm .barlayer .point path >> nth=4"))
    assert page.locator("#site").input_value() != "model.layers.3.mlp.up_proj"


def test_keyboard(visit):
    page = visit(random_sweep())
    traces = page.locator("#frontier .scatterlayer .trace .js-line")
    assert traces.count() == len(METHODS)
    key = page.get_by_role("button", name="TEAL, greedy")
    key.focus()
    page.keyboard.press("Space")
    assert key.get_attribute("aria-pressed") == "false"
    assert traces.count() == len(METHODS) - 1
    assert page.locator("#speed .scatterlayer .trace .js-line").count() == len(METHODS) - 1
    page.keyboard.press("Enter")
    assert traces.count() == len(METHODS)
    page.locator("#run").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("#run option:checked").inner_text() == "deadband, automatic, 50%"
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, select, summary, [tabindex]")]
            .filter(each => !(each.labels?.length || each.textContent.trim() || each.ariaLabel)).length"""
    )
    assert nameless == 0


@pytest.mark.parametrize("width", [320, 390, 768])
@pytest.mark.parametrize("make", [random_sweep, odd_sweep])
def test_narrow_screens(visit, width, make):
    page = visit(make(), width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    scrolls = page.evaluate("(box => box.scrollWidth > box.clientWidth)(document.querySelector('.scroll'))")
    assert scrolls or width > 390
    for plot in PLOTS:
        box = page.locator(f"#{plot} svg.main-svg").first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    page.set_viewport_size({"width": 700, "height": 900})
    wait(page, "document.querySelector('#depth svg').getBoundingClientRect().width > 600")
    page.set_viewport_size({"width": 390, "height": 900})
    wait(page, "document.querySelector('#depth svg').getBoundingClientRect().width < 390")
    wait(page, "document.documentElement.scrollWidth <= 390")


def test_light_and_dark(visit):
    page = visit(random_sweep())
    light = colours(page)
    page.emulate_media(color_scheme="dark")  # live, without loading again
    wait(
        page,
        "getComputedStyle(document.querySelector('#scores svg.main-svg')).backgroundColor !== 'rgb(255, 255, 255)'",
    )
    dark = colours(page)
    assert dark == colours(visit(random_sweep(), scheme="dark"))
    for part in light:
        assert light[part][0] != dark[part][0]
        assert light[part][1] != dark[part][1]
        assert luminance(light[part][0]) > 0.5 > 0.1 > luminance(dark[part][0])
        assert contrast(*light[part]) >= 4.5, part
        assert contrast(*dark[part]) >= 4.5, part


def test_odd_names_in_a_browser(visit):
    page = visit(odd_sweep())
    assert page.title() != "broken"
    assert page.locator("img").count() == 0
    for plot in PLOTS[:4]:
        assert boxes(page, plot), plot
    names = page.evaluate("[...document.querySelectorAll('#site option')].map(option => option.value)")
    assert len(names) == 2 * len(KINDS) + 8
    notes = {}
    for index, name in enumerate(names):
        page.locator("#site").select_option(index=index)
        notes[name] = page.locator("#scores-note").inner_text()
        assert page.locator("#scores").is_hidden() == ("No histogram" in notes[name])
    assert [name for name in names if "No histogram" in notes[name]] == [EVIL, "__proto__", "constructor", ""]
    labels = page.locator("#harm .ytick text").all_text_contents()
    assert any("<b>bold</b>" in label for label in labels)
    assert any("$\\frac{1}" in label for label in labels)
    page.mouse.move(*middle(page, "#harm .barlayer .point path >> nth=2"))
    wait(page, "document.querySelector('#harm .hoverlayer').textContent.includes('<b>bold</b>')")


def test_no_speeds_and_no_runs(visit):
    page = visit(random_sweep(speeds=False))
    assert page.locator("#speed").is_hidden()
    assert page.locator("#speed-note").inner_text() == "No speeds were measured in this sweep."
    assert boxes(page, "frontier")
    sweep = random_sweep()
    sweep["runs"] = []
    page = visit(sweep)
    for plot in ("frontier", "speed", "depth", "harm"):
        assert page.locator(f"#{plot}").is_hidden()
        assert page.locator(f"#{plot}-note").inner_text()
    assert "No run has finished yet." in page.locator("#run-note").inner_text()
    assert boxes(page, "scores")  # the calibration is there already


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.15, 0.4])
def test_missing_values_in_a_browser(visit, share):
    for seed in range(2):
        sweep = damaged(random_sweep(seed, layers=1), random.Random(seed), share)
        page = visit(sweep, width=390)
        for index in range(page.locator("#run option").count()):
            page.locator("#run").select_option(index=index)
        for index in range(page.locator("#site option").count()):
            page.locator("#site").select_option(index=index)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        words = page.locator("main").inner_text()
        assert "NaN" not in words
        assert "undefined" not in words
        assert "null" not in words
