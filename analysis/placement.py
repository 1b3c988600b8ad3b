"""Put labels beside points so that no label covers another label, a point, a bar or a leader line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Box = tuple[float, float, float, float]  # left, bottom, right, top
_CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
_BETWEEN = ((0.5, 1), (-0.5, 1), (0.5, -1), (-0.5, -1), (1, 0.5), (1, -0.5), (-1, 0.5), (-1, -0.5))
LEADER = 20  # pixels: beyond, a line ties the label to its point
_GAPS = (5, 10, 18, 30, 46, 66, 90, 120)
_HALF = 2  # pixels: a leader is a chain of boxes of twice this size
_TRIES, _HOPELESS = 5, 0.75  # of the labels: where fewer find room, no order helps


def place(
    points: np.ndarray, sizes: np.ndarray, bounds: Box, *, radius: float = 4, blocked: Sequence[Box] | np.ndarray = ()
) -> list[Box | None]:
    """The box of each label, or None where there is no room.

    `points` (n, 2) and `sizes` (n, 2: width, height) are in pixels. Earlier points choose first: give the important ones
    first; where some find no room, all are placed anew with those first, and the try that places the most is kept.
    A label prefers to be near, and diagonal to its point. `blocked` boxes, e.g. bars, are avoided by the labels
    and may be crossed by the leaders, which cross no label, point or other leader.
    """
    order = list(range(len(points)))
    best: dict[int, Box] = {}
    for _ in range(_TRIES):
        found = _in_order(order, points, sizes, (bounds, np.reshape(blocked, (-1, 4)), radius))
        best = max(best, found, key=len)
        if len(found) == len(order) or len(found) < _HOPELESS * len(order):
            break
        order.sort(key=lambda i: i in found)
    return [best.get(i) for i in range(len(points))]


def _in_order(
    order: Sequence[int], points: np.ndarray, sizes: np.ndarray, around: tuple[Box, np.ndarray, float]
) -> dict[int, Box]:
    """The boxes of the labels that find room when they choose in this order."""
    bounds, blocked, radius = around
    drawn = np.concatenate([points - radius, points + radius], axis=1)  # what a leader must not cross
    boxes: dict[int, Box] = {}
    for i in order:
        taken = np.concatenate([drawn, blocked])
        found = next(_free(points[i], sizes[i], points, (bounds, taken, drawn, radius)), None)
        if found is not None:
            boxes[i] = found
            drawn = np.array([*drawn, found, *leader(points[i], found, radius)])
    return boxes


def overlaps(box: Box, others: Sequence[Box] | np.ndarray) -> bool:
    """Whether the box shares area with any of the others."""
    left, bottom, right, top = box
    l, b, r, t = np.reshape(np.asarray(others, float), (-1, 4)).T
    return bool(((left < r) & (l < right) & (bottom < t) & (b < top)).any())


def distance(box: Box, points: np.ndarray) -> np.ndarray:
    """(n,) distances from a box to (n, 2) points, 0 inside."""
    low, high = np.array(box[:2]), np.array(box[2:])
    return np.linalg.norm(np.maximum(0, np.maximum(low - points, points - high)), axis=-1)


def leader(point: np.ndarray, box: Box, radius: float = 4) -> list[Box]:
    """The line from a point's edge to its label as a chain of small boxes; empty where the label is near."""
    end = np.clip(point, box[:2], box[2:])
    length = float(np.linalg.norm(end - point))
    if length <= LEADER:
        return []
    start = (radius + _HALF) * 2**0.5  # clear of the point's own box in every direction
    along = np.linspace(start, length, int(np.ceil((length - start) / (1.4 * _HALF))) + 1)
    centres = point + along[:, None] * (end - point) / length
    return [(x - _HALF, y - _HALF, x + _HALF, y + _HALF) for x, y in centres]


def _free(
    point: np.ndarray, size: np.ndarray, points: np.ndarray, around: tuple[Box, np.ndarray, np.ndarray, float]
) -> Iterator[Box]:
    """The boxes where the label may stand, near ones first."""
    bounds, taken, drawn, radius = around
    for gap in _GAPS:
        for side in (*_CORNERS, *_BETWEEN):
            box = _box(point, size, side, gap)
            if not _inside(box, bounds) or overlaps(box, taken):
                continue
            line = leader(point, box, radius)
            if _clear(line, drawn, taken[len(drawn) :]) if line else _belongs(box, point, points):
                yield box


def _clear(line: Sequence[Box], drawn: np.ndarray, blocked: np.ndarray) -> bool:
    """Whether a leader crosses nothing that is drawn and does not run along a bar."""
    return not any(overlaps(part, drawn) for part in line) and 2 * sum(overlaps(p, blocked) for p in line) < len(line)


def _belongs(box: Box, point: np.ndarray, points: np.ndarray) -> bool:
    """Whether no other point is nearer to the box than its own."""
    return bool(distance(box, point[None])[0] <= distance(box, points).min() + 1e-9)


def _box(point: np.ndarray, size: np.ndarray, side: tuple[float, float], gap: float) -> Box:
    left, bottom = point - size / 2 + np.array(side) * (size / 2 + gap)
    return left, bottom, left + size[0], bottom + size[1]


def _inside(box: Box, bounds: Box) -> bool:
    return box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
