"""Decoding, end to end: transformers, deadband in three weight formats at four sparsities, and llama.cpp, side by side.

All decoders of a group live in one process and take turns, token by token, with the same number of threads. A group is
a width of weights, with transformers' eager bfloat16 model in each, and for real models every file of llama.cpp's, so
that ratios are of one run; for large models the groups do not fit into memory together.

SmolLM2-135M and Gemma 3 270M are real: their thresholds are calibrated on Python's documentation (`sensitivity`), and
each row has its perplexity and its KL to the float32 model on the text given by --data, every token sparse. The Llamas
of 1 B and 3 B parameters have the shapes of Llama 3.2 and random weights: only their speed means something. `lm_head`
skips nothing and has 8 bits at least, except in the rows with a plus, where it is a site like the others. *Mixed*: the
sites that 8 bits would cost too much are float32.

Needs the extras gguf and llama (llama.cpp); without the last its rows are left out. figures.py draws what is found.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from common import parser, save
from figures import RIVALS
from shapes import random_llama
from torch import Tensor

import deadband
from deadband.app.models import GEMMA3, SMOLLM2, gemma3, load_model, load_tokenizer, smollm2
from deadband.decoding.compiler_paths import any_folder
from deadband.evaluation.speed import bytes_per_token
from deadband.files import cache_folder, write_json
from deadband.layers.sites import find_sites
from deadband.ops import kernels
from deadband.running.divergence import divergence
from deadband.running.forward import cache_argument, evaluating, progress_bar, threads
from deadband.running.greedy_decoding import GreedyDecoder
from deadband.running.text import python_documentation, read_text, token_windows
from deadband.running.timing import interleave, median

try:
    import llamacpp
except ImportError:
    llamacpp = None  # type: ignore[assignment]

REAL = {"smollm2": (SMOLLM2, smollm2), "gemma3": (GEMMA3, gemma3)}
RANDOM = {"llama-1b": ("Llama 1B random", "1b"), "llama-3b": ("Llama 3B random", "3b")}
LEVELS = (0.0, 0.25, 0.4, 0.5)
# weights of ours (None: bfloat16 as they are; random models: the first alone) and llama.cpp's of the same width
GROUPS: dict[str, tuple[Sequence[str | None], Sequence[str]]] = {
    "bf16": ((None,), RIVALS["bf16"]),
    "int8": (("int8", "int8-g32"), RIVALS["int8"]),
    "int4": (("int4", "int4-g32-zp"), RIVALS["int4"]),
}
MIXED_KL = 5e-5  # of the sites: llama.cpp's BF16 has 8e-5 on Gemma, and the output layer 2e-5
PROMPT_TOKENS = 64


class CompiledDecoder:
    """transformers as its documentation advises for speed: a static cache and a compiled forward."""

    def __init__(self, model: Any, prompt: Tensor, context: int) -> None:
        from transformers import StaticCache

        self.cache = {cache_argument(model): StaticCache(model.config, max_cache_len=context)}
        self.length = prompt.shape[-1]
        with evaluating(model):
            output = model(prompt, **self.cache, cache_position=torch.arange(self.length))
        self.token = output.logits[:, -1:].argmax(-1)
        self.forward = torch.compile(model.forward, fullgraph=True)
        with any_folder():
            self.step()

    def step(self) -> None:
        """Decode one token."""
        position = torch.tensor([self.length])
        with torch.no_grad():
            output = self.forward(self.token, **self.cache, cache_position=position, position_ids=position.unsqueeze(0))
        self.token = output.logits[:, -1:].argmax(-1).clone()
        self.length += 1


def load(key: str, weights: str | None = None) -> Any:
    """The bfloat16 model; a real one that will be quantised in float32: bfloat16 rounds buffers too."""
    if key in RANDOM:
        return random_llama(RANDOM[key][1])
    return load_model(REAL[key][1](), dtype="bfloat16" if weights is None else "float32")


def sharing_copy(model: Any, own: Tensor | None = None) -> Any:
    """A copy of a model with the very same weights in memory, except `own`, but thresholds of its own."""
    large = [each for each in (*model.parameters(), *model.buffers()) if each.dim() > 1 and each is not own]
    return copy.deepcopy(model, {id(each): each for each in large})


def ours(key: str, weights: str | None) -> dict[str, Any]:
    """Sparse models of one weight format by label, one for each level; they share their weights."""
    label, model = f"deadband {weights or 'bf16'} at ", load(key, weights)
    levels = {f"{label}{level:.0%}": thresholds(key, level, model) for level in LEVELS[1:]}
    output = output_calibration(key, model)
    second_moments = None
    if key in REAL:
        second_moments = {
            **deadband.quantization.second_moments_of(calibration(key)),
            **deadband.quantization.second_moments_of(output),
        }
    sites = find_sites(model)
    base = deadband.sparsify_(
        model, dict.fromkeys(sites, 0.0), weights=weights, second_moments=second_moments, progress=True
    )
    if weights is None:
        whole = sharing_copy(base, base.lm_head.weight)  # which becomes a site there, and is laid out anew
    else:
        base.to(torch.float32)  # of activations: what llama.cpp has too, and nothing large is left to convert
        shared = {name: base.get_submodule(name).quantized() for name in sites}
        whole = deadband.sparsify_(
            load(key, weights), dict.fromkeys([*sites, "lm_head"], 0.0), weights={**shared, "lm_head": weights},
            second_moments=second_moments,
        ).to(torch.float32)  # fmt: skip
        for name, weight in shared.items():
            whole.get_submodule(name).codes = weight.codes  # each layer has made a copy of its own
    made = {name: deadband.sparsify_(sharing_copy(base), chosen) for name, chosen in levels.items()}
    most = f"{label}{LEVELS[-1]:.0%}"
    rules = {**levels[most].rules, **output.allocate(LEVELS[-1], "uniform").rules}
    return {f"{label}0%": base, **made, f"{most}+": deadband.sparsify_(whole, rules)}


def mixed(key: str) -> dict[str, Any]:
    """A real model of which as much is quantised as costs no more than MIXED_KL; the rest stays float32."""
    file = cache_folder() / "benchmarks" / f"{key}-mixed.json"
    if not file.is_file():
        dense, batches = _for_calibration(key)
        batches = [{"input_ids": batches[0]["input_ids"][:, :256]}]
        write_json(file, deadband.mixed_precision.choose_formats(dense, batches, MIXED_KL, progress=True))
    model = load(key, "int8-g32")
    model = deadband.sparsify_(
        model, dict.fromkeys(find_sites(model), 0.0), weights=json.loads(file.read_bytes()), output_layer="int8-g32"
    )
    return {"deadband int8-g32, mixed": model}


def calibration(key: str) -> Any:
    """Of a real model, kept from run to run."""
    return _kept(f"{key}-calibration", deadband.Calibration, lambda: deadband.calibrate(*_for_calibration(key)))


def thresholds(key: str, level: float, model: Any) -> Any:
    """Real models: `sensitivity`, kept from run to run. Random ones: uniform."""
    if key in REAL:

        def allocate() -> Any:
            dense, batches = _for_calibration(key)
            return calibration(key).allocate(level, "sensitivity", model=dense, batches=batches)

        return _kept(f"{key}-{level}-sensitivity", deadband.allocation.thresholds.Thresholds, allocate)
    batches = _random_batches()
    return deadband.calibrate(model, batches).allocate(level, "uniform", model=model, batches=batches)


def output_calibration(key: str, model: Any) -> Any:
    """Of `lm_head` alone."""
    if key in REAL:
        return _kept(f"{key}-lm_head-calibration", deadband.Calibration,
                     lambda: deadband.calibrate(*_for_calibration(key), include="lm_head"))  # fmt: skip
    return deadband.calibrate(model, _random_batches(), include="lm_head")


def _random_batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 128256, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids}]


def _for_calibration(key: str) -> tuple[Any, list]:
    folder = REAL[key][1]()
    tokenizer = load_tokenizer(folder)
    batches = token_windows(tokenizer, python_documentation()[0], tokens=8192, window=512)
    return load_model(folder, dtype="float32"), batches


def _kept(name: str, kind: Any, make: Callable[[], Any]) -> Any:
    path = cache_folder() / "benchmarks" / f"{name}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        make().save(path)
    return kind.load(path)


class Quality:
    """Perplexity and KL to the float32 model, on windows of text, every token sparse."""

    def __init__(self, key: str, options: Any) -> None:
        folder = REAL[key][1]()
        tokenizer = load_tokenizer(folder)
        text = read_text(options.data) if options.data else python_documentation()[1]
        self.windows = token_windows(tokenizer, text, tokens=512 * options.windows, window=512)
        self.reference = load_model(folder, dtype="float32")

    def judge(self, logits: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, dict[str, float]]:
        """`kl`, its standard error over windows and `perplexity` of each candidate, window by window."""
        kl: dict[str, list[float]] = {name: [] for name in logits}
        loss: dict[str, list[float]] = {name: [] for name in logits}
        for window in progress_bar(self.windows, "quality", True):
            ids = window["input_ids"]
            expected = _logits(self.reference, ids).log_softmax(-1)
            for name, run in logits.items():
                got = run(ids).float().log_softmax(-1)
                kl[name].append(float(divergence(expected, got).mean()))
                loss[name].append(-float(got[:-1].gather(-1, ids[0, 1:, None]).mean()))
        return {
            name: {
                "kl": sum(kl[name]) / len(kl[name]),
                "kl_error": stdev(kl[name]) / math.sqrt(len(kl[name])) if len(kl[name]) > 1 else math.nan,
                "perplexity": math.exp(sum(loss[name]) / len(loss[name])),
            }
            for name in logits
        }


def _logits(model: Any, ids: Tensor) -> Tensor:
    with evaluating(model):
        return model(ids).logits[0].float()


def _sparse_logits(model: Any, ids: Tensor) -> Tensor:
    with deadband.sparse_prefill(model):
        return _logits(model, ids)


def measure(key: str, group: str, quality: Quality | None, options: Any) -> list[dict[str, Any]]:
    """All decoders of one width, taking turns, with each number of threads."""
    name = (REAL.get(key) or RANDOM[key])[0]
    formats, kinds = GROUPS[group]
    eager = load(key)
    tokens = (120 if key in REAL else 24) * options.rounds
    context = PROMPT_TOKENS + (tokens + 8) * len(options.threads)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, eager.config.get_text_config().vocab_size - 8, (1, PROMPT_TOKENS), generator=generator)
    steps: dict[str, Callable[[], Any]] = {"transformers": GreedyDecoder(eager, prompt).step}
    logits: dict[str, Callable[[Tensor], Tensor]] = {"transformers": lambda ids: _logits(eager, ids)}
    size = {"transformers": bytes_per_token(eager)}
    if group == "bf16" and not options.no_compile:
        steps["transformers, compiled"] = CompiledDecoder(eager, prompt, context).step
        size["transformers, compiled"] = size["transformers"]
    models: dict[str, Any] = {}
    made: dict[str, Any] = {}
    for weights in formats if key in REAL else formats[:1]:
        made |= ours(key, weights)
    if key in REAL and group == "bf16":
        made |= mixed(key)
    for label, model in made.items():
        models[label] = deadband.prepare_decode_(model)
        steps[label] = GreedyDecoder(model, prompt).step
        logits[label] = lambda ids, model=model: _sparse_logits(model, ids)
    llamas: dict[str, Any] = {}
    if key in REAL:  # all of llama.cpp's beside each width: the frontier compares within a run
        kinds = [*kinds, *(kind for _, others in GROUPS.values() for kind in others if kind not in kinds)]
    for kind in kinds if llamacpp is not None else ():
        path = gguf_of(key, eager, kind)
        llama = llamas[f"llama.cpp {kind}"] = llamacpp.LlamaCpp(path, max(options.threads), context=max(context, 640))
        size[f"llama.cpp {kind}"] = sum(llamacpp.tensor_types(path).values())
        logits[f"llama.cpp {kind}"] = lambda ids, llama=llama: torch.from_numpy(llama.logits(ids))
    judged = quality.judge(logits) if quality is not None else {}
    rows = []
    print(f"{name}, {group}\n{HEAD}")
    for count in options.threads:
        with threads(count):
            for label, llama in llamas.items():
                llama.set_threads(count)
                llama.prefill(prompt[0])
                steps[label] = llama.step
            for model in models.values():
                deadband.sparsity(model, reset=True, warn=False)
            times = interleave(steps, rounds=tokens, what=f"{name}, {group}, {count} threads")
            bandwidth = kernels.read_bandwidth()
        about = {"model": name, "group": group, "threads": count}
        seconds = {label: median(each) for label, each in times.items()}
        for label in times:
            figures = _figures(label, seconds, next(iter(llamas), None), bandwidth, models.get(label), size.get(label))
            rows.append({**about, **figures, **judged.get(label, {})})
            _show(rows[-1])
    for llama in llamas.values():
        llama.close()
    return rows


HEAD = (
    f"{'decoder':24}{'threads':>8}{'sparsity':>9}{'tokens/s':>10}{'/transformers':>14}"
    f"{'/llama.cpp':>11}{'MB/token':>10}{'of bandwidth':>13}{'KL':>9}{'perplexity':>11}"
)


def _show(row: dict[str, Any]) -> None:
    print(f"{row['decoder']:24}{row['threads']:8}{row['sparsity']:9.1%}{row['tokens_per_second']:10.1f}"
          f"{row['against_transformers']:13.2f}x{row['against_llama_cpp']:10.2f}x{row['bytes_per_token'] / 1e6:10.0f}"
          f"{row['of_bandwidth']:13.0%}{row.get('kl', math.nan):9.4f}{row.get('perplexity', math.nan):11.2f}",
          flush=True)  # fmt: skip


def _figures(
    label: str, seconds: dict[str, float], rival: str | None, bandwidth: float, model: Any, size: int | None
) -> dict[str, Any]:
    """Of one decoder, by seconds a token of each; `model` is ours, `size` the bytes that another's token reads."""
    one = seconds[label]
    read = bytes_per_token(model) if size is None else size
    return {
        "decoder": label,
        "sparsity": 0.0 if model is None else deadband.sparsity(model, warn=False).total,
        "tokens_per_second": 1 / one,
        "against_transformers": seconds["transformers"] / one,
        "against_llama_cpp": seconds[rival] / one if rival else math.nan,
        "bytes_per_token": read,
        "of_bandwidth": read / one / bandwidth,
        "read_bandwidth": bandwidth,
    }


