"""Tools of the benchmark that need no torch: times in turn, memory, agreement, the table.

Knows nothing of what is measured.
"""

from __future__ import annotations

import contextlib
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

MORE_IS_BETTER = ("images/s", "masks/s", "images")


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    budget: float,
    warm: int = 0,
    wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each call, taken A B C A B C …: other work on the machine hits all alike.

    Args:
        calls: what to measure, by name.
        rounds: measurements of each at least.
        budget: seconds in which there may be more of them.
        warm: rounds before, which do not count.
        wait: returns when the device is done.
        clock: what tells the seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for number in itertools.count():
        if number >= warm + rounds and time.perf_counter() - start > budget:
            return {name: statistics.median(values[warm:]) for name, values in seconds.items()}
        for name, call in calls.items():
            wait()
            before = clock()
            call()
            wait()
            seconds[name].append(clock() - before)
    raise AssertionError  # count() does not end


def must_agree(what: str, plain: Any, ours: Any, tolerance: float) -> None:
    """End the benchmark unless two arrays are equal up to `tolerance`, a share of the largest."""
    plain, ours = (np.asarray(values, dtype=np.float64) for values in (plain, ours))
    scale = np.abs(plain).max() or 1.0
    error = np.abs(plain - ours).max() / scale if plain.shape == ours.shape else np.inf
    if not error <= tolerance:  # also when it is not a number
        raise SystemExit(
            f"benchmark: {what}: the plain way and ours differ by {error:.1e} of the largest "
            f"value, allowed is {tolerance:.0e}; times of different results mean nothing."
        )


def resident(field: str) -> float:
    """MiB of this process in RAM: now (VmRSS) or at most so far (VmHWM).

    Other systems than Linux only know the latter.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        values = dict(
            line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines()
        )
        return int(values[field].removesuffix("kB")) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def forget_peak() -> None:
    """Let VmHWM start anew, where the system allows it; else earlier peaks count, too."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def largest(fits: Callable[[int], bool], most: int = 1024) -> int:
    """The largest batch that fits: doubled until one does not, then bisected; 0 when none does."""
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > 1 and good < most:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


@dataclass(frozen=True)
class Row:
    """A line of the table; `plain` and `limit` are None where there is no such thing."""

    section: str
    what: str
    unit: str
    plain: float | None
    ours: float
    limit: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times better ours is than the plain way."""
        return self._better_than(self.plain)

    @property
    def share(self) -> float | None:
        """The part of the limit that ours reaches; 1 is all of it."""
        return self._better_than(self.limit)

    def _better_than(self, other: float | None) -> float | None:
        if other is None:
            return None
        good, bad = (self.ours, other) if self.unit in MORE_IS_BETTER else (other, self.ours)
        return good / bad if bad else None

    def as_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {**asdict(self), "ratio": self.ratio, "share": self.share}


def table(rows: Sequence[Row]) -> str:
    """The rows below their headings, in aligned columns."""

    def number(value: float | None, pattern: str = "") -> str:
        if value is None:
            return "-"
        return format(value, pattern or (",.0f" if value >= 100 else ".3g"))

    lines = [("", "what", "unit", "plain", "ours", "ratio", "limit", "of limit")]
    for row in rows:
        ways = number(row.plain), number(row.ours), number(row.ratio, ".2f")
        bound = number(row.limit), number(row.share, ".0%")
        lines.append((row.section, row.what, row.unit, *ways, *bound))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pattern = "  ".join(f"{{:{'<' if k < 3 else '>'}{width}}}" for k, width in enumerate(widths))
    return "\n".join(pattern.format(*line) for line in lines)


def say(text: str) -> None:
    """Progress, beside the table."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
