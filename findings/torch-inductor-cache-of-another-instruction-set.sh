#!/usr/bin/env bash
# torch 2.13.0 (and its inductor) on the CPU, x86-64 with AVX-512, seen 2026-11-28.
#
# Guess: code that torch.compile made where vectors have 512 bits is not taken from the cache where they have 256: the
#        key of its cache of graphs says for which instruction set the loops were written.
# Seen:  it does not. The second process, held to AVX2 as a machine without AVX-512 is, takes the graph of the first:
#        loops in steps of 32 bfloat16 entries, of which its vectors hold 16. Half of the entries are never computed,
#        and hold whatever the memory held. Nothing is raised.
#        With cpp.simdlen set in inductor's configuration, which is a part of the key, each has its own.
# Where it hurts: a folder of compiled code that several machines share, or one in an image that was made elsewhere.
#
# Installs pinned packages into a temporary folder; needs a C++ compiler and AVX-512. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
grep -q avx512vl /proc/cpuinfo || { echo "this processor has no AVX-512" >&2; exit 2; }
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy 2>/dev/null
export TORCHINDUCTOR_CACHE_DIR="$folder/cache"
cat > "$folder/program.py" <<'PYTHON'
import os
import torch

if os.environ.get("SIMDLEN"):
    import torch._inductor.config
    torch._inductor.config.cpp.simdlen = int(os.environ["SIMDLEN"])
x = torch.linspace(-1, 3, 2048, dtype=torch.bfloat16)
found = torch.compile(lambda x: x * 2 + 1)(x)
wrong = (found != x * 2 + 1).sum().item()
print(f"{os.environ['ATEN_CPU_CAPABILITY']} {os.environ.get('SIMDLEN', '')}: {wrong} of 2048 entries are wrong")
raise SystemExit(0 if (wrong > 0) == (os.environ["WRONG"] == "yes") else 1)
PYTHON
run() { env "$@" "$folder/venv/bin/python" "$folder/program.py" || { echo "the behaviour has changed" >&2; exit 1; }; }
run ATEN_CPU_CAPABILITY=avx512 WRONG=no
run ATEN_CPU_CAPABILITY=avx2 WRONG=yes
run ATEN_CPU_CAPABILITY=avx512 SIMDLEN=512 WRONG=no
run ATEN_CPU_CAPABILITY=avx2 SIMDLEN=256 WRONG=no
