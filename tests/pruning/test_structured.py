"""Structured pruning: what goes leaves the output of the masked model, in any architecture; what stays is named."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_model
from torch import nn
from torch.nn import functional as F

import deadband
from deadband.pruning import BaseStructuredSparsifier, FPGMPruner, LSTMSaliencyPruner, SaliencyPruner


class RandomRows(BaseStructuredSparsifier):
    """Drops a third of the rows, of an LSTM the same units in all gates."""

    def update_mask(self, module, tensor_name, tensor_fqn, **group):
        mask = self.state[tensor_fqn]["mask"]
        units = module.hidden_size if isinstance(module, nn.RNNBase) else len(mask)
        generator = torch.Generator().manual_seed(units)
        kept = torch.ones(units, dtype=torch.bool)
        kept[torch.randperm(units, generator=generator)[: max(units // 3, 1)]] = False
        mask.data = kept.repeat(len(mask) // units)


def warmed(model, x, steps=3):
    """With running statistics and biases that are not zero."""
    model.train()
    with torch.no_grad():
        for _ in range(steps):
            model(x * 2 + 1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model.eval()


def pruned(model, x, config, prune_bias=True, example=None):
    """The output while masked, the pruned model, and the pruner."""
    pruner = RandomRows({"prune_bias": prune_bias})
    pruner.prepare(model, config)
    pruner.step()
    with torch.no_grad():
        expected = model(x)
    result = pruner.prune(example)
    assert result is model
    return expected, result, pruner


def close(found, expected):
    if isinstance(expected, tuple):
        return all(close(one, other) for one, other in zip(found, expected, strict=True))
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


ACTIVATIONS = [
    nn.ReLU, nn.ReLU6, nn.RReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Tanhshrink, nn.Hardtanh, nn.Hardshrink, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.LogSigmoid, nn.Softplus,
    nn.Softsign, nn.Identity, nn.Dropout,
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("prune_bias", [True, False])
def test_every_activation_between_layers(activation, prune_bias):
    torch.manual_seed(0)
    x = torch.randn(7, 6)
    model = warmed(
        nn.Sequential(nn.Linear(6, 12), activation(), nn.Linear(12, 9, bias=False), activation(), nn.Linear(9, 4)), x
    )
    expected, model, pruner = pruned(model, x, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}], prune_bias)
    assert close(model(x), expected)
    # without a bias in the reader, one constant feature stays for all if the constant is not zero
    assert model[0].out_features in (8, 9)
    assert model[0].out_features == 8 or not torch.equal(activation()(torch.zeros(1)), torch.zeros(1)) or not prune_bias
    assert model[2].out_features == 6
    assert model[4].in_features == 6
    assert pruner.compaction.parameters[1] < pruner.compaction.parameters[0]
    assert type(model) is nn.Sequential


class Functional(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.one, self.two, self.between = nn.Linear(6, 12), nn.Linear(12, 4), between

    def forward(self, x):
        return self.two(self.between(self.one(x)))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: F.leaky_relu(x, -3.0),
        lambda x: F.hardtanh(x, 1.0, 2.0),
        lambda x: F.prelu(x, torch.full((1,), 0.3, dtype=x.dtype)),
        lambda x: x.relu() + 1,
        torch.relu,
        lambda x: F.softplus(x) * 2 - 0.5,
    ],
)
@pytest.mark.parametrize("prune_bias", [True, False])
def test_functions_between_layers_with_their_arguments(between, prune_bias):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    model = warmed(Functional(between), x)
    expected, model, _ = pruned(model, x, [{"tensor_fqn": "one.weight"}], prune_bias)
    assert close(model(x), expected)
    assert model.two.in_features == 8


def block(inputs, outputs, **kwargs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, **kwargs), nn.BatchNorm2d(outputs), nn.ReLU())


@pytest.mark.parametrize("padding", [0, 1, "same"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "pool", [nn.Identity, lambda: nn.MaxPool2d(2), lambda: nn.AvgPool2d(2), lambda: nn.AdaptiveAvgPool2d(4)]
)
def test_convolutions_with_batch_norm_padding_and_pooling(padding, bias, pool):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 14, 14)
    model = nn.Sequential(
        block(3, 9, padding=padding, bias=bias),
        pool(),
        block(9, 6, padding=padding, bias=bias),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    model = warmed(model, x)
    config = [{"tensor_fqn": "0.0.weight"}, {"tensor_fqn": "2.0.weight"}]
    for prune_bias in (True, False):
        expected, smaller, pruner = pruned(copy.deepcopy(model), x, config, prune_bias)
        assert close(smaller(x), expected)
        assert smaller[0][0].out_channels in (
            (6,) if padding == 0 else (6, 7)
        )  # at a border of zeros one constant stays
        assert smaller[0][1].num_features == smaller[0][0].out_channels == smaller[2][0].in_channels
        assert smaller[2][0].out_channels == 4
        assert smaller[5].in_features == 16
        assert pruner.compaction.flops[1] < 0.8 * pruner.compaction.flops[0]


@pytest.mark.parametrize("prune_bias", [True, False])
def test_pooling_with_padding_and_inputs_without_a_batch(prune_bias):
    torch.manual_seed(0)
    x = torch.randn(3, 14, 14)
    model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.Sigmoid(), nn.AvgPool2d(3, padding=1), nn.Conv2d(9, 6, 3))
    expected, model, _ = pruned(warmed(model, x), x, [{"tensor_fqn": "0.weight"}], prune_bias)
    assert close(model(x), expected)
    assert close(model(torch.stack([x, x])), torch.stack([expected, expected]))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.stem(x)
        h = self.norm(x)
        return self.head(x + self.down(F.silu(self.gate(h)) * self.up(h)))


def test_gates_residual_streams_and_layer_norm():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = Residual().eval()
    config = [{"tensor_fqn": f"{name}.weight"} for name in ("stem", "gate", "down")]
    expected, model, pruner = pruned(model, x, config)
    assert close(model(x), expected)
    assert model.gate.out_features == model.up.out_features == model.down.in_features == 8
    assert model.stem.out_features == 8
    assert set(pruner.compaction.left) == {"stem", "down"}
    assert (model.down.weight == 0).all(1).sum() == 2
    assert "left" in str(pruner.compaction)


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(3, 6, 3), nn.Conv1d(3, 9, 3), nn.Conv1d(15, 4, 1)
        self.twice = nn.Conv1d(4, 4, 1)

    def forward(self, x):
        x = self.c(torch.cat([torch.sigmoid(self.a(x)), self.b(x)], 1))
        return self.twice(torch.tanh(self.twice(x)))


def test_concatenation_and_a_layer_called_twice():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9)
    expected, model, _ = pruned(
        Concatenated().eval(), x, [{"tensor_fqn": f"{name}.weight"} for name in ("a", "b", "c")]
    )
    assert close(model(x), expected)
    assert (model.a.out_channels, model.b.out_channels, model.c.in_channels) == (4, 6, 10)
    assert model.c.out_channels in (3, 4)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1, groups=2)

    def forward(self, x):
        return self.d(self.c(torch.relu(self.b(self.a(x)))))


def test_convolutions_in_groups():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 6, 6)
    model = Grouped().eval()
    for name in ("a", "b"):
        nn.init.zeros_(getattr(model, name).bias)
    expected, model, pruner = pruned(model, x, [{"tensor_fqn": "a.weight"}, {"tensor_fqn": "c.weight"}])
    assert close(model(x), expected)
    assert model.a.out_channels == model.b.groups == model.c.in_channels == 6
    assert model.c.out_channels == 8
    assert "c" in pruner.compaction.left


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, layers=1, batch_first=False, what="all", **kwargs):
        super().__init__()
        self.rnn = kind(5, 9, layers, batch_first=batch_first, **kwargs)
        self.fc, self.what = nn.Linear(9 * (1 + self.rnn.bidirectional), 3), what
        self.norm = nn.LayerNorm(9) if what == "norm" else None

    def forward(self, x):
        y, h = self.rnn(x)
        h = h[0] if isinstance(h, tuple) else h
        y = {"last": h[-1], "all": y, "norm": y}[self.what]
        return self.fc(y if self.norm is None else self.norm(y))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("what", ["all", "last"])
@pytest.mark.parametrize("bias", [True, False])
def test_units_of_recurrent_layers(kind, layers, what, bias):
    torch.manual_seed(0)
    x = torch.randn(6, 2, 5)
    model = Recurrent(kind, layers, what=what, bias=bias).eval()
    names = [name for name, _ in model.rnn.named_parameters() if name.startswith("weight")]
    expected, model, _ = pruned(model, x, [{"tensor_fqn": f"rnn.{name}"} for name in names])
    assert close(model(x), expected)
    assert model.rnn.hidden_size == 6 == model.fc.in_features
    assert model.rnn.weight_hh_l0.shape[1] == 6
    assert close(copy.deepcopy(model)(x), expected)
    dense = Recurrent(kind, layers, what=what, bias=bias).eval()
    assert close(deadband.load_compact_(dense, model.state_dict())(x), expected)


@pytest.mark.parametrize("make", [
    lambda: Recurrent(bidirectional=True),
    lambda: Recurrent(what="norm"),
])  # fmt: skip
def test_recurrent_layers_that_stay_whole(make):
    torch.manual_seed(0)
    x = torch.randn(6, 2, 5)
    expected, model, pruner = pruned(make().eval(), x, None)
    assert close(model(x), expected)
    assert model.rnn.hidden_size == 9
    assert "rnn" in pruner.compaction.left


def test_units_of_which_only_some_weights_are_named_stay():
    x = torch.randn(6, 2, 5)
    expected, model, pruner = pruned(Recurrent().eval(), x, [{"tensor_fqn": "rnn.weight_ih_l0"}])
    assert close(model(x), expected)
    assert model.rnn.hidden_size == 9
    assert "weight_hh_l0" in pruner.compaction.left["rnn"]


def test_saliency_of_an_lstm_is_of_whole_units():
    torch.manual_seed(0)
    model = Recurrent(batch_first=True).eval()
    saliency = sum(
        getattr(model.rnn, name).detach().abs().view(4, 9, -1).sum((0, 2)) for name in ("weight_ih_l0", "weight_hh_l0")
    )
    kept = saliency.topk(5).indices.sort().values
    expected = [
        model.rnn.weight_ih_l0.view(4, 9, 5)[:, kept],
        model.rnn.weight_hh_l0.view(4, 9, 9)[:, kept][:, :, kept],
    ]
    pruner = LSTMSaliencyPruner({"sparsity_level": 0.5})
    pruner.prepare(model, [{"tensor_fqn": "rnn.weight_ih_l0"}, {"tensor_fqn": "rnn.weight_hh_l0"}])
    pruner.step()
    x = torch.randn(2, 6, 5)
    masked = model(x)
    pruner.prune()
    assert close(model(x), masked)
    for found, values in zip((model.rnn.weight_ih_l0, model.rnn.weight_hh_l0), expected, strict=True):
        assert torch.equal(found, values.flatten(0, 1))


def test_outputs_of_the_model_keep_their_number():
    x = torch.randn(5, 6)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)).eval()
    expected, model, pruner = pruned(model, x, None)
    assert close(model(x), expected)
    assert model(x).shape == (5, 6)
    assert model[0].out_features == 6
    assert list(pruner.compaction.left) == ["2"]


def test_level_one_leaves_one_row_and_other_levels_are_named():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    pruner = SaliencyPruner({"sparsity_level": 1.0})
    pruner.prepare(model, [{"tensor_fqn": "0.weight"}])
    pruner.step()
    x = torch.randn(2, 1, 9, 9)
    expected = model(x)
    assert close(pruner.prune()(x), expected)
    assert model[0].out_channels == 1
    for level in (-0.1, 1.5, None):
        pruner = SaliencyPruner({"sparsity_level": level} if level is not None else {})
        pruner.prepare(model, [{"tensor_fqn": "2.weight"}])
        with pytest.raises(ValueError, match=r"2\.weight: sparsity_level"):
            pruner.step()


def test_masks_are_made_from_all_rows_each_time():
    torch.manual_seed(0)
    for make in (lambda level: SaliencyPruner({"sparsity_level": level}), FPGMPruner):
        model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 2))
        model[0].weight.data += 3
        pruner = make(0.5)
        pruner.prepare(model, [{"tensor_fqn": "0.weight"}])
        for level, rows in ((0.5, 5), (0.5, 5), (0.1, 1), (0.5, 5)):
            pruner.groups[0]["sparsity_level"] = level
            pruner.step()
            assert (~pruner.state["0.weight"]["mask"]).sum() == rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 8, dtype=dtype)
    for make in (
        lambda: SaliencyPruner({"sparsity_level": 0.5}),
        lambda: FPGMPruner(0.5),
        lambda: RandomRows({"prune_bias": False}),
    ):
        model = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 4)).to(dtype).eval()
        pruner = make()
        pruner.prepare(model, [{"tensor_fqn": "0.weight"}])
        pruner.step()
        expected = model(x).double()
        found = pruner.prune()(x)
        assert found.dtype == dtype
        assert model[2].in_features < 8
        assert torch.allclose(found.double(), expected, atol=3e-2 if dtype != torch.float64 else 1e-9)


def test_biases_have_gradients_and_come_back():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].bias.requires_grad_(False)
    bias = model[2].bias.detach().clone()
    pruner = RandomRows({})
    pruner.prepare(model)
    pruner.step()
    x = torch.randn(3, 4, 6)
    model(x).sum().backward()
    mask = pruner.state["2.weight"]["mask"]
    original = model[2].parametrizations.bias.original
    assert torch.equal(original.grad != 0, mask)
    assert torch.equal(original, bias)
    pruner.state["2.weight"]["mask"].fill_(True)
    assert torch.equal(model[2].bias, bias)
    pruner.unprepare()
    assert not model[0].bias.requires_grad
    assert type(model[0]) is nn.Linear


def test_squashing_leaves_nothing_behind_and_states_are_loaded():
    model, other = (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    keys = list(model.state_dict())
    pruner, second = RandomRows({}), RandomRows({})
    pruner.prepare(model)
    pruner.step()
    second.prepare(other)
    second.load_state_dict(pruner.state_dict())
    assert second.state == pruner.state
    assert len(other[0].parametrizations.weight) == 1
    other(torch.randn(2, 6))
    pruner.squash_mask()
    assert list(model.state_dict()) == keys
    assert (model[0].weight == 0).all(1).sum() == 2 == (model[0].bias == 0).sum()
    assert not model[0]._forward_hooks


def test_on_an_exception_the_model_is_as_before(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    pruner = RandomRows({})
    pruner.prepare(model, [{"tensor_fqn": "0.weight"}])
    pruner.step()
    x = torch.randn(2, 6)
    expected, keys = model(x), list(model.state_dict())
    with pytest.raises(ValueError, match="does not run on the example"):
        pruner.prune(torch.randn(2, 7))
    monkeypatch.setattr("deadband.compaction.compact.seconds_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pruner.prune()
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    monkeypatch.undo()
    assert close(pruner.prune()(x), expected)
    with pytest.raises(ValueError, match="nothing is masked"):
        pruner.prune()


class NoGuess(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, batch, scale):
        return self.out(self.fc(batch["x"]) * scale)


def test_examples_are_the_first_call_a_guess_or_asked_for():
    model = NoGuess().eval()
    pruner = RandomRows({})
    pruner.prepare(model, [{"tensor_fqn": "fc.weight"}])
    pruner.step()
    with pytest.raises(ValueError, match="an example is needed"):
        pruner.prune()
    call = {"batch": {"x": torch.randn(3, 6)}, "scale": 2.0}
    expected = model(**call)
    pruner.prune()
    assert close(model(**call), expected)
    assert model.out.in_features == 6
    cnn = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 24 * 24, 3)).eval()
    pruner = SaliencyPruner({"sparsity_level": 0.5})
    pruner.prepare(cnn, [{"tensor_fqn": "0.weight"}])
    pruner.step()
    assert pruner.prune()[3].in_features == 3 * 24 * 24


def test_a_language_model_loses_neurons_and_is_loaded_again():
    model = tiny_model("llama")
    ids = torch.randint(0, 50, (2, 9))
    pruner = FPGMPruner(0.5)
    pruner.prepare(model, [{"tensor_fqn": "*.gate_proj.weight"}])
    pruner.step()
    with torch.no_grad():
        expected = model(ids).logits
        pruner.prune()
        assert close(model(ids).logits, expected)
    layer = model.model.layers[0].mlp
    assert layer.gate_proj.out_features == layer.up_proj.out_features == layer.down_proj.in_features
    assert layer.gate_proj.out_features * 2 == model.config.intermediate_size
    fresh = deadband.load_compact_(tiny_model("llama"), model.state_dict())
    assert close(fresh(ids).logits, expected)


def test_a_compiled_prepared_model_is_one_graph():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    pruner = RandomRows({})
    pruner.prepare(model)
    pruner.step()
    x = torch.randn(2, 6)
    expected = model(x)
    assert close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)


class Stream(nn.Module):
    """Convolutions that write to one stream, as in a ResNet."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Linear(8, 3)
        self.stem_norm = nn.BatchNorm2d(8)
        self.inner = nn.ModuleList(block(8, 12, padding=1) for _ in range(2))
        self.outer = nn.ModuleList(block(12, 8, padding=1)[:2] for _ in range(2))

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem(x)))
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = torch.relu(x + outer(inner(x)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("make", [lambda level: SaliencyPruner({"sparsity_level": level, "coupled": True}), FPGMPruner])
def test_layers_that_write_to_one_stream_lose_the_same_channels_if_asked_to(make):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, 10)
    model = warmed(Stream(), x)
    pruner = make(0.5)
    config = [{"tensor_fqn": "*.0.weight", "coupled": True}, {"tensor_fqn": "stem.weight", "coupled": True}]
    pruner.prepare(model, config, example=x)
    pruner.step()
    masks = [pruner.state[f"{name}.weight"]["mask"] for name in ("stem", "outer.0.0", "outer.1.0")]
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert not torch.equal(pruner.state["inner.0.0.weight"]["mask"], pruner.state["inner.1.0.weight"]["mask"])
    expected = model(x)
    pruner.prune()
    assert close(model(x), expected)
    assert (model.stem.out_channels, model.inner[1][0].out_channels, model.head.in_features) == (4, 6, 4)
    assert not pruner.compaction.left


def test_batch_norm_behind_a_layer_is_masked_with_it_and_comes_back():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, 10)
    model = warmed(nn.Sequential(block(3, 9, padding=1), nn.Conv2d(9, 4, 3)), x)
    pruner = RandomRows({})
    pruner.prepare(model, [{"tensor_fqn": "0.0.weight"}], example=x)
    pruner.step()
    gone = ~pruner.state["0.0.weight"]["mask"]
    assert (model[0][:2](x)[:, gone] == 0).all()
    assert not (model[0][:2](x)[:, ~gone] == 0).all(0).any()
    pruner.unprepare()
    assert type(model[0][1]) is nn.BatchNorm2d
    with torch.no_grad():
        assert (model[0][:2](x)[:, gone] != 0).any()


