"""BaseSparsifier: masks on the weights of a model, made again at each step and squashed into the weights at the end."""

from __future__ import annotations

import abc
import copy
import difflib
import inspect
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deadband.compaction.compact import flops_of, seconds_of
from deadband.compaction.examples import as_call, outputs_of
from deadband.layers.tensors import (
    holders,
    matrices,
    module_contains_param,
    remove_parametrizations,
    swap_module,
    underlying,
    unwrapped,
)
from deadband.layers.transaction import all_or_nothing
from deadband.masks import ranks
from deadband.masks.mask_weight import FakeSparsity
from deadband.pruning.names import (
    ConfigError,
    get_arg_info_from_tensor_fqn,
    near,
    tensor_at,
)
from deadband.pruning.report import PruningReport
from deadband.running.copies import copy_model
from deadband.tensor_files import read_tensors, write_tensors

_FROM_NAME = ("module", "module_fqn", "tensor_name")
_OF_MODEL = ("model", "config", "_holders", "_made", "_call", "_given", "_remember")
_KEY, VERSION = "deadband.pruning", 1


class TensorState(dict):
    """What is known of one tensor: its mask, and what a subclass keeps. Equal if the tensors in it are."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping) or self.keys() != other.keys():
            return False
        pairs = [(value, other[key]) for key, value in self.items()]
        return all(torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b) for a, b in pairs)


class BaseSparsifier(abc.ABC):
    """Masks on weights: `prepare` puts them there, each `step` makes them anew, `squash_mask` makes them permanent.

    A subclass has `update_mask(module, tensor_name, tensor_fqn, **group)`, which writes to
    `self.state[tensor_fqn]["mask"]`. Takes the place of torch.ao.pruning's class; the guide says what is different.

    Args:
        defaults: of the configuration of every tensor.

    Attributes:
        groups: the configuration of each tensor, with `module`, `module_fqn`, `tensor_name` and `tensor_fqn`.
        state: by `tensor_fqn`, its `mask` (the object that masks the weight) and what a subclass keeps.
        enable_mask_update: whether `step` does anything.

    Example:
        >>> class FirstRows(BaseSparsifier):
        ...     def update_mask(self, module, tensor_name, tensor_fqn, rows, **group):
        ...         self.state[tensor_fqn]["mask"][rows:] = 0
        >>> model = nn.Sequential(nn.Linear(3, 2, bias=False))
        >>> sparsifier = FirstRows({"rows": 1})
        >>> sparsifier.prepare(model, config=None)
        >>> sparsifier.step()
        >>> sparsifier.squash_mask()
        >>> model[0].weight[1]
        tensor([0., 0., 0.], grad_fn=<SelectBackward0>)
    """

    supported: tuple[type[nn.Module], ...] = (nn.Linear,)
    parametrization: Any = FakeSparsity

    def __init__(self, defaults: dict[str, Any] | None = None) -> None:
        self.defaults: dict[str, Any] = dict(defaults or {})
        self.state: dict[str, Any] = defaultdict(TensorState)
        self.groups: list[dict[str, Any]] = []
        self.enable_mask_update = True
        self._step_count = 0
        self._holders: dict[str, list[tuple[nn.Module, str]]] = {}
        self._made: dict[str, list[nn.Module]] = {}

    @abc.abstractmethod
    def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
        """Make the mask of one tensor; called with its group as keywords, without gradients."""

    def check_group(self, **group: Any) -> None:  # noqa: B027  (a subclass may have nothing to check)
        """Raise a ValueError if the configuration of a tensor cannot be; `step` calls it before any mask changes."""

    def before_step(self) -> None:  # noqa: B027
        """What a subclass looks at before the first mask is made."""

    def __getstate__(self) -> dict[str, Any]:
        groups = [{key: value for key, value in group.items() if key != "module"} for group in self.groups]
        kept = {key: value for key, value in vars(self).items() if key not in _OF_MODEL}
        return kept | {
            "groups": groups,
            "_holders": {},
            "_made": {},
        }  # a prepared model cannot be pickled, and is not ours

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = memo[id(self)] = type(self).__new__(type(self))
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for index, group in enumerate(self.groups):
            keys = ["module", *sorted(group.keys() - {"module"})]
            lines += [f"\tGroup {index}", *(f"\t    {key}: {group.get(key)}" for key in keys)]
        return "\n".join(lines) + ")"

    # ------------------------------------------------------------------------------------------------------- preparing

    def prepare(self, model: nn.Module, config: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Put masks of ones on weights, in place; on any exception the model is as before.

        Args:
            model: any module. What wraps it for parallel training or compiling is looked through.
            config: a mapping for each tensor, with `tensor_fqn` (a name, or a glob such as "*.mlp.*.weight", with
                globs to leave out as `exclude`) and what differs from the defaults; `mask` gives the mask,
                `parametrization` the class that applies it. What several entries name has what the last one says; tied
                tensors are one. None: the weights of all layers of exactly the classes in `supported`.

        Raises:
            ConfigError: a ValueError: a name without a tensor, a key that is misspelt, a mask of another shape.
            ValueError: this sparsifier has masks on a model.
        """
        if any(map(self._is_masked, self.groups)):
            raise ValueError("this sparsifier has masks on a model; call squash_mask() or unprepare() first")
        model = unwrapped(model)
        self.config: Any = config
        if config is None:
            self.make_config_from_model(model)
        groups = self._groups_of(model)
        self.model = model
        self._forget(groups)
        self._find_holders()
        try:
            with all_or_nothing(module for group in groups for module in self._touched(group)):
                self._prepare()
        except BaseException:
            self._forget([])
            raise

    def _forget(self, groups: list[dict[str, Any]]) -> None:
        self.groups, self.state, self._holders, self._made = groups, defaultdict(TensorState), {}, {}

    def make_config_from_model(self, model: nn.Module) -> None:
        """Name the tensors of all layers of exactly the supported classes: a container's own ones first."""
        self.config = []
        names = {id(module): name for name, module in model.named_modules()}
        stack, seen, passed = [model], set(), []
        while stack:
            for child in stack.pop().children():
                kind = parametrize.type_before_parametrizations(child)
                if id(child) not in seen and kind in self.supported:
                    self.config += [{"tensor_fqn": f"{names[id(child)]}.{tensor}"} for tensor in self.tensors_of(child)]
                elif id(child) not in seen:
                    stack.append(child)
                    passed += [names[id(child)]] * (isinstance(child, self.supported) or kind.__name__ == "Conv1D")
                seen.add(id(child))
        if passed:
            message = f"layers of other classes stay as they are unless config names them: {', '.join(passed[:5])}"
            warnings.warn(message, stacklevel=3)
        if not self.config:
            classes = ", ".join(f"nn.{kind.__name__}" for kind in self.supported)
            raise ConfigError(f"{type(model).__name__} has no layer of exactly {classes}; name tensors in config")

    def tensors_of(self, module: nn.Module) -> list[str]:
        """The tensors of a layer that a configuration of None names."""
        return ["weight"]

    def _groups_of(self, model: nn.Module) -> list[dict[str, Any]]:
        """The configuration of every tensor that `config` names, looked at."""
        groups: dict[Any, dict[str, Any]] = {}
        for entry in self.config:
            if not isinstance(entry, Mapping) or not isinstance(entry.get("tensor_fqn"), str):
                raise ConfigError(f"config has {entry!r}; expected mappings with 'tensor_fqn', the name of a tensor")
            self._check_keys(entry)
            pattern, given = entry["tensor_fqn"].removeprefix("."), {**entry}
            exclude, is_glob = given.pop("exclude", ()), any(each in pattern for each in "*?[")
            names = matrices(model, pattern, exclude) if is_glob else [pattern]
            if not names:
                raise ConfigError(f"tensor_fqn={pattern!r} matches no weight; {near(pattern, matrices(model))}")
            for info in (get_arg_info_from_tensor_fqn(model, name) for name in names):
                tensor, key = tensor_at(model, info)
                if wrong := [each for each in _FROM_NAME if each in given and given[each] != info[each]]:
                    raise ConfigError(f"config has {wrong[0]}={given[wrong[0]]!r}; expected {info[wrong[0]]!r}")
                group = groups.get(key, {**copy.deepcopy(self.defaults), **given, **info})
                groups[key] = group | {each: value for each, value in given.items() if each not in info}
                self._check_mask(info, groups[key].get("mask"), tensor)
        return list(groups.values())

    def _check_keys(self, entry: Mapping[str, Any]) -> None:
        """A key that nobody knows may be the user's own, unless it is nearly one that is known."""
        own = inspect.signature(self.update_mask).parameters
        known = {*self.defaults, *own, *_FROM_NAME, "tensor_fqn", "exclude", "mask", "parametrization"} - {"kwargs"}
        for key in entry.keys() - known:
            if close := difflib.get_close_matches(key, known, cutoff=0.8):
                raise ConfigError(f"config has an unknown key {key!r}; expected {close[0]!r}?")

    def _check_mask(self, info: Mapping[str, Any], mask: Any, tensor: Tensor) -> None:
        shape, name = self.whole_mask(tensor, info["module"]).shape, info["tensor_fqn"]
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != shape):
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ConfigError(f"the mask of {name!r} is {got}; expected a tensor of shape {list(shape)}")

    def whole_mask(self, tensor: Tensor, module: nn.Module) -> Tensor:
        """A mask that drops nothing."""
        return torch.ones_like(tensor, requires_grad=False)

    def _prepare(self, *args: Any, **kwargs: Any) -> None:
        for group in self.groups:
            tensor = getattr(group["module"], group["tensor_name"])
            self._put(group, group.get("mask", self.whole_mask(tensor, group["module"])))

    def _find_holders(self) -> None:
        """Find where the tensor of each group is, more than one place if it is tied."""
        held = holders(self.model)
        for group in self.groups:
            place = group["module"], group["tensor_name"]
            self._holders[group["tensor_fqn"]] = held.get(id(underlying(*place)), [place])

    def _put(self, group: dict[str, Any], mask: Tensor) -> None:
        """Put a mask on the tensor of a group, and on whatever is tied to it."""
        tensor_fqn, kind = group["tensor_fqn"], group.get("parametrization", self.parametrization)
        self.state[tensor_fqn]["mask"] = mask
        made: dict[tuple, nn.Module] = {}  # one for all places, unless these need others
        for holder, name in self._holders[tensor_fqn]:
            settings = self.settings_of(holder, name)
            made[settings] = made[settings] if settings in made else kind(mask, *settings)
            parametrize.register_parametrization(holder, name, made[settings])
        self._made[tensor_fqn] = list(made.values())

    def settings_of(self, module: nn.Module, name: str) -> tuple[Any, ...]:
        """What the parametrization of a tensor takes beside the mask."""
        return ()

    def _masked(self) -> list[dict[str, Any]]:
        """The groups whose tensors this sparsifier masks."""
        return [group for group in self.groups if self._is_masked(group)]

    def _is_masked(self, group: Mapping[str, Any]) -> bool:
        lists: Any = getattr(group.get("module"), "parametrizations", {})
        made, name = self._made.get(group["tensor_fqn"], ()), group["tensor_name"]
        return name in lists and any(each is own for each in lists[name] for own in made)

    # ----------------------------------------------------------------------------------------------------------- steps

    def step(self, use_path: bool = True) -> None:
        """Make all masks anew. Under `torch.distributed`, all ranks have those of the first.

        Raises:
            ValueError: nothing is prepared, masks are squashed, or a configuration cannot be; no mask has changed then.
        """
        self._step_count += 1
        if not self.enable_mask_update:
            return
        if not self._masked() and getattr(self, "config", None) != []:
            what = "its masks are squashed; prepare it again" if self.groups else "call prepare(model, config) first"
            raise ValueError(f"{type(self).__name__}.step(): {what}")
        for group in self.groups:
            self.check_group(**group)
        with torch.no_grad():
            self.before_step()
            for group in self.groups:
                self.update_mask(**group)
                if ranks.count() > 1:
                    mask = self.state[group["tensor_fqn"]]["mask"]
                    mask.data = ranks.broadcast_mask(mask.data, mask.device)

    def squash_mask(
        self,
        params_to_keep: Sequence[str] | None = None,
        params_to_keep_per_layer: Mapping[str, Sequence[str]] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write the masked values into the weights, the same Parameter objects, and take all parametrizations off them.

        Args:
            params_to_keep: keys of the configuration that each module gets as a dict `sparse_params`.
            params_to_keep_per_layer: the same for some modules, by name; added to the others.

        Raises:
            KeyError: a group lacks such a key; nothing is squashed then.
        """
        masked = self._masked()
        kept: dict[Any, dict[str, dict[str, Any]]] = {}
        for group in masked:
            keys = [*(params_to_keep or ()), *(params_to_keep_per_layer or {}).get(group["module_fqn"], ())]
            if unknown := [key for key in keys if key not in group]:
                raise KeyError(f"{group['tensor_fqn']} has no {unknown[0]!r} to keep; {near(unknown[0], group)}")
            if keys:
                kept.setdefault(group["module"], {})[group["tensor_name"]] = {key: group[key] for key in keys}
        self._take_off(masked, leave_parametrized=True)
        for module, params in kept.items():  # of several tensors, by their names
            module.sparse_params = params if len(params) > 1 else next(iter(params.values()))

    def unprepare(self) -> None:
        """Take the masks off again: the weights are what they are without them."""
        self._take_off(self._masked(), leave_parametrized=False)
        self._forget([])

    def _touched(self, group: dict[str, Any]) -> list[nn.Module]:
        """The modules that change if a mask is put on a tensor or taken off."""
        found: list[Any] = [module for module, _ in self._holders.get(group["tensor_fqn"], ())]
        lists = [module.parametrizations for module in found if parametrize.is_parametrized(module)]
        return [*found, *lists, *(each for every in lists for each in every.values())]

    def _take_off(self, groups: Iterable[dict[str, Any]], leave_parametrized: bool) -> None:
        touched = [module for group in groups for module in self._touched(group)]
        values = [value for module in touched for value in module._parameters.values() if value is not None]
        with all_or_nothing(touched, values if leave_parametrized else ()):
            for group in groups:
                for module, name in self._holders[group["tensor_fqn"]]:
                    lists: Any = module.parametrizations if parametrize.is_parametrized(module, name) else {}
                    own = [each for each in lists[name] if each in self._made[group["tensor_fqn"]]] if lists else []
                    if own and (leave_parametrized or len(own) == len(lists[name])):
                        remove_parametrizations(module, name, leave_parametrized)
                    for index in reversed(range(len(lists[name]) if name in lists else 0)):
                        if lists[name][index] in own:
                            del lists[name][index]

    def hold_zeros(self, optimizer: torch.optim.Optimizer) -> Any:
        """After each step of an optimizer, set what masks drop to zero again, with its momentum; returns a handle.

        Keeps squashed weights sparse in training. While masks are on, it keeps the weights below them from moving on:
        leave it out where dropped weights shall come back.
        """

        def hold(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            for group in self.groups:
                for module, name in self._holders[group["tensor_fqn"]]:
                    weight: Any = underlying(module, name)
                    for value in (weight, *optimizer.state.get(weight, {}).values()):
                        if isinstance(value, Tensor) and value.shape == weight.shape:
                            value.detach().masked_fill_(self.dropped(group, weight), 0)

        return optimizer.register_step_post_hook(hold)

    def dropped(self, group: Mapping[str, Any], tensor: Tensor) -> Tensor:
        """Which entries of a tensor its mask drops: bool, of a shape that broadcasts to the tensor's."""
        return self.state[group["tensor_fqn"]]["mask"] == 0

    def report(self, example: Any = None) -> PruningReport:
        """What the masks drop, tensor by tensor; with an example (arguments of one call) also FLOPs and latency."""
        zeros, shares = {}, {}
        for group in self.groups:
            name, tensor = group["tensor_fqn"], getattr(group["module"], group["tensor_name"])
            zeros[name] = int(self.dropped(group, tensor).expand_as(tensor).sum()), tensor.numel()
            shares[group["module_fqn"]] = 1 - zeros[name][0] / zeros[name][1]
        if example is None:
            return PruningReport(zeros)
        call, (masked, mine), (dense, its) = as_call(example), self._copied(), self._copied()
        outputs_of(dense, call)
        mine.squash_mask()
        its.unprepare()
        flops = flops_of(dense, call), flops_of(dense, call, shares)
        return PruningReport(zeros, flops, seconds_of(dense, masked, call))

    def _copied(self) -> tuple[nn.Module, Any]:
        """A copy of the model, and of this sparsifier for it."""
        model = copy_model(self.model)
        memo: dict[int, Any] = {}
        for own, its in zip(self.model.modules(), model.modules(), strict=True):
            memo |= {id(own): its} | {id(value): its._buffers[name] for name, value in own._buffers.items()}
        return model, copy.deepcopy(self, memo)

    def convert(
        self,
        module: nn.Module,
        mapping: Mapping[type[nn.Module], Any] | None = None,
        inplace: bool = False,
        parameterization: type[nn.Module] = FakeSparsity,
    ) -> nn.Module:
        """Put what `mapping` makes of them in the place of masked children, before their masks are squashed.

        Args:
            module: the model.
            mapping: from a class to one that has `from_dense` or `from_float`.
            inplace: change `module`; else a deep copy.
            parameterization: the class of the masks.
        """
        if mapping is None:
            raise NotImplementedError("convert() needs a mapping from classes to those that take their place")
        if not inplace:
            module = copy.deepcopy(module)
        for name, child in list(module.named_children()):
            kind = parametrize.type_before_parametrizations(child)
            if kind in mapping and module_contains_param(child, parameterization):
                module._modules[name] = swap_module(child, mapping)
            elif not isinstance(child, nn.ModuleDict) or name != "parametrizations":
                self.convert(child, mapping, True, parameterization)
        return module

    # ---------------------------------------------------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        """`state` (by name, with copies of the masks) and `groups` (without modules): plain, for `torch.save`."""
        groups = [{key: value for key, value in group.items() if key not in _FROM_NAME} for group in self.groups]
        state = {
            name: {key: each.clone() if isinstance(each, Tensor) else each for key, each in entries.items()}
            for name, entries in self.state.items()
        }
        return {"state": state, "groups": copy.deepcopy(groups)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Take over the masks and groups of another sparsifier, by value, all or nothing.

        Args:
            state_dict: of this class's or torch's `state_dict()`.
            strict: whether a tensor that the model lacks is an error; else it is passed over.

        Raises:
            ValueError: nothing was prepared, or a mask has another shape than its tensor.
            RuntimeError: with `strict`, a tensor that the model lacks.
        """
        if not hasattr(self, "model"):
            raise ValueError("call prepare(model, config) before load_state_dict")
        groups, masks, keys = [], {}, set()
        named = {group["tensor_fqn"]: group for group in state_dict["groups"]}
        for name in dict.fromkeys([*named, *state_dict["state"]]):
            info = get_arg_info_from_tensor_fqn(self.model, name)
            try:
                tensor, key = tensor_at(self.model, info)
            except ValueError as error:
                if strict:
                    raise RuntimeError(f"the state has a mask of {name!r}: {error}") from None
                continue
            mask = state_dict["state"].get(name, {}).get("mask")
            masks[name] = (
                torch.ones_like(tensor) if mask is None else mask.to_dense() if mask.is_sparse else mask.clone()
            )
            self._check_mask(info, masks[name], tensor)
            if key not in keys:  # tied tensors have one mask
                groups.append({**copy.deepcopy({**self.defaults, **named.get(name, {})}), **info})
            keys.add(key)
        before = self.groups, self.state, self._holders, self._made
        gone = [group for group in self._masked() if group["tensor_fqn"] not in masks]
        touched = [module for group in self.groups for module in self._touched(group)]
        try:
            self.groups, self.state = groups, defaultdict(TensorState)
            self._holders, self._made = {**self._holders}, {**self._made}
            self._find_holders()
            with all_or_nothing([*touched, *(module for group in groups for module in self._touched(group))]):
                self._take_off(gone, leave_parametrized=False)
                for group in groups:
                    self._take_over(group, masks[group["tensor_fqn"]], before[1], state_dict["state"])
        except BaseException:
            self.groups, self.state, self._holders, self._made = before
            raise

    def _take_over(self, group: dict[str, Any], mask: Tensor, had: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        """Give a group a mask that was loaded, and what else its state holds."""
        name = group["tensor_fqn"]
        mask = mask.to(getattr(group["module"], group["tensor_name"]).device)
        if self._is_masked(group):
            self.state[name]["mask"] = had[name]["mask"]
            self.state[name]["mask"].data = mask
        else:
            self._put(group, mask)
        others = saved.get(name, {}).items()
        self.state[name].update({key: copy.deepcopy(value) for key, value in others if key != "mask"})

    def save(self, path: str | os.PathLike) -> None:
        """Write masks, groups and defaults as safetensors, all or nothing; masks of zeros and ones take a byte each."""
        saved, masks, dtypes = self.state_dict(), {}, {}
        for name, entries in saved["state"].items():
            mask = entries.pop("mask")
            dtypes[name] = str(mask.dtype).removeprefix("torch.")
            masks[name] = (mask != 0 if bool(((mask == 0) | (mask == 1)).all()) else mask).contiguous()
        for group in saved["groups"]:
            for key in ("mask", "parametrization"):
                group.pop(key, None)
        about = {"version": VERSION, "defaults": self.defaults, "dtypes": dtypes, **saved}
        try:
            json.dumps(about)
        except TypeError as error:
            raise ValueError(f"the configuration holds what JSON does not: {error}; use state_dict()") from None
        write_tensors(path, masks, _KEY, about)

    def load(self, path: str | os.PathLike, strict: bool = True) -> None:
        """Take over what `save` wrote; see `load_state_dict`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is of another kind or version, or damaged.
        """
        about, masks = read_tensors(path, _KEY, "masks of a sparsifier", VERSION)
        try:
            state, groups, defaults = {**about["state"]}, [*map(self._typed, about["groups"])], about["defaults"]
            for name, mask in masks.items():
                state[name] = {**state[name], "mask": mask.to(getattr(torch, about["dtypes"][name]))}
            if sorted(state) != sorted(masks) or sorted(group["tensor_fqn"] for group in groups) != sorted(masks):
                raise ValueError("its masks, groups and state are of other tensors")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} is damaged: {error!r}") from None
        self.load_state_dict({"state": state, "groups": groups}, strict)
        self.defaults = self._typed(defaults)

    def _typed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Settings from JSON, with tuples where the defaults have them."""
        return {
            key: tuple(each) if isinstance(self.defaults.get(key), tuple) and isinstance(each, list) else each
            for key, each in values.items()
        }
