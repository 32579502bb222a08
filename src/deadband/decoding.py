"""prepare_decode_: decoding one token costs little more than its linear layers.

What a token costs beside its linear layers (norms, rotary embedding, attention, cache, and above all Python and the
dispatcher, once for each of some 700 operators) is captured once as one graph (`torch.export`), with the weights, the
cache and the position as inputs, and compiled (torch's inductor). The model's forward takes that graph when it is
called on one new token of one sequence, and itself for everything else: prefill, batches, padding, training.

The cache stays transformers' own `DynamicCache` (`deadband.decode_cache`). So `generate`, `crop`, a chat that continues
and a second forward by hand all work, and nothing has a maximal length. The graph is made in `deadband.decode_graph`.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deadband.breakeven import tune_
from deadband.decode_cache import BLOCK, Store, attach, layer_classes
from deadband.decode_graph import PASSES, GraphPass, capture, compile_graph
from deadband.linear import SparseSite
from deadband.running import evaluating
from deadband.sparsify import sparse_sites


class DecodeWarning(UserWarning):
    """A prepared model decodes as slowly as one that is not."""


def prepare_decode_(model: Any, *, tune: bool = False, passes: Sequence[GraphPass] | None = None) -> Any:
    """Compile what `model` does to decode one token, in place; about a minute the first time, less from torch's cache.

    From then on `model.generate(...)` and `model(token, past_key_values=cache)` take the compiled graph for one token
    of one sequence without padding, outside of training and with gradients off (`torch.no_grad`). All else runs as
    before: prompts, batches, padding, beams, attentions or hidden states asked for, models with hooks.

    The graph has the model's layers as they are now, sparse or dense. Writing to weights is seen; `sparsify_` and
    `densify_` undo `prepare_decode_`; after `.to(dtype)` or other changes of tensors a new sequence decodes without the
    graph, and says so, until the model is prepared again. Copies of the model and what `save_pretrained` writes are not
    prepared.

    Where compiling fails (no C++ compiler, a model that cannot be captured), a `DecodeWarning` says why, and the model
    decodes as it did.

    Args:
        model: a causal language model of transformers, on the CPU.
        tune: first let layers skip only where that is faster (`deadband.breakeven.tune_`): measured the first time,
            some seconds for each kind of layer, and remembered. What is computed then depends on the machine.
        passes: what to do to the graph of ATen operators before it is compiled; the default is `PASSES`.

    Returns:
        The model, for chaining.

    Raises:
        ValueError: not a causal language model of transformers.

    Example:
        >>> prepare_decode_(nn.Linear(2, 2))
        Traceback (most recent call last):
        ValueError: Linear is not a causal language model of transformers: it has no generate
    """
    if not callable(getattr(model, "generate", None)):
        raise ValueError(f"{type(model).__name__} is not a causal language model of transformers: it has no generate")
    if tune:
        tune_(model)
    existing = model.__dict__.get("_deadband_decoder")
    if existing is not None and existing.fits(model) and existing.rows == existing.current_rows():
        return model
    unprepare_decode_(model)
    decoder = Decoder(model, PASSES if passes is None else passes)
    model.__dict__["_deadband_decoder"] = decoder
    model.__class__ = _prepared_class(_original_class(type(model)))
    return model


def unprepare_decode_(model: Any) -> Any:
    """Undo `prepare_decode_`; does nothing to a model that is not prepared."""
    if model.__dict__.pop("_deadband_decoder", None) is not None:
        model.__class__ = _original_class(type(model))
    return model


def is_prepared(model: Any) -> bool:
    """Whether `model` decodes through a compiled graph as it is now."""
    decoder = model.__dict__.get("_deadband_decoder")
    return decoder is not None and decoder.run is not None and decoder.fits(model)


def _original_class(kind: type) -> type:
    return kind.__dict__.get("_deadband_original", kind)


@functools.cache
def _prepared_class(original: type) -> type:
    """A subclass whose forward tries the compiled graph first. A forward on the instance would be bound to the
    original in every copy of the model; the name is the same, as `save_pretrained` writes it to config.json."""

    @functools.wraps(original.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        decoder = self.__dict__.get("_deadband_decoder")  # none in what type(model).from_pretrained makes
        output = None if decoder is None else decoder(self, args, kwargs)
        return original.forward(self, *args, **kwargs) if output is None else output  # type: ignore[attr-defined]

    def reduce(self: Any, protocol: Any) -> Any:
        """Copies and pickles are of the model as it was: the graph holds this model's tensors."""
        state = {name: value for name, value in self.__dict__.items() if name != "_deadband_decoder"}
        return copyreg._reconstructor, (original, object, None), state  # type: ignore[attr-defined]

    body = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "_deadband_original": original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (original,), body)


