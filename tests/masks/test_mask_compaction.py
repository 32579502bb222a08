"""Masks in force make layers smaller."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from conftest import tiny_batches, tiny_model
from sparsifiers import add, ready
from torch import nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves

import deadband
from deadband.compaction.compact import compact_
from deadband.masks import mask
from deadband.masks.sparsifier import LayerError


def compactable(masks_fn=mask.magnitude):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4),
    )  # fmt: skip
    sparsifier = ready(model, mask_fn=masks_fn)
    for index in (3, 7, 9):
        sparsifier.register_layer(model[index])
    return model.train(), sparsifier


@pytest.mark.parametrize("given", ["remembered", "tensor", "tuple", "mapping"])
def test_compacting_gives_the_masked_models_outputs(given):
    model, sparsifier = compactable()
    model(torch.randn(5, 3, 8, 8))
    sparsifier.step()
    with pytest.raises(LayerError, match=r"no mask is in force; call squash_mask"):
        sparsifier.compact_()
    sparsifier.squash_mask()
    model.eval()
    x = torch.randn(7, 3, 12, 9)
    expected = model(x)
    example = {"remembered": None, "tensor": x, "tuple": (x,), "mapping": {"input": x}}[given]
    report = sparsifier.compact_(example)
    torch.testing.assert_close(model(x), expected)
    assert report.removed == {"3": 4, "7": 3, "9": 10}
    assert (model[0].out_channels, model[3].out_channels, model[7].out_features) == (4, 3, 10)
    assert report.parameters[1] < report.parameters[0] / 2
    assert "parameters" in str(report)
    assert not sparsifier.data_groups
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not [name for name in model.state_dict() if "mask" in name]
    torch.export.export(model, (x,))
    fresh = compactable()[0].eval()
    deadband.load_compact_(fresh, model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_what_cannot_be_compacted_stays_masked():
    model = nn.Sequential(nn.Linear(4, 6), nn.LSTM(6, 5))
    sparsifier = ready(model)
    sparsifier.register_layer(model[1])
    sparsifier.register_layer(
        model[0], aggregate_fn=add, reduce_fn=lambda data: data, mask_fn=lambda data, sparsity: data > data.mean()
    )
    x = torch.randn(3, 4)
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    expected = model(x)[0]
    report = sparsifier.compact_(x)
    assert set(report.left) == {"0", "1"}
    assert "differs between positions" in report.left["0"]
    assert torch.equal(model(x)[0], expected)
    assert list(sparsifier.data_groups) == ["1", "0"]
    assert sparsifier.get_mask("1").sum() == 3


def test_a_compaction_that_fails_leaves_the_masked_model(monkeypatch):
    model, sparsifier = compactable()
    model(torch.randn(5, 3, 8, 8))
    sparsifier.step()
    sparsifier.squash_mask()
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    with pytest.raises(ValueError, match=r"example, \(nothing=float32 .*unexpected keyword.*Pass example="):
        sparsifier.compact_({"nothing": x})
    monkeypatch.setattr("deadband.compaction.compact.seconds_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sparsifier.compact_()
    assert torch.equal(model(x), expected)
    assert model[3].activation_mask.sum() == 4
    sparsifier.get_mask("3").fill_(True)
    assert not torch.equal(model(x), expected)


def test_compacting_without_an_example():
    model, sparsifier = compactable()
    model[3](torch.randn(2, 8, 5, 5))
    sparsifier.unregister_layer("7")
    sparsifier.unregister_layer("9")
    sparsifier.step()
    sparsifier.squash_mask()
    with pytest.raises(ValueError, match="no call of the model was seen .* Pass example="):
        sparsifier.compact_()


class TwoLayers(nn.Module):
    """Two layers, of which the second is masked, with something before them, between them, or left behind."""

    def __init__(self, before=None, after=None, layers=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = layers() if layers else (nn.Linear(6, 12), nn.Linear(12, 3))
        self.before, self.after, self.seen = before, after, []

    def forward(self, *args, **kwargs):
        x = self.before(*args, **kwargs) if self.before else args[0]
        x = self.second(torch.relu(self.first(x)))
        return self.after(x) if self.after else x


@dataclasses.dataclass
class GraphData:
    x: torch.Tensor
    edges: torch.Tensor


def neighbours(x, edges):
    return x.index_add(0, edges[1], x[edges[0]])


def convolutions(kind):
    return {"layers": lambda: (kind(3, 8, 3, padding=1), kind(8, 4, 3, padding=1))}


def over_time(x):  # [time, batch, features]
    return nn.functional.avg_pool1d(x.permute(1, 2, 0), 5).permute(2, 0, 1)


def integers(high, *shape):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


KINDS_OF_CALLS = {
    "a batch": ({}, (torch.randn(9, 6),), {}, 2),
    "a batch by keyword": ({"before": lambda x, scale: x * scale}, (), {"x": torch.randn(9, 6), "scale": 2.0}, 2),
    "a batch of images": (convolutions(nn.Conv2d), (torch.randn(5, 3, 6, 6),), {}, 2),
    "tokens": ({"before": nn.Embedding(20, 6)}, (integers(20, 4, 7),), {}, 2),
    "one row": ({}, (torch.randn(1, 6),), {}, None),
    "no batch": ({}, (torch.randn(6),), {}, None),
    "no batch, 1d": (convolutions(nn.Conv1d), (torch.randn(3, 9),), {}, None),
    "no batch, 2d": (convolutions(nn.Conv2d), (torch.randn(3, 6, 6),), {}, None),
    "no batch, 3d": (convolutions(nn.Conv3d), (torch.randn(3, 4, 4, 4),), {}, None),
    "features first": ({"before": torch.t}, (torch.randn(6, 9),), {}, None),
    "time first": ({"after": over_time}, (torch.randn(20, 3, 6),), {}, None),
    "time first, recurrent": ({"before": lambda x: x.cumsum(0)}, (torch.randn(20, 3, 6),), {}, 2),
    "time first, mask of the batch": (
        {"before": lambda x, padding: x.masked_fill(padding.T[..., None], 0.0)},
        (torch.randn(9, 3, 6), torch.zeros(3, 9, dtype=torch.bool)), {}, None,
    ),
    "a graph": ({"before": neighbours}, (torch.randn(9, 6), integers(9, 2, 15)), {}, None),
    "a graph of as many edges as nodes": (
        {"before": lambda x, source, target: neighbours(x, (source, target))},
        (torch.randn(9, 6), integers(9, 9), integers(9, 9)), {}, None,
    ),
    "a graph in an object": (
        {"before": lambda data: neighbours(data.x, data.edges)},
        (GraphData(torch.randn(9, 6), integers(9, 2, 15)),), {}, None,
    ),
    "a sparse graph": ({"before": lambda x, a: a @ x}, (torch.randn(9, 6), torch.eye(9).to_sparse()), {}, None),
    "bags": ({"before": nn.EmbeddingBag(20, 6)}, (integers(20, 30), torch.tensor([0, 3, 9])), {}, None),
    "as many bags as words": ({"before": nn.EmbeddingBag(20, 6)}, (integers(20, 4), torch.arange(4)), {}, None),
    "a packed sequence": (
        {"before": lambda packed: packed.data},
        (nn.utils.rnn.pack_sequence([torch.randn(3, 6), torch.randn(2, 6)]),), {}, None,
    ),
    "a list": ({"before": torch.cat}, ([torch.randn(4, 6), torch.randn(2, 6)],), {}, None),
    "rows that belong together": ({"after": lambda x: x[::2] - x[1::2]}, (torch.randn(8, 6),), {}, None),
    "rows that are compared": ({"after": lambda x: (x @ x.T).softmax(1)}, (torch.randn(8, 6),), {}, None),
    "a fixed number of rows": ({"before": lambda x: x.view(8, 6)}, (torch.randn(8, 6),), {}, None),
    "a row by its number": ({"after": lambda x: x[5]}, (torch.randn(8, 6),), {}, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_OF_CALLS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compacting_on_the_call_that_was_seen(kind, mode, monkeypatch):
    build, args, kwargs, rows = KINDS_OF_CALLS[kind]
    model = TwoLayers(**build).eval()
    sparsifier = ready(model)
    sparsifier.register_layer(model.second)
    used = []
    monkeypatch.setattr(
        "deadband.compaction.compact.compact_", lambda *args, **named: used.append(args[2]) or compact_(*args, **named)
    )
    with mode():
        model(*args, **kwargs)
        sparsifier.step()
        sparsifier.squash_mask()
        expected = model(*args, **kwargs)
    report = sparsifier.compact_()
    assert sum((*report.removed.values(), *report.gathered.values())) in (4, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(*args, **kwargs), expected.clone())
    shapes = [[x.shape for x in tree_leaves(each) if isinstance(x, torch.Tensor)] for each in (used[0], (args, kwargs))]
    if rows is None:
        assert shapes[0] == shapes[1]
    else:
        assert shapes[0] == [torch.Size([rows, *shape[1:]]) for shape in shapes[1]]


def test_a_call_that_the_model_does_not_take_any_more():
    model = TwoLayers()
    sparsifier = ready(model)
    sparsifier.register_layer(model.second)
    model(torch.randn(4, 6))
    sparsifier.step()
    sparsifier.squash_mask()
    model.before = torch.t
    message = r"does not run on the example, \(float32 \[4, 6\]\): RuntimeError: .*Pass example=: the arguments"
    with pytest.raises(ValueError, match=message):
        sparsifier.compact_()
    assert model.second.activation_mask.sum() == 6
    assert sparsifier.compact_(torch.randn(6, 4)).removed == {"second": 6}


def kept_in_a_hook(model):
    got = {}
    model.first.register_forward_hook(lambda module, args, output: got.update(output=output))


def keeping(what):
    """Leaves tensors of its last call behind."""

    class Keeps(TwoLayers):
        def forward(self, x):
            self.hidden = torch.relu(self.first(x))
            out = self.second(self.hidden)
            keep = {
                "attributes": lambda: setattr(self, "last", out),
                "parts of each other": lambda: setattr(self, "last", (out[0], out.view(-1))),
                "a list": lambda: self.seen.append(out.mean()),
                "a mapping in a list": lambda: self.seen.append({"loss": out.mean(), "all": [self.hidden]}),
                "an object": lambda: setattr(self, "last", GraphData(out, self.hidden)),
                "a submodule": lambda: setattr(self.second, "input", self.hidden),
                "a buffer": lambda: self.register_buffer("last", out),
                "a sparse tensor": lambda: setattr(self, "last", out.to_sparse()),
            }
            keep.get(what, lambda: None)()
            return out

    return Keeps()


KEPT = [
    "attributes", "parts of each other", "a list", "a mapping in a list", "an object", "a submodule", "a buffer",
    "a sparse tensor", "a hook", "weight_norm", "pruning", "a double backward",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:Using backward")
@pytest.mark.parametrize("what", KEPT)
def test_compacting_a_model_that_keeps_tensors_with_gradients(what):
    model = keeping(what)
    prepare = {
        "a hook": kept_in_a_hook,
        "weight_norm": lambda model: nn.utils.weight_norm(model.first),
        "pruning": lambda model: prune.l1_unstructured(model.first, "weight", 0.3),
    }
    prepare.get(what, lambda _: None)(model)
    sparsifier = ready(model)
    sparsifier.register_layer(model.second)
    for _ in range(2):
        model(torch.randn(7, 6)).square().mean().backward(create_graph=what == "a double backward")
    sparsifier.step()
    sparsifier.squash_mask()
    x = torch.randn(5, 6)
    expected = model(x).detach()
    hidden, seen = model.hidden, list(model.seen)
    report = sparsifier.compact_()
    assert {**report.removed, **report.gathered} == {"second": 6}
    assert model.hidden is hidden  # what the model keeps is the user's call's, not ours
    assert hidden.grad_fn is not None
    assert len(model.seen) == len(seen)
    torch.testing.assert_close(model(x).detach(), expected)
    model(x).sum().backward()
    with torch.no_grad():
        vector = nn.utils.parameters_to_vector(model.parameters())
        nn.utils.vector_to_parameters(vector.clone(), model.parameters())
        torch.testing.assert_close(model(x), expected)


def test_compacting_layers_that_are_pruned_and_what_cannot_be_copied():
    model = TwoLayers()
    sparsifier = ready(model)
    sparsifier.register_layer(model.second)
    prune.l1_unstructured(model.second, "weight", 0.5)
    x = torch.randn(5, 6)
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    expected = model(x)
    assert sparsifier.compact_().left == {"second": "its weight is not a plain parameter"}
    assert torch.equal(model(x), expected)
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"Two.* cannot be copied by copy.deepcopy \(TypeError: cannot pickle .*lock"):
        sparsifier.compact_()
    del model.lock
    prune.remove(model.second, "weight")
    assert torch.equal(model(x), expected)
    assert sparsifier.compact_().removed == {"second": 6}
    torch.testing.assert_close(model(x), expected)


def test_compacting_a_llama_mlp():
    model = tiny_model("llama")
    sparsifier = ready(model)
    for layer in model.model.layers:
        sparsifier.register_layer(layer.mlp.down_proj)
        sparsifier.register_layer(layer.self_attn.q_proj)
    batch = tiny_batches(1)[0]
    with torch.no_grad():
        model(**batch)
        sparsifier.step()
        sparsifier.squash_mask()
        expected = model(**batch).logits
        report = sparsifier.compact_()
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert model.model.layers[0].mlp.gate_proj.out_features == 56
    assert report.gathered == {f"model.layers.{index}.self_attn.q_proj": 32 for index in range(2)}
    model.generate(batch["input_ids"][:1], max_new_tokens=3)
