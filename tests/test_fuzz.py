"""Files that are damaged, or lie: a clear error soon and with little memory, and nothing half-changed.

Examples come from a fixed seed. Each is a good file with one thing wrong: cut, with other bytes, a header that says
something else, tensors exchanged, a JSON value replaced.
"""

import copy
import json
import shutil
import struct
import time
import tracemalloc

import pytest
import safetensors
import torch
from conftest import mlp, tiny_batches, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import deadband
from deadband.allocation.thresholds import Thresholds
from deadband.calibration.calibration import Calibration
from deadband.sparsify.config import SparsityConfig
from deadband.sparsify.sparsify import sparsify_

SECONDS, BYTES = 1.0, 64 << 20
HOSTILE = st.sampled_from(
    [None, True, -1, 0, 3, 2**31, 2**53, 2**63, -(2**63), 10**30, 1e308, -0.5, float("nan"), float("inf"), "", "F64",
     "0", "x" * 100, "../../x", "\ud800", [], [1], [[]], {}, {"a": 1}, [2**40, 2**40]]
)  # fmt: skip
FUZZ = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)


def places(value, path=()):
    """Where a JSON value can be changed: the way to each of its parts."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def changed(draw, value):
    """A copy of a JSON value of which one part is something else, is missing, or has been exchanged with another."""
    value = copy.deepcopy(value)
    ways = list(places(value))[1:]
    *path, last = draw(st.sampled_from(ways))
    holder = value
    for key in path:
        holder = holder[key]
    what = draw(st.sampled_from(["replace", "replace", "remove", "exchange", "rename"]))
    if what == "remove":
        del holder[last]
    elif what == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from(["", "other", f"{last}.x", "threshold"]))] = holder.pop(last)
    elif what == "exchange" and isinstance(holder, dict):
        other = draw(st.sampled_from(sorted(holder)))
        holder[last], holder[other] = holder[other], holder[last]
    else:
        holder[last] = draw(HOSTILE)
    return value


def parts_of(data):
    """The header of a safetensors file, and what follows."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header, rest):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def damaged(draw, data, about=None):
    """A safetensors file with one thing wrong; `about` is the key of the JSON text in its metadata."""
    header, rest = parts_of(data)
    kinds = ["cut", "bytes", "size", "header", "tail"] + ["about"] * (4 if about else 0)
    kind = draw(st.sampled_from(kinds))
    if kind == "cut":
        return data[: draw(st.integers(0, len(data) - 1))]
    if kind == "bytes":
        result = bytearray(data)
        for place in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
            result[place] = draw(st.integers(0, 255))
        return bytes(result)
    if kind == "size":
        return struct.pack("<Q", draw(st.sampled_from([0, 1, 2**31, 2**63 - 1, 2**64 - 1]))) + data[8:]
    if kind == "tail":
        return data + b"\0" * draw(st.integers(1, 64))
    if kind == "header":
        return joined(changed(draw, header), rest)
    text = json.loads(header["__metadata__"][about])
    written = draw(st.sampled_from([json.dumps(changed(draw, text)), json.dumps(text)[:-3], "[" * 50_000, "1e999"]))
    return joined({**header, "__metadata__": {about: written}}, rest)


def soon(function, *arguments, errors):
    """The result, or the error, which is one of `errors`; both soon and with little memory."""
    tracemalloc.start()
    start = time.process_time()
    try:
        return function(*arguments)
    except errors as error:
        return error
    finally:
        seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seconds < SECONDS
        assert peak < BYTES


def state_of(model):
    return {name: (type(module), *module.state_dict().items()) for name, module in model.named_modules()}


def check_same(model, before):
    after = state_of(model)
    assert [(name, kind) for name, (kind, *_) in after.items()] == [(name, kind) for name, (kind, *_) in before.items()]
    for name, (_, *tensors) in before.items():
        for (key, value), (other, expected) in zip(after[name][1:], tensors, strict=True):
            assert key == other
            assert torch.equal(value, expected)


