"""GPU kernels: whether they are right on this GPU, how fast they are, and what that is of its bandwidth.

Runs from a checkout, with nothing installed but torch, triton and transformers; about five minutes:

    PYTHONPATH=src python benchmarks/gpu.py --out FOLDER

It writes FOLDER/gpu.json after each part. Without a GPU, `--dry-run` goes through all of it on tiny shapes in Triton's
interpreter; its times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from deadband.layers.rounding import quantize
from deadband.ops import fused
from deadband.ops.gpu import launch
from deadband.ops.linear import quantized_linear, quantized_linear_reference, sparse_linear
from deadband.running.timing import interleave, median, replayed

SHAPES = [(4096, 14336), (14336, 4096), (8192, 28672), (4096, 4096)]  # (in, out)
FORMATS = ["int8", "int4-g64-zp"]
POOL_BYTES = 400_000_000
CALLS = 48  # in a graph that is timed
TINY = [(96, 64)]


class Run:
    """Where to run, and what was found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.dry = options, options.dry_run
        self.device = torch.device("cpu" if self.dry else "cuda")
        self.shapes = TINY if self.dry else SHAPES
        self.found: dict[str, Any] = {"gpu": self.name(), "torch": torch.__version__, "triton": triton.__version__}
        self.start = time.monotonic()

    def name(self) -> str:
        """What the figures are of."""
        return "Triton's interpreter" if self.dry else torch.cuda.get_device_name()

    def save(self, part: str, rows: Any) -> None:
        """Add a part to the file."""
        self.found[part] = rows
        self.found["seconds"] = round(time.monotonic() - self.start, 1)
        folder = Path(self.options.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(self.found, indent=1) + "\n")

    def seconds(self, candidates: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Medians for one call, candidates taking turns; each is a graph of many calls."""
        calls = 1 if self.dry else CALLS
        if not self.dry:
            candidates = {name: replayed(call, self.device, CALLS) for name, call in candidates.items()}
        times = interleave(candidates, rounds=1 if self.dry else 15, warmup=0 if self.dry else 2, progress=False)
        return {name: median(each) / calls for name, each in times.items()}

    def pool(self, tensor: Tensor) -> Iterator[Tensor]:
        """Copies of a tensor in turn, so many that none is in a cache when its turn comes."""
        count = 2 if self.dry else max(POOL_BYTES // tensor.nbytes, 2)
        return itertools.cycle([tensor.clone() for _ in range(count)])


# ------------------------------------------------------------------------------------------------------------- checks


def check(run: Run) -> None:
    """Against float64, twice the same bits, from a graph, and as an operator."""
    problems = []
    shapes, counts = ([(65, 31)], (1, 3)) if run.dry else ([(300, 257), (65, 31), *run.shapes[:2]], (1, 4, 8))
    for inputs, outputs in shapes:
        for dtype, rows in itertools.product((torch.bfloat16, torch.float16, torch.float32), counts):
            x = torch.randn(rows, inputs, device=run.device).to(dtype)
            weight = (torch.randn(inputs, outputs, device=run.device) * inputs**-0.5).to(dtype)
            problems += _check(run, x, weight, f"{dtype} {rows}x{inputs}x{outputs}")
    for name in FORMATS if run.dry else [*FORMATS, "int8-g32", "int4-g32", "int4-g128-zp"]:
        weight = quantize((torch.randn(64 if run.dry else 200, 300) * 0.05), name)
        parts = [
            None if each is None else each.to(run.device) for each in (weight.codes, weight.scales, weight.minimum)
        ]
        group = weight.format.group_size or 0
        for rows in (1, 3, 40):
            x = torch.randn(rows, 300, device=run.device).to(torch.float16)
            limit = torch.tensor(0.5, device=run.device) if rows < 9 else None
            rule = (None, group, limit, None, None, None, False, 8, None)
            y = (launch.linears(x, (*parts, None, limit, None, None, None), (group,), (False,), []) if rows < 9 else
                 launch.quantized_product(x, *parts, None, group))  # fmt: skip
            exact = quantized_linear_reference(x.double(), *parts, *rule)
            error = float((y.double() - exact).abs().max() / exact.abs().max())
            if not error < 2e-3:
                problems.append(f"{name}, {rows} rows: off by {error:.2g}")
    if not run.dry:
        problems += _check_operator(run) + _check_memory()
    run.save("problems", problems)
    print(f"checks: {problems or 'all passed'}")


def _check(run: Run, x: Tensor, weight: Tensor, what: str) -> list[str]:
    limit = torch.tensor(0.6, device=run.device)
    parts = (weight.t(), None, None, None, limit, None, None, None)

    def call() -> Tensor:
        return launch.linears(x, parts, (0,), (False,), [])

    y = call()
    kept = torch.where(x.abs().float() > limit, x, 0)
    exact = F.linear(kept.double(), weight.t().double())
    allowed = 2 * float((F.linear(kept, weight.t()).double() - exact).abs().max())
    allowed += 4 * torch.finfo(x.dtype).eps * float(exact.abs().max())
    problems = []
    if not float((y.double() - exact).abs().max()) <= allowed:
        problems.append(f"{what}: off by {float((y.double() - exact).abs().max()):.2g}, allowed are {allowed:.2g}")
    if not torch.equal(call(), y):
        problems.append(f"{what}: other bits the second time")
    if not run.dry:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for _ in range(3):
            captured.zero_()
            graph.replay()
            if not torch.equal(captured, y):
                problems.append(f"{what}: other bits from a graph")
    return problems


def _check_operator(run: Run) -> list[str]:
    x, weight = torch.randn(2, 100, device=run.device), torch.randn(100, 70, device=run.device).t()
    counts = torch.zeros(3, dtype=torch.int64, device=run.device)
    limit = torch.tensor(0.5, device=run.device)
    rule = (None, limit, None, None, None)
    problems = []
    for operator, arguments in (
        (sparse_linear, (x, weight, *rule, False, 4, counts)),
        (fused.linears, (x, [weight, None, None, *rule] * 2, [0, 0], [False, True], 4, [counts, counts.clone()])),
    ):
        try:
            torch.library.opcheck(operator, arguments)
        except Exception as error:
            problems.append(f"opcheck of {operator}: {str(error)[:300]}")
    compiled = torch.compile(lambda x: sparse_linear(x, weight, *rule, False, 4, counts), mode="reduce-overhead")
    for _ in range(3):
        torch.testing.assert_close(compiled(x), sparse_linear(x, weight, *rule, False, 4, counts))
    return problems


def _check_memory() -> list[str]:
    """What compute-sanitizer says of a small case, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return []
    small = (
        "import torch; from deadband.ops.gpu import launch\n"
        "x = torch.randn(3, 301, device='cuda'); w = torch.randn(301, 77, device='cuda').t()\n"
        "t = torch.tensor(0.5, device='cuda')\n"
        "print(launch.linears(x, (w, None, None, None, t, None, None, None), (0,), (False,), []).sum())\n"
    )
    done = subprocess.run(
        [tool, "--error-exitcode", "9", sys.executable, "-c", small], capture_output=True, text=True, timeout=120
    )
    return [f"compute-sanitizer: {done.stdout[-400:]}"] if done.returncode == 9 else []


# -------------------------------------------------------------------------------------------------------------- times


def bandwidth(run: Run) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.randint(100, (1 << (12 if run.dry else 28),), device=run.device)
    target = torch.empty_like(source)
    seconds = run.seconds({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.nbytes / seconds


def kernels(run: Run) -> None:
    """Layers by shape, format, rows and sparsity, beside cuBLAS and the baseline with atomics."""
    copied = bandwidth(run)
    run.save("bandwidth", copied)
    print(f"{run.name()}: copies at {copied / 1e9:,.0f} GB/s\n")
    print(f"{'in x out':>14} {'weights':>12} {'rows':>4} {'dense us':>9}   by sparsity: us, x dense, % of bandwidth")
    rows_of_table = []
    kinds = ["fp16", FORMATS[1]] if run.dry else ["bf16", "fp16", *FORMATS]
    for (inputs, outputs), weights, rows in itertools.product(run.shapes, kinds, (1,) if run.dry else (1, 4)):
        rows_of_table.append(_layer(run, inputs, outputs, weights, rows, copied))
        run.save("layers", rows_of_table)


def _layer(run: Run, inputs: int, outputs: int, weights: str, rows: int, copied: float) -> dict[str, Any]:
    dtype = torch.float16 if weights == "fp16" else torch.bfloat16
    x = torch.randn(rows, inputs, device=run.device).to(dtype)
    stored = (torch.randn(inputs, outputs, device=run.device) * inputs**-0.5).to(dtype)
    usual = run.pool(stored.t().contiguous())
    candidates: dict[str, Callable[[], Any]] = {"dense": lambda: F.linear(x, next(usual))}
    sparsities = (0.4, 0.5, 0.65)
    limits = {each: x.float().abs().quantile(each) if x.numel() < 1 << 24 else None for each in sparsities}
    if weights in FORMATS:
        format = quantize(torch.zeros(32, 256), weights).format  # only the settings: weights are drawn as codes
        bytes_of = format.bytes_per_weight * inputs * outputs
        width = outputs if format.bits == 8 else -(-outputs // 32) * 16
        codes = torch.randint(0, 127, (inputs, width), device=run.device)
        codes = run.pool(codes.to(torch.int8 if format.bits == 8 else torch.uint8))
        shape = (format.groups(inputs), outputs)
        scales = torch.rand(shape, device=run.device).mul(0.01).to(format.scale_dtype)
        minimum = scales.clone() if format.zero_point else None

        def ours(limit: Tensor | None) -> Any:
            rule = (None, format.group_size or 0, limit, None, None, None, False, 8, None)
            return quantized_linear(x, next(codes), scales, minimum, *rule)

        candidates["all kept"] = lambda: ours(None)
        if run.dry:
            own = launch.linears

            def ours(limit: Tensor | None) -> Any:
                parts = (next(codes), scales, minimum, None, limit, None, None, None)
                return own(x, parts, (format.group_size or 0,), (False,), [])
    else:
        bytes_of = stored.nbytes
        by_input = run.pool(stored)

        def ours(limit: Tensor | None) -> Any:
            parts = (next(by_input).t(), None, None, None, limit, None, None, None)
            return launch.linears(x, parts, (0,), (False,), [])

    for each, limit in limits.items():
        candidates[str(each)] = lambda limit=limit: ours(limit)
    if weights == "fp16" and rows == 1:
        from gpu_atomics import atomics_linear

        for each, limit in limits.items():
            candidates[f"atomics {each}"] = lambda limit=limit: atomics_linear(x, next(by_input), limit)
    seconds = run.seconds(candidates)
    row = {"in": inputs, "out": outputs, "weights": weights, "rows": rows, "seconds": seconds}
    told = []
    for each, limit in limits.items():
        needed = float((x.abs().float() > limit).any(0).float().mean()) * bytes_of
        share = needed / seconds[str(each)] / copied
        row[f"bandwidth {each}"] = share
        told.append(
            f"{each}: {seconds[str(each)] * 1e6:6.1f} {seconds['dense'] / seconds[str(each)]:5.2f}x {share:4.0%}"
        )
        if f"atomics {each}" in seconds:
            told[-1] += f" ({seconds[f'atomics {each}'] / seconds[str(each)]:.2f}x atomics)"
    dense = seconds["dense"] * 1e6
    print(f"{inputs:>6} x {outputs:<5} {weights:>12} {rows:>4} {dense:>9.1f}   {'   '.join(told)}", flush=True)
    return row


# ------------------------------------------------------------------------------------------------------------- decode


def decode(run: Run) -> None:
    """Whole tokens of a Llama of 8 B parameters, random, dense and at sparsity 0.5, both through CUDA graphs."""
    import deadband
    from deadband.decoding.decoder import decode_report, prepare_decode_
    from deadband.running.greedy_decoding import GreedyDecoder

    times, problem = {}, None
    tokens = 4 if run.dry else 96
    for what in ("dense", "sparse"):
        model = _llama(run)
        if what == "sparse":
            ids = torch.randint(model.config.vocab_size, (1, 64), device=run.device)
            calibration = deadband.calibrate(model, [{"input_ids": ids}], progress=False)
            deadband.sparsify_(model, calibration.allocate(0.5, method="uniform"))
        if not run.dry:
            prepare_decode_(model)
            problem = problem or decode_report(model).problem
        decoder = GreedyDecoder(model, torch.arange(1, 33, device=run.device).view(1, -1))
        for _ in range(2 if run.dry else 8):
            decoder.step()
        taken = []
        for _ in range(tokens):
            start = time.perf_counter()
            decoder.step()
            if not run.dry:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        times[what] = median(taken)
        if not run.dry and not problem:
            report = decode_report(model)
            problem = None if not report.model else str(report)
        del model, decoder
        if not run.dry:
            torch.cuda.empty_cache()
    ratio = times["dense"] / times["sparse"]
    run.save("decode", {**times, "ratio": ratio, "problem": problem})
    print(f"decode: dense {times['dense'] * 1e3:.2f} ms, sparse {times['sparse'] * 1e3:.2f} ms a token: {ratio:.2f}x")
    if problem:
        print(f"  but: {problem}")


def _llama(run: Run) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": run.options.layers,
        "vocab_size": 128256,
    }
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    if run.dry:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 128}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=1024, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with run.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if run.dry else torch.bfloat16)
    return model.eval()


PARTS = {"check": check, "kernels": kernels, "decode": decode}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--out", default="build/benchmarks/gpu", help="folder for gpu.json")
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to do")
    made.add_argument("--layers", type=int, default=32, help="of the model that decodes")
    made.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter, without a GPU")
    options = made.parse_args()
    if not torch.cuda.is_available() and not options.dry_run:
        made.error("torch sees no GPU; --dry-run goes through the script without one")
    run = Run(options)
    for part in options.parts:
        with torch.no_grad():
            PARTS[part](run)
    print(f"\n{run.found['seconds']:.0f} s; torch {torch.__version__}, triton {triton.__version__}, {run.name()}")


if __name__ == "__main__":
    main()
