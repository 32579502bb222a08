"""Methods by budgets on one model: quality, bytes and speed of every run, in one JSON that later calls go on with."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deadband.allocation.thresholds import Thresholds, check_sparsity
from deadband.calibration.calibration import Calibration
from deadband.calibration.site_statistics import EDGES, SiteStatistics
from deadband.evaluation.generation import end_tokens, prompt_ids
from deadband.evaluation.page import VERSION
from deadband.evaluation.quality import PROTOCOL, columns, dense_logits, evaluate, protocol_name
from deadband.evaluation.speed import bytes_per_token, decode_seconds
from deadband.files import finite, write_json
from deadband.layers.experts import module_at
from deadband.layers.sites import find_blocks, sparse_sites, weight_bytes
from deadband.running.batches import taken, token_count
from deadband.running.forward import evaluating
from deadband.running.greedy_decoding import continue_greedily
from deadband.running.timing import machine, median
from deadband.sparsify.report import SparsityReport, sparsity
from deadband.sparsify.sparsify import densify_, sparsify_

BINS = 60  # of each site's histogram
TAILS = (0.001, 0.9999)  # quantiles of the scores between which they lie; what is beyond counts in the bins at the ends
WARMUP = 2  # tokens decoded before those that are timed
# What has to be the same for the figures of two calls to stand in one table, and how a message calls it.
_SETTINGS = {
    "weights": "weights",
    "dtype": "dtype",
    "protocol": "protocol",
    "prompt_tokens": "length of the dense prompt",
    "calibration_windows": "tokens to calibrate on",
    "windows": "tokens to judge on",
    "prompt": "prompt",
    "speed": "choice whether to measure speed",
    "samples": "choice whether to continue the prompt",
    "decode_tokens": "number of decoded tokens",
    "sample_tokens": "number of tokens to continue the prompt with",
    "processor": "processor",
    "kernels": "kernels",
    "threads": "number of threads",
    "torch": "torch",
    "transformers": "transformers",
    "deadband": "deadband",
}
PROMPT = "The three most important rules for writing clear documentation are"
_UNREADABLE = ("weights", "calibration_windows", "windows")  # of which a message shows no values


def sweep(
    model: Any,
    tokenizer: Any,
    *,
    methods: Sequence[Any],
    budgets: Sequence[float],
    calibration_windows: Iterable[Any],
    windows: Iterable[Any],
    output: str | os.PathLike,
    name: str = "",
    calibrated_on: str = "",
    judged_on: str = "",
    prompt: str = PROMPT,
    protocol: str = PROTOCOL,
    prompt_tokens: int | None = None,
    speed: bool = True,
    samples: bool = True,
    decode_tokens: int = 32,
    sample_tokens: int = 48,
    overwrite: bool = False,
    say: Callable[[str], object] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit every method at every budget, judge each beside the dense model, and keep `output` up to date after each run.

    A call with the `output` of an earlier one goes on with it: runs that are finished there are kept, those that failed
    are tried again, and methods and budgets may be added. The model is dense again after every run and at the end,
    whatever happened. Of logits, the dense model's on all windows are held; of models, two with `speed`.

    Args:
        model: a dense causal language model; with `speed`, on the CPU.
        tokenizer: its tokenizer.
        methods: names out of `deadband.evaluation.methods.METHODS`, or methods like those there.
        budgets: fractions of the sites' weight bytes to skip, from 0 up to but not 1.
        calibration_windows, windows: batches to fit on and to judge on, as `deadband.running.text.token_windows` makes.
        output: the JSON file to write.
        name, calibrated_on, judged_on: what to call the model and the texts.
        prompt: text that is continued, and that decoding starts with.
        protocol, prompt_tokens: which tokens are sparse while judged, see `deadband.evaluation.quality.evaluate`.
        speed: time the decoding of every run, taking turns with a copy of the dense model, which doubles the memory.
        samples: keep each run's continuation of the prompt.
        decode_tokens, sample_tokens: tokens to time, and to continue the prompt with.
        overwrite: begin anew whatever `output` holds.
        say: called with one line after every run.
        progress: show progress bars on a terminal.

    Returns:
        The JSON object that `output` holds: `runs`, `unreachable` [method, budget] pairs, `failed` ones with their
        error, `sites`, `dense` and how all was made. `table` and `deadband.evaluation.page.write_report` show it. A
        run's `tokens_per_second` is its `speedup` over the dense model, with which it took turns, times the median
        speed of the dense model over all runs; what was `measured` stands beside it.

    Raises:
        ValueError: an unknown method or protocol, a budget out of range, nothing to run, a sparse model, a prompt that
            is empty or too long, or an `output` that is something else or was made with other settings.
        OSError: `output` cannot be written.
    """
    from deadband.evaluation.methods import method_of

    chosen = {each.name: each for each in (method_of(one) if isinstance(one, str) else one for one in methods)}
    budgets = list(dict.fromkeys(map(check_sparsity, budgets)))
    calibration_windows, windows = taken(calibration_windows, "calibration_windows"), taken(windows, "windows")
    _check(model, chosen, budgets, speed, decode_tokens, sample_tokens)
    lengths = (decode_tokens + WARMUP if speed else 0, sample_tokens if samples else 0)
    ids = prompt_ids(model, tokenizer, prompt, max(lengths)).to(model.device)
    about = machine()
    settings = _settings(
        model, calibration_windows, windows, about,
        protocol=protocol_name(protocol), prompt_tokens=prompt_tokens, prompt=prompt, speed=speed, samples=samples,
        decode_tokens=decode_tokens if speed else None, sample_tokens=sample_tokens if samples else None,
    )  # fmt: skip
    path = Path(output)
    earlier = {} if overwrite or not path.exists() else _earlier(path, settings)
    state = {
        "version": VERSION,
        "model": name,
        "dtype": settings["dtype"],
        "protocol": settings["protocol"],
        "calibrated_on": {"name": calibrated_on, "tokens": token_count(model, calibration_windows)},
        "judged_on": {"name": judged_on, **_judged_on(calibration_windows, windows)},
        "machine": about,
        "prompt": prompt,
        "settings": settings,
        **_gone_on_with(earlier, chosen, budgets),
    }
    measuring = _Sweep(model, tokenizer, state, path, windows, ids, say or (lambda line: None), progress)
    measuring.run(chosen, budgets, calibration_windows)
    return state


