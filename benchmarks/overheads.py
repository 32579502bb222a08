"""Costs beside the arithmetic: one small call, importing the package, calibrating."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch
from common import parser, save
from torch import nn

import deadband
from deadband.app.models import load_model, smollm2
from deadband.layers.rule import Rule
from deadband.layers.sparse import make_sparse_
from deadband.running.forward import evaluating, run, threads
from deadband.running.timing import interleave, median

CALLS = 200


def call_cost(dtype: torch.dtype, rounds: int) -> dict:
    """Microseconds of a call of nn.Linear and of SparseLinear, 64x64, one row, one thread."""
    plain = nn.Linear(64, 64, dtype=dtype).requires_grad_(False).eval()
    sparse = make_sparse_(nn.Linear(64, 64, dtype=dtype).requires_grad_(False).eval(), Rule(0.5))
    x = torch.randn(1, 1, 64).to(dtype)

    def repeated(module: nn.Module):
        def call() -> None:
            for _ in range(CALLS):
                module(x)

        return call

    with threads(1), torch.inference_mode():
        times = interleave({"linear": repeated(plain), "sparse": repeated(sparse)}, rounds=rounds, what="calls")
    us = {name: median(values) / CALLS * 1e6 for name, values in times.items()}
    return {"what": f"call, 64x64 {dtype}", "threads": 1, **us, "difference_us": us["sparse"] - us["linear"]}


def argument_cost(rounds: int) -> dict:
    """Microseconds of a call of an operator that does nothing, with the arguments of sparse_linear and three more."""
    library = torch.library.Library("deadband_overheads", "DEF")
    common = "Tensor? scale, Tensor? center, Tensor? offset, bool relative, int sparse_rows, Tensor(a!)? counts"
    library.define(f"ten(Tensor x, Tensor weight, Tensor? bias, Tensor threshold, {common}) -> Tensor")
    more = "Tensor? scales, Tensor? minimum, Tensor? bias, int group_size"
    library.define(f"thirteen(Tensor x, Tensor weight, {more}, Tensor? threshold, {common}) -> Tensor")
    library.impl("ten", lambda x, *_: x.new_empty(64), "CPU")
    library.impl("thirteen", lambda x, *_: x.new_empty(64), "CPU")
    ten, thirteen = torch.ops.deadband_overheads.ten.default, torch.ops.deadband_overheads.thirteen.default
    x, weight, limit, counts = torch.randn(1, 64), torch.randn(64, 64), torch.tensor(0.5), torch.zeros(3).long()
    rest = (limit, None, None, None, False, 4, counts)

    def few() -> None:
        for _ in range(CALLS):
            ten(x, weight, None, *rest)

    def many() -> None:
        for _ in range(CALLS):
            thirteen(x, weight, None, None, None, 0, *rest)

    with threads(1), torch.inference_mode():
        times = interleave({"ten": few, "thirteen": many}, rounds=rounds, what="arguments")
    us = {name: median(values) / CALLS * 1e6 for name, values in times.items()}
    return {"what": "arguments of an operator", "threads": 1, **us, "difference_us": us["thirteen"] - us["ten"]}


def import_cost(rounds: int) -> dict:
    """Seconds of `import deadband` in a fresh interpreter, and of `deadband --help` as a process."""
    code = "import time; start = time.perf_counter(); import deadband; print(time.perf_counter() - start)"
    imports, helps = [], []
    for _ in range(rounds):
        imports.append(float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "deadband.app.cli", "--help"], capture_output=True, check=True)
        helps.append(time.perf_counter() - start)
    return {"what": "import", "import_s": statistics.median(imports), "help_s": statistics.median(helps)}


def calibration_cost(rounds: int, count: int) -> dict:
    """Seconds of a pass over four windows of 512 tokens, plain and calibrating."""
    model = load_model(smollm2())
    batches = [{"input_ids": torch.randint(0, 40000, (1, 512))} for _ in range(4)]

    def forward() -> None:
        with evaluating(model):
            for batch in batches:
                run(model, batch, use_cache=False, logits_to_keep=1)

    with threads(count):
        times = interleave(
            {"forward": forward, "calibrate": lambda: deadband.calibrate(model, batches, progress=False)},
            rounds=rounds, warmup=1, what="calibrate",
        )  # fmt: skip
    seconds = {name: median(values) for name, values in times.items()}
    overhead = seconds["calibrate"] / seconds["forward"] - 1
    return {"what": "calibrate SmolLM2-135M bfloat16", "threads": count, **seconds, "overhead": overhead}


def main() -> None:
    options = parser(__doc__).parse_args()
    rows = [call_cost(dtype, 200 * options.rounds) for dtype in (torch.float32, torch.bfloat16)]
    rows.append(argument_cost(200 * options.rounds))
    rows.append(import_cost(7 * options.rounds))
    rows += [calibration_cost(5 * options.rounds, count) for count in options.threads]
    for row in rows:
        print(
            "   ".join(f"{key} {value:.3f}" if isinstance(value, float) else str(value) for key, value in row.items())
        )
    save("overheads", rows)


if __name__ == "__main__":
    main()
