"""KL to the dense model with and without joint sites (rows of up and columns of down that a gate decides on alone).

Thresholds by `sensitivity` with centers, calibrated on Python's documentation, and judged on the text given by --data
or else on the other half of the documentation, every token sparse. Both ways have the same budget; they are compared
at the sparsity that they reach on the text that is judged. In float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import between, parser, save

import deadband
from deadband.allocation.fit import allocate_sensitivity
from deadband.allocation.sensitivity import measure_sensitivity
from deadband.app.models import load_model, load_tokenizer, smollm2
from deadband.running.text import python_documentation, read_text, token_windows

BUDGETS = (0.25, 0.4, 0.5, 0.6)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="a UTF-8 text file to judge on")
    made.add_argument("--windows", type=int, default=12, help="windows of 512 tokens to judge on")
    options = made.parse_args()
    model, tokenizer = load_model(smollm2(), dtype="float32"), load_tokenizer(smollm2())
    halves = python_documentation()
    batches = token_windows(tokenizer, halves[0], tokens=8192, window=512)
    text = read_text(options.data) if options.data else halves[1]
    judged = token_windows(tokenizer, text, tokens=512 * options.windows, window=512)
    calibration = deadband.calibrate(model, batches)
    measured = measure_sensitivity(model, batches, list(calibration.sites), joint=True)
    mlps = sum(site.joint is not None for site in measured.values())
    dense = [logits_of(model, batch) for batch in judged]
    rows: list[dict[str, Any]] = []
    for joint in (False, True):
        for budget in BUDGETS:
            thresholds = allocate_sensitivity(
                calibration, measured, budget, model, batches, relative=None, center=None, joint=joint, progress=True
            )
            gates = sum(rule.gate for rule in thresholds.values())
            deadband.sparsify_(model, thresholds)
            with deadband.sparse_prefill(model):
                kl = sum(
                    divergence(before, logits_of(model, batch)) for before, batch in zip(dense, judged, strict=True)
                )
            reached = deadband.sparsity(model).total
            deadband.densify_(model)
            rows.append({"joint": joint, "budget": budget, "sparsity": reached, "kl": kl / len(judged), "gates": gates})
            print(f"{'with' if joint else 'without':8}{budget:6.0%} reached {reached:6.1%}  KL {kl / len(judged):.5f}  "
                  f"{gates} of {mlps} MLPs by their gate", flush=True)  # fmt: skip
    plain = [(row["sparsity"], row["kl"]) for row in rows if not row["joint"]]
    for row in rows:
        row["ratio"] = row["kl"] / between(plain, row["sparsity"]) if row["joint"] else None
        if row["joint"]:
            print(f"{row['budget']:.0%}: {row['ratio']:.3f} of the KL without, at {row['sparsity']:.1%}")
    judged_on = f"{options.windows} windows of 512 tokens of "
    judged_on += "/".join(options.data.parts[-2:]) if options.data else "pydoc"
    save("joint", rows, settings={"model": "SmolLM2-135M", "judged_on": judged_on})


@torch.no_grad()
def logits_of(model: Any, batch: Any) -> torch.Tensor:
    """Log-probabilities of one window."""
    return model(**batch).logits.log_softmax(-1)


def divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    """KL(before ‖ after), the mean over tokens."""
    return float((before.exp() * (before - after)).sum(-1).mean())


if __name__ == "__main__":
    main()
