"""The log of a run: console (through tqdm, so bars survive) and `info.log`, on rank 0 only."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

log = logging.getLogger("dkd")
LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
LINE_EVERY = 10  # seconds between two lines of progress in a file


class _Lines(tqdm):
    """Progress for a file: a whole line now and then, none for what is done sooner."""

    def __init__(self, iterable: Iterable[Any] | None = None, **options: Any):
        options |= {"mininterval": LINE_EVERY, "delay": LINE_EVERY, "miniters": 1}
        super().__init__(iterable, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the line; `msg` would wipe it from a terminal."""
        if msg is None and not self.disable:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Lines are in nobody's way."""


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A progress bar of tqdm, whose options these are; lines where stderr is no terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(iterable, **options)
    return _Lines(iterable, leave=False, **options)


def progress_in_threads(
    work: Callable[[int], None], count: int, *, chunk: int, threads: int, **options: Any
) -> None:
    """Call `work` with 0 … `count` - 1 in threads, under a progress bar.

    The first error ends the rest and is raised.

    Args:
        work: spends most of its time without the interpreter's lock.
        chunk: calls that a thread takes at a time.
        options: of the bar.
    """

    def some(numbers: range) -> int:
        for number in numbers:
            work(number)
        return len(numbers)

    jobs = [range(count)[first : first + chunk] for first in range(0, count, chunk)]
    with progress(total=count, **options) as bar, ThreadPoolExecutor(threads) as pool:
        try:
            for done in pool.map(some, jobs):
                bar.update(done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # nobody wants the rest
            raise


class _TqdmHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


class _FileHandler(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk costs the log file, not the run."""
        log.removeHandler(self)
        log.warning("the log goes on without %s: %s", self.baseFilename, sys.exc_info()[1])


def setup_logger(file: Path | None, verbosity: int = 1, is_main: bool = True) -> None:
    """Send the log to the console and to `file`.

    Args:
        file: appended to; None: console only.
        verbosity: 0 warnings, 1 progress, 2 details; the file always gets progress.
        is_main: whether this process is rank 0; the others report warnings only, on the console.
    """
    close_logger()
    log.propagate = False
    log.setLevel(logging.DEBUG if is_main else logging.WARNING)
    console = _TqdmHandler()
    console.setLevel(LEVELS[verbosity])
    console.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(console)
    if file is not None and is_main:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = _FileHandler(file, encoding="utf-8", errors="backslashreplace")
        handler.setLevel(min(LEVELS[verbosity], logging.INFO))
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)


def close_logger() -> None:
    """Close the log's files and forget its handlers."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
