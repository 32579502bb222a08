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

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deadband.batches import taken
from deadband.observation import InputWatcher, require_reached
from deadband.ops import NIBBLES, dequantize, unpack_nibbles
from deadband.sites import shape_of

if TYPE_CHECKING:
    from deadband.calibration import Calibration

GROUP_SIZES = (32, 64, 128)
DEFAULT_INT4 = "int4-g64-zp"
"""What `int4` stands for."""
_INT8 = ("int8", *(f"int8-g{size}" for size in GROUP_SIZES))
FORMATS = (*_INT8, *(f"int4-g{size}{end}" for size in GROUP_SIZES for end in ("", "-zp")))


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored.

    Attributes:
        bits: of a code, 8 or 4.
        group_size: consecutive inputs that share a float16 scale: 32, 64 or 128. None, for 8 bits only: all inputs of
            an output share a float32 one.
        zero_point: groups of 4 bit codes have a minimum too, also float16.

    Raises:
        ValueError: there is no such format.

    Example:
        >>> WeightFormat.parse("int4-g64-zp")
        WeightFormat(bits=4, group_size=64, zero_point=True)
        >>> str(WeightFormat(8)), WeightFormat.parse("int4").bytes_per_weight
        ('int8', 0.5625)
    """

    bits: int
    group_size: int | None = None
    zero_point: bool = False

    def __post_init__(self) -> None:
        if str(self) not in FORMATS:
            raise ValueError(_unknown(str(self)))

    @classmethod
    def parse(cls, text: str | WeightFormat) -> WeightFormat:
        """The format of that name; `int4` is `DEFAULT_INT4`. A format is returned as it is.

        Raises:
            ValueError: there is no such format.
        """
        if isinstance(text, WeightFormat):
            return text
        name = DEFAULT_INT4 if text == "int4" else text
        if name not in FORMATS:
            raise ValueError(_unknown(text))
        kind, *rest = name.split("-")
        group_size = int(rest[0][1:]) if rest else None
        return cls(int(kind[3:]), group_size, "zp" in rest)

    def __str__(self) -> str:
        group = "" if self.group_size is None else f"-g{self.group_size}"
        return f"int{self.bits}{group}{'-zp' if self.zero_point else ''}"

    @property
    def bytes_per_weight(self) -> float:
        """Bytes that a weight of a large matrix takes, its share of scales and minimums included."""
        per_group = 0 if self.group_size is None else 2 * (1 + self.zero_point)
        return self.bits / 8 + per_group / (self.group_size or 1)

    def groups(self, in_features: int) -> int:
        """The groups of so many inputs; the last may be short."""
        return 1 if self.group_size is None else -(-in_features // self.group_size)

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of scales."""
        return torch.float32 if self.group_size is None else torch.float16


