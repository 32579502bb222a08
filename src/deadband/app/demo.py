"""The whole flow on a small real model, with every figure on one page: `deadband demo`."""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from deadband.allocation.budget import allocate_budgets
from deadband.allocation.thresholds import Thresholds
from deadband.app.models import SMOLLM2, load_model, load_tokenizer, save_model, smollm2
from deadband.calibration.calibration import calibrate
from deadband.decoding.decoder import prepare_decode_
from deadband.evaluation.quality import dense_logits, evaluate
from deadband.evaluation.speed import decode_seconds, decoding_figures
from deadband.evaluation.sweep import PROMPT
from deadband.files import replacing, write_json
from deadband.ops import kernels
from deadband.running.text import python_documentation, token_windows
from deadband.running.timing import machine
from deadband.sparsify.report import sparsity
from deadband.sparsify.sparsify import sparsify_

SPARSITIES = (0.25, 0.4, 0.5)
SAVED = 0.4  # the budget whose model is kept and continues the prompt
WINDOW = 512
CALIBRATION_TOKENS, EVALUATION_TOKENS = 8192, 4096
METHOD = "greedy"
DECODE_TOKENS = 48
FIGURES = "figures.json"


def run(output: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Run the demo, print its table, and leave checkpoint, figures and plot in the folder `output`.

    Args:
        output: made anew; an earlier demo in it is replaced when this one is complete.
        quiet: print nothing but progress bars.

    Returns:
        The figures that `figures.json` holds.

    Raises:
        ValueError: `output` exists and holds something else than an earlier demo, or the model's package is missing.
    """
    if output.exists() and not (output / FIGURES).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"{str(output)!r} exists and is not the folder of an earlier demo; choose another with --output"
        )
    if not output.parent.is_dir():
        raise ValueError(f"the folder {str(output.parent)!r} does not exist; make it first")
    with replacing(output) as folder:
        folder.mkdir()
        return _run(folder, output, (lambda *text: None) if quiet else _say)


def _say(*text: str) -> None:
    print(*text)
    sys.stdout.flush()


def _run(folder: Path, output: Path, say: Any) -> dict[str, Any]:
    start = time.perf_counter()
    say(f"{SMOLLM2}: loading (converted once, which takes half a minute)")
    name = smollm2()
    model, tokenizer = load_model(name), load_tokenizer(name)
    halves = python_documentation()
    batches = token_windows(tokenizer, halves[0], tokens=CALIBRATION_TOKENS, window=WINDOW)
    windows = token_windows(tokenizer, halves[1], tokens=EVALUATION_TOKENS, window=WINDOW)

    say(f"calibrating on {len(batches) * WINDOW:,} tokens, judging on {len(windows) * WINDOW:,} others")
    calibration = calibrate(model, batches)
    half = batches[: len(batches) // 2]
    budgets = allocate_budgets(calibration, SPARSITIES, METHOD, model=model, batches=half)

    reference = dense_logits(model, windows)
    evaluations = [evaluate(model, windows, reference=reference)]
    models = {"dense": model}
    for thresholds in budgets:
        sparse = sparsify_(copy.deepcopy(model), thresholds)
        evaluations.append(evaluate(sparse, windows, reference=reference))
        sparsity(sparse, reset=True, warn=False)  # from here on, what decoding skips
        models[_label(thresholds)] = sparse
    del reference
    say("compiling one token's work (a minute the first time)")
    for label in list(models)[1:]:
        prepare_decode_(models[label])
    prompt = tokenizer(PROMPT, return_tensors="pt")
    times = decode_seconds(models, prompt.input_ids, tokens=DECODE_TOKENS)
    rows = []
    for (label, each), evaluation, asked in zip(models.items(), evaluations, (0.0, *SPARSITIES), strict=True):
        quality = dataclasses.asdict(evaluation)
        rows.append({"model": label, "asked": asked, **quality, **decoding_figures(each, times[label])})
    figures = {
        "model": SMOLLM2,
        "dtype": str(model.dtype).removeprefix("torch."),
        "calibration_tokens": len(batches) * WINDOW,
        "allocation": budgets[0].method,
        "rows": rows,
        "read_bandwidth": kernels.read_bandwidth(),
        "machine": machine(),
    }
    say(f"\n{table(figures)}\n")

    saved = models[_label(budgets[SPARSITIES.index(SAVED)])]
    continuations = {}
    for label, each in {"dense": model, f"sparse, {SAVED:.0%}": saved}.items():
        tokens = each.generate(**prompt, max_new_tokens=48, do_sample=False)
        continuations[label] = tokenizer.decode(tokens[0], skip_special_tokens=True)
        say(f"{label}: {continuations[label]}\n")
    figures["continuations"] = continuations

    save_model(saved, tokenizer, folder / "model")
    plot(figures, folder)
    figures["seconds"] = time.perf_counter() - start
    write_json(folder / FIGURES, figures)
    say(f"{output}: the sparse model, {FIGURES}, demo.svg and demo.png ({figures['seconds']:.0f} s in all)")
    return figures


def _label(thresholds: Thresholds) -> str:
    return f"{thresholds.sparsity:.0%}"


def table(figures: dict[str, Any]) -> str:
    """The figures of a demo as text."""
    lines = [
        f"{'asked':>6} {'achieved':>9} {'perplexity':>11} {'KL':>8} {'top-1':>7} {'tokens/s':>9} {'speed':>6} "
        f"{'MB/token':>9} {'GB/s':>6}"
    ]
    dense = figures["rows"][0]["tokens_per_second"]
    for row in figures["rows"]:
        lines.append(
            f"{row['model']:>6} {row['sparsity']:9.1%} {row['perplexity']:11.3f} {row['kl']:8.4f} "
            f"{row['agreement']:7.1%} {row['tokens_per_second']:9.1f} {row['tokens_per_second'] / dense:5.2f}x "
            f"{row['bytes_per_token'] / 1e6:9.1f} {row['bandwidth'] / 1e9:6.1f}"
        )
    about = figures["machine"]
    lines.append(f"dense: transformers as it is, {figures['dtype']}. Quality with every token sparse.")
    lines.append(
        f"This machine reads {figures['read_bandwidth'] / 1e9:.1f} GB/s: {about['processor']}, "
        f"{about['threads']} threads, kernels {about['kernels']}, torch {about['torch']}, "
        f"transformers {about['transformers']}."
    )
    return "\n".join(lines)


def plot(figures: dict[str, Any], folder: Path) -> None:
    """Perplexity against decoding speed, a point for each budget, as demo.svg and demo.png."""
    from matplotlib.figure import Figure

    rows = figures["rows"]
    dense, sparse = rows[0], rows[1:]
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.axhline(dense["perplexity"], color="tab:gray", lw=0.8, ls="--")
    axes.plot(
        dense["tokens_per_second"], dense["perplexity"], "s", color="tab:gray", label="dense, transformers as it is"
    )
    speeds = [row["tokens_per_second"] for row in sparse]
    axes.plot(speeds, [row["perplexity"] for row in sparse], "o-", color="tab:blue", label="sparse, deadband")
    for row in sparse:
        text = f"{row['sparsity']:.0%} skipped\nKL {row['kl']:.2f}"
        where = (row["tokens_per_second"], row["perplexity"])
        axes.annotate(text, where, xytext=(-8, 6), textcoords="offset points", ha="right", fontsize=9)
    axes.set(xlabel="decoded tokens per second (more is better)", ylabel="perplexity (less is better)")
    axes.set(xlim=(0, max(speeds) * 1.08), ylim=(0, max(row["perplexity"] for row in rows) * 1.15))
    axes.legend(loc="lower left")
    axes.set_title(f"{figures['model']}, {figures['dtype']}, {figures['machine']['threads']} threads", fontsize=10)
    for suffix in ("svg", "png"):
        figure.savefig(folder / f"demo.{suffix}", dpi=150)
