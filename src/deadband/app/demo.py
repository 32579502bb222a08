"""The whole flow on a small real model, with every figure on one page: `deadband demo`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deadband.allocation.budget import allocate_budgets
from deadband.allocation.thresholds import Thresholds
from deadband.app.labels import place_labels
from deadband.app.models import SMOLLM2, load_model, load_tokenizer, save_model, smollm2
from deadband.calibration.calibration import Calibration, calibrate, second_moments_of
from deadband.decoding.decoder import prepare_decode_
from deadband.evaluation.quality import columns, dense_logits, evaluate
from deadband.evaluation.speed import decode_seconds, decoding_figures
from deadband.evaluation.sweep import PROMPT
from deadband.files import replacing, write_json
from deadband.ops import kernels, products
from deadband.running.text import python_documentation, token_windows
from deadband.running.timing import machine, median
from deadband.sparsify.report import sparsity
from deadband.sparsify.sparsify import sparsify_


class Variant(NamedTuple):
    """One row of the table.

    Attributes:
        weights: their format.
        asked: the sparsity that was asked for; None of transformers as it is.
    """

    weights: str
    asked: float | None = None

    @property
    def label(self) -> str:
        """What to call it."""
        if self.asked is None:
            return f"transformers, {self.weights}"
        return f"{self.weights}, {self.asked:.0%}" if self.asked else self.weights


OWN = (
    *(Variant("bfloat16", asked) for asked in (0.0, 0.25, 0.4, 0.5)),
    *(Variant("int8", asked) for asked in (0.0, 0.4)),
    *(Variant("int4", asked) for asked in (0.0, 0.25)),
)
"""deadband's models. Those of a format stand together, and the first skips nothing."""
SAVED = Variant("bfloat16", 0.4)  # the model that is kept and continues the prompt
METHOD = "auto"
FORM = {"relative": False, "center": True}  # fewer graphs to compile, and candidates to try
WINDOW = 256
CALIBRATION_TOKENS, EVALUATION_TOKENS = 2048, 1024  # for two cores with AVX2 alone, as all of these
ALLOCATION_WINDOW, ALLOCATION_TOKENS = 128, 512  # auto makes some thirty passes for each budget
DECODE_TOKENS, TRIED_TOKENS = 48, 8
FIGURES = "figures.json"


