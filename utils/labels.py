"""Label ids: the numbers that every data set shares, and a set of them as text."""

from __future__ import annotations

from collections.abc import Iterable

from utils.errors import listing

BACKGROUND = 0  # label of every pixel without a (visible) class
VOID = 255  # label of pixels that no metric counts; in more bits, the largest number as well
WIDE_VOID = 65535  # its label id where an id of the data set needs 16 bits


def void_id(label_ids: Iterable[int]) -> int:
    """The label id of void in a data set with these: the largest number of 8 bits, or of 16."""
    return VOID if max(label_ids) < VOID else WIDE_VOID


def ranges(labels: Iterable[int], to: str = "-") -> str:
    """Label ids as `1-15, 17`, or `none`."""
    runs: list[list[int]] = []
    for label in sorted(labels):
        if runs and label == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], label]
        else:
            runs.append([label])
    return listing((to.join(map(str, run)) for run in runs), most=20) or "none"
