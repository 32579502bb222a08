"""Quality of a sparse model beside the dense one: perplexity, KL, agreement, and what both write.

Every figure has a standard error over windows, and a difference has a paired one: both models meet the same windows, so
what makes a window hard cancels (Miller 2024, arXiv 2411.00640, sections 3.1 and 4).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deadband.layers.sites import sparse_sites
from deadband.running.batches import is_two_sided, taken
from deadband.running.divergence import LogitSums, compare_logits, logits_of, mean_and_error
from deadband.running.forward import cache_of, cached, evaluating, progress_bar, run
from deadband.sparsify.report import counting, sparsity
from deadband.sparsify.scopes import dense, sparse_prefill

if TYPE_CHECKING:
    from deadband.evaluation.simulation import Simulation

PROTOCOLS = {
    "all": "all tokens sparse",
    "dense-prompt": "dense prompt, sparse continuation",
    "dense-first": "dense first token",
}
"""Which tokens take the sparse path while a model is judged, by their short names."""
PROTOCOL = PROTOCOLS["all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Quality on some windows of text; `_error` is one standard error over windows, NaN if there is only one.

    Attributes:
        perplexity, perplexity_error: exp of the mean negative log-likelihood of the next token.
        dense_perplexity, dense_perplexity_error: the same for the dense model on the same weights.
        kl, kl_error: mean KL(dense ‖ sparse) of the next-token distributions, in nats.
        agreement, agreement_error: the fraction of positions where both models' likeliest next token is the same.
        sparsity: achieved by the tokens that took the sparse path, weighted by weight bytes; NaN if the model does not
            count.
        tokens, windows: how much was judged.
        protocol: which tokens were sparse.
        perplexity_increase, perplexity_increase_error: perplexity / dense_perplexity - 1. The error is paired, so it is
            much smaller than those of the two perplexities.
        prompt_tokens: tokens at the beginning of each window that went dense; None if it differs between windows.
        per_window: for each window {"tokens": judged, "nll", "dense_nll", "kl", "agreement": means over them,
            "checksum": CRC-32 of its token ids}, for `compare`.
    """

    perplexity: float
    dense_perplexity: float
    kl: float
    agreement: float
    sparsity: float
    tokens: int
    windows: int
    protocol: str = PROTOCOL
    perplexity_increase: float = math.nan
    perplexity_error: float = math.nan
    dense_perplexity_error: float = math.nan
    kl_error: float = math.nan
    agreement_error: float = math.nan
    perplexity_increase_error: float = math.nan
    prompt_tokens: int | None = 0
    per_window: tuple[Mapping[str, float], ...] = ()

    def __str__(self) -> str:
        return (
            f"sparsity {self.sparsity:.1%}   perplexity {self.perplexity:.3f} (dense {self.dense_perplexity:.3f}, "
            f"{signed(self.perplexity_increase, self.perplexity_increase_error)})   "
            f"KL {self.kl:.4f}{_error(self.kl_error, '.4f')} nats   "
            f"top-1 agreement {self.agreement:.1%}{_error(self.agreement_error, '.1%')}   "
            f"({self.tokens:,} tokens in {self.windows} windows, {self.protocol})"
        )

    def table(self) -> str:
        """Dense and sparse side by side, with one standard error each."""
        dense_perplexity = f"{self.dense_perplexity:.3f}{_error(self.dense_perplexity_error, '.3f')}"
        rows = [
            ("", "dense", "sparse", "paired difference"),
            (
                "perplexity",
                dense_perplexity,
                f"{self.perplexity:.3f}{_error(self.perplexity_error, '.3f')}",
                signed(self.perplexity_increase, self.perplexity_increase_error),
            ),
            ("KL to dense, nats", "0", f"{self.kl:.4f}{_error(self.kl_error, '.4f')}", ""),
            ("top-1 agreement", "100%", f"{self.agreement:.1%}{_error(self.agreement_error, '.1%')}", ""),
            ("sparsity achieved", "0%", f"{self.sparsity:.1%}", ""),
        ]
        prompt = f" ({self.prompt_tokens} dense in each window)" if self.prompt_tokens else ""
        note = "±: one standard error over windows" if self.windows > 1 else "one window: no standard errors"
        return (
            f"{columns(rows)}\nprotocol: {self.protocol}{prompt}; {self.tokens:,} tokens judged in {self.windows} "
            f"window{'s' * (self.windows > 1)}\n{note}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The first evaluation less the second, with paired standard errors over the windows that both judged.

    Attributes:
        kl, kl_error: difference of KL to the dense model, in nats; negative if the first is nearer.
        nll, nll_error: difference of the mean negative log-likelihood: the logarithm of the ratio of perplexities.
        agreement, agreement_error: difference of the fractions of agreement.
        tokens, windows: how much was judged.
    """

    kl: float
    kl_error: float
    nll: float
    nll_error: float
    agreement: float
    agreement_error: float
    tokens: int
    windows: int

    def __str__(self) -> str:
        return (
            f"KL {self.kl:+.4f}{_error(self.kl_error, '.4f')} nats   nll {self.nll:+.4f}{_error(self.nll_error, '.4f')}"
            f"   top-1 agreement {signed(self.agreement, self.agreement_error)}   "
            f"({self.tokens:,} tokens in {self.windows} windows, paired)"
        )


class Reference(list[Tensor]):
    """The dense model's logits of each window, and which windows these were: `checksums` of their tokens."""

    def __init__(self, logits: Iterable[Tensor], checksums: Iterable[int]) -> None:
        super().__init__(logits)
        self.checksums = tuple(checksums)


def dense_logits(model: nn.Module, windows: Iterable[Any], *, progress: bool = True) -> Reference:
    """Logits of the dense model for each window, [batch, tokens, vocabulary]: `reference` for several evaluations.

    They stay in the model's dtype, all of them at once: tokens × vocabulary × bytes of an entry. A window of 512 tokens
    takes 50 MB in bfloat16 with a vocabulary of 49k and 268 MB with one of 262k. Where that is too much, leave the
    reference out: `evaluate` then runs the dense model beside the sparse one and keeps one window.

    Args:
        model: a causal language model, sparse or dense.
        windows: as for `evaluate`.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: there are no windows, or a window's token ids or mask have a bad shape.
    """
    given = [_Window.of(model, index, window) for index, window in enumerate(taken(windows, "windows"))]
    with evaluating(model):
        logits = [_dense(model, window) for window in progress_bar(given, "dense", progress)]
    return Reference(logits, [window.checksum for window in given])


def evaluate(
    model: nn.Module,
    windows: Iterable[Any],
    *,
    reference: Sequence[Tensor] | None = None,
    protocol: str = PROTOCOL,
    prompt_tokens: int | None = None,
    simulation: Simulation | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compare a language model with its own dense form on windows of text.

    Both are judged in the dtype that the model is stored in, as they will run; where that multiplies slowly, products
    are made in float32 and rounded to it (`deadband.ops.products`). Of logits, one window's of each
    form is held at a time.

    Args:
        model: a language model whose output has `logits`, sparse or dense (then it is compared with itself).
        windows: batches with `input_ids` [batch, tokens], as `deadband.running.text.token_windows` makes; they are
            taken once, so an iterator or a loader that shuffles is all right. A row that its `attention_mask`
            [batch, tokens] pads, left or right, is judged by itself, without the padding. Standard errors take windows
            as independent: give each its own batch. An encoder-decoder is judged on what its decoder reads:
            `decoder_input_ids` with their `decoder_attention_mask`, or `labels`, -100 where padded.
        reference: what `dense_logits` returned for the same windows, for any protocol; otherwise the dense model runs
            too.
        protocol: which tokens are sparse, by the long name or the short one:
            "all tokens sparse" ("all"): every one.
            "dense prompt, sparse continuation" ("dense-prompt"): the first `prompt_tokens` tokens go dense and fill the
            key-value cache, as prefill does; the rest is sparse, and only its positions are judged.
            "dense first token" ("dense-first"): only the first token, on which attention leans most, goes dense; all
            positions are judged.
        prompt_tokens: tokens of the dense prompt; half of each window by default.
        simulation: what a method of `deadband.evaluation.methods` made of the model, which has to be dense: sparse
            tokens run while it is on, and the sparsity is the one that it counts.
        progress: show a progress bar on a terminal.

    Raises:
        TypeError: windows are no batches of token ids.
        ValueError: there are no windows, a window has nothing to judge or a bad shape, `reference` does not fit, the
            protocol is unknown or `prompt_tokens` does not go with it, the model has no key-value cache to keep a
            dense prompt in, or a simulation is of another model or of a sparse one.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_attention_heads=2)
        >>> from deadband import sparsify_
        >>> model = sparsify_(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).eval(), exact=True)
        >>> windows = [{"input_ids": torch.arange(3, 13)[None]}, {"input_ids": torch.arange(20, 30)[None]}]
        >>> result = evaluate(model, windows, protocol="dense-prompt", prompt_tokens=4, progress=False)
        >>> result.protocol, result.tokens
        ('dense prompt, sparse continuation', 10)
    """
    protocol = _checked_protocol(protocol, prompt_tokens)
    given = [_Window.of(model, index, window) for index, window in enumerate(taken(windows, "windows"))]
    plans = [_plan(index, window.segments, protocol, prompt_tokens) for index, window in enumerate(given)]
    if reference is not None:
        _check_reference(given, reference)
    is_sparse = bool(sparse_sites(model))
    if simulation is not None:
        if is_sparse:
            raise ValueError("the model is sparse already; a simulation goes with the dense model: densify_ it first")
        simulation.reset()
    figures = []
    with evaluating(model), count_anew(model) as achieved:
        for index, window in enumerate(progress_bar(given, "evaluate", progress)):
            before = _dense(model, window) if reference is None else reference[index]
            sums = _judge(model, plans[index], before, protocol, is_sparse, simulation)
            del before  # or it would still be there while the next window's are made
            figures.append(_window_figures(window, sums))
    prompts = {prompt for plan in plans for _, prompt in plan}
    return _evaluation(
        figures,
        sparsity=simulation.sparsity.total if simulation is not None else achieved() if is_sparse else 0.0,
        protocol=protocol,
        prompt_tokens=prompts.pop() if len(prompts) == 1 else None,
    )


def _checked_protocol(protocol: str, prompt_tokens: int | None) -> str:
    """The long name of a protocol that goes with `prompt_tokens`."""
    protocol = protocol_name(protocol)
    if prompt_tokens is not None and protocol != PROTOCOLS["dense-prompt"]:
        raise ValueError(f"prompt_tokens goes with the protocol {PROTOCOLS['dense-prompt']!r}, got {protocol!r}")
    if prompt_tokens is not None and prompt_tokens < 1:
        raise ValueError(f"prompt_tokens={prompt_tokens}; expected at least one dense token")
    return protocol


def _check_reference(windows: Sequence[_Window], reference: Sequence[Tensor]) -> None:
    if len(reference) != len(windows):
        raise ValueError(f"reference has {len(reference)} windows, expected {len(windows)}")
    known = reference.checksums if isinstance(reference, Reference) else [window.checksum for window in windows]
    for index, (window, logits, checksum) in enumerate(zip(windows, reference, known, strict=True)):
        if tuple(logits.shape[:2]) != window.shape:
            raise ValueError(
                f"reference[{index}] has shape {tuple(logits.shape)}, expected {window.shape} and the vocabulary"
            )
        if checksum != window.checksum:
            raise ValueError(
                f"reference[{index}] was made of other tokens than window {index}; give the same windows in the same "
                "order, from a list and not from a loader that shuffles"
            )


def compare(first: Evaluation, second: Evaluation) -> Comparison:
    """The difference of two evaluations on the same windows, `first` less `second`, with paired standard errors.

    Each window is judged by both, so only how their difference varies between windows counts. Differences of the
    windows' means are weighted by tokens.

    Args:
        first, second: what `evaluate` returned for the same windows: two budgets, two methods, two models with one
            tokenizer, or two protocols that judge the same positions.

    Raises:
        ValueError: they did not judge the same positions of the same windows.

    Example:
        >>> windows = [{"tokens": 9, "nll": 2.0, "dense_nll": 1.0, "kl": kl, "agreement": 1.0} for kl in (0.1, 0.3)]
        >>> better = [{**window, "kl": window["kl"] - 0.05} for window in windows]
        >>> round(compare(_evaluation(windows), _evaluation(better)).kl, 4)
        0.05
    """
    if len(first.per_window) != len(second.per_window) or not first.per_window:
        raise ValueError(
            f"the evaluations have figures of {len(first.per_window)} and {len(second.per_window)} windows; "
            "expected the same windows"
        )
    for index, (one, other) in enumerate(zip(first.per_window, second.per_window, strict=True)):
        if any(one.get(key) != other.get(key) for key in ("checksum", "tokens")):
            raise ValueError(
                f"the evaluations judged other tokens in window {index} ({one['tokens']} and {other['tokens']} of "
                "them); evaluate both on the same windows with protocols that judge the same positions"
            )
    tokens = [window["tokens"] for window in first.per_window]
    figures = {}
    for name in ("kl", "nll", "agreement"):
        differences = [a[name] - b[name] for a, b in zip(first.per_window, second.per_window, strict=True)]
        figures[name], figures[f"{name}_error"] = mean_and_error(differences, tokens)
    return Comparison(**figures, tokens=int(sum(tokens)), windows=len(tokens))


def protocol_name(protocol: str) -> str:
    """The long name of a protocol.

    Raises:
        ValueError: it is unknown.

    Example:
        >>> protocol_name("dense-first")
        'dense first token'
    """
    if protocol not in (*PROTOCOLS, *PROTOCOLS.values()):
        names = ", ".join(f"{name!r} ({short!r})" for short, name in PROTOCOLS.items())
        raise ValueError(f"protocol {protocol!r} is not known; expected one of {names}")
    return PROTOCOLS.get(protocol, protocol)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as an aligned table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Segment:
    """A window, or one row of it, without padding.

    Attributes:
        inputs: what the model is called with.
        rows, columns: where its tokens stand in the window.
        side: before the names of what belongs to the tokens that are judged: "decoder_" of an encoder-decoder model.
    """

    inputs: dict[str, Any]
    rows: slice
    columns: slice
    side: str = ""

    @property
    def ids(self) -> Tensor:
        """The tokens that are judged, [batch, tokens]."""
        return self.inputs[f"{self.side}input_ids"]

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def cut(self, rows: slice, columns: slice) -> dict[str, Any]:
        """The inputs for these rows, and these of the tokens that are judged."""
        return {name: self._cut(name, value, rows, columns) for name, value in self.inputs.items()}

    def _cut(self, name: str, value: Any, rows: slice, columns: slice) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        of_tokens = name.startswith(self.side) and value.dim() > 1 and value.shape[1] == self.length
        if value.shape[0] != len(self.ids):
            return value[:, columns] if of_tokens else value
        return value[rows, columns] if of_tokens else value[rows]


@dataclasses.dataclass(frozen=True)
class _Window:
    """A window to judge: its rows without padding, the shape of its tokens, and a checksum of them."""

    segments: list[_Segment]
    shape: tuple[int, ...]
    checksum: int

    @classmethod
    def of(cls, model: nn.Module, index: int, window: Any) -> _Window:
        """Look at a window, which is a batch with `input_ids`."""
        if not isinstance(window, Mapping) or not isinstance(window.get("input_ids"), Tensor):
            raise TypeError(
                f"windows[{index}] is a {type(window).__name__} without a tensor input_ids; expected batches such as "
                "{'input_ids': [batch, tokens]}"
            )
        whole, mask = _whole(model, index, window)
        if whole.ids.dim() != 2:
            raise ValueError(f"{whole.side}input_ids has shape {tuple(whole.ids.shape)}, expected [batch, tokens]")
        if mask is not None and mask.shape != whole.ids.shape:
            raise ValueError(
                f"{whole.side}attention_mask has shape {tuple(mask.shape)}, expected {tuple(whole.ids.shape)} like "
                f"{whole.side}input_ids"
            )
        segments = [whole] if mask is None or bool(mask.all()) else _unpadded(whole, mask)
        ids = [window["input_ids"], whole.ids] if whole.side else [whole.ids]
        digest = zlib.crc32("".join(repr((tuple(each.shape), each.tolist())) for each in ids).encode())
        return cls(segments, tuple(whole.ids.shape), digest)


def _whole(model: nn.Module, index: int, window: Mapping[str, Any]) -> tuple[_Segment, Tensor | None]:
    """All of a window as one segment, and the mask of its tokens: the decoder's, where there is an encoder, too."""
    inputs, side = dict(window), ""
    labels = inputs.pop("labels", None)
    if is_two_sided(model, window):
        side = "decoder_"
        if isinstance(labels, Tensor) and inputs.get("decoder_attention_mask") is None:
            inputs["decoder_attention_mask"] = labels != -100
        if inputs.get("decoder_input_ids") is None:
            shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
            if shift is None:
                raise ValueError(f"windows[{index}] has no decoder_input_ids, which a {type(model).__name__} needs")
            inputs["decoder_input_ids"] = shift(labels=labels)
    elif bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
        raise ValueError(
            f"windows[{index}] has no decoder_input_ids and no labels; a {type(model).__name__} has a decoder, whose "
            "tokens are judged"
        )
    mask = inputs.pop(f"{side}attention_mask", None)
    return _Segment(inputs, slice(None), slice(None), side), mask


