"""Text that a sparse model writes, beside the dense one's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from deadband.evaluation.quality import columns, count_anew, signed
from deadband.layers.sites import sparse_sites
from deadband.running.divergence import mean_and_error
from deadband.running.forward import evaluating, progress_bar
from deadband.running.greedy_decoding import continue_greedily
from deadband.sparsify.scopes import dense

GENERATION = "prompt as in generate (dense if longer than 4 tokens), each new token sparse"
NGRAM = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """What the dense and the sparse model write after one prompt.

    Attributes:
        prompt: the prompt as text.
        dense_text, text: the dense and the sparse model's continuation.
        dense_tokens, tokens: their lengths in tokens.
        first_divergence: index of the first new token that differs, or where only one of them ends; None if equal.
        equal_tokens: the fraction of positions of the longer one where both have the same token.
        dense_repetition, repetition: the fraction of the 4-grams of tokens that occurred before (seq-rep-4 of
            Welleck et al. 2020, arXiv 1908.04319); NaN below four tokens.
    """

    prompt: str
    dense_text: str
    text: str
    dense_tokens: int
    tokens: int
    first_divergence: int | None
    equal_tokens: float
    dense_repetition: float
    repetition: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationReport:
    """Greedy continuations of the sparse model beside its dense form's; `_error` is a paired standard error.

    Attributes:
        continuations: one for each prompt.
        identical: the fraction of prompts that both continue alike to the end.
        median_divergence: median index of the first new token that differs; the length where none does.
        dense_repetition, repetition: means over the prompts, see `Continuation`.
        repetition_increase, repetition_increase_error: repetition - dense_repetition; the error is over prompts, NaN if
            there is only one.
        sparsity: achieved by the tokens that took the sparse path; NaN if the model does not count.
        max_new_tokens, protocol: how it was run.
    """

    continuations: tuple[Continuation, ...]
    identical: float
    median_divergence: float
    dense_repetition: float
    repetition: float
    repetition_increase: float
    repetition_increase_error: float
    sparsity: float
    max_new_tokens: int
    protocol: str = GENERATION

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("prompt", "first differs", "equal tokens", "repeated 4-grams, dense", "sparse")]
        for index, each in enumerate(self.continuations):
            where = "never" if each.first_divergence is None else str(each.first_divergence)
            shares = (each.equal_tokens, each.dense_repetition, each.repetition)
            rows.append((str(index), where, *(f"{share:.1%}" for share in shares)))
        return (
            f"{columns(rows)}\nidentical {self.identical:.1%}   median first difference {self.median_divergence:g}   "
            f"repeated 4-grams {signed(self.repetition_increase, self.repetition_increase_error)}   "
            f"sparsity {self.sparsity:.1%}\nprotocol: {self.protocol}; up to {self.max_new_tokens} tokens each"
        )

    def texts(self) -> str:
        """What both wrote, prompt by prompt, each behind the end of its prompt."""
        lines = []
        for index, each in enumerate(self.continuations):
            end = each.prompt if len(each.prompt) <= 60 else "..." + each.prompt[-60:]
            lines += [f"{index}       {end!r}", f"  dense  {each.dense_text!r}", f"  sparse {each.text!r}"]
        return "\n".join(lines)


def compare_generation(
    model: Any,
    tokenizer: Any,
    prompts: Iterable[str | Tensor],
    *,
    max_new_tokens: int = 256,
    progress: bool = True,
) -> GenerationReport:
    """Greedy continuations of a sparse model beside those of its dense form: where they part, how they repeat.

    Both take the likeliest token each time, one prompt at a time, without penalties, and stop at the model's end token.
    The sparse model runs as `generate` runs it: a prompt of more than four tokens goes dense, every new token sparse.

    Args:
        model: a sparse transformers language model.
        tokenizer: its tokenizer.
        prompts: texts, or token ids [tokens] or [1, tokens].
        max_new_tokens: tokens to add at most.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: the model is not sparse or keeps no key-value cache, there are no prompts, one is empty, or one is
            too long for the model's positions.
    """
    given = () if isinstance(prompts, (str, Tensor)) else list(prompts)
    if not given:
        raise ValueError(f"prompts is {type(prompts).__name__} or empty; expected a list of texts or of token ids")
    if not sparse_sites(model):
        raise ValueError(f"no layer of this {type(model).__name__} is sparse; there is nothing to compare")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; expected at least one")
    every = [prompt_ids(model, tokenizer, prompt, max_new_tokens) for prompt in given]
    stops = end_tokens(model)
    continuations = []
    with evaluating(model), count_anew(model) as achieved:
        for ids in progress_bar(every, "generate", progress):
            with dense(model):
                before = continue_greedily(model, ids, max_new_tokens, stops)
            after = continue_greedily(model, ids, max_new_tokens, stops)
            continuations.append(_continuation(tokenizer, ids, before, after))
    where = [each.tokens if each.first_divergence is None else each.first_divergence for each in continuations]
    pairs = [(each.dense_repetition, each.repetition) for each in continuations if each.repetition == each.repetition]
    pairs = [pair for pair in pairs if pair[0] == pair[0]]
    increase, increase_error = mean_and_error([after - before for before, after in pairs])
    return GenerationReport(
        continuations=tuple(continuations),
        identical=sum(each.first_divergence is None for each in continuations) / len(continuations),
        median_divergence=torch.tensor(where, dtype=torch.float64).quantile(0.5).item(),
        dense_repetition=mean_and_error([pair[0] for pair in pairs])[0],
        repetition=mean_and_error([pair[1] for pair in pairs])[0],
        repetition_increase=increase,
        repetition_increase_error=increase_error,
        sparsity=achieved(),
        max_new_tokens=max_new_tokens,
    )


def prompt_ids(model: Any, tokenizer: Any, prompt: str | Tensor, max_new_tokens: int) -> Tensor:
    """The token ids [1, tokens] of a prompt; a ValueError if it is empty, or too long to continue by so many tokens."""
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError("the prompt is empty; expected some text to continue")
    if not isinstance(prompt, (str, Tensor)):
        raise TypeError(f"a prompt is a {type(prompt).__name__}; expected a text or token ids [tokens] as a tensor")
    ids = prompt if isinstance(prompt, Tensor) else tokenizer(prompt, return_tensors="pt")["input_ids"]
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"a prompt has token ids of shape {tuple(ids.shape)}, expected [1, tokens] with one or more")
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest is not None and ids.shape[1] + max_new_tokens > longest:
        raise ValueError(
            f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones exceed the model's {longest} positions; "
            "give a shorter prompt or fewer new tokens"
        )
    return ids.long()


def end_tokens(model: Any) -> Collection[int]:
    """The tokens after which a model says nothing more."""
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return () if end is None else tuple(end) if isinstance(end, (list, tuple)) else (end,)


def _continuation(tokenizer: Any, ids: Tensor, before: list[int], after: list[int]) -> Continuation:
    longer = max(len(before), len(after))
    equal = [one == other for one, other in zip(before, after, strict=False)]
    differs = next((index for index, same in enumerate(equal) if not same), len(equal))
    return Continuation(
        prompt=tokenizer.decode(ids[0], skip_special_tokens=True),
        dense_text=tokenizer.decode(before, skip_special_tokens=True),
        text=tokenizer.decode(after, skip_special_tokens=True),
        dense_tokens=len(before),
        tokens=len(after),
        first_divergence=differs if differs < longer else None,
        equal_tokens=sum(equal) / longer,
        dense_repetition=_repetition(before),
        repetition=_repetition(after),
    )


def _repetition(tokens: list[int]) -> float:
    grams = [tuple(tokens[start : start + NGRAM]) for start in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else math.nan
