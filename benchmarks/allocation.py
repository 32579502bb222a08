"""Seconds of calibrating SmolLM2-135M and allocating by sensitivity, on 8,192 tokens, beside greedy on as many.

Greedy is run on some of the blocks, and its time multiplied: every block has the same shapes and the same number of
steps. It compares outputs on all tokens, as the paper does; deadband's default is 512. With --full it also tries every
site at every step, as the paper does, where deadband leaves out those whose last figure was far from the best.
"""

from __future__ import annotations

import time

from common import parser, save

import deadband
from deadband.allocation import greedy
from deadband.allocation.budget import allocate_budgets
from deadband.app.models import load_model, load_tokenizer, smollm2
from deadband.running.forward import threads
from deadband.running.text import python_documentation, token_windows

BLOCKS = (4, 15, 26)


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(threads=[2])
    made.add_argument("--dtype", default="float32")
    made.add_argument("--full", action="store_true", help="greedy as in the paper, on one block")
    options = made.parse_args()
    blocks_tried = BLOCKS[1:2] if options.full else BLOCKS
    if options.full:
        greedy._SLACK = 0.0  # never far enough from the best to be left out
    model, tokenizer = load_model(smollm2(), dtype=options.dtype), load_tokenizer(smollm2())
    batches = token_windows(tokenizer, python_documentation()[0], tokens=8192, window=512)
    rows = []
    for count in options.threads:
        with threads(count):
            start = time.perf_counter()
            calibration = deadband.calibrate(model, batches)
            calibrated = time.perf_counter() - start
            start = time.perf_counter()
            allocate_budgets(calibration, [0.5], "sensitivity", model=model, batches=batches)
            sensitivity = time.perf_counter() - start
            part = deadband.calibrate(model, batches, include=[f"model.layers.{block}.*" for block in blocks_tried])
            start = time.perf_counter()
            greedy.greedy_shares(part, [0.5], model, batches, 0.05, 8192, True)
            blocks = time.perf_counter() - start - calibrated  # its first pass over the model is about a calibration
        whole = calibrated + blocks / len(blocks_tried) * model.config.num_hidden_layers
        both = calibrated + sensitivity
        print(
            f"{count} threads, {options.dtype}: calibrate {calibrated:.0f} s, sensitivity {sensitivity:.0f} s, "
            f"together {both:.0f} s; greedy {whole:.0f} s: {whole / both:.1f}x"
        )
        seconds = {"calibrate": calibrated, "sensitivity": sensitivity, "together": both, "greedy": whole}
        rows.append({"threads": count, "dtype": options.dtype, "full": options.full, **seconds})
    save("allocation", rows)


if __name__ == "__main__":
    main()
