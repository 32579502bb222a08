"""The graph of one decoded token, or a few: captured by torch.export, changed by passes, compiled by inductor."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from deadband.decoding.cache import BLOCK, Store, grown
from deadband.decoding.compiler_paths import any_folder
from deadband.decoding.fusion import fuse_gated_downs, fuse_gated_mlps, fuse_linears, pack_layers, supply
from deadband.ops.attention import attend, attend_in_steps
from deadband.ops.gated import up_linear
from deadband.ops.linear import COUNTS, quantized_linear, sparse_linear
from deadband.running.forward import cache_argument

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


def _vector_length() -> dict[str, Any]:
    """The setting that tells inductor's cache for which vectors code was made.

    Loops are written for vectors of one length; the key of the cache (torch 2.13) knows nothing of it. So a folder that
    machines with AVX-512 and with AVX2 share, or an image that was made elsewhere, gives code that computes every other
    half of 32 entries, and no error.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return {"cpp.simdlen": pick_vec_isa().bit_width() or 1}  # 1: no vectors


def _realize(tensor: Tensor) -> Tensor:
    """The same tensor; to inductor, one that is computed once and kept, and not again in each kernel that reads it."""
    import torch._inductor.inductor_prims  # registers the operator

    tensor = tensor.contiguous()
    return torch.ops.prims.inductor_force_stride_order(tensor, tensor.stride())


class NotCapturedError(RuntimeError):
    """A model works in a way of which no graph of one token can be made here."""


class _Trace:
    """Tokens at `position`, one or more, through a model; `tokens` places of the cache are looked at.

    It notes which layers write to the cache and which attend, for `check`.
    """

    def __init__(self, position: Tensor, tokens: Any) -> None:
        self.position, self.tokens = position, tokens
        self.written: Counter[int] = Counter()
        self.attended: Counter[int] = Counter()

    def check(self, layers: int) -> None:
        """A NotCapturedError unless each layer of the cache was written to once, and read by our attention once."""
        for layer in range(layers):
            if self.written[layer] != 1 or self.attended[layer] != 1:
                raise NotCapturedError(
                    f"layer {layer} of its cache is written to {_times(self.written[layer])} and read through "
                    f"transformers' attention interface {_times(self.attended[layer])}, expected once each: its "
                    "attention has code of its own"
                )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


_trace: _Trace | None = None  # of the token that passes through `_Step`


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: Any = None,  # the mask has it
    is_causal: Any = None,  # so has it this
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of a token or a few: on CPUs on deadband's kernel, which reads the cache as it lies."""
    assert _trace is not None
    name = type(module).__name__
    unknown = [name for name, each in others.items() if each is not None and not _harmless(name, each)]
    if unknown:
        raise NotCapturedError(f"{name} passes {unknown[0]!r} to its attention, which the kernel does not know")
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4 or attention_mask.shape[1] != 1:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else attention_mask
        raise NotCapturedError(
            f"{name} attends with a mask of {got}, expected one of [1, 1, rows, tokens] for all heads"
        )
    if attention_mask.dtype is torch.bool:
        raise NotCapturedError(f"{name} makes a mask of its own")
    if getattr(module, "layer_idx", None) is None:
        raise NotCapturedError(f"{name} does not say which layer of the cache it reads (it has no layer_idx)")
    _trace.attended[module.layer_idx] += 1
    batch, heads, rows, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    few = () if rows == 1 else (rows,)
    mixed = (attend if query.device.type == "cpu" else attend_in_steps)(
        query.transpose(1, 2).reshape(*few, heads, size).to(value.dtype),
        key[0].transpose(1, 2),
        value[0],
        attention_mask.float().reshape(*few, -1),
        scaling,
        softcap or 0.0,
    )
    return mixed.reshape(batch, rows, heads, -1).to(query.dtype), None


def _harmless(name: str, value: Any) -> bool:
    return name in _HARMLESS or (isinstance(value, bool) and name.startswith(("output_", "return_")))


_HARMLESS = frozenset(
    ("position_ids", "cache_position", "cos", "sin", "position_embeddings", "use_cache", "logits_to_keep")
)
_ATTENTION = "deadband_decode"


def _mask(batch_size: int, *, mask_function: Callable[..., Any], **_: Any) -> Tensor:
    """What transformers calls for each pattern of a model (causal, within a window, a chunk, ...): its function says
    which of the places that are looked at each token may see. [1, 1, rows, tokens], to be added to scores."""
    assert _trace is not None
    zero = _trace.position.new_zeros(1, 1, 1, 1)
    # kept as a tensor: inductor's code for a floor division of an index is wrong (a chunk; torch 2.13, AVX-512)
    seen = _realize(torch.arange(_trace.tokens, device=zero.device)).view(1, 1, 1, -1)
    position = _trace.position.view(1, 1, -1, 1)
    kept = mask_function(zero, zero, position, seen)
    kept = kept & (seen <= position)  # beyond, the cache has nothing yet
    return _realize(torch.where(kept, 0.0, -torch.inf))


def _traced_cache(keys: list[Tensor], values: list[Tensor], trace: _Trace) -> Any:
    """A transformers cache over a Store's tensors, for one step."""
    from transformers.cache_utils import Cache, DynamicLayer

    class Traced(DynamicLayer):
        keys: Any
        values: Any
        index: int

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            trace.written[self.index] += 1
            self.keys.index_copy_(3, trace.position, key_states.transpose(2, 3))
            self.values.index_copy_(2, trace.position, value_states)
            return self.keys[..., : trace.tokens].transpose(2, 3), self.values[:, :, : trace.tokens]

        def get_seq_length(self) -> Any:
            return trace.position[0]

        def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[Any, int]:
            return trace.tokens, 0

    layers: list[Any] = []
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        layer = Traced()
        layer.index, layer.keys, layer.values, layer.is_initialized = index, key, value, True
        layers.append(layer)
    return Cache(layers=layers)


