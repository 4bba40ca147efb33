"""The published task schedules: label ids in order of arrival.

`class_orders.json` holds the 22 further class orders of VOC 15-1, named `15-1_b` … `15-1_w`.
"""

import json
from itertools import pairwise
from pathlib import Path


def _in_order(classes: int, first: int, each: int) -> list[list[int]]:
    """`first` classes, then `each` at a time, ids in natural order."""
    starts = [1, *range(1 + first, classes + 1, each), classes + 1]
    return [list(range(a, b)) for a, b in pairwise(starts)]


VOC_TASKS: dict[str, list[list[int]]] = {
    "joint": _in_order(20, 20, 20),
    "19-1": _in_order(20, 19, 1),
    "15-5": _in_order(20, 15, 5),
    "15-1": _in_order(20, 15, 1),
    "10-1": _in_order(20, 10, 1),
    "10-5": _in_order(20, 10, 5),
    "10-10": _in_order(20, 10, 10),
    "5-3": _in_order(20, 5, 3),
    **json.loads((Path(__file__).parent / "class_orders.json").read_text(encoding="utf-8")),
}

ADE_TASKS: dict[str, list[list[int]]] = {
    "joint": _in_order(150, 150, 150),
    "100-50": _in_order(150, 100, 50),
    "100-10": _in_order(150, 100, 10),
    "100-5": _in_order(150, 100, 5),
    "50-50": _in_order(150, 50, 50),
}