# ---------------------------------------------------------------------------------- what hardly ever shows, and misfits


class Chosen(BaseStructuredSparsifier):
    """Drops the rows that `drop` names."""

    def update_mask(self, module, tensor_name, drop=(), **group):
        getattr(module.parametrizations, tensor_name)[0].mask[list(drop)] = False


class Called(nn.Module):
    """Two layers and a reader, put together by a function."""

    def __init__(self, function, width=24):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, width), nn.Linear(8, width), nn.Linear(width, 3)
        self.function = function

    def forward(self, *args):
        return self.out(self.function(self, *args))


def choose(model, config, example, prune_bias=True):
    """The masked model and the pruned one."""
    pruner = Chosen({"prune_bias": prune_bias})
    pruner.prepare(model, config, example)
    pruner.step()
    masked = copy.deepcopy(model)
    pruner.prune(example)
    return masked, pruner


def agree(masked, model, *args):
    with torch.no_grad():
        return close(model(*args), masked(*args))


@pytest.mark.parametrize("seed", range(4))
def test_what_another_layer_hardly_ever_adds_stays(seed):
    torch.manual_seed(seed)
    model = Called(lambda m, x: torch.relu(m.a(x) + m.b(x)), 64).eval()
    nn.init.constant_(model.a.bias, -1.0)
    x = torch.randn(512, 8)
    masked, pruner = choose(model, [{"tensor_fqn": "b.weight", "drop": range(60)}], x)
    assert agree(masked, model, torch.randn(4096, 8))
    assert model.a.out_features == 64
    assert "b" in pruner.compaction.left


