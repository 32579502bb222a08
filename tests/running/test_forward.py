import contextlib
import io
import logging
import sys
import warnings

import pytest
import torch
import transformers
from conftest import VOCABULARY, mlp, tiny_model

from deadband.running import forward
from deadband.running.forward import CACHE_NAMES, cache_argument, cache_of
from deadband.running.greedy_decoding import GreedyDecoder

ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt2", "mamba"]


def model_of(name):
    if name != "mamba":
        return tiny_model(name)
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config).eval()


class Wrapper(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


@contextlib.contextmanager
def nothing_deprecated():
    """Neither a warning nor a line in the log, where transformers writes each of them once a process."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("transformers")
    transformers.utils.logging.warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(handler)
    assert not [line for line in lines if "deprecated" in line]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_takes_the_cache_under_this_name(name):
    model = model_of(name)
    tokens = torch.randint(3, VOCABULARY, (1, 9))
    with torch.no_grad():
        expected = model(tokens).logits[:, -1]
        with nothing_deprecated():
            cache = cache_of(model(tokens[:, :-1], use_cache=True))
            actual = model(tokens[:, -1:], **{cache_argument(model): cache}).logits[:, -1]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate_hands_the_cache_over_under_this_name(name):
    model = model_of(name)
    given = []
    model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    model.generate(torch.randint(3, VOCABULARY, (1, 5)), max_new_tokens=4, do_sample=False)
    argument = cache_argument(model)
    assert len(given) == 4
    assert all(each[argument] is not None for each in given[1:])
    assert all(each.get(other) is None for each in given for other in {*CACHE_NAMES} - {argument})


def test_decoding_prints_nothing_deprecated():
    with nothing_deprecated():
        decoder = GreedyDecoder(tiny_model("llama"), torch.randint(3, VOCABULARY, (1, 5)))
        for _ in range(3):
            decoder.step()


def test_wrapped_models_and_models_without_a_cache():
    model = tiny_model("llama")
    assert cache_argument(Wrapper(model)) == cache_argument(model)
    with pytest.raises(ValueError, match="Sequential takes no key-value cache"):
        cache_argument(mlp())
    assert cache_of((1, 2)) is None
    assert cache_of({"logits": 1}) is None


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    seconds = [1000.0]
    monkeypatch.setattr(forward.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(forward, "_progress", {"seen": float("-inf"), "said": 0.0})
    return seconds


def slowly(clock, bar, seconds):
    for item in bar:
        yield item
        clock[0] += seconds


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(clock, capsys):
    assert list(slowly(clock, forward.progress_bar(range(6), "calibrate", True), 4.0)) == [*range(6)]
    assert capsys.readouterr() == ("", "calibrate: 3 of 6, 12 s\n")
    list(slowly(clock, forward.progress_bar((each for each in "abcd"), "judge", True), 30.0))
    assert capsys.readouterr().err == "judge: 0, 0 s\njudge: 1, 30 s\njudge: 2, 60 s\njudge: 3, 90 s\n"
    list(slowly(clock, forward.progress_bar(iter("ab"), "total", True, total=2), 30.0))
    assert "total: 1 of 2, 30 s\n" in capsys.readouterr().err


def test_short_loops_say_a_line_together_and_a_quick_one_nothing(clock, capsys):
    for _ in range(7):
        list(slowly(clock, forward.progress_bar(range(2), "fit", True), 1.0))
    assert capsys.readouterr().err == "fit: 0 of 2, 0 s\n"
    clock[0] += 3600  # of something else
    list(slowly(clock, forward.progress_bar(range(2), "fit", True), 1.0))
    assert capsys.readouterr().err == ""


def test_progress_that_is_not_asked_for(clock, capsys, monkeypatch):
    list(slowly(clock, forward.progress_bar(range(9), "fit", False), 60.0))
    monkeypatch.setattr(sys, "stderr", None)  # as without a console
    list(slowly(clock, forward.progress_bar(range(9), "fit", True), 60.0))
    monkeypatch.undo()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(forward.progress_bar(range(3), "fit", True)) == [0, 1, 2]
    assert "\rfit: " in terminal.getvalue()
    assert "\n" not in terminal.getvalue()