def _check(
    model: Any, chosen: Mapping[str, Any], budgets: Sequence[float], speed: bool, decode_tokens: int, sample_tokens: int
) -> None:
    """A ValueError if there is nothing to run, or the model cannot be measured."""
    if not chosen or not budgets:
        raise ValueError("methods or budgets is empty; expected at least one of each")
    if sparse_sites(model):
        raise ValueError("the model is sparse already; densify_ it, or give the dense model")
    if speed and model.device.type != "cpu":
        raise ValueError(f"speed is measured on the CPU and the model is on {model.device}; pass speed=False")
    if decode_tokens < 1 or sample_tokens < 1:
        raise ValueError(f"decode_tokens={decode_tokens} and sample_tokens={sample_tokens}; expected at least one")


def _settings(
    model: Any, calibration_windows: Sequence[Any], windows: Sequence[Any], about: Mapping[str, Any], **choices: Any
) -> dict[str, Any]:
    """What has to be the same in a call that goes on with this one."""
    made = {
        "weights": _digest(_weights(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "calibration_windows": _digest(map(_token_bytes, calibration_windows)),
        "windows": _digest(map(_token_bytes, windows)),
        **choices,
        **about,
    }
    return {key: made[key] for key in _SETTINGS if key in made}


def _judged_on(calibration_windows: Sequence[Any], windows: Sequence[Any]) -> dict[str, int]:
    """How many windows are judged, how long they are, and how many of them serve calibration too."""
    again = {_token_bytes(window) for window in calibration_windows}
    return {
        "windows": len(windows),
        "window": max((each["input_ids"].shape[1] for each in windows), default=0),
        "also_calibrated_on": sum(_token_bytes(window) in again for window in windows),
    }


def _gone_on_with(earlier: Mapping[str, Any], chosen: Iterable[str], budgets: Iterable[float]) -> dict[str, Any]:
    """What an earlier call found, without its failures that are asked for again."""
    asked = {(method, budget) for method in chosen for budget in budgets}
    return {
        "methods": list(dict.fromkeys([*earlier.get("methods", ()), *chosen])),
        "budgets": sorted({*earlier.get("budgets", ()), *budgets}),
        "dense": earlier.get("dense", {}),
        "sites": earlier.get("sites", {}),
        "runs": earlier.get("runs", []),
        "unreachable": earlier.get("unreachable", []),
        "failed": [each for each in earlier.get("failed", ()) if (each["method"], each["budget"]) not in asked],
    }


class _Sweep:
    """One call of `sweep`: what its runs share."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        state: dict[str, Any],
        path: Path,
        windows: Sequence[Any],
        ids: Tensor,
        say: Callable[[str], object],
        progress: bool,
    ) -> None:
        self.model, self.tokenizer, self.state, self.path = model, tokenizer, state, path
        self.windows, self.ids, self.say, self.progress = windows, ids, say, progress
        self.settings = state["settings"]
        self.number = self.left = 0  # runs that have ended, of how many
        self.plain: Any = None  # the dense copy to time

    def run(self, chosen: Mapping[str, Any], budgets: Sequence[float], calibration_windows: Sequence[Any]) -> None:
        """All runs that are asked for and not there yet."""
        asked = {(method, budget) for method in chosen for budget in budgets}
        done = {(each["method"], each["budget"]) for each in self.state["runs"]}
        done |= {tuple(pair) for pair in self.state["unreachable"]}
        self.left = len(asked - done)
        if kept := len(asked & done):
            self.say(f"{kept} of {len(asked)} runs are kept from an earlier call")
        self.write()  # that it can be written is found out before the work
        if not asked <= done:
            self.prepare(calibration_windows)
            for method in chosen.values():
                self.run_method(method, [budget for budget in budgets if (method.name, budget) not in done])

    def prepare(self, calibration_windows: Sequence[Any]) -> None:
        """What comes before the first run: the dense model's figures, and the sites."""
        from deadband.evaluation.methods import Setup

        self.reference = dense_logits(self.model, self.windows, progress=self.progress)
        self.setup = Setup(self.model, calibration_windows, progress=self.progress)
        if not self.state["sites"]:
            self.state["sites"] = finite(describe_sites(self.model, self.setup.calibration("magnitude")))
        if not self.state["dense"]:
            found = self.evaluate()
            self.state["dense"] = finite(
                {
                    "perplexity": found.dense_perplexity,
                    "perplexity_error": found.dense_perplexity_error,
                    "bytes_per_token": bytes_per_token(self.model),
                    "tokens_per_second": None,  # comes with the runs
                    "text": self.continuation(),
                }
            )
        self.write()

    def run_method(self, method: Any, budgets: list[float]) -> None:
        """Fit a method, and measure it at every budget."""
        if not budgets:
            return
        start = time.perf_counter()
        try:
            with _dense_again(self.model):
                fits = list(method.fit(self.setup, budgets))
            if len(fits) != len(budgets):
                raise ValueError(f"{len(fits)} results for {len(budgets)} budgets")
        except Exception as error:  # whatever it is, the other methods may do better
            for budget in budgets:
                self.fail(method, budget, error)
            return
        seconds = time.perf_counter() - start
        for budget in budgets:
            fitted = fits.pop(0)  # its run is the last that needs it; some are as large as the model
            if fitted is None:
                self.state["unreachable"].append([method.name, budget])
                self.end(f"{method.title} cannot reach {_percent(budget)}")
                continue
            start = time.perf_counter()
            try:
                with _dense_again(self.model), evaluating(self.model):
                    figures = self.measure(fitted)
            except Exception as error:
                self.fail(method, budget, error)
                continue
            spent = {"seconds": seconds / len(budgets) + time.perf_counter() - start, "fit_seconds": seconds}
            about = {"method": method.name, "title": method.title, "paper": method.paper, "budget": budget}
            made = finite({**about, **figures, **spent})
            self.state["runs"].append(made)
            _compare_speeds(self.state)
            self.end(_line(made))

    def measure(self, fitted: Any) -> dict[str, Any]:
        """The figures of one run; leaves the model sparse."""
        real = isinstance(fitted, Thresholds)
        if real:
            sparsify_(self.model, fitted)
            found = self.evaluate()
            achieved, size = sparsity(self.model, warn=False), bytes_per_token(self.model)
        else:
            fitted.reset()
            found = self.evaluate(simulation=fitted)
            achieved = fitted.sparsity
            size = bytes_per_token(self.model) - _skipped_bytes(self.model, achieved)
        quality = dataclasses.asdict(found)
        for key in ("dense_perplexity", "dense_perplexity_error", "tokens", "windows", "protocol", "prompt_tokens"):
            del quality[key]  # of the sweep, not of the run
        speeds = self.speeds() if real and self.settings["speed"] else {}
        return {
            **quality,
            "sparsity": achieved.total,
            "bytes_per_token": size,
            "speedup": speeds["sparse"] / speeds["dense"] if speeds else None,
            "measured": speeds or None,
            "tokens_per_second": speeds.get("sparse"),  # until it is set beside the other runs
            "simulated": not real,
            "criterion": fitted.criterion if real else None,
            "picked": fitted.reason or None if real else None,
            "text": self.continuation(None if real else fitted),
            "sites": _site_figures(fitted if real else None, achieved),
        }

    def evaluate(self, **more: Any) -> Any:
        """The model as it is beside the dense one."""
        return evaluate(
            self.model,
            self.windows,
            reference=self.reference,
            protocol=self.settings["protocol"],
            prompt_tokens=self.settings["prompt_tokens"],
            progress=self.progress,
            **more,
        )

    def speeds(self) -> dict[str, float]:
        """Tokens per second of the sparse model and of the dense one as transformers runs it, taking turns."""
        if self.plain is None:
            self.plain = densify_(copy.deepcopy(self.model))
        models = {"dense": self.plain, "sparse": self.model}
        tokens = self.settings["decode_tokens"]
        times = decode_seconds(models, self.ids, tokens=tokens, progress=self.progress)
        return {key: 1 / median(seconds) for key, seconds in times.items()}

    def continuation(self, simulation: Any = None) -> str | None:
        """The prompt continued greedily as in generate: the prompt dense (if longer than 4 tokens), the rest sparse."""
        if not self.settings["samples"]:
            return None
        sparse = simulation.on(self.model) if simulation is not None else None
        most, stops = self.settings["sample_tokens"], end_tokens(self.model)
        tokens = continue_greedily(self.model, self.ids, most, stops, sparse=sparse)
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def fail(self, method: Any, budget: float, error: Exception) -> None:
        """Note that a run failed."""
        message = " ".join(f"{type(error).__name__}: {error}".split())
        message = message if len(message) <= 500 else message[:500] + " ..."
        self.state["failed"].append({"method": method.name, "budget": budget, "error": message})
        self.end(f"{method.title} at {_percent(budget)} failed: {message}")

    def end(self, line: str) -> None:
        """A run has ended: write, then say so."""
        self.write()
        self.number += 1
        self.say(f"[{self.number}/{self.left}] {line}")

    def write(self) -> None:
        """Write the JSON, all or nothing, in an order that does not depend on how many calls it took."""
        place = {method: index for index, method in enumerate(self.state["methods"])}
        self.state["runs"].sort(key=lambda each: (place[each["method"]], each["budget"]))
        self.state["failed"].sort(key=lambda each: (place[each["method"]], each["budget"]))
        self.state["unreachable"].sort(key=lambda pair: (place[pair[0]], pair[1]))
        write_json(self.path, self.state)


def _compare_speeds(state: dict[str, Any]) -> None:
    """Speeds of all runs at one speed of the machine, which changes over the hours: each run's is what it was beside
    the dense model, times the median of all that the dense model had."""
    timed = [each for each in state["runs"] if each["measured"]]
    if timed:
        dense = statistics.median(each["measured"]["dense"] for each in timed)
        state["dense"]["tokens_per_second"] = dense
        for each in timed:
            each["tokens_per_second"] = each["speedup"] * dense


@contextlib.contextmanager
def _dense_again(model: nn.Module) -> Iterator[None]:
    """After the block the model is dense, whatever happened in it."""
    try:
        yield
    finally:
        if sparse_sites(model):
            densify_(model)


# Settings


def _earlier(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The sweep that a file holds; a ValueError if it is something else, or cannot be gone on with."""
    advice = "choose another output, or overwrite it"
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not {"version", "settings", "runs"} <= found.keys():
        raise ValueError(f"{os.fspath(path)!r} exists and is not a sweep; {advice}")
    if found["version"] != VERSION:
        raise ValueError(f"{os.fspath(path)!r} is a sweep of version {found['version']}, not {VERSION}; {advice}")
    if not _is_whole(found):
        raise ValueError(f"{os.fspath(path)!r} is a damaged sweep; {advice}")
    differ = []
    for key, words in _SETTINGS.items():
        before, now = found["settings"].get(key), settings[key]
        if before != now:
            differ.append(f"other {words}" if key in _UNREADABLE else f"another {words} ({before!r}, now {now!r})")
    if differ:
        raise ValueError(f"{os.fspath(path)!r} holds a sweep with {', '.join(differ)}; {advice}")
    return found


_KINDS = {
    "settings": dict, "methods": list, "budgets": list, "dense": dict, "sites": dict, "runs": list, "unreachable": list,
    "failed": list,
}  # fmt: skip
_OF_A_RUN = ("method", "budget", "title", "kl", "measured", "speedup", "simulated")


def _is_whole(found: Mapping[str, Any]) -> bool:
    """Whether a sweep that was read has all that going on with it takes."""
    if any(not isinstance(found.get(key), kind) for key, kind in _KINDS.items()):
        return False
    runs, failed = found["runs"], found["failed"]
    if not all(isinstance(each, dict) and {"method", "budget"} <= each.keys() for each in runs + failed):
        return False
    if not all({*_OF_A_RUN} <= each.keys() and _is_speed(each["measured"]) for each in runs):
        return False
    pairs = [[each["method"], each["budget"]] for each in runs + failed] + found["unreachable"]
    known = [[method, budget] for method in found["methods"] for budget in found["budgets"]]
    return all(pair in known for pair in pairs)


def _is_speed(measured: Any) -> bool:
    return measured is None or (isinstance(measured, dict) and isinstance(measured.get("dense"), (int, float)))


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[bytes]:
    """Names, shapes and some values of all parameters."""
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        index = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), 16), dtype=torch.float64).long()
        yield repr((name, tuple(parameter.shape), flat[index.to(flat.device)].double().tolist())).encode()


def _token_bytes(window: Mapping[str, Any]) -> bytes:
    tensors = {key: value for key, value in window.items() if isinstance(value, Tensor)}
    return repr({key: (tuple(tensors[key].shape), tensors[key].tolist()) for key in sorted(tensors)}).encode()


# Sites


def describe_sites(model: nn.Module, calibration: Calibration) -> dict[str, dict[str, Any]]:
    """Where each calibrated site stands in the model, the bytes of its weight, and a histogram of its scores.

    Example:
        >>> from deadband import calibrate
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))
        >>> sites = describe_sites(model, calibrate(model, [torch.randn(64, 4)], progress=False))
        >>> [(name, site["block"], site["depth"], site["kind"]) for name, site in sites.items()]
        [('0.0', '0', 0, '0'), ('1.0', '1', 1, '0')]
    """
    blocks = {name: depth for depth, name in enumerate(find_blocks(model))}
    sites = {}
    for name, site in calibration.sites.items():
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        rest = name if block is None else name[len(block) + 1 :]
        sites[name] = {
            "block": block,
            "depth": None if block is None else blocks[block],
            "kind": re.sub(r"(?<=\.)\d+(?=\.)", "*", rest),  # all experts of a mixture are of one kind
            "weight_bytes": site.weight_bytes,
            "histogram": {"criterion": calibration.criterion, **histogram(site)},
        }
    return sites


def histogram(site: SiteStatistics, bins: int = BINS) -> dict[str, Any]:
    """A site's scores above zero in at most `bins` bins of about equal width on a logarithmic axis.

    Returns:
        `edges` [bins + 1], `counts` [bins] (what is beyond the edges counts in the bins at the ends), and `zeros`, the
        fraction of entries that are zero; no edges if all are.
    """
    counts = np.array(site.histogram, np.int64)
    zeros, counts[0] = int(counts[0]), 0
    total = int(counts.sum())
    share = zeros / site.entries if site.entries else math.nan
    if not total:
        return {"edges": [], "counts": [], "zeros": share}
    below = np.cumsum(counts)
    first, last = (int(np.searchsorted(below, tail * total)) for tail in TAILS)
    ends = np.geomspace(EDGES[first], EDGES[last + 1], bins + 1)
    # Bins begin and end where the calibration's own do, which are narrower, so that none of those is divided.
    at = np.unique(np.searchsorted(EDGES, ends * (1 - 1e-9)))
    kept = np.add.reduceat(counts, [0, *at[1:-1]])  # the first from zero, the last to infinity
    return {"edges": EDGES[at].tolist(), "counts": kept.tolist(), "zeros": share}


def _site_figures(thresholds: Thresholds | None, achieved: SparsityReport) -> dict[str, dict[str, Any]]:
    sites = {}
    for name, share in achieved.sites.items():
        rule = thresholds.rules.get(name) if thresholds is not None else None
        sites[name] = {
            "sparsity": share,
            "threshold": rule.threshold if rule is not None else None,
            "criterion": thresholds.criterion if thresholds is not None else None,
            "centered": rule is not None and rule.center is not None,
            "relative": rule is not None and rule.relative,
            "harm": thresholds.harm.get(name) if thresholds is not None else None,
        }
    return sites


def _skipped_bytes(model: nn.Module, achieved: SparsityReport) -> int:
    shares = {name: share for name, share in achieved.sites.items() if not math.isnan(share)}
    return round(sum(share * weight_bytes(module_at(model, name)) for name, share in shares.items()))


# Text


def table(sweep: Mapping[str, Any]) -> str:
    """Methods by budgets as text: KL, perplexity, agreement, sparsity, bytes and speed; `*` marks the best KL.

    Args:
        sweep: what `sweep` returned, or its JSON.
    """
    dense, runs = sweep["dense"], sweep["runs"]
    rows: list[tuple[str, ...]] = [
        ("method", "asked", "achieved", "KL, nats  ", "perplexity", "top-1", "MB/token", "tokens/s", "speed")
    ]
    if dense:
        perplexity = _number(dense.get("perplexity"), ".3f") + _error(dense.get("perplexity_error"), ".3f")
        size, speed = _mega(dense.get("bytes_per_token")), dense.get("tokens_per_second")
        costs = (_number(size, ".1f"), _number(speed, ".1f"), "")
        rows.append(("dense", "", "0.0%", "0  ", perplexity, "100.0%", *costs))
    titles = {each["method"]: each["title"] for each in runs}
    lost: dict[tuple[str, float], str] = {(method, budget): "unreachable" for method, budget in sweep["unreachable"]}
    lost |= {(each["method"], each["budget"]): "failed" for each in sweep["failed"]}
    for budget in sweep["budgets"]:
        here = {each["method"]: each for each in runs if each["budget"] == budget}
        judged = [each for each in here.values() if each["kl"] is not None]
        best = min(judged, key=lambda each: each["kl"], default=None) if len(judged) > 1 else None
        for method in sweep["methods"]:
            if method in here:
                rows.append(_row(here[method], here[method] is best))
            elif (method, budget) in lost:
                word = lost[method, budget] + "  "
                rows.append((titles.get(method, method), _percent(budget), "-", word, *["-"] * 4, ""))
    return "\n".join([columns(rows), *_notes(sweep, best_marked=any("*" in row[3] for row in rows))])


def _row(one: Mapping[str, Any], best: bool) -> tuple[str, ...]:
    ratio = one.get("speedup")
    return (
        one["title"],
        _percent(one["budget"]),
        _number(one.get("sparsity"), ".1%"),
        _kl(one) + (" *" if best else "  "),
        _number(one.get("perplexity_increase"), "+.2%") + _error(one.get("perplexity_increase_error"), ".2%"),
        _number(one.get("agreement"), ".1%") + _error(one.get("agreement_error"), ".1%"),
        _number(_mega(one.get("bytes_per_token")), ".1f"),
        _number(one.get("tokens_per_second"), ".1f"),
        "" if ratio is None else f"{ratio:.2f}x",
    )


def _notes(sweep: Mapping[str, Any], best_marked: bool) -> list[str]:
    """What has to be known to read the table."""
    judged, calibrated, about = sweep["judged_on"], sweep["calibrated_on"], sweep["machine"]
    windows = f"{judged['windows']} window{'s' * (judged['windows'] != 1)} of up to {judged['window']} tokens"
    notes = [
        f"{sweep['dtype']}, calibrated on {calibrated['tokens']:,} tokens of {calibrated['name'] or 'a text'}, "
        f"judged on {windows} of {judged['name'] or 'a text'}; protocol: {sweep['protocol']}",
        "±: one standard error over windows" if judged["windows"] > 1 else "one window: no standard errors",
    ]
    if best_marked:
        notes[-1] += "; *: the lowest KL of its budget"
    if sweep["settings"]["speed"]:
        notes.append(
            "speed: beside transformers' dense model, token by token in turns; tokens/s: that, times the dense model's "
            "median over all runs"
        )
    if any(each["simulated"] for each in sweep["runs"]):
        notes.append("no tokens/s: a method that is only simulated")
    if judged["also_calibrated_on"]:
        notes.append(f"{judged['also_calibrated_on']} of the windows judged were also calibrated on")
    notes += [f"{method} cannot reach {_percent(budget)}" for method, budget in sweep["unreachable"]]
    notes += [f"{each['method']} at {_percent(each['budget'])} failed: {each['error']}" for each in sweep["failed"]]
    versions = f"torch {about['torch']}, transformers {about['transformers']}"
    threads = f"{about['threads']} thread{'s' * (about['threads'] != 1)}"
    return [*notes, f"{about['processor']}, {threads}, kernels {about['kernels']}, {versions}"]


def _line(one: Mapping[str, Any]) -> str:
    speed = f", {one['speedup']:.2f}x the dense speed" if one["speedup"] is not None else ""
    return (
        f"{one['title']} at {_percent(one['budget'])}: KL {_kl(one)}, agreement {_number(one['agreement'], '.1%')}, "
        f"{_number(one['sparsity'], '.1%')} skipped, {_number(_mega(one['bytes_per_token']), '.1f')} MB/token{speed} "
        f"({one['seconds']:.0f} s)"
    )


def _kl(one: Mapping[str, Any]) -> str:
    kl, error = one.get("kl"), one.get("kl_error")
    form = ".1e" if kl is not None and 0 < abs(kl) < 0.00095 else ".4f"
    return _number(kl, form) + _error(error, form)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _error(value: float | None, form: str) -> str:
    return "" if value is None else f" ± {format(value, form)}"


def _mega(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def _percent(budget: float) -> str:
    return f"{round(100 * budget, 1):g}%"
