"""Tasks of EleutherAI's lm-evaluation-harness on the dense and the sparse form of a model, side by side."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import importlib.metadata
import importlib.util
import logging
import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from deadband.evaluation.quality import PROTOCOL, columns, count_anew
from deadband.layers.sites import sparse_sites
from deadband.layers.sparse import BUFFERS
from deadband.ops.products import fast_products
from deadband.running.divergence import mean_and_error
from deadband.running.forward import evaluating
from deadband.sparsify.scopes import dense, sparse_prefill

FORCED = f"{PROTOCOL} (sparse prefill forced: prompts and answers alike)"


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | float | None = None,
    include_path: str | os.PathLike | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    use_cache: str | os.PathLike | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run lm-evaluation-harness tasks on the dense form of a sparse model and on the sparse form, every token sparse.

    Most tasks only score prompts, which `generate` would run dense: without forcing the sparse path there, the two
    forms would be the same model. Local tasks run offline: a YAML file with `dataset_path: json` and
    `dataset_kwargs: {data_files: ...}`, in `include_path`; a relative path of data is relative to the current folder.
    The harness seeds the generators of random, numpy and torch.

    Args:
        model: a sparse transformers language model.
        tokenizer: its tokenizer; a copy of it may get a padding token.
        tasks: names of tasks or groups, or paths of YAML files.
        limit: documents of each task: a number, or a fraction below 1; all by default.
        include_path: a folder with YAML files of more tasks.
        num_fewshot: solved examples before each question; as the task says by default.
        batch_size: requests run together; with more than one, `sparsity` counts padding too.
        use_cache: the beginning of the paths where answers are kept for later calls. Each form of each model has a file
            of its own: with another threshold, weight or token, nothing is answered from it. What is answered so is not
            counted in `sparsity`.
        options: of `lm_eval.simple_evaluate`, for example `apply_chat_template=True`.

    Returns:
        {"protocol": which tokens were sparse, "sparsity": achieved, by weight bytes, or NaN if the model does not
        count, "limit", "num_fewshot", "lm_eval": its version, "tasks": {task: {"samples": documents, or None for
        groups, "metrics": {metric: {"dense", "dense_error", "sparse", "sparse_error", "difference",
        "difference_error"}}}}}. Metrics and their standard errors are the harness's; the difference is sparse less
        dense, its error paired over documents (Miller 2024, arXiv 2411.00640, section 4.2), NaN where the metric is no
        mean over documents or there are fewer than two.

    Raises:
        ImportError: lm-eval is missing: `pip install "deadband[eval]"`.
        ValueError: the model is not sparse, the tokenizer has no end token, or a task is unknown.

    Example:
        >>> figures = run_tasks(model, tokenizer, ["arc_easy"], limit=100)  # doctest: +SKIP
        >>> figures["tasks"]["arc_easy"]["metrics"]["acc"]["difference"]  # doctest: +SKIP
        -0.02
    """
    require_lm_eval()
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    _check(model, tokenizer, names, include_path)
    settings = {"tasks": names, "limit": limit, "num_fewshot": num_fewshot}
    with _quiet(), evaluating(model), fast_products(model):
        settings |= {"task_manager": _task_manager(names, include_path), **options, "log_samples": True}
        before, after, sparsity = _run_both(model, tokenizer, settings, batch_size, use_cache)
    return {
        "protocol": FORCED,
        "sparsity": sparsity,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "lm_eval": importlib.metadata.version("lm-eval"),
        "tasks": {name: _side_by_side(name, before, after) for name in after["results"]},
    }


def _check(model: Any, tokenizer: Any, names: Sequence[str], include_path: str | os.PathLike | None) -> None:
    """A ValueError if there is nothing to compare or to ask."""
    if not sparse_sites(model):
        raise ValueError(f"no layer of this {type(model).__name__} is sparse; there is nothing to compare")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token (eos_token), which the harness needs to begin and end texts")
    if not names:
        raise ValueError("tasks is empty; expected at least one name of a task")
    if include_path is not None and not os.path.isdir(include_path):
        raise ValueError(f"there is no folder {os.fspath(include_path)!r} to look for tasks in")


