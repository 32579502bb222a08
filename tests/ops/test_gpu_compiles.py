"""The kernels as the launches launch them, compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
HERE = Path(__file__).parent


def compiled(*target):
    paths = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, HERE / "gpu_offline.py", *target],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_for_nvidia():
    seen = compiled("cuda", "90")
    # what does not fit into registers is on the stack: a few bytes at most, but for unlike layers in one launch
    assert {
        what: found["stack"] for what, found in seen.items() if found["stack"] > 16 and what != "three layers"
    } == {}
    # each thread has several loads of 16 bytes under way; in bfloat16, 8 for one row and half as many for 4
    assert seen["torch.bfloat16 1"]["wide"] >= 8
    assert seen["torch.bfloat16 4"]["wide"] >= 4
    assert seen["int8 1"]["wide"] >= 8
    assert seen["int4-g64-zp 1"]["wide"] >= 4
    assert seen["compact"]["wide"] >= 8
    assert seen["torch.bfloat16 1"]["reg"] <= 64  # 8 programs of 4 warps for each processor


def test_for_amd():
    seen = compiled("hip", "gfx942")
    assert {what: found["local"] for what, found in seen.items() if found["local"]} == {}
    assert seen["torch.bfloat16 1"]["wide"] >= 8
    assert seen["int4-g64-zp 1"]["wide"] >= 4
