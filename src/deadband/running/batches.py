"""Batches: taken once, looked at before they are run, and which of their tokens count."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

_HOW = (
    "give a list of what the model is called with, such as [tokenizer(text, return_tensors='pt') for text in texts], "
    "or deadband.running.text.token_windows(tokenizer, text, tokens=8192, window=512)"
)


def checked(batches: Iterable[Any], what: str = "batches") -> Iterator[Any]:
    """The batches one by one, for a single pass; an error says what else was given, or that there are none.

    Args:
        batches: any iterable: a list, a DataLoader, a generator; or a dataset, which has a length and items.
        what: the name of the argument, for messages.

    Raises:
        TypeError: text, one batch alone, or batches that hold no tensor.
        ValueError: no batch, or token ids without a batch dimension.

    Example:
        >>> list(checked([torch.ones(2)]))
        [tensor([1., 1.])]
    """
    if isinstance(batches, (str, bytes, os.PathLike)):
        raise TypeError(f"{what} is a {type(batches).__name__}, which no model can be called with; {_HOW}")
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(f"{what} is a single {type(batches).__name__}; put it in a list: [batch]")
    if isinstance(batches, Iterable):
        return _each(batches, what)
    if not hasattr(batches, "__getitem__") or not hasattr(batches, "__len__"):
        raise TypeError(f"{what} is a {type(batches).__name__}; {_HOW}")
    return _each((batches[index] for index in range(len(batches))), what)  # torch's datasets need not end by themselves


def _each(batches: Iterable[Any], what: str) -> Iterator[Any]:
    index = -1
    for index, batch in enumerate(batches):
        if _is_plain(batch):
            raise TypeError(f"{what}[{index}] is {_described(batch)}, without any tensor; {_HOW}")
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if isinstance(ids, Tensor) and ids.dim() < 2:
            raise ValueError(f"{what}[{index}] has input_ids of shape {tuple(ids.shape)}, expected [batch, tokens]")
        yield batch
    if index < 0:
        used_up = "; an iterator gives its batches once: make a list of them" if isinstance(batches, Iterator) else ""
        raise ValueError(f"{what} is empty; expected at least one batch{used_up}")


def taken(batches: Iterable[Any], what: str = "batches") -> list[Any]:
    """The batches as a list, for more than one pass: an iterator has only one, and a shuffled loader's differ.

    What an iterator gives is copied, as the next batch may come in the same memory. Errors are those of `checked`.
    """
    given = checked(batches, what)
    return list(given) if isinstance(batches, Sequence) else [_copied(batch) for batch in given]


def _copied(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.clone()
    if isinstance(batch, Mapping):
        return {name: _copied(value) for name, value in batch.items()}
    return tuple(map(_copied, batch)) if type(batch) in (tuple, list) else batch


def _is_plain(value: Any) -> bool:
    """Whether a batch is text, numbers, arrays, or made of nothing else; other objects are their model's business."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, bytes, int, float)) or type(value).__module__ == "numpy"


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{name!r}: {type(value).__name__}" for name, value in batch.items()) + "}"
    if isinstance(batch, (list, tuple)) and batch:
        return f"a {type(batch).__name__} of {type(batch[0]).__name__}"
    return f"a {type(batch).__name__}"


def named(model: nn.Module, batch: Any) -> Mapping[str, Any]:
    """What a batch holds by the names of the arguments of the model's forward, also where it is given by position."""
    if isinstance(batch, Mapping):
        return batch
    values = batch if isinstance(batch, (tuple, list)) else (batch,)
    return dict(zip(forward_parameters(cast(Hashable, type(model))), values, strict=False))


@functools.cache
def forward_parameters(model_class: Any) -> tuple[str, ...]:
    """The names of the arguments of a class's forward."""
    return tuple(inspect.signature(model_class.forward).parameters)[1:]


