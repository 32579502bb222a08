"""What the scripts here share: threads, results as JSON beside the machine they were taken on, weights from memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from deadband.files import write_json
from deadband.running.timing import machine

RESULTS = Path(__file__).parent / "results"
POOL_BYTES = 1_100_000_000  # weights of this size are gone from every cache before their turn comes again


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description.split("\n")[0])
    made.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts to measure with")
    made.add_argument("--rounds", type=int, default=1, help="multiply the number of rounds")
    return made


def save(name: str, rows: Any) -> None:
    RESULTS.mkdir(exist_ok=True)
    about = machine()
    write_json(RESULTS / f"{name}.json", {"machine": about, "rows": rows})
    print(
        f"{about['processor']}, {about['cores']} cores, kernels {about['kernels']}, torch {about['torch']}, "
        f"transformers {about['transformers']}; written to benchmarks/results/{name}.json\n"
    )


def pool(out_features: int, in_features: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """So many weights [out_features, in_features] that each comes from memory when its turn comes."""
    count = max(POOL_BYTES // (out_features * in_features * dtype.itemsize), 2)
    return [torch.randn(out_features, in_features).to(dtype) for _ in range(count)]
