"""Sparsifiers of tensors and embeddings that belong to no model: they hold the masks, the data stay where they are."""

from __future__ import annotations

import abc
import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deadband.masks.blocks import block_mask, block_scores, check_blocks, in_shape_of, kept_blocks, matrix_of
from deadband.masks.mask_weight import FakeSparsity
from deadband.pruning.sparsifier import BaseSparsifier, TensorState

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class BaseDataSparsifier(BaseSparsifier):
    """Masks of named tensors. A subclass has `update_mask(name, data, **config)`, which writes to `get_mask(name)`.

    Args:
        data_list: pairs of a name and a tensor, a parameter or an embedding.
        defaults: of the configuration of each, which is in `data_groups` by name.
    """

    def __init__(self, data_list: Iterable[tuple[str, Any]] | None = None, **defaults: Any) -> None:
        super().__init__(defaults)
        self.data_groups: dict[str, dict[str, Any]] = defaultdict(dict)
        self._data: dict[str, Tensor] = {}
        self._squashed: set[str] = set()
        for name, data in data_list or ():
            self.add_data(name, data)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """Not for data, as are other methods that need a model."""
        raise NotImplementedError("a data sparsifier has no model; call add_data, squash_mask and state_dict")

    unprepare = report = hold_zeros = convert = save = load = prepare

    def add_data(self, name: str, data: Any, reuse_mask: bool = True, **config: Any) -> Tensor:
        """Take a Tensor, Parameter, nn.Embedding or nn.EmbeddingBag in, which stays where it is; returns it masked.

        Data of a known name take its place, with a warning, and have its configuration and, if reused, its mask.

        Raises:
            AssertionError: another type, or another shape than the mask.
        """
        if type(data) not in (Tensor, nn.Parameter, *_EMBEDDINGS):
            raise AssertionError(f"{name!r} is a {type(data).__name__}; expected a Tensor, Parameter or Embedding(Bag)")
        weight: Tensor = data.weight if isinstance(data, _EMBEDDINGS) else data
        local = {**copy.deepcopy(self.data_groups.get(name, self.defaults)), **config}
        mask = local.get("mask")
        if name in self._data:
            warnings.warn(f"{name!r} takes the place of data of the same name", stacklevel=2)
            mask = self.get_mask(name) if reuse_mask else mask
        mask = torch.ones_like(weight, requires_grad=False) if mask is None else mask
        if mask.shape != weight.shape:
            raise AssertionError(
                f"{name!r} has shape {list(weight.shape)}, its mask {list(mask.shape)}; expected one shape"
            )
        self._data[name], self.state[name], self.data_groups[name] = weight, TensorState(mask=mask), local
        self._squashed.discard(name)
        return self.get_data(name, return_original=False)

    def get_data(self, name: str, return_original: bool = True) -> Tensor:
        """The tensor itself, or masked; a ValueError if there is none, or only the masked one is left."""
        mask, data = self.get_mask(name), self._data[name]
        if return_original and name in self._squashed:
            raise ValueError(f"the mask of {name!r} is squashed; pass return_original=False for what is left")
        if return_original or name in self._squashed:
            return data
        return self.data_groups[name].get("parametrization", FakeSparsity)(mask)(data)

    def get_mask(self, name: str) -> Tensor:
        """The mask of a tensor, an object that stays the same; a ValueError if there is none."""
        if name not in self._data:
            raise ValueError(f"there are no data named {name!r}; there are {sorted(self._data)}")
        return self.state[name]["mask"]

    def step(self, use_path: bool = True) -> None:
        """Make all masks anew, from the tensors without masks."""
        self._step_count += 1
        groups = {name: each for name, each in self.data_groups.items() if name not in self._squashed}
        for name, group in groups.items():
            self.check_group(**{"tensor_fqn": name, **group})
        with torch.no_grad():
            for name, group in groups.items() if self.enable_mask_update else ():
                self.update_mask(name, self._data[name], **group)

    @abc.abstractmethod
    def update_mask(self, name: str, data: Tensor, **kwargs: Any) -> None:  # type: ignore[override]
        """Make the mask of one tensor; called without gradients."""

    def squash_mask(
        self, *args: Any, leave_parametrized: bool = True, names: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        """Write the masked values into the tensors, in place; with `leave_parametrized=False` only drop the masks."""
        masked = {name: self.get_data(name, False).detach() for name in (self.data_groups if names is None else names)}
        for name, value in masked.items():
            if leave_parametrized:
                self._data[name].detach().copy_(value)
            self._squashed.add(name)

    def state_dict(self) -> dict[str, Any]:
        """`state` (masks as sparse COO tensors), `data_groups` and `_container` (the tensors), all copies."""
        state = {name: {**self.state[name], "mask": self.get_mask(name).to_sparse_coo()} for name in self._data}
        keys = {name: name if name in self._squashed else f"parametrizations.{name}.original" for name in self._data}
        data = {keys[name]: tensor.detach().clone() for name, tensor in self._data.items()}
        return {"state": state, "data_groups": copy.deepcopy(dict(self.data_groups)), "_container": data}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Take over data, masks and configuration by value; tensors of one name and shape stay the objects they are.

        Args:
            state_dict: of this class or torch's.
            strict: forget what the state does not have.

        Raises:
            RuntimeError: the state has a mask without data or configuration.
        """
        held, loaded = state_dict["_container"], {}
        for name, entries in state_dict["state"].items():
            data = held.get(f"parametrizations.{name}.original", held.get(name))
            if name not in state_dict["data_groups"] or data is None:
                raise RuntimeError(f"the state has a mask of {name!r}, but no data or configuration")
            loaded[name] = data, {**entries, "mask": entries["mask"].to_dense()}
        for name in self._data.keys() - loaded.keys() if strict else ():
            del self._data[name], self.state[name], self.data_groups[name]
        for name, (data, entries) in loaded.items():
            present = self._data.get(name)
            if present is not None and present.shape == data.shape:
                present.detach().copy_(data)
                self.get_mask(name).data = entries.pop("mask").to(present.device)
            else:
                self._data[name] = data.clone()
            self.state[name].update(entries)
            self.data_groups[name] = copy.deepcopy(state_dict["data_groups"][name])
            (self._squashed.add if name in held else self._squashed.discard)(name)

    def __repr__(self) -> str:
        lines = [f"\tData Group\n\t    name: {name}" for name in self.data_groups]
        shown = [[f"\n\t    {key}: {each[key]}" for key in sorted(each)] for each in self.data_groups.values()]
        return "\n".join([f"{type(self).__name__} (", *map(str.__add__, lines, map("".join, shown))]) + ")"


class DataNormSparsifier(BaseDataSparsifier):
    """Drops the blocks of least norm of tensors, or the smallest entries of them, like `WeightNormSparsifier`.

    A level below 1 may drop all blocks here, and of equal blocks the first go first.

    Args:
        data_list: pairs of a name and a tensor, a parameter or an embedding.
        sparsity_level, sparse_block_shape, zeros_per_block: as for `WeightNormSparsifier`.
        norm: "L1", the magnitude of an entry, or "L2", its square.

    Example:
        >>> sparsifier = DataNormSparsifier([("x", torch.tensor([[1.0, 2.0, 3.0, 4.0]]))], sparse_block_shape=(1, 2))
        >>> sparsifier.step()
        >>> sparsifier.get_data("x", return_original=False)
        tensor([[0., 0., 3., 4.]])
    """

    def __init__(
        self,
        data_list: Iterable[tuple[str, Any]] | None = None,
        sparsity_level: float = 0.5,
        sparse_block_shape: tuple[int, int] = (1, 4),
        zeros_per_block: int | None = None,
        norm: str = "L1",
    ) -> None:
        if norm not in ("L1", "L2"):
            raise AssertionError(f"norm={norm!r}; expected 'L1' or 'L2'")
        self.norm = norm
        zeros = math.prod(sparse_block_shape) if zeros_per_block is None else zeros_per_block
        blocks = {"sparse_block_shape": sparse_block_shape, "zeros_per_block": zeros}
        super().__init__(data_list, sparsity_level=sparsity_level, **blocks)

    def check_group(self, **group: Any) -> None:
        """A ValueError that names the data if their configuration cannot be."""
        blocks = group["sparse_block_shape"], group["zeros_per_block"]
        check_blocks(group["tensor_fqn"], group["sparsity_level"], *blocks)

    def update_mask(  # type: ignore[override]
        self,
        name: str,
        data: Tensor,
        sparsity_level: float,
        sparse_block_shape: tuple[int, int],
        zeros_per_block: int,
        **kwargs: Any,
    ) -> None:
        """Make the mask of one tensor, in its dtype."""
        if sparsity_level <= 0 or zeros_per_block == 0 or not data.numel():
            self.get_mask(name).data = torch.ones_like(data)
            return
        values = matrix_of(data.float() if data.itemsize < 4 else data)
        values = values.reshape(1, -1) if values.shape[1] == 1 else values
        scores = values.abs() if self.norm == "L1" else values.square()
        blocks = block_scores(scores, sparse_block_shape)
        kept = kept_blocks(blocks, sparsity_level, all_may_go=True, last_first=False)
        kept = block_mask(scores, kept, sparse_block_shape, zeros_per_block)
        self.get_mask(name).data = in_shape_of(kept.to(data.dtype), data)
