"""Greedy decoding of one sequence: each new token is the likeliest one."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from deadband.running.forward import cache_of, cached, evaluating, require_fit, run, taken_by


class GreedyDecoder:
    """Greedy decoding, one token a call, with the model's own key-value cache. The first token comes with the prompt.

    Attributes:
        tokens: the new ones so far, int64 [1, 1] each.

    Args:
        model: a causal language model, in eval mode.
        prompt: token ids [1, tokens].

    Raises:
        ValueError: the model returns no key-value cache, or has too few positions.

    Example:
        >>> decoder = GreedyDecoder(model, tokenizer("Once upon a", return_tensors="pt").input_ids)  # doctest: +SKIP
        >>> decoder.step()  # doctest: +SKIP
        >>> len(decoder.tokens)  # doctest: +SKIP
        2
    """

    def __init__(self, model: Any, prompt: Tensor) -> None:
        self.model = model
        self.tokens: list[Tensor] = []
        self.options = taken_by(model, use_cache=True)
        with evaluating(model):
            self._take(run(model, {"input_ids": prompt}, use_cache=True, logits_to_keep=1))
        (self.cache_argument,) = cached(model, self.cache)

    def step(self) -> None:
        """Decode one token; a ValueError if the model has too few positions."""
        inputs = {"input_ids": self.tokens[-1], self.cache_argument: self.cache}
        with torch.no_grad():
            try:  # not `run`, whose microseconds would be timed as well
                self._take(self.model(**inputs, **self.options))
            except (IndexError, RuntimeError) as error:
                require_fit(self.model, inputs, error)
                raise

    def _take(self, output: Any) -> None:
        self.cache = cache_of(output)
        self.tokens.append(output.logits[:, -1:].argmax(-1))


def continue_greedily(
    model: Any,
    prompt: Tensor,
    most: int,
    stops: Collection[int] = (),
    *,
    sparse: contextlib.AbstractContextManager[Any] | None = None,
) -> list[int]:
    """The likeliest tokens to follow a prompt, as `generate` finds them: up to `most`, one of `stops` being the last.

    Args:
        model: a causal language model.
        prompt: token ids [1, tokens].
        most: tokens to add at most.
        stops: tokens after which the model says nothing more.
        sparse: what every new token is read in, and the prompt is not.

    Raises:
        ValueError: the model keeps no key-value cache, or has too few positions.
    """
    with evaluating(model):
        decoder = GreedyDecoder(model, prompt)
        with sparse if sparse is not None else contextlib.nullcontext():
            while len(decoder.tokens) < most and int(decoder.tokens[-1]) not in stops:
                decoder.step()
    return torch.cat(decoder.tokens, 1)[0].tolist()