@pytest.fixture(scope="module")
def calibration():
    model = mlp()
    return deadband.calibrate(model, [torch.randn(32, 16, generator=torch.Generator().manual_seed(0))], progress=False)


@settings(FUZZ, max_examples=300)
@given(st.data())
def test_calibrations(calibration, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "calibration.safetensors"
    calibration.save(path)
    path.write_bytes(damaged(data.draw, path.read_bytes(), "deadband.calibration"))
    result = soon(Calibration.load, path, errors=ValueError)
    if isinstance(result, ValueError):
        assert path.name in str(result)
        return
    assert "Calibration of" in str(result)
    model = mlp()
    before = state_of(model)
    allocated = soon(result.allocate, 0.3, errors=ValueError)
    if not isinstance(allocated, ValueError) and isinstance(
        soon(sparsify_, model, allocated, errors=ValueError), ValueError
    ):
        check_same(model, before)


@settings(FUZZ, max_examples=300)
@given(st.data())
def test_thresholds(calibration, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "thresholds.safetensors"
    calibration.allocate(0.3).save(path)
    path.write_bytes(damaged(data.draw, path.read_bytes(), "deadband.thresholds"))
    result = soon(Thresholds.load, path, errors=ValueError)
    if isinstance(result, ValueError):
        assert path.name in str(result)
        return
    assert "of the weight bytes over" in str(result)
    model = mlp()
    before = state_of(model)
    made = soon(sparsify_, model, result, errors=ValueError)
    if isinstance(made, ValueError):
        check_same(model, before)
    else:
        with torch.no_grad():
            assert model(torch.ones(2, 16)).isfinite().all()


@settings(FUZZ, max_examples=300)
@given(st.data())
def test_configs(data):
    sites = {"a": {"scaled": True, "weights": "int8", "expected": 0.3}, "b": {"range": [0, 1]}}
    good = {"version": 5, "sparsity": 0.4, "sites": sites, "quantized": {"c": "int4"}}
    flat = {
        "version": 4,
        "sites": ["a", "b"],
        "scaled": ["a"],
        "weights": {"a": "int8", "c": "int4"},
        "expected": {"a": 0.3},
        "site_range": {"b": [0, 1]},
    }
    assert SparsityConfig.from_dict(flat).sites == SparsityConfig.from_dict(good).sites
    given = changed(data.draw, data.draw(st.sampled_from([good, flat])))
    result = soon(lambda: SparsityConfig.from_dict(given), errors=(ValueError, TypeError))
    if not isinstance(result, Exception):
        written = json.dumps(result.to_dict())
        assert json.dumps(SparsityConfig.from_dict(json.loads(written)).to_dict()) == written


@pytest.fixture(scope="module", params=[None, "int8"], ids=["sparse", "int8"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model("llama")
    calibration = deadband.calibrate(model, tiny_batches(1), criterion="weighted_magnitude", progress=False)
    sparsify_(model, calibration.allocate(0.3), weights=request.param).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)  # what is imported then is no part of what is measured
    return folder


def load_or_say_why(folder):
    """A model that runs, or an error that says why not: ours, or transformers' own where the file is none."""
    errors = (ValueError, OSError, RuntimeError, safetensors.SafetensorError)
    model = soon(AutoModelForCausalLM.from_pretrained, folder, errors=errors)
    if not isinstance(model, Exception):
        with torch.no_grad():
            assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 128)
    return model


@pytest.mark.slow
@settings(FUZZ, max_examples=40)
@given(st.data())
def test_weights_of_checkpoints(checkpoint, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(checkpoint, folder)
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(damaged(data.draw, path.read_bytes()))
    load_or_say_why(folder)
    shutil.rmtree(folder)


@pytest.mark.slow
@settings(FUZZ, max_examples=40)
@given(st.data())
def test_configs_of_checkpoints(checkpoint, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = changed(data.draw, config["quantization_config"])
    text = json.dumps(config)
    (folder / "config.json").write_text(data.draw(st.sampled_from([text, text, text, text[: len(text) // 2]])))
    load_or_say_why(folder)
    shutil.rmtree(folder)
