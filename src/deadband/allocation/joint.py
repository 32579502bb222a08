"""Joint sites: rows of an up-projection and columns of the down-projection behind it that the gate decides on alone.

In a gated MLP, down(act(gate(x)) · up(x)), an entry of the gate near zero leaves neither the row of up nor the column
of down much to say. CATS (Lee et al. 2024, arXiv 2404.08763) skips both where abs(act(gate)) is small. Here the entry
is weighted by the root mean square of the loss's gradient there, which holds what up gives on average, and down skips
more of its inputs by its own rule. Sensitivity decides for each MLP whether up skips rows so, or its own inputs.

The estimate of the loss leaves out that errors of several sites may have one sign. Those of a gate do, more than
others: what is left out shrinks the output. So its loss counts `CAUTION` times where the two ways are compared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from deadband.layers.gated import gates_of
from deadband.layers.hooks import take_input
from deadband.layers.scope import for_here, scope
from deadband.running.forward import evaluating, run

CAUTION = 1.5
"""Of 1, 1.3, 1.6, 2 and more, what lies between the best two for SmolLM2-135M."""


class Point(NamedTuple):
    """What two thresholds do.

    Attributes:
        sparsity: of both layers, weighted by their bytes.
        harm: the loss, in nats a token.
        up, down: the sparsity of each.
        gate_threshold, threshold: of the gate, and of the input of down.
    """

    sparsity: float
    harm: float
    up: float = 0.0
    down: float = 0.0
    gate_threshold: float = 0.0
    threshold: float = 0.0


@dataclasses.dataclass
class JointCurve:
    """Expected loss against the thresholds of a gate and of the input of down, for one form of rule.

    Attributes:
        gate_thresholds, thresholds: ascending, [gate levels] and [levels].
        up, down: what is skipped, [gate levels + 1] and [gate levels + 1, levels + 1]; the first of each is of none.
        harm: the loss, in nats a token, of the shape of `down`.
    """

    gate_thresholds: np.ndarray
    thresholds: np.ndarray
    up: np.ndarray
    down: np.ndarray
    harm: np.ndarray

    def points(self, up_weight: float, down_weight: float) -> list[Point]:
        """All pairs of thresholds, for bytes of the two weights."""
        limits, others = np.r_[0.0, self.gate_thresholds], np.r_[0.0, self.thresholds]
        made = []
        for i, j in np.ndindex(*self.harm.shape):
            up, down = float(self.up[i]), float(self.down[i, j])
            both = (up * up_weight + down * down_weight) / (up_weight + down_weight)
            made.append(Point(both, float(self.harm[i, j]), up, down, float(limits[i]), float(others[j])))
        return made


@dataclasses.dataclass
class JointSensitivity:
    """What backward passes tell of a gate.

    Attributes:
        down: the name of the down-projection.
        scale: root mean square of the gradient at each entry of the gate, float32 [inner features].
        curves: by form of both rules, as in `deadband.allocation.sensitivity.SiteSensitivity`.
    """

    down: str
    scale: Tensor
    curves: dict[bool, JointCurve]


def joint_sites(model: nn.Module, batch: Any, names: Sequence[str]) -> dict[str, tuple[nn.Module, str]]:
    """The up-projections among `names` whose outputs are multiplied by a gate and then go to a down-projection there.

    By name, what activates the gate and the name of the down-projection. A batch shows that the product is all there is
    between them.
    """
    given = {name: each for name, each in gates_of(model).items() if name in names and each[1] in names}
    if not given:
        return {}
    seen: dict[str, list[Tensor]] = {name: [] for name in given}
    handles = []

    def keep(name: str) -> Any:
        return for_here(lambda module, args, output: seen[name].append(output.detach()))

    def keep_input(name: str, down: str) -> Any:
        return for_here(lambda module, args, kwargs: seen[name].append(take_input(down, args, kwargs).detach()))

    with scope(), evaluating(model):
        try:
            for name, (activation, down) in given.items():
                for module in (activation, model.get_submodule(name)):
                    handles.append(module.register_forward_hook(keep(name)))
                before = keep_input(name, down)
                handles.append(model.get_submodule(down).register_forward_pre_hook(before, with_kwargs=True))
            run(model, batch, use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
    return {name: given[name] for name, tensors in seen.items() if _is_product(tensors)}


def _is_product(tensors: Sequence[Tensor]) -> bool:
    """Whether the last of three is the product of the others."""
    if len(tensors) != 3 or len({each.shape for each in tensors}) > 1:
        return False
    one, other, both = (each.float() for each in tensors)
    return torch.allclose(one * other, both, rtol=2**-6, atol=1e-6)


def choose(
    points: Mapping[str, Sequence[tuple[float, float]]],
    joints: Mapping[str, tuple[str, Mapping[bool, Sequence[Point]]]],
    weights: Mapping[str, float],
    budget: float,
) -> dict[str, bool]:
    """The up-projections that had better skip by their gate at a model-wide budget, and the form of the rules.

    At the price of a byte at which the budget is reached, each MLP takes what is cheaper.

    Args:
        points: (sparsity, loss) of each site alone.
        joints: of up-projections: the down-projection, and the points of both by form.
        weights: bytes of each site.
        budget: the weighted mean of the sparsities.
    """
    alone = {name: np.array([(0.0, 0.0), *each]) for name, each in points.items()}
    together = {
        name: {form: np.array([each[:2] for each in found]) * (1.0, CAUTION) for form, found in forms.items()}
        for name, (_, forms) in joints.items()
    }

    def best(found: np.ndarray, weight: float, price: float) -> tuple[float, float]:
        """What is gained, and the bytes that are skipped."""
        gains = price * found[:, 0] * weight - found[:, 1]
        at = int(gains.argmax())
        return float(gains[at]), float(found[at, 0]) * weight

    def at(price: float) -> tuple[float, dict[str, bool]]:
        parts = {name: best(found, weights[name], price) for name, found in alone.items()}
        chosen = {}
        for name, forms in together.items():
            down = joints[name][0]
            both = {form: best(each, weights[name] + weights[down], price) for form, each in forms.items()}
            form = max(both, key=both.__getitem__)
            if both[form][0] > parts[name][0] + parts[down][0]:
                chosen[name] = form
                parts[name], parts[down] = both[form], (0.0, 0.0)
        return sum(skipped for _, skipped in parts.values()), chosen

    wanted = budget * sum(weights[name] for name in points)
    low, high = -80.0, 20.0  # logarithms of prices
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(math.exp(middle))[0] < wanted else (low, middle)
    return at(math.exp(high))[1]


def between(hull: Sequence[Point], sparsity: float) -> Point:
    """The point of a curve of pairs of thresholds at a sparsity of both layers, by interpolation."""
    x = [point.sparsity for point in hull]
    return Point(*(float(np.interp(sparsity, x, each)) for each in zip(*hull, strict=True)))
