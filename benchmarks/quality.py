"""KL to the dense model of `greedy` against `uniform`, SmolLM2-135M, every token sparse.

Calibrated on Python's documentation; judged on the text given by --data (wikitext-2's validation part for the published
figures) or else on the other half of the documentation. In float32: the figures show the method and no rounding.
"""

from __future__ import annotations

import time
from pathlib import Path

from common import parser, save

import deadband
from deadband.allocation import allocate
from deadband.evaluation import dense_logits, evaluate
from deadband.models import load_model, load_tokenizer, smollm2
from deadband.text import python_documentation, read_text, token_windows

BUDGETS = [0.25, 0.4, 0.5]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="a UTF-8 text file to judge on")
    made.add_argument("--windows", type=int, default=16, help="windows of 512 tokens to judge on")
    options = made.parse_args()
    folder = smollm2()
    model, tokenizer = load_model(folder, dtype="float32"), load_tokenizer(folder)
    halves = python_documentation()
    batches = token_windows(tokenizer, halves[0], tokens=8192, window=512)
    text = read_text(options.data) if options.data else halves[1]
    windows = token_windows(tokenizer, text, tokens=512 * options.windows, window=512)
    judged_on = options.data.name if options.data else "pydoc"

    start = time.perf_counter()
    calibration = deadband.calibrate(model, batches)
    seconds = {"calibrate": time.perf_counter() - start}
    allocated = {}
    for method in ("uniform", "greedy"):
        start = time.perf_counter()
        allocated[method] = allocate(calibration, BUDGETS, method, model=model, batches=batches)
        seconds[method] = time.perf_counter() - start
    reference = dense_logits(model, windows)
    print(f"calibrated on pydoc, judged on {judged_on}, {len(windows)} windows of 512 tokens")
    print(
        f"{'method':9}{'asked':>7}{'achieved':>10}{'perplexity':>12}{'dense':>9}{'KL':>9}{'/uniform':>10}{'top-1':>8}"
    )
    rows, uniform = [], {}
    for method, thresholds in allocated.items():
        for each in thresholds:
            deadband.sparsify_(model, each)
            result = evaluate(model, windows, reference=reference)
            uniform.setdefault(each.sparsity, result.kl)
            rows.append(
                {
                    "method": method,
                    "asked": each.sparsity,
                    "sparsity": result.sparsity,
                    "perplexity": result.perplexity,
                    "dense_perplexity": result.dense_perplexity,
                    "kl": result.kl,
                    "against_uniform": result.kl / uniform[each.sparsity],
                    "agreement": result.agreement,
                    "judged_on": judged_on,
                }
            )
            print(f"{method:9}{each.sparsity:7.0%}{result.sparsity:10.1%}{result.perplexity:12.3f}"
                  f"{result.dense_perplexity:9.3f}{result.kl:9.4f}{rows[-1]['against_uniform']:9.2f}x"
                  f"{result.agreement:8.1%}", flush=True)  # fmt: skip
    print("   ".join(f"{what} {value:.0f} s" for what, value in seconds.items()))
    save("quality", {"figures": rows, "seconds": seconds})


if __name__ == "__main__":
    main()