@pytest.mark.parametrize(
    ("function", "example", "others"),
    [
        (
            lambda m, x, mask: m.a(x).masked_fill(mask[:, None], 1.0),
            torch.zeros(4, dtype=torch.bool),
            torch.tensor([True, False]),
        ),
        (lambda m, x, kept: m.a(x) * kept[:, None], torch.ones(4, dtype=torch.int64), torch.tensor([1, 0])),
        (lambda m, x, t: m.a(x) + t[:, None], torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1])),
        (lambda m, x, k: m.a(x) + k, 0.0, 1.0),
    ],
)
def test_arguments_that_are_no_floats_vary_too(function, example, others):
    torch.manual_seed(0)
    model = Called(function).eval()
    config = [{"tensor_fqn": "a.weight", "drop": [1, 4, 5]}]
    masked, _ = choose(model, config, (torch.randn(4, 8), example), prune_bias=False)
    assert agree(masked, model, torch.randn(2, 8), others)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_an_example_of_one_step_says_nothing_of_the_next(kind):
    torch.manual_seed(0)
    model = Recurrent(kind, batch_first=True).eval()
    names = [f"rnn.weight_{name}_l0" for name in ("ih", "hh")]
    rows = [unit + 9 * gate for unit in (0, 3) for gate in range({nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind])]
    for prune_bias in (False, True):
        smaller = copy.deepcopy(model)
        config = [{"tensor_fqn": name, "drop": rows} for name in names]
        masked, _ = choose(smaller, config, torch.randn(2, 1, 5), prune_bias)
        assert agree(masked, smaller, torch.randn(2, 7, 5))
        assert smaller.rnn.hidden_size == (7 if prune_bias else 9)


