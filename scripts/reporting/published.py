"""Published figures (`published.json`), and whether a result agrees with them.

hIoU and mIoU of all classes after the last step, from the papers (mean of five runs) and from the
weight files that their authors released. Those of other methods are as the table of DKD's paper
has them; cells in which that table is visibly shifted are left out.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ASSUMED = 0.5  # deviation where none is published
RELEASED = 0.05  # how near a figure of a released weight file must be met


class Published(NamedTuple):
    """A published result: hIoU and mIoU of all classes in percent, and the deviation of the latter.

    `runs` is 0 for a released weight file; `background`: whether it is in the mean.
    """

    source: str
    harmonic: float | None
    overall: float
    std: float | None = None
    runs: int = 1
    background: bool = True


def published(dataset: str, setting: str, task: str, label: str) -> list[Published]:
    """What is published for a task; `label` is of a method, such as DKD-M, or "joint"."""
    tables = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    rows = tables.get(f"{dataset} {setting} {task}", [])
    return [Published(**row) for row in rows if row.pop("method") == label]


def verdict(reference: Published, ours: Sequence[float]) -> str:
    """Whether mIoU of all classes, `ours` of each seed, agrees with a published one.

    Means m of n published runs with deviation s and m', s', n' here agree when
    |m − m'| ≤ 2·sqrt(s²/n + s'²/n'); deviations that are not known are taken as `ASSUMED`. A
    released weight file agrees within `RELEASED`, when it is that file which was tested.
    """
    mean = statistics.fmean(ours)
    apart = abs(mean - reference.overall)
    if reference.runs == 0:
        same = apart <= RELEASED
        return "as the released file" if same else f"{apart:.2f} from the released file"
    std = ASSUMED if reference.std is None else reference.std
    own = statistics.stdev(ours) if len(ours) > 1 else ASSUMED
    band = 2 * math.sqrt(std**2 / reference.runs + own**2 / len(ours))
    side = "above" if mean > reference.overall else "below"
    text = f"{'agrees' if apart <= band else side}: {apart:.2f} apart, band {band:.2f}"
    unknown = {"theirs": reference.std is None, "ours": len(ours) == 1}
    assumed = " and ".join(whose for whose in unknown if unknown[whose])
    return f"{text}, {assumed} with an assumed deviation of {ASSUMED}" if assumed else text
