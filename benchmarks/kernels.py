"""The matrix-vector kernels: sparse at 0.5 against torch's F.linear and against our own dense kernel.

Weights come from memory: each call takes the next of a pool of more than 1 GB. All candidates take turns.
"""

from __future__ import annotations

import itertools

import torch
from common import parser, pool, save
from torch.nn import functional as F

from deadband.bench import interleave, median, threads
from deadband.ops import dense_linear, kernels, sparse_linear

SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096)]  # in_features, out_features


def measure(dtype: torch.dtype, in_features: int, out_features: int, sparsity: float, rounds: int, counts: list[int]):
    torchs = pool(out_features, in_features, dtype)
    ours = []
    for weight in torchs:
        stored = torch.empty_strided(weight.shape, (1, out_features), dtype=dtype)
        kernels.advise_huge_pages(stored)
        ours.append(stored.copy_(weight))
    x = torch.randn(1, in_features).to(dtype)
    threshold = torch.quantile(x.float().abs(), sparsity)
    dense, sparse, usual = itertools.cycle(ours), itertools.cycle(ours[1:] + ours[:1]), itertools.cycle(torchs)
    read = itertools.cycle(torchs[1:] + torchs[:1])
    candidates = {
        "torch": lambda: F.linear(x, next(usual)),
        "dense": lambda: dense_linear(x, next(dense), None),
        "sparse": lambda: sparse_linear(x, next(sparse), None, threshold, None, None, None, False, 4, None),
        "read": lambda: kernels.read(next(read)),
    }
    for count in counts:
        with threads(count), torch.inference_mode():
            times = interleave(candidates, rounds=rounds, what=f"{in_features}x{out_features}")
        seconds = {name: median(values) for name, values in times.items()}
        whole = in_features * out_features * dtype.itemsize
        bandwidth = whole / seconds["read"]  # of reading one weight of the pool, in the same rounds
        needed = whole * (x.float().abs() > threshold).double().mean().item()
        yield {
            "dtype": str(dtype).removeprefix("torch."),
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
        }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sparsity", type=float, nargs="+", default=[0.5])
    options = arguments.parse_args()
    print("matrix-vector products, weights from memory; shapes are in_features x out_features")
    print(f"{'dtype':9}{'shape':>13}{'sparsity':>9}{'threads':>8}{'torch us':>10}{'dense us':>10}{'sparse us':>10}"
          f"{'/torch':>8}{'/dense':>8}{'GB/s':>7}{'of read bandwidth':>19}")  # fmt: skip
    rows = []
    for dtype, shape in itertools.product((torch.bfloat16, torch.float32), SHAPES):
        for sparsity in options.sparsity:
            for row in measure(dtype, *shape, sparsity, 60 * options.rounds, options.threads):
                rows.append(row)
                us = row["microseconds"]
                print(f"{row['dtype']:9}{shape[0]:>7}x{shape[1]:<5}{sparsity:9.2f}{row['threads']:8}{us['torch']:10.0f}"
                      f"{us['dense']:10.0f}{us['sparse']:10.0f}{row['against_torch']:7.2f}x{row['against_own_dense']:7.2f}x"
                      f"{row['needed_bytes_per_second'] / 1e9:7.1f}{row['of_bandwidth']:19.0%}",
                      flush=True)  # fmt: skip
    save("kernels", rows)


if __name__ == "__main__":
    main()
