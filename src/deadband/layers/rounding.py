"""Weights of 8 and 4 bits: the formats, and how a matrix is rounded to one.

A matrix W [out, in] becomes codes and, for each output and group of consecutive inputs, a scale and perhaps a minimum.
The codes of one input lie side by side, so that an input that is skipped leaves one stretch of memory unread.

4 bit scales (and minimums) minimise the squared error of each group, every input weighted by its second moment, which
is what a layer's output sees if inputs are uncorrelated: a search over clipped ranges, then steps that alternate
between the best codes for a scale and the least-squares scale for the codes, as in Zhang et al. 2018 (LQ-Nets,
arXiv 1807.10029) and, with another solver, Badri and Shaji 2023 (HQQ). With the second moments of pairs of inputs (a
Hessian), each input's rounding error is made up for by those that follow: GPTQ, Frantar et al. 2022, arXiv 2210.17323.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from deadband.layers.formats import LANES, QuantizedWeight, WeightFormat, code_width, empty_weight, pack


def quantize(
    weight: Tensor,
    format: str | WeightFormat,
    second_moments: Tensor | None = None,
    *,
    hessian: Tensor | None = None,
    minimise: bool = True,
) -> QuantizedWeight:
    """Round a matrix to a format. The same arguments give the same result.

    Args:
        weight: [out, in], of any floating-point dtype; or [experts, out, in], each expert by itself.
        format: a `WeightFormat` or its name.
        second_moments: E[x_i^2] of each input, [in]: how much its weights' errors count. Inputs that hardly ever differ
            from zero count a thousandth of the mean. None: all alike. 8 bit scales do not depend on it.
        hessian: E[x_i x_j], [in, in], for GPTQ; takes the place of `second_moments`. See `input_hessians`. Half of what
            is off the diagonal is believed.
        minimise: choose 4 bit scales that minimise the error; else by the largest magnitude, or the range, of a group,
            as 8 bit ones are.

    Returns:
        A `QuantizedWeight` on the weight's device. No group's error is larger than with `minimise=False`, except for
        GPTQ, which minimises the error of the output, and where zeros are held: of a weight that is zero in a fifth of
        its entries or more, as after pruning, those entries stay exactly zero.

    Raises:
        ValueError: an unknown format, shapes that do not fit, NaN or infinity in an argument, or weights so large that
            float16 holds no scale for them.

    Example:
        >>> weight = torch.tensor([[1.0, -0.5, 0.25, 0.125]])
        >>> quantize(weight, "int4-g32").dequantize().tolist()
        [[1.0, -0.5, 0.25, 0.125]]
    """
    format = WeightFormat.parse(format)
    if weight.dim() == 3 and len(weight):
        return _experts(weight, format, second_moments, hessian, minimise)
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"a weight of shape {list(weight.shape)} and {weight.dtype}; expected floats [out, in]")
    out, size = weight.shape
    upper = None
    if hessian is not None:
        _check_moments("hessian", hessian, (size, size))
        upper = _inverse_factor(hessian.to(weight.device))
        importance = upper.diagonal() ** -2.0  # what an input's error costs once later inputs have made up for it
    elif second_moments is not None:
        _check_moments("second_moments", second_moments, (size,))
        importance = second_moments.to(weight.device, torch.float32)
    else:
        importance = torch.ones(size, device=weight.device)
    mean = importance.mean()
    importance = (importance / mean).clamp_min(_LEAST_IMPORTANCE) if mean > 0 else torch.ones_like(importance)
    group = format.group_size or size
    scales = torch.empty(format.groups(size), out, dtype=format.scale_dtype, device=weight.device)
    minimum = torch.empty_like(scales) if format.zero_point else None
    dtype = torch.int8 if format.bits == 8 else torch.uint8
    codes = torch.empty(size, code_width(out, format), dtype=dtype, device=weight.device)
    hold = bool((weight == 0).float().mean() >= _PRUNED)
    with torch.no_grad():
        for inputs, outputs in _panels(out, size, group, whole=upper is not None):
            w = weight[outputs, inputs].float().T
            columns = w.shape[1]
            w = F.pad(w, (0, -columns % LANES)).contiguous()  # sums over other widths could be rounded otherwise
            if not bool(w.isfinite().all()):
                raise ValueError("the weight holds NaN or infinity")
            groups = slice(inputs.start // group, -(-inputs.stop // group))
            if upper is None:
                grouped, m = _grouped(w, importance[inputs], group)
                scale, low = _fit(grouped, m, format, minimise)
                if hold and low is not None:
                    scale, low = _with_code_of_zero(grouped, m, scale, low)
                panel = _encode(grouped, scale[:, None], _wide(low), format)
                panel = panel.view(-1, w.shape[1])[: len(w)]
            else:
                panel, scale, low = _gptq(w.clone(), upper, importance, format, minimise, hold)
            scales[groups, outputs] = scale[:, :columns].to(format.scale_dtype)
            if minimum is not None and low is not None:
                minimum[groups, outputs] = low[:, :columns].half()
            stored = _stored(panel, format)[:, : code_width(columns, format)]
            start = outputs.start * code_width(LANES, format) // LANES
            codes[inputs, start : start + stored.shape[1]] = stored
    return QuantizedWeight(codes, scales, minimum, format)


def _experts(
    weights: Tensor, format: WeightFormat, moments: Tensor | None, hessian: Tensor | None, minimise: bool
) -> QuantizedWeight:
    """Each matrix of several rounded, into one place."""
    _, out, size = weights.shape
    made = empty_weight(out, size, format, weights.device, len(weights))
    for index, weight in enumerate(weights):
        one = quantize(weight, format, moments, hessian=hessian, minimise=minimise)
        made.codes[index], made.scales[index] = one.codes, one.scales
        if made.minimum is not None and one.minimum is not None:
            made.minimum[index] = one.minimum
    return made


def _check_moments(name: str, moments: Tensor, shape: tuple[int, ...]) -> None:
    if moments.shape != shape:
        raise ValueError(f"{name} of shape {list(moments.shape)}; expected {list(shape)}")
    if not bool(moments.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity")
    if bool(((moments.diagonal() if moments.dim() == 2 else moments) < 0).any()):
        raise ValueError(f"{name} holds negative second moments")


def _panels(out: int, size: int, group: int, *, whole: bool) -> Iterator[tuple[slice, slice]]:
    """Parts of a matrix that are worked on at a time: (inputs, outputs), whole groups and multiples of 32 outputs."""
    wide = size if whole else group * max(_PANEL_INPUTS // group, 1)
    entries = _WHOLE_PANEL if whole else _PANEL
    tall = max(entries // min(wide, size) // LANES, 1) * LANES
    for first in range(0, out, tall):
        for start in range(0, size, wide):
            yield slice(start, min(start + wide, size)), slice(first, min(first + tall, out))


_PANEL_INPUTS = 128
_PANEL = 2**17  # entries: 512 KB in float32, so that the passes over a panel find it in the cache
_WHOLE_PANEL = 2**24  # 64 MB; fewer panels for GPTQ, which goes through one input by input
_PRUNED = 0.2  # a share of zeros that a weight has by intent; on a grid of 4 bits it may have a tenth
_LEAST_IMPORTANCE = 1e-3  # of the mean: what calibration data hardly show may still come


def _grouped(w: Tensor, importance: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Weights [in, out] and importances [in] as [groups, group, out] and [groups, group, 1]."""
    missing = -len(w) % group
    if missing:  # a copy of the last input leaves the range as it is, and without importance the error too
        w = torch.cat([w, w[-1:].expand(missing, -1)])
        importance = F.pad(importance, (0, missing))
    return w.view(-1, group, w.shape[1]), importance.view(-1, group, 1)


