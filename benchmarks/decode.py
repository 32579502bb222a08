"""Decoding, end to end: transformers' eager model against the same model made sparse, taking turns token by token.

SmolLM2-135M at 0.4 is calibrated on Python's documentation. A Llama of 1 B parameters (the shapes of Llama 3.2 1B) has
random weights: only its speed means something.
"""

from __future__ import annotations

import copy

import torch
from common import parser, save

import deadband
from deadband.bench import bytes_per_token, decode_seconds, median, threads
from deadband.models import load_model, load_tokenizer, smollm2
from deadband.ops import kernels
from deadband.text import python_documentation, token_windows


def llama_1b():
    """A bfloat16 Llama of 1.24 B random parameters, tied embeddings."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
            continue
        block = (
            torch.randn(1 << 20, dtype=torch.bfloat16) * 0.02
        )  # repeated: drawing 1.2 billion numbers takes a minute
        parameter.data.view(-1).copy_(block.repeat(parameter.numel() // len(block) + 1)[: parameter.numel()])
    model.tie_weights()
    rotary = model.model.rotary_emb
    rotary.inv_freq = 1.0 / 10000 ** (torch.arange(0, 64, 2) / 64)
    rotary.original_inv_freq = rotary.inv_freq
    return model.eval()


def measure(name: str, model, batches: list, sparsity: float, prompt: torch.Tensor, tokens: int, counts: list[int]):
    calibration = deadband.calibrate(model, batches)
    sparse = deadband.sparsify_(
        copy.deepcopy(model), calibration.allocate(sparsity, "uniform", model=model, batches=batches)
    )
    unskipped = deadband.sparsify_(copy.deepcopy(model), dict.fromkeys(calibration.sites, 0.0))  # our own, at 0
    models = {"transformers": model, "deadband at 0": unskipped, f"deadband at {sparsity}": sparse}
    for count in counts:
        with threads(count):
            deadband.sparsity(sparse, reset=True, warn=False)
            deadband.sparsity(unskipped, reset=True, warn=False)
            times = decode_seconds(models, prompt, tokens=tokens, what=name)
            bandwidth = kernels.read_bandwidth()
        achieved = deadband.sparsity(sparse, warn=False).total
        for label, seconds in times.items():
            one, size = median(seconds), bytes_per_token(models[label])
            yield {
                "model": name,
                "threads": count,
                "decoder": label,
                "sparsity": achieved if label.endswith(str(sparsity)) else 0.0,
                "tokens_per_second": 1 / one,
                "against_transformers": median(times["transformers"]) / one,
                "bytes_per_token": size,
                "of_bandwidth": size / one / bandwidth,
                "read_bandwidth": bandwidth,
            }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", choices=["smollm2", "llama-1b"], default=["smollm2", "llama-1b"])
    options = made.parse_args()
    print(f"{'model':14}{'threads':>8}  {'decoder':18}{'sparsity':>9}{'tokens/s':>10}{'/transformers':>15}"
          f"{'MB/token':>10}"
          f"{'of read bandwidth':>19}")  # fmt: skip
    rows = []
    for name in options.models:
        if name == "smollm2":
            folder = smollm2()
            model, tokenizer = load_model(folder), load_tokenizer(folder)
            text, other = python_documentation()
            batches = token_windows(tokenizer, text, tokens=4096, window=512)
            prompt = token_windows(tokenizer, other, tokens=64, window=64)[0]["input_ids"]
            arguments = ("SmolLM2-135M", model, batches, 0.4, prompt, 60 * options.rounds)
        else:
            ids = torch.randint(0, 128256, (1, 64), generator=torch.Generator().manual_seed(0))
            arguments = ("Llama 1B random", llama_1b(), [{"input_ids": ids}], 0.5, ids, 24 * options.rounds)
        for row in measure(*arguments, options.threads):
            rows.append(row)
            print(f"{row['model']:14}{row['threads']:8}  {row['decoder']:18}{row['sparsity']:9.1%}"
                  f"{row['tokens_per_second']:10.1f}{row['against_transformers']:14.2f}x"
                  f"{row['bytes_per_token'] / 1e6:10.0f}"
                  f"{row['of_bandwidth']:19.0%}", flush=True)  # fmt: skip
        del arguments
    save("decode", rows)


if __name__ == "__main__":
    main()
