"""A sweep (methods by budgets on one model) as one HTML page that needs no server and no network."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from deadband.files import finite, replacing

VERSION = 1  # of the sweeps read here
TEMPLATE = Path(__file__).with_name("page.html")
DASH = '<span class="muted" title="not measured">–<span class="aside"> not measured</span></span>'


def write_report(sweep: dict[str, Any], path: str | os.PathLike) -> None:
    """Write the page of a sweep to `path`, all or nothing. It opens from a folder and asks for no other file.

    Args:
        sweep: the JSON object of a sweep, finished or not; what it lacks is said on the page or left out.
        path: the HTML file; one that is there is replaced.

    Raises:
        ValueError: plotly is not installed, or the sweep has another version.
        OSError: the folder of `path` does not exist or cannot be written.
    """
    page = report_html(sweep)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")  # a lone surrogate has no UTF-8


def report_html(sweep: dict[str, Any]) -> str:
    """The page of a sweep as text. About 5 MB, nearly all of it plotly.js.

    Raises:
        ValueError: plotly is not installed, or the sweep has another version.
    """
    version = sweep.get("version")
    if version not in (None, VERSION):
        raise ValueError(f"the sweep has version {version!r}; this deadband reads version {VERSION}: make it again")
    library = _plotly()
    sweep = _complete(sweep)
    parts = {
        "title": escape(f"{sweep['model']}: methods of activation sparsity"),
        "model": escape(sweep["model"]),
        "summary": _summary(sweep),
        "versions": _versions(sweep["machine"]),
        "best": _best_tiles(sweep["runs"]),
        "table": _table(sweep),
        "remarks": _remarks(sweep["runs"], sweep.get("unreachable") or [], sweep.get("failed") or []),
        "texts": _texts(sweep),
        "methods": _methods(sweep["runs"]),
        "plotly": library,
        "data": _json(sweep),
    }
    # One pass, so that braces in a text are never taken for a place in the template.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError('a report needs plotly; install it with: pip install "deadband[report]"') from error
    return re.sub(r"</(?=script)", r"<\\/", get_plotlyjs(), flags=re.IGNORECASE)


def _json(value: Any) -> str:
    """JSON that no HTML parser takes for markup: `<` cannot appear."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _complete(sweep: dict[str, Any]) -> dict[str, Any]:
    """The sweep with every object and list that the page reads present, and null where a number is none."""
    whole = finite(sweep)
    for key in ("calibrated_on", "judged_on", "machine", "dense", "sites"):
        whole[key] = whole.get(key) or {}
    whole["model"] = str(whole.get("model") or "a model")
    whole["sites"] = {name: site or {} for name, site in whole["sites"].items()}
    whole["runs"] = [dict(run) for run in whole.get("runs") or [] if run]
    for run in whole["runs"]:
        run.setdefault("budget", None)
        run["method"] = str(run.get("method") or run.get("title") or "unnamed")
        run["title"] = str(run.get("title") or run["method"])
        run["sites"] = {name: site or {} for name, site in (run.get("sites") or {}).items()}
    return whole


# Sentences


def _summary(sweep: dict[str, Any]) -> str:
    runs, calibrated, judged, machine = (sweep[key] for key in ("runs", "calibrated_on", "judged_on", "machine"))
    methods, budgets = _unique(run["method"] for run in runs), _budgets(runs)
    head = f"{_count(len(methods), 'method')} of activation sparsity at {_count(len(budgets), 'budget')} on "
    head += sweep["model"] + (f" in {sweep['dtype']}" if sweep.get("dtype") else "")
    data = []
    if calibrated:
        tokens = f"{_thousands(calibrated['tokens'])} tokens" if calibrated.get("tokens") else "text"
        data.append(f"calibrated on {tokens} of {calibrated.get('name') or 'an unnamed text'}")
    if judged:
        windows = "windows"
        if judged.get("windows"):
            windows = _count(judged["windows"], "window")
        if judged.get("window"):
            windows += f" of {_thousands(judged['window'])} tokens"
        data.append(f"judged on {windows} of {judged.get('name') or 'an unnamed text'}")
    sentence = head + (", " + ", ".join(data) if data else "")
    sentence += f" ({sweep['protocol']})" if sweep.get("protocol") else ""
    facts = [_count(machine["cores"], "core") if machine.get("cores") else ""]
    facts += [_count(machine["threads"], "thread") if machine.get("threads") else ""]
    facts += [f"kernels {machine['kernels']}" if machine.get("kernels") else ""]
    where = ", ".join(filter(None, [str(machine.get("processor") or ""), *facts]))
    return escape(sentence + (f"; measured on {where}" if where else "") + ".")


