"""Mixtures of experts: whole decoding, and the experts alone, of transformers, deadband and llama.cpp, side by side.

Random weights in the shapes of Qwen3-30B-A3B, cut to a few layers and a small vocabulary, so only the speed means
something. All candidates of a width take turns in one process, token by token. transformers is there with each of its
implementations of experts, in bfloat16 and in float32, whose second half of layers has the experts of the first, as
memory would not hold both models whole; the fastest of them is what the others are compared with. deadband has 8 or 4
bits and float32 activations, skips nothing or half of each input, and decodes as it is and after `prepare_decode_`.

Every token that is decoded is given, a random one: tokens that repeat themselves would meet the same experts again,
in the caches. The experts alone get random inputs, each token experts of its own.

`--check` compares llama.cpp's logits of a tiny model with transformers' instead. Needs the extras gguf and llama
(llama.cpp); without the last its rows are left out.
"""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import parser, save
from decode import CompiledDecoder, llamacpp, sharing_copy
from torch import Tensor, nn

import deadband
from deadband.decoding import is_prepared
from deadband.evaluation.speed import bytes_per_token
from deadband.layers.rounding import quantize
from deadband.layers.sites import find_sites, matrix_of
from deadband.ops import kernels
from deadband.running.divergence import divergence
from deadband.running.forward import evaluating, threads
from deadband.running.greedy_decoding import GreedyDecoder
from deadband.running.timing import interleave, median

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
}  # fmt: skip
TINY = {
    "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256, "num_experts": 16,
    "num_experts_per_tok": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip
BLOCK = (1 << 20) + 4099  # weights that are drawn, then repeated: of a length by which no two experts are the same
GROUPS = {"int8": "Q8_0", "int4": "Q4_0"}
"""llama.cpp's types of the same width."""
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
IMPLEMENTATIONS = {"bf16": ("grouped_mm", "batched_mm", "eager"), "f32": ("grouped_mm", "eager")}
"""transformers': batched_mm copies the weights of each expert before it multiplies, which takes four times as long."""
FASTEST = "grouped_mm"
LEVEL = 0.5
TOKENS = (1, 2, 4, 8)
PROMPT_TOKENS = 64


def random_qwen(
    layers: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16, distinct: int | None = None, **shape: int
) -> Any:
    """A Qwen3-MoE of random weights in the shapes of Qwen3-30B-A3B.

    Args:
        layers, vocabulary: how many; a layer has 1.2 GB in bfloat16.
        dtype: of the parameters.
        distinct: layers after so many have the experts of those before.
        shape: of other sizes than Qwen3-30B-A3B's.
    """
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    theta, config = 1e6, Qwen3MoeConfig(
        **{**SHAPE, **shape}, num_hidden_layers=layers, vocab_size=vocabulary, norm_topk_prob=True,
        max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.experts = model.model.layers[index % (distinct or layers)].mlp.experts
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(BLOCK, generator=generator, dtype=torch.bfloat16) * 0.02
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
        elif name.endswith((".gate.weight", "embed_tokens.weight")):  # by which tokens differ in their experts
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.bfloat16)
            parameter.data.copy_(drawn if name.endswith("embed_tokens.weight") else drawn * 0.02)
        else:
            for part in parameter.data.view(-1).split(BLOCK):
                part.copy_(block[: len(part)])
    rotary = model.model.rotary_emb  # its buffers are not parameters, and the meta device left nothing in them
    rotary.inv_freq = 1.0 / theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    rotary.original_inv_freq = rotary.inv_freq
    return model.eval()


def random_ids(count: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Token ids, int64 [1, count]."""
    return torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(seed))


def repeated_experts(model: Any, ids: Tensor) -> float:
    """The share of a token's experts that the token before it had too: 6% where each has 8 random ones of 128."""
    chosen: list[Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
        for layer in model.model.layers
    ]
    with evaluating(model):
        model(ids)
    for hook in hooks:
        hook.remove()
    both = torch.stack(chosen)  # [layers, tokens, each]
    return float((both[:, 1:, :, None] == both[:, :-1, None]).any(-1).float().mean())


def ours(form: str, options: Any) -> dict[str, Any]:
    """Models in one weight format that skip nothing and LEVEL; they share their weights."""
    model = random_qwen(options.layers, options.vocabulary)
    batches = [{"input_ids": random_ids(PROMPT_TOKENS, options.vocabulary, seed=1)}]
    thresholds = deadband.calibrate(model, batches).allocate(LEVEL, "uniform", model=model, batches=batches)
    sites = find_sites(model)
    weights = {name: quantize(matrix_of(site).detach(), form, minimise=False) for name, site in sites.items()}  # quick
    base = deadband.sparsify_(model, dict.fromkeys(sites, 0.0), weights=weights).to(torch.float32)
    return {
        f"deadband {form} at 0%": base,
        f"deadband {form} at {LEVEL:.0%}": deadband.sparsify_(sharing_copy(base), thresholds),
    }


class Group:
    """All candidates of one width, by what they are called."""

    def __init__(self, group: str, options: Any) -> None:
        self.group, self.options = group, options
        self.ours = ours(group, options)
        self.dense: dict[str, Any] = {"bf16": random_qwen(options.layers, options.vocabulary)}
        path = None if llamacpp is None else gguf_of(self.dense["bf16"], GROUPS[group], options)
        half = max(options.layers // 2, 1)
        self.dense["f32"] = random_qwen(options.layers, options.vocabulary, torch.float32, half)
        self.repeated = repeated_experts(self.dense["bf16"], random_ids(PROMPT_TOKENS, options.vocabulary))
        self.rival, self.llama = f"llama.cpp {GROUPS[group]}", None
        if path is not None:
            self.llama = llamacpp.LlamaCpp(path, max(options.threads), context=1024, mapped=False)

    def decode(self) -> list[dict[str, Any]]:
        """Whole decoding, with each number of threads."""
        rounds = 24 * self.options.rounds
        size = (rounds + 2) * len(self.options.threads)
        ids = random_ids(PROMPT_TOKENS + size, self.options.vocabulary)
        prompt, given = ids[:, :PROMPT_TOKENS], ids[:, PROMPT_TOKENS:]
        models: dict[str, Any] = {}
        steps: dict[str, Callable[[], Any]] = {}
        for name, model in self.dense.items():
            for implementation in IMPLEMENTATIONS[name]:
                label = f"transformers {name}, {implementation}"
                steps[label] = with_experts(implementation, model, fed(model, prompt, given))
                if name == "bf16":  # whose bytes are counted; the other's layers share theirs
                    models[label] = model
        if self.options.compile:
            label, model = f"transformers bf16, {FASTEST}, compiled", self.dense["bf16"]
            models[label], steps[label] = model, with_experts(FASTEST, model, fed_compiled(model, prompt, given))
        for name, model in self.ours.items():
            models[f"{name}, eager"], steps[f"{name}, eager"] = model, fed(model, prompt, given)
            prepared = deadband.prepare_decode_(sharing_copy(model))
            if is_prepared(prepared):  # else a warning has said why not
                models[name], steps[name] = prepared, fed(prepared, prompt, given)
        rows = []
        for count in self.options.threads:
            with threads(count):
                if self.llama is not None:
                    self.llama.set_threads(count)
                    self.llama.prefill(prompt[0])
                    tokens = itertools.cycle(given[0].tolist())
                    steps[self.rival] = lambda tokens=tokens: self.llama.step(next(tokens))
                rows += self._rows("decode", 1, count, steps, models, rounds)
        return rows

    def alone(self, tokens: int) -> list[dict[str, Any]]:
        """The experts of all layers, one after the other, with each number of threads."""
        rounds = 24 * self.options.rounds
        models, steps = {}, {}
        for name, model in self.dense.items():
            for implementation in IMPLEMENTATIONS[name] if tokens == 1 else (FASTEST,):
                label, modules = f"transformers {name}, {implementation}", experts_of(model)
                steps[label] = with_experts(implementation, model, through(modules, tokens, DTYPES[name], rounds))
                if name == "bf16":
                    models[label] = modules
        for name, model in self.ours.items():
            models[name] = experts_of(model)
            steps[name] = through(models[name], tokens, torch.float32, rounds)
        rows = []
        for count in self.options.threads:
            with threads(count):
                rows += self._rows("experts", tokens, count, steps, models, rounds)
        return rows

    def _rows(
        self, part: str, tokens: int, count: int, steps: dict[str, Callable], models: dict[str, Any], rounds: int
    ) -> list[dict[str, Any]]:
        mine = {name: model for name, model in models.items() if name.startswith("deadband")}
        for model in mine.values():
            deadband.sparsity(model, reset=True, warn=False)
        what = f"{part}, {self.group}, {tokens} tokens, {count} threads"
        times = interleave(steps, rounds=rounds, what=what)
        bandwidth = kernels.read_bandwidth()
        seconds = {name: median(each) for name, each in times.items()}
        best = min(each for name, each in seconds.items() if name.startswith("transformers"))
        rows = []
        for name, one in seconds.items():
            dense = name.replace(f"at {LEVEL:.0%}", "at 0%")
            skipped = deadband.sparsity(models[name], warn=False).total if name in mine else 0.0
            row = {
                "part": part, "group": self.group, "candidate": name, "tokens": tokens, "threads": count,
                "sparsity": 0.0 if math.isnan(skipped) else skipped, "seconds": one,
                "seconds_per_layer": one / self.options.layers, "against_transformers": best / one,
                "against_own_dense": seconds[dense] / one if dense != name else None,
                "against_llama_cpp": seconds[self.rival] / one if self.rival in seconds else None,
            }  # fmt: skip
            if name in models and tokens == 1:
                row["bytes_per_token"] = read = bytes_per_token(models[name])
                row |= {"of_bandwidth": read / one / bandwidth, "read_bandwidth": bandwidth}
            rows.append(row)
            _show(row)
        return rows

    def close(self) -> None:
        """Free llama.cpp's model."""
        if self.llama is not None:
            self.llama.close()


def experts_of(model: Any) -> nn.ModuleList:
    """The modules of experts of a model, layer by layer."""
    return nn.ModuleList([layer.mlp.experts for layer in model.model.layers])


def with_experts(implementation: str, model: Any, step: Callable[[], Any]) -> Callable[[], None]:
    """A step of a transformers model with one of its implementations of experts."""

    def run() -> None:
        model.config._experts_implementation = implementation
        step()

    return run


def fed(model: Any, prompt: Tensor, given: Tensor) -> Callable[[], None]:
    """A step of decoding, of the next of the given tokens."""
    decoder, tokens = GreedyDecoder(model, prompt), itertools.cycle(given.split(1, 1))

    def step() -> None:
        decoder.tokens[-1] = next(tokens)
        decoder.step()

    return step


def fed_compiled(model: Any, prompt: Tensor, given: Tensor) -> Callable[[], None]:
    """A step of transformers' compiled decoding, of the next of the given tokens."""
    model.config._experts_implementation = FASTEST
    decoder = CompiledDecoder(model, prompt, prompt.shape[1] + given.shape[1] + 1)
    tokens = itertools.cycle(given.split(1, 1))

    def step() -> None:
        decoder.token = next(tokens).clone()
        decoder.step()

    return step


def through(modules: Sequence[nn.Module], tokens: int, dtype: torch.dtype, rounds: int) -> Callable[[], None]:
    """A step of experts, layer after layer, of the next of random inputs, the same ones for every candidate."""
    generator = torch.Generator().manual_seed(tokens)
    count, each, size = (SHAPE[name] for name in ("num_experts", "num_experts_per_tok", "hidden_size"))
    made = []
    for _ in range((rounds + 2) * len(modules)):
        x = torch.randn(tokens, size, generator=generator).to(dtype)
        shares, experts = torch.rand(tokens, count, generator=generator).topk(each)
        made.append((x, experts, (shares / shares.sum(-1, keepdim=True)).to(dtype)))
    inputs = itertools.cycle(made)

    def step() -> None:
        with torch.no_grad():
            for module in modules:
                module(*next(inputs))

    return step


def gguf_of(model: Any, kind: str, options: Any) -> Path:
    """The model's GGUF of one of llama.cpp's types, kept from run to run."""
    name = f"qwen3-moe-{options.layers}-layers-{options.vocabulary}-random"
    path = llamacpp.gguf_path(name)
    if not path.is_file():
        llamacpp.write_gguf(model, path)
    return llamacpp.quantize(path, llamacpp.gguf_path(name, kind), kind)


def check() -> None:
    """Print how far llama.cpp's logits of a tiny model are from transformers' in float32."""
    model = random_qwen(2, 512, **TINY)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms that are told from one another
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(len(parameter)))
    ids = random_ids(24, 512)
    with tempfile.TemporaryDirectory() as folder:
        source = llamacpp.write_gguf(model, Path(folder) / "tiny.gguf")
        with evaluating(model.float()):
            expected = model(ids).logits[0]
        for kind in ("BF16", *GROUPS.values()):
            with llamacpp.LlamaCpp(llamacpp.quantize(source, Path(folder) / f"{kind}.gguf", kind), 1) as llama:
                got = torch.from_numpy(llama.logits(ids))
            error = float((got - expected).norm() / expected.norm())
            kl = float(divergence(expected.log_softmax(-1), got.log_softmax(-1)).mean())
            agree = float((got.argmax(-1) == expected.argmax(-1)).float().mean())
            print(f"{kind:6} logits differ by {error:.2%} of their norm, KL {kl:.6f}, top-1 agrees in {agree:.0%}")


HEAD = (
    f"{'part':8}{'candidate':40}{'tokens':>7}{'threads':>8}{'sparsity':>9}{'ms':>9}{'ms/layer':>9}"
    f"{'/transformers':>14}{'/own dense':>11}{'/llama.cpp':>11}{'of bandwidth':>13}"
)


def _show(row: dict[str, Any]) -> None:
    nothing = math.nan
    print(f"{row['part']:8}{row['candidate']:40}{row['tokens']:7}{row['threads']:8}{row['sparsity']:9.1%}"
          f"{row['seconds'] * 1e3:9.2f}{row['seconds_per_layer'] * 1e3:9.2f}{row['against_transformers']:13.2f}x"
          f"{row['against_own_dense'] or nothing:10.2f}x{row['against_llama_cpp'] or nothing:10.2f}x"
          f"{row.get('of_bandwidth', nothing):13.0%}", flush=True)  # fmt: skip


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    made.add_argument("--layers", type=int, default=4, help="of Qwen3-30B-A3B's 48; each takes 1.2 GB in bfloat16")
    made.add_argument("--vocabulary", type=int, default=8192, help="tokens, of Qwen3-30B-A3B's 151,936")
    made.add_argument("--compile", action="store_true", help="measure transformers with torch.compile as well")
    made.add_argument("--check", action="store_true", help="compare llama.cpp's logits with transformers', no more")
    options = made.parse_args()
    if options.check:
        check()
        return
    for group in options.groups:
        candidates = Group(group, options)
        print(f"{group}: a token shares {candidates.repeated:.0%} of its experts with the one before\n{HEAD}")
        rows = candidates.decode()
        for tokens in TOKENS:
            rows += candidates.alone(tokens)
        settings = {
            "layers": options.layers,
            "vocabulary": options.vocabulary,
            "experts_that_the_token_before_had_too": candidates.repeated,
            "llama-cpp-python": llamacpp and importlib.metadata.version("llama-cpp-python"),
        }
        candidates.close()
        del candidates
        gc.collect()
        save("experts", rows, keys=("part", "group", "candidate", "tokens", "threads"), settings=settings)


if __name__ == "__main__":
    main()
