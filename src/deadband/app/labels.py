"""Labels of points in a plot that cover neither each other nor a point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

Box = tuple[float, float, float, float]  # left, bottom, right, top, in points of 1/72 inch

_SIZE = 8  # of the letters
_MARKER = 4.0  # half the width of a point's marker
_GAP = 2.0  # between a label and what is next to it
_DIRECTIONS = 24
_LINE_FROM = 12.0  # a label that is farther from its point has a line to it


def place_labels(axes: Any, points: Sequence[tuple[float, float]], texts: Sequence[str]) -> list[Any]:
    """Write a text beside each point, as near as there is room inside the axes; returns matplotlib's annotations.

    The layout of the figure is made first and stays as it is, so draw all else before. Where all of the axes is full,
    labels overlap after all.

    Args:
        axes: of matplotlib, whose limits are set.
        points: in the units of the axes.
        texts: one for each.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    scale = 72 / figure.dpi  # points in a pixel
    inside = _scaled(axes.get_window_extent().extents, scale)
    centers = [tuple(scale * axes.transData.transform(point)) for point in points]
    taken = [_around(center, 2 * _MARKER, 2 * _MARKER) for center in centers]
    notes = []
    for point, (x, y), text in zip(points, centers, texts, strict=True):
        note = axes.annotate(
            text, point, xytext=(0, 0), textcoords="offset points", fontsize=_SIZE, ha="center", va="center"
        )
        left, bottom, right, top = _scaled(note.get_window_extent().extents, scale)
        width, height = right - left + _GAP, top - bottom + _GAP
        free = (place for place in _places(width, height) if _is_free(_at(x, y, place, width, height), inside, taken))
        distance, *offset = next(free, (0.0, 0.0, height))
        taken.append(_around((x + offset[0], y + offset[1]), width, height))
        note.set_position(offset)
        if distance > _LINE_FROM:
            axes.annotate(
                "", point, xytext=offset, textcoords="offset points", zorder=0,
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "tab:gray", "shrinkA": height / 2, "shrinkB": 0},
            )  # fmt: skip
        notes.append(note)
    return notes


def _places(width: float, height: float) -> Iterator[tuple[float, float, float]]:
    """Distance from a point and offset of a label's center, the nearest first; above and to the right first of all."""
    for step in range(100):
        distance = _MARKER + _GAP + 4.0 * step
        for index in range(_DIRECTIONS):
            angle = math.pi / 2 - 2 * math.pi * index / _DIRECTIONS
            yield distance, math.cos(angle) * (distance + width / 2), math.sin(angle) * (distance + height / 2)


def _is_free(box: Box, inside: Box, taken: Sequence[Box]) -> bool:
    within = inside[0] <= box[0] and inside[1] <= box[1] and box[2] <= inside[2] and box[3] <= inside[3]
    return within and not any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
    )


def _at(x: float, y: float, place: tuple[float, float, float], width: float, height: float) -> Box:
    return _around((x + place[1], y + place[2]), width, height)


def _around(center: Sequence[float], width: float, height: float) -> Box:
    x, y = center
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _scaled(extents: Sequence[float], scale: float) -> Box:
    left, bottom, right, top = (scale * float(each) for each in extents)
    return left, bottom, right, top