def _unknown(name: object) -> str:
    known = f"int4 (which is {DEFAULT_INT4}) or one of {', '.join(FORMATS)}"
    return f"weight format {name!r} is not known; expected {known}"


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The weight of a linear layer, [out, in], as codes with a scale for each output and group of inputs.

    The weight of output o and input i, in group g, is `scale * code` for 8 bits, `scale * (code - 8)` for 4 bits, and
    `scale * code + minimum` for 4 bits with a minimum.

    Attributes:
        codes: 8 bits: int8 [in, out]. 4 bits: uint8 [in, ceil(out / 32) * 16]; byte b of each 16 holds output b of 32
            in its low half and output 16 + b in its high half.
        scales: [groups, out], float32 if all inputs are one group and float16 otherwise.
        minimum: float16 [groups, out], or None.
        format: what these are.

    Raises:
        ValueError: the tensors do not fit together.

    Example:
        >>> quantized = quantize(torch.tensor([[1.0, -0.5], [0.0, 2.54]]), "int8")
        >>> quantized.codes.tolist()
        [[127, 0], [-64, 127]]
        >>> quantized
        QuantizedWeight(int8, 2 inputs, 2 outputs, 12 bytes)
    """

    codes: Tensor
    scales: Tensor
    minimum: Tensor | None
    format: WeightFormat

    def __post_init__(self) -> None:
        dtype = torch.int8 if self.format.bits == 8 else torch.uint8
        _check("codes", self.codes, dtype, None)
        _check("scales", self.scales, self.format.scale_dtype, (self.format.groups(self.in_features), None))
        _check("codes", self.codes, dtype, (None, _width(self.out_features, self.format)))
        if (self.minimum is not None) != self.format.zero_point:
            raise ValueError(f"{self.format} has {'a' if self.format.zero_point else 'no'} minimum")
        if self.minimum is not None:
            _check("minimum", self.minimum, torch.float16, tuple(self.scales.shape))

    @property
    def in_features(self) -> int:
        """Inputs of the layer."""
        return self.codes.shape[0]

    @property
    def out_features(self) -> int:
        """Outputs of the layer."""
        return self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minimums."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.minimum is None else self.minimum.nbytes)

    def unpacked(self) -> Tensor:
        """The codes one to a byte, [in, out]: int8, or uint8 from 0 to 15."""
        return self.codes if self.format.bits == 8 else unpack(self.codes, self.out_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, [out, in], computed in float32."""
        return dequantize(self.codes, self.scales, self.minimum, self.format.group_size or 0, dtype)

    def equals(self, other: QuantizedWeight) -> bool:
        """Whether both hold the same codes and scales in the same format."""
        pairs = ((self.codes, other.codes), (self.scales, other.scales), (self.minimum, other.minimum))
        return self.format == other.format and all(
            mine is theirs or (mine is not None and theirs is not None and torch.equal(mine, theirs))
            for mine, theirs in pairs
        )

    def __repr__(self) -> str:
        sizes = f"{self.in_features} inputs, {self.out_features} outputs, {self.nbytes} bytes"
        return f"{type(self).__name__}({self.format}, {sizes})"


def empty_weight(
    out_features: int, in_features: int, format: str | WeightFormat, device: torch.device | str | None = None
) -> QuantizedWeight:
    """A `QuantizedWeight` of that shape with whatever memory held, to load one into."""
    format = WeightFormat.parse(format)
    codes_dtype = torch.int8 if format.bits == 8 else torch.uint8
    codes = torch.empty(in_features, _width(out_features, format), dtype=codes_dtype, device=device)
    scales = torch.empty(format.groups(in_features), out_features, dtype=format.scale_dtype, device=device)
    return QuantizedWeight(codes, scales, torch.empty_like(scales) if format.zero_point else None, format)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...] | None) -> None:
    if tensor.dtype != dtype or tensor.dim() != 2:
        raise ValueError(f"{name} of {tensor.dtype} and {tensor.dim()} dimensions; expected a matrix of {dtype}")
    if shape is not None and any(want not in (None, have) for want, have in zip(shape, tensor.shape, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} of shape {list(tensor.shape)}; expected [{wanted}]")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous")