def test_rows_of_an_embedding_are_no_outputs():
    for rows in (8, 10):
        model = nn.Sequential(nn.Embedding(rows, 8), nn.Linear(8, 3)).eval()
        masked, pruner = choose(model, [{"tensor_fqn": "0.weight", "drop": [0, 1]}], torch.randint(0, 8, (2, 5)))
        assert agree(masked, model, torch.arange(rows)[None])
        assert "rows" in pruner.compaction.left["0"]


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.rnn, self.out = (
            nn.Linear(5, 8),
            nn.Linear(8, 6),
            nn.LSTM(6, 4, batch_first=True),
            nn.Linear(4, 2),
        )
        self.idle = nn.Linear(6, 6)

    def forward(self, x):
        h = self.two(self.one(x).relu()).relu()
        self.idle(h[:0])
        packed = nn.utils.rnn.pack_padded_sequence(h, [3, 2], batch_first=True)
        return self.out(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


def test_packed_and_empty_inputs_only_keep_their_own_layers_whole():
    torch.manual_seed(0)
    model = Packed().eval()
    config = [{"tensor_fqn": "one.weight", "drop": [0, 5]}, {"tensor_fqn": "two.weight", "drop": [1]}]
    masked, pruner = choose(model, config, torch.randn(2, 3, 5))
    assert agree(masked, model, torch.randn(2, 3, 5))
    assert model.two.in_features in (6, 8)


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.out, self.aux = nn.Linear(5, 8), nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x):
        h = self.one(x).relu()
        return (self.out(h), self.aux(h)) if self.training else self.out(h)


