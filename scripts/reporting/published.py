"""Published figures, and whether a result agrees with them.

hIoU and mIoU of all classes after the last step, from the papers (mean of five runs) and from the
weight files that their authors released. Those of other methods are as the table of DKD's paper
has them; cells in which that table is visibly shifted are left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

ASSUMED = 0.5  # deviation where none is published
WITHOUT = "without background"
RELEASED = 0.05  # how near a figure of a released weight file must be met


class Published(NamedTuple):
    """A published result.

    Attributes:
        source: whose.
        harmonic, overall: hIoU and mIoU of all classes in percent.
        std: of `overall`, where it is published.
        runs: how many; 0: a released weight file.
        background: whether it is in the mean.
    """

    source: str
    harmonic: float | None
    overall: float
    std: float | None = None
    runs: int = 1
    background: bool = True


# hIoU/all±deviation, or all alone; runs: 0 is a released weight file
_TABLES = """
voc overlap   | | |  19-1            15-5        15-1            10-1        5-3
DKD    | DKD, five runs              | 5 | 54.03/76.03±.24 66.98/73.93 55.21/69.67±.49 56.84/60.44 60.49/58.10
DKD    | DKD, released weights       | 0 | 56.95/76.13     67.17/73.95 57.46/70.50     57.21/60.43 61.32/58.98
DKD-M  | DKD-M, five runs            | 5 | 66.27/77.01±.14 68.63/74.72 62.91/72.53±.42 64.19/65.77 64.63/62.94
DKD-M  | DKD-M, released weights     | 0 | 68.14/77.04     68.96/74.84 64.09/72.95     64.89/66.20 65.02/63.32
MiB    | MiB, without background     | 1 | 33.62/67.80     59.72/69.00 19.50/29.70     -           -
MiB    | MiB, in DKD's table         | 1 | -               -           -               -           48.77/46.71
MiB    | MiB, in PLOP's table        | 1 | -               -           -               12.66/12.65 -
SDR    | SDR, in DKD's table         | 1 | 44.30/67.40     61.97/69.90 29.31/39.20     -           -
PLOP   | PLOP, in DKD's table        | 1 | 49.94/73.54     61.46/70.09 31.88/54.64     -           18.28/18.68
PLOP   | PLOP's paper                | 1 | -               -           -               22.94/30.45 -
SSUL   | SSUL, in DKD's table        | 1 | 42.96/75.44     60.96/71.22 49.67/67.61     -           59.63/56.89
SSUL   | SSUL's paper                | 1 | -               -           -               55.91/59.25 -
SSUL-M | SSUL-M, in DKD's table      | 1 | 60.71/76.49     65.20/73.02 60.30/71.37     61.93/64.12 60.93/58.37
joint  | joint, in DKD's table       | 1 | 77.58           77.58       77.58           77.58       77.58

voc disjoint  | | |  19-1        15-5        15-1
DKD    | DKD, released weights       | 0 | 57.98/75.90 64.35/72.21 54.21/68.48
DKD-M  | DKD-M, released weights     | 0 | 67.12/76.84 65.04/72.53 60.32/70.78

ade overlap   | | |  100-50      100-10          50-50
DKD    | DKD, five runs              | 5 | 29.74/35.95±.38 26.55/34.26±.24 34.17/33.90±.43
DKD    | DKD, released weights       | 0 | 29.42/35.55     26.79/34.53     34.77/34.39
DKD-M  | DKD-M, five runs            | 5 | 29.79/35.98     27.14/34.58     34.19/33.92
DKD-M  | DKD-M, released weights     | 0 | 29.45/35.58     27.44/34.83     34.78/34.39
MiB    | MiB, in DKD's table         | 1 | 24.12/32.79     17.23/29.24     28.76/29.31
PLOP   | PLOP, in DKD's table        | 1 | 21.97/32.94     20.37/31.59     29.36/30.40
SSUL   | SSUL, in DKD's table        | 1 | 25.09/33.58     25.57/33.10     -
SSUL   | SSUL, without background    | 1 | -               -               28.45/29.56
SSUL-M | SSUL-M, without background  | 1 | 24.88/34.37     25.01/34.46     28.53/29.77
joint  | joint, in DKD's table       | 1 | 38.81           38.81           38.81
"""  # noqa: E501


def published(dataset: str, setting: str, task: str, label: str) -> list[Published]:
    """What is published for a task; `label` is of a method, such as DKD-M, or "joint"."""
    found = []
    tasks: list[str] = []
    here = False
    for line in filter(None, _TABLES.splitlines()):
        name, source, runs, cells = (part.strip() for part in line.split("|"))
        if not runs:  # a heading
            tasks, here = cells.split(), name == f"{dataset} {setting}"
            continue
        cell = dict(zip(tasks, cells.split(), strict=True)).get(task, "-")
        if here and name == label and cell != "-":
            harmonic, _, overall = cell.rpartition("/")
            mean, _, std = overall.partition("±")
            first, spread = (float(value) if value else None for value in (harmonic, std))
            counted = not source.endswith(WITHOUT)
            found.append(Published(source, first, float(mean), spread, int(runs), counted))
    return found


def verdict(theirs: Published, ours: Sequence[float]) -> str:
    """Whether mIoU of all classes agrees with a published one, in words, with the band.

    Means m of n published runs with deviation s and m', s', n' here agree when
    |m − m'| ≤ 2·sqrt(s²/n + s'²/n'); deviations that are not known are taken as `ASSUMED`. A
    released weight file agrees within `RELEASED`, when it is that file which was tested.

    Args:
        theirs: the published one.
        ours: of each seed.
    """
    mean = statistics.fmean(ours)
    apart = abs(mean - theirs.overall)
    if theirs.runs == 0:
        return (
            "as the released file" if apart <= RELEASED else f"{apart:.2f} from the released file"
        )
    std = theirs.std if theirs.std is not None else ASSUMED
    own = statistics.stdev(ours) if len(ours) > 1 else ASSUMED
    band = 2 * math.sqrt(std**2 / theirs.runs + own**2 / len(ours))
    said = "agrees" if apart <= band else ("above" if mean > theirs.overall else "below")
    guessed = [
        words for words, no in (("theirs", theirs.std is None), ("ours", len(ours) == 1)) if no
    ]
    note = f", {' and '.join(guessed)} with an assumed deviation of {ASSUMED}" if guessed else ""
    return f"{said}: {apart:.2f} apart, band {band:.2f}{note}"
