#!/usr/bin/env bash
# torch 2.13.0, torch.nn.utils.parametrize, seen 2026-11-28.
#
# Guess: a deep copy of a parametrized module has nothing to do with the module: taking the parametrization off the copy
#        leaves the module as it is.
# Seen:  copy and module share the class that was made for the parametrization. remove_parametrizations() on the copy
#        takes the property `weight` off that class, and the module has no weight any more: AttributeError at its next
#        call. Making the copy first and parametrizing both leaves each with a class of its own, and all is right.
# Where it hurts: keeping a copy of a masked model (an average of weights, the best epoch, a copy to measure) and
#        making the masks of one of them permanent.
#
# Installs pinned packages into a temporary folder. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import copy

import torch
from torch import nn
from torch.nn.utils import parametrize


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Twice())
    return layer


x = torch.ones(1, 2)
plain = nn.Linear(2, 2)
one, other = parametrized(copy.deepcopy(plain)), parametrized(copy.deepcopy(plain))
parametrize.remove_parametrizations(other, "weight")
assert torch.equal(one(x), other(x))

module = parametrized(plain)
expected = module(x)
copied = copy.deepcopy(module)
parametrize.remove_parametrizations(copied, "weight")
assert torch.equal(copied(x), expected)
try:
    module(x)
except AttributeError as error:
    print("torch", torch.__version__, "after a copy lost its parametrization, the module:", error)
else:
    raise SystemExit("the behaviour has changed")
PYTHON