def _unpadded(whole: _Segment, mask: Tensor) -> list[_Segment]:
    """Each row's own tokens: no mask and no position can then be wrong."""
    segments = []
    for row in range(len(mask)):
        kept = mask[row].nonzero().flatten().tolist()
        if not kept:
            continue
        own = slice(kept[0], kept[-1] + 1)
        if own.stop - own.start != len(kept):
            raise ValueError(
                f"{whole.side}attention_mask has zeros between the tokens of row {row}; expected padding at the ends"
            )
        rows = slice(row, row + 1)
        segments.append(_Segment(whole.cut(rows, own), rows, own, whole.side))
    return segments


def _plan(index: int, segments: list[_Segment], protocol: str, prompt_tokens: int | None) -> list[tuple[_Segment, int]]:
    """The segments of window `index` that have something to judge, and how many of their first tokens go dense."""
    plan = []
    for segment in segments:
        prompt, judged = int(protocol == PROTOCOLS["dense-first"]), segment.length - 1
        if protocol == PROTOCOLS["dense-prompt"]:
            prompt = prompt_tokens if prompt_tokens is not None else max(segment.length // 2, 1)
            judged -= prompt
            if judged < 1:  # not left out, which would choose among the texts by their lengths
                raise ValueError(
                    f"window {index} has a row of {segment.length} tokens, {prompt} of them dense: no next token is "
                    "left to judge; give longer windows or a shorter prompt"
                )
        if judged > 0:
            plan.append((segment, prompt))
    if not plan:
        raise ValueError(f"window {index} has no next token to judge; expected rows of at least two tokens")
    return plan


def _dense(model: nn.Module, window: _Window) -> Tensor:
    """Logits of a whole window; zeros where it is padded."""
    made = None
    for segment in window.segments:
        with dense(model) if sparse_sites(model) else contextlib.nullcontext():
            logits = logits_of(model, run(model, segment.inputs, use_cache=False))
        if segment.columns == slice(None):
            return logits
        if made is None:
            made = logits.new_zeros(*window.shape, logits.shape[-1])
        made[segment.rows, segment.columns] = logits
    if made is None:
        raise ValueError("a window holds nothing but padding")
    return made


def _sparse(model: nn.Module, segment: _Segment, prompt: int, simulation: Simulation | None) -> Tensor:
    """Logits of the tokens after the first `prompt` ones, which go dense into the key-value cache."""
    on = sparse_prefill if simulation is None else simulation.on
    off = dense if simulation is None else contextlib.nullcontext
    if prompt == 0:
        with on(model):
            return logits_of(model, run(model, segment.inputs, use_cache=False))
    first, rest = (segment.cut(slice(None), at) for at in (slice(0, prompt), slice(prompt, None)))
    with off(model):
        cache = cached(model, cache_of(run(model, first, use_cache=True, logits_to_keep=1)))
    with on(model):
        return logits_of(model, run(model, {**rest, **cache}, use_cache=True))


def _judge(
    model: nn.Module,
    plan: Sequence[tuple[_Segment, int]],
    dense: Tensor,
    protocol: str,
    is_sparse: bool,
    simulation: Simulation | None,
) -> LogitSums:
    """Sums over the positions of a window that are judged, given the dense logits of the whole window."""
    sums = LogitSums()
    for segment, prompt in plan:
        before, ids = dense[segment.rows, segment.columns], segment.ids
        runs = is_sparse or simulation is not None
        after = _sparse(model, segment, prompt, simulation) if runs else before[:, prompt:]
        sums += _compare(before[:, prompt:], after, ids[:, prompt:])
        del after  # or it would still be there while the next segment's are made
        if protocol == PROTOCOLS["dense-first"]:  # its own logits are the dense model's
            sums += _compare(before[:, :prompt], before[:, :prompt], ids[:, : prompt + 1])
    return sums


def _compare(before: Tensor, after: Tensor, ids: Tensor) -> LogitSums:
    """Sums over predicted positions, a few of one row at a time.

    before, after: [batch, tokens, vocabulary]; ids: [batch, tokens], with one more token to predict or without.
    """
    targets = ids[:, 1:].to(after.device)
    rows, tokens = targets.shape
    size = max(_ENTRIES // after.shape[-1], 1)
    places = ((row, slice(start, min(start + size, tokens))) for row in range(rows) for start in range(0, tokens, size))
    return compare_logits(before, after, places, targets, agreement=True)


_ENTRIES = 2**22  # of logits that are float32 at a time: 16 MB


def _window_figures(window: _Window, sums: LogitSums) -> dict[str, float]:
    return {
        "tokens": sums.outputs,
        "nll": sums.nll / sums.outputs,
        "dense_nll": sums.dense_nll / sums.outputs,
        "kl": sums.kl / sums.outputs,
        "agreement": sums.agreements / sums.outputs,
        "checksum": window.checksum,
    }


def _evaluation(per_window: Sequence[Mapping[str, float]], **settings: Any) -> Evaluation:
    tokens = [window["tokens"] for window in per_window]

    def mean(name: str, less: str | None = None) -> tuple[float, float]:
        return mean_and_error([each[name] - (each[less] if less else 0.0) for each in per_window], tokens)

    nll, dense_nll, increase = mean("nll"), mean("dense_nll"), mean("nll", "dense_nll")
    kl, agreement = mean("kl"), mean("agreement")
    perplexity, dense_perplexity, ratio = _exp(nll[0]), _exp(dense_nll[0]), _exp(increase[0])
    return Evaluation(
        perplexity=perplexity,
        dense_perplexity=dense_perplexity,
        kl=kl[0],
        agreement=agreement[0],
        tokens=int(sum(tokens)),
        windows=len(tokens),
        perplexity_increase=ratio - 1,
        perplexity_error=perplexity * nll[1],  # delta method: d exp(m) = exp(m) dm
        dense_perplexity_error=dense_perplexity * dense_nll[1],
        kl_error=kl[1],
        agreement_error=agreement[1],
        perplexity_increase_error=ratio * increase[1],
        per_window=tuple(per_window),
        **{"sparsity": math.nan, **settings},
    )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:  # a model broken by too much sparsity still gets its figures
        return math.inf


@contextlib.contextmanager
def count_anew(model: nn.Module) -> Iterator[Callable[[], float]]:
    """The sparsity that this thread achieves in the block, NaN if the model does not count; its counters start anew."""
    try:
        sparsity(model, reset=True, warn=False)
    except ValueError:
        yield lambda: math.nan
        return
    with counting(model) as report:
        yield lambda: report().total


def _error(error: float, form: str) -> str:
    return "" if math.isnan(error) else f" ± {error:{form}}"


def signed(value: float, error: float) -> str:
    """A change in percent, with its sign and its standard error."""
    return f"{value:+.2%}{_error(error, '.2%')}"