def is_two_sided(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether a batch has tokens for a decoder beside those of an encoder."""
    given = [name for name in ("decoder_input_ids", "decoder_inputs_embeds") if batch.get(name) is not None]
    encodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return bool(given) or (encodes and batch.get("labels") is not None)


@dataclasses.dataclass(frozen=True)
class Counted:
    """Which tokens of a batch count, which are all but padding.

    Attributes:
        encoder: bool [batch, tokens], False where padded; None if the batch does not tell.
        decoder: the same for the decoder of an encoder-decoder model; of other models, what `encoder` is.

    Example:
        >>> batch = {"input_ids": torch.ones(1, 3), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> Counted.of(nn.Identity(), batch).outputs((1, 3))
        tensor([[ True,  True, False]])
    """

    encoder: Tensor | None = None
    decoder: Tensor | None = None

    @classmethod
    def of(cls, model: nn.Module, batch: Any) -> Counted:
        """What `attention_mask` tells, and for a decoder `decoder_attention_mask`, or `labels` (-100 is padding)."""
        batch = named(model, batch)
        encoder = _mask(batch.get("attention_mask"))
        if not is_two_sided(model, batch):
            return cls(encoder, encoder)
        decoder, labels = _mask(batch.get("decoder_attention_mask")), _matrix(batch.get("labels"))
        if decoder is None and labels is not None and not labels.is_floating_point():
            decoder = labels != -100
        tokens = _matrix(batch.get("decoder_input_ids"))
        if decoder is None and tokens is not None:
            decoder = torch.ones_like(tokens, dtype=torch.bool)
        return cls(encoder, decoder)

    def rows(self, name: str, x: Tensor, *, encoded: bool = False) -> Tensor:
        """The rows [rows, features] that count of a tensor [..., features] inside the model; all, if that is not known.

        Args:
            name: of the module that gets or returns it; empty for the model itself.
            x: the tensor.
            encoded: it is what the encoder returned, wherever it is used.
        """
        rows = x.reshape(-1, x.shape[-1])
        in_decoder = (not name or "decoder" in name.split(".")) and not encoded
        for mask in (self.decoder, self.encoder) if in_decoder else (self.encoder,):
            if mask is not None and x.shape[:-1] in (mask.shape, (mask.numel(),)):
                return rows if bool(mask.all()) else rows[mask.reshape(-1).to(x.device)]
        return rows

    def outputs(self, shape: Sequence[int]) -> Tensor:
        """Which of the model's outputs count: bool of `shape`, that of the output without its last dimension, on the
        CPU."""
        if self.decoder is not None and tuple(shape) == tuple(self.decoder.shape):
            return self.decoder.cpu()
        return torch.ones(tuple(shape), dtype=torch.bool)


def _matrix(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.dim() == 2 else None


def _mask(value: Any) -> Tensor | None:
    mask = _matrix(value)
    return None if mask is None else mask.bool()


def token_count(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> int:
    """How many tokens of `input_ids` are no padding."""
    total = 0
    for batch in batches:
        counted = Counted.of(model, batch).encoder
        total += int(counted.sum()) if counted is not None else batch["input_ids"].numel()
    return total


def misfit(model: nn.Module, batch: Any) -> str | None:
    """Why a model cannot read the tokens of a batch: too many for its positions, or unknown ones; None if it can.

    For a model that failed: many read more tokens than their configuration says.
    """
    batch, config = named(model, batch), getattr(model, "config", None)
    for name in ("input_ids", "decoder_input_ids"):
        ids = _matrix(batch.get(name))
        if config is not None and ids is not None and ids.numel():
            found = _too_long(model, _of_text(config), ids, batch) or _unknown(model, _of_text(config), ids, name)
            if found is not None:
                return found
    return None


def _too_long(model: nn.Module, config: Any, ids: Tensor, batch: Mapping[str, Any]) -> str | None:
    names = [name for name in ("max_target_positions", "max_position_embeddings") if hasattr(config, name)]
    positions = getattr(config, names[0]) if names else None
    if not isinstance(positions, int):
        return None
    positions, before = positions - _unused_positions(model), _tokens_before(batch)
    if ids.shape[1] + before <= positions:
        return None
    return (
        f"{ids.shape[1]} tokens{f' behind {before} others' if before else ''} are more than the {positions} positions "
        f"of this {type(model).__name__}; give windows of at most {positions} tokens"
    )


def _unknown(model: nn.Module, config: Any, ids: Tensor, name: str) -> str | None:
    vocabulary, low, high = getattr(config, "vocab_size", None), int(ids.min()), int(ids.max())
    if not isinstance(vocabulary, int) or 0 <= low <= high < vocabulary:
        return None
    return (
        f"{name} holds token {low if low < 0 else high}, and this {type(model).__name__} knows 0 to {vocabulary - 1}; "
        "take the model's own tokenizer"
    )


def _of_text(config: Any) -> Any:
    """The part of a configuration that is about text, if there is one of its own."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):  # not of transformers, or with several
        return config


def _tokens_before(batch: Mapping[str, Any]) -> int:
    """Tokens that a key-value cache in the batch holds."""
    caches = (batch.get(name) for name in ("cache", "past_key_values"))
    length = next((getattr(cache, "get_seq_length", None) for cache in caches if cache is not None), None)
    return int(length()) if length is not None else 0


def _unused_positions(model: nn.Module) -> int:
    """Entries of a table of positions that stand before the first one: RoBERTa's begins behind its padding token."""
    tables = (each for name, each in model.named_modules() if "position" in name and isinstance(each, nn.Embedding))
    padding = next((table.padding_idx for table in tables), None)
    return 0 if padding is None else padding + 1
