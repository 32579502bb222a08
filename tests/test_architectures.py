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
from deadband import decoding
from deadband.decoding import decode_report, prepare_decode_
from deadband.running import cache_argument, cache_of
from deadband.sites import find_sites

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


@pytest.fixture
def built(request):
    model, logits = model_of(request.param)
    if model is None:
        pytest.skip(f"no tiny model could be built ({logits})")
    return copy.deepcopy(model), logits


every_type = pytest.mark.parametrize("built", causal_types(), indirect=True)


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS[:, :40]).logits


def difference(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def test_most_types_can_be_built():
    types = causal_types()
    assert sum(model_of(kind)[0] is not None for kind in types) > 0.8 * len(types)


@every_type
@pytest.mark.parametrize("weights", [None, "int8"])
def test_sparse_saved_and_loaded(built, weights, tmp_path):
    model, expected = built
    deadband.sparsify_(model, dict.fromkeys(find_sites(model), 0.0), weights=weights)
    with deadband.sparse_prefill(model):
        sparse = logits_of(model)
    assert difference(sparse, expected) < (1e-4 if weights is None else 0.3)
    loaded = saved_and_loaded(model, tmp_path)
    assert list(deadband.sparsify.sparse_sites(loaded)) == list(deadband.sparsify.sparse_sites(model))
    with deadband.sparse_prefill(loaded):
        torch.testing.assert_close(logits_of(loaded), sparse, rtol=1e-5, atol=1e-5)


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
def test_prepared(built, monkeypatch):
    model, _ = built
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
