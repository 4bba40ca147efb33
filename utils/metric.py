"""Metrics as functions of one confusion matrix, and the evaluator that groups the classes.

A metric takes the matrix and groups of channels and answers with percent. To add one, write such a
function and name it in `METRICS`; the evaluation loop stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from utils.labels import VOID

ClassGroups = Mapping[str, Sequence[int]]


class ConfusionMatrix:
    """Pixel counts, rows = labels, columns = preds, kept on the device of the predictions."""

    def __init__(self, rows: int, columns: int, device: torch.device):
        self.shape = rows, columns
        # One more cell, where void pixels go: no boolean indexing.
        self.cells = torch.zeros(rows * columns + 1, dtype=torch.int64, device=device)
        self.one = torch.ones((), dtype=torch.int64, device=device)

    def update(self, labels: torch.Tensor, preds: torch.Tensor) -> None:
        """Count a batch.

        Args:
            labels: [N, H, W] integer channels; the largest number of their type (uint8: 255) is
                void and not counted.
            preds: [N, H, W] integer channels.
        """
        rows, columns = self.shape
        cell = labels.long() * columns + preds
        void = torch.iinfo(labels.dtype).max
        cell = torch.where(labels == void, rows * columns, cell).flatten()
        # Not bincount, which makes the host wait for a GPU to learn the largest value.
        self.cells.index_add_(0, cell, self.one.expand_as(cell))

    def matrix(self) -> np.ndarray:
        """[rows, columns] int64 on the host."""
        return self.cells[:-1].view(self.shape).cpu().numpy()


def merge_future(wide: np.ndarray, future: int) -> np.ndarray:
    """The confusion matrix of the classes seen, from the wide one.

    Args:
        wide: [1 + all classes, K], rows beyond the K channels being classes not yet seen.
        future: what their pixels count as: 0, background, or 255, nothing.

    Returns:
        [K, K].
    """
    seen = wide.shape[1]
    confusion = wide[:seen].copy()
    if future != VOID:
        confusion[future] += wide[seen:].sum(axis=0)
    return confusion


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """100 · part / whole, and 0 where whole is 0."""
    return 100 * np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole != 0)


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """[classes] IoU in percent, TP / (row + column − TP); 0 for an absent class."""
    correct = confusion.diagonal()
    return _ratio(correct, confusion.sum(axis=1) + confusion.sum(axis=0) - correct)


def class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """[classes] accuracy in percent, TP / row; 0 for an absent class."""
    return _ratio(confusion.diagonal(), confusion.sum(axis=1))


def harmonic(old: float, new: float) -> float:
    """Harmonic mean; 0 where both are."""
    return 2 * old * new / (old + new) if old + new else 0.0


def Pixel_Accuracy(confusion: np.ndarray, groups: ClassGroups) -> dict[str, Any]:
    """Correct pixels of a group over all its pixels."""
    correct, pixels = confusion.diagonal(), confusion.sum(axis=1)
    return {
        group: float(_ratio(correct[list(ids)].sum(), pixels[list(ids)].sum()))
        for group, ids in groups.items()
    }


def Pixel_Accuracy_Class(confusion: np.ndarray, groups: ClassGroups) -> dict[str, Any]:
    """Accuracy per class and its mean over a group."""
    return _class_means(class_accuracy(confusion), groups)


def Mean_Intersection_over_Union(confusion: np.ndarray, groups: ClassGroups) -> dict[str, Any]:
    """IoU per class and its mean over a group."""
    return _class_means(class_iou(confusion), groups)


def _class_means(by_class: np.ndarray, groups: ClassGroups) -> dict[str, Any]:
    means = {group: float(by_class[list(ids)].mean()) for group, ids in groups.items()}
    return {"by_class": by_class.tolist(), **means}


METRICS: dict[str, Callable[[np.ndarray, ClassGroups], dict[str, Any]]] = {
    metric.__name__: metric
    for metric in (Pixel_Accuracy, Pixel_Accuracy_Class, Mean_Intersection_over_Union)
}


class Evaluator:
    """Metrics over the groups old, new, overall, and the harmonic mean of old and new."""

    def __init__(self, metrics: Sequence[str], old: Sequence[int], new: Sequence[int]):
        """
        Args:
            metrics: names out of `METRICS`.
            old: channels of the group `old`.
            new: channels of the group `new`; if either is empty, there is only `overall`.
        """
        self.metrics = tuple(metrics)
        self.groups: dict[str, list[int]] = {"overall": [*old, *new]}
        if len(old) and len(new):
            self.groups |= {"old": [*old], "new": [*new]}

    def names(self) -> list[str]:
        """Names of the scalars of `scalars`, such as Mean_Intersection_over_Union_overall."""
        groups = [*self.groups, *(["harmonic"] if "new" in self.groups else [])]
        return [f"{metric}_{group}" for metric in self.metrics for group in groups]

    def evaluate(self, confusion: np.ndarray) -> dict[str, dict[str, Any]]:
        """`{metric: {group: percent, "by_class": [classes]}}` of a confusion matrix."""
        results = {}
        for name in self.metrics:
            result = METRICS[name](confusion, self.groups)
            if "new" in self.groups:
                result["harmonic"] = harmonic(result["old"], result["new"])
            results[name] = result
        return results


def scalars(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The group values of `Evaluator.evaluate` as `{metric_group: percent}`."""
    return {
        f"{metric}_{group}": value
        for metric, result in results.items()
        for group, value in result.items()
        if group != "by_class"
    }


EVALUATORS: dict[str, type[Evaluator]] = {"Evaluator": Evaluator}
