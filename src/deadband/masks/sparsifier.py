"""ActivationSparsifier: torch.ao.pruning's class, repaired, with masks that make layers smaller."""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import deadband.masks.averaging  # noqa: F401
from deadband.layers.hooks import arguments_of, attach, detach
from deadband.masks import ranks
from deadband.masks.accumulator import Accumulator, Selection, as_features
from deadband.masks.aggregate import Aggregate
from deadband.masks.layers import (
    FUNCTIONS,
    LayerError,
    check_config,
    family_of,
    feature_dimension,
    input_features,
    keeps_statistics,
    ones_like,
    same_layer,
    some,
)
from deadband.masks.mask_input import MaskInput
from deadband.masks.portable import load, portable_state, save
from deadband.masks.schedule import Schedule
from deadband.masks.snapshot import LayerSnapshot, Snapshot, without
from deadband.masks.state import read_state, refusing_damage, torch_state
from deadband.masks.watch import RememberCall, WatchInput
from deadband.running.copies import copy_arguments, copy_model

if TYPE_CHECKING:
    import os

    from deadband.calibration.calibration import Calibration
    from deadband.compaction.compact import CompactionReport

_NO_INPUT = "Error: shape unknown, call layer() routine at least once to infer mask (no input has reached {})"
_MADE_ANEW = (  # from a snapshot, or empty, by a copy
    "defaults", "data_groups", "_state", "_schedule", "_lock", "_watches", "_maskings", "_handles", "_mask_handles",
    "_example",
)  # fmt: skip
_OPTIONS = {"zero_start", "widen", "synchronise", "training_only"}


