"""The matrix-vector kernels: sparse at 0.5 against torch's F.linear and against our own dense kernel.

Quantised weights stand beside torch's bfloat16 product.

Weights come from memory: each call takes the next of a pool of more than 1 GB. All candidates take turns, two among
them that only read: a whole weight (*of bandwidth*), and just the rows that the sparse kernel reads, in its order (*of
rows*). Each does so by the fastest of a dozen loops.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from common import POOL_BYTES, parser, pool, save
from torch import Tensor
from torch.nn import functional as F

from deadband.layers.formats import empty_weight
from deadband.layers.memory import on_huge_pages
from deadband.ops import kernels
from deadband.ops.linear import dense_linear, quantized_linear, sparse_linear
from deadband.running.forward import threads
from deadband.running.timing import interleave, median

SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096)]  # in_features, out_features
FORMATS = ("bfloat16", "float32", "int8", "int8-g32", "int4", "int4-g32")
Run = Callable[[Tensor | None], Tensor]  # a product that skips by a threshold, or, with None, nothing


def plain(weights: list[Tensor], x: Tensor) -> tuple[list[Tensor], Run]:
    """Weights [out, in] laid out as SparseLinear has them, and products with one after the other."""
    ours = [on_huge_pages(weight.t().contiguous()).t() for weight in weights]
    turn = itertools.cycle(ours)

    def run(threshold: Tensor | None) -> Tensor:
        if threshold is None:
            return dense_linear(x, next(turn), None)
        return sparse_linear(x, next(turn), None, threshold, None, None, None, False, 4, None)

    return ours, run


def quantised(form: str, in_features: int, out_features: int, x: Tensor) -> tuple[list[Tensor], Run, int]:
    """Random codes, products with one set after the other, and the bytes of scales."""
    like = empty_weight(out_features, in_features, form)
    scales = torch.rand(like.scales.shape).to(like.scales.dtype) * 0.01
    minimum = None if like.minimum is None else -8 * scales
    codes = [on_huge_pages(like.codes.random_(0, 127)) for _ in range(max(POOL_BYTES // like.codes.nbytes, 2))]
    sets = itertools.cycle([(each, scales.clone(), None if minimum is None else minimum.clone()) for each in codes])
    group = like.format.group_size or 0

    def run(threshold: Tensor | None) -> Tensor:
        return quantized_linear(
            x, *next(sets), None, group, threshold, None, None, None, False, 4, None
        )  # fmt: skip

    return codes, run, like.nbytes - like.codes.nbytes


def measure(form: str, in_features: int, out_features: int, sparsity: float, rounds: int, counts: list[int]):
    dtype = torch.bfloat16 if form.startswith("int") else getattr(torch, form)  # of torch, beside quantised weights
    torchs = pool(out_features, in_features, dtype)
    x = torch.randn(1, in_features).to(dtype)
    if form.startswith("int"):
        ours, run, others = quantised(form, in_features, out_features, x)
    else:
        (ours, run), others = plain(torchs, x), 0
    threshold = torch.quantile(x.float().abs(), sparsity)
    usual, read = itertools.cycle(torchs), itertools.cycle(torchs[1:] + torchs[:1])
    candidates: dict[str, Callable[[], Any]] = {
        "torch": lambda: F.linear(x, next(usual)),
        "dense": lambda: run(None),
        "sparse": lambda: run(threshold),
    }
    stored = [each if form.startswith("int") else each.t() for each in ours]  # a row for each input
    theirs = itertools.cycle(stored[1:] + stored[:1])
    kept = (x[0].float().abs() > threshold).nonzero()[:, 0].int()
    for count in counts:
        with threads(count), torch.inference_mode():
            whole, rows = kernels.fastest_read(torchs), kernels.fastest_read(stored, kept)
            candidates["read"] = lambda loop=whole: kernels.read(next(read), loop=loop)
            candidates["rows"] = lambda loop=rows: kernels.read(next(theirs), kept, loop)
            times = interleave(candidates, rounds=rounds, what=f"{form} {in_features}x{out_features}")
        seconds = {name: median(values) for name, values in times.items()}
        bandwidth = torchs[0].nbytes / seconds["read"]  # of reading one weight of torch's pool, in the same rounds
        rows_bytes = stored[0][0].nbytes * len(kept)
        needed = rows_bytes + others
        yield {
            "format": form,
            "shape": [in_features, out_features],
            "sparsity": sparsity,
            "threads": count,
            "microseconds": {name: value * 1e6 for name, value in seconds.items()},
            "against_torch": seconds["torch"] / seconds["sparse"],
            "against_own_dense": seconds["dense"] / seconds["sparse"],
            "dense_against_torch": seconds["torch"] / seconds["dense"],
            "needed_bytes_per_second": needed / seconds["sparse"],
            "read_bandwidth": bandwidth,
            "of_bandwidth": needed / seconds["sparse"] / bandwidth,
            "of_rows": needed / seconds["sparse"] / (rows_bytes / seconds["rows"]),
        }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--formats", nargs="+", default=FORMATS)
    arguments.add_argument("--sparsity", type=float, nargs="+", default=[0.5])
    options = arguments.parse_args()
    print("matrix-vector products, weights from memory; shapes are in_features x out_features")
    print(f"{'format':9}{'shape':>13}{'sparsity':>9}{'threads':>8}{'torch us':>10}{'dense us':>10}{'sparse us':>10}"
          f"{'/torch':>8}{'/dense':>8}{'GB/s':>7}{'of bandwidth':>14}{'of rows':>9}")  # fmt: skip
    rows = []
    for form, shape in itertools.product(options.formats, SHAPES):
        for sparsity in options.sparsity:
            for row in measure(form, *shape, sparsity, 60 * options.rounds, options.threads):
                rows.append(row)
                us = row["microseconds"]
                print(f"{row['format']:9}{shape[0]:>7}x{shape[1]:<5}{sparsity:9.2f}{row['threads']:8}{us['torch']:10.0f}"
                      f"{us['dense']:10.0f}{us['sparse']:10.0f}{row['against_torch']:7.2f}x{row['against_own_dense']:7.2f}x"
                      f"{row['needed_bytes_per_second'] / 1e9:7.1f}{row['of_bandwidth']:14.0%}{row['of_rows']:9.0%}",
                      flush=True)  # fmt: skip
    save("kernels", rows, keys=("format", "shape", "sparsity", "threads"))


if __name__ == "__main__":
    main()
