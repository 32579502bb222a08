"""Files of deadband 0.1.0 before its modules moved into wings (tests/formats) are read, and the same are written.

They are of `nn.Linear(4, 6)` as layer 0, 256 rows of entries between 1 and 2 in magnitude, sparsity 0.4 by
`sensitivity`, and a mask of half its features.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import deadband
from deadband import ActivationSparsifier, aggregate, mask, reduce

FORMATS = Path(__file__).parent / "formats"


def header(path):
    with safe_open(path, "pt") as file:
        (key, about), *rest = file.metadata().items()
    assert not rest
    return key, json.loads(about)


@pytest.fixture
def sparsifier():
    made = ActivationSparsifier(
        nn.Sequential(nn.Linear(4, 6)), aggregate.mean_abs, reduce.mean, mask.magnitude, sparsity=0.5
    )
    made.register_layer(made.model[0])
    return made


def test_calibration(tmp_path):
    read = deadband.Calibration.load(FORMATS / "calibration.safetensors")
    site = read.sites["0"]
    assert (list(read.sites), read.criterion, site.entries, site.out_features) == (["0"], "magnitude", 1024, 6)
    assert site.threshold(0.4) == pytest.approx(1.4, abs=0.05)
    read.save(tmp_path / "again")
    assert header(tmp_path / "again") == header(FORMATS / "calibration.safetensors")
    assert header(tmp_path / "again")[0] == "deadband.calibration"


def test_thresholds(tmp_path):
    read = deadband.Thresholds.load(FORMATS / "thresholds.safetensors")
    rule = read["0"]
    assert (list(read), read.sparsity, read.method, read.criterion) == (["0"], 0.4, "sensitivity", "sensitivity")
    assert rule.threshold > 0
    assert rule.scale.shape == rule.center.shape == (4,)
    deadband.sparsify_(nn.Sequential(nn.Linear(4, 6)), dict(read))
    read.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (FORMATS / "thresholds.safetensors").read_bytes()


def test_sparsifier(sparsifier, tmp_path):
    path = FORMATS / "sparsifier.safetensors"
    sparsifier.load(path)
    assert int(sparsifier.get_mask("0").sum()) == 2
    sparsifier.save(tmp_path / "again")
    assert header(tmp_path / "again") == header(path)
    assert header(path)[0] == "deadband.activation_sparsifier"
    x = torch.randn(3, 4)
    sparsifier.squash_mask()
    with torch.no_grad():
        kept = x * sparsifier.get_mask("0")
        assert torch.equal(sparsifier.model(x), nn.functional.linear(kept, *sparsifier.model[0].parameters()))
