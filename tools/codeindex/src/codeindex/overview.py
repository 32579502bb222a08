"""A picture of which folders import which."""

from __future__ import annotations

import hashlib
import html
import posixpath
from collections import defaultdict
from collections.abc import Mapping, Sequence

from codeindex.graph import Graph
from codeindex.markdown import shown
from codeindex.store import MARK

MOST = 24
"""Folders in the picture: smaller ones are part of the folder above."""
_WIDTH, _HEIGHT, _GAP, _ROW = 168, 26, 16, 74


def overview_svg(graph: Graph, paths: Sequence[str]) -> str:
    """An SVG with a box for each folder, those that import above those that are imported; nothing, where no folder
    imports another."""
    group = _groups(paths)
    weights: dict[tuple[str, str], int] = defaultdict(int)
    for path in paths:
        for target in graph.imports.get(path, ()):
            if group[path] != group[target]:
                weights[group[path], group[target]] += 1
    if not weights:
        return ""
    nodes = sorted({name for edge in weights for name in edge})
    layers = _layers(nodes, weights)
    place = {}
    widest = max(len(layer) for layer in layers)
    width = widest * (_WIDTH + _GAP) + _GAP
    for row, layer in enumerate(layers):
        left = (width - len(layer) * (_WIDTH + _GAP) + _GAP) / 2
        for column, name in enumerate(layer):
            place[name] = (left + column * (_WIDTH + _GAP), _GAP + row * _ROW)
    height = len(layers) * _ROW - _ROW + _HEIGHT + 2 * _GAP
    most = max(weights.values())
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="sans-serif" font-size="12" role="img" aria-label="Imports between folders">',
        '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#678"/></marker></defs>',
        f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>',
    ]
    for (source, target), weight in sorted(weights.items()):
        (x1, y1), (x2, y2) = place[source], place[target]
        x1, x2 = x1 + _WIDTH / 2, x2 + _WIDTH / 2
        y1, y2 = (y1 + _HEIGHT, y2) if y1 < y2 else (y1, y2 + _HEIGHT) if y1 > y2 else (y1, y2)
        bend = 24 if place[source][1] == place[target][1] else 0
        middle = (y1 + y2) / 2 - bend
        out.append(
            f'<path d="M{x1:g} {y1:g}C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}" fill="none" stroke="#678" '
            f'stroke-opacity="0.6" stroke-width="{0.8 + 2.4 * weight / most:.2f}" marker-end="url(#end)">'
            f"<title>{_text(source)} imports {_text(target)}: {weight}</title></path>"
        )
    for name in nodes:
        x, y = place[name]
        label = shown(name) or "(top)"
        short = label if len(label) <= 24 else "…" + label[-23:]
        out.append(
            f'<g><rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="4" fill="#eef4f8" stroke="#456"/>'
            f'<text x="{x + _WIDTH / 2:g}" y="{y + 17:g}" text-anchor="middle" fill="#123">{html.escape(short)}</text>'
            f"<title>{html.escape(label)}</title></g>"
        )
    drawn = "\n".join([*out, "</svg>"])
    return f"{drawn}<!-- {MARK} imports, digest `{hashlib.sha256(drawn.encode()).hexdigest()[:40]}`. -->\n"


def _text(name: str) -> str:
    return html.escape(shown(name) or "(top)")


def _groups(paths: Sequence[str]) -> dict[str, str]:
    """The box of each file: its folder, or the nearest above that is among the largest."""
    own: dict[str, int] = defaultdict(int)
    for path in paths:
        own[posixpath.dirname(path)] += 1
    boxes = set(own)
    for depth in range(max((_depth(name) for name in boxes), default=0), 0, -1):
        for name in sorted((name for name in boxes if _depth(name) == depth), key=lambda name: (own[name], name)):
            if len(boxes) <= MOST:
                break
            boxes.discard(name)
            above = posixpath.dirname(name)
            own[above] += own.pop(name)
            boxes.add(above)
    made = {}
    for path in paths:
        folder = posixpath.dirname(path)
        while folder not in boxes and folder:
            folder = posixpath.dirname(folder)
        made[path] = folder
    return made


def _depth(folder: str) -> int:
    return folder.count("/") + bool(folder)


def _layers(nodes: Sequence[str], weights: Mapping[tuple[str, str], int]) -> list[list[str]]:
    """Rows of boxes, such that imports go down: of two that import each other, the heavier direction does."""
    down = {edge for edge, weight in weights.items() if (weight, edge) > (weights.get(edge[::-1], 0), edge[::-1])}
    depth: dict[str, int] = {}
    busy: set[str] = set()

    def visit(name: str) -> int:
        if name not in depth:
            busy.add(name)
            above = [visit(source) for source, target in sorted(down) if target == name and source not in busy]
            depth[name] = 1 + max(above, default=-1)
            busy.discard(name)
        return depth[name]

    for name in nodes:
        visit(name)
    layers: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for name in nodes:
        layers[depth[name]].append(name)
    for row in range(1, len(layers)):  # near to what imports them
        above = {name: at for at, name in enumerate(layers[row - 1])}

        def centre(name: str, above: Mapping[str, int] = above) -> tuple[float, str]:
            at = [above[source] for source, target in down if target == name and source in above]
            return (sum(at) / len(at) if at else len(above) / 2, name)

        layers[row].sort(key=centre)
    return [layer for layer in layers if layer]
