"""The command line. Heavy imports stay inside the commands, so that --help answers at once."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="deadband",
    help="PyTorch models made faster by skipping activations close to zero.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
INTERRUPTED = 130
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, or a name on the hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Data = Annotated[Path, typer.Option("--data", metavar="FILE", help="A UTF-8 text file.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of the text to use.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens in one window.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of threads; torch's choice by default.")]
Overwrite = Annotated[bool, typer.Option(help="Replace the output if it exists.")]
Unreached = Annotated[
    str,
    typer.Option(help="error, or dense: leave out the sites that the text never reaches, such as a vision tower's."),
]
Sites = Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Names, ends of names, globs, or re:...")]
COMPILED_TOKENS = 500
"""From so many tokens on `generate` compiles first: that takes up to a minute."""


@app.command()
def inspect(
    model: Model,
    data: Data,
    include: Sites = None,
    exclude: Sites = None,
    unreached: Unreached = "error",
    tokens: Tokens = 8192,
    window: Window = 512,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """How sparse a model is by nature: zeros, tails and channels of each site."""
    text = read(data)
    network, tokenizer = load(model, dtype, threads)
    from deadband.calibration import inspection
    from deadband.running.text import token_windows

    batches = token_windows(tokenizer, text, tokens=tokens, window=window)
    result = inspection.inspect(network, batches, include=include, exclude=exclude, unreached=unreached)
    show({"tokens": len(batches) * window, **result.to_dict()}, str(result), as_json)


@app.command()
def calibrate(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="The calibration to write (safetensors).")],
    criterion: Annotated[str, typer.Option(help="magnitude or weighted_magnitude.")] = "magnitude",
    include: Sites = None,
    exclude: Sites = None,
    unreached: Unreached = "error",
    tokens: Tokens = 8192,
    window: Window = 512,
    dtype: Dtype = "auto",
    threads: Threads = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Record what the input of each site looks like."""
    check_output(output, overwrite)
    text = read(data)
    network, tokenizer = load(model, dtype, threads)
    from deadband.calibration import calibration
    from deadband.running.text import token_windows

    batches = token_windows(tokenizer, text, tokens=tokens, window=window)
    result = calibration.calibrate(
        network, batches, criterion=criterion, include=include, exclude=exclude, unreached=unreached
    )
    result.save(output)
    sites = {
        name: {"zeros": site.sparsity(0.0), "threshold_25": site.threshold(0.25), "threshold_50": site.threshold(0.5)}
        for name, site in result.sites.items()
    }
    figures = {
        "calibration": str(output),
        "criterion": criterion,
        "tokens": len(batches) * window,
        "sites": sites,
        "unreached": list(result.unreached),
    }
    show(figures, f"{result}\n\nwritten to {output}", as_json)


