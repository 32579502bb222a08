"""What long runs of memory are worth where rows of weights are skipped. Four tables.

*rows*: how long the runs of kept rows are, token by token, for the inputs of down_proj and o_proj of real models: in
their own order, with the channels that calibration text keeps most often first (within a head for o_proj, the same for
the heads of a group, as their values share rows), and at random. Judged on other text, in the sparse model.
*replay*: the time of a down_proj with those masks, weights from memory. *first*: as many rows, all neighbours.
*merged*: layers on one input in one call, each with codes of its own, against one layer of all their outputs, where an
input's codes lie side by side. Possible only where the layers' rules are equal.
*pages*: layers whose weights have memory of their own, against those in blocks of huge pages
(`deadband.layers.memory`).

`rows` has to run before `replay`, which takes its masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import KEPT, parser
from safetensors.torch import load_file, save_file
from torch import Tensor

import deadband
from deadband.app.models import gemma3, load_model, load_tokenizer, smollm2
from deadband.layers import memory
from deadband.layers.formats import empty_weight
from deadband.layers.memory import on_huge_pages
from deadband.ops import fused, kernels
from deadband.ops.skipping import keep_mask
from deadband.running.forward import threads
from deadband.running.text import python_documentation, read_text, token_windows
from deadband.running.timing import interleave, median

MODELS = {"smollm2": smollm2, "gemma3": gemma3}
LEVELS = (0.25, 0.4, 0.5)
FORMATS = ("bfloat16", "int8", "int4")
POOL = 500_000_000  # bytes of weights that take turns
TOKENS = 1024  # that masks are counted on, of each text
ORDERS = ("own", "sorted", "random", "first")
MERGED = {
    "1b q|k|v": (2048, (2048, 512, 512)),
    "1b gate|up": (2048, (8192, 8192)),
    "3b q|k|v": (3072, (3072, 1024, 1024)),
    "3b gate|up": (3072, (8192, 8192)),
}  # inputs and outputs
PAGES = {
    **MERGED,
    "1b o": (2048, (2048,)),
    "1b down": (8192, (2048,)),
    "135m q|k|v": (576, (576, 192, 192)),
    "135m gate|up": (576, (1536, 1536)),
    "135m down": (1536, (576,)),
}


# ------------------------------------------------------------------------------------------------------------ the rows


def kept(model: Any, sites: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Which entries of each site every token keeps, bool [tokens, in_features], in the sparse model."""
    found: dict[str, list[Tensor]] = {name: [] for name in sites}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor]) -> None:
            x = args[0].flatten(0, -2)
            found[name].append(keep_mask(x, module.threshold, module.scale, module.center, module.relative))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in sites]
    with deadband.sparse_prefill(model), torch.inference_mode():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(masks) for name, masks in found.items()}


def order(masks: Tensor, name: str, config: Any) -> Tensor:
    """The order of a site's inputs that a model allows: most often kept first."""
    often = masks.float().mean(0)
    if not name.endswith("o_proj"):
        return often.argsort(descending=True)
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    heads = often.view(config.num_key_value_heads, -1, size)
    within = heads.mean(1, keepdim=True).argsort(-1, descending=True).expand_as(heads)
    first = torch.arange(0, often.numel(), size).view(*heads.shape[:2], 1)
    return (within + first).flatten()


def run_lengths(masks: Tensor) -> dict[str, float]:
    """Of the runs of kept rows: the mean length, and the share of kept rows in runs of at least 4 and 16."""
    edges = torch.nn.functional.pad(masks.to(torch.int8), (1, 1)).diff(dim=-1)
    lengths = (edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]
    total = lengths.sum()
    return {
        "mean": (total / len(lengths)).item(),
        "in_4": (lengths[lengths >= 4].sum() / total).item(),
        "in_16": (lengths[lengths >= 16].sum() / total).item(),
    }


def collect(key: str, levels: list[float], method: str, data: str | None) -> Iterator[dict[str, Any]]:
    """A row for each layer and level; some tokens' masks are written to `KEPT` for `replay`."""
    folder = MODELS[key]()
    tokenizer = load_tokenizer(folder)
    learnt, judged = python_documentation()
    texts = (learnt, read_text(data) if data else judged)
    batches, other = (token_windows(tokenizer, text, tokens=TOKENS, window=512) for text in texts)
    calibration = deadband.calibrate(load_model(folder, dtype="float32"), batches)
    masks_to_keep: dict[str, Tensor] = {}
    for level in levels:
        model = load_model(folder, dtype="float32")
        deadband.sparsify_(model, calibration.allocate(level, method, model=model, batches=batches[:1]))
        sites = [name for name in calibration.sites if name.endswith(("down_proj", "o_proj"))]
        before, after = kept(model, sites, batches), kept(model, sites, other)
        for name in sites:
            chosen = order(before[name], name, model.config)
            own, ordered = after[name], after[name][:, chosen]
            often, seen = before[name].float().mean(0), own.float().mean(0)
            yield {
                "model": key, "method": method, "level": level, "site": name, "skipped": 1 - own.float().mean().item(),
                "own": run_lengths(own), "sorted": run_lengths(ordered),
                "random": run_lengths(own[:, torch.randperm(own.shape[1])]),
                "all_in_one": own.sum(1).float().mean().item(),
                "spread": own.float().mean(0).std().item(),
                "correlation": torch.corrcoef(torch.stack([often, seen]))[0, 1].item(),
            }  # fmt: skip
            some = torch.linspace(0, len(own) - 1, 64).long()
            masks_to_keep[f"{level}/{name}/own"] = own[some]
            masks_to_keep[f"{level}/{name}/sorted"] = ordered[some]
    KEPT.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: mask.contiguous() for name, mask in masks_to_keep.items()}, KEPT / f"runs-{key}-{method}.safetensors"
    )


