import itertools

import pytest

pytest.importorskip("matplotlib")

from deadband.app.labels import place_labels

CASES = {
    "one": [(20, 15.7)],
    "apart": [(20, 15), (50, 16), (80, 22)],
    "the same five times": [(50, 18)] * 5,
    "a demo": [
        (24, 15.76), (55, 15.77), (63, 16.1), (72, 18.2), (80, 22.7), (81, 15.8), (95, 18.4), (96, 17.1), (97, 17.2),
    ],
    "in a row": [(50 + index / 4, 18) for index in range(9)],
    "one above the other": [(99, 18 + index / 9) for index in range(9)],
    "in the corners": [(0, 14), (0, 24), (100, 14), (100, 24), (0.5, 14), (99.5, 24)],
    "a crowd in a corner": [(97 + index % 3, 23 + index / 9) for index in range(9)],
}  # fmt: skip


def boxes_of(notes, figure):
    """What is really drawn, in pixels."""
    return [note.get_window_extent(figure.canvas.get_renderer()) for note in notes]


def check(figure, axes, notes, points):
    figure.canvas.draw()
    boxes = boxes_of(notes, figure)
    for (one, box), (other, second) in itertools.combinations(zip(notes, boxes, strict=True), 2):
        assert not box.overlaps(second), (one.get_text(), other.get_text())
    inside = axes.get_window_extent()
    for note, box in zip(notes, boxes, strict=True):
        assert inside.x0 <= box.x0 <= box.x1 <= inside.x1, note.get_text()
        assert inside.y0 <= box.y0 <= box.y1 <= inside.y1, note.get_text()
        assert box.width > 10  # something is there
        assert not any(box.contains(*axes.transData.transform(point)) for point in points), note.get_text()


@pytest.mark.parametrize("dpi", [72, 150])
@pytest.mark.parametrize("case", CASES)
def test_labels_cover_nothing(case, dpi):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = CASES[case]
    figure = Figure(figsize=(7.5, 4.5), layout="constrained", dpi=dpi)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), "o")
    axes.set(xlim=(0, 110), ylim=(12, 26), xlabel="x", ylabel="y", title="title")
    notes = place_labels(axes, points, [f"transformers, number {index}" for index in range(len(points))])
    assert [note.get_text() for note in notes] == [f"transformers, number {index}" for index in range(len(points))]
    check(figure, axes, notes, points)


def test_where_all_is_full_labels_are_still_there():
    from matplotlib.figure import Figure

    axes = Figure(figsize=(1, 1)).subplots()
    notes = place_labels(axes, [(0.5, 0.5)] * 3, ["a label that is wider than the plot"] * 3)
    assert len(notes) == 3
