"""What the scripts here share: threads, results as JSON beside the machine they were taken on, weights from memory."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deadband.files import write_json
from deadband.running.timing import machine

RESULTS = Path(__file__).parent / "results"  # tracked, as docs/figures.md is written from it
KEPT = Path(__file__).parent.parent / "build" / "benchmarks"  # what is large, and of one machine only
POOL_BYTES = 1_100_000_000  # weights of this size are gone from every cache before their turn comes again


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description.split("\n")[0])
    made.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts to measure with")
    made.add_argument("--rounds", type=int, default=1, help="multiply the number of rounds")
    return made


def results_folder(about: Mapping[str, Any]) -> Path:
    """The folder, made if need be, of the results of a machine, named after its processor and number of cores."""
    words = re.sub(r"\((?:R|TM)\)|@.*?Hz|\b(?:CPU|Processor)\b", " ", f"{about['processor']} {about['cores']} cores")
    folder = RESULTS / "-".join(re.findall(r"[a-z0-9.]+", words.lower()))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save(name: str, rows: Any, **more: Any) -> None:
    """Write what a script found here to results/MACHINE/`name`.json, for figures.py, and say so.

    Args:
        name: of the script, and perhaps what it was run on.
        rows: what its table is made of.
        more: what else is of the result: `settings`, or a second table.
    """
    about = machine()
    path = results_folder(about) / f"{name}.json"
    write_json(path, {"machine": about, **more, "rows": rows})
    print(
        f"{about['processor']}, {about['cores']} cores, kernels {about['kernels']}, torch {about['torch']}, "
        f"transformers {about['transformers']}; written to {path.relative_to(RESULTS.parent.parent)}\n"
    )


def pool(out_features: int, in_features: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """So many weights [out_features, in_features] that each comes from memory when its turn comes."""
    count = max(POOL_BYTES // (out_features * in_features * dtype.itemsize), 2)
    return [torch.randn(out_features, in_features).to(dtype) for _ in range(count)]
