"""Every benchmark, one after the other: `make bench`, or `make bench DATA=FILE` to judge quality on FILE."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = (
    "overheads", "kernels", "ratios", "prefill", "first_token", "several_tokens", "experts", "natural",
    "coverage", "decode", "rounding", "allocation", "quality", "joint", "sparsifier", "compaction", "pruning",
    "memory",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="", help="a UTF-8 text file to judge quality on")
    options = parser.parse_args()
    failed = []
    for name in NAMES:
        print(f"== {name}", flush=True)
        extra = ["--data", options.data] if name in ("quality", "joint", "rounding") and options.data else []
        if subprocess.run([sys.executable, HERE / f"{name}.py", *extra], check=False).returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
