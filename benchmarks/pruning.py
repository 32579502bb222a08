"""Pruning beside torch.ao.pruning: masks, the time of a step, and what structured pruning makes of a CNN and an MLP.

Masks: random configurations of block shapes, zeros per block and levels that torch supports, in float32. Step: one
`step` of `WeightNormSparsifier` over 200 layers of 1024 x 1024, each class in turn. Latency: half of the channels by
`SaliencyPruner`, removed by `prune()`, at batch 1 against the dense model, in turn. Scattering: layers that compute
every other of their outputs and put zeros in the places of the others.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random

import torch
from common import parser, save
from torch import nn
from torch.ao import pruning as torchs

from deadband import pruning
from deadband.compaction.resize import Resize, resize_
from deadband.running.forward import threads
from deadband.running.timing import interleave, median

LAYERS, SIDE = 200, 1024
STEPS = {
    "blocks of 1 x 4": {},
    "2:4": {"sparsity_level": 1.0, "zeros_per_block": 2},
    "single weights": {"sparse_block_shape": (1, 1)},
    "blocks of 16 x 16": {"sparse_block_shape": (16, 16)},
}


class Block(nn.Module):
    """Of a ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two convolutions beside a shortcut."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def resnet() -> nn.Module:
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [Block(*each) for i, o, stride in stages for each in ((i, o, stride), (o, o, 1))]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def mlp() -> nn.Module:
    sizes = (784, 4096, 4096, 10)
    layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def masks(count: int) -> dict:
    """How many of so many random configurations give torch's mask bit for bit."""
    chosen, equal = random.Random(0), 0
    for _ in range(count):
        block = chosen.choice([(1, 1), (1, 2), (1, 4), (2, 2), (4, 1), (3, 5), (4, 4), (1, 8), (16, 16), (5, 3)])
        size = block[0] * block[1]
        zeros = chosen.choice([None, 0, size, *range(1, size)])
        height, width = chosen.randint(1, 99), chosen.randint(1, 99)
        if zeros not in (None, 0, size):  # torch needs blocks that fit
            height, width = block[0] * chosen.randint(1, 20), block[1] * chosen.randint(1, 20)
        level = chosen.choice([-1.0, 0.0, 0.15, 0.25, 0.5, 0.75, 0.95, 1.0, 2.0, chosen.random()])
        norm, layer, made = chosen.choice([1, 2]), nn.Linear(width, height), []
        for module in (pruning, torchs):
            model = nn.Sequential(copy.deepcopy(layer))
            sparsifier = module.WeightNormSparsifier(level, block, zeros, norm)
            sparsifier.prepare(model, config=None)
            sparsifier.step()
            made.append(model[0].parametrizations.weight[0].mask.float())
        equal += torch.equal(*made)
    print(f"masks: {equal} of {count} random configurations are torch's bit for bit")
    return {"what": "masks", "configurations": count, "equal": equal}


def step(name: str, rounds: int, count: int) -> dict:
    calls = {}
    for key, module in (("deadband", pruning), ("torch", torchs)):
        model = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))
        sparsifier = module.WeightNormSparsifier(**STEPS[name])
        sparsifier.prepare(model, config=None)
        calls[key] = sparsifier.step
    with threads(count):
        times = interleave(calls, rounds=rounds, what=f"step, {name}", progress=False)
    seconds = {key: median(values) for key, values in times.items()}
    speed = seconds["torch"] / seconds["deadband"]
    print(f"step, {name}, {count} threads: {seconds['deadband']:.2f} s, torch {seconds['torch']:.2f} s: {speed:.1f}x")
    return {"what": f"step, {name}", "threads": count, "seconds": seconds, "speed": speed}


def warmed(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """With batch normalization as training leaves it: what is zero before it is not after it."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, *x.shape[1:]))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
    return model.eval()


def latency(name: str, dense: nn.Module, x: torch.Tensor, rounds: int, counts: list[int], coupled: bool = False):
    dense = warmed(dense, x)
    model = copy.deepcopy(dense)
    pruner = pruning.SaliencyPruner({"sparsity_level": 0.5, "coupled": coupled})
    last = str(len(dense) - 1)  # what gives the output
    pruner.prepare(model, [{"tensor_fqn": "*.weight", "exclude": f"{last}.*"}], example=x)
    pruner.step()
    with torch.inference_mode():
        masked = model(x)
    pruner.prune(x)
    report = pruner.compaction
    for count in counts:
        with threads(count), torch.inference_mode():
            error = float((model(x) - masked).abs().max() / masked.abs().max())
            calls = {"dense": functools.partial(dense, x), "pruned": functools.partial(model, x)}
            times = interleave(calls, rounds=rounds, what=name, progress=False)
        seconds = {key: median(values) for key, values in times.items()}
        speed, flops = seconds["dense"] / seconds["pruned"], report.flops[0] / report.flops[1]
        print(
            f"{name}, {count} threads: dense {seconds['dense'] * 1e3:.2f} ms, pruned {seconds['pruned'] * 1e3:.2f} ms: "
            f"{speed:.2f}x; {flops:.2f}x fewer FLOPs; off the masked model by {error:.1e} of its largest output"
        )
        yield {
            "what": name, "threads": count, "seconds": seconds, "speed": speed, "error": error,
            "flops": report.flops, "parameters": report.parameters,
        }  # fmt: skip


def scattering(rounds: int, count: int):
    """Whether computing half of the outputs pays, where all of them have to be there."""
    image = 1, 64, 56, 56
    layers = [(nn.Linear(side, side), (rows, side)) for side in (256, 512, 768, 1024, 2048) for rows in (1, 64)]
    layers += [(nn.Conv2d(64, 64, 3, padding=1), image), (nn.Conv2d(64, 256, 1), image)]
    for dense, shape in layers:
        half, x = copy.deepcopy(dense), torch.randn(shape)
        resize_(half, Resize(made=torch.arange(0, len(dense.weight), 2)))
        calls = {"dense": functools.partial(dense, x), "half": functools.partial(half, x)}
        with threads(count), torch.inference_mode():
            times = interleave(calls, rounds=rounds, what="scattering", progress=False)
        seconds = {key: median(values) for key, values in times.items()}
        name = f"{type(dense).__name__} {' x '.join(map(str, dense.weight.shape))} on {' x '.join(map(str, shape))}"
        print(f"scattering, {name}, {count} threads: {seconds['dense'] / seconds['half']:.2f}x")
        yield {"what": name, "threads": count, "seconds": seconds, "speed": seconds["dense"] / seconds["half"]}


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.manual_seed(0)
    rows = [masks(500)]
    rows += [step(name, 3 * options.rounds, count) for name in STEPS for count in options.threads]
    rounds = 15 * options.rounds
    image = torch.randn(1, 3, 224, 224)
    rows += latency("ResNet-18-like, each layer by itself", resnet(), image, rounds, options.threads)
    rows += latency("ResNet-18-like, layers on a stream alike", resnet(), image, rounds, options.threads, coupled=True)
    rows += latency("MLP", mlp(), torch.randn(1, 784), 4 * rounds, options.threads)
    for count in options.threads:
        rows += scattering(40 * options.rounds, count)
    save("pruning", rows)


if __name__ == "__main__":
    main()
