"""Every causal architecture of the installed transformers: made sparse or quantised, saved, loaded and prepared,
each is right, or refused with the reason."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from architectures import VOCABULARY, build, causal_types

import deadband
from deadband.decoding import decoder as decoding
from deadband.decoding.decoder import decode_report, prepare_decode_
from deadband.layers.sites import find_sites
from deadband.running.forward import cache_argument, cache_of

pytestmark = pytest.mark.slow
TOKENS = torch.randint(3, VOCABULARY, (1, 72), generator=torch.Generator().manual_seed(0))
PROMPT = 60  # and then past a block of 64


@functools.lru_cache(maxsize=1)
def model_of(kind):
    try:
        model = build(kind)
        with torch.no_grad():
            logits = model(TOKENS[:, :40]).logits
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return model, logits


def built(kind):
    """A copy of the model of that type, and its logits."""
    model, logits = model_of(kind)
    if model is None:
        pytest.skip(f"no tiny model could be built ({logits})")
    return copy.deepcopy(model), logits


every_type = pytest.mark.parametrize("kind", causal_types())


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS[:, :40]).logits


def difference(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def dense_survives(model, expected, folder):
    """Whether transformers alone saves and loads the model such that it computes the same."""
    try:
        return difference(logits_of(saved_and_loaded(model, folder)), expected) < 1e-5
    except Exception:
        return False


def test_most_types_can_be_built():
    types = causal_types()
    assert sum(model_of(kind)[0] is not None for kind in types) > 0.8 * len(types)


@every_type
@pytest.mark.parametrize("weights", [None, "int8"])
def test_sparse_saved_and_loaded(kind, weights, tmp_path):
    model, expected = built(kind)
    deadband.sparsify_(model, dict.fromkeys(find_sites(model), 0.0), weights=weights)
    with deadband.sparse_prefill(model):
        sparse = logits_of(model)
    assert difference(sparse, expected) < (1e-4 if weights is None else 0.3)
    try:
        loaded = saved_and_loaded(model, tmp_path / "ours")
    except RuntimeError:
        if not dense_survives(model_of(kind)[0], expected, tmp_path / "dense"):
            pytest.skip("transformers cannot save or load the dense model, either")
        raise
    assert list(deadband.layers.sites.sparse_sites(loaded)) == list(deadband.layers.sites.sparse_sites(model))
    with deadband.sparse_prefill(loaded):
        again = logits_of(loaded)
    if difference(again, sparse) > 1e-5:
        assert not dense_survives(model_of(kind)[0], expected, tmp_path / "dense"), difference(again, sparse)


def uncompiled(program, passes):
    """What inductor would compile, run as it is: compiling each of these models takes ten seconds."""
    graph = program.graph_module
    for each in passes:
        if each is not decoding.PASSES[-1]:  # packs layers for the calling convention of compiled graphs
            each(graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def decoded(model):
    with torch.no_grad():
        cache = cache_of(model(TOKENS[:, :PROMPT], use_cache=True))
        steps = [model(TOKENS[:, i : i + 1], **{cache_argument(model): cache}) for i in range(PROMPT, TOKENS.shape[1])]
    return torch.cat([step.logits for step in steps], 1)


@every_type
def test_prepared(kind, monkeypatch):
    model, _ = built(kind)
    monkeypatch.setattr(decoding, "compile_graph", uncompiled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_decode_(copy.deepcopy(model))
        report = decode_report(prepared)
        if report.problem is not None:
            pytest.skip(f"refused: {report.problem}")
        expected = decoded(model)
        torch.testing.assert_close(decoded(prepared), expected, rtol=1e-3, atol=1e-3)
    assert decode_report(prepared).graph == TOKENS.shape[1] - PROMPT
