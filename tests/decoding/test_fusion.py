"""Fused operators against their float64 references, and the passes that put them into a model's graph."""

from __future__ import annotations

import copy
import ctypes
import math
import shutil

import pytest
import torch
from conftest import sparse_model, tiny_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from operators import (
    ALL,
    DTYPES,
    ISAS,
    allowed_error,
    check_product,
    error_against_float64,
    instruction_set,
    parts_of,
    random_weight,
    rounding_of,
)
from torch.nn import functional as F

import deadband
from deadband import ops
from deadband.decoding import decoder as decoding
from deadband.decoding import fusion
from deadband.decoding.decoder import is_prepared, prepare_decode_
from deadband.layers.formats import FORMATS
from deadband.layers.sparse import make_sparse_
from deadband.ops import fused, kernels
from deadband.ops.skipping import fill, keep_mask, score
from deadband.running.forward import threads

compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="torch's inductor needs a C++ compiler")
KINDS = [None, *FORMATS]  # of weight: plain, or quantised


class Layer:
    """Random operands of one layer, with a threshold that keeps about half of a standard normal x."""

    def __init__(self, inputs, outputs, dtype, kind=None, *, relative=False, full=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.relative, self.quantized = relative, None
        self.bias = torch.randn(outputs, generator=generator).to(dtype) if full else None
        self.scale = torch.rand(inputs, generator=generator) + 0.5 if full else None
        self.center = torch.randn(inputs, generator=generator).to(dtype).float() if full else None
        self.threshold = torch.tensor(0.7 * (max(inputs, 1) ** -0.5 if relative else 1))
        if kind is None:
            weight = torch.randn(inputs, outputs, generator=generator).to(dtype).t()
            self.stored, self.exact, self.group_size = (weight, None, None), weight.double(), 0
            self.size = self.exact.abs()
        else:
            self.quantized = random_weight(inputs, outputs, kind, seed)
            self.stored = (self.quantized.codes, self.quantized.scales, self.quantized.minimum)
            self.exact, self.group_size = sum(parts_of(self.quantized)).t(), self.quantized.format.group_size or 0
            size = sum(part.abs() for part in parts_of(self.quantized))
            if self.quantized.minimum is not None:  # kernels take 8 off the codes, and add as much to the minimum
                scales = self.quantized.scales.double().abs()
                size = size + 8 * scales.repeat_interleave(self.group_size, 0)[: len(size)]
            self.size = size.t()
        self.offset = None if self.center is None else (self.exact @ self.center.double()).float()
        self.parts = [*self.stored, self.bias, self.threshold, self.scale, self.center, self.offset]

    def keep(self, x):
        return keep_mask(x, self.threshold, self.scale, self.center, self.relative)

    def is_clear(self, x):
        """Whether no entry is so close to the threshold that another order of summing a norm decides."""
        if not self.relative or not x.numel():
            return True
        ratio = score(x, self.scale, self.center) / x.float().norm(dim=-1, keepdim=True)
        return bool(((ratio / self.threshold - 1).abs() > 1e-5).all())

    def unclear(self, x, error):
        """How many entries an error this large may carry to the other side of the threshold."""
        size = torch.ones(x.shape[-1], dtype=torch.float64) if self.scale is None else self.scale.double()
        distance = (x if self.center is None else x - self.center.double()).abs() * size
        limit, error = self.threshold.double(), error * size
        if self.relative:
            error = error + limit * (error.norm(dim=-1, keepdim=True) + 1e-6 * x.norm(dim=-1, keepdim=True))
            limit = limit * x.norm(dim=-1, keepdim=True)
        return int(((distance - limit).abs() <= error).sum())

    def check(self, y, x):
        keep = self.keep(x)
        if self.quantized is None:
            masked = fill(x, keep, self.center)
            weight = self.stored[0]
            assert error_against_float64(y, masked, weight, self.bias) <= allowed_error(masked, weight, self.bias)
            return
        constants = [each.double() for each in (self.bias,) if each is not None]
        multiplied = torch.where(keep, x.double() - (0 if self.center is None else self.center.double()), 0)
        if self.center is not None:
            constants.append(self.exact @ self.center.double())
        constants.append(torch.zeros(y.shape[-1], dtype=torch.float64))
        check_product(y, multiplied, self.quantized, keep.any(0), constants)


def arguments(x, layers, counts, sparse_rows=ALL):
    return (
        x,
        [part for layer in layers for part in layer.parts],
        [layer.group_size for layer in layers],
        [layer.relative for layer in layers],
        sparse_rows,
        counts,
    )


def new_counts(layers):
    return [torch.tensor([5, 6, 7]) for _ in layers]  # added to, not set


def counted(x, layer):
    keep = layer.keep(x)
    return [5 + int((~keep).sum()), 6 + keep.numel(), 7 + int((~x.isfinite()).sum())]


def random_x(rows, inputs, dtype, seed=0):
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed + 100)).to(dtype)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 9),
    inputs=st.sampled_from([1, 2, 31, 64, 65, 129, 300, 577]),
    widths=st.lists(st.sampled_from([1, 2, 5, 16, 33, 64, 100, 257, 520]), min_size=1, max_size=5),
    kinds=st.lists(st.sampled_from(KINDS), min_size=5, max_size=5),
    relative=st.lists(st.booleans(), min_size=5, max_size=5),
    full=st.lists(st.booleans(), min_size=5, max_size=5),
    dtype=st.sampled_from(DTYPES),
    count=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_linears_match_float64(isa, rows, inputs, widths, kinds, relative, full, dtype, count, seed):
    layers = [
        Layer(inputs, width, dtype, kind, relative=by_norm, full=rest, seed=seed + number)
        for number, (width, kind, by_norm, rest) in enumerate(zip(widths, kinds, relative, full, strict=False))
    ]
    x = random_x(rows, inputs, dtype, seed)
    assume(all(layer.is_clear(x) for layer in layers))
    counts = new_counts(layers)
    with instruction_set(isa), threads(count):
        y = fused.linears(*arguments(x, layers, counts))
    assert y.shape == (rows, sum(widths))
    assert y.dtype == dtype
    assert y.is_contiguous()
    for layer, own, seen in zip(layers, y.split(widths, -1), counts, strict=True):
        assert seen.tolist() == counted(x, layer)
        if rows <= 8:
            layer.check(own, x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [None, "int8", "int4-g32-zp"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_same_bits_as_layer_by_layer(isa, kind, dtype, rows):
    layers = [Layer(576, width, dtype, kind, relative=True, full=True, seed=width) for width in (576, 192, 193)]
    x = random_x(rows, 576, dtype)
    with instruction_set(isa), threads(1):
        y = fused.linears(*arguments(x, layers, []))
        expected = fused.linears_reference(*arguments(x, layers, []))
    assert torch.equal(y, expected)


ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    inputs=st.sampled_from([1, 31, 64, 300]),
    inner=st.sampled_from([1, 5, 33, 100, 257, 520]),
    outputs=st.sampled_from([1, 2, 16, 33, 100]),
    kinds=st.lists(st.sampled_from(KINDS), min_size=3, max_size=3),
    full=st.booleans(),
    relative=st.booleans(),
    activation=st.sampled_from(fused.ACTIVATIONS),
    dtype=st.sampled_from(DTYPES),
    count=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_gated_mlp_matches_the_layers(
    isa, rows, inputs, inner, outputs, kinds, full, relative, activation, dtype, count, seed
):
    options = {"relative": relative, "full": full}
    layers = [
        Layer(inputs, inner, dtype, kinds[0], **options, seed=seed),
        Layer(inputs, inner, dtype, kinds[1], **options, seed=seed + 1),
        Layer(inner, outputs, dtype, kinds[2], **options, seed=seed + 2),
    ]
    x = random_x(rows, inputs, dtype, seed)
    counts, expected_counts = new_counts(layers), new_counts(layers)
    with instruction_set(isa), threads(count):
        y = fused.gated_mlp(*arguments(x, layers, counts), activation)
        expected = fused.gated_mlp_reference(*arguments(x, layers, expected_counts), activation)
    assert y.shape == (rows, outputs)
    assert y.dtype == dtype
    differing = [int((a - b).abs().sum()) for a, b in zip(counts, expected_counts, strict=True)]
    assert differing[:2] == [0, 0]
    # an activation is at most the gate, and errs by some eps of it: GELU's 1 + tanh cancels where it is negative
    gate, up = fused.linears_reference(*arguments(x, layers[:2], [])).double().chunk(2, -1)
    product = (gate * up).abs()
    error = 3 * torch.finfo(dtype).eps * product
    assert differing[2] <= layers[2].unclear(ACTIVATIONS[activation](gate) * up, error)
    if rows and differing[2] == 0:
        if layers[2].center is not None:  # a kept entry counts less the center, whose own product is added again
            product += layers[2].center.double().abs()
        error = 3 * torch.finfo(dtype).eps * (product @ layers[2].size.t())
        if layers[2].quantized is not None:  # entries are integers there, and may be one apart
            entry = rounding_of(rows, layers[2].quantized.format.bits)[1]
            error += 2 / entry * product.amax(1, keepdim=True) * layers[2].size.sum(1)
        assert bool(((y.double() - expected.double()).abs() <= error + torch.finfo(dtype).eps * expected.abs()).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", fused.ACTIVATIONS)
def test_activations_of_every_size(isa, dtype, activation):
    tails = torch.logspace(-40, 38, 400)
    gate = torch.cat([torch.linspace(-120, 120, 4001), tails, -tails, torch.tensor([0.0, -0.0])]).to(dtype)
    ones, all_kept = torch.ones_like(gate), torch.tensor(-1.0)
    weights = [gate.view(-1, 1), ones.view(-1, 1), torch.eye(len(gate), dtype=dtype).t()]  # so that y is the product
    parts = [part for weight in weights for part in (weight, None, None, None, all_kept, None, None, None)]
    with instruction_set(isa):
        y = fused.gated_mlp(ones[:1].view(1, 1), parts, [0] * 3, [False] * 3, 4, [], activation)[0].double()
    expected = ACTIVATIONS[activation](gate.double())
    allowed = (2 * torch.finfo(dtype).eps + 1e-5) * expected.abs() + 1e-15
    assert bool(((y - expected).abs() <= allowed).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [None, "int8", "int4-g32"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("relative", [False, True])
def test_nan_and_infinity_surface(isa, dtype, kind, value, relative):
    sizes = ((70, 40), (70, 40), (40, 30))
    layers = [Layer(*size, dtype, kind, relative=relative, seed=seed) for seed, size in enumerate(sizes)]
    x = random_x(2, 70, dtype)
    x[0, 33] = value
    counts, expected_counts = new_counts(layers[:2]), new_counts(layers[:2])
    with instruction_set(isa):
        y = fused.linears(*arguments(x, layers[:2], counts))
        expected = fused.linears_reference(*arguments(x, layers[:2], expected_counts))
        product = fused.gated_mlp(*arguments(x, layers, []), "silu")
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert not y[0].isfinite().any()
    assert y[1].isfinite().all()
    assert [each.tolist() for each in counts] == [each.tolist() for each in expected_counts]
    assert product[0].isnan().all()
    assert product[1].isfinite().all()


def test_rows_and_operands_beyond_the_kernels_take_the_layers_one_by_one():
    layers = [Layer(40, width, torch.float32, kind) for width, kind in ((30, None), (20, "int8"))]
    x = random_x(12, 40, torch.float32).view(2, 6, 40)
    counts = new_counts(layers)
    y = fused.linears(*arguments(x, layers, counts, sparse_rows=4))  # dense
    torch.testing.assert_close(y[..., :30], F.linear(x, layers[0].stored[0]))
    assert [each.tolist() for each in counts] == [[5, 6, 7]] * 2
    strided = Layer(40, 30, torch.float32)
    strided.parts[0] = strided.parts[0].contiguous()  # torch's own layout
    few = x[0, :2]
    torch.testing.assert_close(
        fused.linears(*arguments(few, [strided], [])), fused.linears(*arguments(few, layers[:1], []))
    )
    half = Layer(40, 30, torch.float16)
    result = fused.linears(*arguments(few.half(), [half], []))
    torch.testing.assert_close(result, F.linear(fill(few.half(), half.keep(few.half()), None), half.stored[0]))
    short = Layer(39, 30, torch.float32)
    with pytest.raises(RuntimeError):
        fused.linears(*arguments(few, [short], []))
    uneven = [Layer(40, 30, torch.float32), Layer(40, 31, torch.float32), Layer(30, 4, torch.float32)]
    with pytest.raises(RuntimeError):
        fused.gated_mlp(*arguments(few, uneven, []), "silu")


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", [None, "int4-g32-zp"])
@pytest.mark.parametrize("counting", [False, True])
def test_opcheck(rows, kind, counting):
    sizes = ((40, 24), (40, 24), (24, 10))
    layers = [Layer(*size, torch.float32, kind, relative=True, full=True, seed=seed) for seed, size in enumerate(sizes)]
    x = random_x(rows, 40, torch.float32)
    counts = new_counts(layers) if counting else []
    torch.library.opcheck(fused.linears, arguments(x, layers[:2], counts[:2], 4))
    torch.library.opcheck(fused.gated_mlp, (*arguments(x, layers, counts, 4), "gelu_tanh"))


@pytest.mark.skipif(kernels.library is None, reason="no kernels are built")
def test_bad_arguments_are_refused():
    x, y = torch.ones(1, 4), torch.full((1, 4), 7.0)
    weight = torch.ones(4, 4)

    def call(name, last, count=3, rows=1, **changes):
        values = [0, 4, weight.data_ptr(), 4, *[0] * 10]
        for at, value in changes.items():
            values[int(at[1:])] = value
        layers = fused._packers[3](*[*values, *values, *values])
        return getattr(kernels.library, name)(
            0, x.data_ptr(), rows, 4, 4, layers if count else None, last, y.data_ptr(), 1
        )

    for name, last in (("deadband_linears", 1), ("deadband_gated_mlp", 0)):
        assert call(name, last, _0=5) == -1
        assert call(name, last, rows=9) == -2
        assert call(name, last, _1=-1) == -2
        assert call(name, last, _6=-1) == -2
        assert call(name, last, _2=0) == -3
        assert call(name, last, _10=weight.data_ptr()) == -3  # a center without its product
        assert call(name, last, count=0) == -3
        assert bool((y == 7).all())
        assert call(name, last) == 0
        assert not bool((y == 7).any())
        y.fill_(7)
    assert call("deadband_linears", -1) == -2
    assert call("deadband_gated_mlp", 2) == -1
    assert ctypes.sizeof(ctypes.c_int64) * fused.LAYER == len(fused._packers[1](*[0] * fused.LAYER))


# ------------------------------------------------------------------------------------------------------------- passes

FUSE = (fusion.fuse_gated_mlps, fusion.fuse_linears)


def names_in(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


class StopHere(Exception):  # noqa: N818
    pass


def fused_nodes(model, passes=FUSE):
    """How many of each operator are in the graph of a decoded token after the passes, without compiling it."""
    names = []

    def look(graph):
        graph.graph.lint()
        graph.recompile()
        names.extend(names_in(graph))
        raise StopHere

    with pytest.warns(decoding.DecodeWarning, match="StopHere"):
        prepare_decode_(model, passes=[*passes, look])
    return {
        name: names.count(f"deadband.{name}.default")
        for name in ("linears", "gated_mlp", "sparse_linear", "quantized_linear")
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", (2, 2, 2)),
        ("mistral", (2, 2, 2)),
        ("qwen2", (2, 2, 2)),
        ("qwen3", (2, 2, 2)),
        ("gemma3", (2, 2, 2)),
        ("qwen2_moe", (2, 2, 2)),  # the shared expert
        ("opt", (2, 0, 6)),
        ("phi3", (0, 0, 8)),  # query, key and value are one layer there, and gate and up as well
        ("gpt2", (0, 0, 8)),
    ],
)
def test_what_is_fused(name, expected):
    nodes = fused_nodes(sparse_model(name))
    assert (nodes["linears"], nodes["gated_mlp"], nodes["sparse_linear"]) == expected


def test_what_is_fused_with_quantised_weights():
    model = tiny_model("llama")
    sites = deadband.calibrate(model, [{"input_ids": torch.arange(20).view(1, -1)}], progress=False).sites
    deadband.sparsify_(model, dict.fromkeys(sites, 0.1), weights="int8")
    nodes = fused_nodes(model)
    assert (nodes["linears"], nodes["gated_mlp"], nodes["sparse_linear"]) == (2, 2, 0)
    assert nodes["quantized_linear"] == 3  # two output projections, and the output layer


@compiled
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_same_logits_and_counts(name):
    model = sparse_model(name)
    plain = prepare_decode_(copy.deepcopy(model), passes=decoding.PASSES[:1])
    both = prepare_decode_(copy.deepcopy(model), passes=(*decoding.PASSES[:1], *FUSE))
    assert is_prepared(plain)
    assert is_prepared(both)
    tokens = torch.randint(3, 128, (1, 30), generator=torch.Generator().manual_seed(5))
    results = []
    for each in (plain, both):
        deadband.sparsity(each, reset=True)
        with torch.no_grad():
            cache = each(tokens[:, :20], use_cache=True).past_key_values
            steps = [each(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(20, 30)]
        results.append((torch.cat(steps, 1), deadband.sparsity(each)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    assert results[1][1].entries == results[0][1].entries
    assert results[1][1].total == pytest.approx(results[0][1].total, abs=1e-3)


class Block(torch.nn.Module):
    """A gated MLP, with things that may stand in the way of fusing it."""

    def __init__(self, change=None):
        super().__init__()
        from deadband.layers.rule import Rule

        self.change = change
        sizes = {"gate": (8, 16), "up": (8, 16), "down": (16, 8)}
        for name, size in sizes.items():
            setattr(self, name, make_sparse_(torch.nn.Linear(*size), Rule(0.1)))
        if change == "counts":
            self.up.counts = None

    def forward(self, x):
        gate = self.gate(x)
        if self.change == "write":
            x.add_(1)
        up = self.up(x + 0 if self.change == "other x" else x)
        gate = F.gelu(gate) if self.change == "erf" else F.silu(gate)
        product = up * gate
        y = self.down(product)
        return (y, product) if self.change == "product" else (y, up) if self.change == "up" else y


@pytest.mark.parametrize(
    ("change", "linears", "mlps"),
    [
        (None, 0, 1),
        ("erf", 1, 0),
        ("product", 1, 0),
        ("up", 1, 0),
        ("other x", 0, 0),
        ("counts", 0, 0),
        ("write", 0, 0),
        ("few rows", 0, 1),
        ("many rows", 0, 0),
    ],
)
def test_only_what_is_the_same_is_fused(change, linears, mlps):
    model = Block(change).eval()
    x = torch.randn({"few rows": 8, "many rows": 9}.get(change, 1), 8)
    with torch.no_grad():
        expected = model(x.clone())
        program = torch.export.export(model, (x.clone(),), strict=False).module()
    for each in FUSE:
        each(program)
    program.graph.lint()
    program.recompile()
    names = names_in(program)
    assert names.count("deadband.linears.default") == linears
    assert names.count("deadband.gated_mlp.default") == mlps
    with torch.no_grad():
        torch.testing.assert_close(program(x.clone()), expected)


PACK = (*FUSE, fusion.pack_layers)


@pytest.mark.skipif(kernels.library is None, reason="no kernels are built")
@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("llama", torch.float32, (4, 2, 0)),  # two output projections are packed, too
        ("llama", torch.bfloat16, (4, 2, 0)),
        ("gpt2", torch.float32, (8, 0, 0)),  # whose weights are views of the parameters
        ("llama", torch.float16, (0, 0, 2)),  # no kernels
    ],
)
def test_what_is_packed(name, dtype, expected):
    names = []

    def look(graph):
        graph.graph.lint()
        names.extend(names_in(graph))
        raise StopHere

    with pytest.warns(decoding.DecodeWarning, match="StopHere"):
        prepare_decode_(sparse_model(name, dtype), tune=False, passes=[*PACK, look])
    kinds = ("packed_linears", "packed_gated_mlp", "sparse_linear")
    assert tuple(names.count(f"deadband.{kind}.default") for kind in kinds) == expected


@pytest.mark.skipif(kernels.library is None, reason="no kernels are built")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_layers_give_the_same_bits(kind, dtype):
    sizes = ((65, 33), (65, 33), (33, 20))
    layers = [Layer(*size, dtype, kind, relative=True, full=True, seed=seed) for seed, size in enumerate(sizes)]
    x = random_x(1, 65, dtype)
    counts, expected_counts = new_counts(layers), new_counts(layers)
    _, parts, group_sizes, relative, _, _ = arguments(x, layers[:2], [])
    assert fused.can_pack(x, parts, group_sizes, relative, counts[:2])
    packed = fused.pack(dtype, 65, parts, group_sizes, relative, counts[:2])
    expected = fused.linears(*arguments(x, layers[:2], expected_counts[:2]))
    assert torch.equal(fused.packed_linears(x, packed, 65, 66, 1), expected)
    _, parts, group_sizes, relative, _, _ = arguments(x, layers, [])
    packed = fused.pack(dtype, 65, parts, group_sizes, relative, counts, mlp=True)
    for number, activation in enumerate(fused.ACTIVATIONS):
        expected = fused.gated_mlp(*arguments(x, layers, expected_counts), activation)
        assert torch.equal(fused.packed_gated_mlp(x, packed, 65, 20, 1, number), expected)
    assert [each.tolist() for each in counts] == [each.tolist() for each in expected_counts]
    for refused in (x[:, :64], x.expand(9, 65)):
        with pytest.raises(RuntimeError, match="1 to 8 rows of 65"):
            fused.packed_linears(refused, packed, 65, 66, 4)
    assert not fused.can_pack(x.half(), parts, group_sizes, relative, counts, mlp=True)
    with pytest.raises(ValueError, match="do not take"):
        fused.pack(dtype, 64, parts, group_sizes, relative, counts, mlp=True)


@pytest.mark.skipif(kernels.library is None, reason="no kernels are built")
@pytest.mark.parametrize("kind", KINDS)
def test_packed_layers_skip_up_to_as_many_rows_as_the_others(kind):
    sizes = ((65, 33), (65, 33), (33, 20))
    layers = [Layer(*size, torch.float32, kind, full=True, seed=seed) for seed, size in enumerate(sizes)]
    counts, expected_counts = new_counts(layers), new_counts(layers)
    _, parts, group_sizes, relative, _, _ = arguments(random_x(1, 65, torch.float32), layers, [])
    two = fused.pack(torch.float32, 65, parts[: 2 * fused.PARTS], group_sizes[:2], relative[:2], counts[:2])
    mlp = fused.pack(torch.float32, 65, parts, group_sizes, relative, counts, mlp=True)
    for rows in (1, 3, 4, 5, 8):
        x = random_x(rows, 65, torch.float32, rows)
        expected = fused.linears(*arguments(x, layers[:2], expected_counts[:2], 4))
        assert torch.equal(fused.packed_linears(x, two, 65, 66, 4), expected)
        expected = fused.gated_mlp(*arguments(x, layers, expected_counts, 4), "silu")
        torch.testing.assert_close(fused.packed_gated_mlp(x, mlp, 65, 20, 4, 0), expected, rtol=1e-4, atol=1e-4)
    assert [each.tolist() for each in counts] == [each.tolist() for each in expected_counts]


@pytest.mark.skipif(kernels.library is None, reason="no kernels are built")
@pytest.mark.parametrize("change", [None, "counts", "erf"])
def test_a_packed_graph_takes_the_inputs_that_it_had(change):
    model = Block(change).eval()
    x = torch.randn(1, 8)
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,), strict=False)
    before = {name: site.counts.clone() for name, site in model.named_children() if site.counts is not None}
    graph = program.graph_module
    constants = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    inputs = [constants.get(str(spec.target), x) for spec in program.graph_signature.input_specs]
    for each in PACK:
        each(graph)
    graph.graph.lint()
    graph.recompile()
    run = fusion.supply(graph, lambda graph: torch.fx.Interpreter(graph).run)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(*inputs)[0], expected)
        model.down.weight.neg_()  # written to in place: seen
        torch.testing.assert_close(run(*inputs)[0], -expected + 2 * model.down.bias)
        model.down.weight.data = torch.zeros_like(model.down.weight)  # exchanged: not seen, but no harm
        torch.testing.assert_close(run(*inputs)[0], -expected + 2 * model.down.bias)
    for name, counts in before.items():
        assert getattr(model, name).counts[1] == 5 * counts[1]


@pytest.mark.skipif(kernels.library is None, reason="no kernels are built")
def test_what_is_compiled_does_not_depend_on_the_rules():
    """So models of one structure at several budgets share torch's cache of compiled code."""
    from deadband.layers.rule import Rule

    x = torch.randn(1, 8)
    codes, inputs = set(), set()

    def compiled(graph):
        codes.add(graph.code)
        inputs.add(sum(node.op == "placeholder" for node in graph.graph.nodes))
        return torch.fx.Interpreter(graph).run

    for rule in (Rule(0.1), Rule(0.2, scale=torch.rand(8)), Rule(0.05, torch.rand(8), torch.randn(8), relative=True)):
        model = Block().eval()
        make_sparse_(model.up, rule)
        make_sparse_(model.gate, rule)
        with torch.no_grad():
            expected = model(x)
            program = torch.export.export(model, (x,), strict=False)
        graph = program.graph_module
        for each in PACK:
            each(graph)
        run = fusion.supply(graph, compiled)
        constants = {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters())}
        given = [constants.get(str(spec.target), x) for spec in program.graph_signature.input_specs]
        with torch.no_grad():
            torch.testing.assert_close(run(*given)[0], expected)
    assert len(codes) == 1
    assert inputs == {2}  # x, and the addresses of everything


def test_sparse_layers_are_the_operators_that_the_passes_know():
    assert ops.sparse_linear._schema.name == "deadband::sparse_linear"
    assert [argument.name for argument in ops.quantized_linear._schema.arguments][-3:] == [
        "relative",
        "sparse_rows",
        "counts",
    ]