def _encode(w: Tensor, scale: Tensor, minimum: Tensor | None, format: WeightFormat) -> Tensor:
    """The codes nearest to `w`, as floats, those of 4 bits without a minimum from -8."""
    shifted = w if minimum is None else w - minimum
    low, high = _range(format)
    return (shifted * _inverse(scale)).round_().clamp_(low, high)


def _wide(minimum: Tensor | None) -> Tensor | None:
    return None if minimum is None else minimum[:, None]


def _decode(codes: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    return codes * scale if minimum is None else codes * scale + minimum


def _range(format: WeightFormat) -> tuple[int, int]:
    return (-127, 127) if format.bits == 8 else (0, 15) if format.zero_point else (-8, 7)


def _stored(codes: Tensor, format: WeightFormat) -> Tensor:
    """Codes [in, out], as `_encode` gives them, as they are stored."""
    if format.bits == 8:
        return codes.to(torch.int8)
    return pack(codes.to(torch.uint8)) if format.zero_point else pack((codes + 8).to(torch.uint8), 8)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _fit(w: Tensor, m: Tensor, format: WeightFormat, minimise: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and minimum [groups, out] of weights [groups, group, out]: float32 that the stored dtype holds exactly."""
    high, low = w.amax(1), w.amin(1)
    if format.bits == 8:
        largest = torch.maximum(high, -low)
        scale = largest / 127
        if format.group_size is None:  # one over it has to be finite
            return torch.where(largest > 0, scale.clamp_min(torch.finfo(torch.float32).tiny), 0), None
        return _half(scale, largest / 127.5), None
    least = None
    if format.zero_point:
        least = _half(low)
        ideal, enough = (high - low) / 15, (high - least) / 15.5
    else:
        extreme = torch.where(-low > high, low, high)
        ideal, enough = extreme / -8, extreme.abs() / 8.5
    plain = _half(ideal, enough)
    if not minimise:
        return plain, least
    search = _Search(w, m, format, plain, least)
    if not torch.equal(plain, nearest := _half(ideal)):
        search.consider(nearest, least)
    starts: list[tuple[Tensor, Tensor | None]]
    if least is None:
        search.consider(_half(extreme.abs() / 7), None)
        starts = [(extreme / end, None) for end in _ENDS]
    else:
        middle, half = (high + low) / 2, (high - low) / 2
        starts = [((up + down) * half / 15, middle - down * half) for down, up in _SHARES]
    search.refine(search.best_start(starts))
    return search.scale, search.minimum


_ENDS = (
    -7.0,
    -7.5,
    -8.0,
    -8.4,
    -8.8,
    -9.4,
    -10.0,
    -10.75,
    -11.5,
    -12.5,
    -13.5,
    -15.0,
    -17.0,
    -19.5,
    7.5,
    8.5,
    10.0,
    12.0,
)
"""Codes that a group's largest weight would have without clipping; the scale gets its sign from theirs."""
_SHARES = (
    *((share, share) for share in (1.0, 0.95, 0.9, 0.84, 0.77, 0.7, 0.6, 0.48)),
    *((1.0, share) for share in (0.9, 0.8, 0.6)),
    *((share, 1.0) for share in (0.9, 0.8, 0.6)),
    *((1.0, 30 / steps - 1) for steps in (14, 13)),  # weights that were on a grid before may not use all of it
)
"""The ranges that are tried: shares of half the group's range below and above its middle."""
_STEPS = 4


class _Search:
    """Scales (and minimums) of some groups, and the best of them so far.

    Args:
        w: weights [groups, group, out].
        m: importances [groups, group, 1].
        format: of 4 bits.
        scale, minimum: [groups, out], the first to consider.
    """

    def __init__(self, w: Tensor, m: Tensor, format: WeightFormat, scale: Tensor, minimum: Tensor | None) -> None:
        self.w, self.m, self.format = w, m, format
        self.scale, self.minimum = scale, minimum
        # about the middle of the range (and of the codes) sums of squares do not cancel where all weights are alike
        self.center = (w.amax(1) + w.amin(1)) / 2 if format.zero_point else None
        self.weighted = (w if self.center is None else w - self.center[:, None]) * m
        self.total, self.first = m.sum(1), self.weighted.sum(1)
        self.error = torch.full_like(scale, torch.inf)
        self.consider(scale, minimum)

    def codes(self, scale: Tensor, minimum: Tensor | None) -> Tensor:
        """The codes [groups, group, out] nearest to the weights."""
        return _encode(self.w, scale[:, None], _wide(minimum), self.format)

    def consider(self, scale: Tensor, minimum: Tensor | None) -> Tensor:
        """Keep scale and minimum where the error is less than before; returns the codes [groups, group, out]."""
        codes = self.codes(scale, minimum)
        error = _decode(codes, scale[:, None], _wide(minimum)).sub_(self.w).square_().mul_(self.m).sum(1)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        if minimum is not None and self.minimum is not None:
            self.minimum = torch.where(better, minimum, self.minimum)
        return codes

    def sums(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the least-squares scale is the ratio of (product with the weights, square), and the sum of the codes."""
        if self.center is None:
            product, square = (codes * self.weighted).sum(1), codes.square().mul_(self.m).sum(1)
            return product, square, None
        codes = codes - _MIDDLE
        product = (codes * self.weighted).sum(1)
        mass = codes * self.m
        total = mass.sum(1)
        square = mass.mul_(codes).sum(1)
        mean = total / self.total
        return product - mean * self.first, square - mean * total, total

    def best_start(self, starts: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
        """The codes [groups, group, out] that leave the least error once their scale is the least-squares one."""
        most = torch.full_like(self.scale, -1.0)
        chosen, chosen_minimum = self.scale, self.minimum
        for scale, minimum in starts:
            product, square, _ = self.sums(self.codes(scale, minimum))
            explained = torch.where(square > 0, product * product / square, 0)
            better = explained > most
            most = torch.where(better, explained, most)
            chosen = torch.where(better, scale, chosen)
            if minimum is not None and chosen_minimum is not None:
                chosen_minimum = torch.where(better, minimum, chosen_minimum)
        return self.codes(chosen, chosen_minimum)

    def refine(self, codes: Tensor) -> None:
        """Alternate between the best scale for codes and the best codes for a scale."""
        for _ in range(_STEPS):
            product, square, total = self.sums(codes)
            scale = torch.where(square > 0, product / square, self.scale)
            scale = scale.half().float()
            minimum = None
            if self.center is not None and total is not None:
                minimum = (self.first - scale * total) / self.total - _MIDDLE * scale + self.center
                minimum = minimum.half().float()
            codes = self.consider(scale, minimum)


_MIDDLE = 7.5


def _half(values: Tensor, at_least: Tensor | None = None) -> Tensor:
    """`values` rounded to float16, in float32; one step further from zero where smaller than `at_least`.

    So close to zero that float16 has few digits, a scale may otherwise become too small for the weights, or zero.
    """
    rounded = values.half()
    if at_least is not None:
        away = (rounded.view(torch.int16) + 1).view(torch.float16)
        rounded = torch.where(rounded.float().abs() < at_least, away, rounded)
    if not bool(rounded.isfinite().all()):
        raise ValueError("the weight is too large for float16 scales and minimums; expected format int8")
    return rounded.float()


def _with_code_of_zero(w: Tensor, m: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minimums [groups, out] near these, of which groups that hold zeros have a code for exactly zero.

    The minimum is a multiple of the scale then, and the scale has 7 bits of mantissa, so that float16 holds both.
    """
    start = _short(scale)
    least = torch.full_like(scale, torch.inf)
    best_scale, best_minimum = scale, minimum
    for offset in (-1, 0, 1):
        zero = ((-minimum * _inverse(start)).round() + offset).clamp_(0, 15)
        codes = (w * _inverse(start)[:, None] + zero[:, None]).round().clamp_(0, 15) - zero[:, None]
        square = (codes * codes * m).sum(1)
        fitted = _short(torch.where(square > 0, (codes * w * m).sum(1) / square, start))
        for tried in (start, fitted):
            codes = (w * _inverse(tried)[:, None] + zero[:, None]).round().clamp_(0, 15) - zero[:, None]
            error = ((codes * tried[:, None] - w).square() * m).sum(1)
            better = (error < least) & (zero * tried < torch.finfo(torch.float16).max) & (tried > 0)
            least = torch.where(better, error, least)
            best_scale = torch.where(better, tried, best_scale)
            best_minimum = torch.where(better, -zero * tried, best_minimum)
    held = (w == 0).any(1)
    return torch.where(held, best_scale, scale), torch.where(held, best_minimum, minimum)


def _short(scale: Tensor) -> Tensor:
    """Magnitudes rounded to float16 and to 7 bits of mantissa, in float32."""
    mantissa, exponent = torch.frexp(scale.abs().half().float())
    return torch.ldexp((mantissa * 128).round() / 128, exponent)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U [in, in] of which U.T @ U is the inverse of the shrunk and damped Hessian."""
    damped = hessian.float() * (1 - _SHRINKAGE)
    diagonal = damped.diagonal()
    diagonal.copy_(hessian.diagonal())
    mean = float(diagonal.mean())
    if mean == 0:
        return torch.eye(len(damped), device=damped.device)
    damping = _DAMPING * mean
    while True:
        diagonal += damping
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return upper
        damping *= 10  # rounding made it indefinite


_DAMPING = 0.01
_SHRINKAGE = 0.5  # of products of two inputs towards zero: they differ from text to text, which single inputs hardly do


def _gptq(
    w: Tensor, upper: Tensor, importance: Tensor, format: WeightFormat, minimise: bool, hold: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [in, out], scale and minimum [groups, out] of `w` [in, out], which is overwritten.

    With `hold`, zeros stay zero, and what they should have made up for is left to later inputs.
    """
    zeros = (w == 0) & hold
    size = len(w)
    group = format.group_size or size
    codes = torch.empty_like(w)
    scales, minimums = [], []
    scale, low = torch.empty(0), None
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        errors = torch.empty_like(w[start:stop])
        for index in range(start, stop):
            if index % group == 0:  # with what the inputs before it have left
                at = slice(index, min(index + group, size))
                grouped = _grouped(w[at].masked_fill(zeros[at], 0), importance[at], group)
                scale, low = _fit(*grouped, format, minimise)
                if hold and low is not None:
                    scale, low = _with_code_of_zero(*grouped, scale, low)
                scales.append(scale)
                minimums.append(low)
            rounded = w[index].masked_fill(zeros[index], 0)
            codes[index] = _encode(rounded, scale[0], None if low is None else low[0], format)
            error = w[index] - _decode(codes[index], scale[0], None if low is None else low[0])
            error /= upper[index, index]
            w[index + 1 : stop].addr_(upper[index, index + 1 : stop], error, alpha=-1)
            errors[index - start] = error
        w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    minimum = torch.cat([low for low in minimums if low is not None]) if format.zero_point else None
    return codes, torch.cat(scales), minimum


_BLOCK = 128
