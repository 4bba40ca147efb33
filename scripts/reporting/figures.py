"""From confusion matrices to figures: groups of classes, conventions, changes over the steps.

All in percent. IoU_{c,t} is that of class c after step t, s(c) the step in which c arrives, T the
last step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from base.base_dataset import BaseDataset
from data_loader import data_set
from scripts.reporting.results import Result, Run, Schedule, labels_of
from utils.labels import BACKGROUND, VOID
from utils.metric import class_iou, harmonic, merge_future

Values = dict[str, float | None]


class Figure(NamedTuple):
    """A figure of the summary: its heading, what it is, whether more is better."""

    name: str
    doc: str
    higher: bool = True


FIGURES = {
    "old": Figure("old", "mIoU of background and the classes of step 0, after the last step"),
    "new": Figure("new", "mIoU of all later classes, after the last step"),
    "hIoU": Figure("hIoU", "harmonic mean of old and new"),
    "all": Figure("all", "mIoU of all classes, after the last step"),
    "average": Figure("avg", "mean over the steps of the mIoU of all classes seen by then"),
    "learning": Figure("learning", "IoU of a later class right after its step, mean over them"),
    "forgetting": Figure(
        "forgetting",
        "from the best IoU of a class before the last step to its last, mean over classes",
        False,
    ),
    "BWT": Figure("BWT", "backward transfer: last IoU less that right after its step, mean"),
    "intransigence": Figure(
        "intrans.", "intransigence: IoU under joint training less that right after its step", False
    ),
}


# ------------------------------------------------------------------------------------- conventions
@dataclass(frozen=True)
class Convention:
    """How pixels and classes are counted; the defaults are those of the published code of DKD.

    Attributes:
        future: what pixels of future classes count as: 0, background, or 255, nothing.
        background: whether background is in the mean.
        label_0: whether pixels of label 0 in the truth count.
        absent: whether a class without a pixel in truth and prediction counts, with 0.
        old_background: whether background is in the group `old`.
    """

    future: int = BACKGROUND
    background: bool = True
    label_0: bool = True
    absent: bool = True
    old_background: bool = True


def published_convention(dataset: str) -> Convention:
    """What DKD's published figures count."""
    return Convention(future=(data_set(dataset) or BaseDataset).future)


def others_conventions(dataset: str) -> dict[str, Convention]:
    """How other papers count, as far as that is known."""
    return {
        "as PLOP counts": Convention(absent=False),
        "as MiB counts": Convention(
            future=VOID,
            background=False,
            label_0=not (data_set(dataset) or BaseDataset).unlabelled,
            absent=False,
            old_background=False,
        ),
        "as SSUL counts": Convention(future=VOID),
    }


def changes(convention: Convention, dataset: str, background: bool = True) -> dict[str, Convention]:
    """A convention changed in one respect, by what that is called.

    Whether label 0 of the truth counts is a question of data sets where it is "unlabelled".
    """
    texts: dict[str, dict[Any, str]] = {
        "future": {
            BACKGROUND: "future classes count as background",
            VOID: "future classes not counted",
        },
        "background": {True: "background in the mean", False: "background not in the mean"},
        "label_0": {True: "label 0 of the truth counts", False: "label 0 of the truth not counted"},
        "absent": {True: "absent classes count 0", False: "absent classes left out"},
        "old_background": {True: "old with background", False: "old without background"},
    }
    if not (data_set(dataset) or BaseDataset).unlabelled:
        del texts["label_0"]
    if not background:
        del texts["background"], texts["old_background"]
    return {
        text: replace(convention, **{name: value})
        for name, by_value in texts.items()
        for value, text in by_value.items()
        if value != getattr(convention, name)
    }


def grouped(
    result: Result,
    schedule: Schedule,
    convention: Convention | None = None,
    wide: np.ndarray | None = None,
) -> Values:
    """Mean IoU of old, new and all classes of a schedule, and hIoU.

    By default they are counted as the evaluation did, to its last digit. `wide` holds the counts of
    another pass over the same classes. `old`, `new` and `hIoU` are None where there is one group,
    and all of them where the file lacks what the convention needs.
    """
    confusion = result.confusion
    counted = convention or Convention(result.future)
    if wide is not None or counted.future != result.future or not counted.label_0:
        wide = result.wide if wide is None else wide
        if wide is None:
            return dict.fromkeys(("old", "new", "hIoU", "all"))
        if not counted.label_0:
            wide = np.concatenate([np.zeros_like(wide[:1]), wide[1:]])
        confusion = merge_future(wide, counted.future)
    return mean_iou(confusion, result.channels, schedule, counted, result.background)


