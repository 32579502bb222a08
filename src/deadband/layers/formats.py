"""Formats of weights of 8 and 4 bits, and how codes are packed."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from deadband.ops.linear import NIBBLES, dequantize, unpack_nibbles

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

    The weights of experts, [experts, out, in], are one, too: each of its tensors then has a dimension more in front.

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
        >>> quantized = deadband.quantization.quantize(torch.tensor([[1.0, -0.5], [0.0, 2.54]]), "int8")
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
        experts = self.codes.shape[:-2]
        _check("scales", self.scales, self.format.scale_dtype, (*experts, self.format.groups(self.in_features), None))
        _check("codes", self.codes, dtype, (*experts, None, code_width(self.out_features, self.format)))
        if (self.minimum is not None) != self.format.zero_point:
            raise ValueError(f"{self.format} has {'a' if self.format.zero_point else 'no'} minimum")
        if self.minimum is not None:
            _check("minimum", self.minimum, torch.float16, tuple(self.scales.shape))

    @property
    def in_features(self) -> int:
        """Inputs of the layer."""
        return self.codes.shape[-2]

    @property
    def out_features(self) -> int:
        """Outputs of the layer."""
        return self.scales.shape[-1]

    @property
    def experts(self) -> int | None:
        """How many experts' weights these are, or None for that of a linear layer."""
        return self.codes.shape[0] if self.codes.dim() == 3 else None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minimums."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.minimum is None else self.minimum.nbytes)

    def unpacked(self) -> Tensor:
        """The codes one to a byte, [in, out]: int8, or uint8 from 0 to 15."""
        if self.format.bits == 8:
            return self.codes
        return unpack(self.codes.flatten(0, -2), self.out_features).view(*self.codes.shape[:-1], self.out_features)

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
        experts = "" if self.experts is None else f"{self.experts} experts, "
        sizes = f"{experts}{self.in_features} inputs, {self.out_features} outputs, {self.nbytes} bytes"
        return f"{type(self).__name__}({self.format}, {sizes})"


def empty_weight(
    out_features: int,
    in_features: int,
    format: str | WeightFormat,
    device: torch.device | str | None = None,
    experts: int | None = None,
) -> QuantizedWeight:
    """A `QuantizedWeight` of that shape with whatever memory held, to load one into."""
    format = WeightFormat.parse(format)
    codes_dtype = torch.int8 if format.bits == 8 else torch.uint8
    first = () if experts is None else (experts,)
    codes = torch.empty(*first, in_features, code_width(out_features, format), dtype=codes_dtype, device=device)
    scales = torch.empty(*first, format.groups(in_features), out_features, dtype=format.scale_dtype, device=device)
    return QuantizedWeight(codes, scales, torch.empty_like(scales) if format.zero_point else None, format)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...] | None) -> None:
    if tensor.dtype != dtype or tensor.dim() not in (2, 3):
        raise ValueError(f"{name} of {tensor.dtype} and {tensor.dim()} dimensions; expected a matrix of {dtype}")
    if shape is not None and (
        tensor.dim() != len(shape)
        or any(want not in (None, have) for want, have in zip(shape, tensor.shape, strict=True))
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} of shape {list(tensor.shape)}; expected [{wanted}]")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous")


def code_width(out_features: int, format: WeightFormat) -> int:
    """Bytes of the codes of one input."""
    return out_features if format.bits == 8 else -(-out_features // LANES) * (LANES // 2)


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
    halves = F.pad(codes, (0, -out % LANES), value=padding).view(rows, -1, 2, LANES // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(rows, -1)


def unpack(packed: Tensor, out_features: int) -> Tensor:
    """What `pack` was given: uint8 [in, out_features] of uint8 [in, ceil(out_features / 32) * 16]."""
    return unpack_nibbles(packed, out_features).contiguous()


LANES = NIBBLES
