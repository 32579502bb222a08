"""Which entries of an input are kept, and what stands in the place of the others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deadband.ops.nested import jagged, map_nested, ragged


def score(x: Tensor, scale: Tensor | None = None, center: Tensor | None = None) -> Tensor:
    """Float32 scores of the entries of `x` [..., in_features].

    Example:
        >>> score(torch.tensor([-2.0, 1.0]), scale=torch.tensor([1.0, 3.0]))
        tensor([2., 3.])
    """
    magnitude = x.abs().float() if center is None else (x.float() - center).abs()
    return magnitude if scale is None else magnitude * scale


def norm_of(x: Tensor) -> Tensor:
    """Float32 norm of each row of `x` [..., in_features], [..., 1]."""
    if x.dtype == torch.float64:
        x = x.float()  # vector_norm widens, but does not narrow
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)


def limit_of(x: Tensor, threshold: Tensor | float, relative: bool) -> Tensor | float:
    """What scores are compared with: the threshold, or with `relative` its product with the norm of each token.

    A token whose norm is infinite or NaN gets a limit below every score: what is broken surfaces.
    """
    if not relative:
        return threshold
    limit = threshold * norm_of(x)  # [..., 1]
    return torch.where(limit.isfinite(), limit, -1.0)


def keep_mask(
    x: Tensor,
    threshold: Tensor | float,
    scale: Tensor | None = None,
    center: Tensor | None = None,
    relative: bool = False,
) -> Tensor:
    """Bool mask of the entries of `x` that are kept: score > threshold, or NaN. `Rule` explains the arguments.

    Example:
        >>> keep_mask(torch.tensor([0.5, -2.0, float("nan")]), 0.5)
        tensor([False,  True,  True])
    """
    return ~(score(x, scale, center) <= limit_of(x, threshold, relative))


def fill(x: Tensor, keep: Tensor, center: Tensor | None) -> Tensor:
    """`x` where kept, else the center (zero without one), in the dtype of `x`."""
    return apply_mask(x, keep) if center is None else torch.where(keep, x, center.to(x.dtype))


_BITS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where kept and zero elsewhere, whatever stood there (NaN and infinity too), in the dtype of `x`.

    Args:
        x: of any shape and dtype.
        mask: broadcasts to the shape of x; of a nested tensor, to `padded_shape`. Bool, or numbers to multiply with.

    Example:
        >>> apply_mask(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    if x.is_nested:
        return _mask_nested(x, mask)
    if mask.dtype is not torch.bool:
        return torch.where(mask != 0, (x * mask).to(x.dtype), torch.zeros((), dtype=x.dtype, device=x.device))
    if not (x.is_floating_point() or x.is_complex()):
        return x * mask  # integers have no NaN that would survive
    plain = x.numel() > 4096 and type(x) is Tensor and x.device.type == "cpu" and x.dtype in _BITS
    if plain and not (x.requires_grad and torch.is_grad_enabled()) and not _traced_or_transformed(x):
        # torch.where takes 3 to 7 times as long as a product on CPUs (a few thousand entries aside); an `and` with all
        # ones or all zeros takes no longer
        integer = _BITS[x.dtype]
        return (x.view(integer) & -mask.to(integer)).view(x.dtype)
    return torch.where(mask, x, 0)


def _mask_nested(x: Tensor, mask: Tensor) -> Tensor:
    if x.layout is torch.jagged and mask.dim() < x.dim() - ragged(x):  # the same for all parts; compilers follow this
        return jagged(apply_mask(x.values(), mask), x)
    return map_nested(x, lambda number, part: apply_mask(part, _of_part(mask, x.dim(), number, part.shape)))


def _of_part(mask: Tensor, dims: int, number: int, shape: torch.Size) -> Tensor:
    """What of a mask for a nested tensor of `dims` dimensions is for one of its parts, of `shape`."""
    if mask.dim() == dims:
        mask = mask[number if mask.shape[0] > 1 else 0]
    sizes = shape[len(shape) - mask.dim() :]
    return mask[tuple(slice(None) if own == 1 else slice(size) for own, size in zip(mask.shape, sizes, strict=True))]


def _traced_or_transformed(x: Tensor) -> bool:
    """Under a compiler, vmap, grad or forward-mode AD, which do not see through a change of dtype."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_neg():
        return True
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad._current_level >= 0