def mean_iou(
    confusion: np.ndarray,
    channels: Mapping[int, int],
    schedule: Schedule,
    counted: Convention,
    background: bool = True,
) -> Values:
    """As `grouped`, of a matrix [K, K] that counts pixels as the convention says.

    `channels` leads from label id to row and column; `background`: whether channel 0 is that.
    """
    by_class = class_iou(confusion)
    occurs = (confusion.sum(axis=0) + confusion.sum(axis=1)) > 0
    zero = [0] if background and counted.background and counted.label_0 else []

    def mean(chosen: Sequence[int]) -> float | None:
        kept = [k for k in chosen if counted.absent or occurs[k]]
        return float(by_class[kept].mean()) if kept else None

    first = [channels[label] for label in schedule[0] if label in channels]
    later = [channels[label] for label in labels_of(schedule[1:]) if label in channels]
    everything = mean([*zero, *first, *later])
    if not first or not later:
        return {"old": None, "new": None, "hIoU": None, "all": everything}
    old, new = mean([*(zero if counted.old_background else []), *first]), mean(later)
    both = None if old is None or new is None else harmonic(old, new)
    return {"old": old, "new": new, "hIoU": both, "all": everything}


# -------------------------------------------------------------------------------------- over steps
def iou_over_steps(run: Run, labels: Sequence[int], steps: int) -> np.ndarray:
    """[labels, steps] IoU after each step; NaN before a class arrives or without a test."""
    values = np.full((len(labels), steps), np.nan)
    for step, result in run.results.items():
        seen = [row for row, label in enumerate(labels) if label in result.channels]
        channels = [result.channels[labels[row]] for row in seen]
        values[seen, step] = class_iou(result.confusion)[channels]
    return values


def over_steps(iou: np.ndarray, arrival: np.ndarray) -> Values:
    """Learning, forgetting and backward transfer (Lopez-Paz and Ranzato, 2017, of IoU).

    `iou` is [classes, steps] without background, `arrival` [classes].
    """
    last = iou.shape[1] - 1
    rows = np.arange(len(iou))
    arrived = np.where(arrival <= last, iou[rows, np.minimum(arrival, last)], np.nan)
    earlier = arrival < last
    best = np.fmax.reduce(iou[:, :last], axis=1)  # of what is no NaN
    return {
        "learning": _mean(arrived[arrival >= 1]),
        "forgetting": _mean((best - iou[:, last])[earlier]),
        "BWT": _mean((iou[:, last] - arrived)[earlier]),
    }


def intransigence(iou: np.ndarray, arrival: np.ndarray, joint: np.ndarray) -> float | None:
    """Mean over classes of IoU under joint training, [classes], less that right after its step."""
    last = iou.shape[1] - 1
    arrived = iou[np.arange(len(iou)), np.minimum(arrival, last)]
    return _mean((joint - arrived)[arrival <= last])


def _mean(values: np.ndarray) -> float | None:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else None


def flows(result: Result, schedule: Schedule) -> dict[str, float] | None:
    """Where pixels go whose truth is a class of an earlier step.

    Percent predicted as `itself`, `background`, another `old` class and a `new` class of this
    step; None at step 0 or without such pixels.
    """
    old = [result.channels[k] for k in labels_of(schedule[: result.step]) if k in result.channels]
    new = [result.channels[k] for k in schedule[result.step] if k in result.channels]
    rows = result.confusion[old]
    total = rows.sum()
    if not old or not total:
        return None
    itself = rows[np.arange(len(old)), old].sum()
    parts = {
        "itself": itself,
        "background": rows[:, 0].sum(),
        "old": rows[:, old].sum() - itself,
        "new": rows[:, new].sum(),
    }
    return {name: 100 * float(pixels) / float(total) for name, pixels in parts.items()}


def run_figures(run: Run, schedule: Schedule, upper: np.ndarray | None) -> Values:
    """The figures of a run at the last step of a schedule, by key of `FIGURES`; None where unknown.

    Those over the steps need the tests of all of them. `upper` is [classes of the schedule] IoU
    under joint training, if there is any.
    """
    values: Values = dict.fromkeys(FIGURES)
    last = len(schedule) - 1
    if last not in run.results:
        return values
    values |= grouped(run.results[last], schedule)
    if run.last.joint or last == 0 or any(step not in run.results for step in range(last)):
        return values
    labels = labels_of(schedule)
    arrival = np.array([step for step, ids in enumerate(schedule) for _ in ids])
    iou = iou_over_steps(run, labels, last + 1)
    seen = [grouped(run.results[step], schedule)["all"] for step in range(last + 1)]
    values |= over_steps(iou, arrival)
    values["average"] = _mean(np.array(seen, float))
    if upper is not None:
        values["intransigence"] = intransigence(iou, arrival, upper)
    return values