@app.command()
def sparsify(
    model: Model,
    calibration: Annotated[Path, typer.Argument(metavar="CALIBRATION", help="What `calibrate` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write the sparse model to.")],
    sparsity: Annotated[float | None, typer.Option(help="The fraction of the weight bytes to skip, e.g. 0.4.")] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Instead: the largest sparsity within this KL to the dense model (--data).")
    ] = None,
    max_perplexity_increase: Annotated[
        float | None, typer.Option(help="Instead: the largest sparsity within this relative increase, e.g. 0.01.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="auto, uniform, greedy or sensitivity; all but uniform need --data.")
    ] = "auto",
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to choose, fit and judge thresholds on.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Quantise the sparse layers: int8, int4, int4-g64, ...")
    ] = None,
    output_weights: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="Of the output layer, with a tied embedding; int8-g32 with --weights."),
    ] = None,
    gptq: Annotated[bool, typer.Option("--gptq", help="Round --weights with GPTQ, on the text of --data.")] = False,
    gguf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of the same model: its Q8_0, Q4_0 and Q4_1 weights are taken as they are."),
    ] = None,
    tokens: Tokens = 4096,
    window: Window = 512,
    dtype: Dtype = "auto",
    threads: Threads = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make a model sparse and save it."""
    check_output(output, overwrite, folder=True)
    text = read(data) if data is not None else None
    from deadband.allocation.fit import check_method
    from deadband.allocation.thresholds import check_sparsity
    from deadband.app.models import save_model
    from deadband.calibration.calibration import Calibration, second_moments_of
    from deadband.evaluation.speed import model_bytes
    from deadband.layers.formats import WeightFormat
    from deadband.layers.quantized import QuantizedMatrix
    from deadband.quantization.hessians import input_hessians
    from deadband.running.text import token_windows
    from deadband.sparsify.sparsify import sparsify_

    limits: dict[str, Any] = {"max_kl": max_kl, "max_perplexity_increase": max_perplexity_increase}
    if [sparsity, *limits.values()].count(None) != 2:
        raise ValueError("pass exactly one of --sparsity, --max-kl and --max-perplexity-increase")
    if sparsity is not None:
        check_sparsity(sparsity)
    if text is None and (sparsity is None or check_method(method) in ("greedy", "sensitivity")):
        raise ValueError("this runs the model on text: pass --data FILE as well")
    for form in (weights, output_weights):
        if form is not None:
            WeightFormat.parse(form)
    if gptq and (weights is None or text is None):
        raise ValueError("--gptq goes with --weights, and runs the model on text: pass --data FILE as well")
    blocks = gguf_blocks(gguf) if gguf is not None else {}
    statistics = Calibration.load(calibration)
    network, tokenizer = load(model, dtype, threads)
    passes: dict[str, Any] = {}
    if text is not None:
        passes = {"model": network, "batches": token_windows(tokenizer, text, tokens=tokens, window=window)}
    thresholds = statistics.allocate(sparsity, method, **limits, **passes)
    dense_bytes = model_bytes(network)
    sparsify_(
        network,
        thresholds,
        weights=chosen_weights(network, list(thresholds), weights, blocks),
        output_layer=output_weights or True,
        second_moments=second_moments_of(statistics),
        hessians=input_hessians(network, passes["batches"], thresholds) if gptq else None,
        progress=True,
    )
    save_model(network, tokenizer, output)
    formats = {name: each.weight_format for name, each in network.named_modules() if isinstance(each, QuantizedMatrix)}
    note = (
        ""
        if thresholds.corrected
        else "\nthresholds are from dense activations; --data corrects them on the sparse model"
    )
    figures = {
        "output": str(output),
        "sparsity": thresholds.sparsity,
        "method": thresholds.method,
        "reason": thresholds.reason,
        "corrected": thresholds.corrected,
        "thresholds": {name: rule.threshold for name, rule in thresholds.items()},
        "weights": formats,
        "dense_bytes": dense_bytes,
        "bytes": (size := model_bytes(network)),
    }
    counted = ", ".join(f"{form} ({count})" for form, count in Counter(formats.values()).items())
    stored = f"\nweights: {counted}; {dense_bytes / 1e6:.1f} MB became {size / 1e6:.1f} MB" if formats else ""
    show(figures, f"{thresholds}{stored}\n\nwritten to {output}{note}", as_json)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 64,
    compile: Annotated[
        bool | None,
        typer.Option(help=f"Compile decoding first; by default where {COMPILED_TOKENS} tokens or more are to come."),
    ] = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt, greedily."""
    if not prompt:
        raise ValueError("the prompt is empty; expected some text to continue")
    prompt = argument_text("the prompt", prompt)
    network, tokenizer = load(model, dtype, threads)
    from deadband.layers.sites import sparse_sites
    from deadband.sparsify.report import sparsity

    inputs = tokenizer(prompt, return_tensors="pt").to(network.device)
    compiled = compile if compile is not None else max_new_tokens >= COMPILED_TOKENS
    if compiled:
        from deadband.decoding.decoder import decode_report, prepare_decode_

        prepare_decode_(network)
    tokens = network.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    figures: dict[str, Any] = {"text": text, "new_tokens": tokens.shape[1] - inputs["input_ids"].shape[1]}
    shown = []
    if sparse_sites(network):
        figures["sparsity"] = sparsity(network, warn=False).total
        shown.append(f"[{figures['sparsity']:.1%} of the weight bytes skipped]")
    if compiled:
        report = decode_report(network)
        figures["decoding"] = {"graph": report.graph, "model": report.model, "problem": report.problem}
        shown.append(f"[{report}]")
    show(figures, "\n\n".join([text, "\n".join(shown)] if shown else [text]), as_json)


