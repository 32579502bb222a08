import itertools
import json
import os

import pytest

from deadband.app import demo, labels
from deadband.app.models import load_model
from deadband.layers.sites import sparse_sites


@pytest.mark.slow
@pytest.mark.model
def test_demo_on_the_real_model(tmp_path, monkeypatch, capsys):
    """The real run, on less text, with the quicker allocation, and no more than three models compiled."""
    monkeypatch.setattr(demo, "CALIBRATION_TOKENS", 1024)
    monkeypatch.setattr(demo, "EVALUATION_TOKENS", 512)
    monkeypatch.setattr(demo, "WINDOW", 256)
    monkeypatch.setattr(demo, "METHOD", "uniform")
    monkeypatch.setattr(demo, "DECODE_TOKENS", 4)
    left, prepare = iter(range(3)), demo.prepare_decode_
    monkeypatch.setattr(demo, "prepare_decode_", lambda model: model if next(left, None) is None else prepare(model))
    output = tmp_path / "the demo"
    figures = demo.run(output)
    printed = capsys.readouterr().out
    assert sorted(os.listdir(output)) == ["demo.png", "demo.svg", "figures.json", "model"]
    assert os.listdir(tmp_path) == ["the demo"]
    rows = figures["rows"]
    assert [row["asked"] for row in rows] == [None, 0.0, 0.25, 0.4, 0.5, 0.0, 0.4, 0.0, 0.25]
    assert rows[0]["weights"] in ("float32", "bfloat16")
    assert [row["weights"] for row in rows[1:]] == ["bfloat16"] * 4 + ["int8"] * 2 + ["int4"] * 2
    for row in rows:
        assert row["sparsity"] == pytest.approx(row["asked"] or 0.0, abs=0.03)
    plain, dense, quarter, forty, half, int8, int8_forty, int4, int4_quarter = rows
    assert plain["kl"] == 0.0 <= dense["kl"] < quarter["kl"] < forty["kl"] < half["kl"]
    assert dense["kl"] < 0.01  # rounding
    assert int8["kl"] < 0.02 < int4["kl"] < int4_quarter["kl"]
    assert int8_forty["kl"] == pytest.approx(forty["kl"], rel=0.2)
    assert 10 < plain["perplexity"] < 60  # a language model, not noise
    assert quarter["perplexity"] < 1.15 * plain["perplexity"]
    read = [row["bytes_per_token"] for row in (int4_quarter, int4, int8_forty, int8, half, forty, quarter, dense)]
    assert read[0] < read[1] < read[3]
    assert read[2] < read[3] < read[4] < read[5] < read[6] < read[7]
    assert f"{quarter['perplexity']:.3f}" in printed
    assert figures["seconds"] == pytest.approx(sum(figures["phases"].values()))
    assert json.loads((output / "figures.json").read_text())["rows"][0]["perplexity"] == plain["perplexity"]
    assert len(sparse_sites(load_model(str(output / "model")))) == 210


def figures_of(points):
    """Figures of a demo with these speeds and perplexities."""
    variants = [demo.Variant("float32"), *demo.OWN]
    quality = {"sparsity": 0.25, "kl": 0.1, "agreement": 0.9, "bytes_per_token": 2e8, "bandwidth": 7e9}
    rows = [
        {"model": variant.label, **variant._asdict(), **quality, "tokens_per_second": speed, "perplexity": perplexity}
        for variant, (speed, perplexity) in zip(variants, points, strict=True)
    ]
    about = {"processor": "One", "threads": 2, "kernels": "x86-64-v3", "torch": "2", "transformers": "5"}
    return {"model": "M", "rows": rows, "read_bandwidth": 5e10, "machine": about}


POINTS = {
    "as measured": [
        (25, 15.8), (50, 15.8), (63, 16.1), (72, 18.2), (79, 22.7), (80, 15.9), (95, 18.4), (97, 17.2), (98, 17.6)
    ],
    "close together": [(50 + index / 9, 16 + index % 2 / 9) for index in range(9)],
    "the same": [(60, 16)] * 9,
}  # fmt: skip


@pytest.mark.parametrize("case", POINTS)
def test_labels_of_the_plot_do_not_overlap(tmp_path, monkeypatch, case):
    made = []

    def place_labels(axes, points, texts):
        made.append((axes, labels.place_labels(axes, points, texts)))

    monkeypatch.setattr(demo, "place_labels", place_labels)
    figures = figures_of(POINTS[case])
    demo.plot(figures, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["demo.png", "demo.svg"]
    ((axes, notes),) = made
    assert [note.get_text() for note in notes] == [row["model"] for row in figures["rows"]]
    axes.figure.draw_without_rendering()  # what is drawn knows the resolution, which savefig changes for a while
    boxes = [note.get_window_extent() for note in notes]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    inside = axes.get_window_extent()
    assert all(inside.x0 < box.x0 and box.x1 < inside.x1 for box in boxes)


def test_the_table_shows_every_row():
    figures = figures_of(POINTS["as measured"])
    head, *lines = demo.table(figures).splitlines()
    assert " ".join(head.split()) == "skipped perplexity KL top-1 MB/token GB/s tokens/s speed"
    assert " ".join(lines[0].split()) == "transformers, float32 25.0% 15.800 0.1000 90.0% 200.0 7.0 25.0 1.00x"
    assert " ".join(lines[8].split()) == "int4, 25% 25.0% 17.600 0.1000 90.0% 200.0 7.0 98.0 3.92x"


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
