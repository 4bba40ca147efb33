"""What an evaluation leaves behind: `metrics.json` and a per-class table for the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.metric import Mean_Intersection_over_Union, Pixel_Accuracy_Class

GROUPS = ("old", "new", "harmonic", "overall")


def metrics_json(
    about: Mapping[str, Any],
    confusion: np.ndarray,
    names: Sequence[str],
    label_ids: np.ndarray,
    results: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of `metrics.json`.

    Args:
        about: what was evaluated (data set, task, step, split, weights, …).
        confusion: [K, K] pixel counts, rows = labels, columns = preds.
        names: class name per channel.
        label_ids: the data set's id per channel; a channel of void is no class and is left out.
        results: of `Evaluator.evaluate`.

    Returns:
        JSON-ready; values in percent, classes in order of their channel.
    """
    void = np.iinfo(label_ids.dtype).max
    iou = Mean_Intersection_over_Union(confusion, {})["by_class"]
    accuracy = Pixel_Accuracy_Class(confusion, {})["by_class"]
    return {
        **about,
        "metrics": {
            metric: {group: result[group] for group in GROUPS if group in result}
            for metric, result in results.items()
        },
        "classes": [
            {
                "label_id": int(label_ids[channel]),
                "name": names[channel],
                "IoU": iou[channel],
                "accuracy": accuracy[channel],
                "pixels": int(confusion[channel].sum()),
            }
            for channel in range(len(names))
            if label_ids[channel] != void
        ],
        "confusion": confusion.tolist(),
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