def _width(out_features: int, format: WeightFormat) -> int:
    """Bytes of the codes of one input."""
    return out_features if format.bits == 8 else -(-out_features // _LANES) * (_LANES // 2)


def pack(codes: Tensor, padding: int = 0) -> Tensor:
    """4 bit codes two to a byte, as `QuantizedWeight` holds them.

    Args:
        codes: uint8 [in, out], from 0 to 15.
        padding: the code of the outputs that fill up the last 32.

    Returns:
        uint8 [in, ceil(out / 32) * 16].

    Example:
        >>> unpack(pack(torch.tensor([[3, 15, 0]], dtype=torch.uint8)), 3)
        tensor([[ 3, 15,  0]], dtype=torch.uint8)
    """
    rows, out = codes.shape
    halves = F.pad(codes, (0, -out % _LANES), value=padding).view(rows, -1, 2, _LANES // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(rows, -1)


def unpack(packed: Tensor, out_features: int) -> Tensor:
    """What `pack` was given: uint8 [in, out_features] of uint8 [in, ceil(out_features / 32) * 16]."""
    return unpack_nibbles(packed, out_features).contiguous()


_LANES = NIBBLES


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
        weight: [out, in], of any floating-point dtype.
        format: a `WeightFormat` or its name.
        second_moments: E[x_i^2] of each input, [in]: how much its weights' errors count. Inputs that hardly ever differ
            from zero count a thousandth of the mean. None: all alike. 8 bit scales do not depend on it.
        hessian: E[x_i x_j], [in, in], for GPTQ; takes the place of `second_moments`. See `input_hessians`. Half of what
            is off the diagonal is believed.
        minimise: choose 4 bit scales that minimise the error; else by the largest magnitude, or the range, of a group,
            as 8 bit ones are.

    Returns:
        A `QuantizedWeight` on the weight's device. No group's error is larger than with `minimise=False`, except for
        GPTQ, which minimises the error of the output.

    Raises:
        ValueError: an unknown format, shapes that do not fit, NaN or infinity in an argument, or weights so large that
            float16 holds no scale for them.

    Example:
        >>> weight = torch.tensor([[1.0, -0.5, 0.25, 0.125]])
        >>> quantize(weight, "int4-g32").dequantize().tolist()
        [[1.0, -0.5, 0.25, 0.125]]
    """
    format = WeightFormat.parse(format)
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
    codes = torch.empty(size, _width(out, format), dtype=dtype, device=weight.device)
    with torch.no_grad():
        for inputs, outputs in _panels(out, size, group, whole=upper is not None):
            w = weight[outputs, inputs].float().T
            columns = w.shape[1]
            w = F.pad(w, (0, -columns % _LANES)).contiguous()  # sums over other widths could be rounded otherwise
            if not bool(w.isfinite().all()):
                raise ValueError("the weight holds NaN or infinity")
            groups = slice(inputs.start // group, -(-inputs.stop // group))
            if upper is None:
                grouped, m = _grouped(w, importance[inputs], group)
                scale, low = _fit(grouped, m, format, minimise)
                panel = _encode(grouped, scale[:, None], _wide(low), format)
                panel = panel.view(-1, w.shape[1])[: len(w)]
            else:
                panel, scale, low = _gptq(w.clone(), upper, importance, format, minimise)
            scales[groups, outputs] = scale[:, :columns].to(format.scale_dtype)
            if minimum is not None and low is not None:
                minimum[groups, outputs] = low[:, :columns].half()
            stored = _stored(panel, format)[:, : _width(columns, format)]
            start = outputs.start * _width(_LANES, format) // _LANES
            codes[inputs, start : start + stored.shape[1]] = stored
    return QuantizedWeight(codes, scales, minimum, format)


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
    tall = max(entries // min(wide, size) // _LANES, 1) * _LANES
    for first in range(0, out, tall):
        for start in range(0, size, wide):
            yield slice(start, min(start + wide, size)), slice(first, min(first + tall, out))


_PANEL_INPUTS = 128
_PANEL = 2**17  # entries: 512 KB in float32, so that the passes over a panel find it in the cache
_WHOLE_PANEL = 2**24  # 64 MB; fewer panels for GPTQ, which goes through one input by input
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
    w: Tensor, upper: Tensor, importance: Tensor, format: WeightFormat, minimise: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [in, out], scale and minimum [groups, out] of `w` [in, out], which is overwritten."""
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
                scale, low = _fit(*_grouped(w[at], importance[at], group), format, minimise)
                scales.append(scale)
                minimums.append(low)
            codes[index] = _encode(w[index], scale[0], None if low is None else low[0], format)
            error = w[index] - _decode(codes[index], scale[0], None if low is None else low[0])
            error /= upper[index, index]
            w[index + 1 : stop].addr_(upper[index, index + 1 : stop], error, alpha=-1)
            errors[index - start] = error
        w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    minimum = torch.cat([low for low in minimums if low is not None]) if format.zero_point else None
    return codes, torch.cat(scales), minimum


_BLOCK = 128


def second_moments_of(calibration: Calibration) -> dict[str, Tensor]:
    """E[x_i^2] of each input, float32 [in], by site: for `quantize`.

    Example:
        >>> from deadband import calibrate
        >>> calibration = calibrate(nn.Sequential(nn.Linear(2, 1)), [torch.tensor([[1.0, 2.0]])], progress=False)
        >>> second_moments_of(calibration)
        {'0': tensor([1., 4.])}
    """
    return {
        name: torch.from_numpy(site.sum_of_squares / site.rows.clip(1)).float()
        for name, site in calibration.sites.items()
    }


def input_hessians(
    model: nn.Module, batches: Iterable[Any], sites: Iterable[str], *, memory: int = 2 * 2**30, progress: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """E[x_i x_j] over the tokens that each site sees, float32 [in, in], one site after the other: for `quantize`.

    Sites that are given the same tensor in the first batch (q, k and v; gate and up) get the same result. The model has
    to stay as it is until the last site.

    Args:
        model: any module; the batches run through it in eval mode, once for finding such sites (the first batch only)
            and as often as `memory` makes it necessary.
        batches: as for `deadband.calibrate`.
        sites: names, as `deadband.sites.find_sites` gives them.
        memory: bytes that the results of one pass may take. A site that alone takes more gets a pass of its own.
        progress: show a progress bar on a terminal.

    Yields:
        Pairs of name and matrix.

    Raises:
        ValueError: no batch, or sites that were never reached; all of them are named.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> dict(input_hessians(model, [torch.tensor([[1.0, 2.0]])], ["0"]))
        {'0': tensor([[1., 2.],
                [2., 4.]])}
    """
    batches, names = taken(batches), list(sites)
    shared = _SharedInputs()
    shared.watch(model, batches[:1], names, "look", False)
    followers: dict[str, list[str]] = {}
    for name in names:
        followers.setdefault(shared.leaders.get(name, name), []).append(name)
    asked = names  # the first pass tells of all that are never reached
    for leaders in _passes({name: shape_of(model.get_submodule(name))[1] for name in followers}, memory):
        watcher = _Hessians(leaders)
        watcher.watch(model, batches, asked or leaders, "hessians", progress)
        require_reached(asked, {name for name, rows in watcher.rows_seen.items() if rows})
        asked = []
        for leader in leaders:
            total = watcher.sums.pop(leader).div_(watcher.rows_seen[leader])
            for name in followers[leader]:
                yield name, total
            del total


def _passes(sizes: dict[str, int], memory: int) -> Iterator[list[str]]:
    names: list[str] = []
    used = 0
    for name, size in sizes.items():
        needed = 4 * size * size
        if names and used + needed > memory:
            yield names
            names, used = [], 0
        names.append(name)
        used += needed
    if names:
        yield names


class _SharedInputs(InputWatcher):
    """Which site was the first to be given the tensor that a site is given."""

    def __init__(self) -> None:
        super().__init__()
        self.leaders: dict[str, str] = {}

    def see(self, name: str, x: Tensor) -> None:
        self.leaders.setdefault(name, self.look(name, x, lambda rows: name))


class _Hessians(InputWatcher):
    """Sums of the products of every two entries of a row; rows with NaN or infinity are left out."""

    def __init__(self, wanted: Sequence[str]) -> None:
        super().__init__()
        self.wanted = frozenset(wanted)
        self.sums: dict[str, Tensor] = {}
        self.rows_seen: dict[str, int] = {}

    def see(self, name: str, x: Tensor) -> None:
        rows = self.rows(name, x).float()
        rows = rows[rows.isfinite().all(-1)]
        self.rows_seen[name] = self.rows_seen.get(name, 0) + len(rows)
        if name not in self.wanted:
            return
        if name not in self.sums:
            self.sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.sums[name].addmm_(rows.T, rows)
