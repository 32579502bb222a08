"""prepare_decode_: decoding one token costs little more than its linear layers.

What a token costs beside its linear layers (norms, rotary embedding, attention, cache, and above all Python and the
dispatcher, once for each of some 700 operators) is captured once as one graph (`torch.export`), with the weights, the
cache and the position as inputs, and compiled (torch's inductor). The model's forward takes that graph when it is
called on one new token of one sequence, and itself for everything else: prefill, batches, padding, training.

The cache stays transformers' own `DynamicCache`: its layers keep their keys and values in a `Store` with room to grow
while the compiled graph writes there, and turn into plain ones as soon as anything else writes to them. So `generate`,
`crop`, a chat that continues and a second forward by hand all work, and nothing has a maximal length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deadband.breakeven import tune_
from deadband.fusion import fuse_gated_mlps, fuse_linears, pack_layers, supply
from deadband.linear import SparseSite
from deadband.ops import COUNTS, quantized_linear, sparse_linear
from deadband.running import evaluating
from deadband.sparsify import sparse_sites

BLOCK = 64
"""Attention looks at a whole number of so many tokens, the last of them masked: tails of vectors cost more. Two blocks
at least, as torch.export takes a size of 1 for a constant."""
GraphPass = Callable[[torch.fx.GraphModule], None]

OPTIONS: dict[str, Any] = {
    # Kernels between the linear layers work on a few kilobytes: waking other threads costs more than they save.
    "cpp.threads": 1,
    # What graph and inputs are is known here; each check costs 0.2 us, and there are a thousand inputs.
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
}
"""Settings of inductor."""


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
        return _new, (original,), state

    body = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "_deadband_original": original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (original,), body)


def _new(kind: Any) -> Any:
    return kind.__new__(kind)


# ---------------------------------------------------------------------------------------------------------- the cache


class Store:
    """Keys and values of all layers of one sequence, with room to grow: what the compiled graph reads and writes.

    Keys lie as [1, heads, head_dim, capacity], so that the scores of many tokens are computed side by side.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], length: int) -> None:
        self.length = length
        self.capacity = 0
        self.owner: Any = None  # the decoder that reads and writes here
        self.intact = True  # whether every layer of the cache still has its keys and values here
        self.keys, self.values = keys, values
        self.inputs: list[Tensor] = []
        self.reserve(length + BLOCK)

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in all."""
        if length <= self.capacity:
            return
        capacity = max(2 * BLOCK, 1 << (length - 1).bit_length())
        self.keys = [_grown(each, 3, capacity) for each in self.keys]
        self.values = [_grown(each, 2, capacity) for each in self.values]
        self.inputs = [*self.keys, *self.values]
        self.capacity = capacity


def _grown(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    grown = tensor.new_zeros(shape)  # zeros, as what is masked is still multiplied by a weight of zero
    grown.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return grown


def _window(layer: Any) -> int:
    """How many of the last tokens the plain layer would hold."""
    length = layer.__dict__["store"].length
    return min(length, layer.sliding_window - 1) if layer.is_sliding else length


def _keys(layer: Any) -> Tensor:
    store, window = layer.__dict__["store"], _window(layer)
    return store.keys[layer.__dict__["index"]].narrow(3, store.length - window, window).transpose(2, 3)


def _values(layer: Any) -> Tensor:
    store, window = layer.__dict__["store"], _window(layer)
    return store.values[layer.__dict__["index"]].narrow(2, store.length - window, window)


def _length(layer: Any) -> int:
    return layer.__dict__["store"].length


def _states(layer: Any) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in _STATES[: 3 if layer.is_sliding else 2]}


def _reduce_layer(layer: Any, protocol: Any) -> Any:
    """Copies and pickles are plain layers with states of their own."""
    state = {name: value for name, value in layer.__dict__.items() if name not in ("store", "index")}
    state |= {name: value.clone() if isinstance(value, Tensor) else value for name, value in _states(layer).items()}
    return _new, (type(layer).__base__,), state


def _detach(layer: Any) -> None:
    """Make the plain layer of a stored one again, with the same states."""
    state = _states(layer)
    layer.__dict__.pop("store").intact = False
    del layer.__dict__["index"]
    layer.__class__ = type(layer).__base__
    layer.__dict__.update(state)


def _stored(name: str, view: Callable[[Any], Any]) -> property:
    """An attribute that lies in the Store, until it is assigned to: then the layer is a plain one again."""

    def assign(layer: Any, value: Any) -> None:
        _detach(layer)
        setattr(layer, name, value)

    return property(view, assign)


_STATES = ("keys", "values", "cumulative_length")


@functools.cache
def _layer_classes() -> dict[type, type]:
    """transformers' cache layers that can keep their states in a Store, and their twins that do."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    body = {
        "keys": _stored("keys", _keys),
        "values": _stored("values", _values),
        "__reduce_ex__": _reduce_layer,
    }
    sliding = {**body, "cumulative_length": _stored("cumulative_length", _length)}
    return {
        DynamicLayer: type("StoredLayer", (DynamicLayer,), body),
        DynamicSlidingWindowLayer: type("StoredSlidingWindowLayer", (DynamicSlidingWindowLayer,), sliding),
    }


