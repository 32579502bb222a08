import contextlib
import copy
import threading

import pytest
import torch
from conftest import VOCABULARY, mlp, tiny_model
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from deadband import calibrate, evaluate, sparsify_
from deadband.allocation.sensitivity import measure_sensitivity
from deadband.layers.sites import find_sites
from deadband.ops import products
from deadband.running.forward import run

NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture
def slow(monkeypatch):
    """A machine whose narrow products are slow; the list holds the operators that were converted."""
    converted = []
    in_float32 = products._in_float32

    def spied(func, operands, kwargs):
        converted.append(func)
        return in_float32(func, operands, kwargs)

    monkeypatch.setattr(products, "slow_by", lambda dtype: 4.0)
    monkeypatch.setattr(products, "_in_float32", spied)
    return converted


def windows(count=4, tokens=40):
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(3, VOCABULARY, (1, tokens))} for _ in range(count)]


def narrow_model(name="llama"):
    return tiny_model(name).to(torch.bfloat16)


CALLS = {
    "mm": lambda a, b, c: a[0] @ b[0],
    "addmm": lambda a, b, c: torch.addmm(c[0, 0], a[0], b[0], beta=0.5, alpha=-2),
    "addmm, one column": lambda a, b, c: torch.addmm(c[0, :, :1], a[0], b[0]),
    "bmm": lambda a, b, c: a @ b,
    "baddbmm": lambda a, b, c: torch.baddbmm(c, a, b, beta=0.5, alpha=3),
    "linear": lambda a, b, c: torch.nn.functional.linear(a, b[0].t(), c[0, 0]),
    "transposed": lambda a, b, c: a[0] @ b[0].t().contiguous().t(),
    "empty": lambda a, b, c: a[0, :, :0] @ b[0, :0],
    "no columns": lambda a, b, c: a[0] @ b[0, :, :0],
}


