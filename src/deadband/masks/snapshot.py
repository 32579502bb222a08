"""What an ActivationSparsifier is at one moment, apart from its model: what every form of saving is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from deadband.masks.schedule import Schedule


@dataclasses.dataclass
class LayerSnapshot:
    """What a sparsifier has of one layer, beside its mask.

    Attributes:
        config: its entry of `data_groups` without layer and hook: functions, settings, and what was aggregated. The
            `hook_state` is `aggregate`, `sparsify` or, of a squashed layer that is not masked, the word `None`.
        family: the layer's class, where a state for another one is refused.
        width: how many features its input has, where the layer says so.
        shape: of its last input, where that is known and needed.
        buffer: the name of the buffer that holds its mask, where one is in force.
        unset: whether no step was made, so that the mask keeps everything; None where that is unknown.
    """

    config: dict[str, Any]
    family: str | None = None
    width: int | None = None
    shape: torch.Size | None = None
    buffer: str | None = None
    unset: bool | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What a saved state has beyond what torch's class saves, in plain values."""
        return {
            "layer": self.family,
            "features": self.width,
            "shape": None if self.shape is None else list(self.shape),
            "buffer": self.buffer,
            "unset": self.unset,
        }

    @classmethod
    def from_facts(cls, config: dict[str, Any], facts: Mapping[str, Any]) -> LayerSnapshot:
        """The layer of a saved state; one of torch's class has no facts."""
        shape = facts.get("shape")
        return cls(
            config,
            family=facts.get("layer"),
            width=facts.get("features"),
            shape=None if shape is None else torch.Size(shape),
            buffer=facts.get("buffer"),
            unset=facts.get("unset"),
        )


@dataclasses.dataclass
class Snapshot:
    """All that a sparsifier has to have again, in plain values, functions and tensors, which it shares with it.

    Attributes:
        defaults: of the constructor.
        layers: by their names in the model.
        state: layer name -> {"mask": None, a tensor, or a list of tensors}.
        schedule: with the steps made so far.
    """

    defaults: dict[str, Any]
    layers: dict[str, LayerSnapshot]
    state: dict[str, dict[str, Any]]
    schedule: Schedule | None = None


def without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The entries of other keys."""
    return {key: value for key, value in values.items() if key not in keys}