class Step(nn.Module):
    """A token or a few through the model, as a function of tensors alone; inside of `own_attention`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, token: Tensor, position: Tensor, blocks: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """The logits, [1, rows, vocabulary]; `blocks` only says by its size how many blocks of tokens to look at."""
        global _trace
        _trace = trace = _Trace(position, blocks.shape[0] * BLOCK)
        try:
            cache = {cache_argument(self.model): _traced_cache(keys, values, trace)}
            output = self.model(token, position_ids=position.unsqueeze(0), use_cache=True, **cache)
        finally:
            _trace = None
        trace.check(len(keys))
        return output.logits


def realize_shared(graph: torch.fx.GraphModule) -> None:
    """Compute what many layers read (the rotary tables) once, and not again in each layer's kernels."""
    for node in list(graph.graph.nodes):
        value = node.meta.get("val")
        if node.op == "call_function" and len(node.users) > 8 and isinstance(value, Tensor) and value.is_contiguous():
            with graph.graph.inserting_after(node):
                kept = graph.graph.call_function(
                    torch.ops.prims.inductor_force_stride_order.default, (node, list(range(value.dim(), 0, -1)))
                )
            kept.meta = dict(node.meta)
            node.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)


def give_counts(graph: torch.fx.GraphModule) -> None:
    """Give operators without counters some that nobody reads: inductor cannot leave out what an operator writes to."""
    uncounted = [
        node
        for node in graph.graph.nodes
        if node.target in (sparse_linear, quantized_linear, up_linear) and len(node.args) == _ARGUMENTS[node.target]
        if node.args[-1] is None
    ]
    if not uncounted:
        return
    with graph.graph.inserting_before(uncounted[0]):
        value = uncounted[0].meta["val"]
        settings = {"dtype": torch.int64, "device": value.device}
        counts = graph.graph.call_function(torch.ops.aten.zeros.default, ([COUNTS],), settings)
    with value.fake_mode:
        counts.meta["val"] = torch.zeros(COUNTS, **settings)
    for node in uncounted:
        node.args = (*node.args[:-1], counts)


_ARGUMENTS = {each: len(each._schema.arguments) for each in (sparse_linear, quantized_linear, up_linear)}
PASSES: tuple[GraphPass, ...] = (
    give_counts,
    fuse_gated_downs,
    fuse_gated_mlps,
    fuse_linears,
    realize_shared,
    pack_layers,
)
"""What is done to the graph before inductor compiles it, in this order. A pass changes, in place, a graph of ATen
operators with the weights as inputs: deadband::sparse_linear and aten.linear, with whatever lies between them."""


@contextlib.contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """The model's attention is `_attend` inside the block, and its masks are `_mask`'s."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, _mask)
    every = (getattr(module, "config", None) for module in model.modules())
    configs: dict[int, Any] = {id(config): config for config in every if hasattr(config, "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for key in before:
            configs[key]._attn_implementation = _ATTENTION
        yield
    finally:
        for key, name in before.items():
            configs[key]._attn_implementation = name


# Sizes of the example that a graph is captured of. No two may be equal, nor be a number of rows: standalone_compile
# takes sizes that are equal in the example for the same size in every call, without a word (torch 2.13).
_BLOCKS, _ROOM = 11, 13


def capture(model: Any, store: Store, rows: int = 1) -> torch.export.ExportedProgram:
    """The graph of one token, or of 2 to `rows`: inputs are weights, tokens, positions and the tensors of `store`."""
    dynamic = torch.export.Dim.DYNAMIC
    few = None if rows == 1 else torch.export.Dim("rows", min=2, max=rows)
    device = store.keys[0].device
    position = BLOCK + 7 + torch.arange(rows, device=device)
    blocks = torch.empty(_BLOCKS, device=device)
    arguments = (torch.zeros(1, rows, dtype=torch.int64, device=device), position, blocks)
    sizes = (None, None) if few is None else ({1: few}, {0: few})
    keys, values = ([grown(each, dim, _ROOM * BLOCK) for each in tensors]
                    for tensors, dim in ((store.keys, 3), (store.values, 2)))  # fmt: skip
    with torch.no_grad(), own_attention(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(
                Step(model),
                (*arguments, keys, values),
                dynamic_shapes=(*sizes, {0: dynamic}, [{3: dynamic} for _ in keys], [{2: dynamic} for _ in values]),
                strict=False,
            )
        except GuardOnDataDependentSymNode as error:
            raise NotCapturedError(
                f"its code decides by the values of tensors ({error.cond}), which a graph for all positions cannot"
            ) from error


def compile_graph(program: torch.export.ExportedProgram, passes: Sequence[GraphPass]) -> Callable[..., Any]:
    """A function of the program's flat inputs, weights first; its outputs in a tuple."""
    import torch._inductor
    import torch._inductor.config as settings

    graph = program.graph_module
    for each in passes:
        each(graph)
    graph.graph.lint()

    def compiled(graph: torch.fx.GraphModule) -> Callable[..., Any]:
        examples = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        return torch._inductor.standalone_compile(graph, examples, dynamic_shapes="from_graph")

    with any_folder(), torch.no_grad(), settings.patch(OPTIONS | _vector_length()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return supply(graph, compiled)