@pytest.mark.parametrize("entries", [2**24, 100])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("call", CALLS)
def test_a_product_is_the_exact_one_rounded_once(slow, monkeypatch, call, dtype, entries):
    monkeypatch.setattr(products, "ENTRIES", entries)
    torch.manual_seed(0)
    a, b, c = (torch.randn(shape).to(dtype) for shape in ((3, 39, 37), (3, 37, 23), (3, 39, 23)))
    with products.fast_products(torch.nn.Linear(1, 1, dtype=dtype)):
        found = CALLS[call](a, b, c)
    exact = CALLS[call](a.double(), b.double(), c.double())
    assert (found.dtype, found.shape) == (dtype, exact.shape)
    assert len(slow) == 1
    assert found.is_contiguous()
    error = (found.double() - exact).abs()
    assert bool((error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all())


def test_what_is_not_converted(slow):
    model = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
    few, many = (torch.randn(rows, 8).bfloat16() for rows in (products.ROWS - 1, products.ROWS))
    weight = torch.randn(8, 8)
    with products.fast_products(model):
        assert torch.equal(many.float() @ weight, many.float() @ weight)
        assert not slow
        few @ weight.bfloat16()
        assert not slow
        many.half() @ weight.half()  # a dtype that the model does not have
        assert not slow
        many @ weight.bfloat16()
        assert len(slow) == 1
        other = threading.Thread(target=lambda: many @ weight.bfloat16())
        other.start()
        other.join()
        assert len(slow) == 1
    assert isinstance(products.fast_products(torch.nn.Linear(1, 1)), contextlib.nullcontext)
    assert isinstance(products.fast_products(torch.nn.Linear(1, 1, dtype=torch.bfloat16, device="meta")),
                      contextlib.nullcontext)  # fmt: skip


def test_a_fast_machine_converts_nothing(slow, monkeypatch):
    monkeypatch.setattr(products, "slow_by", lambda dtype: 0.4)
    run(narrow_model(), windows()[0])
    assert not slow
    assert products.note(narrow_model()) == ""


@pytest.mark.parametrize("dtype", NARROW)
def test_the_machine_is_measured_once(monkeypatch, dtype):
    products.slow_by.cache_clear()
    measured = []
    monkeypatch.setattr(products, "_seconds", lambda call: measured.append(call()) or float(len(measured)))
    first = products.slow_by(dtype)
    assert (first, len(measured)) == (3 / 4, 8)  # the shortest of each, but the first
    assert products.slow_by(dtype) == first
    assert len(measured) == 8
    products.slow_by.cache_clear()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_is_as_near_to_float32_as_by_torchs_own_products(slow, monkeypatch, name):
    model = narrow_model(name)
    wide = copy.deepcopy(model).float()
    (window,) = windows(1)
    with torch.no_grad():
        found = run(model, window).logits
        assert len(slow) >= 9  # eight of the layers, and the output layer's
        own = model(**window).logits
        exact = wide(**window).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() <= 1.2 * (own.float() - exact).norm()


class Stop(torch.nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize("error", [None, RuntimeError("broken"), KeyboardInterrupt()], ids=["", "error", "ctrl-c"])
def test_the_model_is_left_as_it_was(slow, error):
    model = narrow_model()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    identity = {name: (id(each), each.data_ptr()) for name, each in model.named_parameters(remove_duplicate=False)}
    if error is not None:
        model.model.layers[1].mlp = Stop(error)
        identity = {name: each for name, each in identity.items() if "layers.1.mlp" not in name}
    with pytest.raises(type(error)) if error is not None else contextlib.nullcontext():
        calibrate(model, windows(), progress=False, include=["*.layers.0.*"])
    assert slow
    assert not _get_current_dispatch_mode_stack()
    now = {name: (id(each), each.data_ptr()) for name, each in model.named_parameters(remove_duplicate=False)}
    assert now == identity
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_figures_are_those_of_torchs_own_products(slow, monkeypatch):
    """Calibration, thresholds and quality, up to rounding."""

    def figures():
        model = narrow_model()
        calibration = calibrate(model, windows(), progress=False)
        sites = calibration.sites
        thresholds = calibration.allocate(0.4, "sensitivity", model=model, batches=windows(), progress=False)
        quality = evaluate(sparsify_(model, thresholds), windows(tokens=60), progress=False)
        return [site.threshold(0.4) for site in sites.values()], quality

    found, quality = figures()
    assert {torch.ops.aten.mm.default} <= set(slow)
    slow.clear()
    monkeypatch.setattr(products, "slow_by", lambda dtype: 0.4)
    own, own_quality = figures()
    assert not slow
    assert found == pytest.approx(own, rel=0.02)
    assert quality.dense_perplexity == pytest.approx(own_quality.dense_perplexity, rel=1e-3)
    assert quality.sparsity == pytest.approx(own_quality.sparsity, abs=0.02)
    assert quality.kl == pytest.approx(own_quality.kl, rel=0.2, abs=1e-5)


def test_gradients_are_converted_too(slow, monkeypatch):
    model = narrow_model()
    names = list(find_sites(model))
    found = measure_sensitivity(model, windows(), names, progress=False)
    converted = len(slow)
    monkeypatch.setattr(products, "slow_by", lambda dtype: 0.4)
    own = measure_sensitivity(model, windows(), names, progress=False)
    assert len(slow) == converted
    passes = 1 + len(windows())
    assert converted > 1.5 * passes * len(names)  # a product forward and one backward for each site
    for name in names:
        error = (found[name].scale - own[name].scale).norm() / own[name].scale.norm()
        assert error < 0.1, name


def test_layers_on_the_operators(slow):
    """The output layer of a sparse model, and a float16 one that no kernel serves."""
    for dtype in NARROW:
        torch.manual_seed(0)
        model = mlp().to(dtype)
        wide = copy.deepcopy(model).double()
        x = torch.randn(33, next(model.parameters()).shape[1]).to(dtype)
        sparsify_(model, exact=True)
        with torch.no_grad():
            found, exact = model(x), wide(x.double())
        assert (found.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()
    assert slow  # of float16


def test_a_compiled_model(slow):
    model = narrow_model()
    (window,) = windows(1)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = run(model, window).logits
        for _ in range(2):
            assert torch.equal(run(compiled, window).logits, expected)
            compiled(**window)  # dynamo's own code is there by the second time