@app.command(name="eval")
def evaluate(
    model: Model,
    data: Annotated[Path | None, typer.Option("--data", metavar="FILE", help="A UTF-8 text file to judge on.")] = None,
    protocol: Annotated[
        str, typer.Option(help="Which tokens of a window are sparse: all, dense-prompt or dense-first.")
    ] = "all",
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the prompt (dense-prompt, --continue); half a window by default."),
    ] = None,
    continuations: Annotated[
        int, typer.Option("--continue", metavar="N", min=0, help="Continue the beginnings of N windows, both models.")
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add with --continue.")] = 256,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Tasks of lm-evaluation-harness, every token sparse.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with YAML files of more tasks.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task; all by default.")] = None,
    tokens: Tokens = 8192,
    window: Window = 512,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Quality beside the dense model: perplexity, KL and agreement on a text (--data), and tasks (--tasks)."""
    if data is None and tasks is None:
        raise ValueError("there is nothing to judge on; give --data FILE, --tasks A,B, or both")
    if continuations and data is None:
        raise ValueError("--continue continues windows of a text; give --data FILE too")
    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else []
    if tasks is not None and not names:
        raise ValueError("--tasks is empty; expected names of tasks, separated by commas")
    if tasks is None and (include_path is not None or limit is not None):
        raise ValueError("--include-path and --limit go with --tasks")
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"there is no folder {str(include_path)!r} to look for tasks in")
    text = read(data) if data is not None else None
    import dataclasses

    from deadband.evaluation import quality
    from deadband.evaluation.generation import compare_generation

    split = quality.protocol_name(protocol) == quality.PROTOCOLS["dense-prompt"]
    if prompt_tokens is not None and not split and not continuations:
        raise ValueError("--prompt-tokens goes with --protocol dense-prompt and with --continue")
    if prompt_tokens is not None and prompt_tokens > (window - 2 if split else window):
        raise ValueError(f"--prompt-tokens {prompt_tokens} is too long for a window of {window} tokens")
    if names:
        from deadband.integrations import lm_eval as harness

        try:
            harness.require_lm_eval()
        except ImportError as error:  # a user's mistake like any other
            raise ValueError(str(error)) from None
    network, tokenizer = load(model, dtype, threads)
    from deadband.layers.sites import sparse_sites

    if (names or continuations) and not sparse_sites(network):
        raise ValueError(f"{model!r} is a dense model; --tasks and --continue compare a sparse one with its dense form")
    figures: dict[str, Any] = {}
    shown = []
    if text is not None:
        from deadband.running.text import token_windows

        windows = token_windows(tokenizer, text, tokens=tokens, window=window)
        length = prompt_tokens if split else None
        result = quality.evaluate(network, windows, protocol=protocol, prompt_tokens=length)
        figures |= dataclasses.asdict(result)
        shown.append(result.table())
        if continuations:
            beginnings = [each["input_ids"][:, : prompt_tokens or window // 2] for each in windows[:continuations]]
            written = compare_generation(network, tokenizer, beginnings, max_new_tokens=max_new_tokens)
            figures["generation"] = dataclasses.asdict(written)
            shown.append(f"{written}\n\n{written.texts()}")
    if names:
        figures["tasks"] = harness.run_tasks(network, tokenizer, names, limit=limit, include_path=include_path)
        shown.append(harness.tasks_table(figures["tasks"]))
    show(figures, "\n\n".join(shown), as_json)


@app.command()
def bench(
    model: Model,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode with each.")] = 32,
    compile: Annotated[bool, typer.Option(help="Compile the sparse model's decoding first.")] = True,
    break_even: Annotated[bool, typer.Option(help="Show from which sparsity each kind of layer gains.")] = True,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Decoding speed of a model as it is, and of the same weights dense in transformers."""
    network, tokenizer = load(model, dtype, threads)
    from deadband.evaluation.speed import compare_decoding

    limits = {}
    if break_even:
        from deadband.decoding.breakeven import break_even as measured

        limits = measured(network)
    figures = compare_decoding(network, tokenizer, tokens=tokens, compiled=compile)
    figures["break_even"] = {str(kind): limit for kind, limit in limits.items()}
    lines = [f"{'':10} {'tokens/s':>9} {'MB/token':>9} {'GB/s':>6}"]
    for name, row in figures["models"].items():
        lines.append(
            f"{name:10} {row['tokens_per_second']:9.1f} {row['bytes_per_token'] / 1e6:9.1f} "
            f"{row['bandwidth'] / 1e9:6.1f}"
        )
    lines.append(f"memory reads {figures['read_bandwidth'] / 1e9:.1f} GB/s; {describe(figures['machine'])}")
    if limits:
        counts = list(next(iter(limits.values())))
        lines.append(f"\n{'break-even sparsity, for tokens at once':44}" + "".join(f"{count:>7}" for count in counts))
        for kind, limit in limits.items():
            shown = (f"{limit[count]:7.0%}" if limit[count] <= 1 else f"{'never':>7}" for count in counts)
            lines.append(f"{kind!s:44}" + "".join(shown))
    show(figures, "\n".join(lines), as_json)


