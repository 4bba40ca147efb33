"""What cannot be in a test, though every key of it is of its form (`forms.py`)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from scripts.reporting import forms
from scripts.reporting.results import MEMORY, TASK, Result, labels_of
from utils.labels import BACKGROUND
from utils.metric import EVALUATORS, METRICS, Evaluator, class_accuracy, class_iou, merge_future
from utils.run_folder import is_step

# Keys of a step's own test that say which row of a table it is, as its config has them.
KINDS = {"method": "method", "joint": f"{TASK}.joint", "memory": MEMORY}


def contradictions(result: Result) -> Iterator[str]:
    """What cannot be in a test, though every key of it is of its form.

    Each check relies on those before it: only the first contradiction can be trusted.
    """
    content, step = result.content, result.step
    rows, unseen = content["classes"], content.get("future_classes", [])
    if is_step(result.file.parent) and result.file.parent.name != f"step_{step}":
        yield f"its step is {step}, but it lies in {result.file.parent.name}"
    size = len(content["confusion"])
    if not rows or size - len(rows) not in (0, 1):
        yield f"confusion has {size} rows for {len(rows)} classes"
    for name in (name for name in ("confusion", "wide") if name in content):
        if any(len(row) != size for row in content[name]):
            yield f"a row of {name} has not {size} columns"
        if sum(map(sum, content[name])) > forms.MOST_PIXELS:
            yield f"{name} counts more than {forms.MOST_PIXELS} pixels"
    labels = [row["label_id"] for row in (*rows, *unseen)]
    if len({*labels}) < len(labels):
        yield "a label id of its classes is there twice"
    if result.background and labels[0] != BACKGROUND:
        yield f"background comes first, but the label id there is {labels[0]}"
    if result.background != content.get("protocol", {}).get("background", result.background):
        yield f"{size} rows for {len(rows)} classes is not what its protocol says of background"
    schedule = result.schedule
    if not all(schedule) or len({*labels_of(schedule)}) < len(labels_of(schedule)):
        yield "a step without classes, or a label id twice in its steps"
    if step >= len(schedule):
        yield f"its step is {step}, but there are {len(schedule)}"
    if [*result.channels][result.background :] != labels_of(schedule[: step + 1]):
        yield f"its classes are not those of the steps up to {step}"
    counted = result.confusion.sum(axis=1)[0 if result.background else 1 :]
    if "wide" in content:
        wide = result.wide
        assert wide is not None
        if len(wide) < size or ("future_classes" in content and len(wide) != size + len(unseen)):
            yield f"wide has {len(wide)} rows for {len(rows)} classes and {len(unseen)} unseen"
        if not np.array_equal(merge_future(wide, result.future), result.confusion):
            yield "confusion is not what wide gives"
        rows = [*rows, *unseen]
        counted = np.concatenate([counted, wide[size:].sum(axis=1)])
    for row, pixels in zip(rows, counted.tolist(), strict=False):
        if row.get("pixels", pixels) != pixels:
            yield f"label id {row['label_id']} has {row['pixels']} pixels, but {pixels} are counted"
    yield from _other_figures(result)
    for key, dotted in KINDS.items():
        config = result.config.get(dotted)
        if is_step(result.file.parent) and config not in (None, content.get(key, config)):
            yield f"{key} is {content[key]}, but {config} in the config of the step"


def _other_figures(result: Result) -> Iterator[str]:
    """Figures in a test that do not follow from its confusion matrix."""
    first = 0 if result.background else 1
    by_class = {"IoU": class_iou(result.confusion), "accuracy": class_accuracy(result.confusion)}
    for key, values in by_class.items():
        for row, value in zip(result.content["classes"], values[first:].tolist(), strict=True):
            if not _is_close(row.get(key, value), value):
                yield f"{key} of label id {row['label_id']} is {row[key]}, but {value} is counted"
    old = range(first, 1 + len(result.schedule[0]))
    new = range(old.stop, len(result.confusion))
    make = EVALUATORS.get(result.config.get("evaluator.type", ""), Evaluator)
    stored = result.content.get("metrics", {})
    computed = make([name for name in METRICS if name in stored], old, new)
    for name, groups in computed.evaluate(result.confusion).items():
        for group, value in stored[name].items():
            if group not in groups or not _is_close(value, groups[group]):
                yield f"{name} of {group} is {value}, but {groups.get(group)} is counted"


def _is_close(stored: float, computed: float) -> bool:
    """But for the rounding of sums in another order."""
    return math.isclose(stored, computed, rel_tol=0, abs_tol=1e-6)
