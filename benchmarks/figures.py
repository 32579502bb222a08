"""Write docs/figures.md, its plots, and the marked tables of README.md from the JSON in benchmarks/results.

    python benchmarks/figures.py                          # `make figures`
    python benchmarks/figures.py --demo deadband-demo     # after `make demo`: take its figures and its plot first

Each script leaves {"machine", "rows"} in benchmarks/results/MACHINE/SCRIPT.json, some of them "settings" as well. A
list of sentences under "remarks", put there by hand, is printed below the table. Nothing else is written by hand: a
number that is in a page is in one of these files. What a file lacks, or has null for, is left out or shown as a dash.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
RIVALS = {"bf16": ("BF16",), "int8": ("Q8_0",), "int4": ("Q4_0", "Q4_K_M")}
"""llama.cpp's types of the same width as the weights of each group of decode.py."""
DASH = "–"
Result = dict[str, Any]
Rows = list[dict[str, Any]]


def load(folder: Path = RESULTS) -> dict[str, dict[str, Result]]:
    """Results by machine, then by script."""
    found: dict[str, dict[str, Result]] = {}
    for path in sorted(folder.glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return found


# Numbers


def number(value: float | None, form: str, unit: str = "") -> str:
    return DASH if value is None else f"{value:{form}}{unit}"


def times(value: float | None) -> str:
    return number(value, ".2f", "×")


def tenths(value: float | None) -> str:
    return number(value, ".1f")


def percent(value: float | None) -> str:
    return number(value, ".0%")


def joined(values: Iterable[Any], form: Callable[[Any], str]) -> str:
    """One text for each number of threads."""
    return " / ".join(form(value) for value in values)


def same(values: Iterable[Any], form: Callable[[Any], str]) -> str:
    """The one text of all, or all of them."""
    return " / ".join(dict.fromkeys(form(value) for value in values))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by(rows: Iterable[Mapping[str, Any]], *keys: str) -> list[Rows]:
    """Rows that agree in these keys, in the order of the first of each."""
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(json.dumps([row.get(key) for key in keys]), []).append(dict(row))
    return list(groups.values())


def shape(row: Mapping[str, Any]) -> str:
    return " × ".join(map(str, row["shape"]))


def threads_of(rows: Iterable[Mapping[str, Any]]) -> str:
    counts = sorted({row["threads"] for row in rows if row.get("threads")})
    return f"{' / '.join(map(str, counts))} thread{'' if counts == [1] else 's'}" if counts else ""


def machine_line(about: Mapping[str, Any], rows: Iterable[Mapping[str, Any]] = ()) -> str:
    """Processor, cores, kernels, versions and numbers of threads."""
    version = {name: str(about.get(name) or "").partition("+")[0] for name in ("torch", "transformers")}
    parts = [
        str(about["processor"]),
        f"{about['cores']} cores" if about.get("cores") else "",
        f"all kept to {about['kept_to']}" if about.get("kept_to") else "",
        f"kernels {about['kernels']}" if about.get("kernels") and not about.get("kept_to") else "",
        *(f"{name} {found}" if found else "" for name, found in version.items()),
        threads_of(rows),
    ]
    return ", ".join(filter(None, parts))


# A table for each script


def kernels(result: Result) -> str:
    lines = []
    for group in by(result["rows"], "format", "shape", "sparsity"):
        own = [each["against_own_dense"] for each in group]
        lines.append((
            group[0]["format"], shape(group[0]), percent(group[0]["sparsity"]),
            joined((each["against_torch"] for each in group), times), joined(own, times),
            joined((each["of_bandwidth"] for each in group), percent),
            joined((each.get("of_rows") for each in group), percent),
        ))  # fmt: skip
    head = ["weights", "in × out", "sparsity", "against torch", "against our dense kernel", "of bandwidth", "of rows"]
    return table(*without_dashes(head, lines))


def decoders(result: Result) -> list[tuple[str, Rows]]:
    """Label and rows, one for each number of threads, of what a table of decode.py shows.

    transformers is there in every group and counts in the first; llama.cpp counts among weights of its width.
    """
    found, first = [], result["rows"][0]["group"]
    for group in by(result["rows"], "group", "decoder"):
        decoder, width = group[0]["decoder"], group[0]["group"]
        maker, _, kind = decoder.partition(" ")
        if maker == "llama.cpp" and kind not in RIVALS[width]:
            continue
        if maker.startswith("transformers"):
            if width == first:
                found.append((decoder.replace("transformers", "transformers, bfloat16"), group))
            continue
        found.append((decoder.replace("bf16", "bfloat16").removesuffix(" at 0%"), group))
    return found


def decode(result: Result) -> str:
    judged = any("kl" in row for row in result["rows"])
    head = [
        result["rows"][0]["model"], "achieved", "tokens/s", "against transformers", "against llama.cpp", "of bandwidth",
        *(("KL", "perplexity") if judged else ()),
    ]  # fmt: skip
    lines = []
    for label, rows in decoders(result):
        achieved = same((row["sparsity"] for row in rows), percent) if any(row["sparsity"] for row in rows) else ""
        line = [
            label, achieved, joined((row["tokens_per_second"] for row in rows), tenths),
            joined((row["against_transformers"] for row in rows), times),
            joined((row["against_llama_cpp"] for row in rows), times),
            joined((row["of_bandwidth"] for row in rows), percent),
        ]  # fmt: skip
        if judged:
            known = [row for row in rows if "kl" in row]
            line.append(same((row["kl"] for row in known), lambda value: number(value, ".4f")))
            line.append(same((row["perplexity"] for row in known), lambda value: number(value, ".2f")))
        lines.append(line)
    return table(head, lines)


def frontier(result: Result) -> str:
    counts = sorted({row["threads"] for row in result["frontier"]})
    lines = []
    for group in by(result["frontier"], "rival", "rival_kl"):
        cells = {}
        for row in group:
            found = "none is as close"
            if row["decoder"] is not None:
                label = row["decoder"].removeprefix("deadband ").removesuffix(" at 0%").replace("bf16", "bfloat16")
                found = f"{times(row['ratio'])}, {label} ({row['kl']:.4f})"
            cells[row["threads"]] = found
        lines.append([f"{group[0]['rival']} ({group[0]['rival_kl']:.4f})", *(cells.get(count, "") for count in counts)])
    names = [f"{count} thread{'s' if count > 1 else ''}" for count in counts]
    return table([result["rows"][0]["model"], *names], lines)


def memory(result: Result) -> str:
    lines = [
        (row["model"], row["weights"].replace("bf16", "bfloat16"), number(megabytes(row.get("bytes")), ",.0f"),
         number(megabytes(row.get("loading")), ",.0f"), number(megabytes(row.get("loaded")), ",.0f"),
         number(megabytes(row.get("peak")), ",.0f"), times(row["ratio"]))
        for row in result["rows"]
    ]  # fmt: skip
    head = ["model", "weights", "MB of weights", "loading", "loaded", "peak", "peak / weights"]
    return table(*without_dashes(head, lines))


def megabytes(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def without_dashes(head: Sequence[str], lines: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """A table less the columns that have no number."""
    used = [i for i in range(len(head)) if any(line[i].strip(f"{DASH} /") for line in lines)]
    return [head[i] for i in used], [[line[i] for i in used] for line in lines]


def prefill(result: Result) -> str:
    tokens = list(result["rows"][0]["ratios"])
    lines = [
        (group[0]["format"], shape(group[0]), *(joined((row["ratios"][key] for row in group), times) for key in tokens))
        for group in by(result["rows"], "format", "shape")
    ]
    return table(["weights", "in × out", f"{tokens[0]} tokens", *tokens[1:]], lines)


def first_token(result: Result) -> str:
    lines = []
    for group in by(result["rows"], "group", "tokens", "reader"):
        ours = group[0]["reader"].startswith("deadband")
        lines.append((
            group[0]["group"].replace("bf16", "bfloat16"), str(group[0]["tokens"]), group[0]["reader"].split()[0],
            joined((row["seconds"] * 1e3 for row in group), lambda value: number(value, ",.0f")),
            joined((row["tokens_per_second"] for row in group), lambda value: number(value, ",.0f")),
            joined((row["against_llama_cpp"] for row in group), times) if ours else "",
            joined((row["against_transformers"] for row in group), times) if ours else "",
        ))  # fmt: skip
    head = ["weights", "prompt", result["rows"][0]["model"], "ms", "tokens/s", "against llama.cpp",
            "against transformers"]  # fmt: skip
    return table(*without_dashes(head, lines))


def several_tokens(result: Result) -> str:
    lines = [
        (group[0]["group"].replace("bf16", "bfloat16"), str(group[0]["tokens"]),
         joined((row["seconds"] * 1e3 for row in group), lambda value: number(value, ",.0f")),
         joined((row["against_one"] for row in group), times))
        for group in by(result["rows"], "group", "tokens")
    ]  # fmt: skip
    return table(["weights", "tokens", f"{result['rows'][0]['model']}, ms", "against one token"], lines)


def experts(result: Result) -> str:
    """One table of whole decoding, one of the experts alone; transformers counts in the first group."""
    parts = []
    for part, title in (("decode", "decoding"), ("experts", "the experts alone")):
        mine, lines = [row for row in result["rows"] if row["part"] == part], []
        for group in by(mine, "group", "candidate", "tokens"):
            label = group[0]["candidate"]
            if label.startswith("transformers") and group[0]["group"] != mine[0]["group"]:
                continue
            sparse = any(row["sparsity"] for row in group)
            lines.append((
                label.replace("bf16", "bfloat16").replace("f32", "float32").replace(" at 0%", ""),
                str(group[0]["tokens"]) if part == "experts" else "",
                same((row["sparsity"] for row in group), percent) if sparse else "",
                *(joined((1e3 * row[key] for row in group), lambda value: number(value, ".2f"))
                  for key in ("seconds", "seconds_per_layer")),
                *(joined((row[f"against_{key}"] for row in group), times)
                  for key in ("transformers", "own_dense", "llama_cpp")),
                joined((row.get("of_bandwidth") for row in group), percent),
            ))  # fmt: skip
        head = [title, "tokens", "achieved", "ms", "ms a layer", "against transformers", "against own dense",
                "against llama.cpp", "of bandwidth"]  # fmt: skip
        parts.append(table(*without_dashes(head, lines)))
    return "\n\n".join(parts)


def natural(result: Result) -> str:
    lines = [
        (group[0]["kind"], group[0]["weights"].replace("bf16", "bfloat16"), percent(group[0]["zeros"]),
         *(joined((row[f"{key}_ms"] for row in group), lambda value: number(value, ".1f"))
           for key in ("dense", "exact")),
         joined((row["ratio"] for row in group), times), f"{group[0]['difference']:g}")
        for group in by(result["rows"], "kind", "weights")
    ]  # fmt: skip
    return table(["model", "weights", "zeros", "dense, ms", "exact, ms", "gain", "difference of logits"], lines)


def joint(result: Result) -> str:
    lines = [
        (percent(row["budget"]), "with" if row["joint"] else "without", f"{row['sparsity']:.1%}", f"{row['kl']:.4f}",
         str(row["gates"]), "" if row["ratio"] is None else f"{row['ratio']:.2f}×")
        for row in sorted(result["rows"], key=lambda row: row["budget"])
    ]  # fmt: skip
    return table(["asked", "joint sites", "achieved", "KL", "MLPs by their gate", "of the KL without"], lines)


def coverage(result: Result) -> str:
    said = result["summary"]
    lines = [(f"`{row['type']}`", f"{row['share']:.1%}") for row in result["rows"]]
    return (
        f"{said['enough']} of {said['types']} types have {said['threshold']:.0%} or more of these weights in sites; "
        f"{said['refused']} cannot be built at their defaults. The least:\n\n{table(['type', 'in sites'], lines)}"
    )


def quality(result: Result) -> str:
    lines = [
        (row["title"], percent(row["budget"]), f"{row['sparsity']:.1%}",
         f"{row['kl']:.4f} ± {number(row['kl_error'], '.4f')}",
         percent(row["removed"]),
         f"{row['perplexity_increase']:+.1%} ± {number(row['perplexity_increase_error'], '.1%')}",
         f"{row['agreement']:.1%}")
        for row in result["rows"]
    ]  # fmt: skip
    return table(["method", "asked", "achieved", "KL to dense", "removed", "perplexity", "top-1 agreement"], lines)


def allocation(result: Result) -> str:
    lines = [
        (row["dtype"], str(row["threads"]), *(number(row[key], ",.0f") for key in ("calibrate", "sensitivity")),
         number(row["together"], ",.0f"), number(row["greedy"], ",.0f"), "as in the paper" if row["full"] else "ours")
        for row in result["rows"]
    ]  # fmt: skip
    head = ["dtype", "threads", "calibrate, s", "sensitivity, s", "both, s", "greedy, s", "greedy's steps"]
    return table(*without_dashes(head, lines))


def rounding(result: Result) -> str:
    return table(
        ["weights", "KL, x as it is", "many tokens at once", "one by one"],
        (
            (row["format"], f"{row['exact']:.5f}", f"{row['many']:.5f} ({row['many_more']:+.1%})",
             f"{row['one']:.5f} ({row['one_more']:+.1%})") for row in result["rows"]
        ),
    )  # fmt: skip


def overheads(result: Result) -> str:
    lines = []
    for row in result["rows"]:
        count = str(row.get("threads", ""))
        if "thirteen" in row:
            lines.append(("thirteen arguments of an operator, not ten", count, f"{row['difference_us']:.1f} µs more"))
        elif "difference_us" in row:
            what = row["what"].replace("torch.", "").replace("64x64", "64 × 64")
            lines.append((what, count, f"{row['difference_us']:.1f} µs more than nn.Linear"))
        elif "import_s" in row:
            lines.append(("`import deadband`", count, f"{row['import_s']:.2f} s"))
            lines.append(("`deadband --help`", count, f"{row['help_s']:.2f} s"))
        else:
            lines.append((row["what"], count, f"{row['overhead']:.0%} more than the forward pass"))
    return table(["what", "threads", "cost"], lines)


def ratios(result: Result) -> str:
    """The worst ratio of each way to call a layer and each format, and with how many rows."""
    formats = list(dict.fromkeys(row["format"] for row in result["rows"]))
    lines = []
    for ways in by(result["rows"], "isa", "threads", "mode"):
        worst = {each[0]["format"]: max(each, key=lambda row: row["ratio"]) for each in by(ways, "format")}
        cells = [f"{times(worst[name]['ratio'])} ({worst[name]['rows']})" if name in worst else "" for name in formats]
        lines.append((ways[0]["isa"], str(ways[0]["threads"]), ways[0]["mode"], *cells))
    return table(["instruction set", "threads", "layer called in", *formats], lines)


def sparsifier(result: Result) -> str:
    """One table of what watching adds, one of features, and the bytes that are kept."""
    results = result["rows"]
    watched = [each for each in results if each["what"] == "watching"]
    columns = [name for name in watched[0]["rows"] if name != "forward"] if watched else []
    parts = [
        table(
            ["watching", "threads", *(name.replace("one's own", "your own") for name in columns)],
            ((each["model"], str(each["threads"]),
              *(f"{each['rows'][name]['overhead']:.1%}" for name in columns)) for each in watched),
        )
    ]  # fmt: skip
    scattered = [each for each in results if each["what"] == "features"]
    names = [name for name in scattered[0]["rows"] if "x * mask" not in name] if scattered else []
    parts.append(
        table(
            ["features", *(f"{each['threads']} thread{'s' if each['threads'] > 1 else ''}" for each in scattered)],
            [
                ("one `x * mask`", *(f"{each['rows']['deadband, x * mask']['us']:.0f} µs" for each in scattered)),
                *((name.replace("aggregate", "aggregating").replace(", mask", ", masking"),
                   *(number(each["rows"][name]["of_one_multiplication"], ".0f" if name.startswith("torch") else ".1f",
                            "×") for each in scattered)) for name in names),
            ],
        )
    )  # fmt: skip
    for each in results:
        if each["what"] == "memory":
            rows = ((name.replace("one's own", "your own"), f"{row['bytes']:,}") for name, row in each["rows"].items())
            parts.append(table(["keeps for 1,000 features, batch 64", "bytes"], rows))
    return "\n\n".join(parts)


def compaction(result: Result) -> str:
    lines = [
        (row["what"].replace(" x ", " × ").replace("56x56", "56 × 56"), str(row["batch"]), str(row["threads"]),
         *(f"{row['seconds'][name] * 1e3:.2f}" for name in ("dense", "masked", "compacted")), times(row["speed"]))
        for row in result["rows"]
    ]  # fmt: skip
    return table(["compacted to half", "batch", "threads", "dense ms", "masked ms", "compacted ms", "speed"], lines)


def pruning(result: Result) -> str:
    counted = [row for row in result["rows"] if "equal" in row]
    parts = [
        f"Masks of {row['equal']} of {row['configurations']} random configurations are torch's bit for bit."
        for row in counted
    ]
    steps = [row for row in result["rows"] if "torch" in row.get("seconds", {})]
    lines = [
        (row["what"].replace(" x ", " × "), str(row["threads"]),
         *(f"{row['seconds'][name]:.2f}" for name in ("torch", "deadband")), times(row["speed"])) for row in steps
    ]  # fmt: skip
    parts.append(table(["", "threads", "torch s", "deadband s", "speed"], lines))
    models = [row for row in result["rows"] if "pruned" in row.get("seconds", {})]
    lines = [
        (row["what"], str(row["threads"]), *(f"{row['seconds'][name] * 1e3:.2f}" for name in ("dense", "pruned")),
         times(row["speed"]), *(times(row[what][0] / row[what][1]) for what in ("flops", "parameters")))
        for row in models
    ]  # fmt: skip
    head = ["half pruned", "threads", "dense ms", "pruned ms", "speed", "fewer FLOPs", "fewer parameters"]
    parts.append(table(head, lines))
    lines = [
        (row["what"].replace(" x ", " × "), str(row["threads"]),
         *(f"{row['seconds'][name] * 1e3:.3f}" for name in ("dense", "half")), times(row["speed"]))
        for row in result["rows"] if "half" in row.get("seconds", {})
    ]  # fmt: skip
    parts.append(table(["half computed, half constant", "threads", "dense ms", "half ms", "speed"], lines))
    return "\n\n".join(parts)


def demo(result: Result) -> str:
    first = result["rows"][0]
    lines = [
        (row["model"], f"{row['sparsity']:.1%}", f"{row['perplexity']:.2f}", f"{row['kl']:.4f}",
         f"{row['agreement']:.1%}", f"{row['bytes_per_token'] / 1e6:.0f}", f"{row['bandwidth'] / 1e9:.1f}",
         tenths(row["tokens_per_second"]), times(row["tokens_per_second"] / first["tokens_per_second"]))
        for row in result["rows"]
    ]  # fmt: skip
    head = ["model", "skipped", "perplexity", "KL", "top-1", "MB read per token", "GB/s", "tokens/s", "speed"]
    machine = machine_line(result["machine"], [result["machine"]])
    spent = f", {result['seconds'] / 60:.1f} minutes" if result.get("seconds") else ""
    text = (
        f"One run of `make demo`{spent}: {result['model']}, allocation `{result['allocation']}`, judged on "
        f"{first['tokens']:,} tokens with every token sparse, on {machine}, which reads "
        f"{result['read_bandwidth'] / 1e9:.0f} GB/s."
    )
    return f"{table(head, lines)}\n\n{text} {DEMO_ROWS if 'weights' in first else EARLIER_DEMO_ROWS}"


DEMO_ROWS = (
    "The first row is transformers as it is, in the faster of float32 and bfloat16. *bfloat16* skips nothing: what it "
    "gains comes from the graph of a token and the kernels. The rows below it add skipping, the last four fewer bits. "
    "The weights of this model come from a file of 4 bits (Q4_1), which flatters int4."
)
EARLIER_DEMO_ROWS = (
    "*dense* is transformers as it is; the sparse rows decode after `prepare_decode_`, which is a good part of the "
    "speed of a model as small as this."
)


# docs/figures.md


INTRODUCTION = """# Figures

Every number here comes from a script in `benchmarks/`, which leaves it as JSON in `benchmarks/results`, in a folder for
each machine; `make bench` runs them all and `make figures` writes this page from what they left. Where a heading says
1 / 2 threads, the two numbers with a slash are of 1 thread and of 2.

Candidates take turns in one process, medians are shown, and weights come from memory: other processes (the machines
here are virtual and shared) disturb times, ratios much less. Sections with other versions were taken at another time.
Intel's family 6 model 207 is Emerald Rapids (AVX-512, with VNNI), AMD's family 25 model 17 is Zen 4."""

SECTIONS: list[tuple[str, str, str, Callable[[Result], str]]] = [
    (
        "demo",
        "The demo",
        """
`deadband demo` (`make demo`).
""",
        demo,
    ),
    (
        "kernels",
        "One layer, one token",
        """
`benchmarks/kernels.py`, weights from memory. Quantised weights stand beside torch's bfloat16 product. *Of
bandwidth*: the bytes needed, per second, as a share of what the same run reads from memory at most, by the fastest of a
dozen loops; *of rows*: of what such a loop reads of just the rows of kept inputs, in the kernel's order.
""",
        kernels,
    ),
    (
        "decode-*",
        "Decoding, end to end",
        """
`benchmarks/decode.py --data FILE`: transformers, deadband after `prepare_decode_`, and llama.cpp take turns, token
by token. Quantised models have float32 activations. *50%+*: `lm_head` is a site like the others; in the other rows
it skips nothing and has 8 bits at least. Ratios are of one run: *against transformers* of bfloat16, eager; *against
llama.cpp* of the same width (BF16, Q8_0, Q4_0). KL is to the float32 model, every token sparse, thresholds by
`sensitivity`.

The Llamas have the shapes of Llama 3.2 and random weights, so only their speed means something. The weights of
SmolLM2-135M and Gemma 3 270M come from files of 4 bits, and so `int4-g32-zp` restores SmolLM2's. *mixed*:
`choose_formats` (see [Quantised weights](decoding.md)).

Below the table of a real model, at the KL of each of llama.cpp's files (in parentheses): how many times as fast the
fastest of deadband's configurations is that is as close to the float32 model or closer, both timed in one run; its
KL in parentheses.
""",
        decode,
    ),
    (
        "rounding",
        "What rounding x costs",
        """
`benchmarks/rounding.py --data FILE`: SmolLM2-135M, KL to the float32 model, nothing skipped. With *x as it is* torch
multiplies by the dequantised weights; the kernels have one way for many tokens and one for a single one.
""",
        rounding,
    ),
    (
        "memory",
        "Memory",
        """
`benchmarks/memory.py`: what loading a sparse model and decoding 32 tokens adds to a process at its peak, also as a
multiple of the weights' bytes.
""",
        memory,
    ),
    (
        "prefill",
        "Prefill",
        """
`benchmarks/prefill.py`: time through `sparsify_`'d layers, on their one copy of the weights, as a multiple of
torch's time on ordinary ones (of bfloat16 beside quantised ones); below 1 is faster.
""",
        prefill,
    ),
    (
        "first_token-*",
        "Time to the first token",
        """
`benchmarks/first_token.py`: a prompt of so many tokens, read by whole models that take turns, with the logits of its
last token alone. deadband skips nothing there; quantised models have float32 activations, transformers is in bfloat16
in every group, llama.cpp's weights have the same width (BF16, Q8_0, Q4_0).
""",
        first_token,
    ),
    (
        "natural",
        "Models that are sparse by nature",
        """
`benchmarks/natural.py`: whole decode of random models in the shapes of published ones, exact, against the same model on
the same kernels with nothing skipped. *Zeros*: of what the down-projections get, on average over all layers; Gemma 3n
has them in a third of its layers and is decoded without a graph. Times and gains with 1 / 2 threads.
""",
        natural,
    ),
    (
        "several_tokens-*",
        "Several tokens at once",
        """
`benchmarks/several_tokens.py`: the graph of `prepare_decode_(model, tokens=8)` on so many tokens of one sequence, as
speculative decoding has them verified, beside that of one token. Nothing is skipped.
""",
        several_tokens,
    ),
    (
        "experts",
        "Mixtures of experts",
        """
`benchmarks/experts.py`: random weights in the shapes of Qwen3-30B-A3B (128 experts of 768 features, 8 for each token),
cut to a few layers and a small vocabulary. *Decoding*: whole models take turns token by token, of random tokens, so
that experts differ from one to the next; *ms a layer* is the time over the number of layers, the output layer's
included. deadband decodes after `prepare_decode_`, or *eager*. *The experts alone*: of all layers, called one after the
other, without `prepare_decode_`; more than 4 tokens skip nothing. *Against transformers*: its fastest implementation
and dtype in the same run. *Against llama.cpp*: of the same width (Q8_0, Q4_0).
""",
        experts,
    ),
    (
        "coverage",
        "What sites cover",
        """
`benchmarks/coverage.py`: the part of the weights between embedding and output layer that are sites, for every causal
model type of transformers at the sizes of its default configuration.
""",
        coverage,
    ),
    (
        "quality-*",
        "Quality",
        """
`benchmarks/quality.py --data FILE --models smollm2 gemma3`: calibrated on Python's documentation (8,192 tokens),
judged on windows of 512 tokens, every token sparse. *Removed*: of the KL that TEAL with uniform thresholds has at
the same achieved sparsity. *Perplexity*: its increase over the dense model's. ± is one standard error over windows.
[Choosing a budget](budget.md) explains the methods.
""",
        quality,
    ),
    (
        "joint",
        "Joint sites",
        """
`benchmarks/joint.py --data FILE`: `sensitivity` with centers, with and without `joint=True`: rows of up-projections and
columns of down-projections that a gate decides on alone. *Of the KL without*: at the same achieved sparsity, between
measured budgets.
""",
        joint,
    ),
    (
        "allocation",
        "Time of an allocation",
        """
`benchmarks/allocation.py`: SmolLM2-135M, 8,192 tokens. Greedy compares outputs on as many tokens, and is measured on
3 of 30 blocks; with `--full` it tries every site at every step, as its paper does, on one block.
""",
        allocation,
    ),
    (
        "ratios",
        "Where a layer is slower than torch's",
        """
`benchmarks/ratios.py`: the time of a layer that skips half of its inputs over that of `nn.Linear` in the same dtype and
mode, from 1 to 512 rows, the weights in cache: the worst of all, and with how many rows. Quantised layers are compared
with the faster of bfloat16 and float32, frozen. *Training*: forward and backward.
""",
        ratios,
    ),
    (
        "overheads",
        "Overheads",
        """
`benchmarks/overheads.py`: a call of a 64 × 64 layer, calibrating, importing.
""",
        overheads,
    ),
    (
        "sparsifier",
        "ActivationSparsifier",
        """
`benchmarks/sparsifier.py`, float32, beside torch.ao.pruning's class. *Watching*: what the hooks on every
convolution and linear layer add to a forward pass. *Features*: 1,024 of 4,096, scattered, batch 64, as a multiple
of one `x * mask`.
""",
        sparsifier,
    ),
    (
        "compaction",
        "Compaction",
        """
`benchmarks/compaction.py`, float32: half of the hidden features masked, then removed.
""",
        compaction,
    ),
    (
        "pruning",
        "Pruning",
        """
`benchmarks/pruning.py`, float32: masks and `step` of `WeightNormSparsifier` over 200 layers of 1024 × 1024 beside
torch.ao.pruning's class; half of the channels or neurons by `SaliencyPruner`, removed by `prune()`, batch 1.
""",
        pruning,
    ),
]  # scripts, title, what it shows, how


def page(results: Mapping[str, Mapping[str, Result]]) -> str:
    """docs/figures.md."""
    parts = [INTRODUCTION]
    for pattern, title, text, render in SECTIONS:
        found = [
            (script, slug, result)
            for slug, scripts in results.items()
            for script, result in scripts.items()
            if re.fullmatch(pattern.replace("*", ".*"), script)
        ]
        if not found:
            continue
        parts += [f"## {title}", text.strip()]
        for script, slug, result in sorted(found, key=lambda each: each[:2]):
            parts.append(section(script, slug, result, render))
    return "\n\n".join(parts) + "\n"


def section(script: str, slug: str, result: Result, render: Callable[[Result], str]) -> str:
    """What one script found on one machine."""
    rows = result["rows"]
    about = machine_line(result["machine"], rows if any("threads" in row for row in rows) else [result["machine"]])
    models = {row["model"] for row in rows if row.get("model")}
    subject = models.pop() if script.partition("-")[1] and len(models) == 1 else ""
    parts = [f"### {subject}: {about}" if subject else f"### {about}"]
    if settings := result.get("settings"):
        said = [f"{name.replace('_', ' ')} {said_of(value)}" for name, value in settings.items() if value is not None]
        parts.append(f"Settings: {', '.join(said)}." if said else "")
    parts.append(render(result))
    if result.get("frontier"):
        parts.append(frontier(result))
    if has_plot(result):
        parts.append(f"![Tokens per second against KL, {subject}](figures/{plot_name(script, slug)})")
    parts += result.get("remarks", ())
    return "\n\n".join(filter(None, parts))


def said_of(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


# README.md


def beside_llama_cpp(results: Mapping[str, Result]) -> str:
    """deadband with nothing skipped and at 50 % beside llama.cpp, for each width; one column for each machine."""
    lines = []
    for width, (rival, *_) in RIVALS.items():
        for level in ("0%", "50%"):
            line = [f"{width.replace('bf16', 'bfloat16')} ({rival})", "nothing" if level == "0%" else level]
            for result in results.values():
                ours = [row for row in result["rows"] if row["decoder"] == f"deadband {width} at {level}"]
                ratios = joined((row["against_llama_cpp"] for row in ours), times)
                line.append(f"{ratios} ({joined((row['tokens_per_second'] for row in ours), tenths)})")
            lines.append(line)
    names = [short_name(result["machine"]) for result in results.values()]
    text = "Times llama.cpp's speed with 1 / 2 threads, and in parentheses tokens/s."
    return f"{table(['weights (llama.cpp)', 'skipped', *names], lines)}\n\n{text}"


def short_name(about: Mapping[str, Any]) -> str:
    """A processor, and what it was kept to."""
    return f"{about['processor']}{', kept to ' + about['kept_to'] if about.get('kept_to') else ''}"


def one(render: Callable[[Result], str]) -> Callable[[Mapping[str, Result]], str]:
    """What renders the result of a machine renders the first of several."""
    return lambda results: render(next(iter(results.values())))


MARKED: dict[str, Callable[[Mapping[str, Result]], str]] = {"demo": one(demo), "decode-llama-1b": beside_llama_cpp}
_MARK = re.compile(r"(<!-- figures: (\S+)(?: (\S+))? -->).*?(<!-- /figures -->)", re.DOTALL)


def marked(text: str, results: Mapping[str, Mapping[str, Result]]) -> str:
    """A text with what stands between `<!-- figures: SCRIPT [MACHINE] -->` and `<!-- /figures -->` written anew.

    Without a machine it shows all that have the script's results.
    """

    def written(found: re.Match[str]) -> str:
        script, machine = found[2], found[3]
        chosen = {slug: scripts[script] for slug, scripts in results.items()
                  if script in scripts and machine in (None, slug)}  # fmt: skip
        return f"{found[1]}\n\n{MARKED[script](chosen)}\n\n{found[4]}"

    return _MARK.sub(written, text)


# Plots


def has_plot(result: Result) -> bool:
    return any(row.get("kl") and "decoder" in row for row in result["rows"])


def plot_name(script: str, slug: str) -> str:
    return f"{script}-{slug}.svg"


def plot(result: Result, path: Path) -> None:
    """Tokens per second against KL, one point for each configuration, and the frontier of each maker."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = [row for _, rows in decoders(result) for row in rows if row.get("kl")]
    counts = sorted({row["threads"] for row in shown})
    figure = Figure(figsize=(6.4 * len(counts), 4.8), layout="constrained")
    for axes, count in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
        for maker, marker in (("transformers", "s"), ("llama.cpp", "^"), ("deadband", "o")):
            mine = [row for row in shown if row["decoder"].startswith(maker) and row["threads"] == count]
            mine.sort(key=lambda row: row["kl"])
            if not mine:
                continue
            points = axes.scatter(
                [row["kl"] for row in mine], [row["tokens_per_second"] for row in mine], marker=marker, label=maker
            )
            best, line = 0.0, []
            for row in mine:
                axes.annotate(row["decoder"].removeprefix(maker).strip(" ,"), (row["kl"], row["tokens_per_second"]),
                              fontsize=6, xytext=(3, 3), textcoords="offset points")  # fmt: skip
                if row["tokens_per_second"] > best:
                    best = row["tokens_per_second"]
                    line.append((row["kl"], best))
            if maker != "transformers":
                axes.step(*zip(*line, strict=True), where="post", color=points.get_facecolor(), linewidth=1)
        axes.set(xscale="log", xlabel="KL to the float32 model", ylabel="tokens/s", title=f"{shown[0]['model']}, "
                 f"{count} thread{'s' if count > 1 else ''}")  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(exist_ok=True)
    with rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):  # the same file for the same figures
        figure.savefig(path, metadata={"Date": None})


def take_demo(folder: Path) -> None:
    """Keep the figures of a demo with those of its machine, and its plot in docs/."""
    from common import results_folder

    from deadband.files import write_json

    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    write_json(results_folder(figures["machine"]) / "demo.json", figures)
    shutil.copyfile(folder / "demo.svg", DOCS / "demo.svg")


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    made.add_argument("--demo", type=Path, help="the folder of a demo whose figures and plot are taken over first")
    options = made.parse_args()
    if options.demo:
        take_demo(options.demo)
    results = load()
    for slug, scripts in results.items():
        for script, result in scripts.items():
            if has_plot(result):
                plot(result, DOCS / "figures" / plot_name(script, slug))
    (DOCS / "figures.md").write_text(page(results), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(marked(readme.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(f"docs/figures.md and README.md: {', '.join(results)}")


if __name__ == "__main__":
    main()