def _run_both(
    model: Any, tokenizer: Any, settings: dict[str, Any], batch_size: int, use_cache: str | os.PathLike | None
) -> tuple[Mapping[str, Any], Mapping[str, Any], float]:
    """What the harness says of the dense and of the sparse form, and the sparsity that the latter achieved."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    language_model = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    with dense(model):
        before: Any = simple_evaluate(language_model, **settings, **_cache_of(model, tokenizer, "dense", use_cache))
    with sparse_prefill(model), count_anew(model) as achieved:
        after: Any = simple_evaluate(language_model, **settings, **_cache_of(model, tokenizer, "sparse", use_cache))
    return before, after, achieved()


def _cache_of(model: Any, tokenizer: Any, form: str, use_cache: str | os.PathLike | None) -> dict[str, str]:
    """Where the harness keeps the answers of one form of a model; it knows them by the questions alone."""
    if use_cache is None:
        return {}
    return {"use_cache": f"{os.fspath(use_cache)}-{form}-{_fingerprint(model, tokenizer, form)}"}


def _fingerprint(model: Any, tokenizer: Any, form: str) -> str:
    """A digest of a model's configuration, tokens and weights, and of what makes it sparse unless the form is dense."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    tokens = (sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map)
    digest = hashlib.blake2b(repr((config, tokens)).encode(), digest_size=8)
    sites = sparse_sites(model)
    ours = {f"{name}.{part}" for name in sites for part in BUFFERS}
    left_out = ours if form == "dense" else {f"{name}.counts" for name in sites}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in left_out:
            continue
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    if form != "dense":
        digest.update(repr([name for name, site in sites.items() if site.relative]).encode())
    return digest.hexdigest()


def tasks_table(figures: Mapping[str, Any]) -> str:
    """What `run_tasks` returned as text: one row for each metric."""
    rows = [("task", "metric", "dense", "sparse", "paired difference")]
    for task, result in figures["tasks"].items():
        for metric, row in result["metrics"].items():
            cells = [_with_error(row, name, "") for name in ("dense", "sparse")]
            rows.append((task, metric, *cells, _with_error(row, "difference", "+")))
    limit = f"; at most {figures['limit']:g} of each task's documents" if figures["limit"] is not None else ""
    return (
        f"{columns(rows)}\nprotocol: {figures['protocol']}; sparsity achieved {figures['sparsity']:.1%}\n"
        f"lm-eval {figures['lm_eval']}{limit}; ±: one standard error over documents"
    )


def require_lm_eval() -> None:
    """An error that says what to install, if lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError('tasks run on EleutherAI\'s lm-evaluation-harness: pip install "deadband[eval]"')


def _task_manager(names: Sequence[str], include_path: str | os.PathLike | None) -> Any:
    """The harness's index of tasks, without its own thousands, which take 10 s to read, where nothing needs them."""
    from lm_eval.tasks import TaskManager

    folder = os.fspath(include_path) if include_path is not None else None
    if folder is not None:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):  # groups may hold tasks of the harness
            return manager
    manager = TaskManager(include_path=folder)
    known = manager.all_tasks
    for name in names:
        if name not in known and not os.path.isfile(name):
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; there are {', '.join(map(repr, near))}" if near else ""
            raise ValueError(f"task {name!r} is neither a known task or group nor a YAML file{hint}")
    return manager


def _side_by_side(task: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of one task or group: what both runs say, and the paired difference."""
    dense_row, row = before["results"][task], after["results"][task]
    samples = after.get("n-samples", {}).get(task, {}).get("effective")
    metrics = {}
    for key in row:
        metric, _, kept = key.partition(",")
        if metric.endswith("_stderr") or not kept or not _is_number(row[key]):
            continue
        error = f"{metric}_stderr,{kept}"
        metrics[metric if kept == "none" else f"{metric},{kept}"] = {
            "dense": float(dense_row[key]),
            "dense_error": _number(dense_row.get(error)),
            "sparse": float(row[key]),
            "sparse_error": _number(row.get(error)),
            "difference": float(row[key]) - float(dense_row[key]),
            "difference_error": _paired_error(
                [_by_document(result, task, metric, kept) for result in (before, after)],
                [float(dense_row[key]), float(row[key])],
            ),
        }
    return {"samples": samples, "metrics": metrics}


def _by_document(result: Mapping[str, Any], task: str, metric: str, kept: str) -> dict[Any, float]:
    """A metric's value for each document, NaN where it is not a number."""
    samples = result.get("samples", {}).get(task, ())
    return {each["doc_id"]: _number(each[metric]) for each in samples if each["filter"] == kept and metric in each}


def _paired_error(documents: Sequence[Mapping[Any, float]], totals: Sequence[float]) -> float:
    """Standard error of the mean difference, NaN if the totals are not the means of the documents' values."""
    before, after = documents
    if not before or before.keys() != after.keys():
        return math.nan
    for values, total in zip(documents, totals, strict=True):
        if not math.isclose(mean_and_error(list(values.values()))[0], total, rel_tol=1e-6, abs_tol=1e-9):
            return math.nan
    return mean_and_error([after[key] - before[key] for key in before])[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else math.nan


def _with_error(row: Mapping[str, float], name: str, sign: str) -> str:
    error = row[f"{name}_error"]
    return f"{row[name]:{sign}.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No advice from the harness, which warns of every model that comes as an object."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