@app.command()
def sweep(
    model: Model,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="A UTF-8 text file to judge on.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The JSON to write, after every run; one that is there is gone on with."),
    ],
    calibration_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A text file to calibrate on; Python's documentation by default."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="The page to write; beside the JSON by default.")] = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="Methods to compare. Others are top-k, wina-orthogonal, r-sparse, larosa, sensitivity, and "
            "teal-greedy, which takes many times as long.",
        ),
    ] = "teal-uniform,wina,wina-threshold,cats,auto",
    budgets: Annotated[
        str, typer.Option(metavar="A,B", help="Fractions of the weight bytes to skip.")
    ] = "0.25,0.4,0.5",
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text to judge on.")] = 16,
    window: Window = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to calibrate on.")] = 8192,
    prompt: Annotated[str | None, typer.Option(help="The text that every run continues, and is timed on.")] = None,
    protocol: Annotated[
        str, typer.Option(help="Which tokens of a window are sparse: all, dense-prompt or dense-first.")
    ] = "all",
    speed: Annotated[
        bool, typer.Option(help="Time decoding beside the dense model, which takes the memory of two models.")
    ] = True,
    dtype: Dtype = "auto",
    threads: Threads = None,
    overwrite: Annotated[bool, typer.Option(help="Begin anew instead of going on with what the output holds.")] = False,
    as_json: Json = False,
) -> None:
    """Methods by budgets: quality, bytes and speed of each in one JSON, a table and an HTML page.

    After an interruption the same command goes on where it stopped. Exit code 1: a run failed; the others are there.
    """
    page = html if html is not None else output.with_suffix(".html")
    if page.absolute() == output.absolute():
        raise ValueError(f"the JSON and the page cannot both be {str(output)!r}; give another --html")
    check_output(output, overwrite=True)  # one that is no sweep is found out later, but before the work
    check_page(page, overwrite)
    prompt = argument_text("--prompt", prompt) if prompt is not None else None
    names = [name.strip() for name in methods.split(",") if name.strip()]
    try:
        fractions = [float(budget) for budget in budgets.split(",") if budget.strip()]
    except ValueError:
        raise ValueError(f"--budgets {budgets!r}; expected fractions separated by commas, such as 0.25,0.4") from None
    if not names or not fractions:
        raise ValueError("--methods or --budgets is empty; expected at least one of each")
    text = read(data)
    calibration_text = read(calibration_data) if calibration_data is not None else None
    from deadband.allocation.thresholds import check_sparsity
    from deadband.evaluation import sweep as program
    from deadband.evaluation.methods import method_of
    from deadband.evaluation.page import write_report
    from deadband.evaluation.quality import protocol_name
    from deadband.running.text import python_documentation, token_windows

    protocol_name(protocol)
    for name in names:
        method_of(name)
    for fraction in fractions:
        check_sparsity(fraction)
    network, tokenizer = load(model, dtype, threads)
    calibration_text = calibration_text if calibration_text is not None else python_documentation()[0]
    figures = program.sweep(
        network,
        tokenizer,
        methods=names,
        budgets=fractions,
        calibration_windows=token_windows(tokenizer, calibration_text, tokens=tokens, window=window),
        windows=token_windows(tokenizer, text, tokens=windows * window, window=window),
        output=output,
        name=Path(model).resolve().name if Path(model).exists() else model,
        calibrated_on=calibration_data.name if calibration_data is not None else "Python's documentation",
        judged_on=data.name,
        prompt=prompt if prompt is not None else program.PROMPT,
        protocol=protocol,
        speed=speed,
        overwrite=overwrite,
        say=lambda line: print(line, file=sys.stderr if as_json else sys.stdout, flush=True),
    )
    written = f"written to {output} and {page}"
    try:
        write_report(figures, page)
    except ValueError as error:  # plotly is missing: no reason to lose the rest
        written = f"written to {output}; without the page: {error}. Then run the same command again: all runs are kept."
        if as_json:
            print(f"deadband: {written}", file=sys.stderr)
    show(figures, f"\n{program.table(figures)}\n\n{written}", as_json)
    if figures["failed"]:
        raise typer.Exit(1)