def _file_name(key: str) -> str:
    return {"smollm2": "SmolLM2-135M", "gemma3": "gemma-3-270m"}.get(key, f"{key}-random")


def gguf_of(key: str, model: Any, kind: str) -> Path:
    """A model's GGUF of one of llama.cpp's types, kept from run to run."""
    path = llamacpp.gguf_path(_file_name(key))
    if not path.is_file():
        llamacpp.write_gguf(model, path)
    return llamacpp.quantize(path, llamacpp.gguf_path(_file_name(key), kind), kind)


def frontier(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At each llama.cpp point ours that is as close to the float32 model and beats it by the most in one run.

    Where none is as close, `decoder`, `kl` and `ratio` are None.
    """
    points: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["decoder"].startswith("llama.cpp"):
            near = [each for each in rows if each["decoder"].startswith("deadband") and each["kl"] <= row["kl"]]
            near = [each for each in near if (each["threads"], each["group"]) == (row["threads"], row["group"])]
            best = max(near, key=lambda each: each["tokens_per_second"], default=None)
            point = {"rival": row["decoder"], "rival_kl": row["kl"], "threads": row["threads"]}
            point |= {key: best and best[key] for key in ("decoder", "kl")}
            point["ratio"] = best and best["tokens_per_second"] / row["tokens_per_second"]
            points.setdefault((row["decoder"], row["threads"]), []).append(point)
    return [max(found, key=lambda point: point["ratio"] or 0.0) for found in points.values()]


def print_frontier(rows: Sequence[dict[str, Any]]) -> None:
    for point in frontier(rows):
        found = "none is as close"
        if point["decoder"] is not None:
            found = f"{point['decoder']}, KL {point['kl']:.4f}: {point['ratio']:.2f}x"
        print(f"{point['threads']} threads, {point['rival']}, KL {point['rival_kl']:.4f}; at its KL: {found}")


def data_name(data: Path | None) -> str:
    """What a text to judge on is called in the results."""
    return "/".join(data.parts[-2:]) if data else "Python's documentation"


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", choices=[*REAL, *RANDOM], default=["smollm2", "gemma3", "llama-1b"])
    made.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    made.add_argument("--data", type=Path, help="a UTF-8 text file to judge quality on")
    made.add_argument("--windows", type=int, default=8, help="windows of 512 tokens to judge on")
    made.add_argument("--no-compile", action="store_true", help="leave out transformers with torch.compile")
    options = made.parse_args()
    settings = {
        "judged_on": f"{options.windows} windows of 512 tokens of {data_name(options.data)}",
        "llama-cpp-python": llamacpp and importlib.metadata.version("llama-cpp-python"),
    }
    for key in options.models:
        rows: list[dict[str, Any]] = []
        quality = Quality(key, options) if key in REAL else None
        for group in options.groups:
            rows += measure(key, group, quality, options)
            gc.collect()
            about = {"settings": settings if quality is not None else {**settings, "judged_on": None}}
            if quality is not None:
                about["frontier"] = frontier(rows)
            keys = ("group", "decoder", "threads") if quality is None else ()  # the frontier compares within a run
            save(f"decode-{key}", rows, keys=keys, **about)  # what there is, should the next be stopped
        if quality is not None:
            print_frontier(rows)


if __name__ == "__main__":
    main()
