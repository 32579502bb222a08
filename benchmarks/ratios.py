"""The time of a sparse layer over that of torch's nn.Linear, in every mode: what is slower than it should be.

Layers that skip half of their inputs, from 1 to 512 rows, in cache. A quantised layer, on bfloat16, stands beside the
faster of nn.Linear in bfloat16 and float32, whose weight is frozen, as its own is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from common import parser, save
from prefill import layer
from torch import Tensor, nn

from deadband.ops import kernels
from deadband.running.forward import threads
from deadband.running.timing import interleave, median

SHAPES = ("2048x2048", "2048x8192", "8192x2048", "1000x333")  # in_features x out_features
ROWS = (1, 2, 4, 8, 9, 16, 64, 128, 512)
FORMATS = ("float32", "bfloat16", "float16", "int8", "int4")
SECONDS = 0.04  # of all calls of a pair of layers, at least; 3 rounds at least
SLOW = 0.5  # seconds: a call of nn.Linear that takes longer is not made with more rows


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a layer is called."""

    training: bool = False
    gradients: bool = False
    backward: bool = False
    autocast: bool = False

    def call(self, module: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], None]:
        """A call of a layer, and of the backward of what it gives."""
        x = x.clone().requires_grad_(self.backward)

        @torch.set_grad_enabled(self.gradients)
        def run() -> None:
            module.train(self.training)
            with torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext():
                y = module(x)
            if self.backward:
                y.backward(upstream.to(y.dtype))
                x.grad = None  # else the memory of one layer's gradient decides how fast the other is
                for parameter in module.parameters():
                    parameter.grad = None

        return run


MODES = {
    "inference": Mode(),
    "training mode": Mode(training=True),
    "gradients on": Mode(gradients=True),
    "training": Mode(training=True, gradients=True, backward=True),
    "autocast": Mode(autocast=True),
    "autocast, training": Mode(training=True, gradients=True, backward=True, autocast=True),
}


def layers(form: str, inputs: int, outputs: int) -> tuple[nn.Module, list[nn.Module]]:
    """A sparse layer, and those of torch that it is compared with."""
    quantised = form.startswith("int")
    usual = [getattr(torch, each) for each in (("bfloat16", "float32") if quantised else (form,))]
    torchs = [nn.Linear(inputs, outputs, bias=False, dtype=dtype).requires_grad_(not quantised) for dtype in usual]
    sparse = layer(torchs[0].weight.detach().clone(), form)
    return sparse.requires_grad_(not quantised), torchs


def compare(form: str, shape: str, mode: Mode, rows: Iterable[int], rounds: int) -> Iterator[dict]:
    """Microseconds of both layers, by the number of rows. nn.Linear, once it is `SLOW`, in proportion."""
    inputs, outputs = map(int, shape.split("x"))
    sparse, torchs = layers(form, inputs, outputs)
    slow: tuple[float, int] | None = None  # seconds of nn.Linear, and with how many rows
    for count in rows:
        x, upstream = torch.randn(count, inputs), torch.randn(count, outputs)
        calls = {"ours": mode.call(sparse, x.to(torchs[0].weight.dtype), upstream)}
        if slow is None:
            calls |= {str(each.weight.dtype): mode.call(each, x.to(each.weight.dtype), upstream) for each in torchs}
        total = sum(map(duration, calls.values()))
        often = max(3, min(40, int(SECONDS / total))) * rounds if total < 1 else 1
        seconds = interleave(calls, rounds=often, warmup=1 if total < 1 else 0, progress=False)
        ours = median(seconds.pop("ours"))
        least = slow[0] * count / slow[1] if slow else min(map(median, seconds.values()))
        yield {"rows": count, "ours_us": ours * 1e6, "torch_us": least * 1e6, "in_proportion": slow is not None,
               "ratio": ours / least}  # fmt: skip
        if slow is None and least > SLOW:
            slow = least, count


def duration(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(options, count: int) -> Iterator[dict]:
    """The rows of one instruction set and number of threads."""
    for (name, mode), form, shape in itertools.product(MODES.items(), options.formats, options.shapes):
        if name not in options.modes or (mode.autocast and form != "float32"):
            continue
        with threads(count):
            for row in compare(form, shape, mode, options.rows, options.rounds):
                yield {"isa": kernels.isa(), "threads": count, "mode": name, "format": form, "shape": shape, **row}


def worst(rows: list[dict]) -> dict:
    return max(rows, key=lambda row: row["ratio"])


def said(row: dict) -> str:
    return f"{row['ratio']:.2f}x at {row['rows']} rows of {row['shape']}"


def show(rows: list[dict]) -> None:
    """The worst ratio of each mode, format, instruction set and number of threads."""
    for _, group in itertools.groupby(rows, key=lambda row: (row["isa"], row["threads"], row["mode"], row["format"])):
        row = worst(list(group))
        print(f"{row['isa']:15}{row['threads']:3} threads  {row['mode']:20}{row['format']:10}{said(row)}", flush=True)


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(threads=[2])
    for name, all_of in (("formats", FORMATS), ("shapes", SHAPES), ("modes", tuple(MODES))):
        arguments.add_argument(f"--{name}", nargs="+", default=all_of)
    arguments.add_argument("--rows", type=int, nargs="+", default=ROWS)
    options = arguments.parse_args()
    rows = [row for count in options.threads for row in measure(options, count)]
    show(rows)
    print("worst of all:", said(worst(rows)))
    save("ratios", rows)


if __name__ == "__main__":
    main()
