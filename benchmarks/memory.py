"""Memory: the peak of loading a saved sparse model and generating with it, beside the bytes of its weights.

Every checkpoint is loaded in a process of its own, which has loaded and run a tiny model before: what Python, torch and
transformers take themselves is not counted. Linux only: figures are from /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from common import save
from shapes import random_llama

import deadband
from deadband.app.models import load_model, smollm2
from deadband.evaluation.speed import model_bytes
from deadband.files import cache_folder
from deadband.layers.rounding import quantize
from deadband.layers.sites import find_sites, matrix_of

FORMATS = ("bf16", "int8", "int4")
MODELS = {"smollm2": "SmolLM2-135M", "llama-1b": "Llama 1B random"}
THRESHOLD = 0.01
TOKENS = 32


def tiny_llama() -> Any:
    """A Llama of 100,000 parameters."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=512, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def save_sparse(model: Any, form: str, folder: Path) -> int:
    """Make a model sparse, its weights in `form`, and save it; returns the bytes of its weights."""
    sites = find_sites(model)
    weights: Any = None
    if form != "bf16":  # plain rounding is quick, and takes the same bytes
        weights = {name: quantize(matrix_of(site).detach(), form, minimise=False) for name, site in sites.items()}
    output_layer = True if form == "bf16" else "int8"
    deadband.sparsify_(model, dict.fromkeys(sites, THRESHOLD), weights=weights, output_layer=output_layer)
    model.save_pretrained(folder)
    return model_bytes(model)


def resident(field: str) -> int:
    """Bytes: `VmRSS` is this process's memory now, `VmHWM` its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def generate(model: Any) -> None:
    """Continue a prompt of 32 tokens."""
    model.generate(torch.arange(8, 40)[None], max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)


def measure(folder: str, tiny: str) -> dict[str, int]:
    """Peaks of this process above what it takes before, of loading and of all."""
    generate(load_model(tiny))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    model = load_model(folder)
    loading, loaded = resident("VmHWM"), resident("VmRSS")
    generate(model)
    return {"loading": loading - before, "loaded": loaded - before, "peak": resident("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--measure", nargs=2, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    print(f"{'model':16}{'weights':>8}{'MB':>8}{'loading MB':>12}{'loaded MB':>11}{'peak MB':>9}{'peak/weights':>14}")
    rows = []
    (cache_folder() / "benchmarks").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="memory-", dir=cache_folder() / "benchmarks") as temporary:
        for name in options.models:
            for form in options.formats:
                folders = [Path(temporary) / "model", Path(temporary) / "tiny"]
                save_sparse(tiny_llama(), form, folders[1])
                size = save_sparse(load_model(smollm2()) if name == "smollm2" else random_llama("1b"), form, folders[0])
                command = [sys.executable, __file__, "--measure", *map(str, folders)]
                figures = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
                row = {
                    "model": MODELS[name],
                    "weights": form,
                    "bytes": size,
                    **figures,
                    "ratio": figures["peak"] / size,
                }
                rows.append(row)
                megabytes = [value / 1e6 for value in (size, row["loading"], row["loaded"], row["peak"])]
                print("{:16}{:>8}{:8.0f}{:12.0f}{:11.0f}{:9.0f}".format(row["model"], form, *megabytes)
                      + f"{row['ratio']:13.2f}x", flush=True)  # fmt: skip
    save("memory", rows)


if __name__ == "__main__":
    main()