def print_rows(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'':24}{'':>9}{'mean run of kept rows':>28}{'kept rows in runs >= 16':>28}{'std of a':>10}{'calibration':>12}"
    )
    print(f"{'site':24}{'skipped':>9}{'own':>10}{'sorted':>9}{'random':>9}{'own':>10}{'sorted':>9}{'random':>9}"
          f"{'rate':>10}{'to text':>12}")  # fmt: skip
    for row in rows:
        runs = [f"{row[each]['mean']:9.1f}" for each in ORDERS[:3]] + [
            f"{row[each]['in_16']:9.0%}" for each in ORDERS[:3]
        ]
        print(f"{row['site'].removeprefix('model.'):24}{row['skipped']:9.0%} {''.join(runs[:3])} {''.join(runs[3:])}"
              f"{row['spread']:10.2f}{row['correlation']:12.2f}")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- replays


class Weights:
    """Random weights of layers on one input, so many sets that each comes from memory; packed for `packed_linears`."""

    def __init__(self, form: str, inputs: int, outputs: tuple[int, ...], threshold: Tensor | None) -> None:
        self.inputs, self.outputs = inputs, sum(outputs)
        self.keep: list[Any] = [threshold]
        self.bytes = 0
        packed = []
        while self.bytes < POOL:
            parts: list[Tensor | None] = []
            groups = []
            for width in outputs:
                parts += [*self._layer(form, inputs, width), None, threshold, None, None, None]
                groups.append(0 if form == "bfloat16" else empty_weight(width, inputs, form).format.group_size or 0)
            self.keep.append(parts)
            packed.append(fused.pack(torch.bfloat16, inputs, parts, groups, [False] * len(outputs), []))
        self.set_bytes = self.bytes / len(packed)
        self.turn = itertools.cycle(packed)

    def _layer(self, form: str, inputs: int, width: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if form == "bfloat16":
            weight = on_huge_pages(torch.full((inputs, width), 0.01, dtype=torch.bfloat16))
            self.bytes += weight.nbytes
            return weight.t(), None, None
        like = empty_weight(width, inputs, form)
        scales = torch.full(like.scales.shape, 0.01).to(like.scales.dtype)
        self.bytes += like.nbytes
        minimum = None if like.minimum is None else on_huge_pages(-8 * scales)
        return on_huge_pages(like.codes.fill_(85)), on_huge_pages(scales), minimum

    def __call__(self, x: Tensor) -> Tensor:
        """The layers' outputs, with the next set."""
        return fused.packed_linears(x, next(self.turn), self.inputs, self.outputs)


def inputs_of(masks: Tensor) -> list[Tensor]:
    """A row of x for each mask: what it keeps is larger than 0.5."""
    size = torch.where(masks, 0.75, 0.25) + 0.2 * torch.rand(masks.shape)
    return list((size * (torch.randint(0, 2, masks.shape) * 2 - 1)).to(torch.bfloat16).unsqueeze(1))


def masks_like(key: str, level: float, width: int) -> dict[str, Tensor]:
    """The masks of a real model's down_proj, stretched to a width: several tokens' side by side, or interleaved where
    they are sorted, which keeps the rate at which each channel is kept."""
    stored = load_file(KEPT / f"runs-{key}-sensitivity.safetensors")
    names = [
        name.removesuffix("/own") for name in stored if name.startswith(f"{level}/") and name.endswith("down_proj/own")
    ]
    own, ordered = [], []
    for name in names[len(names) // 6 :: len(names) // 3]:  # three layers
        a, b = stored[f"{name}/own"], stored[f"{name}/sorted"]
        copies = round(width / a.shape[1])
        for start in range(0, len(a) - copies + 1, copies):
            own.append(a[start : start + copies].flatten())
            ordered.append(b[start : start + copies].t().flatten())
    masks = torch.stack(own)
    first = torch.arange(masks.shape[1]) < masks.sum(1, keepdim=True)
    return {
        "own": masks,
        "sorted": torch.stack(ordered),
        "random": masks[:, torch.randperm(masks.shape[1])],
        "first": first,
    }


def replay(key: str, form: str, level: float, rounds: int, counts: list[int], outputs: int) -> Iterator[dict[str, Any]]:
    masks = masks_like(key, level, 8192)
    xs = {name: itertools.cycle(inputs_of(mask)) for name, mask in masks.items()}
    weights = Weights(form, masks["own"].shape[1], (outputs,), torch.tensor(0.5))
    share = masks["own"].float().mean().item()
    plain = torch.empty(POOL, dtype=torch.uint8).fill_(1)
    pieces = itertools.cycle(plain.split(int(weights.set_bytes * share)))
    candidates = {name: (lambda turn=turn: weights(next(turn))) for name, turn in xs.items()}
    candidates["read"] = lambda: kernels.read(next(pieces))
    for count in counts:
        with threads(count), torch.inference_mode():
            times = interleave(candidates, rounds=rounds, progress=False)
        yield {
            "model": key, "format": form, "level": level, "skipped": 1 - share, "threads": count,
            "shape": [weights.inputs, outputs], "microseconds": {k: median(v) * 1e6 for k, v in times.items()},
            "runs": {name: run_lengths(mask)["mean"] for name, mask in masks.items()},
        }  # fmt: skip


def compare(
    name: str, form: str, level: float, rounds: int, counts: list[int], made: Callable[..., dict[str, Weights]]
) -> Iterator[tuple[int, dict[str, float]]]:
    """Threads, and the microseconds of each of the layers that `made` returns, at a level of random sparsity."""
    inputs, outputs = PAGES[name]
    candidates = made(form, inputs, outputs, torch.tensor(0.5 if level else 0.0))
    xs = {each: itertools.cycle(inputs_of(torch.rand(64, inputs) >= level)) for each in candidates}
    calls = {each: (lambda each=each: candidates[each](next(xs[each]))) for each in candidates}
    for count in counts:
        with threads(count), torch.inference_mode():
            times = interleave(calls, rounds=rounds, progress=False)
        yield count, {each: median(seconds) * 1e6 for each, seconds in times.items()}


def merged(form: str, inputs: int, outputs: tuple[int, ...], threshold: Tensor) -> dict[str, Weights]:
    return {
        "apart": Weights(form, inputs, outputs, threshold),
        "merged": Weights(form, inputs, (sum(outputs),), threshold),
    }


def pages(form: str, inputs: int, outputs: tuple[int, ...], threshold: Tensor) -> dict[str, Weights]:
    block, memory._BLOCK = memory._BLOCK, 0  # everything is too large for one
    try:
        own = Weights(form, inputs, outputs, threshold)
    finally:
        memory._BLOCK = block
    return {"own": own, "blocks": Weights(form, inputs, outputs, threshold)}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--parts", nargs="+", default=["rows", "replay", "merged", "pages"])
    arguments.add_argument("--models", nargs="+", default=list(MODELS))
    arguments.add_argument("--method", default="sensitivity")
    arguments.add_argument("--formats", nargs="+", default=FORMATS)
    arguments.add_argument("--levels", type=float, nargs="+", default=LEVELS)
    arguments.add_argument("--layers", nargs="+", help="of merged and pages")
    arguments.add_argument("--outputs", type=int, nargs="+", default=[2048], help="of the replayed down_proj")
    arguments.add_argument("--data", help="text that the runs are judged on")
    options = arguments.parse_args()
    torch.manual_seed(0)
    print("kernels", kernels.isa())
    if "rows" in options.parts:
        for key in options.models:
            rows = list(collect(key, options.levels, options.method, options.data))
            for level in options.levels:
                print(f"\n{key} at {level:.0%}")
                print_rows([row for row in rows if row["level"] == level])
    if "replay" in options.parts:
        print(f"{'masks of':10}{'format':10}{'shape':>12}{'level':>6}{'skipped':>9}{'threads':>8}{'own us':>9}"
              f"{'sorted':>8}{'random':>8}{'first':>8}{'read':>8}   own/sorted, own/first")  # fmt: skip
        for key, form, level, outputs in itertools.product(
            options.models, options.formats, options.levels, options.outputs
        ):
            for row in replay(key, form, level, 40 * options.rounds, options.threads, outputs):
                us = row["microseconds"]
                print(f"{key:10}{form:10}{row['shape'][0]:>7}x{outputs:<4}{level:6.2f}{row['skipped']:9.0%}{row['threads']:8}"
                      f"{us['own']:9.0f}{us['sorted']:8.0f}{us['random']:8.0f}{us['first']:8.0f}{us['read']:8.0f}"
                      f"   {us['own'] / us['sorted']:.3f}  {us['own'] / us['first']:.3f}", flush=True)  # fmt: skip
    for part, made, shapes in (("merged", merged, MERGED), ("pages", pages, PAGES)):
        if part not in options.parts:
            continue
        print(f"\n{part:14}{'format':10}{'level':>6}{'threads':>8}{'microseconds':>24}{'gain':>8}")
        chosen = [name for name in shapes if name in (options.layers or shapes)]
        for name, form, level in itertools.product(chosen, options.formats, (0.0, *options.levels)):
            for count, us in compare(name, form, level, 40 * options.rounds, options.threads, made):
                before, after = us.values()
                print(
                    f"{name:14}{form:10}{level:6.2f}{count:8}{before:14.0f}{after:10.0f}{before / after:8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