def test_a_layer_that_only_training_calls_still_works():
    model = Auxiliary().eval()
    masked, _ = choose(model, [{"tensor_fqn": "one.weight", "drop": [0, 5]}], torch.randn(2, 5))
    x = torch.randn(3, 5)
    assert agree(masked, model, x)
    assert agree(masked.train(), model.train(), x)


class Normed(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def add_in_place(model, x):
    x = model.a(x)
    y = model.b(x)
    y += x
    return model.norm(y)


@pytest.mark.parametrize("function", [add_in_place, lambda m, x: m.norm(m.a(x)) + m.norm(m.b(m.a(x)))])
def test_batch_norm_of_something_else_is_not_masked(function):
    model = Normed(function).eval()
    pruner = Chosen({})
    pruner.prepare(model, [{"tensor_fqn": "b.weight", "drop": [0]}], example=torch.randn(2, 3, 5, 5))
    assert type(model.norm) is nn.BatchNorm2d


def test_batch_norm_over_time_is_not_masked():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5), nn.Linear(6, 2)).eval()
    masked, _ = choose(model, [{"tensor_fqn": "0.weight", "drop": [0]}], torch.randn(3, 5, 4))
    assert agree(masked, model, torch.randn(2, 5, 4))
    with pytest.raises(ValueError, match="example"):
        Chosen({}).prepare(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), None, example=torch.randn(2, 3))


