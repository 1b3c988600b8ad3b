"""Put labels beside points so that no label covers another label or a point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Box = tuple[float, float, float, float]  # left, bottom, right, top
_SIDES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
LEADER = 20  # pixels: beyond, a line ties the label to its point
_GAPS = (5, 10, 18, 30, 46, 66)


def place(
    points: np.ndarray, sizes: np.ndarray, bounds: Box, *, radius: float = 4, blocked: Sequence[Box] = ()
) -> list[Box | None]:
    """The box of each label, or None where there is no room.

    `points` (n, 2) and `sizes` (n, 2: width, height) are in pixels. Earlier points choose first: give the important ones
    first. A label prefers to be near, and diagonal to its point, where neither bars nor the front run. `blocked` boxes are avoided too.
    """
    dots: list[Box] = [(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    taken: list[Box] = list(blocked)
    boxes: list[Box | None] = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        candidates = ((gap, _box(x, y, width, height, side, gap)) for gap in _GAPS for side in _SIDES)
        free = (c for c in candidates if _inside(c[1], bounds) and not overlaps(c[1], [*dots, *taken]))
        box = next((c for gap, c in free if gap > LEADER or _belongs(c, np.array((x, y)), points)), None)
        boxes.append(box)
        if box is not None:
            taken.append(box)
    return boxes


def overlaps(box: Box, others: Sequence[Box]) -> bool:
    """Whether the box shares area with any of the others."""
    left, bottom, right, top = box
    return any(left < r and l < right and bottom < t and b < top for l, b, r, t in others)


def distance(box: Box, points: np.ndarray) -> np.ndarray:
    """(n,) distances from a box to (n, 2) points, 0 inside."""
    low, high = np.array(box[:2]), np.array(box[2:])
    return np.linalg.norm(np.maximum(0, np.maximum(low - points, points - high)), axis=-1)


def _belongs(box: Box, point: np.ndarray, points: np.ndarray) -> bool:
    """Whether no other point is nearer to the box than its own."""
    return bool(distance(box, point[None])[0] <= distance(box, points).min() + 1e-9)


def _box(x: float, y: float, width: float, height: float, side: tuple[int, int], gap: float) -> Box:
    horizontal, vertical = side
    left = x - width / 2 + horizontal * (width / 2 + gap)
    bottom = y - height / 2 + vertical * (height / 2 + gap)
    return left, bottom, left + width, bottom + height


def _inside(box: Box, bounds: Box) -> bool:
    return box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