def _attach(cache: Any, owner: Any = None) -> Store:
    """Move the states of a DynamicCache into a new Store, in place."""
    length = cache.get_seq_length()
    keys, values = [], []
    for layer in cache.layers:
        if "store" in layer.__dict__:
            _detach(layer)
        key, value = layer.keys, layer.values
        missing = length - key.shape[2]  # what a sliding window has forgotten; masked in every case
        keys.append(nn.functional.pad(key.transpose(2, 3), (missing, 0)))
        values.append(nn.functional.pad(value, (0, 0, missing, 0)))
    store = Store(keys, values, length)
    store.owner = owner
    twins = _layer_classes()
    for index, layer in enumerate(cache.layers):
        for name in _STATES:
            layer.__dict__.pop(name, None)
        layer.__dict__.update(store=store, index=index)
        layer.__class__ = twins[type(layer)]
    return store


# ---------------------------------------------------------------------------------------------------------- the graph


def _realize(tensor: Tensor) -> Tensor:
    """The same tensor; to inductor, one that is computed once and kept, and not again in each kernel that reads it."""
    import torch._inductor.inductor_prims  # registers the operator

    tensor = tensor.contiguous()
    return torch.ops.prims.inductor_force_stride_order(tensor, tensor.stride())


@dataclasses.dataclass
class _TracedLayer:
    """What a layer's attention has to know while the graph is captured."""

    keys: Tensor
    values: Tensor
    mask: Tensor


_traced: list[_TracedLayer] = []  # the layers of the model being captured


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: Any = None,
    is_causal: Any = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one token in plain operations, which inductor turns into a loop without any repacking of the cache.

    torch's scaled_dot_product_attention would need the cache's heads repeated (2 ms a token on SmolLM2).
    """
    unknown = [name for name, each in others.items() if isinstance(each, Tensor) and name not in _HARMLESS]
    if unknown:
        raise NotImplementedError(f"{type(module).__name__} passes {unknown[0]} to its attention")
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    scaling = size**-0.5 if scaling is None else scaling
    query = _realize(query.reshape(batch, groups, heads // groups, size, 1).float() * scaling)
    scores = (query * key.transpose(2, 3).unsqueeze(2).float()).sum(3)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores + _traced[module.layer_idx].mask, -1)
    mixed = (weights.unsqueeze(-1) * value.unsqueeze(2).float()).sum(3)
    return mixed.to(query.dtype if query.dtype == value.dtype else value.dtype).reshape(batch, 1, heads, -1), None


_HARMLESS = ("position_ids", "cache_position", "cos", "sin", "position_embeddings")
_ATTENTION = "deadband_decode"


def _traced_cache(keys: list[Tensor], values: list[Tensor], position: Tensor, tokens: Any, windows: list[Any]) -> Any:
    """A transformers cache over a Store's tensors, for one step at `position`, of which `tokens` are looked at."""
    from transformers.cache_utils import Cache, DynamicLayer

    class Traced(DynamicLayer):
        keys: Any
        values: Any

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.keys.index_copy_(3, position, key_states.transpose(2, 3))
            self.values.index_copy_(2, position, value_states)
            return self.keys[..., :tokens].transpose(2, 3), self.values[:, :, :tokens]

        def get_seq_length(self) -> Any:
            return position[0]

    seen = torch.arange(tokens, device=position.device)
    masks: dict[Any, Tensor] = {}
    layers: list[Any] = []
    _traced.clear()
    for key, value, window in zip(keys, values, windows, strict=True):
        if window not in masks:
            kept = seen <= position if window is None else (seen <= position) & (seen > position - window)
            masks[window] = _realize(torch.where(kept, 0.0, -torch.inf))
        layer = Traced()
        layer.keys, layer.values, layer.is_initialized = key, value, True
        layers.append(layer)
        _traced.append(_TracedLayer(key, value, masks[window]))
    return Cache(layers=layers)


