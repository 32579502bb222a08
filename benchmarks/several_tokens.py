"""Several tokens of one sequence at once, as speculative decoding has them verified: the time over that of one token.

Whole models that skip nothing, prepared with `prepare_decode_(model, tokens=8)`; the numbers of tokens take turns in
one process. After each step the cache is cropped to the prompt.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from common import parser, save
from decode import GROUPS, PROMPT_TOKENS, RANDOM, REAL
from first_token import ours

import deadband
from deadband.decoding import is_prepared
from deadband.running.forward import cache_argument, cache_of, evaluating, threads
from deadband.running.timing import interleave, median

TOKENS = (1, 2, 4, 8)


def measure(key: str, group: str, options: Any) -> list[dict[str, Any]]:
    """Every number of tokens in one width, with each number of threads."""
    model = deadband.prepare_decode_(ours(key, GROUPS[group][0][0]), tokens=max(TOKENS))
    assert is_prepared(model)
    prompt = torch.randint(3, 40000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        cache = cache_of(model(prompt, use_cache=True))

    def step(tokens: int) -> Callable[[], None]:
        def run() -> None:
            with evaluating(model):
                model(prompt[:, :tokens], use_cache=True, **{cache_argument(model): cache})
            cache.crop(-tokens)

        return run

    rows = []
    for count in options.threads:
        with threads(count):
            times = interleave({str(tokens): step(tokens) for tokens in TOKENS}, rounds=9 * options.rounds, warmup=2,
                               what=f"{key}, {group}, {count} threads")  # fmt: skip
        seconds = {tokens: median(times[str(tokens)]) for tokens in TOKENS}
        for tokens, one in seconds.items():
            rows.append({"model": (REAL.get(key) or RANDOM[key])[0], "group": group, "tokens": tokens, "threads": count,
                         "seconds": one, "against_one": one / seconds[1]})  # fmt: skip
            print(f"{group:6}{count:8}{tokens:7}{one * 1e3:9.1f}{one / seconds[1]:8.2f}x", flush=True)
    return rows


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", choices=[*REAL, *RANDOM], default=["smollm2", "llama-1b"])
    made.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    options = made.parse_args()
    for key in options.models:
        print(f"{key}\n{'':6}{'threads':>8}{'tokens':>7}{'ms':>9}{'/one':>9}")
        for group in options.groups:
            rows = measure(key, group, options)
            gc.collect()
            save(f"several_tokens-{key}", rows, keys=("group", "tokens", "threads"))


if __name__ == "__main__":
    main()
