"""Passes of data through a model that show what each site gets, and masks on it, by hooks."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deadband.layers.experts import ExpertLinear, module_at
from deadband.layers.gated import gates_of
from deadband.layers.hooks import attach, detach, forget_compiled, take_input, with_input
from deadband.layers.rule import Rule
from deadband.layers.scope import for_here, scope
from deadband.ops.nested import parts_of_rows, rows_of_parts
from deadband.running.batches import Counted, checked
from deadband.running.forward import evaluating, progress_bar, run

Result = TypeVar("Result")


class NotReachedError(ValueError):
    """Sites saw nothing of the data, such as experts that no token was sent to.

    Attributes:
        sites: their names, in the order of the model.
    """

    def __init__(self, message: str, sites: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.sites = tuple(sites)


UNREACHED = ("error", "dense")
"""What becomes of sites that no token reached: an error that names them, or they are left dense."""


def check_unreached(choice: str) -> str:
    """Return a choice of `UNREACHED`, or raise a ValueError."""
    if choice not in UNREACHED:
        raise ValueError(f"unreached={choice!r}; expected one of {', '.join(map(repr, UNREACHED))}")
    return choice


def require_reached(names: Iterable[str], reached: Container[str], what: str = "{} {} never reached") -> None:
    """A NotReachedError names all sites that are missing in `reached`; `what` says so of "site 'a'" or "3 sites"."""
    missing = [name for name in names if name not in reached]
    if not missing:
        return
    alone = len(missing) == 1
    found = what.format(f"site {missing[0]!r}" if alone else f"{len(missing)} sites", "was" if alone else "were")
    it, listed = ("it", "") if alone else ("them", ": " + ", ".join(missing))
    raise NotReachedError(
        f"{found}; leave {it} out with exclude= or unreached='dense' in calibrate, or give data that reaches "
        f"{it}{listed}",
        missing,
    )


@contextlib.contextmanager
def warn_of_idle_experts(sites: Mapping[str, nn.Module]) -> Iterator[None]:
    """Say at the end of the block which experts of the sites no token was sent to inside it.

    They have the rule of the others, of which they had no part.
    """
    projections = {name: each for name, each in sites.items() if isinstance(each, ExpertLinear)}
    names = {each.owner: name for name, each in projections.items()}.values()  # one of each mixture
    tokens = {name: torch.zeros(projections[name].count, dtype=torch.int64) for name in names}
    handles = []

    def hook(name: str) -> Any:
        def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
            experts: Tensor = args[1] if len(args) > 1 else kwargs["experts"]
            tokens[name] += experts[experts >= 0].bincount(minlength=len(tokens[name])).cpu()

        return count

    with scope():
        try:
            for name in tokens:
                handles.append(attach(sites[name], for_here(hook(name))))
            yield
        finally:
            for handle in handles:
                detach(handle)
    idle = {name: (own == 0).nonzero().flatten().tolist() for name, own in tokens.items() if own.any()}
    said = [f"{', '.join(map(str, none))} of {name.rpartition('.')[0]!r}" for name, none in idle.items() if none]
    if said:
        warnings.warn(
            f"no token of these batches was sent to experts {'; '.join(said)}. They take the rule that was made for "
            "the others; batches that reach them make it theirs, too",
            stacklevel=4,
        )


class InputWatcher:
    """One pass of data through a model that gives each site's input to `see`, from forward pre-hooks."""

    def __init__(self) -> None:
        self.counted = Counted()  # of the batch that is run
        self.encoded: Tensor | None = None  # what the encoder of an encoder-decoder model returned
        # q, k and v (gate and up) get the same tensor: it is looked at once. Holding it keeps its identity from reuse.
        self.last: tuple[Tensor, int | None, Any] | None = None
        self.regrouped: set[str] = set()  # sites whose rows are tokens in another order

    def see(self, name: str, x: Tensor) -> Tensor | None:
        """What to do with the input [..., in_features] of one call of a site; returns what the site gets instead."""
        raise NotImplementedError

    def rows(self, name: str, x: Tensor) -> Tensor:
        """The unpadded rows [rows, in_features] of what a site sees, or of anything of that shape."""
        if name in self.regrouped:
            return x.reshape(-1, x.shape[-1])
        encoded = self.encoded is not None and same_input(x, self.encoded)  # keys and values of cross-attention
        return self.counted.rows(name, x, encoded=encoded)

    def step(self, model: nn.Module, batch: Any) -> None:
        """Run one batch, without gradients."""
        run(model, batch, use_cache=False, logits_to_keep=1)  # neither is looked at

    def look(self, name: str, x: Tensor, function: Callable[[Tensor], Result], *, shared: bool = True) -> Result:
        """`function` of the unpadded rows [rows, in_features] of `x`.

        With `shared`, a call with the tensor of the call before gives the result of then.
        """
        version = None if x.is_inference() else x._version  # changed in place: not the same input any more
        if shared and self.last is not None and self.last[0] is x and self.last[1] == version:
            return self.last[2]
        result = function(self.rows(name, x))
        self.last = (x, version, result) if shared and version is not None else None
        return result

    def watch(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        names: list[str],
        what: str,
        progress: bool,
        gates: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Run all batches in eval mode, without gradients, with hooks on the named sites; `what` labels the progress.

        Args:
            model, batches: what is run.
            names: of the sites whose inputs are watched.
            what: labels the progress.
            progress: show it.
            gates: by the names that `see` gets, modules whose outputs are watched in the same way.

        Raises:
            ValueError: no batch.
        """
        modules = {name: module_at(model, name) for name in names}
        experts = {name: each for name, each in modules.items() if isinstance(each, ExpertLinear)}
        self.regrouped = {name for name, each in experts.items() if not each.in_order}
        given = checked(batches)
        with self._watching(modules, gates or {}, encoders_of(model)), evaluating(model):
            for batch in progress_bar(given, what, progress, total=operator.length_hint(batches) or None):
                self.counted, self.encoded, self.last = Counted.of(model, batch), None, None
                self.step(model, batch)
        self.encoded = self.last = None

    @contextlib.contextmanager
    def _watching(
        self, modules: Mapping[str, nn.Module], gates: Mapping[str, nn.Module], encoders: Iterable[nn.Module]
    ) -> Iterator[None]:
        handles, others = [], []
        with scope():
            try:
                for name, module in modules.items():
                    handles.append(attach(module, for_here(self._hook(name))))
                for name, module in gates.items():
                    others.append(module.register_forward_hook(for_here(self._gate_hook(name))))
                for encoder in encoders:
                    others.append(encoder.register_forward_hook(for_here(self._remember)))
                if gates:
                    forget_compiled()
                yield
            finally:
                for handle in handles:
                    detach(handle)
                for other in others:
                    other.remove()

    def _remember(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.encoded = first_tensor(output)

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            x = take_input(name, args, kwargs)
            instead = self.see(name, rows_of_parts(x))
            return None if instead is None else with_input(args, kwargs, parts_of_rows(instead, x))

        return hook

    def _gate_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            instead = self.see(name, rows_of_parts(output))
            return None if instead is None else parts_of_rows(instead, output)

        return hook


def split_rules(model: nn.Module, rules: Mapping[str, Rule]) -> tuple[list[str], dict[str, nn.Module]]:
    """For `watch`: the names of the sites whose rule is of their input, and the gates of the others by name."""
    inputs = [name for name, rule in rules.items() if not rule.gate]
    if len(inputs) == len(rules):
        return inputs, {}
    gates = gates_of(model)
    return inputs, {name: gates[name][0] for name, rule in rules.items() if rule.gate}


class SharedInputs(InputWatcher):
    """Which sites are given the same tensor, one after the other, when they are first called: q, k and v; gate and up.

    Attributes:
        groups: their names, in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[list[str]] = []
        self.names: set[str] = set()

    def see(self, name: str, x: Tensor) -> None:
        """Put the site into a group, if this is its first call."""
        if name in self.names:
            return
        self.names.add(name)
        version = None if x.is_inference() else x._version  # changed in place: not the same input any more
        if self.last is not None and self.last[1] == version and same_input(x, self.last[0]):
            self.groups[-1].append(name)
        else:
            self.groups.append([name])
            self.begin(x)
        self.last = (x, version, None)

    def begin(self, x: Tensor) -> None:
        """Called with the input of each new group."""


def encoders_of(model: nn.Module) -> list[nn.Module]:
    """The encoders whose output a decoder gets: modules of that name outside of any decoder, or of another encoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return []
    paths = {name: name.split(".") for name, _ in model.named_modules()}
    found = [
        name for name, path in paths.items() if path[-1] == "encoder" and not {"encoder", "decoder"} & set(path[:-1])
    ]
    return [model.get_submodule(name) for name in found]


def first_tensor(output: Any) -> Tensor:
    """The first tensor in what a module returned."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output


def prediction_of(output: Any) -> tuple[Tensor, bool]:
    """The logits in what a model returned, or else its first tensor; and whether these are logits."""
    logits = getattr(output, "logits", None)
    return (first_tensor(output), False) if logits is None else (logits, True)


def same_input(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same rows of the same memory, [..., features] or all of them in [rows, features]."""
    return x is y or (
        x.data_ptr() == y.data_ptr()
        and x.numel() == y.numel()
        and (x.shape[-1], x.stride(-1)) == (y.shape[-1], y.stride(-1))
    )


@contextlib.contextmanager
def thresholding(
    sites: Mapping[str, nn.Module], rules: Mapping[str, Rule], gates: Mapping[str, nn.Module] | None = None
) -> Iterator[None]:
    """Inside the block, hooks apply the rules to the input of each site: the sparse model, without changing a layer.

    Those that `gates` names to the output of the module there, see `split_rules`.
    """
    handles = []

    def hook(name: str) -> Any:
        def mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            x = take_input(name, args, kwargs)
            return with_input(args, kwargs, parts_of_rows(rules[name].apply(rows_of_parts(x)), x))

        return mask

    def gate_hook(name: str) -> Any:
        return lambda module, args, output: parts_of_rows(rules[name].apply(rows_of_parts(output)), output)

    with scope():
        try:
            for name, module in sites.items():
                if rules[name].threshold > 0:
                    handles.append(attach(module, for_here(hook(name))))
            for name, module in (gates or {}).items():
                handles.append(module.register_forward_hook(for_here(gate_hook(name))))
            if gates:
                forget_compiled()
            yield
        finally:
            for handle in handles:
                detach(handle)
