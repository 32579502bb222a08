"""The command line. Heavy imports stay inside the commands, so that --help answers at once."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import typer

from deadband.app import options as given

app = typer.Typer(
    name="deadband",
    help="PyTorch models made faster by skipping activations close to zero.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
INTERRUPTED = 130


@app.command()
def inspect(
    model: given.Model,
    data: given.Data,
    include: given.Sites = None,
    exclude: given.Sites = None,
    unreached: given.Unreached = "error",
    tokens: given.Tokens = 8192,
    window: given.Window = 512,
    dtype: given.Dtype = "auto",
    device: given.Device = "cpu",
    threads: given.Threads = None,
    as_json: given.Json = False,
) -> None:
    """How sparse a model is by nature: zeros, tails and channels of each site."""
    network, batches = load_with_text(model, data, tokens, window, dtype, device, threads)
    from deadband.calibration import inspection
    from deadband.evaluation.speed import expected_speeds

    result = inspection.inspect(network, batches, include=include, exclude=exclude, unreached=unreached)
    speeds = expected_speeds(network, result.skipped_bytes) if device == "cpu" else {}
    lines = [
        f"as fast as this machine reads memory, a token takes {1e3 / speeds['dense']:,.2f} ms dense and "
        f"{1e3 / speeds['exact']:,.2f} ms with exact=True ({speeds['exact']:,.1f} tokens/s), at least"
        for _ in range(bool(speeds))
    ]
    found = {"tokens": len(batches) * window, "tokens_per_second": speeds, **result.to_dict()}
    text = str(result).split("\n")
    show(found, "\n".join([*text[:2], *lines, *text[2:]]), as_json)


@app.command()
def calibrate(
    model: given.Model,
    data: given.Data,
    output: given.CalibrationOutput,
    criterion: given.Criterion = "magnitude",
    include: given.Sites = None,
    exclude: given.Sites = None,
    unreached: given.Unreached = "error",
    tokens: given.Tokens = 8192,
    window: given.Window = 512,
    dtype: given.Dtype = "auto",
    device: given.Device = "cpu",
    threads: given.Threads = None,
    overwrite: given.Overwrite = False,
    as_json: given.Json = False,
) -> None:
    """Record what the input of each site looks like."""
    check_output(output, overwrite)
    network, batches = load_with_text(model, data, tokens, window, dtype, device, threads)
    from deadband.calibration import calibration

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
    model: given.Model,
    calibration: given.Calibrated,
    output: given.ModelOutput,
    sparsity: given.Sparsity = None,
    max_kl: given.MaxKl = None,
    max_perplexity_increase: given.MaxPerplexityIncrease = None,
    method: given.Allocation = "auto",
    data: given.FitData = None,
    weights: given.Weights = None,
    output_weights: given.OutputWeights = None,
    gptq: given.Gptq = False,
    gguf: given.Gguf = None,
    tokens: given.Tokens = 4096,
    window: given.Window = 512,
    dtype: given.Dtype = "auto",
    device: given.Device = "cpu",
    threads: given.Threads = None,
    overwrite: given.Overwrite = False,
    as_json: given.Json = False,
) -> None:
    """Make a model sparse and save it."""
    check_output(output, overwrite, folder=True)
    text = read(data) if data is not None else None
    limits = {"max_kl": max_kl, "max_perplexity_increase": max_perplexity_increase}
    check_budget(sparsity, limits, method, with_text=text is not None)
    check_formats(weights, output_weights, gptq, with_text=text is not None)
    blocks = gguf_blocks(gguf) if gguf is not None else {}
    from deadband.app.models import save_model
    from deadband.calibration.calibration import Calibration, second_moments_of
    from deadband.evaluation.speed import model_bytes
    from deadband.quantization.hessians import input_hessians
    from deadband.sparsify.sparsify import sparsify_

    statistics = Calibration.load(calibration)
    network, tokenizer = load(model, dtype, device, threads, for_text=text is not None)
    batches = windows_of(tokenizer, text, tokens, window) if text is not None else None
    passes: dict[str, Any] = {} if batches is None else {"model": network, "batches": batches}
    thresholds = statistics.allocate(sparsity, method, **limits, **passes)
    dense_bytes = model_bytes(network)
    sparsify_(
        network,
        thresholds,
        weights=chosen_weights(network, list(thresholds), weights, blocks),
        output_layer=output_weights or True,
        second_moments=second_moments_of(statistics),
        hessians=input_hessians(network, batches, thresholds) if gptq and batches is not None else None,
        progress=True,
    )
    save_model(network, tokenizer, output)
    show(*sparsified(network, thresholds, output, dense_bytes), as_json)


def check_budget(sparsity: float | None, limits: dict[str, float | None], method: str, *, with_text: bool) -> None:
    """Whether there is one budget or quality to allocate for, and a text if it takes one."""
    from deadband.allocation.fit import check_method
    from deadband.allocation.thresholds import check_sparsity

    if [sparsity, *limits.values()].count(None) != 2:
        raise ValueError("pass exactly one of --sparsity, --max-kl and --max-perplexity-increase")
    if sparsity is not None:
        check_sparsity(sparsity)
    if not with_text and (sparsity is None or check_method(method) in ("greedy", "sensitivity")):
        raise ValueError("this runs the model on text: pass --data FILE as well")


def check_formats(weights: str | None, output_weights: str | None, gptq: bool, *, with_text: bool) -> None:
    """Whether the formats are known, and GPTQ has what it needs."""
    from deadband.layers.formats import WeightFormat

    for form in (weights, output_weights):
        if form is not None:
            WeightFormat.parse(form)
    if gptq and (weights is None or not with_text):
        raise ValueError("--gptq goes with --weights, and runs the model on text: pass --data FILE as well")


def sparsified(network: Any, thresholds: Any, output: Path, dense_bytes: int) -> tuple[dict[str, Any], str]:
    """What became of a model, as figures and as text."""
    from deadband.evaluation.speed import model_bytes
    from deadband.layers.experts import with_projections
    from deadband.layers.quantized import QuantizedMatrix

    formats = {
        name: each.weight_format for name, each in with_projections(network) if isinstance(each, QuantizedMatrix)
    }
    size = model_bytes(network)
    figures = {
        "output": str(output),
        "sparsity": thresholds.sparsity,
        "method": thresholds.method,
        "reason": thresholds.reason,
        "corrected": thresholds.corrected,
        "thresholds": {name: rule.threshold for name, rule in thresholds.items()},
        "weights": formats,
        "dense_bytes": dense_bytes,
        "bytes": size,
    }
    counted = ", ".join(f"{form} ({count})" for form, count in Counter(formats.values()).items())
    stored = f"\nweights: {counted}; {dense_bytes / 1e6:.1f} MB became {size / 1e6:.1f} MB" if formats else ""
    note = "thresholds are from dense activations; --data corrects them on the sparse model"
    return figures, f"{thresholds}{stored}\n\nwritten to {output}" + ("" if thresholds.corrected else f"\n{note}")


@app.command()
def generate(
    model: given.Model,
    prompt: given.Prompt,
    max_new_tokens: given.NewTokens = 64,
    compile: given.CompileFirst = None,
    dtype: given.Dtype = "auto",
    device: given.Device = "cpu",
    threads: given.Threads = None,
    as_json: given.Json = False,
) -> None:
    """Continue a prompt, greedily."""
    if not prompt:
        raise ValueError("the prompt is empty; expected some text to continue")
    prompt = argument_text("the prompt", prompt)
    network, tokenizer = load(model, dtype, device, threads)
    from deadband.layers.sites import sparse_sites
    from deadband.sparsify.report import sparsity

    inputs = tokenizer(prompt, return_tensors="pt").to(network.device)
    compiled = compile if compile is not None else max_new_tokens >= given.COMPILED_TOKENS
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
    model: given.Model,
    data: given.JudgedData = None,
    protocol: given.Protocol = "all",
    prompt_tokens: given.PromptTokens = None,
    continuations: given.Continuations = 0,
    max_new_tokens: given.ContinuedTokens = 256,
    tasks: given.Tasks = None,
    include_path: given.IncludePath = None,
    limit: given.Limit = None,
    tokens: given.Tokens = 8192,
    window: given.Window = 512,
    dtype: given.Dtype = "auto",
    device: given.Device = "cpu",
    threads: given.Threads = None,
    as_json: given.Json = False,
) -> None:
    """Quality beside the dense model: perplexity, KL and agreement on a text (--data), and tasks (--tasks)."""
    if data is None and tasks is None:
        raise ValueError("there is nothing to judge on; give --data FILE, --tasks A,B, or both")
    if continuations and data is None:
        raise ValueError("--continue continues windows of a text; give --data FILE too")
    names = task_names(tasks, include_path, limit)
    text = read(data) if data is not None else None
    check_prompt(protocol, prompt_tokens, window, continuations)
    if names:
        require_harness()
    network, tokenizer = load(model, dtype, device, threads, for_text=True)
    from deadband.layers.sites import sparse_sites

    if (names or continuations) and not sparse_sites(network):
        raise ValueError(f"{model!r} is a dense model; --tasks and --continue compare a sparse one with its dense form")
    figures: dict[str, Any] = {}
    shown = []
    if text is not None:
        windows = windows_of(tokenizer, text, tokens, window)
        judged, table = quality_of(network, windows, protocol, prompt_tokens)
        figures |= judged
        shown.append(table)
        if continuations:
            beginnings = [each["input_ids"][:, : prompt_tokens or window // 2] for each in windows[:continuations]]
            figures["generation"], written = continuations_of(network, tokenizer, beginnings, max_new_tokens)
            shown.append(written)
    if names:
        from deadband.integrations.lm_eval import run_tasks, tasks_table

        figures["tasks"] = run_tasks(network, tokenizer, names, limit=limit, include_path=include_path)
        shown.append(tasks_table(figures["tasks"]))
    show(figures, "\n\n".join(shown), as_json)


def task_names(tasks: str | None, include_path: Path | None, limit: int | None) -> list[str]:
    """The names in --tasks; an error if there are none in it, or if what goes with it is wrong."""
    names = listed(tasks) if tasks is not None else []
    if tasks is not None and not names:
        raise ValueError("--tasks is empty; expected names of tasks, separated by commas")
    if tasks is None and (include_path is not None or limit is not None):
        raise ValueError("--include-path and --limit go with --tasks")
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"there is no folder {str(include_path)!r} to look for tasks in")
    return names


def is_split(protocol: str) -> bool:
    """Whether a window is a dense prompt and a sparse continuation under this protocol."""
    from deadband.evaluation.quality import PROTOCOLS, protocol_name

    return protocol_name(protocol) == PROTOCOLS["dense-prompt"]


def check_prompt(protocol: str, prompt_tokens: int | None, window: int, continuations: int) -> None:
    """Whether the protocol is known and --prompt-tokens goes with it."""
    split = is_split(protocol)
    if prompt_tokens is not None and not split and not continuations:
        raise ValueError("--prompt-tokens goes with --protocol dense-prompt and with --continue")
    if prompt_tokens is not None and prompt_tokens > (window - 2 if split else window):
        raise ValueError(f"--prompt-tokens {prompt_tokens} is too long for a window of {window} tokens")


def require_harness() -> None:
    """Whether --tasks can run."""
    from deadband.integrations.lm_eval import require_lm_eval

    try:
        require_lm_eval()
    except ImportError as error:  # a user's mistake like any other
        raise ValueError(str(error)) from None


def quality_of(
    network: Any, windows: list[Any], protocol: str, prompt_tokens: int | None
) -> tuple[dict[str, Any], str]:
    """The quality on some windows, as figures and as a table."""
    import dataclasses

    from deadband.evaluation import quality

    length = prompt_tokens if is_split(protocol) else None
    result = quality.evaluate(network, windows, protocol=protocol, prompt_tokens=length)
    return dataclasses.asdict(result), result.table()


def continuations_of(
    network: Any, tokenizer: Any, beginnings: list[Any], max_new_tokens: int
) -> tuple[dict[str, Any], str]:
    """What both forms of a model write, as figures and as text."""
    import dataclasses

    from deadband.evaluation.generation import compare_generation

    written = compare_generation(network, tokenizer, beginnings, max_new_tokens=max_new_tokens)
    return dataclasses.asdict(written), f"{written}\n\n{written.texts()}"


@app.command()
def bench(
    model: given.Model,
    tokens: given.DecodedTokens = 32,
    compile: given.CompileSparse = True,
    break_even: given.BreakEven = True,
    dtype: given.Dtype = "auto",
    device: given.Device = "cpu",
    threads: given.Threads = None,
    as_json: given.Json = False,
) -> None:
    """Decoding speed of a model as it is, and of the same weights dense in transformers."""
    network, tokenizer = load(model, dtype, device, threads)
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
    model: given.Model,
    data: given.SweptData,
    output: given.SweepOutput,
    calibration_data: given.CalibrationData = None,
    html: given.Html = None,
    methods: given.Methods = "teal-uniform,wina,wina-threshold,cats,auto",
    budgets: given.Budgets = "0.25,0.4,0.5",
    windows: given.Windows = 16,
    window: given.Window = 512,
    tokens: given.CalibrationTokens = 8192,
    prompt: given.SweptPrompt = None,
    protocol: given.Protocol = "all",
    speed: given.Speed = True,
    dtype: given.Dtype = "auto",
    device: given.Device = "cpu",
    threads: given.Threads = None,
    overwrite: given.BeginAnew = False,
    as_json: given.Json = False,
) -> None:
    """Methods by budgets: quality, bytes and speed of each in one JSON, a table and an HTML page.

    After an interruption the same command goes on where it stopped. Exit code 1: a run failed; the others are there.
    """
    page = html if html is not None else output.with_suffix(".html")
    check_sweep_outputs(output, page, overwrite)
    prompt = argument_text("--prompt", prompt) if prompt is not None else None
    names, fractions = listed_runs(methods, budgets)
    text = read(data)
    calibration_text = read(calibration_data) if calibration_data is not None else None
    check_runs(names, fractions, protocol)
    network, tokenizer = load(model, dtype, device, threads, for_text=True)
    from deadband.evaluation import sweep as program
    from deadband.running.text import python_documentation

    calibration_text = calibration_text if calibration_text is not None else python_documentation()[0]
    figures = program.sweep(
        network,
        tokenizer,
        methods=names,
        budgets=fractions,
        calibration_windows=windows_of(tokenizer, calibration_text, tokens, window),
        windows=windows_of(tokenizer, text, windows * window, window),
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
    written = write_page(figures, output, page, as_json)
    show(figures, f"\n{program.table(figures)}\n\n{written}", as_json)
    if figures["failed"]:
        raise typer.Exit(1)


def check_sweep_outputs(output: Path, page: Path, overwrite: bool) -> None:
    """Find out before the work whether the JSON and the page can be written."""
    if page.absolute() == output.absolute():
        raise ValueError(f"the JSON and the page cannot both be {str(output)!r}; give another --html")
    check_output(output, overwrite=True)  # one that is no sweep is found out later, but before the work
    check_page(page, overwrite)


def listed(text: str) -> list[str]:
    """What a comma stands between."""
    return [each.strip() for each in text.split(",") if each.strip()]


def listed_runs(methods: str, budgets: str) -> tuple[list[str], list[float]]:
    """The names in --methods and the fractions in --budgets."""
    names = listed(methods)
    try:
        fractions = [float(budget) for budget in listed(budgets)]
    except ValueError:
        raise ValueError(f"--budgets {budgets!r}; expected fractions separated by commas, such as 0.25,0.4") from None
    if not names or not fractions:
        raise ValueError("--methods or --budgets is empty; expected at least one of each")
    return names, fractions


def check_runs(methods: list[str], budgets: list[float], protocol: str) -> None:
    """Whether methods, budgets and protocol are known, before the model is loaded."""
    from deadband.allocation.thresholds import check_sparsity
    from deadband.evaluation.methods import method_of
    from deadband.evaluation.quality import protocol_name

    protocol_name(protocol)
    for name in methods:
        method_of(name)
    for budget in budgets:
        check_sparsity(budget)


def write_page(figures: dict[str, Any], output: Path, page: Path, as_json: bool) -> str:
    """Write the page of a sweep; returns what is written where."""
    from deadband.evaluation.page import write_report

    try:
        write_report(figures, page)
    except ValueError as error:  # plotly is missing: no reason to lose the rest
        written = f"written to {output}; without the page: {error}. Then run the same command again: all runs are kept."
        if as_json:
            print(f"deadband: {written}", file=sys.stderr)
        return written
    return f"written to {output} and {page}"


@app.command()
def info(as_json: given.Json = False) -> None:
    """What runs here: versions, processor, kernels."""
    from deadband.ops import kernels, products
    from deadband.running.timing import machine

    slow_by = {str(dtype).removeprefix("torch."): round(products.slow_by(dtype), 1) for dtype in products.NARROW}
    figures = {**machine(), "available": kernels.available_isas(), "slow_by": slow_by, "gpus": gpus()}
    lines = [f"{name:13} {value}" for name, value in machine().items() if name != "kernels"]
    lines.append(f"{'kernels':13} {figures['kernels'] or kernels.MISSING}")
    if figures["available"]:
        lines.append(f"{'available':13} {', '.join(figures['available'])} (choose with DEADBAND_ISA)")
    times = ", ".join(f"{name} {times}" for name, times in slow_by.items())
    if figures["gpus"]:
        lines.append(f"{'gpus':13} {', '.join(figures['gpus'])}")
    lines.append(f"{'products':13} of torch, of many rows: {times} times as long as in float32")
    show(figures, "\n".join(lines), as_json)


def gpus() -> list[str]:
    """Each GPU that torch sees, and what runs there."""
    import torch

    from deadband.ops import gpu

    found = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        works = gpu.usable(torch.device("cuda", index))
        found.append(f"cuda:{index} {name}, {'kernels in Triton' if works else 'torch alone'}")
    return found


@app.command()
def demo(
    output: given.DemoOutput = Path("deadband-demo"), threads: given.Threads = None, as_json: given.Json = False
) -> None:
    """The whole flow on SmolLM2-135M: skipping, fewer bits, both; quality and speed in one table."""
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


def load_with_text(
    name: str, data: Path, tokens: int, window: int, dtype: str, device: str, threads: int | None
) -> tuple[Any, list[Any]]:
    """A model, and windows of the text of --data."""
    text = read(data)
    network, tokenizer = load(name, dtype, device, threads, for_text=True)
    return network, windows_of(tokenizer, text, tokens, window)


def windows_of(tokenizer: Any, text: str, tokens: int, window: int) -> list[Any]:
    """The first tokens of a text, in windows."""
    from deadband.running.text import token_windows

    return token_windows(tokenizer, text, tokens=tokens, window=window)


def load(name: str, dtype: str, device: str, threads: int | None, *, for_text: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer. What is to run many tokens tells where it does so in another dtype than the model's."""
    set_threads(threads)
    from deadband.app.models import load_model, load_tokenizer
    from deadband.ops import products

    network, tokenizer = load_model(name, dtype=dtype, device=device), load_tokenizer(name)
    if for_text and (note := products.note(network)):
        print(f"deadband: {note}", file=sys.stderr)
    return network, tokenizer


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