def test_tied_biases_and_transposed_convolutions_keep_their_bias():
    model = Called(lambda m, x: m.a(x) * m.b(x)).eval()
    model.b.bias = model.a.bias
    bias = model.b.bias.detach().clone()
    masked, _ = choose(model, [{"tensor_fqn": "a.weight", "drop": [0]}], torch.randn(4, 8))
    assert torch.equal(model.b.bias, bias)
    assert agree(masked, model, torch.randn(4, 8))
    for outputs in (3, 5):
        model = nn.Sequential(nn.ConvTranspose2d(3, outputs, 2), nn.ReLU()).eval()
        masked, pruner = choose(model, [{"tensor_fqn": "0.weight", "drop": [0]}], torch.randn(1, 3, 4, 4))
        assert agree(masked, model, torch.randn(2, 3, 4, 4))
        assert "0" in pruner.compaction.left


def test_a_state_loaded_over_itself_changes_nothing(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, 10)
    model = warmed(nn.Sequential(block(3, 9, padding=1), nn.Conv2d(9, 4, 3)), x)
    pruner = RandomRows({})
    pruner.prepare(model, [{"tensor_fqn": "0.0.weight"}], example=x)
    pruner.step()
    pruner.load_state_dict(pruner.state_dict())
    pruner.save(tmp_path / "masks")
    pruner.load(tmp_path / "masks")
    expected = model(x)
    pruner.prune()
    assert close(model(x), expected)
    assert model[0][0].out_channels == 6
    assert pruner.groups == []
    assert not model._forward_pre_hooks


