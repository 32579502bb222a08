"""The operators of experts against float64, expert by expert, on every instruction set that this machine runs."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import math
import mmap
import multiprocessing
import struct

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from operators import (
    ALL,
    DTYPES,
    ISAS,
    allowed_error,
    before_a_wall,
    check_product,
    compiled,
    error_against_float64,
    instruction_set,
    parts_of,
    random_weight,
)
from torch import Tensor
from torch.nn import functional as F

from deadband.layers.formats import FORMATS, QuantizedWeight
from deadband.ops import cpu, experts, kernels
from deadband.ops.cpu import SPARSE_ROWS
from deadband.ops.experts import FEW_ROWS, expert_linear, expert_mlp
from deadband.ops.skipping import fill, keep_mask, score
from deadband.running.forward import threads

PLAIN = None
FORMS = (PLAIN, *FORMATS)
SOME_FORMS = (PLAIN, "int8", "int4-g32-zp")


@dataclasses.dataclass(eq=False)
class Projection:
    """What the operators take of one projection, and its experts one by one."""

    weight: Tensor
    scales: Tensor | None
    minimum: Tensor | None
    bias: Tensor | None
    group_size: int
    threshold: Tensor | None
    scale: Tensor | None
    center: Tensor | None
    offset: Tensor | None
    relative: bool
    each: list[Tensor | QuantizedWeight]
    shape: tuple[int, int]

    @property
    def parts(self) -> list[Tensor | None]:
        rule = (self.threshold, self.scale, self.center, self.offset)
        return [self.weight, self.scales, self.minimum, self.bias, *rule]

    def __call__(self, x, experts, sparse_rows=ALL, counts=None):
        before, rule = self.parts[:4], self.parts[4:]
        return expert_linear(x, experts, *before, self.group_size, *rule, self.relative, sparse_rows, counts)

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def matrix(self, expert):
        """Float64 [out, in]."""
        own = self.each[expert]
        return own.double() if isinstance(own, Tensor) else sum(parts_of(own)).T


def projection(
    inputs, outputs, form=PLAIN, dtype=torch.float32, *, count=3, bias=True, threshold=None, scaled=False,
    centered=False, relative=False, layout="by input", seed=0,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    if form is PLAIN:
        weight = (random(count, outputs, inputs) / inputs**0.5).to(dtype)
        if layout == "by input":
            weight = weight.mT.contiguous().mT
        elif layout == "padded":
            weight = F.pad(weight.mT, (0, 3)).contiguous()[..., :outputs].mT
        each, scales, minimum, size = list(weight), None, None, 0
    else:
        each = [random_weight(inputs, outputs, form, 31 * seed + index) for index in range(count)]
        weight, scales = (torch.stack([getattr(own, name) for own in each]) for name in ("codes", "scales"))
        minimum = torch.stack([own.minimum for own in each]) if form.endswith("-zp") else None
        size = each[0].format.group_size or 0
    if relative and threshold is not None and threshold > 0:
        threshold *= inputs**-0.5  # so that a part is kept, not all
    made = Projection(
        weight, scales, minimum, random(count, outputs).to(dtype) if bias else None, size,
        None if threshold is None else torch.tensor(threshold), random(inputs).abs() + 0.5 if scaled else None,
        random(inputs).to(dtype).float() if centered else None, None, relative, each,
        (outputs, inputs),
    )  # fmt: skip
    if made.center is not None:
        products = [made.matrix(expert) @ made.center.double() for expert in range(count)]
        made.offset = torch.stack(products).float()
    return made


def inputs_of(rows, inputs, count, dtype=torch.float32, *, seed=0, none=True):
    """Rows with a few large entries, and the expert of each, some of them none."""
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(rows, inputs, generator=generator)
    x = (x * torch.randn(rows, inputs, generator=generator).exp()).to(dtype)
    return x, torch.randint(-1 if none else 0, count, (rows,), generator=generator)


def pieces(experts):
    """The rows that are multiplied together: those of one expert, as many as the kernel takes at a time."""
    for expert in range(max([-1, *experts.tolist()]) + 1):
        rows = (experts == expert).nonzero().squeeze(1)
        for piece in rows.split(SPARSE_ROWS) if len(experts) <= FEW_ROWS else [rows]:
            if len(piece):
                yield expert, piece


def check(x, experts, own, sparse_rows=ALL):
    """What the operator gives, expert by expert, and what it counts."""
    if (
        own.threshold is not None and len(x) <= sparse_rows and own.relative and x.numel()
    ):  # another order of summing a norm must not decide whether an entry is kept
        ratio = score(x, own.scale, own.center) / x.float().norm(dim=-1, keepdim=True)
        assume(own.threshold <= 0 or bool(((ratio / own.threshold - 1).abs() > 1e-5).all()))
    skips = own.threshold is not None and len(x) <= sparse_rows
    counts = torch.tensor([5, 6, 7])  # added to, not set
    y = own(x, experts, sparse_rows, counts)
    check_result(
        y, [each - before for each, before in zip(counts.tolist(), (5, 6, 7), strict=True)], x, experts, own, skips
    )
    return y


def check_result(y, counts, x, experts, own, skips):
    """Outputs and counts of a call, expert by expert."""
    outputs = own.shape[0]
    assert (y.shape, y.dtype, y.is_contiguous()) == ((len(x), outputs), x.dtype, True)
    assert not bool(y[experts < 0].any())
    keep = torch.ones_like(x, dtype=torch.bool)
    counted = [0, 0, 0]
    if skips:
        keep = keep_mask(x, own.threshold, own.scale, own.center, own.relative)
        chosen = experts >= 0
        counted = [int((~keep[chosen]).sum()), keep[chosen].numel(), int((~x[chosen].isfinite()).sum())]
    assert counts == counted
    masked = torch.where(keep, x, 0 if own.center is None else own.center.to(x.dtype))
    for expert, rows in pieces(experts):
        bias = None if own.bias is None else own.bias[expert]
        weight = own.each[expert]
        if isinstance(weight, Tensor):
            assert error_against_float64(y[rows], masked[rows], weight, bias) <= allowed_error(
                masked[rows], weight, bias
            )
            continue
        constants = [torch.zeros(outputs, dtype=torch.float64) if bias is None else bias.double()]
        multiplied, kept = x[rows].double(), torch.ones(x.shape[1], dtype=torch.bool)
        if skips and len(rows) > SPARSE_ROWS:  # then the skipping takes torch, and the product all inputs
            multiplied = fill(x[rows], keep[rows], own.center).double()
        elif skips:
            kept = keep[rows].any(0)
            center = 0 if own.center is None else own.center.double()
            multiplied = torch.where(keep[rows], multiplied - center, 0)
            if own.center is not None:
                constants.append(own.matrix(expert) @ center)
        check_product(y[rows], multiplied, weight, kept, constants)


# ---------------------------------------------------------------------------------------------------- one projection


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.one_of(st.integers(0, 9), st.sampled_from([13, 40, FEW_ROWS - 1, FEW_ROWS, FEW_ROWS + 1, 130])),
    inputs=st.sampled_from([1, 2, 31, 33, 64, 130]),
    outputs=st.sampled_from([1, 2, 31, 33, 63, 128, 130, 257, 520]),
    count=st.sampled_from([1, 2, 5]),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["by input", "by output", "padded"]),
    rule=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    bias=st.booleans(),
    threshold=st.sampled_from([None, -1.0, 0.0, 0.3, 0.7, 2.0, 1e6]),
    number=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**30),
)
def test_each_row_meets_its_expert(
    isa, rows, inputs, outputs, count, form, dtype, layout, rule, bias, threshold, number, seed
):
    scaled, centered, relative = rule
    own = projection(
        inputs, outputs, form, dtype, count=count, bias=bias, threshold=threshold, scaled=scaled, centered=centered,
        relative=relative, layout=layout, seed=seed,
    )  # fmt: skip
    x, chosen = inputs_of(rows, inputs, count, dtype, seed=seed)
    with instruction_set(isa), threads(number):
        check(x, chosen, own)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", SOME_FORMS)
def test_large_projections_with_several_threads(isa, form):
    own = projection(500, 900, form, threshold=0.5, scaled=True, centered=True)
    x, chosen = inputs_of(14, 500, 3)
    with instruction_set(isa), threads(3):
        check(x, chosen, own)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", SOME_FORMS)
def test_all_rows_of_one_expert_of_none_and_of_nothing(isa, form):
    own = projection(70, 90, form, threshold=0.4, count=3)
    with instruction_set(isa):
        for rows in (0, 1, 8, 9, 17, 128, 130):
            x, _ = inputs_of(rows, 70, 3)
            check(x, torch.full((rows,), 2), own)
            check(x, torch.full((rows,), -1), own)


@pytest.mark.parametrize("form", SOME_FORMS)
@pytest.mark.parametrize("rows", [3, FEW_ROWS + 2])
def test_every_negative_number_is_none(rows, form):
    own = projection(40, 33, form, threshold=0.4)
    x, chosen = inputs_of(rows, 40, 3, none=False)
    other = chosen.clone()
    chosen[1:3], other[1:3] = -1, torch.tensor([-2, -(1 << 40)])
    counts, expected = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    y = own(x, chosen, ALL, expected)
    assert torch.equal(own(x, other, ALL, counts), y)
    assert counts.tolist() == expected.tolist()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [PLAIN, "int8"])
@pytest.mark.parametrize("rows", [1, 2, 9, FEW_ROWS + 1])
def test_an_entry_at_the_threshold_is_skipped(isa, dtype, form, rows):
    own = projection(6, 6, form, dtype, bias=False, threshold=0.5)
    x = torch.tensor([0.5, -0.5, 0.50390625, -0.25, 0.0, -0.0]).to(dtype).repeat(rows, 1)
    with instruction_set(isa):
        counts = torch.zeros(3, dtype=torch.int64)
        y = own(x, torch.ones(rows, dtype=torch.int64), ALL, counts)
    assert counts.tolist() == [5 * rows, 6 * rows, 0]
    expected = (0.50390625 * own.matrix(1)[:, 2]).expand_as(y)
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", SOME_FORMS)
@pytest.mark.parametrize("rows", [4, 30, FEW_ROWS + 1])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_surfaces_in_its_row_alone(isa, dtype, form, rows, value):
    own = projection(70, 40, form, dtype, threshold=0.8)
    x, chosen = inputs_of(rows, 70, 3, dtype)
    chosen[0], chosen[1] = 1, -1
    x[0, 33] = x[1, 5] = value
    counts = torch.zeros(3, dtype=torch.int64)
    with instruction_set(isa):
        y = own(x, chosen, ALL, counts)
    assert not bool(y[0].isfinite().any())
    assert bool(y[1:].isfinite().all())
    assert not bool(y[1].any())
    assert counts[2] == 1  # nobody looks at the row without an expert
    if form is PLAIN and math.isinf(value):
        column = own.each[1][:, 33]
        assert torch.equal(y[0].signbit(), ~column.signbit())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 12, FEW_ROWS + 1])
def test_weights_of_skipped_inputs_and_other_experts_are_never_met(isa, rows):
    own = projection(64, 48, threshold=0.2, count=4)
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
    x[:, ::2] = 0.1
    chosen = torch.arange(rows) % 2 * 2  # the experts 0 and 2
    with instruction_set(isa):
        expected = own(x, chosen)
        if rows <= FEW_ROWS:  # beyond, a product of all inputs
            own.weight[:, :, ::2] = math.nan
        own.weight[1::2] = math.nan
        own.bias[1::2] = math.nan
        assert torch.equal(own(x, chosen), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", SOME_FORMS)
def test_the_same_bits_on_every_run(isa, form):
    own = projection(400, 700, form, threshold=0.6)
    x, chosen = inputs_of(9, 400, 3)
    for number in (1, 2):
        with instruction_set(isa), threads(number):
            results = [own(x, chosen) for _ in range(5)]
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("form", SOME_FORMS)
@pytest.mark.parametrize("rows", [5, FEW_ROWS + 1])
def test_rows_beyond_the_limit_are_dense_and_not_counted(form, rows):
    own = projection(40, 30, form, threshold=1e6, centered=True)
    x, chosen = inputs_of(rows, 40, 3)
    check(x, chosen, own, sparse_rows=rows)
    check(x, chosen, own, sparse_rows=rows - 1)
    dense = dataclasses.replace(own, threshold=None)
    assert torch.equal(own(x, chosen, rows - 1), dense(x, chosen))


@pytest.mark.parametrize("form", SOME_FORMS)
@pytest.mark.parametrize("rows", [6, FEW_ROWS + 2])
def test_operands_that_are_not_contiguous(form, rows):
    own = projection(64, 33, form, threshold=0.5)
    x, chosen = inputs_of(rows, 64, 3)
    expected = own(x, chosen)
    strided = torch.empty(2 * rows, 128)[::2, ::2].copy_(x)
    names = torch.stack([chosen, chosen + 1], 1)[:, 0]
    assert not strided.is_contiguous()
    assert not names.is_contiguous()
    assert torch.equal(own(strided, names), expected)
    other = dataclasses.replace(own, bias=own.bias.t().contiguous().t())
    check(x, chosen, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("form", SOME_FORMS)
def test_other_dtypes(dtype, form):
    own = projection(64, 33, form, dtype, threshold=0.5, scaled=True)
    for rows in (3, 20, FEW_ROWS + 1):
        x, chosen = inputs_of(rows, 64, 3, dtype)
        counts = torch.zeros(3, dtype=torch.int64)
        y = own(x, chosen, ALL, counts)
        keep = keep_mask(x, own.threshold, own.scale)
        assert counts.tolist() == [int((~keep[chosen >= 0]).sum()), int((chosen >= 0).sum()) * 64, 0]
        masked = torch.where(keep, x, 0).double()
        exact = torch.zeros(rows, 33, dtype=torch.float64)
        for expert in range(3):
            at = chosen == expert
            exact[at] = masked[at] @ own.matrix(expert).T + own.bias[expert].double()
        tolerance = 2e-2 if form == "int4-g32-zp" else 2e-3 if dtype is torch.float16 else 1e-6
        torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))
        assert y.dtype is dtype


@pytest.mark.parametrize("form", SOME_FORMS)
@pytest.mark.parametrize("rows", [3, 200])
def test_exact_products_leave_x_as_it_is(form, rows):
    own = projection(64, 33, form, threshold=0.5)
    x, chosen = inputs_of(rows, 64, 3)
    with cpu.exact_products():
        y = own(x, chosen).double()
    for expert in range(3):
        at = chosen == expert
        exact = torch.where(x[at].abs() > 0.5, x[at], 0).double() @ own.matrix(expert).T + own.bias[expert].double()
        torch.testing.assert_close(y[at], exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()) if len(exact) else 0)


@pytest.mark.parametrize("form", SOME_FORMS)
@pytest.mark.parametrize("rows", [5, FEW_ROWS + 1])
@pytest.mark.parametrize("centered", [False, True])
def test_the_reference_means_the_same(form, rows, centered):
    own = projection(64, 40, form, threshold=0.5, scaled=True, centered=centered, relative=True)
    x, chosen = inputs_of(rows, 64, 3)
    counts, expected = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    arguments = (own.group_size, *own.parts[4:], True, ALL)
    meant = experts.expert_linear_reference(x, chosen, *own.parts[:4], *arguments, expected)
    y = own(x, chosen, ALL, counts)
    tolerance = 2e-2 if form == "int4-g32-zp" else 1e-4
    torch.testing.assert_close(y, meant, rtol=0, atol=tolerance * float(meant.abs().max()))
    assert counts.tolist() == expected.tolist()


@pytest.mark.parametrize(("rows", "dtype"), [(3, torch.bfloat16), (FEW_ROWS + 1, torch.float32)])
@pytest.mark.parametrize("form", SOME_FORMS)
@pytest.mark.parametrize("ruled", [False, True])
def test_opcheck(dtype, form, rows, ruled):
    own = projection(40, 24, form, dtype, threshold=0.5 if ruled else None, scaled=ruled, centered=ruled, bias=ruled)
    x, chosen = inputs_of(rows, 40, 3, dtype)
    counts = torch.zeros(3, dtype=torch.int64) if ruled else None
    rest = (own.group_size, *own.parts[4:], False, ALL, counts)
    torch.library.opcheck(expert_linear, (x, chosen, *own.parts[:4], *rest))
    up, down = mlp_of(40, 24, 40, form, dtype, 0.5 if ruled else None)
    shares = torch.rand(rows, 1)
    arguments = [[*up.parts, *down.parts], [up.group_size, down.group_size], [False, False], ALL]
    counted = [torch.zeros(3, dtype=torch.int64) for _ in range(2)] if ruled else []
    torch.library.opcheck(expert_mlp, (x, chosen[:, None], shares, *arguments, counted, "silu"))


@pytest.mark.parametrize("form", SOME_FORMS)
@pytest.mark.parametrize("rows", [3, FEW_ROWS + 1])
def test_operands_that_do_not_fit_raise(form, rows):
    own = projection(64, 40, form, threshold=0.5)
    x, chosen = inputs_of(rows, 64, 3)
    own(x, chosen)
    beyond = chosen.clone()
    beyond[1] = 3
    changes = [{"bias": own.bias[:, :39]}, {"threshold": torch.zeros(3)}, {"scale": torch.ones(3)}]
    changes += [{"center": torch.ones(3), "offset": torch.ones(3, 40)}]
    for change in changes:
        with pytest.raises(RuntimeError):
            dataclasses.replace(own, **change)(x, chosen)
    for entries, names, counts in [
        (x[:, :63], chosen, None),
        (x, beyond, None),
        (x, chosen, torch.zeros(2, dtype=torch.int64)),
        (x, chosen, torch.zeros(3)),
    ]:
        with pytest.raises((RuntimeError, IndexError)):
            own(entries, names, ALL, counts)
    if form is PLAIN:
        with pytest.raises(RuntimeError):
            own(x.bfloat16(), chosen)


@compiled
@pytest.mark.parametrize("form", SOME_FORMS)
@pytest.mark.parametrize("wrong", ["int32", "short", "long", "matrix"])
def test_experts_that_do_not_fit_raise(form, wrong):
    own = projection(64, 40, form, threshold=0.5)
    x = torch.randn(4, 64)
    room = torch.zeros(64, dtype=torch.int64)  # so that what is read beyond the end is still memory
    chosen = {"int32": room.int()[:4], "short": room[:2], "long": room[:5], "matrix": room[:8].view(4, 2)}[wrong]
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        own(x, chosen)


# ------------------------------------------------------------------------------------------------------- whole MLPs


def mlp_of(inputs, inner, outputs, form=PLAIN, dtype=torch.float32, threshold=None, **options):
    options = {"count": 3, "threshold": threshold, **options}
    seed = options.pop("seed", 0)
    return (
        projection(inputs, 2 * inner, form, dtype, seed=seed, **options),
        projection(inner, outputs, form, dtype, seed=seed + 1, **options),
    )


def mixed(x, chosen, shares, up, down, activation="silu", sparse_rows=ALL, counts=()):
    parts, sizes = [*up.parts, *down.parts], [up.group_size, down.group_size]
    return expert_mlp(
        x, chosen, shares, parts, sizes, [up.relative, down.relative], sparse_rows, list(counts), activation
    )  # fmt: skip


def routed(tokens, each, count, seed=0):
    generator = torch.Generator().manual_seed(seed + 2)
    chosen = torch.randint(-1, count, (tokens, each), generator=generator)
    return chosen, torch.rand(tokens, each, generator=generator)


def activated(gate, activation):
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def composed(x, chosen, shares, up, down, activation, sparse_rows, counts):
    """Projection by projection, on the operator of one, whose results are of the dtype of x."""
    tokens, each = chosen.shape
    rows = min(sparse_rows, ALL) * each
    gate, other = up(x.repeat_interleave(each, 0), chosen.reshape(-1), rows, counts[0]).chunk(2, -1)
    hidden = activated(gate.double(), activation).to(x.dtype) * other
    y = down(hidden, chosen.reshape(-1), rows, counts[1]).double()
    kept = torch.where(chosen >= 0, shares.double(), 0).view(-1, 1)
    return (y * kept).view(tokens, each, y.shape[1]).sum(1), hidden


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=20, deadline=None)
@given(
    tokens=st.sampled_from([1, 2, 3, 5, 9, 16, 33, 43, 44, 60]),
    each=st.sampled_from([1, 2, 3]),
    inputs=st.sampled_from([1, 31, 64, 130]),
    inner=st.sampled_from([1, 31, 48, 65]),
    outputs=st.sampled_from([1, 33, 64, 130, 257]),
    forms=st.tuples(st.sampled_from(FORMS), st.sampled_from(FORMS)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["by input", "by output"]),
    rule=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    bias=st.booleans(),
    threshold=st.sampled_from([None, 0.0, 0.3, 1.0]),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
    limited=st.booleans(),
    number=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**30),
)
def test_mixtures_are_what_their_projections_make(
    isa, tokens, each, inputs, inner, outputs, forms, dtype, layout, rule, bias, threshold, activation, limited, number,
    seed,
):  # fmt: skip
    scaled, centered, relative = rule
    rest = {"threshold": threshold, "scaled": scaled, "centered": centered, "relative": relative, "bias": bias}
    up, _ = mlp_of(inputs, inner, outputs, forms[0], dtype, layout=layout, seed=seed, **rest)
    _, down = mlp_of(inputs, inner, outputs, forms[1], dtype, layout=layout, seed=seed, **rest)
    x, _ = inputs_of(tokens, inputs, 3, dtype, seed=seed)
    chosen, shares = routed(tokens, each, 3, seed)
    limit = tokens - 1 if limited else tokens
    found, wanted = ([torch.tensor([5, 6, 7]) for _ in range(2)] for _ in range(2))
    with instruction_set(isa), threads(number):
        expected, hidden = composed(x, chosen, shares, up, down, activation, limit, wanted)
        if threshold is not None and not limited:  # how the activation is rounded must not decide what is kept
            norm = hidden.float().norm(dim=-1, keepdim=True) if relative else 1.0
            ratio = score(hidden, down.scale, down.center) / (down.threshold * norm)
            assume(bool(((ratio - 1).abs() > 4 * torch.finfo(dtype).eps).all()))
        y = mixed(x, chosen, shares, up, down, activation, limit, found)
    assert (y.shape, y.dtype, y.is_contiguous()) == ((tokens, outputs), dtype, True)
    assert [each.tolist() for each in found] == [each.tolist() for each in wanted]
    if y.numel():
        size = float(expected.abs().max())
        coarse = 3e-2 if forms[1] and forms[1].startswith("int4") else 1e-3 if forms[1] else 1e-5
        torch.testing.assert_close(
            y.double(), expected, rtol=0, atol=size * (coarse + 4 * torch.finfo(dtype).eps) + 1e-6
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 4, 50])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_mixtures_match_float64(isa, tokens, activation):
    up, down = mlp_of(90, 65, 77, threshold=0.3, scaled=True)
    x, _ = inputs_of(tokens, 90, 3)
    chosen, shares = routed(tokens, 2, 3)
    counts = [torch.zeros(3, dtype=torch.int64) for _ in range(2)]
    exact, seen, skipped, doubtful = torch.zeros(tokens, 77).double(), 0, [0, 0], 0
    for token, place in itertools.product(range(tokens), range(2)):
        expert = int(chosen[token, place])
        if expert < 0:
            continue
        keep = keep_mask(x[token], up.threshold, up.scale)
        skipped[0] += int((~keep).sum())
        gate, other = (up.matrix(expert) @ torch.where(keep, x[token], 0).double() + up.bias[expert]).chunk(2)
        hidden = activated(gate, activation) * other
        scores = hidden.abs() * down.scale
        doubtful += int(((scores / down.threshold - 1).abs() < 1e-4).sum())
        skipped[1] += int((scores <= down.threshold).sum())
        hidden = torch.where(scores > down.threshold, hidden, 0)
        exact[token] += shares[token, place] * (down.matrix(expert) @ hidden + down.bias[expert])
        seen += 1
    with instruction_set(isa):
        y = mixed(x, chosen, shares, up, down, activation, ALL, counts)
    assert counts[0].tolist() == [skipped[0], 90 * seen, 0]
    assert counts[1][1:].tolist() == [65 * seen, 0]
    assert abs(int(counts[1][0]) - skipped[1]) <= doubtful
    assert doubtful < max(5, seen)
    allowed = 1e-5 + 0.5 * doubtful  # an entry at the threshold is worth about a third of a weight
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=allowed if doubtful else 1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize(("form", "layout"), [*((form, "by input") for form in SOME_FORMS), (PLAIN, "by output")])
def test_mixtures_of_no_tokens(form, layout):
    up, down = mlp_of(40, 33, 20, form, threshold=0.2, layout=layout)
    x, chosen, shares = torch.randn(0, 40), torch.zeros(0, 2, dtype=torch.int64), torch.rand(0, 2)
    assert mixed(x, chosen, shares, up, down).shape == (0, 20)


def test_what_has_no_expert_counts_nothing_whatever_its_share():
    up, down = mlp_of(40, 33, 20, threshold=0.2)
    for tokens in (2, FEW_ROWS):
        x, _ = inputs_of(tokens, 40, 3)
        chosen, shares = routed(tokens, 2, 3)
        chosen[0], chosen[1] = torch.tensor([-1, -1]), torch.tensor([1, -1])
        expected = mixed(x, chosen, shares, up, down)
        shares[chosen < 0] = math.nan
        y = mixed(x, chosen, shares, up, down)
        assert torch.equal(y, expected)
        assert not bool(y[0].any())


@pytest.mark.parametrize("form", SOME_FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, FEW_ROWS])
def test_what_is_not_finite_surfaces_in_its_mixture_alone(form, dtype, tokens):
    up, down = mlp_of(40, 33, 20, form, dtype, threshold=0.2)
    x, _ = inputs_of(tokens, 40, 3, dtype)
    chosen, shares = routed(tokens, 2, 3)
    x[0, 3] = math.nan
    chosen[0] = torch.tensor([-1, 2])
    y = mixed(x, chosen, shares, up, down)
    assert bool(y[0].isnan().all())
    assert bool(y[1:].isfinite().all())


@pytest.mark.parametrize("form", SOME_FORMS)
@pytest.mark.parametrize("number", [1, 2])
def test_mixtures_have_the_same_bits_on_every_run(form, number):
    up, down = mlp_of(300, 400, 300, form, threshold=0.2)
    x, _ = inputs_of(4, 300, 3)
    chosen, shares = routed(4, 3, 3)
    with threads(number):
        results = [mixed(x, chosen, shares, up, down) for _ in range(5)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_mixtures_of_operands_that_are_not_contiguous_or_of_another_dtype():
    up, down = mlp_of(64, 33, 20, threshold=0.3)
    x, _ = inputs_of(3, 64, 3)
    chosen, shares = routed(3, 2, 3)
    expected = mixed(x, chosen, shares, up, down)
    strided = torch.empty(6, 128)[::2, ::2].copy_(x)
    assert torch.equal(mixed(strided, chosen.t().contiguous().t(), shares.t().contiguous().t(), up, down), expected)
    narrow = shares.bfloat16()
    assert torch.equal(mixed(x, chosen, narrow, up, down), mixed(x, chosen, narrow.float(), up, down))


@pytest.mark.parametrize("tokens", [3, FEW_ROWS])
def test_mixtures_that_do_not_fit_raise(tokens):
    up, down = mlp_of(64, 33, 20, threshold=0.3)
    x, _ = inputs_of(tokens, 64, 3)
    chosen, shares = routed(tokens, 2, 3)
    beyond = chosen.clone()
    beyond[0, 1] = 3
    wider, _ = mlp_of(64, 34, 20)
    for entries, names, first in [(x[:, :63], chosen, up), (x, beyond, up), (x, chosen, wider)]:
        with pytest.raises((RuntimeError, IndexError)):
            mixed(entries, names, shares, first, down)


@compiled
@pytest.mark.parametrize("wrong", ["int32", "fewer tokens", "fewer shares", "fewer experts", "counts"])
def test_parts_of_mixtures_that_do_not_fit_each_other_raise(wrong):
    up, down = mlp_of(64, 33, 20, threshold=0.3, count=4)
    x, counts = torch.randn(3, 64), []
    room = torch.zeros(64, dtype=torch.int64)  # so that what is read and written beyond the end is still memory
    chosen, shares = room[:6].view(3, 2), torch.rand(64)[:6].view(3, 2)
    if wrong == "int32":
        chosen = room.int()[:6].view(3, 2)
    elif wrong == "fewer tokens":
        x = torch.randn(64, 64)[:2]
    elif wrong == "fewer shares":
        shares = shares[:2]
    elif wrong == "fewer experts":
        up = dataclasses.replace(up, weight=up.weight[:2], bias=up.bias[:2])
        chosen = chosen + 3
    else:
        counts = [torch.zeros(64)[:3], torch.zeros(64)[:3]]
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        mixed(x, chosen, shares, up, down, counts=counts)


# ------------------------------------------------------------------------------------------------- the C interface


PARTS = ("weight", "scales", "minimum", "bias", "threshold", "scale", "center", "offset")


class Layers:
    """Projections as csrc/kernels.h has them; the tensors stay alive as long as this does."""

    def __init__(self, *projections, place=lambda tensor: tensor):
        self.fields, self.strides, self.counts, self.tensors = [], [], [], {}
        for own in projections:
            placed = {name: None if (part := getattr(own, name)) is None else place(part) for name in PARTS}
            placed["weight"] = place(own.weight if own.scales is not None else own.weight.mT.contiguous())
            self.tensors[len(self.fields)] = placed
            self.counts.append(place(torch.zeros(3, dtype=torch.int64)))
            outputs = own.shape[0]
            at = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in placed.items()}
            self.fields.append(
                {
                    "bits": 0 if own.scales is None else own.each[0].format.bits,
                    "out": outputs,
                    "weight": at["weight"],
                    "weight_stride": outputs if own.scales is None else 0,
                    "scales": at["scales"],
                    "minimum": at["minimum"],
                    "group_size": own.group_size,
                    **{name: at[name] for name in ("bias", "threshold", "scale", "center", "offset")},
                    "relative": own.relative,
                    "counts": self.counts[-1].data_ptr(),
                }
            )
            apart = (placed[name] for name in ("weight", "scales", "minimum", "bias", "offset"))
            self.strides.append([0 if each is None else each[0].nbytes for each in apart])

    def pack(self, index=0, **changes):
        layers = [{**own, **(changes if number == index else {})} for number, own in enumerate(self.fields)]
        packed = b"".join(struct.pack("14q", *own.values()) for own in layers)
        return packed, b"".join(struct.pack("5q", *own) for own in self.strides)


class Call:
    """The arguments of deadband_expert_linear, or with two projections of deadband_expert_mlp, by name."""

    def __init__(self, tokens, each, *projections, dtype=torch.float32, place=lambda tensor: tensor, chosen=None):
        inputs = projections[0].shape[1]
        x, _ = inputs_of(tokens, inputs, 3, dtype)
        routes, shares = routed(tokens, each, len(projections[0].each))
        self.layers = Layers(*projections, place=place)
        packed, strides = self.layers.pack()
        outputs = projections[-1].shape[0]
        self.y = place(torch.full((tokens, outputs), 123.0, dtype=dtype))
        self.arguments = {
            "dtype": kernels.DTYPES[dtype],
            "x": place(x),
            "rows": tokens,
            "x_stride": inputs,
            "inputs": inputs,
            "experts": place(routes if chosen is None else chosen),
            **({"each": each} if len(projections) == 2 else {}),
            "count": len(projections[0].each),
            "layers": packed,
            "strides": strides,
            **({"activation": 0, "shares": place(shares)} if len(projections) == 2 else {}),
            "y": self.y,
            "threads": 1,
        }

    def __call__(self, **changes):
        values = [
            value.data_ptr() if isinstance(value, Tensor) else value for value in (self.arguments | changes).values()
        ]
        name = "deadband_expert_mlp" if "each" in self.arguments else "deadband_expert_linear"
        return getattr(kernels.library, name)(*values)


BAD_DTYPE, BAD_SIZE, BAD_POINTER = -1, -2, -3


@compiled
@pytest.mark.parametrize("whole", [False, True])
def test_bad_arguments_are_refused_and_nothing_is_written(whole):
    up, down = mlp_of(64, 20, 40, "int4-g32-zp", threshold=0.3, scaled=True, centered=True)
    one = projection(64, 40, "int4-g32-zp", threshold=0.3, scaled=True, centered=True)
    call = Call(3, 2, up, down) if whole else Call(3, 1, one)
    many = torch.zeros(1025, dtype=torch.int64)
    beyond = torch.full((3, 2), 3)

    def layers(index=0, **changes):
        return {"layers": call.layers.pack(index, **changes)[0]}

    refused = [
        ({"dtype": 2}, BAD_DTYPE),
        ({"dtype": -1}, BAD_DTYPE),
        (layers(bits=5), BAD_DTYPE),
        ({"rows": -1}, BAD_SIZE),
        ({"rows": 1 << 40}, BAD_SIZE),
        ({"rows": 1025, "experts": many}, BAD_SIZE),
        ({"inputs": -1}, BAD_SIZE),
        ({"inputs": 1 << 40, "x_stride": 1 << 41}, BAD_SIZE),
        ({"x_stride": 63}, BAD_SIZE),
        ({"count": -1}, BAD_SIZE),
        ({"count": 1 << 40}, BAD_SIZE),
        ({"experts": beyond}, BAD_SIZE),
        ({"experts": torch.full((3, 2), (1 << 63) - 1)}, BAD_SIZE),
        (layers(out=-2), BAD_SIZE),
        (layers(group_size=-1), BAD_SIZE),
        ({"x": None}, BAD_POINTER),
        ({"experts": None}, BAD_POINTER),
        ({"layers": None}, BAD_POINTER),
        ({"strides": None}, BAD_POINTER),
        ({"y": None}, BAD_POINTER),
        (layers(weight=0), BAD_POINTER),
        (layers(scales=0), BAD_POINTER),
        (layers(center=0), BAD_POINTER),
        (layers(offset=0), BAD_POINTER),
        (layers(group_size=0), BAD_POINTER),  # a minimum without groups
    ]
    if whole:
        refused += [
            ({"activation": 2}, BAD_DTYPE),
            ({"activation": -1}, BAD_DTYPE),
            ({"each": -1}, BAD_SIZE),
            ({"each": 512, "experts": many}, BAD_SIZE),
            ({"each": 1 << 40}, BAD_SIZE),
            (layers(out=41), BAD_SIZE),
            ({"shares": None}, BAD_POINTER),
            (layers(1, weight=0), BAD_POINTER),
            (layers(1, offset=0), BAD_POINTER),
            (layers(1, bits=3), BAD_DTYPE),
        ]
    for changes, error in refused:
        assert call(**changes) == error, changes
    assert bool((call.y == 123).all())
    assert not any(each.any() for each in call.layers.counts)
    for changes in ({"rows": 0}, {"rows": 0, "x": None, "experts": None, "y": None}, layers(whole, out=0)):
        assert call(**changes) == 0, changes
    assert bool((call.y == 123).all())
    assert call() == 0
    assert not bool((call.y == 123).any())
    assert all(each[1] > 0 for each in call.layers.counts)


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", SOME_FORMS)
def test_as_many_rows_as_the_kernel_takes(isa, form):
    own = projection(33, 40, form, threshold=0.4)
    call = Call(1024, 1, own)
    with instruction_set(isa):
        assert call() == 0
    chosen = call.arguments["experts"].reshape(-1)
    for expert in range(3):
        at = chosen == expert
        keep = keep_mask(call.arguments["x"][at], own.threshold)
        exact = (
            torch.where(keep, call.arguments["x"][at], 0).double() @ own.matrix(expert).T + own.bias[expert].double()
        )
        tolerance = 3e-2 if form == "int4-g32-zp" else 1e-4
        torch.testing.assert_close(call.y[at].double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))
    assert not bool(call.y[chosen < 0].any())
    assert call.layers.counts[0][1] == int((chosen >= 0).sum()) * 33


@compiled
@pytest.mark.parametrize("form", SOME_FORMS)
def test_strides_of_x_and_no_counts(form):
    call = Call(3, 1, projection(70, 40, form, threshold=0.4))
    assert call() == 0
    expected = call.y.clone()
    wide = torch.cat([call.arguments["x"], torch.full((3, 9), math.nan)], 1)
    uncounted = call.layers.pack(counts=0)[0]
    counted = call.layers.counts[0].tolist()
    assert call(x=wide, x_stride=79, layers=uncounted) == 0
    assert torch.equal(call.y, expected)
    assert call.layers.counts[0].tolist() == counted


@compiled
def test_a_mixture_of_no_experts_is_zero():
    call = Call(3, 2, *mlp_of(64, 20, 40))
    assert call(each=0) == 0
    assert not bool(call.y.any())


def run_all(calls):
    for call in calls:
        if call():
            raise SystemExit(1)


def in_a_child(calls):
    """Where touching what may not be touched ends a process of its own."""
    child = multiprocessing.get_context("fork").Process(target=run_all, args=(calls,))
    child.start()
    child.join()
    assert child.exitcode == 0


@functools.cache
def small_projections():
    rule = {"threshold": 0.3, "scaled": True, "centered": True}
    shapes = itertools.product((1, 70), (1, 130), ("int8-g32", "int4-g32-zp", PLAIN), DTYPES)
    return [
        (dtype, projection(inputs, outputs, form, dtype, **rule), mlp_of(inputs, 33, outputs, form, dtype, **rule))
        for inputs, outputs, form, dtype in shapes
    ]


@compiled
@pytest.mark.parametrize("isa", ISAS)
def test_no_memory_beyond_the_operands_is_touched(isa):
    def made(place):
        return [
            Call(tokens, len(own), *own, dtype=dtype, place=place)
            for dtype, one, both in small_projections()
            for own in ((one,), both)
            for tokens in (1, 11)
        ]

    walled, expected = made(before_a_wall), made(lambda tensor: tensor)
    with instruction_set(isa):
        in_a_child(walled)
        run_all(expected)
    for call, other in zip(walled, expected, strict=True):
        assert torch.equal(call.y, other.y)
        assert all(map(torch.equal, call.layers.counts, other.layers.counts))


def only_readable(tensor, chosen):
    """A copy [experts, ...] of which the memory of experts that are not chosen may not be touched."""
    size = tensor[0].nbytes
    assert size % mmap.PAGESIZE == 0
    memory = mmap.mmap(-1, tensor.nbytes)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape).copy_(tensor)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for expert in {*range(len(tensor))} - {*chosen}:
        place = ctypes.c_void_p(start + expert * size)
        assert ctypes.CDLL(None).mprotect(place, ctypes.c_size_t(size), 0) == 0
    return copy


@functools.cache
def projections_of_whole_pages(form):
    return mlp_of(64, 512, 1024, form, count=6, threshold=0.3, centered=True)


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", ["int8", "int4-g32-zp", PLAIN])
def test_experts_that_are_not_chosen_are_not_read(isa, form):
    """Not their weights, nor scales, biases or offsets, which fill whole pages here."""
    up, down = projections_of_whole_pages(form)
    chosen = torch.tensor([[0, 3], [3, 3], [-1, 5]])  # the last one, too

    def guarded(tensor):
        whole = tensor.dim() > 1 and len(tensor) == 6
        return only_readable(tensor, (0, 3, 5)) if whole else before_a_wall(tensor)

    def made(place):
        rows = chosen[:, 1].contiguous()
        rows[0] = 0
        return [Call(3, 1, up, place=place, chosen=rows), Call(3, 2, up, down, place=place, chosen=chosen)]

    walled, expected = made(guarded), made(lambda tensor: tensor)
    with instruction_set(isa):
        in_a_child(walled)
        run_all(expected)
    assert all(torch.equal(call.y, other.y) for call, other in zip(walled, expected, strict=True))
