"""Leads wires around nodes: the editor draws them behind, so that one would vanish under what is in its way.

Points are (x, y) and boxes (left, top, right, bottom), in pixels of the graph.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

Point = tuple[float, float]
Box = tuple[float, float, float, float]

# How LiteGraph bends a wire between its ends and its reroutes.
BEND, MOST_BEND_PX = 0.25, 80
SAMPLES, SAMPLE_PX = 12, 14  # of a curve, at least so many, and so far apart at the most
HARMLESS_PX = 6  # of a wire that may be hidden
RIM_PX, NEAR_PX = 30, 24
CLEAR_PX = 4  # that a curve may come near a node
LANE_PX = 9  # between parallel wires
SIDE_PX = 10  # between a node and the lane beside it
TURN_COST, SHARED_COST = 60, 4


def curve(points: Sequence[Point]) -> list[Point]:
    """The way of a wire from its first point to its last, by reroutes at the others."""
    angles = [0.0, *(_angle(*points[index - 1 : index + 2]) for index in range(1, len(points) - 1)), 0.0]
    way = []
    for index, (start, end) in enumerate(pairwise(points)):
        bend = math.dist(start, end) * BEND
        leaving = bend if index == 0 else min(bend, MOST_BEND_PX)
        arriving = bend if index == len(points) - 2 else min(bend, MOST_BEND_PX)
        near = _beside(start, angles[index], leaving)
        far = _beside(end, angles[index + 1], -arriving)
        steps = max(SAMPLES, round(math.dist(start, end) / SAMPLE_PX))
        way += [_bezier(start, near, far, end, step / steps) for step in range(steps + 1)]
    return way


def _angle(before: Point, point: Point, after: Point) -> float:
    """The direction of a wire at a reroute."""
    coming = math.atan2(point[1] - before[1], point[0] - before[0])
    half = (coming - math.atan2(after[1] - point[1], after[0] - point[0])) / 2
    return coming - (half + math.pi if abs(half) > math.pi / 2 else half)


def _beside(point: Point, angle: float, distance: float) -> Point:
    return point[0] + distance * math.cos(angle), point[1] + distance * math.sin(angle)


def _bezier(start: Point, near: Point, far: Point, end: Point, t: float) -> Point:
    weights = (1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3
    return tuple(
        sum(weight * point[axis] for weight, point in zip(weights, (start, near, far, end), strict=True))
        for axis in (0, 1)
    )


def hidden_px(points: Sequence[Point], boxes: Iterable[Box]) -> float:
    """How much of a wire lies under boxes."""
    way, boxes = curve(points), list(boxes)
    return sum(
        math.dist(one, other)
        for one, other in pairwise(way)
        if any(_is_inside(((one[0] + other[0]) / 2, (one[1] + other[1]) / 2), box) for box in boxes)
    )


def _is_inside(point: Point, box: Box) -> bool:
    return box[0] < point[0] < box[2] and box[1] < point[1] < box[3]


class Router:
    """Finds ways between nodes. boxes: of the nodes, by their numbers, titles included."""

    def __init__(self, boxes: dict[int, Box]):
        self.boxes = {number: _grow(box, CLEAR_PX) for number, box in boxes.items()}
        self.columns, self.rows = self._lines(0), self._lines(1)
        self.taken: dict[tuple[Point, Point], int] = {}
        self.free: dict[tuple[Point, Point], bool] = {}

    def _lines(self, axis: int) -> list[float]:
        """Where a wire may run beside nodes: lanes in a row or a column of the plan."""
        lines = set()
        for box in self.boxes.values():
            for lane in range(3):
                lines |= {box[axis] - SIDE_PX - lane * LANE_PX, box[axis + 2] + SIDE_PX + lane * LANE_PX}
        clear = sorted(lines)
        return [line for index, line in enumerate(clear) if not index or line - clear[index - 1] > 1]

    def lead(self, start: Point, end: Point, origin: int, target: int) -> list[Point]:
        """The reroutes of a wire from an output of a node to an input of another; none where the direct way is free."""
        others = [box for number, box in self.boxes.items() if number not in (origin, target)]
        # It may touch the sides of its own nodes, where it begins and ends.
        own = [_narrow(self.boxes[number]) for number in {origin, target} if number in self.boxes]
        boxes = others + own
        if hidden_px([start, end], boxes) <= HARMLESS_PX:
            return []
        return _without_idle(start, _with_more(self._way(start, end)), end, boxes)

    def _way(self, start: Point, end: Point) -> list[Point]:
        """The corners of the cheapest way along lanes."""
        columns = sorted({*self.columns})
        rows = sorted({*self.rows, start[1], end[1]})
        column, row = {x: i for i, x in enumerate(columns)}, {y: i for i, y in enumerate(rows)}
        first = min((x for x in columns if x >= start[0]), default=columns[-1])
        last = max((x for x in columns if x <= end[0]), default=columns[0])
        begin, goal = (column[first], row[start[1]]), (column[last], row[end[1]])
        costs, before, waiting = {(begin, 0): 0.0}, {}, [(0.0, begin, 0)]
        while waiting:
            cost, place, axis = heapq.heappop(waiting)
            if place == goal:
                return self._corners(before, (place, axis), columns, rows)
            for step_axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
                near = (place[0] + step, place[1]) if step_axis == 0 else (place[0], place[1] + step)
                if not (0 <= near[0] < len(columns) and 0 <= near[1] < len(rows)):
                    continue
                one, other = (columns[place[0]], rows[place[1]]), (columns[near[0]], rows[near[1]])
                if not self._is_free(one, other):
                    continue
                shared = self.taken.get((min(one, other), max(one, other)), 0)
                paid = cost + math.dist(one, other) * (1 + SHARED_COST * shared) + TURN_COST * (step_axis != axis)
                if paid < costs.get((near, step_axis), math.inf):
                    costs[near, step_axis] = paid
                    before[near, step_axis] = (place, axis)
                    heapq.heappush(waiting, (paid, near, step_axis))
        return []

    def _is_free(self, one: Point, other: Point) -> bool:
        if (one, other) not in self.free:
            self.free[one, other] = not any(_crosses(one, other, box) for box in self.boxes.values())
        return self.free[one, other]

    def _corners(self, before: dict, state: tuple, columns: list, rows: list) -> list[Point]:
        states = [state]
        while states[-1] in before:
            states.append(before[states[-1]])
        states.reverse()
        points = [(columns[place[0]], rows[place[1]]) for place, _ in states]
        for one, other in pairwise(points):
            pair = min(one, other), max(one, other)
            self.taken[pair] = self.taken.get(pair, 0) + 1
        straight = [
            index
            for index in range(1, len(points) - 1)
            if any(points[index - 1][axis] == points[index][axis] == points[index + 1][axis] for axis in (0, 1))
        ]
        return [point for index, point in enumerate(points) if index not in straight]


def _grow(box: Box, px: float) -> Box:
    return box[0] - px, box[1] - px, box[2] + px, box[3] + px


def _narrow(box: Box) -> Box:
    return box[0] + RIM_PX, box[1], box[2] - RIM_PX, box[3]


def _with_more(corners: list[Point]) -> list[Point]:
    """Corners, and points by which long wires between them stay straight."""
    points = corners[:1]
    for one, other in pairwise(corners):
        length = math.dist(one, other)
        shares = (NEAR_PX / length, 0.5, 1 - NEAR_PX / length) if length > 4 * NEAR_PX else (0.5,)
        points += [tuple(a + (b - a) * share for a, b in zip(one, other, strict=True)) for share in shares]
        points.append(other)
    return points


def _without_idle(start: Point, points: list[Point], end: Point, boxes: list[Box]) -> list[Point]:
    """As few of the points as keep the wire in sight."""
    allowed = max(HARMLESS_PX, hidden_px([start, *points, end], boxes))
    tried = 0
    while tried < len(points):
        fewer = points[:tried] + points[tried + 1 :]
        if hidden_px([start, *fewer, end], boxes) <= allowed:
            points, tried = fewer, 0
        else:
            tried += 1
    return points


def _crosses(one: Point, other: Point, box: Box) -> bool:
    return (
        min(one[0], other[0]) < box[2]
        and max(one[0], other[0]) > box[0]
        and min(one[1], other[1]) < box[3]
        and max(one[1], other[1]) > box[1]
    )
