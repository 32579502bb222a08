"""Greedy continuations are those of `generate`, up to a number of tokens or a last one."""

import contextlib

import pytest
import torch
from conftest import CONFIGS, VOCABULARY, tiny_model

from deadband.running.greedy_decoding import continue_greedily

PROMPT = torch.randint(3, VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CONFIGS)
def test_continuations_are_those_of_generate(name):
    model = tiny_model(name)
    expected = model.generate(PROMPT, max_new_tokens=12, do_sample=False)[0, 7:].tolist()
    assert continue_greedily(model, PROMPT, 12) == expected
    stop = expected[4]
    assert continue_greedily(model, PROMPT, 12, [stop]) == expected[: expected.index(stop) + 1]


def test_new_tokens_alone_are_read_in_the_context():
    model, inside, read = tiny_model("llama"), [], []

    @contextlib.contextmanager
    def sparse():
        inside.append(True)
        yield
        inside.clear()

    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append((kwargs["input_ids"].shape[1], bool(inside))), with_kwargs=True
    )
    continue_greedily(model.train(), PROMPT, 3, sparse=sparse())
    assert read == [(7, False), (1, True), (1, True)]
    assert model.training


def test_what_cannot_be_continued_is_told():
    with pytest.raises(ValueError, match=r"more than the 128 positions"):
        continue_greedily(tiny_model("gpt2"), PROMPT, 130)
