"""Models that are sparse by nature, exact: whole decode against the same model with nothing skipped, token by token.

Random weights in the shapes of published models, of which only the speed means something: a gate's bias makes as many
zeros as the models have. Three kinds: a gated MLP with ReLU (TinyLlama 1.1 B, 90 % zeros, as TurboSparse and ProSparse
have them), squared ReLU without a gate (Nemotron's MLP in the same sizes), and Gemma 3n (E2B's layers without its
embeddings by layer: 95 % of the gate is zero in a third of them, by design). Ours dense is the same model on the same
kernels, quantised alike, prepared alike where a graph can be made, with nothing skipped.

The difference of logits is between the exact model and one that computes every output of the up-projections: both drop
zeros from what the down-projections get, as a product with zeros rounds its sums in another order.
"""

from __future__ import annotations

import copy
import gc
from typing import Any

import torch
from common import parser, save
from torch import Tensor, nn

import deadband
from deadband.decoding.decoder import decode_report
from deadband.evaluation.speed import bytes_per_token
from deadband.layers import sparse
from deadband.layers.sparse import SparseSite
from deadband.ops.gated import up_linear
from deadband.running.forward import threads
from deadband.running.greedy_decoding import GreedyDecoder
from deadband.running.timing import interleave, median

ZEROS = 0.9
QUANTILE = 1.2816  # of a standard normal distribution: 90 % lie below
KINDS = {
    "gated ReLU": ("relu", 1.7),
    "squared ReLU": ("relu2", 1.35),
    "Gemma 3n": ("gelu_tanh", 1.2),
}
PROMPT = 16


def config_of(kind: str, layers: int | None) -> Any:
    """The configuration of a kind, with so many layers instead of the model's own."""
    from transformers import Gemma3nTextConfig, LlamaConfig, NemotronConfig

    if kind == "Gemma 3n":
        count = layers or 30
        sparse_layers = count // 3
        return Gemma3nTextConfig(
            num_hidden_layers=count, hidden_size=2048, intermediate_size=[8192] * count, num_attention_heads=8,
            num_key_value_heads=2, head_dim=256, vocab_size=32000, vocab_size_per_layer_input=1024,
            hidden_size_per_layer_input=256, num_kv_shared_layers=0, laurel_rank=64,
            activation_sparsity_pattern=[0.95] * sparse_layers + [0.0] * (count - sparse_layers),
            layer_types=["full_attention" if i % 5 == 4 else "sliding_attention" for i in range(count)],
        )  # fmt: skip
    shared = dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers or 22, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048, mlp_bias=True,
        hidden_act=KINDS[kind][0],
    )  # fmt: skip
    return LlamaConfig(**shared) if kind == "gated ReLU" else NemotronConfig(**shared, head_dim=64)


def random_model(kind: str, layers: int | None) -> Any:
    """A bfloat16 model of random weights; its gates (or its only activations) have `ZEROS` zeros."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    torch.manual_seed(0)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config_of(kind, layers), dtype=torch.bfloat16)
    block = torch.randn(1 << 20) * 0.02
    plus_one = kind == "squared ReLU"  # Nemotron's norms multiply by one more than their weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.data.view(-1)
            if parameter.dim() == 1:
                flat.fill_(0.0 if name.endswith("bias") or plus_one else 1.0)
                continue
            for part in flat.split(len(block)):
                part.copy_(block[: len(part)])
        gate = {"gated ReLU": "mlp.gate_proj", "squared ReLU": "mlp.up_proj"}.get(kind)
        for name, module in model.named_modules():
            if gate is not None and name.endswith(gate):
                module.bias.fill_(-QUANTILE * 0.02 * model.config.hidden_size**0.5)
    return model.eval()


def without_skipping(model: Any) -> Any:
    """Of a sparse model, one with the same weights in which no layer skips anything, and all lie by input."""
    waiting = [module for module in model.modules() if isinstance(module, SparseSite) and module.by_output]
    own = {id(sparse.tensor_of(module)) for module in waiting}
    dense = copy.deepcopy(model, {key: each for key, each in _large(model).items() if key not in own})
    for module in dense.modules():
        if isinstance(module, SparseSite):
            module.sparse_rows = 0
            if module.by_output:
                module.by_output = False
                sparse.lay_out_(module)
    return dense


def difference(model: Any, ids: Tensor) -> float:
    """Of the logits of a token, with closed outputs read or not."""
    waits = sparse.SparseSite.before_gate
    with torch.no_grad():
        exact = model(ids).logits
        try:
            sparse.SparseSite.before_gate = lambda self, x, outputs, own, counts: up_linear(x, *own, None)
            return float((model(ids).logits - exact).abs().max())
        finally:
            sparse.SparseSite.before_gate = waits


def measure(kind: str, weights: str | None, options: Any) -> list[dict[str, Any]]:
    """Rows of one kind and format, for each number of threads."""
    model = random_model(kind, options.layers)
    deadband.sparsify_(model, exact=True, weights=weights)
    if weights is not None:
        model.to(torch.float32)  # of activations
    prompt = torch.randint(3, 32000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    off = difference(model, prompt[:, :1])
    rows = []
    for count in options.threads:
        with threads(count):
            plain = without_skipping(model)
            models = {"dense": plain, "exact": copy.deepcopy(model, _large(model))}
            prepared = {name: deadband.prepare_decode_(each) for name, each in models.items()}
            decoders = {name: GreedyDecoder(each, prompt) for name, each in prepared.items()}
            deadband.sparsity(prepared["exact"], reset=True, warn=False)
            times = interleave(
                {name: each.step for name, each in decoders.items()}, rounds=24 * options.rounds, what=kind
            )
            sites = deadband.sparsity(prepared["exact"], warn=False).sites
            down = [share for name, share in sites.items() if name.endswith("down_proj")]
            dense, exact = (median(times[name]) * 1e3 for name in ("dense", "exact"))
            rows.append({
                "kind": kind, "weights": weights or "bf16", "threads": count, "dense_ms": dense, "exact_ms": exact,
                "ratio": dense / exact, "zeros": sum(down) / len(down), "difference": off,
                "megabytes": bytes_per_token(prepared["exact"]) / 1e6,
                "graph": decode_report(prepared["exact"]).problem is None,
            })  # fmt: skip
            print(
                f"{kind:13} {weights or 'bf16':5} {count} threads: dense {dense:6.1f} ms, exact {exact:6.1f} ms, "
                f"{dense / exact:.2f}x (asked {KINDS[kind][1]}x), zeros {rows[-1]['zeros']:.0%}, difference {off:g}"
            )
            del models, prepared, decoders, plain
            gc.collect()
    return rows


def _large(model: nn.Module) -> dict[int, Tensor]:
    return {id(each): each for each in (*model.parameters(), *model.buffers()) if each.dim() > 1}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    made.add_argument("--weights", nargs="+", default=["bf16", "int8"], help="bf16, or formats of quantised weights")
    made.add_argument("--layers", type=int, help="so many layers instead of all: for a quick look")
    options = made.parse_args()
    rows = []
    for kind in options.kinds:
        for weights in options.weights:
            rows += measure(kind, None if weights == "bf16" else weights, options)
            gc.collect()
    if options.layers is None:
        save("natural", rows, keys=("kind", "weights", "threads"))


if __name__ == "__main__":
    main()