def _versions(machine: dict[str, Any]) -> str:
    names = {"deadband": "deadband", "torch": "torch", "transformers": "transformers", "python": "Python"}
    known = [f"{name} {machine[key]}" for key, name in names.items() if machine.get(key)]
    return escape(", ".join([*known, str(machine["system"])] if machine.get("system") else known))


def _remarks(runs: list[dict[str, Any]], unreachable: list[Any], failed: list[Any]) -> str:
    """What a reader of the table has to know: results that are missing, and choices that a method made."""
    remarks = []
    done = {(run["method"], run["budget"]) for run in runs}
    titles = _titles(runs)
    done |= {(method, budget) for method, budget in unreachable}
    remarks += [f"{titles.get(method, method)} cannot reach {_short(budget)}." for method, budget in unreachable]
    remarks += [f"{titles.get(one['method'], one['method'])} failed: {one['error']}" for one in failed]
    missing = [
        f"{title} at {_short(budget)}"
        for budget in _budgets(runs)
        for method, title in titles.items()
        if budget is not None and (method, budget) not in done
    ]
    if missing:
        remarks.append(f"Not run, or not finished: {', '.join(missing)}.")
    flat = [run for run in runs if (run.get("kl") is not None and run["kl"] <= 0)]
    if flat:
        names = ", ".join(f"{run['title']} at {_short(run['budget'])}" for run in flat)
        remarks.append(f"A logarithmic axis has no place for a KL of zero; not in the plots: {names}.")
    picked: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        if run.get("picked"):
            picked.setdefault((run["title"], str(run["picked"])), []).append(_short(run["budget"]))
    remarks += [f"{title} at {', '.join(budgets)} picked: {why}" for (title, why), budgets in picked.items()]
    if not remarks:
        return ""
    return "<ul>" + "".join(f"<li>{escape(str(remark))}</li>" for remark in remarks) + "</ul>"


# Tables and lists


def _best_tiles(runs: list[dict[str, Any]]) -> str:
    tiles = []
    for budget in _budgets(runs):
        run = _best(runs, budget)
        if run is None:
            continue
        speed = f", {run['tokens_per_second']:.1f} tokens/s" if run.get("tokens_per_second") is not None else ""
        tiles.append(
            f'<li{_auto(run)}><span class="muted">lowest KL at {_short(budget)}</span>'
            f"<strong>{escape(run['title'])}</strong><span>{_kl(run['kl'])} nats{speed}</span></li>"
        )
    return f'<ul class="tiles">{"".join(tiles)}</ul>' if tiles else ""


def _table(sweep: dict[str, Any]) -> str:
    runs, dense = sweep["runs"], sweep["dense"]
    titles = list(_titles(runs))
    groups = []
    if dense:
        perplexity = _number(dense.get("perplexity"), ".2f") + _error(dense.get("perplexity_error"), ".2f")
        cells = ["0.0%", "0", perplexity, "100.0%", _megabytes(dense), _number(dense.get("tokens_per_second"), ".1f")]
        groups.append('<tbody><tr><th scope="row">Dense</th>' + "".join(f"<td>{cell}</td>" for cell in cells))
        groups.append("</tr></tbody>")
    for budget in _budgets(runs):
        rows = sorted((run for run in runs if run["budget"] == budget), key=lambda run: titles.index(run["method"]))
        best, most = _best(runs, budget), max((run["kl"] for run in rows if run.get("kl") is not None), default=0)
        group = f'<tbody><tr class="budget"><th scope="rowgroup" colspan="7">{_short(budget)} asked</th></tr>'
        groups.append(group + "".join(_row(run, dense, run is best, most) for run in rows) + "</tbody>")
    return "".join(groups) or '<tbody><tr><td colspan="7">No run has finished yet.</td></tr></tbody>'


def _row(run: dict[str, Any], dense: dict[str, Any], best: bool, most: float) -> str:
    kl, speed, plain = run.get("kl"), run.get("tokens_per_second"), dense.get("tokens_per_second")
    width = f"{max(kl, 0) / most:.1%}" if kl is not None and most > 0 else "0"
    mark = '<b class="best">best</b> ' if best else ""
    ratio = _aside(f"{speed / plain:.2f}×") if speed and plain else ""
    perplexity = _number(run.get("perplexity_increase"), "+.1%") + _error(run.get("perplexity_increase_error"), ".1%")
    agreement = _number(run.get("agreement"), ".1%") + _error(run.get("agreement_error"), ".1%")
    asked = _aside(f"of {_short(run['budget'])}") if run["budget"] is not None else ""
    return (
        f'<tr{_auto(run)}><th scope="row">{escape(run["title"])}</th>'
        f"<td>{_number(run.get('sparsity'), '.1%')}{asked}</td>"
        f'<td class="kl" style="--share:{width}">{mark}{_kl(kl)}{_error(run.get("kl_error"), ".4f")}</td>'
        f"<td>{perplexity}</td><td>{agreement}</td><td>{_megabytes(run)}</td>"
        f"<td>{_number(speed, '.1f')}{ratio}</td></tr>"
    )


