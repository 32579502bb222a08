import builtins
import copy
import importlib
import io
import json
import pickle
import random

import pytest
import torch
from conftest import same_state, state_of, tiny_model
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import deadband.compaction.compact
import deadband.compaction.resize
from deadband.compaction.check import masking
from deadband.compaction.compact import compact_, load_compact_
from deadband.compaction.resize import GatheredConv1d, GatheredConv2d, GatheredConv3d, GatheredLinear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.05}


def random_mask(size, seed=0, share=0.5):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share
    mask[seed % size], mask[(seed + 1) % size] = True, False  # neither all nor nothing
    return mask


def first(size, count):
    return torch.arange(size) < count


def stirred(model, seed=0):
    """Biases and statistics as training leaves them, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                value += 0.3 * torch.rand(value.shape, generator=generator)
                if name.endswith("bias"):
                    value -= 0.2
    return model.eval()


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [value for value in values if isinstance(value, torch.Tensor)]


def close(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        tolerance = TOLERANCE[other.dtype]
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


def checked(model, masks, *inputs, example=0, **options):
    """Compact `model` on one of `inputs` (each an argument) and compare it with the masked model on all of them."""
    dense = copy.deepcopy(model)
    report = compact_(model, masks, ((inputs[example],), {}), **options)
    with torch.no_grad():
        for x in inputs:
            with masking(dense, {name: mask for name, mask in masks.items() if name not in report.left}):
                expected = tensors(dense(x))
            close(tensors(model(x)), expected)
    return report


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.GELU(), nn.Dropout(), nn.Linear(12, 4))
    return stirred(model.to(dtype))


def cnn():
    torch.manual_seed(0)
    return stirred(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 3),
            nn.BatchNorm2d(6),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 5),
        )
    )


IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))


class Wired(nn.Module):
    """Layers by name, and what to do with them."""

    def __init__(self, wiring, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.wiring = wiring

    def forward(self, x):
        return self.wiring(self, x)


def wired(wiring, **layers):
    return stirred(Wired(wiring, **layers))


# ------------------------------------------------------------------------------------------------ producers that shrink


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mlp(seed, dtype):
    model, masks = mlp(dtype), {"2": random_mask(16, seed), "5": random_mask(12, seed + 1)}
    one, other = (int(mask.sum()) for mask in masks.values())
    parameters = sum(value.numel() for value in model.parameters())
    report = checked(model, masks, ROWS.to(dtype), torch.randn(1, 8, dtype=dtype), torch.randn(2, 5, 8, dtype=dtype))
    assert [tuple(model[index].weight.shape) for index in (0, 2, 5)] == [(one, 8), (other, one), (4, other)]
    assert [(model[index].in_features, model[index].out_features) for index in (2, 5)] == [(one, other), (other, 4)]
    assert type(model[2]) is type(model[5]) is nn.Linear
    assert report.removed == {"2": 16 - one, "5": 12 - other}
    assert (report.gathered, report.left, report.note) == ({}, {}, "")
    assert report.parameters == (parameters, sum(value.numel() for value in model.parameters()))
    assert all(value.dtype == dtype for value in model.parameters())
    assert report.flops[0] > report.flops[1] > 0
    assert min(report.seconds) > 0


@pytest.mark.parametrize("seed", range(4))
def test_cnn(seed):
    model, channels = cnn(), random_mask(6, seed)
    features = channels.repeat_interleave(4) & (torch.arange(24) != seed)  # one partly masked channel stays and gathers
    report = checked(model, {"4": random_mask(8, seed), "9": features}, IMAGES, torch.randn(1, 3, 20, 16))
    assert model[0].out_channels == model[1].num_features == model[1].running_var.numel() == model[4].in_channels < 8
    assert report.removed == {"4": int((~random_mask(8, seed)).sum()), "9": 4 * int((~channels).sum())}
    assert report.gathered == ({"9": 1} if channels[0] else {})


@pytest.mark.parametrize(
    ("conv", "norm", "shape", "gathered"),
    [
        (nn.Conv1d, nn.BatchNorm1d, (2, 4, 9), GatheredConv1d),
        (nn.Conv2d, nn.BatchNorm2d, (2, 4, 7, 9), GatheredConv2d),
        (nn.Conv3d, nn.BatchNorm3d, (2, 4, 5, 4, 6), GatheredConv3d),
    ],
)
def test_convolutions(conv, norm, shape, gathered):
    def model():
        torch.manual_seed(0)
        layers = conv(4, 6, 3, padding=1, padding_mode="reflect"), norm(6), nn.LeakyReLU(), conv(6, 5, 3, stride=2)
        return stirred(nn.Sequential(*layers))

    x, masks = torch.randn(shape), {"3": random_mask(6), "0": random_mask(4)}
    compacted = model()
    report = checked(compacted, masks, x, x[:1], x[..., :-1])
    assert set(report.removed) == {"3"}
    assert set(report.gathered) == {"0"}
    assert type(compacted[0]) is gathered
    assert type(compacted[3]) is conv
    only_gathers = model()
    report = checked(only_gathers, masks, x, x[:1], producers=False)
    assert not report.removed
    assert set(report.gathered) == {"0", "3"}
    unbatched = stirred(conv(4, 6, 3))
    checked(unbatched, {"": random_mask(4)}, x[0], x)
    assert type(unbatched) is gathered
    if conv is nn.Conv2d:
        last = model().to(memory_format=torch.channels_last)
        checked(last, masks, x.to(memory_format=torch.channels_last))
        assert last[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_embedding():
    model = stirred(nn.Sequential(nn.Embedding(20, 8, padding_idx=0), nn.ReLU(), nn.Linear(8, 4)))
    report = checked(model, {"2": random_mask(8)}, torch.arange(6).view(2, 3), torch.arange(20))
    assert model[0].embedding_dim == model[0].weight.shape[1] == model[2].in_features < 8
    assert set(report.removed) == {"2"}
    normed = stirred(nn.Sequential(nn.Embedding(20, 8, max_norm=1.0), nn.Linear(8, 4)))
    assert set(checked(normed, {"1": random_mask(8)}, torch.arange(6)).gathered) == {"1"}


def test_depthwise_and_prelu_in_between():
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 4, 1)
    model = stirred(nn.Sequential(*layers))
    report = checked(model, {"4": random_mask(8)}, IMAGES, IMAGES[:1])
    assert report.removed == {"4": int((~random_mask(8)).sum())}
    assert model[1].groups == model[1].in_channels == model[1].out_channels == model[3].num_parameters < 8
    one_slope = stirred(nn.Sequential(nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 2)))
    assert set(checked(one_slope, {"2": random_mask(8)}, ROWS).removed) == {"2"}


def test_gated_mlp_and_sums_lose_rows_of_both_producers():
    gated = wired(
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x) + 1),
        gate=nn.Linear(8, 16), up=nn.Linear(8, 16, bias=False), down=nn.Linear(16, 8),
    )  # fmt: skip
    report = checked(gated, {"down": random_mask(16)}, ROWS, torch.randn(2, 3, 8))
    assert gated.gate.out_features == gated.up.out_features == gated.down.in_features < 16
    assert set(report.removed) == {"down"}


def test_concat_and_chunk():
    joined = wired(
        lambda m, x: (m.last(torch.cat([m.a(x).relu(), c := m.c(x), m.b(x)], 1)), c),
        a=nn.Linear(8, 5), c=nn.Linear(8, 8), b=nn.Linear(8, 6), last=nn.Linear(19, 3),
    )  # fmt: skip
    mask = random_mask(19)
    report = checked(joined, {"last": mask}, ROWS, ROWS[:1])
    assert (joined.a.out_features, joined.b.out_features) == (int(mask[:5].sum()), int(mask[13:].sum()))
    assert report.gathered == {"last": int((~mask[5:13]).sum())}
    outside = wired(lambda m, x: m.last(torch.cat([m.a(x), x], 1)), a=nn.Linear(8, 5), last=nn.Linear(13, 3))
    checked(outside, {"last": random_mask(13)}, ROWS, ROWS[:1])  # autograd does not see x, so the indices do not fit
    images = wired(
        lambda m, x: m.last(torch.cat([m.a(x), F.max_pool2d(m.b(x), 1)], 1)),
        a=nn.Conv2d(3, 5, 3), b=nn.Conv2d(3, 6, 3), last=nn.Conv2d(11, 3, 3),
    )  # fmt: skip
    mask = torch.arange(11) < 5
    report = checked(images, {"last": mask}, IMAGES, IMAGES[:1])
    assert (images.a.out_channels, images.b.out_channels) == (5, 1)  # a convolution without channels is none
    assert (report.removed, report.gathered) == ({"last": 5}, {"last": 1})
    halves = wired(
        lambda m, x: m.last(torch.mul(*m.both(x).chunk(2, -1))), both=nn.Linear(8, 12), last=nn.Linear(6, 3)
    )  # fmt: skip
    checked(halves, {"last": random_mask(6)}, ROWS, torch.randn(2, 3, 8))


def test_layers_that_run_twice():
    model = wired(lambda m, x: m.b(m.a(x).relu()) + m.b(m.a(x + 1)), a=nn.Linear(8, 6), b=nn.Linear(6, 3))
    assert set(checked(model, {"b": random_mask(6)}, ROWS).removed) == {"b"}
    model = wired(lambda m, x: m.b(m.a(x)) + m.b(x[:, :6]), a=nn.Linear(8, 6), b=nn.Linear(6, 3))
    assert set(checked(model, {"b": random_mask(6)}, ROWS).gathered) == {"b"}


def test_indices_that_wander_end():
    def steps(m, x):
        y = m.a(x)
        z = torch.cat([y[..., :4], y[..., :4]], -1) + torch.cat([m.a(x)[..., 4:], m.b(y)[..., 2:6]], -1)
        return m.c(m.b(z))

    model = wired(steps, a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3))
    report = checked(model, {"b": random_mask(8), "c": random_mask(8)}, ROWS)  # Torch-Pruning's own walk does not end
    assert set(report.gathered) == {"b", "c"}


def test_empty_batches_and_no_grad():
    model = mlp()
    with torch.no_grad():
        report = compact_(model, {"0": random_mask(8), "2": random_mask(16)}, ((ROWS,), {}))
        assert (set(report.removed), set(report.gathered)) == ({"2"}, {"0"})
        assert model(torch.ones(0, 3, 8)).shape == (0, 3, 4)
    assert all(value.requires_grad for value in model.parameters())


def test_random_numbers_are_not_touched():
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = mlp()
    torch.manual_seed(5)
    compact_(model, {"2": random_mask(16)}, ((ROWS,), {}))
    assert torch.equal(torch.rand(3), expected)


def test_called_by_keyword():
    model = wired(lambda m, x: m.b(input=m.a(input=x)), a=nn.Linear(8, 6), b=nn.Linear(6, 3))
    report = checked(model, {"a": random_mask(8), "b": random_mask(6)}, ROWS)
    assert (set(report.removed), set(report.gathered)) == ({"b"}, {"a"})


# -------------------------------------------------------------------------------------------- producers that stay whole


BETWEEN = {
    "layer norm": nn.LayerNorm(12),
    "group norm": nn.GroupNorm(3, 12),
    "softmax": nn.Softmax(-1),
    "maximum": lambda y: y - y.amax(-1, keepdim=True),
    "mean": lambda y: y - y.mean(-1, keepdim=True),
    "root mean square": lambda y: y * y.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt(),
    "sort": lambda y: y.sort(-1).values,
    "detached sum": lambda y: y * y.detach().sum(-1, keepdim=True),
    "hidden choice": lambda y: torch.where(y.argmax(-1, keepdim=True) < 6, y, -y),
    "top k": lambda y: torch.where(y >= y.topk(4, -1).values[..., -1:], y, 0),
    "flip": lambda y: y.flip(-1),
    "roll": lambda y: y.roll(1, -1),
    "order": lambda y: y[..., torch.arange(11, -1, -1)],
    "reshape": lambda y: y.view(-1, 3, 4).transpose(1, 2).reshape(-1, 12),
    "matrix": lambda y: y @ torch.full((12, 12), 0.1, dtype=y.dtype),
    "width": lambda y: y / y.shape[-1],
    "buffer": lambda y: y * torch.arange(1, 13),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_what_mixes_features_keeps_the_producer(between):
    model = wired(
        lambda m, x: m.b(BETWEEN[between](m.a(x).relu())), a=nn.Linear(8, 12), b=nn.Linear(12, 3)
    )  # fmt: skip
    with torch.no_grad():
        model.a.bias[6:] -= 50  # dead here, and masked for it: nothing shows what reads them
    report = checked(model, {"b": first(12, 6)}, ROWS, torch.randn(2, 8))
    assert (report.removed, report.gathered) == ({}, {"b": 6})
    assert model.a.out_features == 12
    with torch.no_grad():
        model.a.bias[6:] += 60
    other = wired(model.wiring, a=nn.Linear(8, 12), b=nn.Linear(12, 3))
    assert checked(other, {"b": first(12, 6)}, ROWS).gathered == {"b": 6}


def test_residual_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.norm1(self.conv1(x)).relu_()
            return (self.norm2(self.conv2(y)) + x).relu()

    model = stirred(nn.Sequential(nn.Conv2d(3, 8, 3), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    masks = {f"{block}.{conv}": random_mask(8, block) for block in (1, 2) for conv in ("conv1", "conv2")}
    report = checked(model, masks, IMAGES, IMAGES[:1, :, :9])
    assert set(report.removed) == {"1.conv2", "2.conv2"}
    assert set(report.gathered) == {"1.conv1", "2.conv1"}
    assert type(model[1].conv1) is GatheredConv2d
    assert (model[1].conv1.out_channels, model[2].conv1.in_channels) == (
        int(masks["1.conv2"].sum()),
        int(masks["2.conv1"].sum()),
    )


def test_shared_producer():
    def model():
        return wired(
            lambda m, x: (m.b(y := m.a(x).relu()), m.c(y)), a=nn.Linear(8, 12), b=nn.Linear(12, 3), c=nn.Linear(12, 4)
        )

    one, other = random_mask(12, 1), random_mask(12, 2)
    equal = model()
    report = checked(equal, {"b": one, "c": one}, ROWS)
    assert report.removed == {"b": int((~one).sum()), "c": int((~one).sum())}
    assert not report.gathered
    different = model()
    both = int((~one & ~other).sum())
    assert both
    report = checked(different, {"b": one, "c": other}, ROWS, ROWS[:1])
    assert different.a.out_features == 12 - both
    assert report.removed == {"b": both, "c": both}
    assert report.gathered == {"b": int((~one).sum()) - both, "c": int((~other).sum()) - both}
    assert type(different.b) is type(different.c) is GatheredLinear
    alone = checked(model(), {"b": one}, ROWS)
    assert (alone.removed, alone.gathered) == ({}, {"b": int((~one).sum())})


def test_producer_that_is_an_output():
    model = wired(lambda m, x: {"hidden": (y := m.a(x)), "out": m.b(y)}, a=nn.Linear(8, 12), b=nn.Linear(12, 3))
    report = checked(model, {"b": random_mask(12)}, ROWS)
    assert (report.removed, model.a.out_features) == ({}, 12)


def test_models_that_cannot_be_followed_gather():
    model = wired(lambda m, x: m.b(torch.no_grad()(m.a)(x)).detach(), a=nn.Linear(8, 12), b=nn.Linear(12, 3))
    report = checked(model, {"b": random_mask(12)}, ROWS)
    assert set(report.gathered) == {"b"}
    assert "Torch-Pruning" in report.note
    single = wired(lambda m, x: m.b(m.a(x.float()).float()), a=nn.Linear(8, 12), b=nn.Linear(12, 3))
    assert set(checked(single, {"b": random_mask(12)}, ROWS).removed) == {"b"}  # does not run in float64
    half = wired(lambda m, x: m.b(m.a(x.bfloat16()).bfloat16()), a=nn.Linear(8, 12), b=nn.Linear(12, 3)).bfloat16()
    report = checked(half, {"b": random_mask(12)}, ROWS.bfloat16())
    assert set(report.gathered) == {"b"}
    assert "float64" in report.note


class RandomNetwork(nn.Module):
    """Steps drawn by chance, each from any value before: what a masked layer reads may be read anywhere else."""

    steps = (
        "linear",
        "linear",
        "linear",
        "again",
        "relu",
        "add",
        "times",
        "join",
        "half",
        "gate",
        "norm",
        "roll",
        "mean",
    )

    def __init__(self, seed):
        super().__init__()
        draw, self.plan, self.widths, self.layers = random.Random(seed), [], [6], nn.ModuleList()
        for step in draw.choices(self.steps, k=9):
            source, other = draw.choice([-1, draw.randrange(len(self.widths))]), draw.randrange(len(self.widths))
            width = self.widths[source]
            like = [index for index, layer in enumerate(self.layers) if getattr(layer, "in_features", 0) == width]
            if step == "linear" or (step == "norm" and width > 1):
                self.layers.append(
                    nn.Linear(width, draw.choice([4, 6, 8])) if step == "linear" else nn.LayerNorm(width)
                )
                other = len(self.layers) - 1
            elif step == "again" and like:
                other = draw.choice(like)
            elif step in ("add", "times"):
                other = draw.choice([index for index, each in enumerate(self.widths) if each == width])
            elif (step in ("half", "gate") and width % 2) or step == "again":
                continue
            self.plan.append((step, source, other))
            grown = {"join": width + self.widths[other], "half": width // 2, "gate": width // 2}.get(step, width)
            self.widths.append(
                getattr(self.layers[other], "out_features", width) if step in ("linear", "again") else grown
            )
        self.head = nn.Linear(self.widths[-1], 3)

    def forward(self, x):
        values = [x]
        for step, source, other in self.plan:
            y = values[source]
            if step in ("linear", "again", "norm"):
                y = self.layers[other](y)
            elif step in ("half", "gate"):
                one, two = y.chunk(2, -1)
                y = one if step == "half" else one * two.sigmoid()
            else:
                y = {
                    "relu": torch.relu,
                    "add": lambda y, z: y + z,
                    "times": lambda y, z: y * z,
                    "join": lambda y, z: torch.cat([y, z], -1),
                    "roll": lambda y: y.roll(1, -1),
                    "mean": lambda y: y - y.mean(-1, keepdim=True),
                }[step](*((y, values[other]) if step in ("add", "times", "join") else (y,)))
            values.append(y)
        return self.head(values[-1])


@pytest.mark.parametrize("seed", range(40))
def test_random_networks(seed):
    torch.manual_seed(seed)
    model = stirred(RandomNetwork(seed).double())
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    masks = {name: random_mask(module.in_features, seed + index) for index, (name, module) in enumerate(linear.items())}
    masks = {name: mask for index, (name, mask) in enumerate(masks.items()) if (seed + index) % 4}
    x = torch.randn(2, 6, dtype=torch.float64)
    dense = copy.deepcopy(model)
    checked(model, masks, x, 5 * torch.randn(3, 6, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64))
    assert torch.equal(load_compact_(dense, model.state_dict())(x), model(x))


# ------------------------------------------------------------------------------------------------------------ the edges


def test_all_kept_changes_nothing():
    model = mlp()
    before = {name: id(value) for name, value in model.named_parameters()}
    report = checked(model, {"0": first(8, 8), "2": first(16, 16)}, ROWS)
    assert before == {name: id(value) for name, value in model.named_parameters()}
    assert (report.removed, report.gathered, report.left) == ({}, {}, {})
    assert report.parameters[0] == report.parameters[1]
    assert not compact_(model, {}, ((ROWS,), {})).removed


def test_all_masked():
    model = mlp()
    report = checked(model, {"0": first(8, 0), "2": first(16, 0), "5": first(12, 0)}, ROWS, torch.randn(2, 3, 8))
    assert [model[index].in_features for index in (0, 2, 5)] == [1, 1, 1]
    assert model[0].out_features == 1
    assert report.removed == {"2": 15, "5": 11}
    assert report.gathered == {"0": 8, "2": 1, "5": 1}
    with torch.no_grad():
        assert model(torch.full((1, 8), float("nan"))).isfinite().all()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close([compiled(ROWS)], [model(ROWS)])
        close([torch.export.export(model, (ROWS,)).module()(ROWS)], [model(ROWS)])
    checked(cnn(), {"0": first(3, 0), "4": first(8, 0), "9": first(24, 0)}, IMAGES)
    checked(cnn(), {"0": first(3, 0), "4": first(8, 0), "9": first(24, 0)}, IMAGES, producers=False)


def test_nan_and_infinity_in_masked_features_do_not_matter():
    model = wired(lambda m, x: m.b(m.a(x).relu()) + m.c(x), a=nn.Linear(8, 12), b=nn.Linear(12, 3), c=nn.Linear(8, 3))
    x = ROWS.clone()
    x[:, 6], x[:, 7] = float("nan"), float("inf")
    report = checked(model, {"a": first(8, 6), "b": first(12, 5), "c": first(8, 4)}, x, ROWS)
    assert (set(report.removed), set(report.gathered)) == ({"b"}, {"a", "c"})
    with torch.no_grad():
        assert model(x).isfinite().all()


def test_layers_that_are_left():
    odd = wired(
        lambda m, x: m.last(m.grouped(m.a(x)[..., None]).flatten(1)) + m.lstm(m.a(x))[0] + m.deep(x[..., None])[..., 0],
        a=nn.Linear(8, 8), grouped=nn.Conv1d(8, 8, 1, groups=2), lstm=nn.LSTM(8, 8), deep=nn.Conv1d(8, 8, 1, groups=8),
        last=parametrizations.weight_norm(nn.Linear(8, 8)), idle=nn.Linear(8, 8),
    )  # fmt: skip
    names = ("grouped", "lstm", "deep", "last", "idle")
    report = checked(odd, dict.fromkeys(names, random_mask(8)), ROWS)
    assert {name: reason.split(" ")[0] for name, reason in report.left.items()} == {
        "grouped": "a", "lstm": "LSTM", "deep": "a", "last": "ParametrizedLinear", "idle": "the",
    }  # fmt: skip
    assert odd.a.out_features == 8
    reads = wired(
        lambda m, x: m.b(m.a(x)) + F.linear(m.c(x), m.b.weight),
        a=nn.Linear(8, 6), b=nn.Linear(6, 3), c=nn.Linear(8, 6),
    )  # fmt: skip
    report = checked(reads, {"b": random_mask(6), "c": random_mask(8)}, ROWS)
    assert "output changed" in report.left["b"]
    assert set(report.gathered) == {"c"}
    attention = stirred(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    masks = {"linear2": random_mask(16), "self_attn.out_proj": random_mask(8)}
    report = checked(attention, masks, torch.randn(2, 3, 8))
    assert set(report.left) == {"linear2", "self_attn.out_proj"}
    twice = stirred(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)))
    checked(twice, {"2": random_mask(8)}, ROWS)
    assert "already" in compact_(twice, {"2": first(3, 1)}, ((ROWS,), {})).left["2"]


def test_tied_weights_are_left():
    layers = {"embed": nn.Embedding(20, 8), "b": nn.Linear(8, 8), "head": nn.Linear(8, 20)}
    model = wired(lambda m, x: m.head(m.b(m.embed(x))), **layers)
    model.head.weight = model.embed.weight
    report = checked(model, {"b": random_mask(8), "head": random_mask(8)}, torch.arange(6))
    assert model.head.weight is model.embed.weight
    assert set(report.left) == {"head"}
    assert "shared" in report.left["head"]
    assert set(report.gathered) == {"b"}
    same = nn.Linear(8, 8)
    model = stirred(nn.Sequential(same, nn.ReLU(), same, nn.LayerNorm(8)))
    other = copy.deepcopy(model)
    assert set(checked(model, {"0": random_mask(8)}, ROWS).gathered) == {"0"}  # one layer in two places
    assert set(checked(other, {"2": random_mask(8)}, ROWS).gathered) == {"2"}
    with pytest.raises(ValueError, match="one layer"):
        compact_(model, {"0": first(8, 2), "2": first(8, 2)}, ((ROWS,), {}))


def test_what_is_not_resized_is_kept():
    model = cnn().train()
    model[0].requires_grad_(False)
    model[9].eval()
    calls, modules = [], dict(model.named_modules())
    model[4].register_forward_hook(lambda *_: calls.append(1))
    flags = {name: module.training for name, module in modules.items()}
    compact_(model, {"4": random_mask(8), "9": random_mask(24)}, ((IMAGES,), {}))
    assert modules == dict(model.named_modules())
    assert flags == {name: module.training for name, module in modules.items()}
    assert not model[0].weight.requires_grad
    assert model[4].weight.requires_grad
    calls.clear()
    model(IMAGES).sum().backward()
    assert calls == [1]
    assert model[4].weight.grad.shape == model[4].weight.shape


# ------------------------------------------------------------------------------------------------------------- language


def language_masks(model, *ends, seed=0):
    sizes = {
        name: module.weight.shape[0 if hasattr(module, "nx") else 1]
        for name, module in model.named_modules() if name.endswith(ends)
    }  # fmt: skip
    return {name: random_mask(size, seed + index) for index, (name, size) in enumerate(sizes.items())}


TOKENS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("name", "shrink", "gather"),
    [
        ("llama", "down_proj", "q_proj"),
        ("gemma3", "down_proj", "v_proj"),
        ("opt", "fc2", "k_proj"),
        ("gpt2", "mlp.c_proj", "c_attn"),
        ("phi3", "down_proj", "o_proj"),
        ("mixtral", "no such layer", "o_proj"),
    ],
)
def test_language_models(name, shrink, gather):
    model = tiny_model(name)
    shrinking, gathering = language_masks(model, shrink), language_masks(model, gather, seed=9)
    report = checked(model, {**shrinking, **gathering}, TOKENS, TOKENS[:1, :3])
    assert set(report.removed) == set(shrinking)
    assert set(report.gathered) == set(gathering)
    assert not report.left
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 10)


def test_gated_mlp_of_llama_loses_rows():
    model = tiny_model("llama", torch.bfloat16)
    masks = language_masks(model, "down_proj")
    compact_(model, masks, ((), {"input_ids": TOKENS, "use_cache": True}))
    for layer, mask in zip(model.model.layers, masks.values(), strict=True):
        assert layer.mlp.gate_proj.out_features == layer.mlp.up_proj.out_features == int(mask.sum())
        assert layer.mlp.down_proj.weight.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------- saving, copying, export


def compacted_cnn(seed=0):
    model = cnn()
    compact_(model, {"0": random_mask(3, seed), "4": random_mask(8, seed), "9": random_mask(24, seed)}, ((IMAGES,), {}))
    assert type(model[0]) is GatheredConv2d
    assert type(model[9]) is GatheredLinear
    return model


@pytest.mark.parametrize("seed", range(3))
def test_save_and_load(tmp_path, seed):
    model = compacted_cnn(seed)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh = cnn()
    assert load_compact_(fresh, load_file(tmp_path / "model.safetensors")) is fresh
    assert repr(fresh) == repr(model)
    assert fresh.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(fresh(IMAGES), model(IMAGES))
    assert torch.equal(load_compact_(fresh, model.state_dict())(IMAGES), model(IMAGES))  # once more


def test_load_depthwise_embedding_and_empty_layers():
    def model():
        return wired(
            lambda m, x: m.last(m.slope(m.deep(m.embed(x).transpose(1, 2)))),
            embed=nn.Embedding(20, 8), deep=nn.Conv1d(8, 8, 1, groups=8), slope=nn.PReLU(8), last=nn.Conv1d(8, 3, 1),
        )  # fmt: skip

    for mask in (random_mask(8), first(8, 0)):
        compacted, ids = model(), torch.arange(6).view(2, 3)
        compact_(compacted, {"last": mask}, ((ids,), {}))
        fresh = load_compact_(model(), compacted.state_dict())
        assert torch.equal(fresh(ids), compacted(ids))
        assert fresh.deep.groups == fresh.slope.num_parameters == fresh.embed.embedding_dim == max(int(mask.sum()), 1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_load_language_models(tmp_path, name):
    model = tiny_model(name)
    compact_(model, language_masks(model, "down_proj", "q_proj", "c_proj", "c_attn"), ((TOKENS,), {}))
    save_model(model, tmp_path / "model.safetensors")  # a tied weight is there under one name
    fresh = load_compact_(tiny_model(name, seed=1), load_file(tmp_path / "model.safetensors"))
    assert torch.equal(fresh(TOKENS).logits, model(TOKENS).logits)
    assert fresh.get_output_embeddings().weight is fresh.get_input_embeddings().weight


def test_copies():
    model = compacted_cnn()
    expected = model(IMAGES)
    assert torch.equal(copy.deepcopy(model)(IMAGES), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(IMAGES), expected)
    assert model.to(torch.bfloat16)(IMAGES.bfloat16()).dtype == torch.bfloat16
    assert model[9].kept.dtype == torch.int64
    gpt2 = tiny_model("gpt2")
    compact_(gpt2, language_masks(gpt2, "c_attn"), ((TOKENS,), {}))
    assert torch.equal(pickle.loads(pickle.dumps(gpt2))(TOKENS).logits, gpt2(TOKENS).logits)


def test_compile_and_export():
    model = compacted_cnn()
    linear = mlp()
    compact_(linear, {"0": first(8, 4), "2": first(16, 4)}, ((ROWS,), {}))
    rows, x = torch.export.Dim("rows", min=1), torch.randn(3, 4, 8)
    with torch.no_grad():
        for each, inputs in ((model, IMAGES), (linear, ROWS), (linear, x)):
            compiled = torch.compile(each, fullgraph=True, backend="aot_eager")
            close([compiled(inputs)], [each(inputs)])
        exported = torch.export.export(linear, (x,), dynamic_shapes=({0: rows},)).module()
        close([exported(x[:2])], [linear(x[:2])])
        close([torch.export.export(model, (IMAGES,)).module()(IMAGES)], [model(IMAGES)])


def test_report():
    model = mlp()
    masks = {"0": first(8, 4), "2": first(16, 4), "3": first(4, 1)}
    report = compact_(model, masks, ((ROWS,), {}))
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.to_dict()["removed"] == {"2": 12}
    text = str(report)
    assert all(word in text for word in ("parameters", "FLOPs", "milliseconds", "removed", "gathered", "GELU"))
    assert max(map(len, text.splitlines())) <= 120


# -------------------------------------------------------------------------------------------------- errors, all or none


@pytest.mark.parametrize(
    ("masks", "error", "words"),
    [
        ({"9": first(16, 4)}, ValueError, "'9'.*not a layer"),
        ({"2": first(15, 4)}, ValueError, r"\[15\].*expected \[16\]"),
        ({"2": first(16, 4)[None]}, ValueError, r"\[1, 16\]"),
        ({"2": torch.ones(16)}, TypeError, "float32.*bool"),
        ({"2": [True] * 16}, TypeError, "list.*bool"),
    ],
)
def test_bad_masks(masks, error, words):
    model = mlp()
    before = state_of(model)
    with pytest.raises(error, match=words):
        compact_(model, masks, ((ROWS,), {}))
    assert same_state(model, before)


def test_bad_example():
    model = mlp()
    with pytest.raises(TypeError, match="Tensor"):
        compact_(model, {"2": first(16, 4)}, ROWS)
    message = (
        r"does not run on the example, \(float32 \[\d+, 5\]\): RuntimeError: .* shapes .*Pass example=: the arguments"
    )
    with pytest.raises(ValueError, match=message):
        compact_(model, {"2": first(16, 4)}, ((ROWS[:, :5],), {}))
    assert model[0].out_features == 16


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["resize_", "seconds_of"])
def test_on_an_exception_the_model_is_as_before(monkeypatch, error, where):
    model = cnn()
    identities = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    before, shown, modules = state_of(model), repr(model), list(model.modules())
    home = {"resize_": deadband.compaction.resize, "seconds_of": deadband.compaction.compact}[where]
    original = getattr(home, where)
    done = []

    def failing(*args):
        result = original(*args)
        done.extend(arg for arg in args if isinstance(arg, nn.Module) and (arg in modules or where == "seconds_of"))
        if len(done) == {"resize_": 3, "seconds_of": 2}[where]:
            raise error
        return result

    monkeypatch.setattr(home, where, failing)
    with pytest.raises(error):
        compact_(model, {"0": first(3, 2), "4": first(8, 5), "9": torch.arange(24) % 2 == 0}, ((IMAGES,), {}))
    assert done
    assert repr(model) == shown
    assert same_state(model, before)
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == identities


def test_without_torch_pruning(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch_pruning" else find(name))
    model = mlp()
    with pytest.raises(ImportError, match=r'pip install "deadband\[compact\]"'):
        compact_(model, {"2": random_mask(16)}, ((ROWS,), {}))
    load = builtins.__import__

    def without(name, *rest):
        assert not name.startswith("torch_pruning")
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert set(checked(model, {"2": random_mask(16)}, ROWS, producers=False).gathered) == {"2"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("9.bias"), "lacks '9.bias'"),
        (lambda state: state.update(other=torch.ones(2)), "unknown 'other'"),
        (lambda state: state.update({"9.bias": torch.ones(6)}), "'9.bias' has shape"),
        (lambda state: state.update({"1.running_var": torch.ones(2)}), "1.running_var"),
        (lambda state: state.update({"9.kept": state["9.kept"] + 100}), "9.kept"),
        (lambda state: state.update({"9.kept": state["9.kept"].int()}), "9.kept"),
        (lambda state: state.update({"9.kept": state["9.kept"][1:]}), "9.weight"),
        (lambda state: state.update({"0.weight": torch.ones(9, 3, 3, 3)}), "0.weight"),
        (lambda state: state.update({"9.weight": torch.ones(3)}), "9.weight"),
    ],
)
def test_bad_state_dicts(change, words):
    state = compacted_cnn().state_dict()
    change(state)
    model = cnn()
    before, shown = state_of(model), repr(model)
    with pytest.raises(ValueError, match=words):
        load_compact_(model, state)
    assert repr(model) == shown
    assert same_state(model, before)


def test_loading_is_all_or_nothing(monkeypatch):
    state, model = compacted_cnn().state_dict(), cnn()
    before = state_of(model)
    load = nn.Linear._load_from_state_dict

    def interrupted(self, *args):
        load(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(nn.Linear, "_load_from_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_compact_(model, state)
    assert same_state(model, before)
    assert type(model[9]) is nn.Linear
