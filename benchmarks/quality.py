"""KL to the dense model of every method at 25, 40 and 50 %, on small real models, every token sparse.

Calibrated on Python's documentation; judged on the text given by --data (wikitext-2's validation part for the published
figures) or else on the other half of the documentation. In float32: the figures show the methods and no rounding. Each
model's sweep and its page are kept in build/benchmarks, and it goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import KEPT, between, parser, save

from deadband.app.models import GEMMA3, SMOLLM2, gemma3, load_model, load_tokenizer, smollm2
from deadband.evaluation.page import write_report
from deadband.evaluation.sweep import sweep, table
from deadband.running.divergence import mean_and_error
from deadband.running.text import python_documentation, read_text, token_windows

BUDGETS = (0.25, 0.4, 0.5)
BASELINE = "teal-uniform"
BASELINE_BUDGETS = (0.25, 0.4, 0.5)  # between which its KL is read off
METHODS = ("auto", "sensitivity", "wina", "top-k", "cats", "teal-greedy")
MODELS = {"smollm2": (SMOLLM2, smollm2), "gemma3": (GEMMA3, gemma3)}
KEYS = ("method", "title", "picked", "budget", "sparsity", "kl", "kl_error", "perplexity_increase",
        "perplexity_increase_error", "agreement", "agreement_error", "seconds")  # fmt: skip


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="a UTF-8 text file to judge on")
    made.add_argument("--windows", type=int, default=16, help="windows of 512 tokens to judge on")
    made.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2"])
    made.add_argument("--methods", nargs="+", default=METHODS)
    made.add_argument(
        "--without-bos", action="store_true", help="windows of text alone, also where a model expects <bos>"
    )
    made.add_argument("--speed", action="store_true", help="also time decoding, in bfloat16 and with its rounding")
    options = made.parse_args()
    halves = python_documentation()
    text = read_text(options.data) if options.data else halves[1]
    judged_on = "/".join(options.data.parts[-2:]) if options.data else "pydoc"
    KEPT.mkdir(parents=True, exist_ok=True)
    rows, ahead = [], []
    for key in options.models:
        name, folder = MODELS[key]
        model = load_model(folder(), dtype="bfloat16" if options.speed else "float32")
        tokenizer = load_tokenizer(folder())
        if options.without_bos:
            tokenizer.bos_token = None
        label = key + ("-without-bos" if options.without_bos else "") + ("-speed" if options.speed else "")
        settings: dict[str, Any] = {
            "calibration_windows": token_windows(tokenizer, halves[0], tokens=8192, window=512),
            "windows": token_windows(tokenizer, text, tokens=512 * options.windows, window=512),
            "output": KEPT / f"quality-{label}.json",
            "name": name,
            "calibrated_on": "pydoc",
            "judged_on": judged_on,
            "speed": options.speed,
            "say": print,
        }
        sweep(model, tokenizer, methods=[BASELINE], budgets=BASELINE_BUDGETS, **settings)
        figures = sweep(model, tokenizer, methods=list(options.methods), budgets=BUDGETS, **settings)
        write_report(figures, KEPT / f"quality-{label}.html")
        print(f"\n{label}, calibrated on pydoc, judged on {judged_on}, {options.windows} windows of 512 tokens")
        print(table(figures))
        found, paired = removed(figures), against_published(figures, label)
        about = {
            "dtype": figures["dtype"],
            "judged_on": f"{options.windows} windows of 512 tokens of {judged_on}",
            "dense_perplexity": figures["dense"]["perplexity"],
            "without": "<bos>" if options.without_bos else None,
        }
        save(f"quality-{label}", found, settings=about, against_published=paired)
        rows += found
        ahead += paired
        del model, settings
    show(rows, ahead)


def show(rows: list[dict[str, Any]], ahead: list[dict[str, Any]]) -> None:
    """Print the parts of TEAL's KL that are removed, and what `auto` is ahead of the best published method."""
    print(
        f"\n{'model':24}{'method':18}{'asked':>7}{'achieved':>10}{'KL':>9}{'uniform':>9}{'removed':>9}{'perplexity':>12}"
    )
    for row in rows:
        print(
            f"{row['model']:24}{row['method']:18}{row['budget']:7.0%}{row['sparsity']:10.1%}{row['kl']:9.4f}"
            f"{row['uniform_kl']:9.4f}{row['removed'] or 0.0:9.1%}{row['perplexity_increase']:+12.2%}"
        )
    for row in ahead:
        print(
            f"{row['model']} at {row['budget']:.0%}: KL of auto less that of {row['method']}, the best published "
            f"method: {row['difference']:+.4f} ± {row['error']:.4f} (paired over windows)"
        )


def removed(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each run, the part of uniform's KL at the same achieved sparsity that it removes; None of uniform's own."""
    uniform = sorted((run["sparsity"], run["kl"]) for run in figures["runs"] if run["method"] == BASELINE)
    rows = []
    for run in figures["runs"]:
        if run["budget"] not in BUDGETS:
            continue
        there = between(uniform, run["sparsity"])
        kept = {key: run[key] for key in KEYS}
        less = 1 - run["kl"] / there if run["method"] != BASELINE else None
        rows.append({"model": figures["model"], **kept, "uniform_kl": there, "removed": less})
    return rows


def against_published(figures: Mapping[str, Any], label: str) -> list[dict[str, Any]]:
    """At each budget, how much less KL `auto` has than the best of the others, with a paired standard error."""
    rows = []
    for budget in BUDGETS:
        runs = [run for run in figures["runs"] if run["budget"] == budget and run["kl"] is not None]
        ours = next((run for run in runs if run["method"] == "auto"), None)
        others = [run for run in runs if run["method"] not in ("auto", "sensitivity")]
        if ours is None or not others:
            continue
        best = min(others, key=lambda run: run["kl"])
        pairs = zip(ours["per_window"], best["per_window"], strict=True)
        difference, error = mean_and_error([mine["kl"] - theirs["kl"] for mine, theirs in pairs])
        rows.append(
            {"model": label, "budget": budget, "method": best["method"], "difference": difference, "error": error}
        )
    return rows


if __name__ == "__main__":
    main()
