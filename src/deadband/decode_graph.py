"""The graph of one decoded token: captured by torch.export, changed by passes, compiled by inductor."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deadband.decode_cache import BLOCK, Store, grown
from deadband.fusion import fuse_gated_mlps, fuse_linears, pack_layers, supply
from deadband.ops import COUNTS, quantized_linear, sparse_linear
from deadband.ops.attention import attend

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


def _realize(tensor: Tensor) -> Tensor:
    """The same tensor; to inductor, one that is computed once and kept, and not again in each kernel that reads it."""
    import torch._inductor.inductor_prims  # registers the operator

    tensor = tensor.contiguous()
    return torch.ops.prims.inductor_force_stride_order(tensor, tensor.stride())


_masks: list[Tensor] = []  # of the layers of the model being captured


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
    """Attention of one token on deadband's kernel, which reads the cache as it lies."""
    unknown = [name for name, each in others.items() if isinstance(each, Tensor) and name not in _HARMLESS]
    if unknown:
        raise NotImplementedError(f"{type(module).__name__} passes {unknown[0]} to its attention")
    batch, heads, _, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    mixed = attend(
        query.reshape(heads, size).to(value.dtype),
        key[0].transpose(1, 2),
        value[0],
        _masks[module.layer_idx],
        scaling,
        softcap or 0.0,
    )
    return mixed.reshape(batch, 1, heads, -1).to(query.dtype), None


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
    _masks.clear()
    for key, value, window in zip(keys, values, windows, strict=True):
        if window not in masks:
            kept = seen <= position if window is None else (seen <= position) & (seen > position - window)
            masks[window] = _realize(torch.where(kept, 0.0, -torch.inf))
        layer = Traced()
        layer.keys, layer.values, layer.is_initialized = key, value, True
        layers.append(layer)
        _masks.append(masks[window])
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
        _masks.clear()


def capture(model: Any, store: Store, windows: list[Any]) -> torch.export.ExportedProgram:
    """The graph of one decoded token: inputs are the weights, the token, its position and the tensors of `store`."""
    dynamic = torch.export.Dim.DYNAMIC
    arguments = (torch.zeros(1, 1, dtype=torch.int64), torch.tensor([BLOCK + 7]), torch.empty(3))
    keys, values = ([grown(each, dim, 5 * BLOCK) for each in tensors]
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
