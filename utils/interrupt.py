"""Signals that ask a run to stop: pre-emption by a scheduler, `kill`, Ctrl-C.

Every process of a run watches for them. Outside training such a signal ends the process at once;
while training it is only noted, and the loop, which asks after each iteration, saves where it
stands and raises `Interrupted`. Knows nothing of ranks: `Ranks.any` makes all of them stop at the
same iteration.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType

from utils.misc import Interrupted

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)
PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that comes when the parent dies
PATIENCE = 2  # seconds after which another Ctrl-C is meant to end the run at once

_asked: str | None = None  # name of the first signal
_since = 0.0
_deferred = False
_ending = False  # whether a signal raised: the next must not tear the clearing up apart


def asked() -> str | None:
    """Name of the signal that asked this process to stop, if one did."""
    return _asked


@contextlib.contextmanager
def watch(handler: Callable[[int, FrameType | None], None] | None = None) -> Iterator[None]:
    """Handle the signals inside the block; `handler` replaces what is described above."""
    global _asked, _deferred, _ending
    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there
        yield
        return
    _asked, _deferred, _ending = None, False, False
    before = {number: signal.signal(number, handler or _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def defer() -> None:
    """From now on only note signals, so that no iteration or file is torn apart."""
    global _deferred
    _deferred = True


def _note(number: int, frame: FrameType | None) -> None:
    global _asked, _since, _ending
    name, now = signal.Signals(number).name, time.monotonic()
    first = _asked is None
    impatient = number == signal.SIGINT and not first and now - _since > PATIENCE
    if first:
        _asked, _since = name, now
    if impatient or not (_deferred or _ending):
        _ending = True
        raise Interrupted(f"stopped by {name}.")


def start_resource_tracker() -> None:
    """Start multiprocessing's helper process so that no signal to the whole group ends it.

    It ignores SIGINT and SIGTERM itself; what is ignored here while it starts, it ignores, too.
    """
    others = [number for number in SIGNALS if number not in (signal.SIGINT, signal.SIGTERM)]
    before = {number: signal.signal(number, signal.SIG_IGN) for number in others}
    resource_tracker.ensure_running()
    for number, old in before.items():
        signal.signal(number, old)


@contextlib.contextmanager
def shield() -> Iterator[None]:
    """Keep signals waiting while processes are forked that will `leave_to_parent`.

    They inherit the mask, so that none meets them before they are ready.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(worker: int = 0) -> None:
    """Let a loading process outlive signals to its whole group: its parent will end it.

    A scheduler signals every process of a job, and a run that lost its workers could not finish
    the iteration. So only a SIGTERM that the parent itself sends ends this process, or the parent's
    own end, which a launcher could not notice while loading processes hold its pipes.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # only there does a signal tell who sent it
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
