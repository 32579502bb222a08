"""The hooks that watch: which inputs count, and how often."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
import threading

import pytest
import torch
from conftest import tiny_batches, tiny_model
from sparsifiers import only, ready, small
from torch import nn
from torch.utils.checkpoint import checkpoint

from deadband.masks import aggregate


def test_an_lstm_keeps_its_state():
    lstm = nn.LSTM(4, 6, batch_first=True)
    model, sparsifier = only(lstm, mask_fn=lambda data, level: torch.ones_like(data))
    x, state = torch.randn(2, 5, 4), (torch.randn(1, 2, 6), torch.randn(1, 2, 6))
    expected = lstm(x, state)[0]
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(lstm(x, state)[0], expected)
    assert torch.equal(lstm(x, hx=state)[0], expected)


def test_attention_keeps_key_and_value():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model, sparsifier = only(attention, mask_fn=lambda data, level: torch.ones_like(data))
    q, k, v = torch.randn(3, 2, 5, 8)
    expected = attention(q, k, v)[0]
    assert torch.equal(attention(query=q, key=k, value=v, need_weights=True)[0], expected)
    sparsifier.step()
    sparsifier.squash_mask()
    torch.testing.assert_close(attention(q, k, v)[0], expected)
    torch.testing.assert_close(attention(query=q, key=k, value=v)[0], expected)


def test_layers_of_transformers_called_by_keyword():
    model = tiny_model("llama")
    sparsifier = ready(model)
    attention = model.model.layers[0].self_attn
    for layer in (attention, model.model.layers[1], model.model.layers[1].mlp.down_proj):
        sparsifier.register_layer(layer)
    batch = tiny_batches(1)[0]
    expected = model(**batch).logits
    assert torch.equal(model(**batch).logits, expected)
    sparsifier.step()
    sparsifier.squash_mask()
    seen = {}
    handle = attention.q_proj.register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0]))
    assert model(**batch).logits.isfinite().all()
    handle.remove()
    keep = sparsifier.get_mask(layer=attention)
    assert keep.sum() == 32
    assert (seen["x"][..., ~keep] == 0).all()
    assert (seen["x"][..., keep] != 0).all()


def test_the_input_comes_first_among_keywords_too():
    class Two(nn.Module):
        def forward(self, x, scale=None):
            return x * scale

    layer = Two()
    model = nn.Sequential(layer)
    sparsifier = ready(model)
    sparsifier.register_layer(layer)
    layer(scale=torch.ones(1), x=torch.tensor([[1.0, 2.0]]))
    assert sparsifier.data_groups["0"]["data"].tolist() == [1, 2]


@pytest.mark.parametrize("arguments", [({"a": 1},), ((torch.ones(2),),), (None,), (3,)])
def test_inputs_that_are_no_tensor(arguments):
    class Any(nn.Module):
        def forward(self, x=None):
            return x

    layer = Any()
    only_model, sparsifier = only(layer)
    with pytest.raises(TypeError, match="layer '0' got .* as its first argument; expected a tensor"):
        layer(*arguments)
    with pytest.raises(TypeError, match="layer '0' was called without a tensor"):
        layer()
    with pytest.raises(TypeError, match="expected a dense one"):
        layer(torch.eye(2).to_sparse())
    layer(x=torch.ones(1, 2))
    assert sparsifier.get_mask("0").shape == (1, 2)


def test_a_changing_number_of_features_is_an_error():
    model = nn.Sequential(nn.Identity())
    sparsifier = ready(model)
    sparsifier.register_layer(model[0])
    model(torch.randn(4, 1))
    with pytest.raises(ValueError, match=r"layer '0': its input of shape \(4, 8\) has 8 features .* before had 1"):
        model(torch.randn(4, 8))
    with pytest.raises(IndexError, match=r"layer '0': its input of shape \(\) has no dimension -1"):
        model(torch.tensor(1.0))


def test_each_call_of_a_layer_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x), self.fc(2 * x)

    model = Twice()
    sparsifier = ready(model, aggregate_fn=aggregate.mean)
    sparsifier.register_layer(model.fc)
    model(torch.ones(4, 3))
    torch.testing.assert_close(sparsifier.data_groups["fc"]["data"], torch.full((3,), 1.5).double())
    assert sparsifier.data_groups["fc"]["rows"] == 8


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_a_batch_once(reentrant):
    model, sparsifier = small()
    x = torch.randn(4, 6, requires_grad=True)
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(sparsifier.data_groups["0"]["data"], x)
    assert x.grad is not None


def test_threads_lose_nothing():
    model, sparsifier = only(nn.Identity())
    one = torch.ones(2, 3)

    def work():
        for _ in range(400):
            model(one)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(sparsifier.data_groups["0"]["data"], 1600 * one)


def test_only_training_inputs_count_when_asked():
    model, sparsifier = small(training_only=True)
    model.eval()
    model(torch.ones(4, 6))
    assert "data" not in sparsifier.data_groups["0"]
    model.train()
    model(torch.ones(4, 6))
    assert "data" in sparsifier.data_groups["0"]


def test_calibration_in_inference_mode():
    for make in (small, lambda: (lambda m: (m, ready(m)))(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)))):
        model, sparsifier = make()
        if not sparsifier.data_groups:
            sparsifier.register_layer(model[0])
        with torch.inference_mode():
            model(torch.randn(4, 6))
            model(torch.randn(4, 6))
            sparsifier.step()
            sparsifier.squash_mask()
            model(torch.randn(4, 6))
        repr(sparsifier)
        model(torch.randn(4, 6, requires_grad=True)).sum().backward()
        sparsifier.get_mask("0").zero_()


def test_no_autograd_graph_is_kept():
    model, sparsifier = small()
    for _ in range(3):
        model(torch.randn(4, 6, requires_grad=True)).sum().backward()
    for config in sparsifier.data_groups.values():
        assert not config["data"].requires_grad
        assert config["data"].grad_fn is None


def test_aggregating_sees_the_callers_grad_mode():
    seen = []

    def fn(a, b):
        seen.append(torch.is_grad_enabled())
        return a + b

    model, _ = only(nn.Identity(), aggregate_fn=fn)
    model(torch.ones(1, 2))
    with torch.no_grad():
        model(torch.ones(1, 2))
    with torch.inference_mode():
        model(torch.ones(1, 2))
    assert seen == [True, False, False]


@pytest.mark.parametrize("options", [{}, {"features": [0, 3], "feature_dim": 1}, {"aggregate_fn": aggregate.mean}])
def test_what_was_aggregated_follows_the_model(options):
    model, sparsifier = small(**options)
    model(torch.randn(4, 6))
    model.to("meta")
    model(torch.randn(4, 6, device="meta"))
    data = sparsifier.data_groups["0"]["data"]
    assert (data[0] if isinstance(data, list) else data).device.type == "meta"


def test_copies_of_the_model_do_not_feed_the_sparsifier():
    model, sparsifier = small()
    model(torch.ones(4, 6))
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        duplicate(torch.ones(4, 6))
        assert torch.equal(sparsifier.data_groups["0"]["data"], torch.ones(4, 6))


def test_a_copy_of_a_watched_model_loses_the_hook():
    model, _ = small()
    other = copy.deepcopy(model)
    other(torch.randn(2, 6))
    assert not other[0]._forward_pre_hooks
    assert not other._forward_pre_hooks


def test_hooks_that_aggregate_go_with_the_sparsifier_and_masks_stay():
    model, sparsifier = small()
    x = torch.randn(4, 6)
    del sparsifier
    gc.collect()
    assert not model[0]._forward_pre_hooks
    assert not model._forward_pre_hooks
    model, sparsifier = small()
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    expected = model(x)
    del sparsifier
    gc.collect()
    assert torch.equal(model(x), expected)


def test_the_call_that_is_remembered_is_free_of_graphs_and_of_larger_tensors():
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, xs, lengths, other=None):
            return self.fc(xs[0]) + lengths[:, None]

    model = Takes()
    sparsifier = ready(model)
    sparsifier.register_layer(model.fc)
    x = (torch.randn(1000, 3, requires_grad=True) * 2)[100:109]
    kept = x.detach().clone()
    model([x], torch.arange(9))
    with torch.no_grad():
        x.zero_()
    (xs, lengths), _ = sparsifier._example
    assert torch.equal(xs[0], kept)
    assert lengths.shape == (9,)
    assert not xs[0].requires_grad
    assert xs[0].untyped_storage().nbytes() == 9 * 3 * 4
    copy.deepcopy(sparsifier)
    other = Takes()
    sparsifier = ready(other)
    sparsifier.register_layer(other.fc)
    other([x], torch.arange(9), threading.Lock())
    assert sparsifier._example is None
    assert not other._forward_pre_hooks
    copy.deepcopy(sparsifier)
    sparsifier.step()
    sparsifier.squash_mask()
    with pytest.raises(ValueError, match=r"cannot be kept: an argument cannot be copied .*lock.* Pass example="):
        sparsifier.compact_()
    sparsifier.compact_(([x], torch.arange(9)))


def test_operator():
    from deadband.ops.watch import issue_ticket

    class Watcher:
        def see(self, x):
            self.x = x

    watcher = Watcher()
    ticket = issue_ticket(watcher)
    torch.ops.deadband.watch(torch.ones(2), ticket)
    assert torch.equal(watcher.x, torch.ones(2))
    torch.library.opcheck(torch.ops.deadband.watch.default, (torch.ones(2), ticket))
    del watcher
    torch.ops.deadband.watch(torch.ones(2), ticket)
    assert operator.index(ticket[1]) >= 2
