"""What the scripts here share: threads, results as JSON beside the machine they were taken on, weights from memory.

`--isa x86-64-v3` starts a script anew in an environment in which nothing is faster than AVX2: deadband's kernels,
torch's and what inductor compiles, and a llama.cpp that was built so, in `llama_folder()`. docs/decoding.md says how.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deadband.files import cache_folder, finite, write_json
from deadband.ops import kernels
from deadband.running.timing import machine

RESULTS = Path(__file__).parent / "results"  # tracked, as docs/figures.md is written from it
KEPT = Path(__file__).parent.parent / "build" / "benchmarks"  # what is large, and of one machine only
POOL_BYTES = 1_100_000_000  # weights of this size are gone from every cache before their turn comes again


LIMITS = {"x86-64-v3": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}}
"""By instruction set, what keeps torch to it; inductor follows ATen."""


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description.split("\n")[0])
    made.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts to measure with")
    made.add_argument("--rounds", type=int, default=1, help="multiply the number of rounds")
    made.add_argument("--isa", choices=LIMITS, action=_KeepTo, help="use no more of the processor, deadband or not")
    return made


class _KeepTo(argparse.Action):
    """Run the script anew in an environment that keeps everything to an instruction set, unless it is in one."""

    def __call__(self, made: argparse.ArgumentParser, options: Any, value: Any, name: str | None = None) -> None:
        if kept_to() == value:
            return
        if value not in kernels.available_isas():
            made.error(f"this machine cannot run {value}, only {', '.join(kernels.available_isas())}")
        path = [str(llama_folder(value)), *filter(None, [os.environ.get("PYTHONPATH")])]
        there = {"DEADBAND_ISA": value, "PYTHONPATH": os.pathsep.join(path), **LIMITS[value]}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **there})


def kept_to() -> str | None:
    """The instruction set of `--isa`."""
    isa = os.environ.get("DEADBAND_ISA", "")
    return isa if LIMITS.get(isa, {"": ""}).items() <= os.environ.items() else None


def llama_folder(isa: str) -> Path:
    """Where a llama-cpp-python that was built for an instruction set is looked for."""
    return cache_folder() / "benchmarks" / f"llama-cpp-{isa}"


def results_folder(about: Mapping[str, Any]) -> Path:
    """The folder, made if need be, of the results of a machine, named after its processor and number of cores.

    And after the instruction set that it was kept to.
    """
    words = re.sub(r"\((?:R|TM)\)|@.*?Hz|\b(?:CPU|Processor)\b", " ", f"{about['processor']} {about['cores']} cores")
    folder = RESULTS / "-".join([*re.findall(r"[a-z0-9.]+", words.lower()), *filter(None, (about.get("kept_to"),))])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save(name: str, rows: Any, *, keys: Sequence[str] = (), **more: Any) -> None:
    """Write what a script found here to results/MACHINE/`name`.json, for figures.py, and say so.

    Args:
        name: of the script, and perhaps what it was run on.
        rows: what its table is made of.
        keys: of a row, which say what was measured: rows that an earlier run of the same versions left there stay,
            unless they are measured again.
        more: what else is of the result: `settings`, or a second table.
    """
    about = {**machine(), "kept_to": kept_to()}
    path = results_folder(about) / f"{name}.json"
    if keys and path.is_file():
        rows = merged(json.loads(path.read_text(encoding="utf-8")), {"machine": about, "rows": rows}, keys)
    write_json(path, {"machine": about, **more, "rows": rows})
    print(
        f"{about['processor']}, {about['cores']} cores, kernels {about['kernels']}, torch {about['torch']}, "
        f"transformers {about['transformers']}; written to {path.relative_to(RESULTS.parent.parent)}\n"
    )


def merged(before: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of an earlier run of the same versions that are not measured anew, and the new ones."""
    taken = finite([[row.get(key) for key in keys] for row in now["rows"]])
    if {**before["machine"], "threads": 0} != {**finite(now["machine"]), "threads": 0}:
        return list(now["rows"])
    return [*(row for row in before["rows"] if [row.get(key) for key in keys] not in taken), *now["rows"]]


def pool(out_features: int, in_features: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """So many weights [out_features, in_features] that each comes from memory when its turn comes."""
    count = max(POOL_BYTES // (out_features * in_features * dtype.itemsize), 2)
    return [torch.randn(out_features, in_features).to(dtype) for _ in range(count)]


def between(points: Sequence[tuple[float, float]], sparsity: float) -> float:
    """KL at a sparsity between measured points, log-linear; beyond them the nearest two go on."""
    index = next((i for i in range(1, len(points) - 1) if sparsity <= points[i][0]), len(points) - 1)
    (low, before), (high, after) = points[index - 1], points[index]
    share = (sparsity - low) / (high - low)
    return math.exp((1 - share) * math.log(before) + share * math.log(after))
