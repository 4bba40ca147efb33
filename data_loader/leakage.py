"""The leakage audit: which original label ids reach the loss of a step, and which stay hidden.

Follow-up work to the published codes showed that label policies leak future or past classes without
anybody noticing. So every training run says in one line what its own masks and policy let through,
and stops when that is more than its setting allows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from base.task import Task
from utils.labels import BACKGROUND, ranges


def allowed(task: Task) -> tuple[int, ...]:
    """Label ids that images of a step may show: the step's own; in `sequential` all seen ones."""
    return task.seen if task.setting == "sequential" else task.new


def shown(table: np.ndarray, labels: Iterable[int]) -> list[int]:
    """Of `labels`, those that a lookup table (`Task.label_table`) lets through as a class."""
    no_class = (BACKGROUND, np.iinfo(table.dtype).max)
    return [label for label in labels if table[label] not in no_class]


def occurring(task: Task, presence: np.ndarray, labels: Sequence[int]) -> tuple[set[int], int]:
    """Of `labels`, those that some mask holds, and the number of images that hold one.

    Args:
        presence: [images, label ids] bool, which ids occur in each mask.
    """
    occurs = presence[:, task.columns(labels)]
    present = np.flatnonzero(occurs.any(axis=0)).tolist()
    return {labels[i] for i in present}, int(occurs.any(axis=1).sum())


class Part(NamedTuple):
    """A part of a step's training set: its own images, or exemplars from one step.

    Attributes:
        text: what it is.
        presence: [images, label ids] bool, which ids occur in each mask.
        table: from label id to training label.
        may: label ids that may reach the loss.
        taught: label ids that were labelled when the images were stored, or are in this step.
    """

    text: str
    presence: np.ndarray
    table: np.ndarray
    may: Collection[int]
    taught: Collection[int]


def audit(task: Task, parts: Sequence[Part]) -> str:
    """One line about what the training set of a step shows.

    Raises:
        AssertionError: a label id reaches the loss that its part must not show.
    """
    lines = []
    for text, presence, table, may, taught in parts:
        visible, _ = occurring(task, presence, shown(table, task.classes))
        leaked = visible - set(may)
        assert not leaked, f"{text}: label ids {ranges(leaked)} leak into the loss"
        line = f"{len(presence)} {text} show {ranges(visible)}"
        if beyond := sorted(visible - set(taught)):
            _, images = occurring(task, presence, beyond)
            line += f", of which {ranges(beyond)} WERE NOT LABELLED when stored, in {images} images"
        future = [label for ids in task.steps[task.step + 1 :] for label in ids]
        for kind, labels in (("old", task.old), ("new", task.new), ("future", future)):
            hidden = sorted({*labels} - {*shown(table, labels)})
            ids, images = occurring(task, presence, hidden)
            if ids:
                line += f"; hide {kind} {ranges(ids)} in {images}"
        lines.append(line)
    return f"leakage audit, label ids that reach the loss: {' | '.join(lines)}"
