"""Tests of two steps, from matrices written by hand, as evaluations leave them."""

from __future__ import annotations

import json

import numpy as np

from utils.metric import Mean_Intersection_over_Union, merge_future
from utils.report import metrics_json

NAMES = ("background", "cat", "dog", "cow")
SCHEDULE = ((1, 2), (3,))
# rows: background, cat, dog, cow; columns: what is seen at the step
STEP_0 = np.array([[80, 10, 10], [5, 40, 5], [0, 10, 40], [6, 4, 0]])
STEP_1 = np.array([[70, 0, 0, 30], [10, 20, 10, 10], [0, 0, 50, 0], [0, 0, 2, 8]])


def a_test(root, wide, step, *, name="toy-s1", seed=1, method="dkd", future=0, **changes):
    """Write a `metrics.json` as an evaluation does."""
    confusion = merge_future(wide, future)
    seen = range(len(confusion))
    overall = float(np.mean(Mean_Intersection_over_Union(confusion, {})["by_class"]))
    about = {
        "dataset": "voc",
        "task": "2-1",
        "setting": "overlap",
        "step": step,
        "steps": [list(ids) for ids in SCHEDULE],
        "joint": False,
        "name": name,
        "method": method,
        "seed": seed,
        "images": 7,
        "weights": "checkpoint-epoch1.pth",
        "lists": {"test": {"images": 7, "sha256": "ab" * 32, "published": None}},
        "protocol": {"future_classes": future, "background": True, "images": "whole"},
        **changes,
    }
    results = {"Mean_Intersection_over_Union": {"overall": overall, "by_class": [*seen]}}
    content = metrics_json(about, wide, future, range(4), NAMES, results)
    file = root / "log" / f"overlap_2-1_{name}" / f"step_{step}" / "metrics.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))
    return file