class ActivationSparsifier:
    """Makes static masks for the inputs of layers: mask = mask_fn(reduce_fn(aggregate of all inputs)).

    Takes the place of the class of this name in `torch.ao.pruning._experimental.activation_sparsifier`: the same
    constructor, methods, attributes and results.

    Args:
        model: the module whose layers are registered, one by one, with `register_layer`.
        aggregate_fn: default for layers: `aggregate_fn(data, x) -> data`, where data starts as zeros like the first x;
            or one of `deadband.aggregate`.
        reduce_fn: default for layers: `reduce_fn(data) -> scores`; see `deadband.reduce`.
        mask_fn: default for layers: `mask_fn(scores, **sparse_config) -> mask`; see `deadband.mask`.
        features: default for layers: only these features are masked, each on its own (with a function of
            `deadband.aggregate`: together); distinct whole numbers.
        feature_dim: the dimension of `features`, and of what `deadband.aggregate` counts as features.
        zero_start: with False, a function of your own starts from the first input instead of zeros, and is first called
            for the second: right for maxima, products and concatenation, wrong where data are not of the kind of x, as
            in sums of squares.
        widen: with True, functions of your own get float32 where inputs are of half precision.
        synchronise: under torch.distributed, `step` puts together what all ranks aggregated, so that they make the same
            mask; it has to be called on all of them. A function of your own whose aggregates do not add up by the
            function itself, as sums and maxima do, gives rank 0's mask, with a warning. With False, each rank is on its
            own.
        training_only: look only at inputs of layers in training mode.
        sparse_config: keyword arguments for mask_fn.

    Example:
        >>> from deadband import aggregate, mask, reduce
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sparsifier = ActivationSparsifier(model, aggregate.mean_abs, reduce.mean, mask.magnitude, sparsity=0.5)
        >>> sparsifier.register_layer(model[2])
        >>> _ = model(torch.randn(16, 4))                   # calibrate: nothing in the output changes
        >>> sparsifier.step()                               # make the masks
        >>> sparsifier.squash_mask()                        # apply them from now on
        >>> int(sparsifier.get_mask("2").sum()), model[2].activation_mask.dtype
        (4, torch.bool)
    """

    model: Any
    defaults: dict[str, Any]
    data_groups: dict[str, dict[str, Any]]

    def __init__(
        self,
        model: nn.Module,
        aggregate_fn: Callable[..., Any] | None = None,
        reduce_fn: Callable[..., Any] | None = None,
        mask_fn: Callable[..., Any] | None = None,
        features: Any = None,
        feature_dim: int | None = None,
        *,
        zero_start: bool = True,
        widen: bool = False,
        synchronise: bool = True,
        training_only: bool = False,
        **sparse_config: Any,
    ) -> None:
        self.model = model
        self.defaults = defaultdict()
        self.defaults["sparse_config"] = sparse_config
        self.defaults.update(
            aggregate_fn=aggregate_fn, reduce_fn=reduce_fn, mask_fn=mask_fn, features=features, feature_dim=feature_dim
        )
        self.data_groups = defaultdict(dict)
        self.zero_start, self.widen = zero_start, widen
        self.synchronise, self.training_only = synchronise, training_only
        self._state: dict[str, dict[str, Any]] = defaultdict(dict)
        self._schedule: Schedule | None = None
        self._example: tuple[tuple, dict] | None = None
        self._no_example = "no call of the model was seen while layers were registered"
        self._begin()

    def _begin(self) -> None:
        """What a copy needs anew."""
        self._lock = threading.RLock()
        self._watches: dict[str, WatchInput] = {}
        self._maskings: dict[str, MaskInput] = {}  # those in force
        self._mask_handles: dict[str, RemovableHandle] = {}
        self._handles: dict[Any, RemovableHandle] = {}
        # hooks that aggregate go with the sparsifier; masks stay, they belong to the model
        weakref.finalize(self, _remove_all, self._handles).atexit = False

    @property
    def state(self) -> dict[str, dict[str, Any]]:
        """Layer name -> {"mask": None, a tensor, or a list of tensors (with features)}."""
        for name, masking in self._maskings.items():
            masking.pull(self.data_groups[name]["layer"])
        return self._state

    @state.setter
    def state(self, value: dict[str, dict[str, Any]]) -> None:
        self._state = value

    # ------------------------------------------------------------------------------------------------ registering

    def register_layer(
        self,
        layer: nn.Module,
        aggregate_fn: Callable[..., Any] | None = None,
        reduce_fn: Callable[..., Any] | None = None,
        mask_fn: Callable[..., Any] | None = None,
        features: Any = None,
        feature_dim: int | None = None,
        **sparse_config: Any,
    ) -> None:
        """Watch the input of a layer of the model from now on. Arguments that are None come from the constructor.

        A layer that is registered already is registered anew, with a warning; bad arguments leave it as it was.

        Args:
            layer: a module of the model, or the model itself.
            aggregate_fn, reduce_fn, mask_fn, feature_dim: as for the constructor.
            features: as for the constructor; `"all"` switches a default of the constructor off.
            sparse_config: keyword arguments for mask_fn, on top of the constructor's.

        Raises:
            LayerError: the layer is not in the model.
            AssertionError: a function is missing, or features come without feature_dim.
            TypeError, ValueError: features are not distinct whole numbers.
        """
        name = self._name_of(layer)
        if name is None:
            raise LayerError(f"layer not found in the model: this {type(layer).__name__} is no part of it")
        if reserved := sorted(_OPTIONS & sparse_config.keys()):
            raise TypeError(f"layer {name!r}: {reserved[0]} is for all layers; pass it to the constructor")
        given = {
            "aggregate_fn": aggregate_fn, "reduce_fn": reduce_fn, "mask_fn": mask_fn, "features": features,
            "feature_dim": feature_dim, "layer": layer,
        }  # fmt: skip
        config = copy.copy(self.defaults)  # functions stay the objects they are
        config["features"] = copy.deepcopy(config["features"])
        config["sparse_config"] = {**copy.deepcopy(self.defaults["sparse_config"]), **sparse_config}
        config.update((key, value) for key, value in given.items() if value is not None)
        check_config(name, config)
        if name in self.data_groups:
            warnings.warn(
                "layer already attached to the sparsifier, deregistering the layer and registering with new config",
                stacklevel=2,
            )
            self.unregister_layer(name)
        self.data_groups[name] = config
        self._state[name]["mask"] = None
        self._watch(name)
        config["hook_state"] = "aggregate"

    def _watch(self, name: str) -> None:
        config = self.data_groups[name]
        receive = type(self)._receive
        hook = WatchInput(name, config, self, receive, zero_start=self.zero_start, widen=self.widen)
        self._watches[name] = hook
        config["hook"] = self._handles[name] = attach(config["layer"], hook)
        complete = "_forward_pre_hooks" in vars(self.model)  # not so while it is copied, with us as an attribute
        if complete and self._example is None and RememberCall not in self._handles:
            remember = RememberCall(self._remember_call)
            self._handles[RememberCall] = self.model.register_forward_pre_hook(remember, with_kwargs=True)

    def _receive(self, watching: WatchInput, x: Tensor) -> None:
        """One input of a layer, from its hook."""
        name = watching.name
        with self._lock:
            config = self.data_groups.get(name)
            if config is None or self._watches.get(name) is not watching:
                return
            if self.training_only and not config["layer"].training:
                return
            mask = watching.add(config, x)
            if mask is not None:
                self._state[name]["mask"] = mask

    def _remember_call(self, args: tuple, kwargs: dict) -> None:
        """The arguments of one call of the model, for `compact_`."""
        if self._example is None:
            try:
                self._example = copy_arguments((args, kwargs))
            except TypeError as error:
                self._no_example = f"the call of the model that was seen cannot be kept: {error}"
            self._handles.pop(RememberCall, None)

    def unregister_layer(self, name: str | nn.Module) -> None:
        """Take hook and mask off a layer and forget it.

        Raises:
            LayerError: it is not registered.
        """
        name = self._registered(name)
        self._take_off(name)
        self._state.pop(name, None)
        self.data_groups.pop(name)

    def _take_off(self, name: str) -> None:
        config = self.data_groups[name]
        self._watches.pop(name, None)
        self._handles.pop(name, None)
        if (handle := config.pop("hook", None)) is not None:
            detach(handle)
        if (handle := self._mask_handles.pop(name, None)) is not None:
            detach(handle)
        if (masking := self._maskings.pop(name, None)) is not None:
            masking.pull(config["layer"])
            masking.remove_from(config["layer"])

    def _name_of(self, layer: nn.Module) -> str | None:
        return next((name for name, module in self.model.named_modules() if module is layer), None)

    def _find(self, name: str, names: Mapping[str, Any]) -> str | None:
        """The one of `names` that means the layer `name`, which may come from a model in other wrappers."""
        if name in names:
            return name
        own = isinstance(self.model, nn.Module) and any(each == name for each, _ in self.model.named_modules())
        return None if own else same_layer(name, names)

    def _registered(self, name: str | nn.Module) -> str:
        found = self._name_of(name) if isinstance(name, nn.Module) else self._find(name, self.data_groups)
        if found is None or found not in self.data_groups:
            what = repr(name) if isinstance(name, str) else f"this {type(name).__name__}"
            raise LayerError(f"layer with the given name not found: {what}; registered are {some(self.data_groups)}")
        return found

    def get_mask(self, name: str | None = None, layer: nn.Module | None = None) -> Any:
        """The mask of a layer: a tensor, or a list of tensors where it has features. Writes into it take effect.

        Raises:
            LayerError: the layer is unknown, or no input has reached it.
        """
        if name is None and layer is None:
            raise LayerError("Need at least name or layer obj to retrieve mask")
        if name is None:
            assert layer is not None
            name = self._name_of(layer)
            if name is None:
                raise LayerError("layer not found in the specified model")
        found = self._find(name, self._state)
        if found is None:
            raise LayerError(
                f"Error: layer with the given name not found: {name!r}; registered are {some(self.data_groups)}"
            )
        if (masking := self._maskings.get(found)) is not None:
            masking.pull(self.data_groups[found]["layer"])
        mask = self._state[found].get("mask")
        if mask is None:
            raise LayerError(_NO_INPUT.format(repr(name)))
        for each in mask if isinstance(mask, list) else [mask]:
            if each.numel() > 1 and not any(each.stride()):
                each.data = each.data.contiguous()  # ones that took no memory; somebody may write into them
        return mask

    # --------------------------------------------------------------------------------------------------- stepping

    def step(self) -> None:
        """Make the mask of every layer from what was aggregated, and start aggregating again.

        With a `schedule`, this also sets the sparsity; between two changes of it, nothing happens.

        Raises:
            LayerError: no input has reached a layer since the last step; then no mask has changed.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._schedule is None:
                self._update_masks()
                return
            if self._schedule.over and not self._watches:
                return
            if self._schedule.due() or self._schedule.over:
                level = self._schedule.at(self._schedule.step)
                before = [dict(config["sparse_config"]) for config in self.data_groups.values()]
                for config in self.data_groups.values():
                    config["sparse_config"][self._schedule.argument] = level
                try:
                    self._update_masks()
                except BaseException:
                    for config, old in zip(self.data_groups.values(), before, strict=True):
                        config["sparse_config"].clear()
                        config["sparse_config"].update(old)
                    raise
                self._put_in_force()
            self._schedule.step += 1
            if self._schedule.over:
                self.squash_mask()

    def _update_masks(self) -> None:
        waiting = [
            name
            for name, config in self.data_groups.items()
            # without mask_fn, it keeps statistics; what was seen before squash_mask() still counts, as in torch
            if (config.get("hook_state") == "aggregate" or "data" in config) and config["mask_fn"] is not None
        ]
        if self.data_groups and not self._watches and not waiting:
            raise LayerError("step() after squash_mask(): no layer is watched any more; register layers again first")
        agree = self.synchronise and ranks.count() > 1
        everything = {name: self._aggregated(name, agree) for name in waiting}
        if missing := [name for name, (data, _) in everything.items() if data is None]:
            raise LayerError(f"step(): no input has reached {some(missing)} since the last step; run the model first")
        before = {name: _contents(self._state[name].get("mask")) for name in waiting}
        try:
            for name, (data, _) in everything.items():
                if name not in self.data_groups:
                    continue  # a function of the user unregistered it
                if self._state[name].get("mask") is None:  # this rank has seen nothing, others have
                    self._state[name]["mask"] = ones_like(data)
                self.update_mask(name, data, self.data_groups[name])
                if agree:
                    self._copy_mask(name, ranks.broadcast_mask(self._state[name]["mask"], self._device(name)))
        except BaseException as error:
            for other, mask in before.items():
                if other in self.data_groups:
                    self._state[other]["mask"] = _put_back(mask)
            if hasattr(error, "add_note"):
                error.add_note(f"while making the mask of layer {name!r}; no mask has changed")
            raise
        for name in waiting:
            if name in self.data_groups:
                self.data_groups[name].pop("data", None)
                self.data_groups[name].pop("rows", None)
                if name in self._watches:
                    self._watches[name].begin()
                    self._watches[name].stepped = True

    def _aggregated(self, name: str, agree: bool) -> tuple[Any, int]:
        config = self.data_groups[name]
        data, rows = config.get("data"), config.get("rows", 0)
        if not agree or not isinstance(data, (Tensor, list, type(None))):
            return data, rows
        aggregate_fn = config["aggregate_fn"]
        device = self._device(name)
        if isinstance(aggregate_fn, Aggregate):
            return ranks.merge_over_ranks(data, rows, device, aggregate_fn.merge)
        if not ranks.on_all_ranks(_adds_up(aggregate_fn, data), device):
            warnings.warn(
                f"layer {name!r}: what its aggregate_fn gave on several ranks cannot be put together; all take the "
                "first rank's mask. Use a function of deadband.aggregate, or synchronise=False",
                stacklevel=4,
            )
            return ranks.merge_over_ranks(data, rows, device, lambda first, *_: first)
        accumulator = Accumulator(name, aggregate_fn, zero_start=self.zero_start)
        return ranks.merge_over_ranks(data, rows, device, lambda one, _, other, __: accumulator.add(one, other))

    def _device(self, name: str) -> torch.device:
        tensor = next(self.data_groups[name]["layer"].parameters(), None)
        return tensor.device if tensor is not None else torch.device("cpu")

    def _copy_mask(self, name: str, values: Any) -> None:
        mask = self._state[name]["mask"]
        for target, value in zip(mask, values, strict=True) if isinstance(mask, list) else [(mask, values)]:
            target.data = value

    def update_mask(self, name: str, data: Any, configs: dict[str, Any]) -> None:
        """Make one layer's mask: `mask_fn(reduce_fn(data), **sparse_config)`, for each feature where it has features.

        `step` calls this for every layer. Override it to make masks in another way.

        Args:
            name: of the layer.
            data: what was aggregated: a tensor, or a list of one tensor for each feature.
            configs: the layer's entry of `data_groups`.

        Raises:
            TypeError: mask_fn returned something that is not a tensor.
        """
        mask = self.get_mask(name)
        reduce_fn, mask_fn, features = configs["reduce_fn"], configs["mask_fn"], configs["features"]

        def made(part: Tensor) -> Tensor:
            result = mask_fn(reduce_fn(part), **configs["sparse_config"])
            if not isinstance(result, Tensor):
                raise TypeError(f"layer {name!r}: mask_fn returned {type(result).__name__}, expected a tensor")
            result = result.detach()
            return result if result.layout is torch.strided else result.to_dense()

        if features is None:
            mask.data = made(data)
        elif isinstance(configs["aggregate_fn"], Aggregate):
            index = torch.tensor(Selection(name, as_features(features), 0).index(data.shape), device=data.device)
            chosen = made(data[index])
            mask.data = chosen.new_ones(data.shape).index_copy(0, index, chosen)
        else:
            for part, target in zip(data, mask, strict=True):
                target.data = made(part.contiguous())

    # --------------------------------------------------------------------------------------------------- applying

    def squash_mask(self, attach_sparsify_hook: bool = True, **kwargs: Any) -> None:
        """Stop aggregating and mask the layers' inputs from now on. The mask becomes a buffer of the layer.

        Args:
            attach_sparsify_hook: with False, nothing is masked, also after saving and loading.
            kwargs: ignored, as in torch's class.

        Raises:
            LayerError: no input has reached a layer; then nothing has changed.
        """
        with self._lock, torch.inference_mode(False):
            if attach_sparsify_hook:
                names = list(self.data_groups)
                if missing := [name for name in names if self._state[name].get("mask") is None]:
                    raise LayerError(_NO_INPUT.format(some(missing)))
                made = {name: self._maskings.get(name) or self._new_masking(name) for name in names}
                for name, masking in made.items():
                    masking.source = self._state[name]["mask"]
                    shape = self._watches[name].shape if name in self._watches else None
                    if shape is not None or not isinstance(masking.source, list):
                        masking.made(shape)  # raises while nothing has changed yet
            for name, config in self.data_groups.items():
                shape = self._watches[name].shape if name in self._watches else None
                in_force = attach_sparsify_hook and self._maskings.pop(name, None) is not None
                self._take_off(name)
                if attach_sparsify_hook:
                    self._put_on(name, made[name], shape, new=not in_force)
                config["hook_state"] = "sparsify"

    def _new_masking(self, name: str) -> MaskInput:
        config, watching = self.data_groups[name], self._watches.get(name)
        mask, ready_made = self._state[name]["mask"], isinstance(config["aggregate_fn"], Aggregate)
        features = index = None
        if isinstance(mask, list):
            features = as_features(config["features"])
            if watching is not None and watching.shape is not None and features:
                features = Selection(name, features, config["feature_dim"]).index(watching.shape)
            index = torch.tensor(features, dtype=torch.int64)
        return MaskInput(
            name,
            mask,
            dim=feature_dimension(config["layer"], config["feature_dim"]) if ready_made else None,
            features=index,
            feature_dim=config["feature_dim"] or 0,
            unset=watching is not None and not watching.stepped and _keeps_all(mask),
            order=arguments_of(config["layer"]),
        )

    def _put_on(self, name: str, masking: MaskInput, shape: torch.Size | None, *, new: bool = True) -> None:
        config = self.data_groups[name]
        if new:
            masking.add_to(config["layer"], shape)
        elif shape is not None or not isinstance(masking.source, list):
            masking.build(config["layer"], shape)
        self._maskings[name] = masking
        config["hook"] = self._mask_handles[name] = attach(config["layer"], masking)

    def _put_in_force(self) -> None:
        """Mask while going on to aggregate: what a schedule does."""
        for name, watching in self._watches.items():
            config, mask = self.data_groups[name], self._state[name].get("mask")
            if mask is None:
                continue  # registered since the last step
            if name in self._maskings:
                self._maskings[name].follow(mask, config["layer"], watching.shape)
            else:
                watching.in_force = True
                watch_handle = config["hook"]
                self._put_on(name, self._new_masking(name), watching.shape)
                config["hook"] = watch_handle

    def schedule(
        self,
        sparsity: float | Callable[[int], float],
        *,
        steps: int | None = None,
        initial: float = 0.0,
        begin: int = 0,
        every: int = 1,
        curve: str | Callable[[float], float] = "cubic",
        argument: str = "sparsity",
    ) -> None:
        """Let sparsity grow over training: call `step()` after each training step (or epoch) and nothing else.

        Each `step()` at which sparsity changes makes new masks at the new level; they are in force from then on while
        aggregation goes on beneath them, so that a feature can come back. After the last change the masks are
        squashed, and further calls of `step()` do nothing. `state_dict(portable=True)` remembers the step.

        Args:
            sparsity: the final one; or a function from the step (0, 1, ...) to a sparsity.
            steps: steps from `initial` to the final sparsity; with a function, None means without end.
            initial: sparsity at step `begin`.
            begin: the first step that changes masks.
            every: steps between two changes.
            curve: `cubic` (Zhu & Gupta 2017, arXiv 1710.01878), `linear`, or a function from progress to share.
            argument: the keyword of mask_fn that is set.

        Raises:
            ValueError: a number out of range.

        Example:
            >>> from deadband import aggregate, mask, reduce
            >>> model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
            >>> sparsifier = ActivationSparsifier(model, aggregate.mean_abs, reduce.mean, mask.magnitude)
            >>> sparsifier.register_layer(model[2])
            >>> sparsifier.schedule(0.8, steps=2, curve="linear")
            >>> kept = []
            >>> for _ in range(4):
            ...     _ = model(torch.randn(16, 4))
            ...     sparsifier.step()
            ...     kept.append(int(sparsifier.get_mask("2").sum()))
            >>> kept
            [10, 6, 2, 2]
        """
        self._schedule = Schedule(
            sparsity=sparsity, steps=steps, initial=initial, begin=begin, every=every, curve=curve, argument=argument
        )  # fmt: skip

    def masks(self, kind: type[nn.Module] = nn.Module) -> dict[str, Tensor]:
        """The masks as one bool for each feature of a layer's input, [features], for `deadband.sparsify_(masks=...)`.

        A feature counts as kept if it is kept at any position.

        Args:
            kind: only of layers of this class: `nn.Linear` for `sparsify_`.

        Raises:
            LayerError: a layer has no mask yet.
        """
        groups = self.data_groups.items()
        return {name: self._feature_mask(name)[0] for name, config in groups if isinstance(config["layer"], kind)}

    def _feature_mask(self, name: str) -> tuple[Tensor, bool]:
        """One bool for each feature, and whether that is all there is to the mask."""
        config, mask = self.data_groups[name], self.get_mask(name)
        layer = config["layer"]
        watching = self._watches.get(name)
        if watching is not None and not watching.stepped:
            raise LayerError(f"layer {name!r} has no mask yet; call step() first")
        # without features, feature_dim says nothing about masks of one's own functions
        dim = feature_dimension(layer, config["feature_dim"] if isinstance(mask, list) else None)
        count = input_features(layer)
        full = mask
        if isinstance(mask, list):
            stored = layer._buffers.get(self._maskings[name].buffer) if name in self._maskings else None
            if stored is None:
                shape = watching.shape if watching is not None else None
                if shape is None:
                    raise LayerError(f"layer {name!r}: the shape of its input is unknown; run the model once")
                stored = self._new_masking(name).full(shape)
            full = stored
        elif isinstance(config["aggregate_fn"], Aggregate):
            dim = -1
        if full.dim() == 0:
            full = full.reshape(1)
        dim = dim if dim < 0 else dim - full.dim()
        if full.dim() < -dim:  # broadcasts along the features
            full = full.reshape((1,) * (-dim - full.dim()) + tuple(full.shape))
        if full.shape[dim] == 1 and count is not None:
            full = full.expand([count if i == full.dim() + dim else size for i, size in enumerate(full.shape)])
        rows = full.movedim(dim, 0).reshape(full.shape[dim], -1)
        keep = (rows != 0).any(1)
        return keep, bool((rows == keep[:, None]).all())

    # ------------------------------------------------------------------------------------------- smaller, elsewhere

    def compact_(self, example: Any = None, *, producers: bool = True) -> CompactionReport:
        """Remove the features that the squashed masks drop for good: weights get smaller, hooks and masks go.

        The columns of the masked layers go; where nothing else reads a feature, so do the rows of the layer that makes
        it (found through Torch-Pruning: `pip install "deadband[compact]"`). Elsewhere, as on a residual stream, the
        masked layer gathers the features that it keeps. Outputs stay those of the masked model. Layers that were
        compacted are no longer registered. Parameters that shrink are new objects: make the optimizer afterwards.

        Args:
            example: arguments of one call of the model: a tensor, a tuple of positional arguments, or a mapping of
                keyword arguments. Without, the first call after registering is used: two rows of it, if the model
                gives the same for them alone.
            producers: with False, layers that make features stay whole, and Torch-Pruning is not needed.

        Returns:
            A `CompactionReport`: parameters, FLOPs and latency before and after, and what happened to each layer.

        Raises:
            LayerError: nothing is squashed.
            ImportError: Torch-Pruning is missing.
            ValueError: no example is known, or the model does not run on it.
            TypeError: the model keeps something that cannot be copied.
        """
        from deadband.compaction.compact import compact_

        squashed = [name for name in self._maskings if name not in self._watches]
        if not squashed:
            raise LayerError("compact_(): no mask is in force; call squash_mask() first")
        call = self._example_call(example)
        self.state  # noqa: B018  (brings the masks up to date)
        features = {name: self._feature_mask(name) for name in squashed}
        whole = {name: keep for name, (keep, exact) in features.items() if exact}
        hooks = {name: (self._maskings[name], self.data_groups[name]["hook"]) for name in whole}
        for name, (masking, handle) in hooks.items():
            detach(handle)
            masking.remove_from(self.data_groups[name]["layer"])
        try:
            report = compact_(self.model, whole, call, producers=producers)
        except BaseException:
            for name, (masking, _) in hooks.items():
                self._put_on(name, masking, None)
            raise
        left = {name: "its mask differs between positions" for name, (_, exact) in features.items() if not exact}
        for name in whole:
            if name in report.left:
                self._put_on(name, hooks[name][0], None)
            else:
                for own in (self._maskings, self._mask_handles, self._state, self.data_groups):
                    own.pop(name)
        report.left.update(left)
        return report

    def _example_call(self, example: Any) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a call, positional and by keyword, from what `compact_` was given or from the one seen."""
        from deadband.compaction.examples import as_call, few_rows

        if example is not None:
            return as_call(example)
        if self._example is not None:
            return few_rows(copy_model(self.model), self._example)
        raise ValueError(
            f"compact_(): {self._no_example}. Pass example=: the arguments of one call of the model (a tensor, a "
            "tuple of positional arguments, or a mapping of keyword arguments)"
        )

    def calibration(self) -> Calibration:
        """What was seen since the last step by layers that were registered with `aggregate_fn=aggregate.statistics`.

        Returns:
            A `Calibration`, as `deadband.calibrate` makes, to `allocate` thresholds from.

        Raises:
            LayerError: no layer was registered so, or no input has reached one.
        """
        from deadband.calibration.calibration import Calibration
        from deadband.calibration.site_statistics import SiteStatistics

        groups = {name: config for name, config in self.data_groups.items() if keeps_statistics(config)}
        if not groups:
            raise LayerError("no layer is registered with aggregate_fn=deadband.aggregate.statistics")
        if missing := [name for name, config in groups.items() if "data" not in config]:
            raise LayerError(f"no input has reached {some(missing)}; run the model first")
        sites = {}
        for name, config in groups.items():
            site: SiteStatistics = config["data"]
            sites[name] = SiteStatistics.empty(config["layer"]) + site.of_layer(config["layer"])
        return Calibration(sites)

    # ------------------------------------------------------------------------------------------ saving and loading

    def state_dict(self, *, portable: bool = False) -> dict[str, Any]:
        """Everything but the model: masks, configurations, what was aggregated so far.

        Args:
            portable: False gives what torch's class gives: `state` with masks as sparse COO tensors, `data_groups` and
                `defaults` with the functions themselves. True gives plain values and tensors only, which
                `torch.load(weights_only=True)` reads: functions are named, masks are bool.

        Raises:
            ValueError: with portable, a sparse_config that JSON cannot hold.
        """
        with self._lock:
            if portable:
                return portable_state(self._snapshot())
            self._release()
            return torch_state(self._snapshot())

    def load_state_dict(
        self, state_dict: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        """Take over a state; what this sparsifier had before is dropped, hooks included. All or nothing.

        Layers are found by name, with or without the prefixes that DDP and torch.compile put in front. Masks go to the
        device of their layer.

        Args:
            state_dict: what `state_dict` returned, in either form.
            functions: for a portable state: the functions to use, by role (`{"mask_fn": f}`) or by the name that was
                saved. Those of deadband and those that this sparsifier knows are found by themselves.

        Raises:
            KeyError: an entry is missing.
            LayerError: a layer is not in the model.
            ValueError: a layer of another type or size, an unknown function or hook state.
        """
        with self._lock, torch.inference_mode(False), refusing_damage():
            before = self._snapshot(), self._modules()
            after = read_state(state_dict, functions or {}, before[0], self.model)
            try:
                self._restore(*after)
            except BaseException:
                self._restore(*before)
                raise

    def save(self, path: str | os.PathLike) -> None:
        """Write the portable state as a safetensors file, with everything that is no tensor as JSON in its header."""
        with self._lock:
            save(self._snapshot(), path)

    def load(self, path: str | os.PathLike, functions: Mapping[str, Callable[..., Any]] | None = None) -> None:
        """Read what `save` wrote; see `load_state_dict`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else.
        """
        self.load_state_dict(load(path), functions)

    def __copy__(self) -> ActivationSparsifier:
        raise TypeError("a shallow copy would share hooks and masks with the original; use copy.deepcopy")

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            self._release()
            handles = {name: handle for name, handle in self._handles.items() if name in self.data_groups}
            hooks = [(name, handle.id) for each in (handles, self._mask_handles) for name, handle in each.items()]
            return {**without(vars(self), *_MADE_ANEW), "_copied": (self._snapshot(), self._modules(), hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        snapshot, modules, hooks = state["_copied"]
        vars(self).update(without(state, "_copied"), data_groups=defaultdict(dict), _example=None)
        self._begin()
        for name, number in hooks:  # they came with the copy of the model; those put up anew feed this sparsifier
            modules[name]._forward_pre_hooks_with_kwargs.pop(number, None)
            hook = modules[name]._forward_pre_hooks.pop(number, None)
            if isinstance(hook, MaskInput):
                hook.remove_from(modules[name])
        self._restore(snapshot, modules)

    def _modules(self) -> dict[str, nn.Module]:
        return {name: config["layer"] for name, config in self.data_groups.items()}

    def _release(self) -> None:
        """What was aggregated so far is about to be given out: it may not change any more."""
        for watching in self._watches.values():
            watching.release()

    def _snapshot(self) -> Snapshot:
        state = defaultdict(dict, self.state)
        layers = {name: self._layer_snapshot(name, config) for name, config in self.data_groups.items()}
        return Snapshot(self.defaults, layers, state, self._schedule)

    def _layer_snapshot(self, name: str, config: dict[str, Any]) -> LayerSnapshot:
        layer, watching, masking = config["layer"], self._watches.get(name), self._maskings.get(name)
        shape = watching.shape if watching is not None else None
        if shape is None and masking is not None:
            shape = masking.input_shape(layer)
        # torch's class says `sparsify` of every squashed layer; of one that is not masked, `None` is saved
        hook_state = config["hook_state"] if "hook" in config else "None"
        return LayerSnapshot(
            config={**without(config, "layer", "hook"), "hook_state": hook_state},
            family=family_of(layer),
            width=input_features(layer),
            shape=shape,
            buffer=masking.buffer if masking is not None else None,
            unset=masking.unset if masking is not None else watching is not None and not watching.stepped,
        )

    def _restore(self, snapshot: Snapshot, modules: Mapping[str, nn.Module]) -> None:
        """Become what a snapshot says, of these layers; hooks and masks that were there before go."""
        for name in list(self.data_groups):
            self._take_off(name)
        self.defaults, self._state, self._schedule = snapshot.defaults, snapshot.state, snapshot.schedule
        self.data_groups = defaultdict(dict)
        for name, saved in snapshot.layers.items():
            self.data_groups[name] = {**saved.config, "layer": modules[name]}
        for name, saved in snapshot.layers.items():
            hook_state = saved.config["hook_state"]
            if hook_state == "aggregate":
                self._watch(name)
                self._watches[name].shape, self._watches[name].stepped = saved.shape, saved.unset is False
            elif hook_state == "sparsify":
                self._mask_again(name, saved)
            else:
                self.data_groups[name]["hook_state"] = "sparsify"
        if self._schedule is not None and self._watches and self._schedule.step > self._schedule.begin:
            self._put_in_force()

    def _mask_again(self, name: str, saved: LayerSnapshot) -> None:
        masking, shape = self._new_masking(name), saved.shape
        masking.unset = bool(saved.unset)
        masking.buffer = saved.buffer or masking.buffer  # another sparsifier may mask the same layer
        if shape is not None and masking.features is not None and len(masking.features):
            index = Selection(name, masking.features.tolist(), masking.feature_dim).index(shape)
            masking.features = torch.tensor(index)
        self._put_on(name, masking, shape)

    def __repr__(self) -> str:
        text = self.__class__.__name__ + " ("
        for name, config in self.data_groups.items():
            shown = sorted(key for key in config if key not in ("data", "rows", "hook", *FUNCTIONS))
            lines = ["\tData Group", f"\t    name: {name}", *(f"\t    {key}: {config[key]}" for key in shown)]
            text += "\n" + "\n".join(lines) + "\n"
        return text + ")"


def _contents(mask: Any) -> Any:
    masks = mask if isinstance(mask, list) else [] if mask is None else [mask]
    return mask, [(each, each.data) for each in masks]


def _put_back(remembered: Any) -> Any:
    mask, contents = remembered
    for each, data in contents:
        each.data = data
    if isinstance(mask, list):
        mask[:] = [each for each, _ in contents]
    return mask


def _keeps_all(mask: Any) -> bool:
    masks = mask if isinstance(mask, list) else [mask]
    ones = (each[(0,) * each.dim()] if each.numel() and not any(each.stride()) else each for each in masks)
    return all(each.is_meta or bool((each == 1).all()) for each in ones)


def _adds_up(function: Callable[..., Any], data: Any) -> bool:
    """Whether an aggregate counts as an input like any other: added to nothing, or to itself, it stays what it is."""
    for part in data if isinstance(data, list) else [] if data is None else [data]:
        for start in (torch.zeros_like(part), part.clone()):
            result = function(start, part.clone())
            if isinstance(result, Tensor) and result.shape == part.shape and torch.equal(result, part):
                break
        else:
            return False
    return True


def _remove_all(handles: dict[Any, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
