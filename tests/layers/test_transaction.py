import copy

import pytest
import torch
from conftest import mlp, same_state, state_of
from torch import nn

from deadband.layers.rule import Rule
from deadband.layers.sparse import LaidOutWeight, make_dense_, make_sparse_
from deadband.layers.transaction import all_or_nothing


class Interrupted(KeyboardInterrupt):
    pass


def test_success_leaves_what_was_changed():
    layer = nn.Linear(3, 2)
    with all_or_nothing([layer]):
        make_sparse_(layer, Rule(0.5))
    assert float(layer.threshold) == 0.5


@pytest.mark.parametrize("sparse", [False, True])
def test_a_failure_restores_classes_attributes_and_layouts(sparse):
    layer = nn.Linear(5, 7)
    if sparse:
        make_sparse_(layer, Rule(0.5, scale=torch.rand(5)))
    weight, kind, strides = layer.weight, type(layer.weight), layer.weight.stride()
    before, state = copy.deepcopy(layer), state_of(layer)
    attributes = {name: id(value) for name, value in vars(layer).items()}
    with pytest.raises(Interrupted), all_or_nothing([layer, layer]):
        if sparse:
            make_dense_(layer)
        else:
            make_sparse_(layer, Rule(0.1), mask=torch.rand(5) < 0.5)
        layer.more = 1
        layer.register_buffer("other", torch.ones(3), persistent=False)
        raise Interrupted
    assert layer.weight is weight
    assert (type(layer), type(weight), weight.stride()) == (type(before), kind, strides)
    assert (kind is LaidOutWeight) == sparse
    assert {name: id(value) for name, value in vars(layer).items()} == attributes
    assert same_state(layer, state)
    assert layer._non_persistent_buffers_set == before._non_persistent_buffers_set
    x = torch.randn(2, 5)
    with torch.no_grad():
        assert torch.equal(layer(x), before(x))


def test_values_are_taken_back_where_asked():
    model = mlp()
    before = state_of(model)
    with pytest.raises(Interrupted), all_or_nothing(model.modules(), values=model.parameters()):
        for each in model.parameters():
            each.data.zero_()
        raise Interrupted
    assert same_state(model, before)