class Decoder:
    """The compiled graph of a model's decoding, and when it may be taken.

    Attributes:
        run: the compiled function, or None where there is none.
        seconds: what capturing and compiling took.
    """

    def __init__(self, model: Any, passes: Sequence[GraphPass]) -> None:
        self.run: Callable[..., Any] | None = None
        self.seconds = 0.0
        self.warned = False
        start = time.perf_counter()
        try:
            self._compile(model, passes)
        except Exception as error:  # the compiler, torch.export and any model's code may raise anything
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"
            if "CppCompileError" in reason and any(" " in folder for folder in _compiler_folders()):
                reason += " (torch's compiler does not work in folders with a space in their name: "
                reason += "move the environment, or set TORCHINDUCTOR_CACHE_DIR)"
            self._warn(f"this model decodes without a compiled graph: {reason}")
            self.run = None
        self.seconds = time.perf_counter() - start

    def _warn(self, message: str) -> None:
        if not self.warned:
            warnings.warn(message, DecodeWarning, stacklevel=4)
        self.warned = True

    def _compile(self, model: Any, passes: Sequence[GraphPass]) -> None:
        from transformers import DynamicCache

        devices = {parameter.device.type for parameter in model.parameters()}
        if devices != {"cpu"}:
            raise ValueError(f"the model has to be on the CPU, and is on {', '.join(sorted(devices))}")
        prompt = torch.arange(BLOCK // 2).view(1, -1) % model.config.get_text_config().vocab_size
        with evaluating(model):
            output = model(prompt, use_cache=True)
        cache = output.past_key_values
        if type(cache) is not DynamicCache or any(type(layer) not in layer_classes() for layer in cache.layers):
            raise ValueError(f"its cache is a {type(cache).__name__} with layers that are not known here")
        self.layers = [type(layer) for layer in cache.layers]
        self.output_class = type(output)
        windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
        self.states = [_state_of(layer) for layer in cache.layers]
        store = attach(cache)
        with evaluating(model):
            program = capture(model, store, windows)
        tensors = {f"model.{name}": each for name, each in _tensors(model).items()}
        weights = []
        for spec in program.graph_signature.input_specs:
            if spec.kind != torch.export.graph_signature.InputKind.USER_INPUT:
                known = tensors.get(str(spec.target))
                weights.append(program.constants[str(spec.target)] if known is None else known)
        self.weights = weights
        self.state = _state(model)
        self.sites = [site.__dict__ for site in sparse_sites(model).values()]
        self.rows = self.current_rows()
        run = compile_graph(program, passes)
        self._check(model, run, cache, store)
        self.run = run

    def _check(self, model: Any, run: Any, cache: Any, store: Store) -> None:
        """Compare with the model itself, once: it may have parts that work in a way that is not known here.

        Nothing is skipped meanwhile. At its thresholds a bfloat16 model amplifies rounding, as entries change sides: on
        random weights of 1 B parameters at 0.5, logits differ by 0.45 between two of transformers' own caches. With
        all entries kept they differ by 0.02, as these do from the model's, and in float32 with skipping by 5e-7.
        """
        token = torch.ones(1, 1, dtype=torch.int64)
        with evaluating(model), _nothing_skipped(model):
            compiled = self._logits(run, store, token).float()
            expected = model(token, past_key_values=cache, use_cache=True).logits.float()
        error = float((compiled - expected).norm() / expected.norm())
        limit = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
        if not error <= limit:
            raise RuntimeError(f"its logits differ by {error:.2g} from those of the model")

    def _logits(self, run: Any, store: Store, token: Tensor) -> Tensor:
        length = store.length
        store.reserve(length + 1)
        if length >= len(_positions):
            _extend_positions(length)
        blocks = max(length // BLOCK + 1, 2)
        (logits,) = run(*self.weights, token, _positions[length : length + 1], _blocks[:blocks], *store.inputs)
        return logits

    def current_rows(self) -> list[int]:
        """Up to how many rows each sparse layer skips now."""
        return [site.get("sparse_rows", -1) for site in self.sites]

    def fits(self, model: Any) -> bool:
        """Whether the model is still what was compiled."""
        return self.run is not None and _state(model) == self.state

    def __call__(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The model's output for one token, or None where the graph is not for such a call."""
        if self.run is None or model.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        cache = kwargs.get("past_key_values")
        token = args[0] if len(args) == 1 else kwargs.get("input_ids")
        if cache is None or token is None or len(args) > 1 or token.shape != (1, 1) or token.dtype is not torch.int64:
            return None
        if not getattr(cache, "layers", None):
            return None
        store = cache.layers[0].__dict__.get("store")
        if store is None or not store.intact or store.owner is not self:
            if not self._can_attach(model, cache):
                return None
            store = attach(cache, self)
        for name, value in kwargs.items():
            if value is None or name in _PLAIN:
                continue
            if name == "attention_mask":
                if not isinstance(value, Tensor) or value.shape != (1, store.length + 1) or not value.all():
                    return None
            elif name == "position_ids":
                if value.shape[-2:] != (1, 1) or value.numel() != 1 or value.item() != store.length:
                    return None
            elif name in _TRUE:
                if value is not True:
                    return None
            else:
                return None
        if self.current_rows() != self.rows:  # inside `dense` or `sparse_prefill`
            return None
        logits = self._logits(self.run, store, token)
        store.length += 1
        return self.output_class(logits=logits, past_key_values=cache)

    def _can_attach(self, model: Any, cache: Any) -> bool:
        """Checked once for each sequence: all that is too slow to look at for each token."""
        from transformers import DynamicCache

        if type(cache) is not DynamicCache or len(cache.layers) != len(self.layers) or cache.offloading:
            return False
        layer: Any
        twins = layer_classes()
        for layer, expected in zip(cache.layers, self.layers, strict=True):
            if type(layer) not in (expected, twins[expected]) or not layer.is_initialized or layer.keys is None:
                return False
            if layer.keys.shape[0] != 1 or getattr(layer, "record_past", False):
                return False
        if [_state_of(layer) for layer in cache.layers] != self.states:
            return False
        config = model.config
        if getattr(config, "output_attentions", False) or getattr(config, "output_hidden_states", False):
            return False
        if not self.fits(model):
            self._warn("the model changed since prepare_decode_ and decodes without its graph; prepare it again")
            return False
        return True


def _compiler_folders() -> tuple[str, str]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return torch.__path__[0], cache_dir()


_PLAIN = ("input_ids", "past_key_values", "cache_position", "logits_to_keep")  # nothing that changes one token's output
_TRUE = ("use_cache", "return_dict")
_positions = torch.arange(1024)
_blocks = torch.empty(1024 // BLOCK + 2)


def _extend_positions(length: int) -> None:
    global _positions, _blocks
    _positions = torch.arange(2 * length)
    _blocks = torch.empty(2 * length // BLOCK + 2)


def _state_of(layer: Any) -> tuple[Any, ...]:
    return layer.keys.dtype, layer.keys.shape[1], layer.keys.shape[3]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _state(model: nn.Module) -> list[Any]:
    """All that the graph depends on: tensors by identity, place and layout, classes, settings, and hooks."""
    state: list[Any] = []
    for module in model.modules():
        state.append((id(module), len(module._forward_hooks), len(module._forward_pre_hooks)))
        if isinstance(module, SparseSite):
            state.append((type(module), module.relative))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                state.append((id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()))
    return state


@contextlib.contextmanager
def _nothing_skipped(model: nn.Module) -> Iterator[None]:
    """Thresholds below zero, which keep every entry, and counters as they were afterwards."""
    sites = sparse_sites(model).values()
    buffers = [buffer for site in sites for buffer in (site.threshold, site.counts) if buffer is not None]
    before = [buffer.clone() for buffer in buffers]
    try:
        for site in sites:
            site.threshold.fill_(-1)
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