@app.command()
def info(as_json: Json = False) -> None:
    """What runs here: versions, processor, kernels."""
    from deadband.ops import kernels
    from deadband.running.timing import machine

    figures = {**machine(), "available": kernels.available_isas()}
    lines = [f"{name:13} {value}" for name, value in machine().items() if name != "kernels"]
    lines.append(f"{'kernels':13} {figures['kernels'] or kernels.MISSING}")
    if figures["available"]:
        lines.append(f"{'available':13} {', '.join(figures['available'])} (choose with DEADBAND_ISA)")
    show(figures, "\n".join(lines), as_json)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to leave the results in.")] = Path(
        "deadband-demo"
    ),
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """The whole flow on SmolLM2-135M: calibrate, allocate 25 / 40 / 50 %, quality and speed in one table."""
    set_threads(threads)
    from deadband.app import demo as program

    figures = program.run(output, quiet=as_json)
    show(figures, "", as_json)


def read(path: Path) -> str:
    """The text of --data, before anything slow is loaded."""
    from deadband.running.text import read_text

    return read_text(path)


def gguf_blocks(path: Path) -> dict[str, Any]:
    """The weights that --gguf can take over, before the model is loaded."""
    from deadband.quantization.gguf_weights import BLOCK_FORMATS, quantized_weights

    try:
        blocks = quantized_weights(path)
    except ImportError as error:  # a user's mistake like any other
        raise ValueError(str(error)) from None
    if not blocks:
        raise ValueError(f"{str(path)!r} holds no linear layer as {', '.join(BLOCK_FORMATS)}")
    return blocks


