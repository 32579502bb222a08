"""deadband::attend(query, keys, values, mask, scaling, softcap) -> y: attention of one token.

    query    [heads, head_dim], float32 or bfloat16
    keys     [groups, head_dim, tokens] in the dtype of query; heads / groups neighbouring heads share a group
    values   [groups, tokens, value_dim] in the dtype of query
    mask     [tokens] float32, added to the scores: 0, or -inf where a token is not looked at
    scaling  what query is multiplied by
    softcap  scores become softcap * tanh(score / softcap); 0: they stay
    y        [heads, value_dim], contiguous, in the dtype of query; sums are float32

The rows of keys and values may lie apart, as they do in a cache with room to grow. torch's scaled_dot_product_attention
would repeat the groups' heads first (2 ms a token on SmolLM2), and inductor's loops in plain operations take 144 us for
a layer of Llama 1B with 128 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deadband.ops import kernels
from deadband.ops.cpu import KERNEL_DTYPES, failed
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
    heads, size = query.shape
    groups = keys.shape[0]
    scores = (query.float() * scaling).view(groups, heads // groups, size) @ keys.float()
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    mixed = torch.softmax(scores + mask, -1) @ values.float()
    return mixed.reshape(heads, values.shape[2]).to(query.dtype)


operators.impl("attend", attend_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("deadband::attend", lib=operators)
def _fake(query, keys, values, mask, scaling, softcap):
    torch._check(
        query.dim() == 2 and keys.dim() == 3 and values.dim() == 3 and mask.dim() == 1,
        lambda: (
            f"attend takes query [heads, head_dim], keys and values of 3 dimensions and mask [tokens]; got "
            f"{list(query.shape)}, {list(keys.shape)}, {list(values.shape)}, {list(mask.shape)}"
        ),
    )
    return query.new_empty((query.shape[0], values.shape[2]))


def _on_cpu(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float, softcap: float) -> Tensor:
    heads, size = query.shape
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
        or mask.shape != (tokens,)
        or not groups
        or heads % groups
        or (tokens > 1 and (key_one != 1 or value_stride < value_size))
        or (size > 1 and key_stride < tokens)
        or (value_size > 1 and value_one != 1)
    ):
        return attend_reference(query, keys, values, mask, scaling, softcap)
    query, mask = query.contiguous(), mask.contiguous()
    y = query.new_empty((heads, value_size))
    error = _kernel(
        dtype, query.data_ptr(), keys.data_ptr(), values.data_ptr(), groups, heads // groups, size, value_size, tokens,
        key_group, key_stride, value_group, value_stride, mask.data_ptr(), scaling, softcap, y.data_ptr(),
        _get_num_threads(),
    )  # fmt: skip
    return y if not error else failed(error, query, keys)


if kernels.library is not None:
    _kernel = kernels.library.deadband_attend
    operators.impl("attend", _on_cpu, "CPU")