class Even(nn.Module):
    """Pads what has an odd size."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 9, 3), nn.Conv2d(9, 4, 3)

    def forward(self, x):
        x = self.conv(x)
        return self.out(F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)))


def test_padding_that_the_example_does_not_show():
    torch.manual_seed(0)
    model = Even().eval()
    masked, _ = choose(
        model, [{"tensor_fqn": "conv.weight", "drop": [1, 4]}], torch.randn(2, 3, 8, 8), prune_bias=False
    )
    assert agree(masked, model, torch.randn(2, 3, 9, 7))


# -------------------------------------------------------------------------------------------------- layers that scatter


class Wide(nn.Module):
    """Convolutions and linear layers on streams, of a size at which computing half of them pays."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.inner, self.outer = block(64, 64, padding=1), block(64, 64, padding=1)[:2]
        self.proj, self.out = nn.Linear(64, 1024), nn.Linear(1024, 1024)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.outer(self.inner(x)))
        h = self.proj(x.mean((2, 3)))
        return self.out(F.layer_norm(h, (1024,)))


@pytest.mark.parametrize("prune_bias", [True, False])
def test_rows_on_a_stream_are_not_computed_though_they_stay(prune_bias):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = warmed(Wide(), x)
    dense = copy.deepcopy(model)
    expected, model, pruner = pruned(model, x, [{"tensor_fqn": "*.0.weight"}, {"tensor_fqn": "out.weight"}], prune_bias)
    report = pruner.compaction
    assert close(model(x), expected)
    assert report.scattered == {"outer.0": 21, "out": 341}
    assert report.outputs["inner.0"] in (20, 21)
    assert set(report.left) <= {"inner.0"}
    assert model.outer[0].out_channels == 43
    assert model.out(torch.randn(3, 5, 1024)).shape == (3, 5, 1024)
    assert model(x).shape == (2, 1024)
    assert "scattered" in str(report)
    fresh = deadband.load_compact_(copy.deepcopy(dense), model.state_dict())
    assert close(fresh(x), expected)
    for changed in (copy.deepcopy(model), model):
        changed.bfloat16()
        assert changed(x.bfloat16()).dtype == torch.bfloat16
    model.float().train()(x).sum().backward()
    assert model.outer[0].weight.grad.shape == (43, len(model.inner[0].weight), 3, 3)
    state = fresh.state_dict()
    state["out.made"] = state["out.made"] + 10**6
    with pytest.raises(ValueError, match=r"out\.made"):
        deadband.load_compact_(copy.deepcopy(dense), state)


def test_small_layers_and_layers_that_drop_everything_are_computed_whole():
    x = torch.randn(2, 6)
    expected, model, pruner = pruned(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4)).eval(), x, None)
    assert close(model(x), expected)
    assert not pruner.compaction.scattered
    model = nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512)).eval()
    masked, pruner = choose(model, [{"tensor_fqn": "0.weight", "drop": range(512)}], torch.randn(2, 512))
    assert agree(masked, model, torch.randn(3, 512))
    assert type(model[0]) is nn.Linear
