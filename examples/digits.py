"""Make a network for handwritten digits half as wide while it trains, and then for real: less to compute, as accurate.

pip install scikit-learn "deadband[compact]"
python examples/digits.py [--threads N]
"""

from __future__ import annotations

import argparse
import copy
import functools

import torch
from torch import Tensor, nn

from deadband import ActivationSparsifier
from deadband.masks import aggregate, mask, reduce
from deadband.running.forward import evaluating
from deadband.running.timing import interleave, median

try:
    from sklearn.datasets import load_digits
except ImportError:
    raise SystemExit("the digits come with scikit-learn: pip install scikit-learn") from None

BATCH = 64
DENSE_EPOCHS, SPARSE_EPOCHS = 5, 6


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1,797 images of 8 × 8 pixels with their digits: three quarters to train on, one quarter to judge by."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images))
    train, test = order[: len(order) * 3 // 4], order[len(order) * 3 // 4 :]
    return (images[train], labels[train]), (images[test], labels[test])


def network() -> nn.Sequential:
    """Three convolutions and two linear layers, wider than they need to be."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128 * 4 * 4, 512), nn.ReLU(),
        nn.Linear(512, 10),
    )  # fmt: skip


def train(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, sparsifier: ActivationSparsifier | None = None
) -> None:
    """Plain training; the sparsifier needs one line."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            if sparsifier is not None:
                sparsifier.step()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that the model names right."""
    with evaluating(model):
        return (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Train, sparsify, compact, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="of torch; by default, what torch chooses")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    data, test = digits()

    model = network()
    train(model, *data, DENSE_EPOCHS)
    models = {"dense": copy.deepcopy(model)}

    # mask half of what goes into each layer but the first, that is, of what the layer before it makes
    sparsifier = ActivationSparsifier(model, aggregate.mean_abs, reduce.mean, mask.magnitude)
    _, second, third = (layer for layer in model if isinstance(layer, nn.Conv2d))
    hidden, output = (layer for layer in model if isinstance(layer, nn.Linear))
    for layer in (second, third, output):
        sparsifier.register_layer(layer)
    # behind nn.Flatten, 16 neighbours are the pixels of one channel; they go together, so that the channel can go, too
    sparsifier.register_layer(hidden, mask_fn=mask.block, size=4 * 4)

    steps_per_epoch = -(-len(data[0]) // BATCH)
    sparsifier.schedule(0.5, steps=steps_per_epoch * SPARSE_EPOCHS // 2)  # and then as long with all masks in force
    train(model, *data, SPARSE_EPOCHS, sparsifier)
    models["masked"] = copy.deepcopy(model)

    print(sparsifier.compact_(), end="\n\n")
    models["compacted"] = model

    milliseconds: dict[tuple[str, int], float] = {}
    for size in (1, 64):
        batch = test[0][:size]
        calls = {name: functools.partial(each.eval(), batch) for name, each in models.items()}
        with torch.inference_mode():
            for name, seconds in interleave(calls, rounds=50, progress=False).items():
                milliseconds[name, size] = median(seconds) * 1e3

    print("| model | accuracy | parameters | ms at batch 1 | ms at batch 64 |")
    print("|---|---|---|---|---|")
    for name, each in models.items():
        parameters = sum(parameter.numel() for parameter in each.parameters())
        times = " | ".join(f"{milliseconds[name, size]:.2f}" for size in (1, 64))
        print(f"| {name} | {accuracy(each, *test):.2%} | {parameters:,} | {times} |")


if __name__ == "__main__":
    main()
