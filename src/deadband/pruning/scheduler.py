"""Schedulers: what sets the sparsity level, or another setting, of a sparsifier as training goes on."""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deadband.masks.schedule import cubic
from deadband.pruning.data import BaseDataSparsifier
from deadband.pruning.sparsifier import BaseSparsifier


class _Scheduler(abc.ABC):
    """Counts steps and sets values: the first when it is made, for epoch 0."""

    last_epoch: int
    _get_sl_called_within_step = _get_sp_called_within_step = False

    def _begin(self, sparsifier: BaseSparsifier, last_epoch: int, verbose: bool) -> None:
        self.last_epoch, self.verbose = last_epoch, verbose
        self._step_count = sparsifier._step_count = 0
        self.step()

    def step(self, epoch: int | None = None) -> None:
        """Go on by one epoch and set the values; `epoch` is only printed."""
        sparsifier = next(value for value in vars(self).values() if isinstance(value, BaseSparsifier))
        if self._step_count == 1 and sparsifier._step_count < 1:
            warnings.warn("scheduler.step() came before sparsifier.step(); call sparsifier.step() first", stacklevel=2)
        self._step_count += 1
        self.last_epoch += 1
        self._get_sl_called_within_step = self._get_sp_called_within_step = True
        try:
            self._update()
        finally:
            self._get_sl_called_within_step = self._get_sp_called_within_step = False
        sparsifier.enable_mask_update = True
        if self.verbose:
            print(f"epoch {self.last_epoch if epoch is None else epoch}: {getattr(self, self._last)}")

    _last: str  # the attribute with the values that were set last

    @abc.abstractmethod
    def _update(self) -> None: ...

    @abc.abstractmethod
    def _set(self, values: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """Everything but the sparsifier, and functions, which are not saved."""
        kept = {key: value for key, value in vars(self).items() if not isinstance(value, BaseSparsifier)}
        return {k: v for k, v in kept.items() if not (callable(v) or (isinstance(v, list) and any(map(callable, v))))}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another scheduler was; the sparsifier gets its values."""
        self._set(state_dict[self._last])
        vars(self).update(state_dict)


class BaseScheduler(_Scheduler):
    """Sets `sparsity_level` of all groups to what `get_sl()` of a subclass gives for `last_epoch`, one level per group.

    Args:
        sparsifier: prepared; `base_sl` are the levels of its groups at the start.
        last_epoch: the epoch before the first; making the scheduler sets the levels of the one after it.
        verbose: print each change.

    Raises:
        TypeError: not one of deadband's sparsifiers.
        ValueError: it is not prepared, or has no levels.

    Example:
        >>> import torch
        >>> from deadband.pruning import WeightNormSparsifier
        >>> sparsifier = WeightNormSparsifier(sparsity_level=0.8)
        >>> sparsifier.prepare(torch.nn.Sequential(torch.nn.Linear(8, 8)))
        >>> scheduler = CubicSL(sparsifier, delta_t=2, total_t=5)
        >>> sparsifier.step()
        >>> scheduler.step()
        >>> round(scheduler.get_last_sl()[0], 4)
        0.2168
    """

    def __init__(self, sparsifier: BaseSparsifier, last_epoch: int = -1, verbose: bool = False) -> None:
        self.sparsifier = sparsifier
        self.base_sl = [group["sparsity_level"] for group in self._groups()]
        self._begin(sparsifier, last_epoch, verbose)

    def _groups(self) -> list[dict[str, Any]]:
        if not isinstance(self.sparsifier, BaseSparsifier):
            raise TypeError(f"got a {type(self.sparsifier).__name__}; expected a deadband.pruning.BaseSparsifier")
        groups = self.sparsifier.groups
        if not groups or not all("sparsity_level" in group for group in groups):
            what = "has no sparsity_level to set" if groups else "is not prepared: call prepare(model, config)"
            raise ValueError(f"the {type(self.sparsifier).__name__} {what} before a scheduler is made")
        return groups

    def get_sl(self) -> Sequence[float]:
        """The level of each group at `last_epoch`."""
        raise NotImplementedError(f"{type(self).__name__} has no get_sl()")

    def get_last_sl(self) -> list[float]:
        """The levels that were set last."""
        return self._last_sl

    _last = "_last_sl"

    def _update(self) -> None:
        self._set(list(self.get_sl()))

    def _set(self, values: list[float]) -> None:
        if len(values) != len(self._groups()):
            raise ValueError(f"got {len(values)} levels; expected {len(self._groups())}, one per group")
        for group, level in zip(self._groups(), values, strict=True):
            group["sparsity_level"] = level
        self._last_sl = list(values)

    def _make_sure_a_list(self, value: Any) -> list[Any]:
        count = len(self._groups())
        given = list(value) if isinstance(value, (list, tuple)) else [value] * count
        if len(given) != count:
            raise ValueError(f"got {len(given)} values, {given}; expected {count}, one per group")
        return given


class LambdaSL(BaseScheduler):
    """Levels that are those at the start times a function of the epoch, or one per group."""

    def __init__(self, sparsifier: BaseSparsifier, sl_lambda: Any, last_epoch: int = -1, verbose: bool = False) -> None:
        self.sparsifier = sparsifier
        self.sl_lambdas: list[Callable[[int], float]] = self._make_sure_a_list(sl_lambda)
        super().__init__(sparsifier, last_epoch, verbose)

    def get_sl(self) -> list[float]:
        """The level of each group at `last_epoch`."""
        return [level * scale(self.last_epoch) for level, scale in zip(self.base_sl, self.sl_lambdas, strict=True)]


class CubicSL(BaseScheduler):
    """Levels that go from `init_sl` to those at the start, fast at first and ever slower, up or down.

    Args:
        sparsifier, last_epoch, verbose: as for `BaseScheduler`; the others may be lists, of a value per group.
        init_sl: the level up to epoch `init_t`, if not `initially_zero`.
        delta_t, total_t: the change takes `delta_t * total_t` epochs, with a value for each.

    Source: Zhu & Gupta 2017, arXiv 1710.01878, equation 1.
    """

    def __init__(
        self,
        sparsifier: BaseSparsifier,
        init_sl: Any = 0.0,
        init_t: Any = 0,
        delta_t: Any = 10,
        total_t: Any = 100,
        initially_zero: Any = False,
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        self.sparsifier = sparsifier
        self.init_sl, self.init_t = self._make_sure_a_list(init_sl), self._make_sure_a_list(init_t)
        self.delta_t, self.total_t = self._make_sure_a_list(delta_t), self._make_sure_a_list(total_t)
        self.initially_zero = self._make_sure_a_list(initially_zero)
        if not all(every * count > 0 for every, count in zip(self.delta_t, self.total_t, strict=True)):
            raise ValueError(f"delta_t={delta_t}, total_t={total_t}; expected a product above 0")
        super().__init__(sparsifier, last_epoch, verbose)

    @staticmethod
    def sparsity_compute_fn(
        s_0: float, s_f: float, t: float, t_0: float, dt: float, n: float, initially_zero: bool = False
    ) -> float:
        """The level at `t` on the way from `s_0` to `s_f`, which begins at `t_0` and takes `dt * n`."""
        if initially_zero and t < t_0:
            return 0.0
        return s_f + (s_0 - s_f) * (1 - cubic(min(max((t - t_0) / (dt * n), 0.0), 1.0)))

    def get_sl(self) -> list[float]:
        """The level of each group at `last_epoch`."""
        ways = zip(self.init_sl, self.base_sl, strict=True)
        times = zip(self.init_t, self.delta_t, self.total_t, self.initially_zero, strict=True)
        return [self.sparsity_compute_fn(*way, self.last_epoch, *time) for way, time in zip(ways, times, strict=True)]


class BaseDataScheduler(_Scheduler):
    """Sets one setting of data of a `BaseDataSparsifier` to what `get_schedule_param()` of a subclass gives, by name.

    Args:
        data_sparsifier: with data; `base_param` are the values at the start.
        schedule_param: the setting, a key of `data_groups[name]`.
        last_epoch, verbose: as for `BaseScheduler`.
    """

    def __init__(
        self, data_sparsifier: BaseDataSparsifier, schedule_param: str, last_epoch: int = -1, verbose: bool = False
    ) -> None:
        if not isinstance(data_sparsifier, BaseDataSparsifier):
            raise TypeError(f"got a {type(data_sparsifier).__name__}; expected a deadband.pruning.BaseDataSparsifier")
        self.data_sparsifier, self.schedule_param = data_sparsifier, schedule_param
        self.base_param = self._current()
        self._begin(data_sparsifier, last_epoch, verbose)

    @abc.abstractmethod
    def get_schedule_param(self) -> dict[str, Any]:
        """The value for each name at `last_epoch`."""

    def get_last_param(self) -> dict[str, Any]:
        """The values that were set last."""
        return self._last_param

    _last = "_last_param"

    def _current(self) -> dict[str, Any]:
        return {name: each.get(self.schedule_param) for name, each in self.data_sparsifier.data_groups.items()}

    def _update(self) -> None:
        self._set(self.get_schedule_param())

    def _set(self, values: Mapping[str, Any]) -> None:
        groups = self.data_sparsifier.data_groups
        if unknown := values.keys() - groups.keys():
            raise ValueError(f"get_schedule_param() names {sorted(unknown)}; the sparsifier has {sorted(groups)}")
        for name, value in values.items():
            groups[name][self.schedule_param] = value
        self._last_param = self._current()
