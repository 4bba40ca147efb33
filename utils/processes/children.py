"""Processes that this one starts, and signals: none meets a child before it can take it, and
loading processes outlive those that a scheduler sends to every process of a job.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator

from utils.processes.signals import SIGNALS

PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that comes when the parent dies
# Looked up before any fork: a process that is forked while another thread holds the loader's lock
# would wait for it for ever.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Keep signals waiting while processes are started, which inherit that.

    They take them after `unblock_signals` or `leave_to_parent`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_signals() -> None:
    """Take the signals that have waited since this process was started."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def start_method(workers: int) -> str | None:
    """How so many loading processes are to be started, for `DataLoader`.

    Python 3.14 has them started by a server, which then would be the parent they are left to.
    """
    return "fork" if workers and sys.platform == "linux" else None


def leave_to_parent(worker: int = 0) -> None:
    """Let only its parent, or the parent's end, end this loading process.

    A run that lost its loading processes to a signal could not finish the iteration. A launcher
    does not notice that a rank has ended while loading processes hold its pipes.
    """
    starter = multiprocessing.parent_process()
    assert starter is not None, "only a process of multiprocessing has a parent to be left to"
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != starter.pid:  # it ended before it could be noticed
        os._exit(0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # only there does a signal tell who sent it
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != starter.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
