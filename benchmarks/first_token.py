"""Time to the first token: a prompt read by whole models, deadband's of three widths, llama.cpp's and transformers'.

All of a width take turns in one process, prompt by prompt, with the same number of threads and the logits of the last
token alone. deadband's prompts go through `sparsify_`'d layers that skip nothing, as `generate` has it; quantised
models have float32 activations, and transformers is in bfloat16. llama.cpp reads up to 512 tokens at a time, as it
does by default.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import torch
from common import parser, save
from decode import GROUPS, RANDOM, REAL, gguf_of, llamacpp, load

import deadband
from deadband.layers.formats import empty_weight
from deadband.layers.sites import find_sites
from deadband.running.forward import threads
from deadband.running.greedy_decoding import GreedyDecoder
from deadband.running.timing import interleave, median


def ours(key: str, form: str | None) -> Any:
    """The model in one weight format, with float32 activations if it is quantised; a random one gets random codes."""
    model = load(key, form)
    sites = find_sites(model)
    weights: Any = form
    if form is not None and key in RANDOM:  # to quantise it would take a minute
        weights = {name: empty_weight(*model.get_submodule(name).weight.shape, form) for name in sites}
        for each in weights.values():
            each.codes.random_(0, 127)
            each.scales.fill_(1e-4)
            if each.minimum is not None:
                each.minimum.fill_(-8e-4)
    output = True if form is None else "int8"
    model = deadband.sparsify_(model, dict.fromkeys(sites, 0.0), weights=weights, output_layer=output)
    return model if form is None else model.to(torch.float32)


def measure(key: str, group: str, options: Any) -> list[dict[str, Any]]:
    """Every reader of one width, with each length of prompt and number of threads."""
    name, (formats, kinds) = (REAL.get(key) or RANDOM[key])[0], GROUPS[group]
    eager, model = load(key), ours(key, formats[0])
    rival, llama = f"llama.cpp {kinds[0]}", None
    if llamacpp is not None:
        llama = llamacpp.LlamaCpp(gguf_of(key, eager, kinds[0]), max(options.threads), context=max(options.tokens))
    rows = []
    for count, length in itertools.product(options.threads, options.tokens):
        prompt = torch.randint(3, 40000, (1, length), generator=torch.Generator().manual_seed(0))
        readers: dict[str, Callable[[], Any]] = {
            "transformers": lambda prompt=prompt: GreedyDecoder(eager, prompt),
            f"deadband {group}": lambda prompt=prompt: GreedyDecoder(model, prompt),
        }
        if llama is not None:
            llama.set_threads(count)
            readers[rival] = lambda prompt=prompt: llama.prefill(prompt[0])
        with threads(count):
            times = interleave(readers, rounds=options.rounds, warmup=1, what=f"{name}, {group}, {length} tokens")
        seconds = {label: median(each) for label, each in times.items()}
        for label, one in seconds.items():
            rows.append({
                "model": name, "group": group, "reader": label, "tokens": length, "threads": count, "seconds": one,
                "tokens_per_second": length / one, "against_transformers": seconds["transformers"] / one,
                "against_llama_cpp": seconds[rival] / one if llama is not None else None,
            })  # fmt: skip
            _show(rows[-1])
    if llama is not None:
        llama.close()
    return rows


def _show(row: dict[str, Any]) -> None:
    print(f"{row['group']:6}{row['reader']:16}{row['tokens']:7}{row['threads']:8}{row['seconds'] * 1e3:9.0f}"
          f"{row['tokens_per_second']:10.0f}{row['against_transformers']:14.2f}x"
          f"{row['against_llama_cpp'] or float('nan'):10.2f}x", flush=True)  # fmt: skip


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", choices=[*REAL, *RANDOM], default=["smollm2", "llama-1b"])
    made.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    made.add_argument("--tokens", type=int, nargs="+", default=[128, 512], help="lengths of the prompt")
    made.set_defaults(rounds=5)
    options = made.parse_args()
    for key in options.models:
        print(f"{key}\n{'':6}{'reader':16}{'tokens':>7}{'threads':>8}{'ms':>9}{'tokens/s':>10}{'/transformers':>15}"
              f"{'/llama.cpp':>11}")  # fmt: skip
        for group in options.groups:
            rows = measure(key, group, options)
            gc.collect()
            save(f"first_token-{key}", rows, keys=("group", "reader", "tokens", "threads"))


if __name__ == "__main__":
    main()
