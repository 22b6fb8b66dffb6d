"""The outlines of the shapes that scenes show: corners of a polygon that fills the unit square, y downwards.

Circles and rings are no polygons, and drawn as ellipses (`scenes.draw_scene`).
"""

import math
from collections.abc import Callable

Point = tuple[float, float]


def _polygon(corners: list[Point]) -> list[Point]:
    """The polygon stretched to fill the unit square."""
    xs, ys = zip(*corners, strict=True)
    left, top, width, height = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    return [((x - left) / width, (y - top) / height) for x, y in corners]


def _regular(corners: int) -> list[Point]:
    angles = [math.tau * i / corners for i in range(corners)]
    return [(math.sin(angle), -math.cos(angle)) for angle in angles]


def _star() -> list[Point]:
    radii = [1.0, 0.42] * 5
    return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]


def _heart() -> list[Point]:
    # The well-known heart curve (Weisstein, "Heart Curve", MathWorld).
    angles = [math.tau * i / 48 for i in range(48)]
    ys = [2 * math.cos(3 * a) + math.cos(4 * a) + 5 * math.cos(2 * a) - 13 * math.cos(a) for a in angles]
    return [(16 * math.sin(a) ** 3, y) for a, y in zip(angles, ys, strict=True)]


def _angles(start: float, end: float) -> list[float]:
    return [start + (end - start) * i / 24 for i in range(25)]


def _polar(radius: Callable[[float], float]) -> list[Point]:
    """A closed curve by its distance from the middle."""
    angles = [math.tau * i / 96 for i in range(96)]
    return [(radius(angle) * math.sin(angle), -radius(angle) * math.cos(angle)) for angle in angles]


def _bow(radius: float, direction: int) -> list[Point]:
    """Half a circle above (3, 3), from left to right (1) or from right to left (-1)."""
    return [(3 - direction * radius * math.cos(angle), 3 - radius * math.sin(angle)) for angle in _angles(0, math.pi)]


def _crescent() -> list[Point]:
    """Between two circles that meet at the two ends."""
    outer = [(-math.cos(angle), math.sin(angle)) for angle in _angles(-1.9, 1.9)]
    inner = [(0.7 - 1.019 * math.cos(angle), 1.019 * math.sin(angle)) for angle in _angles(1.189, -1.189)]
    return outer + inner


OUTLINES = {
    "square": _polygon([(0, 0), (1, 0), (1, 1), (0, 1)]),
    "triangle": _polygon([(1, 0), (2, 1), (0, 1)]),
    "star": _polygon(_star()),
    "heart": _polygon(_heart()),
    "diamond": _polygon([(1, 0), (2, 1), (1, 2), (0, 1)]),
    "cross": _polygon([(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]),
    "pentagon": _polygon(_regular(5)),
    "hexagon": _polygon(_regular(6)),
    "octagon": _polygon(_regular(8)),
    "arrow": _polygon([(3, 0), (6, 3), (4, 3), (4, 6), (2, 6), (2, 3), (0, 3)]),
    "trapezoid": _polygon([(1, 0), (3, 0), (4, 4), (0, 4)]),
    "parallelogram": _polygon([(2, 0), (6, 0), (4, 4), (0, 4)]),
    "kite": _polygon([(2, 0), (4, 2), (2, 6), (0, 2)]),
    "lightning bolt": _polygon([(4, 0), (8, 0), (5, 4), (8, 4), (0, 10), (3, 5), (0, 5)]),
    "house": _polygon([(3, 0), (6, 3), (5, 3), (5, 6), (1, 6), (1, 3), (0, 3)]),
    "hourglass": _polygon([(0, 0), (6, 0), (3.5, 3), (6, 6), (0, 6), (2.5, 3)]),
    "bow tie": _polygon([(0, 0), (3, 2.5), (6, 0), (6, 6), (3, 3.5), (0, 6)]),
    "chevron": _polygon([(3, 0), (6, 3), (6, 6), (3, 3), (0, 6), (0, 3)]),
    "crown": _polygon([(0, 0), (1.5, 3), (3, 0), (4.5, 3), (6, 0), (6, 6), (0, 6)]),
    "frame": _polygon([(0, 0), (4, 0), (4, 4), (0, 4), (0, 0), (1, 1), (1, 3), (3, 3), (3, 1), (1, 1)]),
    "flower": _polygon(_polar(lambda angle: 1 + 0.3 * math.cos(5 * angle))),
    "gear": _polygon(_polar(lambda angle: 1.2 if math.cos(8 * angle) > 0 else 0.85)),
    "fir tree": _polygon(
        [(3, 0), (5, 2.5), (4, 2.5), (6, 5), (3.6, 5), (3.6, 6), (2.4, 6), (2.4, 5), (0, 5), (2, 2.5), (1, 2.5)]
    ),
    "staircase": _polygon([(0, 0), (2, 0), (2, 2), (4, 2), (4, 4), (6, 4), (6, 6), (0, 6)]),
    "shield": _polygon([(0, 0), (6, 0), (6, 3), (5, 5), (3, 6), (1, 5), (0, 3)]),
    "arch": _polygon([(0, 6), *_bow(3, 1), (6, 6), (4, 6), *_bow(1.2, -1), (2, 6)]),
    "crescent": _polygon(_crescent()),
    "teardrop": _polygon([(3, 0), *((3 + 2 * math.cos(a), 4 + 2 * math.sin(a)) for a in _angles(-0.5, math.pi + 0.5))]),
}
"""By shape; that of a frame goes around its hole the other way."""
