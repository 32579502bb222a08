import json
import os

import pytest

from deadband.app import demo
from deadband.app.models import load_model
from deadband.layers.sites import sparse_sites


@pytest.mark.slow
@pytest.mark.model
def test_demo_on_the_real_model(tmp_path, monkeypatch, capsys):
    """The real run, on less text and with the quicker allocation."""
    monkeypatch.setattr(demo, "CALIBRATION_TOKENS", 1024)
    monkeypatch.setattr(demo, "EVALUATION_TOKENS", 512)
    monkeypatch.setattr(demo, "WINDOW", 256)
    monkeypatch.setattr(demo, "METHOD", "uniform")
    monkeypatch.setattr(demo, "DECODE_TOKENS", 4)
    output = tmp_path / "the demo"
    figures = demo.run(output)
    printed = capsys.readouterr().out
    assert sorted(os.listdir(output)) == ["demo.png", "demo.svg", "figures.json", "model"]
    assert os.listdir(tmp_path) == ["the demo"]
    rows = figures["rows"]
    assert [row["asked"] for row in rows] == [0.0, 0.25, 0.4, 0.5]
    for row in rows[1:]:
        assert row["sparsity"] == pytest.approx(row["asked"], abs=0.03)
    assert rows[0]["kl"] == 0.0 < rows[1]["kl"] < rows[2]["kl"] < rows[3]["kl"]
    assert 10 < rows[0]["perplexity"] < 60  # a language model, not noise
    assert rows[1]["perplexity"] < 1.15 * rows[0]["perplexity"]
    assert rows[3]["bytes_per_token"] < rows[1]["bytes_per_token"] < rows[0]["bytes_per_token"]
    assert f"{rows[1]['perplexity']:.3f}" in printed
    assert json.loads((output / "figures.json").read_text())["rows"][0]["perplexity"] == rows[0]["perplexity"]
    assert len(sparse_sites(load_model(str(output / "model")))) == 210


@pytest.mark.parametrize("content", ["file", "folder"])
def test_other_peoples_folders_are_left_alone(tmp_path, content):
    output = tmp_path / "precious"
    if content == "file":
        output.write_text("precious")
    else:
        output.mkdir()
        (output / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not the folder of an earlier demo"):
        demo.run(output)
    assert output.exists()
    with pytest.raises(ValueError, match="does not exist; make it first"):
        demo.run(tmp_path / "nowhere" / "demo")