def _texts(sweep: dict[str, Any]) -> str:
    plain = sweep["dense"].get("text")
    runs = [run for run in sweep["runs"] if run.get("text") is not None]
    if not runs and plain is None:
        return "<p>No text was continued in this sweep.</p>"
    prompt = sweep.get("prompt")
    parts = [f"<blockquote>{escape(str(prompt))}</blockquote>" if prompt else "<p>The prompt was not kept.</p>"]
    parts.append('<div class="samples">')
    if plain is not None:
        parts.append(_sample("Dense", "", str(plain), "", ' class="dense"'))
    for run in runs:
        parts.append(_sample(run["title"], _short(run["budget"]), str(run["text"]), str(plain or ""), _auto(run)))
    return "".join([*parts, "</div>"])


def _sample(title: str, budget: str, text: str, plain: str, attribute: str = "") -> str:
    """One continuation, folded; the part that it shares with the dense model's is set back."""
    text, plain = text.lstrip(" "), plain.lstrip(" ")  # it goes on where the prompt ends, mostly with a space
    pairs = zip(text, plain, strict=False)
    same = next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(text), len(plain)))
    if same < len(text):
        same = len(re.sub(r"\S+\Z", "", text[:same]))  # back to the start of the word that differs
    note = ""
    if plain:
        note = "as dense" if text == plain else f"as dense for {_count(len(text[:same].split()), 'word')}"
    head = f"{escape(title)}{', ' + budget if budget else ''}"
    shared = f'<span class="muted">{escape(text[:same])}</span>' if same else ""
    return (
        f"<details{attribute}{'' if plain else ' open'}><summary>{head}{_aside(note) if note else ''}</summary>"
        f'<p class="text">{shared}{escape(text[same:])}</p></details>'
    )


def _methods(runs: list[dict[str, Any]]) -> str:
    papers: dict[str, str] = {}
    for run in runs:
        papers[run["method"]] = papers.get(run["method"]) or str(run.get("paper") or "")
    items = [
        f"<div><dt>{escape(title)}</dt><dd><code>{escape(method)}</code>"
        f"{', ' + escape(papers[method]) if papers[method] else ''}</dd></div>"
        for method, title in _titles(runs).items()
    ]
    return f"<dl>{''.join(items)}</dl>" if items else "<p>No run has finished yet.</p>"


# Small pieces


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _titles(runs: list[dict[str, Any]]) -> dict[str, str]:
    """Titles by method, in the order of the runs."""
    titles: dict[str, str] = {}
    for run in runs:
        titles.setdefault(run["method"], run["title"])
    return titles


def _budgets(runs: list[dict[str, Any]]) -> list[Any]:
    """Every budget asked for, the smallest first; None, a budget nobody noted, comes last."""
    return sorted(_unique(run["budget"] for run in runs), key=lambda budget: (budget is None, budget or 0))


def _best(runs: list[dict[str, Any]], budget: Any) -> dict[str, Any] | None:
    """The run with the lowest KL at a budget; None where nothing can be compared."""
    rivals = [run for run in runs if run["budget"] == budget and run.get("kl") is not None]
    return min(rivals, key=lambda run: run["kl"]) if budget is not None and len(rivals) > 1 else None


def _auto(run: dict[str, Any]) -> str:
    return ' class="auto"' if run["method"] == "auto" else ""


def _count(number: Any, thing: str) -> str:
    return f"{_thousands(number)} {thing}{'' if number == 1 else 's'}"


def _thousands(number: Any) -> str:
    return f"{number:,}" if isinstance(number, (int, float)) else str(number)


def _short(budget: Any) -> str:
    return "an unknown budget" if budget is None else f"{round(100 * budget, 1):g}%"


def _number(value: Any, form: str) -> str:
    return DASH if value is None else format(value, form)


def _kl(value: Any) -> str:
    small = value is not None and 0 < abs(value) < 0.00095
    return _number(value, ".1e" if small else ".4f")


def _error(value: Any, form: str) -> str:
    return "" if value is None else _aside(f"± {format(value, form)}")


def _aside(text: str) -> str:
    return f' <small class="muted">{escape(text)}</small>'


def _megabytes(figures: dict[str, Any]) -> str:
    size = figures.get("bytes_per_token")
    return DASH if size is None else f"{size / 1e6:,.1f}"
