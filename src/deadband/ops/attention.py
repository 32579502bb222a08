"""deadband::attend(query, keys, values, mask, scaling, softcap) -> y: attention of one token, or of a few.

    query    [heads, head_dim], float32 or bfloat16; of several tokens [rows, heads, head_dim]
    keys     [groups, head_dim, tokens] in the dtype of query; heads / groups neighbouring heads share a group
    values   [groups, tokens, value_dim] in the dtype of query
    mask     [tokens] or [rows, tokens] float32, added to the scores: 0, or -inf where a token is not looked at
    scaling  what query is multiplied by
    softcap  scores become softcap * tanh(score / softcap); 0: they stay
    y        [heads, value_dim] or [rows, heads, value_dim], contiguous, in the dtype of query; sums are float32

The rows of keys and values may lie apart, as they do in a cache with room to grow. torch's scaled_dot_product_attention
would repeat the groups' heads first (2 ms a token on SmolLM2), and inductor's loops in plain operations take 144 us for
a layer of Llama 1B with 128 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deadband.ops import kernels
from deadband.ops.cpu import failed
from deadband.ops.kernels import KERNEL_DTYPES
from deadband.ops.linear import operators

operators.define(
    "attend(Tensor query, Tensor keys, Tensor values, Tensor mask, float scaling, float softcap) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
attend = torch.ops.deadband.attend.default
_get_num_threads = torch.get_num_threads


def attend_reference(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float, softcap: float
) -> Tensor:
    """What the operator means, in float32."""
    scores = (query.float() * scaling).unflatten(-2, (keys.shape[0], -1)) @ keys.float()
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    mixed = torch.softmax(scores + mask[..., None, None, :], -1) @ values.float()
    return mixed.flatten(-3, -2).to(query.dtype)


operators.impl("attend", attend_reference, "CompositeExplicitAutograd")


def attend_in_steps(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float, softcap: float
) -> Tensor:
    """The same in steps that a compiler for GPUs sees: products in the dtype of keys and values, softmax in float32.

    The heads of a group are rows of one product, so that keys and values are read once.
    """
    *rows, heads, size = query.shape
    groups, tokens = values.shape[:2]
    own = (query * scaling).reshape(*rows, groups, heads // groups, size).movedim(-3, 0).reshape(groups, -1, size)
    scores = (own @ keys).float()
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(groups, *rows, heads // groups, tokens) + mask[..., None, :]
    mixed = torch.softmax(scores, -1).to(values.dtype).view(groups, -1, tokens) @ values
    return mixed.view(groups, *rows, heads // groups, -1).movedim(0, -3).reshape(*rows, heads, -1)


@torch.library.register_fake("deadband::attend", lib=operators)
def _fake(query, keys, values, mask, scaling, softcap):
    shapes = [list(each.shape) for each in (query, keys, values, mask)]
    torch._check(
        query.dim() in (2, 3) and keys.dim() == 3 and values.dim() == 3 and mask.dim() == query.dim() - 1,
        lambda: (
            "attend takes query [heads, head_dim], keys and values of 3 dimensions and mask [tokens], or query and "
            f"mask with rows before; got {', '.join(map(str, shapes))}"
        ),
    )
    return query.new_empty((*query.shape[:-1], values.shape[2]))


def _on_cpu(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float, softcap: float) -> Tensor:
    *rows, heads, size = query.shape
    groups, tokens, value_size = values.shape
    dtype = KERNEL_DTYPES.get(query.dtype)
    key_group, key_stride, key_one = keys.stride()
    value_group, value_stride, value_one = values.stride()
    if (
        dtype is None
        or keys.dtype is not query.dtype
        or values.dtype is not query.dtype
        or mask.dtype is not torch.float32
        or keys.shape != (groups, size, tokens)
        or mask.shape != (*rows, tokens)
        or not groups
        or heads % groups
        or (tokens > 1 and (key_one != 1 or value_stride < value_size))
        or (size > 1 and key_stride < tokens)
        or (value_size > 1 and value_one != 1)
    ):
        return attend_reference(query, keys, values, mask, scaling, softcap)
    query, mask = query.contiguous(), mask.contiguous()
    y = query.new_empty((*rows, heads, value_size))
    query_at, mask_at, y_at = query.data_ptr(), mask.data_ptr(), y.data_ptr()
    one = heads * query.element_size()
    for row in range(rows[0] if rows else 1):
        error = _kernel(
            dtype, query_at + row * size * one, keys.data_ptr(), values.data_ptr(), groups, heads // groups, size,
            value_size, tokens, key_group, key_stride, value_group, value_stride, mask_at + row * tokens * 4, scaling,
            softcap, y_at + row * value_size * one, _get_num_threads(),
        )  # fmt: skip
        if error:
            return failed(error, query, keys)
    return y


if kernels.library is not None:
    _kernel = kernels.library.deadband_attend
    operators.impl("attend", _on_cpu, "CPU")
