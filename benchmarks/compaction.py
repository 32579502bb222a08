"""Compaction: latency of dense, masked and compacted models with half of their hidden features masked."""

from __future__ import annotations

import copy
import functools
import itertools

import torch
from common import parser, save
from torch import nn

from deadband.compaction.check import masking
from deadband.compaction.compact import compact_
from deadband.running.forward import threads
from deadband.running.timing import interleave, median


def mlp() -> nn.Sequential:
    """Two blocks 1024 -> 4096 -> 1024."""
    layers = [(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(*itertools.chain(*layers)).eval()


def cnn() -> nn.Sequential:
    """Six convolutions with the widths and resolutions of a ResNet's first three stages."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 1000)).eval()


def half_masked(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """Masks that keep a random half of the input features of the layers in `names`."""
    widths = {name: model.get_submodule(name).weight.shape[1] for name in names}
    return {name: torch.randperm(width) % 2 == 0 for name, width in widths.items()}


def compare(what: str, dense: nn.Module, names: list[str], shape: tuple[int, ...], rounds: int, counts: list[int]):
    masks = half_masked(dense, names)
    masked, compacted = copy.deepcopy(dense), copy.deepcopy(dense)
    report = compact_(compacted, masks, ((torch.randn(1, *shape),), {}))
    for batch, count in itertools.product((1, 64), counts):
        x = torch.randn(batch, *shape)
        with threads(count), torch.inference_mode(), masking(masked, masks):
            expected, found = masked(x), compacted(x)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
            calls = {"dense": dense, "masked": masked, "compacted": compacted}
            times = interleave(
                {name: functools.partial(model, x) for name, model in calls.items()},
                rounds=rounds * (5 if batch == 1 else 1),
                what=f"{what}, batch {batch}",
            )
        seconds = {name: median(values) for name, values in times.items()}
        yield {
            "what": what, "batch": batch, "threads": count, "seconds": seconds,
            "speed": seconds["dense"] / seconds["compacted"],
            "parameters": report.parameters, "flops": report.flops, "removed": report.removed,
        }  # fmt: skip


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.manual_seed(0)
    rounds = 15 * options.rounds
    rows = [
        *compare("MLP, 2 x (1024, 4096, 1024)", mlp(), ["2", "6"], (1024,), 4 * rounds, options.threads),
        *compare("CNN, 64 to 256 channels, 56x56", cnn(), ["3", "6", "9", "12", "15", "20"], (3, 56, 56), rounds,
                 options.threads),
    ]  # fmt: skip
    print("| model | batch | threads | dense ms | masked ms | compacted ms | speed | parameters | FLOPs |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        shown = " | ".join(f"{row['seconds'][name] * 1e3:.2f}" for name in ("dense", "masked", "compacted"))
        less = " | ".join(f"{before / after:.2f}× fewer" for before, after in (row["parameters"], row["flops"]))
        print(f"| {row['what']} | {row['batch']} | {row['threads']} | {shown} | {row['speed']:.2f}× | {less} |")
    save("compaction", rows)


if __name__ == "__main__":
    main()
