"""The leakage audit: which original label ids reach the loss of a step, and which stay hidden.

Follow-up work to the published codes found that label policies leak future or past classes without
anybody noticing. So every training run says in one line what its own masks and policy let through,
and stops when that is more than its setting allows. Called by the loader bundle.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from base.task import Task
from utils.misc import BACKGROUND, VOID


def allowed(task: Task) -> tuple[int, ...]:
    """Label ids that images of a step may show: the step's own; in `sequential` all seen ones."""
    return task.seen if task.setting == "sequential" else task.new


def visible(presence: np.ndarray, table: np.ndarray) -> set[int]:
    """Label ids that occur in some mask and that the lookup table lets through as a class.

    Args:
        presence: [images, 256] bool, which ids occur in each mask.
        table: [256] uint8, label id → training label.
    """
    occurs = presence.any(axis=0)
    return {
        label
        for label in np.flatnonzero(occurs).tolist()
        if label not in (BACKGROUND, VOID) and table[label] not in (BACKGROUND, VOID)
    }


def hidden(presence: np.ndarray, table: np.ndarray, labels: Iterable[int]) -> tuple[set[int], int]:
    """Of `labels`, those that occur and are hidden, and the number of images that hold one."""
    shut = [label for label in labels if table[label] in (BACKGROUND, VOID)]
    occurs = presence[:, shut]
    return {shut[i] for i in np.flatnonzero(occurs.any(axis=0))}, int(occurs.any(axis=1).sum())


def ranges(labels: Iterable[int]) -> str:
    """Label ids as `1-15, 17`, or `none`."""
    words: list[list[int]] = []
    for label in sorted(labels):
        if words and label == words[-1][-1] + 1:
            words[-1] = [words[-1][0], label]
        else:
            words.append([label])
    return ", ".join("-".join(map(str, word)) for word in words) or "none"


def audit(
    task: Task,
    parts: Sequence[tuple[str, np.ndarray, np.ndarray, Iterable[int]]],
) -> str:
    """One line about what the training set of a step shows.

    Args:
        task: the step.
        parts: (words, presence, table, label ids that may reach the loss) of each part of the set.

    Raises:
        AssertionError: a label id reaches the loss that its part must not show.
    """
    told = []
    for words, presence, table, may in parts:
        shown = visible(presence, table)
        leaked = shown - set(may)
        assert not leaked, f"{words}: label ids {ranges(leaked)} leak into the loss"
        text = f"{len(presence)} {words} show {ranges(shown)}"
        future = {label for ids in task.steps[task.step + 1 :] for label in ids}
        for kind, labels in (("old", task.old), ("new", task.new), ("future", sorted(future))):
            ids, images = hidden(presence, table, labels)
            if ids:
                text += f"; hide {kind} {ranges(ids)} in {images}"
        told.append(text)
    return f"leakage audit, label ids that reach the loss: {' | '.join(told)}"
