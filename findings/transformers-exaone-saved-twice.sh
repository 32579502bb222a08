#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0, CPU), seen 2026-11-27.
#
# Guess: a model that is saved, loaded and saved again is the same model, whatever its architecture.
# Seen:  an EXAONE model (ExaoneForCausalLM, built from its configuration) survives the first save_pretrained and
#        from_pretrained. What the loaded model saves comes back as another model: its logits are off by 144 %, and
#        nothing is raised. A Llama of the same sizes survives three rounds.
# Where it hurts: a fine-tuning that loads a checkpoint, trains and saves.
#
# Installs pinned packages into a temporary folder. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 2>/dev/null
"$folder/venv/bin/python" -m pip install --quiet transformers==5.24.0 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" <<'PYTHON' 2>/dev/null
import sys

import torch
import transformers

sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def rounds(config, name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    token_ids = torch.arange(3, 43)[None]
    differences = []
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
        expected = model(token_ids).logits
        for number in range(3):
            model.save_pretrained(f"{sys.argv[1]}/{name}-{number}")
            model = type(model).from_pretrained(f"{sys.argv[1]}/{name}-{number}").eval()
            differences.append(float((model(token_ids).logits - expected).norm() / expected.norm()))
    print(name, ["%.2f" % each for each in differences])
    return differences


llama = rounds(transformers.LlamaConfig(**sizes), "llama")
exaone = rounds(transformers.ExaoneConfig(**sizes), "exaone")
assert max(llama) < 1e-6 and exaone[0] < 1e-6, "the behaviour has changed"
assert exaone[1] > 0.5, "the behaviour has changed"
PYTHON
