"""What rounding x costs beside quantised weights: KL to the float32 model with x as it is, and through the kernels.

SmolLM2-135M, on the text given by --data, or Python's documentation. With x as it is, the dequantised weights are
multiplied by torch in float32. The kernels have a row's way for one token at a time, with a cache, and a way for many.
Nothing is skipped, and the output layer has 8 bits, or with int4 4 like the others.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import parser, save
from torch import Tensor
from torch.nn import functional as F

import deadband
from deadband.app.models import SMOLLM2, load_model, load_tokenizer, smollm2
from deadband.layers.sites import find_sites
from deadband.running.divergence import divergence
from deadband.running.forward import progress_bar, threads
from deadband.running.text import python_documentation, read_text, token_windows

FORMATS = ("int8", "int8-g32", "int4", "int4-g32")


def at_once(model: Any, windows: list[Tensor]) -> Tensor:
    """Log-probabilities of every token of the windows."""
    return torch.cat([F.log_softmax(model(window).logits[0], -1) for window in windows])


def one_by_one(model: Any, windows: list[Tensor]) -> Tensor:
    """The same, decoded token by token."""
    found = []
    for window in progress_bar(windows, "token by token", True):
        cache = None
        for token in window[0]:
            output = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(F.log_softmax(output.logits[0], -1))
    return torch.cat(found)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", help="a text file")
    arguments.add_argument("--tokens", type=int, default=512)
    arguments.add_argument("--window", type=int, default=128)
    options = arguments.parse_args()
    model, tokenizer = load_model(smollm2(), dtype="float32"), load_tokenizer(smollm2())
    text = read_text(options.data) if options.data else python_documentation()[1]
    windows = [
        each["input_ids"] for each in token_windows(tokenizer, text, tokens=options.tokens, window=options.window)
    ]
    rows = []
    print(f"{SMOLLM2}, KL to float32 on {sum(each.numel() for each in windows):,} tokens")
    print(f"{'weights':9}{'x as it is':>12}{'many tokens':>22}{'one by one':>22}")
    with threads(options.threads[-1]), torch.inference_mode():
        expected = at_once(model, windows)
        for form in FORMATS:
            quantised = deadband.sparsify_(copy.deepcopy(model), dict.fromkeys(find_sites(model), 0.0), weights=form)
            exact = deadband.densify_(copy.deepcopy(quantised))
            kls = [
                float(divergence(expected, found).mean())
                for found in (at_once(exact, windows), at_once(quantised, windows), one_by_one(quantised, windows))
            ]
            many, one = (kl / kls[0] - 1 for kl in kls[1:])
            rows.append(
                {"format": form, "exact": kls[0], "many": kls[1], "one": kls[2], "many_more": many, "one_more": one}
            )
            print(f"{form:9}{kls[0]:12.5f}{kls[1]:12.5f} ({many:+6.1%}){kls[2]:12.5f} ({one:+6.1%})", flush=True)
    save("rounding", rows, settings={"tokens": options.tokens, "window": options.window})


if __name__ == "__main__":
    main()
