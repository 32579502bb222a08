"""Prefill through sparsify_'d layers, on their one copy of the weights, against torch on dense layers."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from common import parser, pool, save
from torch import nn
from torch.nn import functional as F

from deadband.layers.formats import empty_weight
from deadband.layers.quantized import make_quantized_
from deadband.layers.rule import Rule
from deadband.layers.sparse import make_sparse_
from deadband.running.forward import threads
from deadband.running.timing import interleave, median

SHAPES = [(4096, 4096), (2048, 2048), (2048, 8192), (8192, 2048)]  # in_features, out_features
TOKENS = (4, 8, 16, 64, 256)


FORMATS = ("bfloat16", "float32", "int8", "int4")


def layer(weight: torch.Tensor, form: str) -> nn.Module:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if form.startswith("int"):
        codes = empty_weight(weight.shape[0], weight.shape[1], form)
        for each in (codes.scales, codes.minimum):
            if each is not None:
                each.fill_(0.01)
        make_quantized_(linear, dataclasses.replace(codes, codes=codes.codes.random_(0, 127)))
    return make_sparse_(linear.eval(), Rule(0.5))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--formats", nargs="+", default=FORMATS)
    options = arguments.parse_args()
    print("prefill: time through a sparsify_'d layer / time of torch's F.linear on the usual layout (lower is better)")
    print(f"{'format':9}{'shape':>13}{'threads':>8}" + "".join(f"{tokens:>7} tok" for tokens in TOKENS))
    rows = []
    for form, shape in itertools.product(options.formats, SHAPES):
        dtype = torch.bfloat16 if form.startswith("int") else getattr(torch, form)  # of torch, beside quantised weights
        usual = pool(shape[1], shape[0], dtype)
        layers = [layer(weight.clone(), form) for weight in usual]
        for count in options.threads:
            ratios = {}
            for tokens in TOKENS:
                x = torch.randn(tokens, shape[0]).to(dtype)
                theirs, ours = itertools.cycle(usual), itertools.cycle(layers)
                candidates = {"torch": lambda: F.linear(x, next(theirs)), "ours": lambda: next(ours)(x)}  # noqa: B023
                # 4 rows would skip: what is measured here is the dense product that longer inputs take
                for each in layers:
                    each.sparse_rows = 0
                with threads(count), torch.inference_mode():
                    times = interleave(candidates, rounds=(30 if tokens < 64 else 12) * options.rounds, what=str(shape))
                ratios[tokens] = median(times["ours"]) / median(times["torch"])
            rows.append({"format": form, "shape": shape, "threads": count, "ratios": ratios})
            print(f"{form:9}{shape[0]:>7}x{shape[1]:<5}{count:8}"
                  + "".join(f"{ratio:10.2f}x" for ratio in ratios.values()), flush=True)  # fmt: skip
    save("prefill", rows)


if __name__ == "__main__":
    main()