class _Step(nn.Module):
    """One token through the model, as a function of tensors alone."""

    def __init__(self, model: nn.Module, windows: list[Any]) -> None:
        super().__init__()
        self.model = model
        self.windows = windows

    def forward(
        self, token: Tensor, position: Tensor, blocks: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """The logits, [1, 1, vocabulary]; `blocks` only says by its size how many blocks of tokens to look at."""
        cache = _traced_cache(keys, values, position, blocks.shape[0] * BLOCK, self.windows)
        output = self.model(token, position_ids=position.unsqueeze(0), past_key_values=cache, use_cache=True)
        return output.logits


def realize_shared(graph: torch.fx.GraphModule) -> None:
    """Compute what many layers read (the rotary tables) once, and not again in each layer's kernels."""
    for node in list(graph.graph.nodes):
        value = node.meta.get("val")
        if node.op == "call_function" and len(node.users) > 8 and isinstance(value, Tensor) and value.is_contiguous():
            with graph.graph.inserting_after(node):
                kept = graph.graph.call_function(
                    torch.ops.prims.inductor_force_stride_order.default, (node, list(value.stride()))
                )
            kept.meta = dict(node.meta)
            node.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)


def give_counts(graph: torch.fx.GraphModule) -> None:
    """Give operators without counters some that nobody reads: inductor cannot leave out what an operator writes to."""
    uncounted = [
        node
        for node in graph.graph.nodes
        if node.target in (sparse_linear, quantized_linear) and len(node.args) == _ARGUMENTS[node.target]
        if node.args[-1] is None
    ]
    if not uncounted:
        return
    with graph.graph.inserting_before(uncounted[0]):
        counts = graph.graph.call_function(torch.ops.aten.zeros.default, ([COUNTS],), {"dtype": torch.int64})
    with next(node.meta["val"] for node in uncounted).fake_mode:
        counts.meta["val"] = torch.zeros(COUNTS, dtype=torch.int64)
    for node in uncounted:
        node.args = (*node.args[:-1], counts)


_ARGUMENTS = {each: len(each._schema.arguments) for each in (sparse_linear, quantized_linear)}
PASSES: tuple[GraphPass, ...] = (give_counts, fuse_gated_mlps, fuse_linears, realize_shared, pack_layers)
"""What is done to the graph before inductor compiles it, in this order. A pass changes, in place, a graph of ATen
operators with the weights as inputs: deadband::sparse_linear and aten.linear, with whatever lies between them."""


@contextlib.contextmanager
def _own_attention(model: nn.Module) -> Iterator[None]:
    """The model's attention is `_attend` inside the block; transformers makes no masks for it, as it knows none."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend)
    every = (getattr(module, "config", None) for module in model.modules())
    configs: dict[int, Any] = {id(config): config for config in every if config is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for key in before:
            configs[key]._attn_implementation = _ATTENTION
        yield
    finally:
        for key, name in before.items():
            configs[key]._attn_implementation = name
        _traced.clear()


def capture(model: Any, store: Store, windows: list[Any]) -> torch.export.ExportedProgram:
    """The graph of one decoded token: inputs are the weights, the token, its position and the tensors of `store`."""
    dynamic = torch.export.Dim.DYNAMIC
    arguments = (torch.zeros(1, 1, dtype=torch.int64), torch.tensor([BLOCK + 7]), torch.empty(3))
    keys, values = ([_grown(each, dim, 5 * BLOCK) for each in tensors]
                    for tensors, dim in ((store.keys, 3), (store.values, 2)))  # fmt: skip
    with torch.no_grad(), _own_attention(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(
            _Step(model, windows),
            (*arguments, keys, values),
            dynamic_shapes=(None, None, {0: dynamic}, [{3: dynamic} for _ in keys], [{2: dynamic} for _ in values]),
            strict=False,
        )


def compile_graph(program: torch.export.ExportedProgram, passes: Sequence[GraphPass]) -> Callable[..., Any]:
    """A function of the program's flat inputs, weights first; its outputs in a tuple."""
    import torch._inductor
    import torch._inductor.config as settings

    graph = program.graph_module
    for each in passes:
        each(graph)
    graph.graph.lint()
    graph.recompile()
    examples = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    with torch.no_grad(), settings.patch(OPTIONS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return supply(graph, torch._inductor.standalone_compile(graph, examples, dynamic_shapes="from_graph"))


# -------------------------------------------------------------------------------------------------------- the decoder


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
        if type(cache) is not DynamicCache or any(type(layer) not in _layer_classes() for layer in cache.layers):
            raise ValueError(f"its cache is a {type(cache).__name__} with layers that are not known here")
        self.layers = [type(layer) for layer in cache.layers]
        self.output_class = type(output)
        windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
        self.states = [_state_of(layer) for layer in cache.layers]
        store = _attach(cache)
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
            store = _attach(cache, self)
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
        twins = _layer_classes()
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
