"""ActivationSparsifier beside torch.ao.pruning's: what watching, features and masks cost, and memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from common import parser, save
from torch import nn
from torch.ao.pruning._experimental.activation_sparsifier.activation_sparsifier import (
    ActivationSparsifier as TorchSparsifier,
)
from transformers import LlamaConfig, LlamaModel

from deadband.masks import aggregate, mask, reduce
from deadband.masks.sparsifier import ActivationSparsifier
from deadband.running.forward import threads
from deadband.running.timing import interleave, median

CALLS = 20
CLASSES = {"torch": TorchSparsifier, "deadband": ActivationSparsifier}


def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a + b


def batch_mean(data: torch.Tensor) -> torch.Tensor:
    return data.mean(0)


def above_mean(data: torch.Tensor) -> torch.Tensor:
    return (data.abs() > data.abs().mean()).to(data.dtype)


class Residual(nn.Module):
    """A block of ResNet: two convolutions and a way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return torch.relu(x + self.second(self.first(x)))


def convnet() -> tuple[nn.Module, tuple]:
    blocks = []
    for channels in (64, 128, 256):
        if blocks:
            blocks.append(nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1))
        blocks += [Residual(channels), Residual(channels)]
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)
    )
    return model.eval(), (torch.randn(8, 3, 32, 32),)


def llama_block() -> tuple[nn.Module, tuple]:
    config = LlamaConfig(
        vocab_size=128, hidden_size=1024, intermediate_size=2816, num_hidden_layers=1, num_attention_heads=16,
        num_key_value_heads=4,
    )  # fmt: skip
    return LlamaModel(config).eval(), (torch.randint(0, 128, (2, 256)),)


def watched(model: nn.Module, sparsifier: ActivationSparsifier | TorchSparsifier) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            sparsifier.register_layer(layer)
    model.keep = sparsifier  # the hooks of deadband go with their sparsifier
    return model


def watching(name: str, rounds: int, count: int) -> dict:
    """Seconds of a forward pass: plain, and while every linear layer and convolution is watched."""
    model, arguments = {"ResNet-like": convnet, "Llama block": llama_block}[name]()
    models = {"forward": model}
    for library, sparsifier_class in CLASSES.items():
        other = copy.deepcopy(model)
        models[f"{library}, sum of one's own"] = watched(other, sparsifier_class(other, add, batch_mean, above_mean))
    for ready_made in ("mean", "mean_abs"):
        other = copy.deepcopy(model)
        function = getattr(aggregate, ready_made)
        models[f"deadband, {ready_made}"] = watched(
            other, ActivationSparsifier(other, function, reduce.mean, mask.magnitude)
        )

    def call(model: nn.Module):
        def forward() -> None:
            with torch.no_grad():
                model(*arguments)

        return forward

    with threads(count):
        times = interleave({key: call(model) for key, model in models.items()}, rounds=rounds, what=name)
    seconds = {key: median(values) for key, values in times.items()}
    plain, theirs = seconds["forward"], seconds["torch, sum of one's own"] - seconds["forward"]
    rows = {key: {"ms": 1e3 * value, "overhead": value / plain - 1, "of_torchs": (value - plain) / theirs}
            for key, value in seconds.items()}  # fmt: skip
    return {"what": "watching", "model": name, "threads": count, "rows": rows}


def features(rounds: int, count: int) -> dict:
    """Seconds with 1,024 of 4,096 features, scattered at random, batch 64: while aggregating and while masking.

    The libraries are timed one after the other: torch's loops leave thousands of freed tensors behind, and the
    allocation that meets them next, a multiplication's among them, takes milliseconds.
    """
    x, keep = torch.randn(64, 4096), (torch.rand(4096) > 0.5).float()
    chosen = torch.randperm(4096)[:1024].tolist()
    rows = {}
    for library, sparsifier_class in reversed(CLASSES.items()):
        calls = {"x * mask": lambda: x * keep}
        for phase in ("aggregate", "mask"):
            model = nn.Sequential(nn.Identity())
            sparsifier = sparsifier_class(model, add, batch_mean, above_mean, features=chosen, feature_dim=1)
            sparsifier.register_layer(model[0])
            model(x)
            if phase == "mask":
                sparsifier.step()
                sparsifier.squash_mask()
            model.keep = sparsifier
            calls[phase] = lambda model=model: model(x)
        with threads(count), torch.no_grad():
            times = interleave({key: repeated(call) for key, call in calls.items()}, rounds=9 * rounds, what="features")
        rows |= {f"{library}, {key}": {"us": 1e6 * median(values) / CALLS} for key, values in times.items()}
    one = rows["deadband, x * mask"]["us"]
    for row in rows.values():
        row["of_one_multiplication"] = row["us"] / one
    return {"what": "features", "threads": count, "rows": rows}


def repeated(call: Callable[[], Any]) -> Callable[[], None]:
    """Several calls after another, as a training loop makes them: one call after other work finds cold caches."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    return calls


def memory() -> dict:
    """Bytes that aggregating keeps for a layer of 1,000 features, batches of 64 rows: data and mask."""
    rows = {}
    for name, (sparsifier_class, function) in {
        "torch, sum of one's own": (TorchSparsifier, add),
        "deadband, sum of one's own": (ActivationSparsifier, add),
        "deadband, mean": (ActivationSparsifier, aggregate.mean),
    }.items():
        model = nn.Sequential(nn.Linear(1000, 10))
        sparsifier = sparsifier_class(model, function, reduce.mean, above_mean)
        sparsifier.register_layer(model[0])
        with torch.no_grad():
            for _ in range(20):
                model(torch.randn(64, 1000))
        kept = (sparsifier.data_groups["0"]["data"], sparsifier.state["0"]["mask"])
        rows[name] = {"bytes": sum(tensor.untyped_storage().nbytes() for tensor in kept)}
    return {"what": "memory", "rows": rows}


def main() -> None:
    options = parser(__doc__).parse_args()
    results = [memory()]
    for count in options.threads:
        results += [watching(name, 15 * options.rounds, count) for name in ("ResNet-like", "Llama block")]
        results.append(features(options.rounds, count))
    for result in results:
        print(", ".join(str(value) for key, value in result.items() if key != "rows"))
        for name, row in result["rows"].items():
            print(f"    {name:28}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    save("sparsifier", results)


if __name__ == "__main__":
    main()
