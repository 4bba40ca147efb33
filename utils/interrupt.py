"""Signals that ask a run to stop: pre-emption by a scheduler, `kill`, Ctrl-C.

Every process of a run answers them from its first lines until it is gone. While it starts
(`end_at_once`, called by the entry scripts) a signal ends the process on the spot. In the work that
`watch` surrounds it raises `Interrupted`; while training it is only noted, and the loop, which asks
after each iteration, saves where it stands and raises. When the work is over signals are ignored:
its exit code stands. Knows nothing of ranks: `Ranks.any` makes all of them stop at the same
iteration.
"""

# Entry scripts import this first, so what takes long to import is imported where it is used.
from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

EXIT_INTERRUPTED = 75  # "temporary failure, try again" of sysexits.h: continue with -r auto
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)
PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that comes when the parent dies
PATIENCE = 2  # seconds after which another Ctrl-C is meant to end the run at once

_started = False  # whether an entry script runs, whose process is this run's alone
_asked: str | None = None  # name of the first signal
_since = 0.0
_deferred = False
_ending = False  # whether a signal raised: the next must not tear the clearing up apart


class Interrupted(BaseException):
    """A signal asked the run to stop; whatever was to be saved is saved."""


def asked() -> str | None:
    """Name of the signal that asked this process to stop, if one did."""
    return _asked


Handler = Callable[[int, FrameType | None], None]


def end_at_once() -> None:
    """From now on a signal ends this process: for entry scripts, before they import anything."""
    global _started
    _started = True
    for number in SIGNALS:
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """No exception: an import or a destructor may swallow it, or turn it into another."""
    words = f"{os.path.basename(sys.argv[0])}: stopped by {signal.Signals(number).name}.\n"
    with contextlib.suppress(OSError):
        os.write(2, words.encode())
    os._exit(EXIT_INTERRUPTED)


def ignore() -> None:
    """The work is over: no signal changes how this process ends.

    A Python function as handler would not do: the interpreter takes it away when it shuts down, and
    a signal would kill the process in its last moments.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exiting() -> None:
    """`ignore`, where an entry script has called `end_at_once`."""
    if _started:
        ignore()


def install(handler: Handler | None = None) -> dict[int, Any]:
    """Handle the signals from now on; returns the handlers that did so before.

    Args:
        handler: instead of what is described above.
    """
    global _asked, _deferred, _ending
    _asked, _deferred, _ending = None, False, False
    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there
        return {}
    return {number: signal.signal(number, handler or _note) for number in SIGNALS}


@contextlib.contextmanager
def watch(handler: Handler | None = None) -> Iterator[None]:
    """`install` for a block. In a process that is started for it, the block is the last work."""
    before = install(handler)
    try:
        yield
    except Exception as error:
        if (cause := cause_of(error)) is not error:
            raise cause from None
        raise
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_IGN if old is _leave else old)


def cause_of(error: BaseException) -> BaseException:
    """`error`, or the `Interrupted` of which an import or a library has made it."""
    if _ending and not isinstance(error, Interrupted):
        return Interrupted(f"stopped by {_asked}.")
    return error


def defer() -> None:
    """From now on only note signals, so that no iteration or file is torn apart."""
    global _deferred
    _deferred = True


def stop_deferring() -> None:
    """End what `defer` began: from now on a signal raises at once, one that has come already now.

    Raises:
        Interrupted: one has.
    """
    global _deferred, _ending
    _deferred = False
    if _asked is not None:
        _ending = True
        raise Interrupted(f"stopped by {_asked}.")


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

    It ignores SIGINT and SIGTERM itself; the others stay blocked in it.
    """
    from multiprocessing import resource_tracker

    with shield():
        resource_tracker.ensure_running()


@contextlib.contextmanager
def shield() -> Iterator[None]:
    """Keep signals waiting while processes are started that will `leave_to_parent` or `unshield`.

    They inherit the mask, so that none meets them before they are ready.
    """
    _libc()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unshield() -> None:
    """In a process that was started under `shield`: take the signals that have waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@functools.cache
def _libc() -> Any:
    """The C library, opened before any fork.

    A process that is forked while another thread holds the loader's lock would wait for it for
    ever.
    """
    import ctypes

    return ctypes.CDLL(None)


def start_method(workers: int) -> str | None:
    """How loading processes are to be started, for `DataLoader`: None as ever.

    Python 3.14 has them started by a server, which then is the parent that they are left to.
    """
    return "fork" if workers and sys.platform == "linux" else None


def leave_to_parent(worker: int = 0) -> None:
    """Let a loading process outlive signals to its whole group: its parent will end it.

    A scheduler signals every process of a job, and a run that lost its workers could not finish
    the iteration. So only a SIGTERM that the parent itself sends ends this process, or the parent's
    own end, which a launcher could not notice while loading processes hold its pipes.
    """
    import multiprocessing

    starter = multiprocessing.parent_process()
    assert starter is not None, "only a process of multiprocessing has a parent to be left to"
    if sys.platform == "linux":
        _libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
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
