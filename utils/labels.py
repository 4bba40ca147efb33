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
    words: list[list[int]] = []
    for label in sorted(labels):
        if words and label == words[-1][-1] + 1:
            words[-1] = [words[-1][0], label]
        else:
            words.append([label])
    return listing((to.join(map(str, word)) for word in words), most=20) or "none"
