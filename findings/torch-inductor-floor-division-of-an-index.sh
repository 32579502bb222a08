#!/usr/bin/env bash
# torch 2.13.0 (and its inductor) on the CPU, x86-64 with AVX2 or AVX-512, seen 2026-11-27.
#
# Guess: torch.compile(lambda: torch.arange(128) // 48) gives 0 (48 times), 1 (48 times), 2 (32 times).
# Seen:  the last 32 entries are never written: they hold whatever the memory held (zeros, or numbers such as
#        140360678959904), from 96 on, the last multiple of 48. Nothing is raised.
#        With a divisor that is a power of two, or where the index passes through a tensor first
#        (x + arange), all is right.
# Where it hurts: masks of chunked attention (position // chunk) in a compiled model.
#
# Installs pinned packages into a temporary folder; needs a C++ compiler. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy 2>/dev/null
export TORCHINDUCTOR_CACHE_DIR="$folder/cache"
"$folder/venv/bin/python" - <<'PYTHON'
import torch

expected = torch.arange(128) // 48
compiled = torch.compile(lambda: torch.arange(128) // 48)()
power_of_two = torch.compile(lambda: torch.arange(128) // 32)()
through_a_tensor = torch.compile(lambda zero: (torch.arange(128) + zero) // 48)(torch.zeros(128, dtype=torch.int64))

wrong = (compiled != expected).nonzero().flatten().tolist()
print("torch", torch.__version__, "wrong from", wrong[:1], "to", wrong[-1:], "values there", compiled[-3:].tolist())
assert torch.equal(power_of_two, torch.arange(128) // 32)
assert torch.equal(through_a_tensor, expected)
assert wrong and wrong[0] == 96 and (compiled[:96] == expected[:96]).all(), "the behaviour has changed"
PYTHON
