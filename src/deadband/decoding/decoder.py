"""prepare_decode_: decoding one token costs little more than its linear layers.

What a token costs beside its linear layers (norms, rotary embedding, attention, cache, and above all Python and the
dispatcher, once for each of some 700 operators) is captured once as one graph (`torch.export`), with the weights, the
cache and the position as inputs, and compiled (torch's inductor). The model's forward takes that graph when it is
called on one new token of one sequence, and itself for everything else: prefill, batches, padding, training. A second
graph, made on request, takes a few new tokens of one sequence at once, as speculative decoding has them verified.

The cache stays transformers' own `DynamicCache` (`deadband.decoding.cache`). So `generate`, `crop`, a chat that
continues and a second forward by hand all work, and nothing has a maximal length. The graph is made in
`deadband.decoding.graph`.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import dataclasses
import functools
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deadband.decoding.breakeven import tune_
from deadband.decoding.cache import BLOCK, Shelf, Store, attach, layer_classes
from deadband.decoding.check import Template, check_step, compare, filled_cache, tokens_of
from deadband.decoding.cuda_graph import GraphedStep, cuda_capture
from deadband.decoding.graph import PASSES, GraphPass, NotCapturedError, capture, compile_graph
from deadband.decoding.state import KeptState, changed, hooked, state_of
from deadband.layers.scope import in_scope
from deadband.layers.sites import sparse_sites
from deadband.ops.cpu import SPARSE_ROWS
from deadband.running.forward import cache_argument, cache_of, evaluating


class DecodeWarning(UserWarning):
    """A prepared model decodes as slowly as one that is not."""


@dataclasses.dataclass(frozen=True)
class DecodeReport:
    """How a prepared model decoded: one new token a step, after what its cache holds.

    Attributes:
        graph: steps by the compiled graph.
        model: steps by the model's own forward, by the reason why.
        problem: why there is no graph, or None where there is one.
        seconds: what capturing and compiling took.
    """

    graph: int
    model: dict[str, int]
    problem: str | None
    seconds: float

    def __str__(self) -> str:
        lines = [f"{self.graph:,} tokens decoded by the compiled graph, {sum(self.model.values()):,} without it"]
        lines += [f"{count:,} without: {reason}" for reason, count in self.model.items()]
        if self.problem and self.problem not in self.model:
            lines.append(f"there is no graph: {self.problem}")
        return "\n".join(lines)


def prepare_decode_(
    model: Any, *, tokens: int = 1, tune: bool = False, passes: Sequence[GraphPass] | None = None
) -> Any:
    """Compile what `model` does to decode one token, in place; about a minute the first time, less from torch's cache.

    From then on `model.generate(...)` and `model(token, past_key_values=cache)` take the compiled graph for one token
    of one sequence without padding, outside of training and with gradients off (`torch.no_grad`). All else runs as
    before: prompts, batches, padding, beams, attentions or hidden states asked for, models with hooks. The first time
    that a token is decoded without the graph for a reason, a `DecodeWarning` tells it, and `decode_report` counts all.

    The graph has the model's layers as they are now, sparse or dense. Writing to weights is seen; `sparsify_` and
    `densify_` undo `prepare_decode_`; after `.to(dtype)` or other changes of tensors a new sequence decodes without the
    graph, and says so, until the model is prepared again. Copies of the model and what `save_pretrained` writes are not
    prepared.

    Where compiling fails (no C++ compiler, a model that cannot be captured, logits that are not the model's), a
    `DecodeWarning` says why, and the model decodes as it did.

    Args:
        model: a causal language model of transformers, on the CPU or one GPU, or a module around one (a PeftModel, what
            `torch.compile` returned): then the one inside is prepared.
        tokens: with more than 1 a second graph is made, for 2 to so many tokens at once (8 at most) that continue one
            sequence: what `generate` has a model verify with `assistant_model` or `prompt_lookup_num_tokens`. All of
            them skip as they do without a graph, up to each layer's `sparse_rows`.
        tune: first let layers skip only where that is faster (`deadband.breakeven.tune_`): measured the first time,
            some seconds for each kind of layer, and remembered. What is computed then depends on the machine.
        passes: what to do to the graph of ATen operators before it is compiled; the default is `PASSES`.

    Returns:
        The model, for chaining.

    Raises:
        ValueError: not a causal language model of transformers, inside of a block of `dense` or `sparse_prefill`, or
            another number of `tokens`.

    Example:
        >>> prepare_decode_(nn.Linear(2, 2))
        Traceback (most recent call last):
        ValueError: Linear is not a causal language model of transformers: it has no generate
    """
    inner = _causal_model(model)
    if in_scope(sparse_sites(inner).values()):
        raise ValueError("prepare_decode_ inside of deadband.dense or sparse_prefill: prepare the model outside of it")
    if not 1 <= tokens <= SPARSE_ROWS:
        raise ValueError(f"tokens is {tokens}, expected 1 to {SPARSE_ROWS}")
    if tune:
        tune_(inner)
    existing = inner.__dict__.get("_deadband_decoder")
    if existing is not None and existing.fits(inner) and existing.made_for(tokens):
        return model
    unprepare_decode_(inner)
    decoder = Decoder(inner, PASSES if passes is None else passes, tokens)
    inner.__dict__["_deadband_decoder"] = decoder
    inner.__class__ = _prepared_class(_original_class(type(inner)))
    return model


def unprepare_decode_(model: Any) -> Any:
    """Undo `prepare_decode_`; does nothing to a model that is not prepared."""
    for module in model.modules():
        if module.__dict__.pop("_deadband_decoder", None) is not None:
            module.__class__ = _original_class(type(module))
    return model


def is_prepared(model: Any) -> bool:
    """Whether `model`, or the one inside of it, decodes through a compiled graph as it is now."""
    decoder, inner = _decoder_of(model)
    return decoder is not None and decoder.run is not None and decoder.fits(inner)


def decode_report(model: Any, *, reset: bool = False) -> DecodeReport:
    """How many tokens a prepared model decoded by its compiled graph, and how many without and why.

    Args:
        model: a model after `prepare_decode_`.
        reset: start counting again after reading.

    Raises:
        ValueError: the model is not prepared.

    Example:
        >>> decode_report(nn.Linear(2, 2))
        Traceback (most recent call last):
        ValueError: this Linear is not prepared; prepare it with deadband.prepare_decode_
    """
    decoder, _ = _decoder_of(model)
    if decoder is None:
        raise ValueError(f"this {type(model).__name__} is not prepared; prepare it with deadband.prepare_decode_")
    report = DecodeReport(decoder.steps, dict(decoder.reasons), decoder.problem, decoder.seconds)
    if reset:
        decoder.steps = 0
        decoder.reasons.clear()
    return report


def _decoder_of(model: Any) -> tuple[Decoder | None, Any]:
    for module in model.modules():
        decoder = module.__dict__.get("_deadband_decoder")
        if decoder is not None:
            return decoder, module
    return None, None


def _causal_model(model: Any) -> Any:
    """The model itself, or the outermost one inside of it that generates."""
    from transformers import GenerationMixin, PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and isinstance(module, GenerationMixin):
            return module
    raise ValueError(f"{type(model).__name__} is not a causal language model of transformers: it has no generate")


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

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        decoder = self.__dict__.get("_deadband_decoder")
        if decoder is not None and "forward" in self.__dict__:  # in the place of the one above
            decoder.bypassed(self, args, kwargs)
        return original.__call__(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        """Copies and pickles are of the model as it was: the graph holds this model's tensors."""
        state = {name: value for name, value in self.__dict__.items() if name != "_deadband_decoder"}
        return copyreg._reconstructor, (original, object, None), state  # type: ignore[attr-defined]

    body = {
        "forward": forward,
        "__call__": call,
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
        run: the compiled function of one token, or None where there is none, because of `problem`; `run_few` is that
            of 2 to `tokens` of them.
        steps: tokens that they decoded; `reasons` counts those that they did not.
        seconds: what capturing and compiling took.
    """

    def __init__(self, model: Any, passes: Sequence[GraphPass], tokens: int = 1) -> None:
        from transformers import Cache

        self.tokens = tokens
        self.run: Callable[..., Any] | None = None
        self.run_few: Callable[..., Any] | None = None
        self.problem: str | None = None
        self.steps = 0
        self.reasons: Counter[str] = Counter()
        self.told: set[str] = set()
        self.refused: tuple[Any, int, str] | None = None
        self.cache_class = Cache
        start = time.perf_counter()
        try:
            self._compile(model, passes)
        except Exception as error:  # the compiler, torch.export and any model's code may raise anything
            self.run = None
            self.problem = _in_words(error)
            self._tell(self.problem, "this model decodes without a compiled graph")
        self.seconds = time.perf_counter() - start

    def _tell(self, reason: str, what: str = "this prepared model decodes without its graph") -> None:
        if reason not in self.told:
            self.told.add(reason)
            warnings.warn(f"{what}: {reason}", DecodeWarning, stacklevel=4)

    def _compile(self, model: Any, passes: Sequence[GraphPass]) -> None:
        with _counts_kept(model):
            self._capture_and_check(model, passes)

    def _capture_and_check(self, model: Any, passes: Sequence[GraphPass]) -> None:
        from transformers import DynamicCache, GenerationConfig

        devices = {str(parameter.device) for parameter in model.parameters()}
        self.device = model.device
        if len(devices) != 1 or self.device.type not in ("cpu", "cuda"):
            where = ", ".join(sorted(devices))
            raise NotCapturedError(f"the model has to be on the CPU or on one GPU, and is on {where}")
        if (name := hooked(model)) is not None:
            raise NotCapturedError(_HOOKED.format(name))
        if "forward" in model.__dict__:
            raise NotCapturedError(_BYPASSED)
        config = model.config.get_text_config()
        prompt = torch.arange(BLOCK // 2, device=self.device).view(1, -1) % config.vocab_size
        argument = cache_argument(model)
        with evaluating(model):
            with contextlib.suppress(Exception):  # it may leave state behind that a forward by hand does not
                model.generate(prompt, GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0))
            self.kept = KeptState(
                model,
                lambda: model(prompt, use_cache=True),
                lambda output: model(prompt[:, :1], use_cache=True, **{argument: copy.deepcopy(cache_of(output))}),
            )
            output = self.kept.output
            cache = cache_of(output)
            if type(cache) is not DynamicCache or any(type(layer) not in layer_classes() for layer in cache.layers):
                kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())})
                raise NotCapturedError(f"its cache is a {type(cache).__name__} of {', '.join(kinds)}, not known here")
            if self.kept.advanced:
                raise NotCapturedError(f"it keeps state outside of its cache, in {self.kept.advanced[0]}")
            self.output_class = type(output)
            self.output_field = next(name for name, value in output.items() if value is cache)
            layers: list[Any] = cache.layers
            self.layers = [type(layer) for layer in layers]
            self.states = [_state_of(layer) for layer in layers]
            template: Template = [(layer.keys, layer.values) for layer in layers]
            self.state = state_of(model)
            self.sites = list(sparse_sites(model).values())
            self.rows = self.current_rows()
            self.positions, self.blocks = _lengths(1024, self.device)
            self.shelf = Shelf(len(layers)) if _has_graphs(self.device) else None
            self.run = self._compile_for(1, model, cache, template, passes)
            if self.tokens > 1:
                self.run_few = self._compile_for(self.tokens, model, cache, template, passes)
        self.hooks = RemovableHandle.next_id

    def _compile_for(
        self, rows: int, model: Any, cache: Any, template: Template, passes: Sequence[GraphPass]
    ) -> Callable[..., Any]:
        """The compiled function of one token, or of 2 to `rows`."""
        check_step(model, template, rows)
        program = capture(model, attach(copy.deepcopy(cache)), rows)
        tensors = {f"model.{name}": each for name, each in _tensors(model).items()}
        weights = []
        for spec in program.graph_signature.input_specs:
            if spec.kind != torch.export.graph_signature.InputKind.USER_INPUT:
                known = tensors.get(str(spec.target))
                weights.append(program.constants[str(spec.target)] if known is None else known)
        compiled = compile_graph(program, passes)

        def run(*inputs: Any) -> Any:
            return compiled(*weights, *inputs)

        if _has_graphs(self.device):
            run = GraphedStep(run, functools.partial(cuda_capture, device=self.device))
        config = model.config.get_text_config()
        for count in {min(rows, 2), rows}:
            token = tokens_of(config, count, self.device)
            compare(model, config, template, model.dtype, lambda store: self._logits(run, store, token), count)  # noqa: B023
            if isinstance(run, GraphedStep):
                stores = [
                    attach(filled_cache(config, template, BLOCK, model.dtype), shelf=self.shelf) for _ in range(2)
                ]
                self._check_replay(run, stores, token, (token + 1) % config.vocab_size)
        return run

    def _check_replay(self, run: GraphedStep, stores: Sequence[Store], token: Tensor, other: Tensor) -> None:
        """A NotCapturedError unless a graph, captured of a token, gives for another one what a step without it gives.

        The two stores hold the same.
        """
        captured = [self._logits(run, stores[0], token) for _ in range(2)][-1]  # by the second call
        replayed, plain = (self._logits(run, store, other).float() for store in stores)
        if run.problem is not None:
            raise NotCapturedError(f"no CUDA graph can be captured of it ({run.problem})")
        error = float((replayed - plain).norm() / plain.norm())
        if not error <= _REPLAYED or torch.equal(captured.float(), plain):
            raise NotCapturedError(f"its logits from a CUDA graph differ by {error:.2g} from those without one")

    def _logits(self, run: Any, store: Store, token: Tensor) -> Tensor:
        length = store.length
        end = length + token.shape[1]
        store.reserve(end)
        if end > len(self.positions):
            self.positions, self.blocks = _lengths(2 * end, self.device)
        # a CUDA graph is of one shape: it looks at all that there is room for
        room = end if store.shelf is None else store.capacity
        blocks = max((room - 1) // BLOCK + 1, 2)
        (logits,) = run(token, self.positions[length:end], self.blocks[:blocks], *store.inputs)
        return logits

    def current_rows(self) -> list[int]:
        """Up to how many rows each sparse layer skips now."""
        return [site.__dict__.get("sparse_rows", -1) for site in self.sites]

    def made_for(self, tokens: int) -> bool:
        """Whether it takes up to so many tokens at once, and its layers skip for as many rows as then."""
        return self.tokens == tokens and self.rows == self.current_rows()

    def fits(self, model: Any) -> bool:
        """Whether the model is still what was compiled."""
        return self.run is not None and state_of(model) == self.state

    def __call__(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The model's output for one token or a few, or None where the graphs are not for such a call."""
        found = self._step(model, args, kwargs)
        if found is None:
            return None
        token, cache = found
        reason = self._why_not(model, token, cache, args, kwargs)
        if reason is not None:
            self._count(reason)
            return None
        store = cache.layers[0].__dict__["store"]
        count = token.shape[1]
        if count == 1:
            logits = self._logits(self.run, store, token)
        else:
            logits = self._logits(self.run_few, store, token)[:, -(kwargs.get("logits_to_keep") or 0) :]
        store.length += count
        self.steps += count
        return self.output_class(logits=logits, **{self.output_field: cache})

    def bypassed(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Count a step of a model whose instance has a forward of its own, which does not come here."""
        if self._step(model, args, kwargs) is not None:
            self._count(_BYPASSED)

    def _count(self, reason: str) -> None:
        self.reasons[reason] += 1
        if reason != self.problem and reason != _WITHIN:
            self._tell(reason)

    def _step(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """The new tokens, one for each sequence, and the cache with those before; None if this is no such call."""
        cache_class = self.cache_class
        # by class, as transformers gives the argument other names
        cache = next((value for value in kwargs.values() if isinstance(value, cache_class)), None)
        if cache is None:
            cache = next((value for value in args if isinstance(value, cache_class)), None)
        if cache is None or torch.compiler.is_compiling():
            return None
        token = args[0] if args else kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if token is None else token
        if not isinstance(given, Tensor) or given.dim() < 2 or not 1 <= given.shape[1] <= self.tokens:
            return None
        store = cache.layers[0].__dict__.get("store") if getattr(cache, "layers", None) else None
        if not (store.length if store is not None and store.intact else cache.get_seq_length()):
            return None
        return token, cache

    def _why_not(self, model: Any, token: Any, cache: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
        """Why the graph is not for this step, or None; the cache has a Store then."""
        return (
            self._why_not_in_this_mode(model)
            or _why_not_this_token(token, args)
            or self._why_not_these_layers(model)
            or self._why_no_store(model, cache)
            or _why_not_these_arguments(kwargs, token, cache)
        )

    def _why_not_in_this_mode(self, model: Any) -> str | None:
        if self.run is None:
            return self.problem
        if model.training:
            return "the model is in training mode (call model.eval())"
        if torch.is_grad_enabled():
            return "gradients are on (decode under torch.no_grad())"
        return None

    def _why_not_these_layers(self, model: Any) -> str | None:
        if in_scope(self.sites) or self.current_rows() != self.rows:
            return _WITHIN
        if RemovableHandle.next_id != self.hooks:  # since the last look, hooks were put somewhere
            if (name := hooked(model)) is not None:
                return _HOOKED.format(name)
            self.hooks = RemovableHandle.next_id
        return None

    def _why_no_store(self, model: Any, cache: Any) -> str | None:
        """None once the cache has a Store of this decoder."""
        store = cache.layers[0].__dict__.get("store")
        if store is not None and store.intact and store.owner is self:
            return None
        reason = self._why_not_attached(model, cache)
        if reason is None:
            attach(cache, self, self.shelf)
        return reason

    def _why_not_attached(self, model: Any, cache: Any) -> str | None:
        """Checked once for each sequence: all that is too slow to look at for each token."""
        if self.refused is not None and self.refused[0]() is cache and self.refused[1] == RemovableHandle.next_id:
            return self.refused[2]
        reason = self._why_not_this_cache(cache)
        if reason is None:
            config = model.config
            if getattr(config, "output_attentions", False) or getattr(config, "output_hidden_states", False):
                reason = "its config asks for attentions or hidden states"
            elif (name := changed(self.state, state_of(model))) is not None:
                reason = f"the model changed since prepare_decode_ ({name}); prepare it again"
            elif (name := self.kept.other(model)) is not None:
                reason = f"{name} is not what it was when the graph was captured, after a prompt of text"
        if reason is not None:
            self.refused = weakref.ref(cache), RemovableHandle.next_id, reason
            return reason
        for site in self.sites:
            site.renew_offset_()  # the graph has its address, and would not see that the weight was written to
        return None

    def _why_not_this_cache(self, cache: Any) -> str | None:
        from transformers import DynamicCache

        if type(cache) is not DynamicCache or len(cache.layers) != len(self.layers):
            return f"its cache is a {type(cache).__name__}, not the DynamicCache that the model makes itself"
        if cache.offloading:
            return "its cache is offloaded"
        layer: Any
        twins = layer_classes()
        for layer, expected in zip(cache.layers, self.layers, strict=True):
            if type(layer) not in (expected, twins[expected]):
                return f"its cache has a {type(layer).__name__}, expected {expected.__name__}"
            if not layer.is_initialized or layer.keys is None:
                return "a layer of its cache is empty"
            if layer.keys.shape[0] != 1:
                return "there is more than one sequence"
            if getattr(layer, "record_past", False):
                return "its cache records its past"
        if [_state_of(layer) for layer in cache.layers] != self.states:
            return "its cache holds keys of another dtype or shape"
        return None


def _why_not_this_token(token: Any, args: tuple) -> str | None:
    if token is None:
        return "it is given inputs_embeds instead of token ids"
    if len(args) > 1:
        return "it is given more than the token ids by position"
    if token.shape[0] != 1 or token.dtype is not torch.int64:
        return "there is more than one sequence" if token.shape[0] > 1 else f"token ids are {token.dtype}"
    return None


def _why_not_these_arguments(kwargs: dict[str, Any], token: Any, cache: Any) -> str | None:
    """Looks at all but the token and the cache, which has a Store."""
    length, count = cache.layers[0].__dict__["store"].length, token.shape[1]
    for name, value in kwargs.items():
        if value is None or value is token or value is cache:
            continue
        if name == "attention_mask":
            if not isinstance(value, Tensor) or value.shape != (1, length + count) or not value.all():
                return "attention_mask has padding, or is not of the cache's length"
        elif name in _POSITIONS:
            expected = length if count == 1 else torch.arange(length, length + count, device=token.device)
            if not isinstance(value, Tensor) or not bool((value == expected).all()):
                return f"{name} are not the cache's length"
        elif name == "logits_to_keep":
            if count > 1 and type(value) is not int:
                return "logits_to_keep is not a number"
        elif name in _TRUE:
            if value is not True:
                return f"{name}={value!r}"
        elif value is not False or not name.startswith("output_"):
            return f"the argument {name!r} is not known to the graph"
    return None


_REPLAYED = 1e-5  # kernels of others may add up in any order
_WITHIN = "inside of deadband.dense or sparse_prefill"
_HOOKED = "{} has a hook, which a graph would not call"
_BYPASSED = "the model has a forward on the instance, in the place of its class's"


def _in_words(error: Exception) -> str:
    """What went wrong, on one line."""
    if isinstance(error, NotCapturedError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


_POSITIONS = ("position_ids", "cache_position")
_TRUE = ("use_cache", "return_dict")


@contextlib.contextmanager
def _counts_kept(model: nn.Module) -> Iterator[None]:
    """Counters of sparse layers as they were, after the block: the tokens in it are made up."""
    held = [site.counts for site in sparse_sites(model).values() if site.counts is not None]
    before = [each.clone() for each in held]
    try:
        yield
    finally:
        for counts, value in zip(held, before, strict=True):
            counts.copy_(value)


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _lengths(most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of so many tokens, and what says by its size how many blocks to look at."""
    with torch.inference_mode(False):
        return torch.arange(most, device=device), torch.empty(most // BLOCK + 2, device=device)


def _state_of(layer: Any) -> tuple[Any, ...]:
    return layer.keys.dtype, layer.keys.shape[1], layer.keys.shape[3]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
