"""The log of a run: console (through tqdm, so bars survive) and `info.log`, on rank 0 only."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("dkd")
LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


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
        handler = _FileHandler(file, encoding="utf-8")
        handler.setLevel(min(LEVELS[verbosity], logging.INFO))
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)


def close_logger() -> None:
    """Close the log's files and forget its handlers."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