def run(output: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Run the demo, print its table, and leave checkpoint, figures and plot in the folder `output`.

    Args:
        output: made anew; an earlier demo in it is replaced when this one is complete.
        quiet: print nothing but progress.

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
        return _run(folder, output, _Phases((lambda text: None) if quiet else _say))


def _say(text: str) -> None:
    print(text)
    sys.stdout.flush()


class _Phases:
    """Says what happens next, and keeps how long it took."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.seconds = say, dict[str, float]()

    @contextlib.contextmanager
    def __call__(self, name: str, said: str) -> Iterator[None]:
        self.say(said)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _run(folder: Path, output: Path, phase: _Phases) -> dict[str, Any]:
    with phase("load", f"{SMOLLM2}: loading (converted once, which takes half a minute)"):
        name = smollm2()
        model, tokenizer = load_model(name), load_tokenizer(name)
        prompt = tokenizer(PROMPT, return_tensors="pt")
        plain = _in_faster_dtype(model, prompt.input_ids)
    if note := products.note(model):
        phase.say(note)
    texts = python_documentation()
    batches = token_windows(tokenizer, texts[0], tokens=CALIBRATION_TOKENS, window=WINDOW)
    short = token_windows(tokenizer, texts[0], tokens=ALLOCATION_TOKENS, window=ALLOCATION_WINDOW)
    windows = token_windows(tokenizer, texts[1], tokens=EVALUATION_TOKENS, window=WINDOW)
    with phase("calibrate", f"calibrating on {len(batches) * WINDOW:,} tokens"):
        calibration = calibrate(model, batches)
    asked = sorted({each.asked for each in OWN if each.asked})
    with phase("allocate", f"allocating {', '.join(f'{each:.0%}' for each in asked)}, method {METHOD}"):
        budgets = allocate_budgets(calibration, asked, METHOD, model=model, batches=short, **FORM)
    with phase("make", "making the sparse and the quantised models"):
        models = {Variant(_dtype_of(plain)): plain, **own_models(model, calibration, budgets)}
    with phase("judge", f"judging {len(models)} models on {len(windows) * WINDOW:,} other tokens"):
        qualities = _judged(models, windows)
    with phase("compile", "compiling one token's work (some minutes the first time)"):
        for each in list(models.values())[1:]:
            prepare_decode_(each)
    with phase("decode", f"decoding {DECODE_TOKENS} tokens with each, in turns"):
        named = {variant.label: each for variant, each in models.items()}
        times = decode_seconds(named, prompt.input_ids, tokens=DECODE_TOKENS)
    figures: dict[str, Any] = {
        "model": SMOLLM2,
        "dtype": _dtype_of(model),
        "calibration_tokens": len(batches) * WINDOW,
        "allocation": METHOD,
        "picked": {f"{each.sparsity:.0%}": each.reason for each in budgets},
        "rows": [
            {"model": variant.label, **variant._asdict(), **quality, **decoding_figures(each, times[variant.label])}
            for (variant, each), quality in zip(models.items(), qualities, strict=True)
        ],
        "read_bandwidth": kernels.read_bandwidth(),
        "machine": machine(),
    }
    phase.say(f"\n{table(figures)}\n")
    with phase("save", "continuing a prompt, saving the model"):
        figures["continuations"] = _continuations([plain, models[SAVED]], tokenizer, prompt, phase.say)
        save_model(models[SAVED], tokenizer, folder / "model")
        plot(figures, folder)
    figures["phases"], figures["seconds"] = phase.seconds, sum(phase.seconds.values())
    write_json(folder / FIGURES, figures)
    spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in phase.seconds.items())
    phase.say(f"{output}: the sparse model, {FIGURES}, demo.svg and demo.png")
    phase.say(f"{figures['seconds']:.0f} s in all ({spent})")
    return figures


def _dtype_of(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _in_faster_dtype(model: Any, prompt: Tensor) -> Any:
    """The model, or a copy of it in float32 where transformers decodes faster with that."""
    models = {"own": model, "float32": copy.deepcopy(model).to(torch.float32)}
    times = decode_seconds(models, prompt, tokens=TRIED_TOKENS, what="transformers")
    return models[min(times, key=lambda name: median(times[name]))]


def own_models(model: Any, calibration: Calibration, budgets: Sequence[Thresholds]) -> dict[Variant, Any]:
    """deadband's models; quantised ones have float32 activations, as nothing large is left to convert.

    Those that skip nothing have the first budget's rules with thresholds of zero: the result is the dense one, and the
    graph that of every budget whose rules have the same form.
    """
    thresholds = {each.sparsity: each for each in budgets}
    nothing = {name: dataclasses.replace(rule, threshold=0.0) for name, rule in budgets[0].rules.items()}
    made: dict[Variant, Any] = {}
    for variant in OWN:
        if variant.asked:
            first = copy.deepcopy(made[Variant(variant.weights, 0.0)])
            made[variant] = sparsify_(first, thresholds[variant.asked])
        elif variant.weights == _dtype_of(model):
            made[variant] = sparsify_(copy.deepcopy(model), nothing)
        else:
            made[variant] = sparsify_(
                copy.deepcopy(model),
                nothing,
                weights=variant.weights,
                second_moments=second_moments_of(calibration),
                progress=True,
            ).to(torch.float32)
    return made


def _judged(models: Mapping[Variant, Any], windows: Sequence[Any]) -> list[dict[str, Any]]:
    """The quality of each beside the first, every token sparse; from here on, what they skip is counted anew."""
    reference = dense_logits(next(iter(models.values())), windows)
    qualities = []
    for variant, each in models.items():
        qualities.append(dataclasses.asdict(evaluate(each, windows, reference=reference)))
        if variant.asked is not None:
            sparsity(each, reset=True, warn=False)
    return qualities


def _continuations(models: Sequence[Any], tokenizer: Any, prompt: Any, say: Callable[[str], None]) -> dict[str, str]:
    """What transformers' model and the one that is saved make of the prompt."""
    written = {}
    for label, each in zip(("transformers", SAVED.label), models, strict=True):
        tokens = each.generate(**prompt, max_new_tokens=48, do_sample=False)
        written[label] = tokenizer.decode(tokens[0], skip_special_tokens=True)
        say(f"{label}: {written[label]}\n")
    return written


def table(figures: dict[str, Any]) -> str:
    """The figures of a demo as text."""
    lines = [("", "skipped", "perplexity", "KL", "top-1", "MB/token", "GB/s", "tokens/s", "speed")]
    first = figures["rows"][0]
    for row in figures["rows"]:
        lines.append((
            row["model"], f"{row['sparsity']:.1%}", f"{row['perplexity']:.3f}", f"{row['kl']:.4f}",
            f"{row['agreement']:.1%}", f"{row['bytes_per_token'] / 1e6:.1f}", f"{row['bandwidth'] / 1e9:.1f}",
            f"{row['tokens_per_second']:.1f}", f"{row['tokens_per_second'] / first['tokens_per_second']:.2f}x",
        ))  # fmt: skip
    about = figures["machine"]
    return "\n".join([
        columns(lines),
        "The first row is the faster of transformers' float32 and bfloat16; KL, top-1 and speed are beside it.",
        "The others are deadband's: graph and kernels, then what is skipped, then fewer bits. Quality with every token "
        "sparse.",
        f"This machine reads {figures['read_bandwidth'] / 1e9:.1f} GB/s: {about['processor']}, "
        f"{about['threads']} threads, kernels {about['kernels']}, torch {about['torch']}, "
        f"transformers {about['transformers']}.",
    ])  # fmt: skip


def plot(figures: dict[str, Any], folder: Path) -> None:
    """Perplexity against decoding speed, a point for each row, as demo.svg and demo.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    points = [(row["tokens_per_second"], row["perplexity"]) for row in figures["rows"]]
    groups: dict[str, list[tuple[float, float]]] = {}
    for row, point in zip(figures["rows"], points, strict=True):
        groups.setdefault("transformers" if row["asked"] is None else row["weights"], []).append(point)
    for maker, group in groups.items():
        axes.plot(*zip(*group, strict=True), "s" if maker == "transformers" else "o-", lw=1)
    axes.axhline(points[0][1], color="tab:gray", lw=0.8, ls="--", zorder=0)
    low, high = min(y for _, y in points), max(y for _, y in points)
    room = 0.2 * max(high - low, 0.05 * low)
    axes.set(xlim=(0, max(x for x, _ in points) * 1.15), ylim=(low - room, high + room))
    axes.set(xlabel="decoded tokens per second (more is better)", ylabel="perplexity (less is better)")
    axes.set_title(f"{figures['model']}, {figures['machine']['threads']} threads", fontsize=10)
    place_labels(axes, points, [row["model"] for row in figures["rows"]])
    for suffix in ("svg", "png"):
        figure.savefig(folder / f"demo.{suffix}", dpi=150)
