"""Products of matrices in float32 where the processor multiplies bfloat16 or float16 slowly.

With AVX2 alone, torch's bfloat16 product of many rows takes four times its float32 one. There, `fast_products` converts
the operands of each product while it runs, and its result back: what torch's own product does, too, which adds up in
float32 and rounds the sums. So a bfloat16 model stays one, every rounding between its layers included, and results
differ by the order of sums alone. Nothing in the model changes, and the memory is that of a part of one weight.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ROWS = 32
"""From so many rows on: below, converting a weight takes longer than multiplying by it."""
NARROW = (torch.bfloat16, torch.float16)
ENTRIES = 2**22  # of an operand that are float32 at a time: 16 MB, which malloc keeps; it takes more anew, page by page
_TRIED = (256, 512, 512)  # rows, in and out of the product that is timed: a few milliseconds
_GAIN = 1.25  # how much faster float32 has to be
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
}


def _without_onednn() -> frozenset[torch.dtype]:
    known = torch.backends.mkldnn.is_available()
    has = {
        torch.bfloat16: known and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: known and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, supported in has.items() if not supported)


WITHOUT_ONEDNN = _without_onednn()
"""The dtypes whose matrices torch multiplies without oneDNN on this CPU: up to a hundred times slower than float32 in
any layout but the usual one. (`is_slow` is about that one.)"""


@functools.cache
def slow_by(dtype: torch.dtype) -> float:
    """How many times as long a product in this dtype takes on the CPU as one in float32 with operands converted to it.

    Timed once in a process.
    """
    rows, features, outputs = _TRIED
    with torch.inference_mode(False), torch.no_grad():
        a, b = (torch.ones(shape, dtype=dtype, device="cpu") for shape in ((rows, features), (outputs, features)))
        b = b.t()  # as of a linear layer; other layouts may be slower still
        own, wide = [], []
        for _ in range(4):  # the first call of each prepares
            own.append(_seconds(lambda: torch.mm(a, b)))
            wide.append(_seconds(lambda: torch.mm(a.float(), b.float()).to(dtype)))
    return min(own[1:]) / min(wide[1:])


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def is_slow(dtype: torch.dtype) -> bool:
    """Whether products in this dtype are made in float32."""
    return dtype in NARROW and slow_by(dtype) > _GAIN


def slow_dtypes(model: nn.Module) -> list[torch.dtype]:
    """The dtypes of a model's parameters on the CPU in which products are slow."""
    used = {each.dtype for each in model.parameters() if each.device.type == "cpu"}
    return [dtype for dtype in NARROW if dtype in used and is_slow(dtype)]


def note(model: nn.Module) -> str:
    """A line that says in which dtypes products are slow here, and so made in float32; empty if there are none."""
    slow = [f"{str(dtype).removeprefix('torch.')} take {slow_by(dtype):.1f}" for dtype in slow_dtypes(model)]
    return (
        f"products of many tokens are made in float32: torch's own in {', '.join(slow)} times as long" if slow else ""
    )


def fast_products(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside the block, this thread multiplies many rows in float32 where the model's own dtype is slow; see above.

    Gradients are computed like that, too. Sparse and quantised layers have products of their own.
    """
    dtypes = slow_dtypes(model)
    return _Float32(dtypes) if dtypes else contextlib.nullcontext()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's own `F.linear`, in float32 where that is faster."""
    if x.dtype in NARROW and x.shape[:-1].numel() >= ROWS and is_slow(x.dtype):
        with _Float32([x.dtype]):
            return nn.functional.linear(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


class _Float32(TorchDispatchMode):
    """Sees every product below autograd, those of backward passes included."""

    def __init__(self, dtypes: Collection[torch.dtype]) -> None:
        super().__init__()
        self.dtypes = dtypes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and all(map(self._is_slow, args)) and args[-2].shape[-2] >= ROWS:
            return _in_float32(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _is_slow(self, operand: Any) -> bool:
        plain = type(operand).__torch_dispatch__ is Tensor.__torch_dispatch__  # no tensor that stands for another
        return plain and operand.dtype in self.dtypes and operand.device.type == "cpu"


def _in_float32(func: Any, operands: Any, kwargs: Any) -> Tensor:
    """A product, some columns of the result at a time: an output layer in float32 may be gigabytes."""
    *added, a, b = operands
    wide, width = a.float(), b.shape[-1]
    step = max(ENTRIES // max(b.shape[:-1].numel(), 1), 1)
    parts = []
    for start in range(0, width, step) if width > step else (0,):
        at = slice(start, start + step)
        terms = [(each[..., at] if each.dim() and each.shape[-1] == width else each).float() for each in added]
        parts.append(func(*terms, wide, b[..., at].float(), **kwargs).to(a.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
