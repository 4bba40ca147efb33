"""What an evaluation leaves behind: `metrics.json` and a per-class table for the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.metric import class_accuracy, class_iou, merge_future

GROUPS = ("old", "new", "harmonic", "overall")


def metrics_json(
    about: Mapping[str, Any],
    wide: np.ndarray,
    future: int,
    label_ids: Sequence[int] | np.ndarray,
    names: Sequence[str],
    results: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of `metrics.json`.

    Args:
        about: what was evaluated (data set, task, step, split, weights, protocol, …).
        wide: [1 + all classes, K] pixel counts, rows = labels, columns = preds; the first K rows
            are the channels, the others the classes not yet seen.
        future: as what the pixels of those count (`merge_future`).
        label_ids, names: of the rows; the first is background, or void, which is no class.
        results: of `Evaluator.evaluate`.

    Returns:
        JSON-ready; values in percent, classes in order of their channel, then those not yet seen.
        `confusion` is [K, K], `wide` as given.
    """
    confusion = merge_future(wide, future)
    seen = len(confusion)
    counted = [*confusion.sum(axis=1), *wide[seen:].sum(axis=1)]
    rows: list[dict[str, Any]] = [
        {"label_id": int(label), "name": name, "pixels": int(pixels)}
        for label, name, pixels in zip(label_ids, names, counted, strict=True)
    ]
    iou, accuracy = class_iou(confusion).tolist(), class_accuracy(confusion).tolist()
    for row, share, correct in zip(rows[:seen], iou, accuracy, strict=True):
        row |= {"IoU": share, "accuracy": correct}
    first = 0 if about["protocol"]["background"] else 1
    return {
        **about,
        "metrics": {
            metric: {group: result[group] for group in GROUPS if group in result}
            for metric, result in results.items()
        },
        "classes": rows[first:seen],
        "future_classes": rows[seen:],
        "confusion": confusion.tolist(),
        "wide": wide.tolist(),
    }


def table(report: Mapping[str, Any]) -> str:
    """The classes of a `metrics_json` report, a row each."""
    width = max(len("class"), *(len(row["name"]) for row in report["classes"]))
    digits = max(3, *(len(str(row["label_id"])) for row in report["classes"]))
    lines = [f"{'id':>{digits}}  {'class':<{width}}  {'IoU':>6}  {'acc.':>6}  {'pixels':>11}"]
    for row in report["classes"]:
        # A class without pixels counts in the means as it does in the metrics: with 0.
        lines.append(
            f"{row['label_id']:>{digits}}  {row['name']:<{width}}  {row['IoU']:6.2f}  "
            f"{row['accuracy']:6.2f}  {row['pixels']:>11,}"
        )
    return "\n".join(lines)


def summary(report: Mapping[str, Any]) -> str:
    """The metrics of a `metrics_json` report, a column per group."""
    groups = [group for group in GROUPS if any(group in m for m in report["metrics"].values())]
    label = max(len(metric) for metric in report["metrics"])
    lines = [f"{'percent':<{label}}  " + "  ".join(f"{group:>8}" for group in groups)]
    for metric, result in report["metrics"].items():
        row = "  ".join(f"{result[group]:8.2f}" for group in groups)
        lines.append(f"{metric:<{label}}  {row}")
    return "\n".join(lines)
