"""The kernel that dequantises against float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from operators import DTYPES, ISAS, instruction_set, random_weight

from deadband.layers.formats import FORMATS
from deadband.ops.dequantize import by_input
from deadband.ops.linear import dequantize
from deadband.running.forward import threads


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_it_is_what_the_reference_gives(isa, form, dtype):
    for inputs, outputs in ((1, 1), (64, 32), (130, 45), (200, 31), (33, 300)):
        weight = random_weight(inputs, outputs, form, seed=outputs)
        given = weight.codes, weight.scales, weight.minimum, weight.format.group_size or 0
        with instruction_set(isa), threads(2):
            found = by_input(*given, dtype)
        expected = dequantize(*given, torch.float64).t()
        assert found.is_contiguous()
        bound = expected.abs().max().item() * torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=max(bound, 1e-6))
