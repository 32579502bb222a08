"""Ranks of distributed training make the same mask: two real processes over gloo."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from deadband import pruning
from deadband.masks import aggregate, mask, reduce
from deadband.masks.sparsifier import ActivationSparsifier, LayerError


def add(a, b):
    return a + b


def add_squares(a, b):  # what two ranks give does not add up by the function itself
    return a + b * b


def batch_mean(data):
    return data.mean(0)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def batches(rank):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(rows, 6, generator=generator) * (1 + 3 * rank) for rows in ((4, 3) if rank else (2,))]


def random_mask(data, sparsity):
    return torch.rand_like(data.float()) > sparsity


def train(rank, options, features):
    torch.manual_seed(100 + rank)  # so that random masks differ
    model = DistributedDataParallel(network())
    sparsifier = ActivationSparsifier(model, **options, sparsity=0.5)
    sparsifier.register_layer(model.module[2], features=features, feature_dim=1 if features else None)
    for x in batches(rank):
        with model.no_sync():  # the ranks have different numbers of batches
            model(x).sum().backward()
    data = sparsifier.data_groups["module.2"]["data"]
    sparsifier.step()
    sparsifier.squash_mask()
    model(batches(rank)[0]).sum().backward()
    masks = sparsifier.get_mask("2")
    return {
        "data": data,
        "mask": torch.cat(masks) if isinstance(masks, list) else masks,
        "rows": sum(map(len, batches(rank))),
    }


def one_rank_idle(rank):
    model = network()
    sparsifier = ActivationSparsifier(model, aggregate.mean_abs, reduce.mean, mask.magnitude, sparsity=0.5)
    sparsifier.register_layer(model[2])
    with pytest.raises(LayerError, match="no input has reached '2'"):
        sparsifier.step()
    if rank == 1:
        model(batches(1)[0])
    sparsifier.step()
    return {"mask": sparsifier.get_mask("2")}


def alone(rank):
    model = network()
    sparsifier = ActivationSparsifier(model, add, batch_mean, mask.magnitude, sparsity=0.5, synchronise=False)
    sparsifier.register_layer(model[2])
    if rank == 0:  # no other rank is waited for
        model(batches(0)[0])
        sparsifier.step()
    return {}


def sharded(rank):
    model = fully_shard(network())
    sparsifier = ActivationSparsifier(model, aggregate.mean_abs, reduce.mean, mask.magnitude, sparsity=0.5)
    sparsifier.register_layer(model[2])
    model(batches(rank)[0]).sum().backward()
    sparsifier.step()
    sparsifier.squash_mask()
    model(batches(rank)[0]).sum().backward()
    return {"mask": sparsifier.get_mask("2")}


def worker(rank, port, job, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        torch.save(job(rank), f"{folder}/{rank}.pt")
        dist.barrier()  # the other may still be gathering
    finally:
        dist.destroy_process_group()


def on_two_ranks(job, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(worker, (port, job, str(tmp_path)), nprocs=2)
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]


OPTIONS = {
    **{
        name: {"aggregate_fn": getattr(aggregate, name), "reduce_fn": reduce.mean, "mask_fn": mask.magnitude}
        for name in ("sum", "mean", "max_abs", "ema")
    },
    "mine": {"aggregate_fn": add, "reduce_fn": batch_mean, "mask_fn": mask.magnitude},
    "squares": {"aggregate_fn": add_squares, "reduce_fn": batch_mean, "mask_fn": mask.magnitude},
    "random": {"aggregate_fn": add, "reduce_fn": batch_mean, "mask_fn": random_mask},
}


class RandomWeights(pruning.BaseSparsifier):
    """Draws a mask, on each rank by itself."""

    def update_mask(self, module, tensor_name, tensor_fqn, **group):
        self.state[tensor_fqn]["mask"].copy_(torch.rand_like(getattr(module, tensor_name)) > 0.5)


def prune_weights(rank):
    torch.manual_seed(100 + rank)
    model = DistributedDataParallel(network())
    sparsifier = RandomWeights()
    sparsifier.prepare(model, [{"tensor_fqn": "*.weight"}])
    sparsifier.step()
    model(batches(rank)[0]).sum().backward()
    sparsifier.squash_mask()
    return {"masks": [state["mask"] for state in sparsifier.state.values()], "weight": model.module[0].weight.detach()}


def train_with_all(rank):
    return {
        f"{name} {features}": train(rank, options, features)
        for name, options in OPTIONS.items()
        for features in (None, [1, 5])
    }


@pytest.mark.slow
def test_ranks_agree(tmp_path):
    results = on_two_ranks(train_with_all, tmp_path)
    for key in results[0]:
        first, second = (result[key] for result in results)
        assert torch.equal(first["mask"], second["mask"]), key
        if key.endswith("None") and key.split()[0] in ("sum", "mean", "ema", "max_abs"):
            rows = first["rows"], second["rows"]
            assert rows == (2, 7)
            expected = {
                "sum": first["data"] + second["data"],
                "mean": (2 * first["data"] + 7 * second["data"]) / 9,
                "ema": (2 * first["data"] + 7 * second["data"]) / 9,
                "max_abs": torch.maximum(first["data"], second["data"]),
            }[key.split()[0]]
            assert torch.equal(first["mask"], mask.magnitude(expected, 0.5)), key


@pytest.mark.slow
def test_a_rank_without_input_makes_the_same_mask(tmp_path):
    first, second = on_two_ranks(one_rank_idle, tmp_path)
    assert torch.equal(first["mask"], second["mask"])
    assert first["mask"].sum() == 4


@pytest.mark.slow
def test_sharded_models_agree_too(tmp_path):
    first, second = on_two_ranks(sharded, tmp_path)
    assert torch.equal(first["mask"], second["mask"])
    assert first["mask"].sum() == 4


@pytest.mark.slow
def test_ranks_may_stay_on_their_own(tmp_path):
    on_two_ranks(alone, tmp_path)


def test_masks_of_weights_are_those_of_the_first_rank(tmp_path):
    one, other = on_two_ranks(prune_weights, tmp_path)
    assert all(torch.equal(*pair) for pair in zip(one["masks"], other["masks"], strict=True))
    assert torch.equal(one["weight"], other["weight"])
    assert 0 < one["masks"][0].mean() < 1
