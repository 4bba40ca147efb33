"""Signals that ask a run to stop: pre-emption by a scheduler, `kill`, Ctrl-C.

Every process of a run watches for them. Outside training such a signal ends the process at once;
while training it is only noted, and the loop, which asks after each iteration, saves where it
stands and raises `Interrupted`. Knows nothing of ranks: `Ranks.any` makes all of them stop at the
same iteration.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType

from utils.misc import Interrupted

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)
PATIENCE = 2  # seconds after which another Ctrl-C is meant to end the run at once

_asked: str | None = None  # name of the first signal
_since = 0.0
_deferred = False


def asked() -> str | None:
    """Name of the signal that asked this process to stop, if one did."""
    return _asked


@contextlib.contextmanager
def watch(handler: Callable[[int, FrameType | None], None] | None = None) -> Iterator[None]:
    """Handle the signals inside the block; `handler` replaces what is described above."""
    global _asked
    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there
        yield
        return
    _asked = None
    before = {number: signal.signal(number, handler or _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Only note signals inside the block, so that an iteration or a file is not torn apart."""
    global _deferred
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before


def _note(number: int, frame: FrameType | None) -> None:
    global _asked, _since
    name, now = signal.Signals(number).name, time.monotonic()
    impatient = number == signal.SIGINT and _asked is not None and now - _since > PATIENCE
    if not _deferred or impatient:
        raise Interrupted(f"stopped by {name}.")
    if _asked is None:
        _asked, _since = name, now


def start_resource_tracker() -> None:
    """Start multiprocessing's helper process so that no signal to the whole group ends it.

    It ignores SIGINT and SIGTERM itself; what is ignored here while it starts, it ignores, too.
    """
    others = [number for number in SIGNALS if number not in (signal.SIGINT, signal.SIGTERM)]
    before = {number: signal.signal(number, signal.SIG_IGN) for number in others}
    resource_tracker.ensure_running()
    for number, old in before.items():
        signal.signal(number, old)


def leave_to_parent(worker: int = 0) -> None:
    """Let a loading process outlive signals to its whole group: its parent will end it.

    A scheduler signals every process of a job, and a run that lost its workers could not finish
    the iteration. So only a SIGTERM that the parent itself sends ends this process.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # only there does a signal tell who sent it
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