def chosen_weights(network: Any, sites: list[str], form: str | None, blocks: dict[str, Any]) -> Any:
    """`weights` of sparsify_: what a GGUF file holds as it is, and everything else in one format."""
    if not blocks:
        return form
    from deadband.sparsify.weights import OUTPUT_FORMAT, find_output_layer

    output = find_output_layer(network, sites)
    wanted: dict[str, Any] = {}
    if form is not None:
        wanted = dict.fromkeys(sites, form) | ({} if output is None else {output: OUTPUT_FORMAT})
    if output is not None and output not in blocks:
        embedding = network.get_input_embeddings()
        if embedding.weight is network.get_output_embeddings().weight:  # the file holds it as the embedding
            name = next(name for name, module in network.named_modules() if module is embedding)
            blocks = blocks | ({output: blocks[name]} if name in blocks else {})
    taken = {name: blocks[name] for name in (*sites, output) if name in blocks}
    if not taken:
        raise ValueError(f"the GGUF file has no layer of this model; it has for example {sorted(blocks)[0]!r}")
    return wanted | taken


def load(name: str, dtype: str, threads: int | None) -> tuple[Any, Any]:
    """Model and tokenizer."""
    set_threads(threads)
    from deadband.app.models import load_model, load_tokenizer

    return load_model(name, dtype=dtype), load_tokenizer(name)


def set_threads(threads: int | None) -> None:
    """torch's number of threads, and no advisories or progress bars of transformers' own."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)


def check_output(path: Path, overwrite: bool, *, folder: bool = False) -> None:
    """Find out before the work, not after it, that its result cannot be written; never replace something else."""
    import os

    if (path.exists() or path.is_symlink()) and not overwrite:
        raise ValueError(f"{str(path)!r} exists already; choose another --output or pass --overwrite")
    if path.exists() or path.is_symlink():
        alike = (path / "config.json").is_file() and not path.is_symlink() if folder else path.is_file()
        if not alike:
            what = "a model's folder" if folder else "a file"
            raise ValueError(f"{str(path)!r} is not {what}, so it is not overwritten; choose another --output")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {str(path.parent)!r} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"the folder {str(path.parent)!r} cannot be written to")


def check_page(path: Path, overwrite: bool) -> None:
    """Like `check_output` for a page beside a sweep: an earlier page is replaced, anything else is not."""
    earlier = path.is_file() and b"deadband sweep" in path.read_bytes()[:100_000]
    check_output(path, overwrite or earlier)


def describe(machine: dict[str, Any]) -> str:
    """One line about the machine."""
    return (
        f"{machine['processor']}, {machine['threads']} threads, kernels {machine['kernels']}, "
        f"torch {machine['torch']}, transformers {machine['transformers']}"
    )


def show(figures: dict[str, Any], text: str, as_json: bool) -> None:
    """Print the result: text for people, or one JSON object."""
    if as_json:
        from deadband.files import finite

        print(json.dumps(finite(figures)), flush=True)
    elif text:
        print(text, flush=True)  # here, where a reader that has gone away is a quiet end


def print_everything() -> None:
    """What a terminal or a pipe cannot show is printed as an escape such as \\u20ac, instead of losing the result."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def argument_text(name: str, given: str) -> str:
    """The text of an argument. Where the locale is not UTF-8, Python keeps bytes that it cannot read as surrogates."""
    try:
        return given if given.isascii() else given.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}; type it in a UTF-8 terminal") from None


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2; Ctrl-C is 130."""
    print_everything()
    interrupts = []

    def interrupt(signal_number: int, frame: Any) -> None:
        interrupts.append(signal_number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        app()
    except BaseException as error:
        if interrupts:  # remembered, as libraries turn a KeyboardInterrupt during their imports into other errors
            print("deadband: interrupted; nothing was left half written", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None
        if not isinstance(error, (ValueError, TypeError, OSError)) and type(error).__name__ != "SafetensorError":
            raise
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            message = error.strerror + (f": {error.filename}" if error.filename else "")
        print(f"deadband: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
