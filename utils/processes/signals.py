"""Signals that ask a run to stop: pre-emption by a scheduler, `kill`, Ctrl-C.

Every process answers them from its first lines until it is gone. While it starts (`end_at_once`)
a signal ends it on the spot. Inside `watch` a signal raises `Interrupted`; after `defer_signals` it
is only noted, and training saves where it stands before it raises. When the work is over signals
are ignored: the exit code stands. Knows nothing of other processes.
"""

# Imported before anything else, so it imports only what is quickly there.
from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

EXIT_INTERRUPTED = 75  # "temporary failure, try again" of sysexits.h: continue with -r auto
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)
PATIENCE = 2  # seconds after which another Ctrl-C is meant to end the run at once

_pending: str | None = None  # name of the first signal
_since = 0.0
_deferred = False
_raised = False  # then the next signal must not tear the clearing up apart


class Interrupted(BaseException):
    """A signal asked the run to stop; whatever was to be saved is saved."""


def pending_signal() -> str | None:
    """Name of the signal that asked this process to stop, if one did."""
    return _pending


def end_at_once() -> None:
    """From now on a signal ends this process, which is this run's alone."""
    for number in SIGNALS:
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """No exception: an import or a destructor may swallow it, or turn it into another."""
    text = f"{os.path.basename(sys.argv[0])}: stopped by {signal.Signals(number).name}.\n"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
    os._exit(EXIT_INTERRUPTED)


def ignore_signals() -> None:
    """The work is over: no signal that would end this process at once ends it any more."""
    for number in SIGNALS:
        if signal.getsignal(number) is _leave:
            # The interpreter takes Python's own handlers away before the process is gone.
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def watch(handler: Callable[[int, FrameType | None], None] | None = None) -> Iterator[None]:
    """Handle signals in this block; `end_at_once` before it is followed by ignoring them.

    Args:
        handler: instead of what raises `Interrupted`.
    """
    global _pending, _deferred, _raised
    _pending, _deferred, _raised = None, False, False
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python lets no other set them
        before = {number: signal.signal(number, handler or _note) for number in SIGNALS}
    try:
        yield
    except BaseException as error:
        if _raised and not isinstance(error, Interrupted):  # an import or a library made this of it
            raise Interrupted(f"stopped by {_pending}.") from None
        raise
    finally:
        _deferred = True
        for number, old in before.items():
            signal.signal(number, signal.SIG_IGN if old is _leave else old)


def defer_signals() -> None:
    """From now on only note signals, so that no iteration or file is torn apart."""
    global _deferred
    _deferred = True


def stop_deferring() -> None:
    """End what `defer_signals` began: signals raise again, one that has come already does now.

    Raises:
        Interrupted: one has.
    """
    global _deferred, _raised
    _deferred = False
    if _pending is not None:
        _raised = True
        raise Interrupted(f"stopped by {_pending}.")


def _note(number: int, frame: FrameType | None) -> None:
    global _pending, _since, _raised
    name, now = signal.Signals(number).name, time.monotonic()
    first = _pending is None
    impatient = number == signal.SIGINT and not first and now - _since > PATIENCE
    if first:
        _pending, _since = name, now
    if impatient or not (_deferred or _raised):
        _raised = True
        raise Interrupted(f"stopped by {name}.")
